"""Adversarial training: the images on which a network is trained, and the loss there.

`x` is the clean image, `x'` the adversarial one, `f` the network's class probabilities.

| `defence.name` | loss of an example | x' |
|---|---|---|
| `pgd_at` | the task's, at x' | `steps` of PGD on the cross-entropy |
| `trades` | the task's, at x, plus beta KL(f(x), f(x')) | PGD on KL(f(x), f(x')), from near x |
| `mart` | boosted cross-entropy at x' plus beta (1 - f_y(x)) KL(f(x), f(x')) | PGD, from near x |
| `fast` | the task's, at x' | one step of 1.25 eps from a random point |
| `free` | the task's, at x' | x plus a perturbation that is kept from update to update |

- `pgd_at`: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".
- `trades`: Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy",
  section 3.3; beta is their 1/lambda.
- `mart`: Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified
  Examples", section 3.2; beta is their lambda.
- `fast`: Wong et al. 2020, "Fast is better than free", algorithm 3.
- `free`: Shafahi et al. 2019, "Adversarial Training for Free!", algorithm 1: one backward pass
  gives the gradients of parameters and pixels, `replays` updates in a row see the same batch, and
  the perturbation stays for the next one. An epoch of the config counts updates, so it sees
  1/`replays` of the data.
- `defence.awp`: Wu et al. 2020, "Adversarial Weight Perturbation Helps Robust Generalization",
  equation 10: the update's gradient is taken where each kernel has moved up its own gradient by
  `awp` of its norm.

Batch statistics, as in the authors' programs: `pgd_at`, `fast` and `free` attack the network in
training mode, with the statistics of the batch at hand; `trades` and `mart` attack it in evaluation
mode, with running statistics. Looking for x' never moves running statistics; the passes of the
update do: one over x', of `trades` and `mart` first one over x and then one over x', with AWP at
the moved parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from cnnlab import attacks, keys
from cnnlab.types import CnnlabError, Hyper, PyTree

NEAR = 1e-3
"""Standard deviation of the noise from which TRADES and MART start, as their authors have it."""

CHECKED = 512
"""Training examples on which catastrophic overfitting is looked for."""

GAP = 0.2
"""It is there where PGD leaves so much less accuracy than the training's attack, and not half."""

TwoModes = tuple[attacks.LogitsFn, attacks.LogitsFn]
"""The network's logits in training mode, by the statistics of the batch, and in evaluation mode."""


def single_step(config: ConfigDict) -> bool:
    """Whether the training's attack makes one step, which invites catastrophic overfitting."""
    name = config.defence.name
    return name in ("fast", "free") or (name != "none" and config.defence.steps == 1)


def overfitted(own: float, stronger: float) -> bool:
    """Whether accuracies under the training's single step and under PGD show overfitting to it.

    Wong et al. 2020, section 5.4, stop where the second drops by 0.2; here the first, on the same
    images, tells a collapse from a network that never was robust.
    """
    return own - stronger >= GAP and stronger < own / 2


def length(config: ConfigDict, hyper: Hyper) -> jax.Array:
    """The length of the attack's steps together, in units of eps."""
    default = {"fast": 1.25, "free": 1.0}.get(config.defence.name, 2.5)
    given = hyper["defence.relative_step"]
    return jnp.where(given > 0, given, default)


