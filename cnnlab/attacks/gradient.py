"""Attacks that follow the gradient: FGSM, FGM, BIM, PGD, MI-FGSM.

All are one algorithm: steps of steepest ascent of the loss, each projected onto the ball.

- `fgsm` and, in L2, `fgm`: one step of length eps from the image. Goodfellow et al. 2015,
  "Explaining and Harnessing Adversarial Examples", section 4.
- `fgsm_rs`: one step of 1.25 eps from a random point of the ball. Wong et al. 2020, "Fast is better
  than free", section 4.2.
- `bim`: steps of eps / steps from the image. Kurakin et al. 2017, "Adversarial examples in the
  physical world", section 2.2.
- `pgd`, and `pgd_20` to `pgd_100` by their numbers of steps: steps of 2.5 eps / steps from a random
  point. Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks",
  sections 2.1 and 5.
- `mim`: BIM with an average of the gradients in place of the last one (MI-FGSM). Dong et al. 2018,
  "Boosting Adversarial Attacks with Momentum", section 3.1.

For a transfer attack, `logits_fn` is that of another model than the one to be fooled.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _losses, _verdicts
from cnnlab.registry import Range, did_you_mean
from cnnlab.types import CnnlabError

VARIANTS: dict[str, dict] = {
    "fgsm": {"steps": 1, "relative_step": 1.0, "random_start": False},
    "fgm": {"steps": 1, "relative_step": 1.0, "random_start": False, "norm": "l2"},
    "fgsm_rs": {"steps": 1, "relative_step": 1.25},
    "bim": {"steps": 10, "relative_step": 1.0, "random_start": False},
    "mim": {"steps": 10, "relative_step": 1.0, "random_start": False, "momentum": 1.0},
    "pgd": {},
    "pgd_20": {"steps": 20},
    "pgd_40": {"steps": 40},
    "pgd_100": {"steps": 100},
}

LOSSES: dict[str, _losses.Loss] = {
    "ce": _losses.cross_entropy,
    "dlr": _losses.dlr,
    "margin": lambda logits, labels, targets: _losses.margin(logits, labels),
}
"""What an attack climbs: cross-entropy, difference of logits ratio, or the margin."""


class _Best(NamedTuple):
    """The best images so far, and whether they are adversarial and their loss, both [B]."""

    images: jax.Array
    won: jax.Array
    loss: jax.Array


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)],
    norm: str = "linf",
    steps: Annotated[int, Range(1)] = 40,
    step_size: Annotated[float, Range(0)] = 0.0,
    relative_step: Annotated[float, Range(0)] = 2.5,
    random_start: bool = True,
    restarts: Annotated[int, Range(1)] = 1,
    momentum: Annotated[float, Range(0)] = 0.0,
    loss: str = "ce",
    targeted: bool = False,
    best: bool = True,
) -> jax.Array:
    """Projected steepest ascent of the loss.

    Of all iterates of all restarts, and the clean image, each example gives back the best: an
    adversarial one rather than one that is not, then that of the highest loss. A forward and a
    backward pass a step, one more forward pass a restart, one in all for the clean images.

    Args:
        key: one key, or one an example.
        logits_fn: pixels to logits [B, K].
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B]; the true classes or, if `targeted`, those to reach.
        eps: radius of the ball, at least 0; may be traced.
        norm: of the ball and of a step: `"linf"`, `"l2"` or `"l1"`.
        steps: in each restart.
        step_size: length of a step in `norm`; 0 takes `relative_step`. May be traced.
        relative_step: length of all steps together in units of eps. May be traced.
        random_start: from a random point of the ball instead of the image.
        restarts: how often to start anew.
        momentum: decay of the sum of past gradients, each divided by its L1 norm first; may be
            traced.
        loss: `"ce"`, `"dlr"` or `"margin"`; a targeted attack descends it.
        targeted: whether `labels` are to be reached.
        best: whether to give back the best iterate; else the last one, which saves the forward
            passes beyond the steps, for adversarial training.

    Returns:
        [B, H, W, C] float32, in the ball and in [0, 1].

    Raises:
        CnnlabError: unknown norm or loss; restarts that would all be the same or be thrown away.
    """
    if loss not in LOSSES:
        raise CnnlabError(
            f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}{did_you_mean(loss, LOSSES)}"
        )
    if restarts > 1 and not (random_start and best):
        raise CnnlabError(
            f"restarts={restarts} needs random_start=True (or all are the same) and best=True (or "
            f"only the last one counts), got random_start={random_start}, best={best}"
        )
    ball = _verdicts.finite(eps, images, norm)
    length = jnp.where(jnp.float32(step_size) > 0, step_size, relative_step * ball / steps)
    own_keys = _balls.example_keys(key, len(images))

    def evaluate(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = logits_fn(x)
        values = LOSSES[loss](logits, labels, labels) * (-1 if targeted else 1)
        return values.sum(), (_verdicts.fooled(logits, labels, targeted=targeted), values)

    def keep(old: _Best, x: jax.Array, won: jax.Array, value: jax.Array) -> _Best:
        better = jnp.where(won == old.won, value > old.loss, won)
        return _Best(
            jnp.where(_balls.per_example(better), x, old.images),
            jnp.where(better, won, old.won),
            jnp.where(better, value, old.loss),
        )

    def ascend(
        _: jax.Array, state: tuple[jax.Array, jax.Array, _Best]
    ) -> tuple[jax.Array, jax.Array, _Best]:
        x, velocity, found = state
        gradient, (won, value) = jax.grad(evaluate, has_aux=True)(x)
        size = _balls.total(jnp.abs(gradient))
        gradient /= _balls.per_example(jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
        velocity = momentum * velocity + gradient
        slope = velocity
        if norm == "l1":  # whose steps change few pixels: not those that can go no farther
            slope = jnp.where(jnp.where(slope > 0, x < 1, x > 0), slope, 0)
        ahead = x + length * _balls.steepest(slope, norm)
        return (
            _balls.project(ahead, images, ball, norm),
            velocity,
            keep(found, x, won, value) if best else found,
        )

    def run(restart: jax.Array, state: tuple[jax.Array, _Best]) -> tuple[jax.Array, _Best]:
        x, found = images, state[1]
        if random_start:
            drawn = jax.vmap(lambda k: jax.random.fold_in(k, restart))(own_keys)
            x = _balls.random_start(drawn, images, ball, norm)
        x, _, found = lax.fori_loop(0, steps, ascend, (x, jnp.zeros_like(x), found))
        return x, keep(found, x, *evaluate(x)[1]) if best else found

    if best:
        clean = _Best(images, *evaluate(images)[1])
    else:
        clean = _Best(images, jnp.zeros(len(images), bool), jnp.zeros(len(images)))
    last, found = lax.fori_loop(0, restarts, run, (images, clean))
    return found.images if best else last
