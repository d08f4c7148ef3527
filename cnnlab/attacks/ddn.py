"""DDN: decoupled direction and norm, the nearest adversarial image in L2 in few steps.

Rony et al. 2019, "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks
and Defenses", algorithm 1.
"""

from __future__ import annotations

import math
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
    eps: Annotated[float | jax.Array, Range(0)] = math.inf,
    norm: str = "l2",
    steps: Annotated[int, Range(1)] = 100,
    initial_norm: Annotated[float, Range(0)] = 1.0,
    gamma: Annotated[float, Range(0, 1)] = 0.05,
    targeted: bool = False,
) -> jax.Array:
    """The smallest of the adversarial iterates on a sphere that shrinks and grows.

    Gradient steps on the sphere of the current norm; that norm shrinks by 1 - gamma where the
    iterate is adversarial and grows by 1 + gamma where it is not. Images are not quantised.

    Args:
        key: one key, or one an example; only drawn from where the gradient vanishes.
        logits_fn: pixels to logits [B, K].
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B]; the true classes or, if `targeted`, those to reach.
        eps: examples that need more come back clean; may be traced.
        norm: `"l2"`.
        steps: a forward and a backward pass each.
        initial_norm: of the first perturbation; may be traced.
        gamma: relative change of the norm in a step; may be traced.
        targeted: whether `labels` are to be reached.

    Returns:
        [B, H, W, C] float32: the nearest adversarial image found, in the ball, or the clean one.

    Raises:
        CnnlabError: another norm than L2.
    """
    _balls.check_norm(norm, ("l2",))
    own_keys = _balls.example_keys(key, len(images))
    anywhere = jax.vmap(lambda own: jax.random.uniform(own, images.shape[1:], minval=-1.0))(
        own_keys
    )
    farthest = _balls.length(jnp.maximum(images, 1 - images), "l2")

    def evaluate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_fn(x)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        won = _verdicts.fooled(logits, labels, targeted=targeted)
        return values.sum() * (-1 if targeted else 1), won

    def note(
        x: jax.Array, won: jax.Array, nearest: jax.Array, least: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        size = _balls.distance(x, images, "l2")
        better = won & (size < least)
        return jnp.where(_balls.per_example(better), x, nearest), jnp.where(better, size, least)

    def step(
        i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        x, sphere, nearest, least = state
        gradient, won = jax.grad(evaluate, has_aux=True)(x)
        nearest, least = note(x, won, nearest, least)

        flat = jnp.max(jnp.abs(gradient), (1, 2, 3)) == 0
        gradient = jnp.where(_balls.per_example(flat), anywhere, gradient)
        length = 0.01 + 0.99 * (1 + jnp.cos(jnp.pi * i / steps)) / 2  # annealed from 1 to 0.01
        delta = x - images + length * _balls.steepest(gradient, "l2")
        sphere = jnp.minimum(sphere * jnp.where(won, 1 - gamma, 1 + gamma), farthest)
        size = jnp.maximum(_balls.length(delta, "l2"), 1e-12)
        delta *= _balls.per_example(sphere / size)
        return jnp.clip(images + delta, 0, 1), sphere, nearest, least

    count = len(images)
    state = (images, jnp.full(count, initial_norm), images, jnp.full(count, jnp.inf))
    x, _, nearest, least = lax.fori_loop(0, steps, step, state)
    nearest, _ = note(x, evaluate(x)[1], nearest, least)
    return _verdicts.settle(
        logits_fn, nearest, images, labels, eps=eps, norm=norm, targeted=targeted
    )