def perturb(
    config: ConfigDict,
    key: jax.Array,
    models: TwoModes,
    images: jax.Array,
    targets: jax.Array,
    hyper: Hyper,
) -> jax.Array:
    """The images to train on, [B, H, W, C] in [0, 1] and in the ball; of all defences but `free`.

    Args:
        config: reads `defence`'s name, norm and steps.
        key: of the start.
        models: the network in its two modes.
        images: [B, H, W, C] in [0, 1].
        targets: [B, K] class probabilities.
        hyper: reads `defence.eps` and `defence.relative_step`.
    """
    name, norm, eps = config.defence.name, config.defence.norm, hyper["defence.eps"]
    steps = 1 if name == "fast" else config.defence.steps
    training, evaluation = models
    near = name in ("trades", "mart")
    logits_fn = evaluation if near else training
    if name == "trades":
        targets = lax.stop_gradient(jax.nn.softmax(evaluation(images)))
    if near:
        draws = jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(
            keys.per_example(key, len(images))
        )
        start = attacks.project(images + NEAR * draws, images, eps, norm)
    else:
        start = attacks.random_start(key, images, eps, norm)

    def climb(_: jax.Array, x: jax.Array) -> jax.Array:
        # To raise KL(p, f(x)) for a fixed p is to raise the cross-entropy with p.
        gradient = jax.grad(lambda x: cross_entropy(logits_fn(x), targets).sum())(x)
        ahead = x + length(config, hyper) * eps / steps * attacks.steepest(gradient, norm)
        return attacks.project(ahead, images, eps, norm)

    return lax.stop_gradient(lax.fori_loop(0, steps, climb, start))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[B], nats; `targets` [B, K] are probabilities."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def divergence(clean: jax.Array, adversarial: jax.Array) -> jax.Array:
    """KL(f(x), f(x')) from logits [B, K]; [B], nats."""
    ours = jax.nn.log_softmax(clean.astype(jnp.float32))
    theirs = jax.nn.log_softmax(adversarial.astype(jnp.float32))
    return (jnp.exp(ours) * (ours - theirs)).sum(-1)


def trades(loss: jax.Array, clean: jax.Array, adversarial: jax.Array, beta: jax.Array) -> jax.Array:
    """The loss of each example, [B].

    Args:
        loss: [B], the task's at the clean images.
        clean: [B, K] logits there.
        adversarial: [B, K] logits at the adversarial images.
        beta: weight of the divergence.
    """
    return loss + beta * divergence(clean, adversarial)


def mart(
    targets: jax.Array, clean: jax.Array, adversarial: jax.Array, beta: jax.Array
) -> jax.Array:
    """The loss of each example, [B].

    Args:
        targets: [B, K], one-hot.
        clean: [B, K] logits at the clean images.
        adversarial: [B, K] logits at the adversarial images.
        beta: weight of the divergence.
    """
    logits = adversarial.astype(jnp.float32)
    other = jnp.argmax(jnp.where(targets > 0, -jnp.inf, logits), -1)
    without = jnp.where(jax.nn.one_hot(other, logits.shape[-1]) > 0, -jnp.inf, logits)
    # log(1 - p) as that of all other probabilities together: exact where p is nearly 1.
    margin = -(jax.nn.logsumexp(without, -1) - jax.nn.logsumexp(logits, -1))
    unsure = 1 - (targets * jax.nn.softmax(clean.astype(jnp.float32))).sum(-1)
    boosted = cross_entropy(adversarial, targets) + margin
    return boosted + beta * unsure * divergence(clean, adversarial)


def move_weights(
    objective: Callable[[PyTree], jax.Array], params: PyTree, size: jax.Array
) -> PyTree:
    """The parameters after adversarial weight perturbation.

    Each kernel (an array of two or more axes) goes up its gradient by `size` times its own norm;
    biases, scales and offsets stay.

    Args:
        objective: parameters -> the loss.
        params: the parameters.
        size: relative to each kernel's norm.
    """

    def moved(w: jax.Array, g: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return w
        scale = jnp.linalg.norm(w.ravel()) / jnp.maximum(jnp.linalg.norm(g.ravel()), 1e-12)
        return w + size * scale * g

    return lax.stop_gradient(jax.tree.map(moved, params, jax.grad(objective)(params)))


def stronger(config: ConfigDict, hyper: Hyper) -> attacks.Attack:
    """PGD-10 in the ball of the training: what a network is held against to see overfitting."""
    return attacks.create("pgd", eps=hyper["defence.eps"], norm=config.defence.norm, steps=10)


def own(config: ConfigDict, hyper: Hyper) -> attacks.Attack:
    """The training's single step from a random point, as an attack."""
    return attacks.create(
        "pgd",
        eps=hyper["defence.eps"],
        norm=config.defence.norm,
        steps=1,
        relative_step=length(config, hyper),
        best=False,
    )


def check_labels(config: ConfigDict, soft: bool) -> None:
    """Refuses soft labels where a defence can't take them.

    Raises:
        CnnlabError: MART, whose loss looks at the one class that is right.
    """
    if soft and config.defence.name == "mart":
        raise CnnlabError(
            "defence.name='mart' expects hard labels, but augment.transforms mixes them: "
            f"{tuple(config.augment.transforms)}; take mixup and cutmix out, or another defence"
        )
