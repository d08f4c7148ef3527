"""The classification loss against Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnlab.tasks import classification
from cnnlab.types import Batch, Hyper, Outputs

RNG = np.random.default_rng(0)
LOGITS, FIRST, SECOND = (jnp.array(RNG.normal(size=(6, 4)), jnp.float32) for _ in range(3))
LABELS = jnp.array(RNG.integers(0, 4, 6))


def batch(labels=LABELS, weights=None):
    return Batch(jnp.zeros((6, 2, 2, 1)), labels, jnp.ones(6) if weights is None else weights)


def hyper(smoothing=0.0, weights=()):
    return Hyper(
        {"task.label_smoothing": jnp.float32(smoothing), "task.aux_weight": jnp.array(weights)}
    )


def test_the_loss_is_softmax_cross_entropy():
    ours = classification.loss(Outputs(LOGITS), batch(), hyper())
    assert ours == pytest.approx(
        np.asarray(optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)), rel=1e-6
    )


def test_label_smoothing_is_szegedys():
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 4), 0.2)
    ours = classification.loss(Outputs(LOGITS), batch(), hyper(0.2))
    assert ours == pytest.approx(np.asarray(optax.softmax_cross_entropy(LOGITS, targets)), rel=1e-6)


def test_soft_labels_go_through():
    soft = jax.nn.softmax(FIRST)
    ours = classification.loss(Outputs(LOGITS), batch(soft), hyper())
    assert ours == pytest.approx(np.asarray(optax.softmax_cross_entropy(LOGITS, soft)), rel=1e-6)


def test_auxiliary_losses_are_added_with_their_weights():
    def plain(logits):
        return classification.loss(Outputs(logits), batch(), hyper())

    outputs = Outputs(LOGITS, aux=(FIRST, SECOND))
    ours = classification.loss(outputs, batch(), hyper(weights=(0.3, 0.1)))
    expected = plain(LOGITS) + 0.3 * plain(FIRST) + 0.1 * plain(SECOND)
    assert ours == pytest.approx(np.asarray(expected), rel=1e-6)


def test_metrics_leave_padding_out():
    weights = jnp.array([1.0, 1, 1, 1, 0, 0])
    found = classification.metrics(Outputs(LOGITS, aux=(FIRST,)), batch(weights=weights))
    for prefix, logits in (("", LOGITS), ("aux0/", FIRST)):
        total, count = found[f"{prefix}top1"]
        assert float(count) == 4
        assert float(total) == (np.argmax(logits[:4], 1) == np.asarray(LABELS[:4])).sum()
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:4], LABELS[:4]).sum()
        assert float(found[f"{prefix}nll"][0]) == pytest.approx(float(nll), rel=1e-6)
