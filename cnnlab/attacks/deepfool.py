"""DeepFool: steps to the nearest face of the linearised decision region.

Moosavi-Dezfooli et al. 2016, "DeepFool: a simple and accurate method to fool deep neural networks",
algorithm 2 and, for Linf, section 3.3.
"""

from __future__ import annotations

import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _verdicts
from cnnlab.registry import Range


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)] = math.inf,
    norm: str = "l2",
    steps: Annotated[int, Range(1)] = 50,
    candidates: Annotated[int, Range(1)] = 9,
    overshoot: Annotated[float, Range(0)] = 0.02,
) -> jax.Array:
    """The first adversarial iterate of DeepFool, each clipped to [0, 1].

    Args:
        key: not drawn from.
        logits_fn: pixels to logits [B, K].
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B], the true classes.
        eps: examples that need more come back clean; may be traced.
        norm: `"l2"` or `"linf"`.
        steps: at most; fewer where all examples have fallen.
        candidates: how many other classes, the likeliest at the clean image, to go for; each costs
            a backward pass a step.
        overshoot: by which part to go beyond the boundary; may be traced.

    Returns:
        [B, H, W, C] float32: the adversarial image found, in the ball, or the clean one.

    Raises:
        CnnlabError: another norm.
    """
    del key
    _balls.check_norm(norm, ("l2", "linf"))
    clean_logits = logits_fn(images)
    classes = clean_logits.shape[1]
    own = jax.nn.one_hot(labels, classes)
    others = jnp.where(own > 0, -jnp.inf, clean_logits)
    _, rivals = lax.top_k(others, min(candidates, classes - 1))
    leads = jax.nn.one_hot(rivals.T, classes) - own[None]  # [candidates, B, K]

    def towards_nearest_face(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, pull = jax.vjp(logits_fn, x)
        normals = jax.vmap(lambda lead: pull(lead)[0])(leads)
        # The distance in a norm is the gap over the dual norm of its gradient.
        if norm == "l2":
            duals = jax.vmap(lambda g: _balls.length(g, "l2"))(normals)
        else:
            duals = jnp.sum(jnp.abs(normals), (2, 3, 4))
        gaps = jnp.abs(jnp.sum(leads * logits[None], 2)) / (duals + 1e-8)
        nearest = jnp.argmin(gaps, 0)[None]
        gap = jnp.take_along_axis(gaps, nearest, 0)[0]
        normal = jnp.take_along_axis(normals, nearest[..., None, None, None], 0)[0]
        # A little more than the gap, or the steps shrink for ever where overshoot is 0.
        ahead = _balls.per_example(gap + 1e-4) * _balls.steepest(normal, norm)
        return ahead, _verdicts.fooled(logits, labels)

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        i, x, delta, _ = state
        ahead, won = towards_nearest_face(x)
        delta += jnp.where(_balls.per_example(won), 0, ahead)
        moved = jnp.clip(images + (1 + overshoot) * delta, 0, 1)
        return i + 1, jnp.where(_balls.per_example(won), x, moved), delta, won

    won = _verdicts.fooled(clean_logits, labels)
    _, found, _, _ = lax.while_loop(
        lambda state: (state[0] < steps) & ~jnp.all(state[3]),
        step,
        (jnp.int32(0), images, jnp.zeros_like(images), won),
    )
    return _verdicts.settle(logits_fn, found, images, labels, eps=eps, norm=norm)
