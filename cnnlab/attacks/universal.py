"""One perturbation for all images.

Moosavi-Dezfooli et al. 2017, "Universal Adversarial Perturbations", found by stochastic gradient
steps as in Shafahi et al. 2020, "Universal Adversarial Training", algorithm 2.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _verdicts
from cnnlab.registry import Range


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)],
    norm: str = "linf",
    steps: Annotated[int, Range(1)] = 100,
    relative_step: Annotated[float, Range(0)] = 0.1,
    batch_size: Annotated[int, Range(1)] = 128,
    ceiling: Annotated[float, Range(0)] = 9.0,
) -> jax.Array:
    """The images with the one perturbation that `fit` finds for all of them.

    Unlike other attacks' results, an example's depends on the others: the set that is attacked is
    the batch (fit one on a large set with `fit`, and attack any images by `apply`). It is the mean
    loss that never falls; an example's own may.

    Args:
        key: one key, or one an example, of which the first is taken.
        logits_fn: pixels to logits [B, K].
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B], the true classes.
        eps: radius of the ball; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: as of `fit`, like the rest.
        relative_step: see `fit`.
        batch_size: see `fit`.
        ceiling: see `fit`.

    Returns:
        [B, H, W, C] float32, in the ball and in [0, 1].
    """
    delta = fit(
        key,
        logits_fn,
        images,
        labels,
        eps=eps,
        norm=norm,
        steps=steps,
        relative_step=relative_step,
        batch_size=batch_size,
        ceiling=ceiling,
    )
    return apply(delta, images, eps=eps, norm=norm)


def fit(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: float | jax.Array,
    norm: str = "linf",
    steps: int = 100,
    relative_step: float | jax.Array = 0.1,
    batch_size: int = 128,
    ceiling: float | jax.Array = 9.0,
) -> jax.Array:
    """The perturbation [H, W, C] in the eps ball that raises the mean loss most.

    Args:
        key: one key, or several, of which the first is taken.
        logits_fn: pixels to logits [B, K].
        images: [N, H, W, C] float32 in [0, 1].
        labels: [N], the true classes.
        eps: radius of the ball; may be traced.
        norm: of the ball and of a step.
        steps: of steepest ascent, on one batch each.
        relative_step: length of the first step in units of eps; it falls to 0 linearly.
        batch_size: drawn from the images for each step, without replacement; at most N.
        ceiling: cross-entropy above which an example counts no more, or a few that are lost already
            would rule the mean.

    Returns:
        Of the perturbations after every tenth of the steps, none included, that of the highest mean
        loss over all images.
    """
    key = _balls.example_keys(key, 1)[0]
    number = min(batch_size, len(images))
    ball = _verdicts.finite(eps, images, norm)
    # A ball of half the size around grey: `project` then keeps the perturbation in [-1, 1].
    grey = jnp.full((1, *images.shape[1:]), 0.5)

    def shrink(delta: jax.Array) -> jax.Array:
        return 2 * (_balls.project(grey + delta[None] / 2, grey, ball / 2, norm) - grey)[0]

    def mean_loss(delta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = logits_fn(jnp.clip(x + delta[None], 0, 1))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(jnp.minimum(losses, ceiling))

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        delta, found, highest = state
        order = jax.random.permutation(jax.random.fold_in(key, i), len(images))[:number]
        gradient = jax.grad(mean_loss)(delta, images[order], labels[order])
        length = relative_step * ball * (1 - i / steps)
        delta = shrink(delta + length * _balls.steepest(gradient[None], norm)[0])
        every = max(steps // 10, 1)
        value = lax.cond(
            ((i + 1) % every == 0) | (i + 1 == steps),
            lambda: mean_loss(delta, images, labels),
            lambda: -jnp.inf,
        )
        better = value > highest
        return delta, jnp.where(better, delta, found), jnp.maximum(value, highest)

    none = jnp.zeros(images.shape[1:])
    start = mean_loss(none, images, labels)
    return lax.fori_loop(0, steps, step, (none, none, start))[1]


def apply(
    delta: jax.Array, images: jax.Array, *, eps: float | jax.Array, norm: str = "linf"
) -> jax.Array:
    """The images [B, H, W, C] with the perturbation [H, W, C], in the ball and in [0, 1]."""
    return _balls.project(images + delta[None], images, eps, norm)
