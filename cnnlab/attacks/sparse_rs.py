"""Sparse-RS: random search over a few pixels (L0), by scores only.

Croce et al. 2022, "Sparse-RS: a Versatile Framework for Query-Efficient Sparse Black-Box
Adversarial Attacks", algorithms 1 and 2. With one pixel this is the threat of Su et al. 2019, "One
Pixel Attack for Fooling Deep Neural Networks".
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _verdicts
from cnnlab.registry import Range

VARIANTS: dict[str, dict] = {"sparse_rs": {}, "one_pixel": {"eps": 1.0}}

_ENDS = np.array([50, 200, 500, 1000, 2000, 4000, 6000, 8000])
_DIVISORS = np.array([2, 4, 5, 6, 8, 10, 12, 15, 20], np.float32)
"""The share of pixels that change at once, divided by these until these of 10,000 queries."""


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)] = 10.0,
    norm: str = "l0",
    steps: Annotated[int, Range(1)] = 1000,
    share: Annotated[float, Range(0, 1)] = 0.3,
    targeted: bool = False,
) -> jax.Array:
    """Sets at most `eps` pixels to corners of the colour cube.

    Each step moves some of the pixels elsewhere, or only recolours them, and is kept if the margin
    grows. An example stops when it has fallen.

    Args:
        key: one key, or one an example.
        logits_fn: pixels to logits [B, K].
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B]; the true classes or, if `targeted`, those to reach.
        eps: how many pixels, with all their channels, may change; rounded down, may be traced.
        norm: `"l0"`.
        steps: queries after the first, at most.
        share: of the pixels that may move at once, before it decays; may be traced.
        targeted: whether `labels` are to be reached.

    Returns:
        [B, H, W, C] float32: the image of the largest margin found, the clean one included.

    Raises:
        CnnlabError: another norm than L0.
    """
    _balls.check_norm(norm, ("l0",))
    own_keys = _balls.example_keys(key, len(images))
    batch, height, width, channels = images.shape
    size = height * width
    clean = images.reshape(batch, size, channels)
    budget = jnp.minimum(jnp.floor(jnp.asarray(eps, jnp.float32)), size).astype(jnp.int32)

    def score(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_fn(flat.reshape(images.shape))
        return (
            _verdicts.margin(logits, labels, targeted=targeted),
            _verdicts.fooled(logits, labels, targeted=targeted),
        )

    def choose(order: jax.Array, allowed: jax.Array, number: jax.Array) -> jax.Array:
        def pick(_: jax.Array, left: jax.Array) -> jax.Array:
            first = jnp.argmax(jnp.where(left, order, -1.0), 1)
            return left & (jnp.arange(size)[None] != first[:, None])

        return allowed & ~lax.fori_loop(0, number, pick, allowed)

    def draw(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def one(own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            places, colours = jax.random.split(jax.random.fold_in(own, i))
            leaving, coming = jax.random.uniform(places, (2, size))
            corners = jax.random.bernoulli(colours, shape=(size, channels))
            return leaving, coming, corners.astype(jnp.float32)

        return jax.vmap(one)(own_keys)

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        i, x, changed, margin, won = state
        stage = jnp.searchsorted(_ENDS, (i * 10_000.0) / steps)
        number = jnp.round(share / jnp.asarray(_DIVISORS)[stage] * budget).astype(jnp.int32)
        number = jnp.clip(number, 1, jnp.maximum(budget, 1))
        leaving, coming, colours = draw(i)
        gone = choose(leaving, changed, number)
        # Those that go may come back in another colour; else one that is better than any outside,
        # though of the wrong colour, would be there to stay.
        come = choose(coming, ~changed | gone, jnp.minimum(number, budget))
        moved = jnp.where(come[..., None], colours, jnp.where(gone[..., None], clean, x))
        new_margin, new_won = score(moved)
        better = ~won & (new_won | (new_margin > margin))
        return (
            i + 1,
            jnp.where(better[:, None, None], moved, x),
            jnp.where(better[:, None], (changed & ~gone) | come, changed),
            jnp.where(better, new_margin, margin),
            won | new_won,
        )

    clean_margin, clean_won = score(clean)
    _, coming, colours = draw(jnp.int32(0))
    changed = choose(coming, jnp.ones((batch, size), bool), budget)
    x = jnp.where(changed[..., None], colours, clean)
    margin, won = score(x)
    _, x, _, margin, won = lax.while_loop(
        lambda state: (state[0] <= steps) & ~jnp.all(state[4]),
        step,
        (jnp.int32(1), x, changed, margin, won | clean_won),
    )
    better = ~clean_won & (won | (margin > clean_margin))
    return jnp.where(better[:, None, None], x, clean).reshape(images.shape)
