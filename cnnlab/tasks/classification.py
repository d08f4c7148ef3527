"""Image classification: softmax cross-entropy, with label smoothing and auxiliary losses.

Auxiliary losses after Szegedy et al. 2015 (GoogLeNet, section 5: weight 0.3) and Lee et al. 2015
(deeply-supervised nets): the loss is that of the main head plus the weighted sum of those of the
auxiliary heads, which all see the same labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cnnlab.types import Batch, DatasetInfo, Hyper, Metrics, Outputs


def output_channels(info: DatasetInfo) -> int:
    """The number of logits that a model must give."""
    return info.num_classes


def loss(outputs: Outputs, batch: Batch, hyper: Hyper) -> jax.Array:
    """The loss of each example, auxiliary heads included; [B] float32, in nats.

    Args:
        outputs: logits [B, K], and [B, K] for each auxiliary head.
        batch: labels [B] or [B, K].
        hyper: reads `task.label_smoothing` (scalar) and `task.aux_weight` (one a head).
    """
    num_classes = outputs.logits.shape[-1]
    smoothing = hyper["task.label_smoothing"]
    targets = _probabilities(batch.labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    total = _cross_entropy(outputs.logits, targets)
    for head, logits in enumerate(outputs.aux):
        total += hyper["task.aux_weight"][head] * _cross_entropy(logits, targets)
    return total


def consistency(logits: jax.Array) -> jax.Array:
    """The Jensen-Shannon divergence of what a model says of V views of each example; [B], nats.

    Hendrycks et al. 2020, "AugMix", section 3: the mean over the views of the divergence of their
    class probabilities from the mean of all.

    Args:
        logits: [V, B, K].
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    # The logarithm of the mean, from logarithms: no probability underflows.
    middle = jax.nn.logsumexp(logs, axis=0) - jnp.log(len(logits))
    return (jnp.exp(logs) * (logs - middle[None])).sum(-1).mean(0)


def metrics(outputs: Outputs, batch: Batch) -> Metrics:
    """`nll` and `top1` of the main head, and `aux<i>/nll`, `aux<i>/top1` of each auxiliary one."""
    targets = _probabilities(batch.labels, outputs.logits.shape[-1])
    count = batch.weights.sum()
    found: Metrics = {}
    heads = {"": outputs.logits} | {f"aux{i}/": logits for i, logits in enumerate(outputs.aux)}
    for prefix, logits in heads.items():
        right = jnp.argmax(logits, -1) == jnp.argmax(targets, -1)
        found[f"{prefix}nll"] = ((_cross_entropy(logits, targets) * batch.weights).sum(), count)
        found[f"{prefix}top1"] = ((right * batch.weights).sum(), count)
    return found


def _probabilities(labels: jax.Array, num_classes: int) -> jax.Array:
    return jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)
