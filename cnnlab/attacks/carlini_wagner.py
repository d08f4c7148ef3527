"""Carlini & Wagner's L2 attack.

Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", sections V and VI.A.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _verdicts
from cnnlab.registry import Range

_INSIDE = 1 - 1e-6
"""Images are shrunk by this before the inverse of tanh, which is infinite at the ends."""

_CHECKS = 10
"""How often in a search a run is asked whether it still gets anywhere."""


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)] = math.inf,
    norm: str = "l2",
    steps: Annotated[int, Range(1)] = 1000,
    searches: Annotated[int, Range(1)] = 9,
    step_size: Annotated[float, Range(0)] = 0.01,
    initial_constant: Annotated[float, Range(0)] = 1e-3,
    confidence: Annotated[float, Range(0)] = 0.0,
    abort_early: bool = True,
    targeted: bool = False,
) -> jax.Array:
    """Minimises |x' - x|^2 + c max(confidence - margin, 0) over x' = (tanh(w) + 1) / 2 by Adam.

    A binary search finds the smallest c, for each example, with which that ends at an adversarial
    image. The nearest adversarial iterate of all searches is given back.

    Args:
        key: not drawn from.
        logits_fn: pixels to logits [B, K].
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B]; the true classes or, if `targeted`, those to reach.
        eps: examples that need more come back clean; may be traced.
        norm: `"l2"`.
        steps: of Adam for each c, a forward and a backward pass each.
        searches: how many values of c.
        step_size: Adam's learning rate; may be traced.
        initial_constant: the first c; times 10 until it is enough. May be traced.
        confidence: by how much the logit of another class is to lead; may be traced.
        abort_early: whether an example stops where a tenth of the steps has not lowered its
            best objective by 0.01 %; a search ends when all have.
        targeted: whether `labels` are to be reached.

    Returns:
        [B, H, W, C] float32: the nearest adversarial image found, in the ball, or the clean one.

    Raises:
        CnnlabError: another norm than L2.
    """
    del key
    _balls.check_norm(norm, ("l2",))
    adam = optax.adam(step_size)
    count = len(images)
    start = jnp.arctanh((2 * images - 1) * _INSIDE)

    def pixels(w: jax.Array) -> jax.Array:
        return (jnp.tanh(w) + 1) / 2

    def wins(logits: jax.Array) -> jax.Array:
        margin = _verdicts.margin(logits, labels, targeted=targeted)
        return _verdicts.fooled(logits, labels, targeted=targeted) & (margin >= confidence)

    def objective(w: jax.Array, constant: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        x = pixels(w)
        logits = logits_fn(x)
        margin = _verdicts.margin(logits, labels, targeted=targeted)
        squared = jnp.sum(jnp.square(x - images), (1, 2, 3))
        values = squared + constant * jnp.maximum(confidence - margin, 0)
        return values.sum(), (x, squared, wins(logits), values)

    def search(
        _: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        constant, low, high, nearest, least = state

        def step(state: Any) -> Any:
            i, w, adam_state, active, lowest, before, enough, nearest, least = state
            gradient, (x, squared, won, values) = jax.grad(objective, has_aux=True)(w, constant)
            won &= active
            better = won & (squared < least)
            nearest = jnp.where(_balls.per_example(better), x, nearest)
            least = jnp.where(better, squared, least)
            if abort_early:
                check = i % max(steps // _CHECKS, 1) == 0
                lowest = jnp.minimum(lowest, values)
                active &= ~check | (lowest < 0.9999 * before)
                before = jnp.where(check, lowest, before)
            update, adam_state = adam.update(gradient, adam_state)
            w = jnp.where(_balls.per_example(active), w + update, w)
            return i + 1, w, adam_state, active, lowest, before, enough | won, nearest, least

        initial = (
            jnp.int32(0),
            start,
            adam.init(start),
            jnp.ones(count, bool),
            jnp.full(count, jnp.inf),
            jnp.full(count, jnp.inf),
            jnp.zeros(count, bool),
            nearest,
            least,
        )
        final = lax.while_loop(lambda state: (state[0] < steps) & jnp.any(state[3]), step, initial)
        enough, nearest, least = final[-3:]
        low, high = jnp.where(enough, low, constant), jnp.where(enough, constant, high)
        constant = jnp.where(jnp.isinf(high), 10 * constant, (low + high) / 2)
        return constant, low, high, nearest, least

    state = (
        jnp.full(count, initial_constant),
        jnp.zeros(count),
        jnp.full(count, jnp.inf),
        images,
        jnp.where(wins(logits_fn(images)), 0.0, jnp.inf),  # nothing is nearer than the image itself
    )
    nearest = lax.fori_loop(0, searches, search, state)[3]
    return _verdicts.settle(
        logits_fn, nearest, images, labels, eps=eps, norm=norm, targeted=targeted
    )
