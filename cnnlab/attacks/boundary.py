"""The boundary attack, which sees the model's decisions only.

Brendel, Rauber & Bethge 2018, "Decision-Based Adversarial Attacks: Reliable Attacks Against
Black-Box Machine Learning Models", section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _verdicts
from cnnlab.registry import Range
from cnnlab.types import CnnlabError

_EVERY = 10
"""Steps between two looks at how often the sideways step alone stays adversarial."""


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)] = math.inf,
    norm: str = "l2",
    steps: Annotated[int, Range(1)] = 5000,
    sideways: Annotated[float, Range(0)] = 0.01,
    forwards: Annotated[float, Range(0)] = 0.01,
    starts: jax.Array | None = None,
    tries: Annotated[int, Range(1)] = 100,
    targeted: bool = False,
) -> jax.Array:
    """Walks along the boundary of the decision region, and towards the image, in L2.

    From an adversarial image each step goes sideways on the sphere around the clean image, then a
    little inwards, and is kept if it is still adversarial. Both lengths adapt for each example:
    sideways steps alone are to succeed half the time, whole ones a quarter (the paper's rule,
    applied at once instead of over windows of steps).

    Args:
        key: one key, or one an example.
        logits_fn: pixels to logits [B, K], of which only decisions are used.
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B]; the true classes or, if `targeted`, those to reach.
        eps: examples that need more come back clean; may be traced.
        norm: `"l2"`.
        steps: a query each, and one more every tenth.
        sideways: first length of a step on the sphere, in units of the distance; may be traced.
        forwards: first length of a step inwards, likewise.
        starts: [B, H, W, C] adversarial images to start from; noise of random coarseness if None.
        tries: how many noises to try.
        targeted: whether `labels` are to be reached; needs `starts`.

    Returns:
        [B, H, W, C] float32: the nearest adversarial image found, in the ball, or the clean one
        (also where there was nothing adversarial to start from).

    Raises:
        CnnlabError: another norm than L2; a targeted attack without `starts`.
    """
    _balls.check_norm(norm, ("l2",))
    if targeted and starts is None:
        raise CnnlabError(
            "boundary: targeted=True needs starts=, images which the model takes for the targets"
        )
    own_keys = _balls.example_keys(key, len(images))

    def wins(x: jax.Array) -> jax.Array:
        return _verdicts.fooled(logits_fn(x), labels, targeted=targeted)

    clean_won = wins(images)
    if starts is None:
        starts = _noise(own_keys, wins, images, tries)
    x = _bisect(wins, images, starts)

    def step(
        i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, sideways, forwards = state
        noise = jax.vmap(lambda own: jax.random.normal(jax.random.fold_in(own, i), x.shape[1:]))(
            own_keys
        )
        radius = jnp.maximum(_balls.distance(x, images, "l2"), 1e-12)
        outwards = (x - images) / _balls.per_example(radius)
        along = jnp.sum(noise * outwards, (1, 2, 3))
        tangent = _balls.steepest(noise - _balls.per_example(along) * outwards, "l2")
        turned = outwards + _balls.per_example(sideways) * tangent
        turned *= _balls.per_example(radius / jnp.sqrt(1 + sideways**2))
        sphere = jnp.clip(images + turned, 0, 1)
        # Clipping has taken the image inwards already; the step is relative to where it was.
        reached = jnp.maximum(_balls.distance(sphere, images, "l2"), 1e-12)
        wanted = jnp.minimum((1 - forwards) * radius, reached)
        ahead = jnp.clip(images + (sphere - images) * _balls.per_example(wanted / reached), 0, 1)
        won = wins(ahead)
        stays = lax.cond(i % _EVERY == 0, lambda: wins(sphere) - 0.5, lambda: jnp.zeros(len(x)))
        return (
            jnp.where(_balls.per_example(won), ahead, x),
            jnp.clip(sideways * jnp.exp(stays), 1e-6, 1.0),
            jnp.clip(forwards * jnp.exp(0.1 * (won - 0.25)), 1e-6, 0.5),
        )

    lengths = (jnp.full(len(images), each) for each in (sideways, forwards))
    x, _, _ = lax.fori_loop(0, steps, step, (x, *lengths))
    x = jnp.where(_balls.per_example(clean_won), images, x)
    return _verdicts.settle(logits_fn, x, images, labels, eps=eps, norm=norm, targeted=targeted)


def _noise(
    own_keys: jax.Array,
    wins: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    tries: int,
) -> jax.Array:
    """Noise that is adversarial, and the images themselves where none was found.

    Fine noise is of one class to many models. So its grain is 1 pixel to the whole image, and every
    other try is black and white.
    """
    _, height, width, channels = images.shape
    levels = max(height, width).bit_length()

    def draw(own: jax.Array, i: jax.Array) -> jax.Array:
        values, grains = jax.random.split(jax.random.fold_in(jax.random.fold_in(own, i), 1))
        noise = jax.random.uniform(values, (height, width, channels))
        noise = jnp.where(i % 2 == 0, noise, jnp.round(noise))
        grain = 2 ** jax.random.randint(grains, (), 0, levels)
        return noise[jnp.arange(height) // grain][:, jnp.arange(width) // grain]

    def another(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, found, won = state
        noise = jax.vmap(lambda own: draw(own, i))(own_keys)
        now = wins(noise)
        return i + 1, jnp.where(_balls.per_example(now & ~won), noise, found), won | now

    _, found, _ = lax.while_loop(
        lambda state: (state[0] < tries) & ~jnp.all(state[2]),
        another,
        (jnp.int32(0), images, wins(images)),
    )
    return found


def _bisect(
    wins: Callable[[jax.Array], jax.Array], images: jax.Array, starts: jax.Array
) -> jax.Array:
    """The adversarial end of the boundary between each image and its start."""

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inner, outer = ends
        middle = (inner + outer) / 2
        won = _balls.per_example(wins(middle))
        return jnp.where(won, inner, middle), jnp.where(won, middle, outer)

    return lax.fori_loop(0, 16, halve, (images, starts))[1]
