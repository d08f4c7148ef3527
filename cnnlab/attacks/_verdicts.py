"""When an attack has won, and what an attack for the smallest perturbation gives back."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cnnlab.attacks import LogitsFn, _balls, _losses

TIE = 2.0**-16
"""Logits nearer to each other than this part of the largest one count as a tie.

Another program (other batch size, other device) rounds logits otherwise. An attack that stops on
the decision boundary has won there too only if it left that much room.
"""


def margin(logits: jax.Array, labels: jax.Array, *, targeted: bool = False) -> jax.Array:
    """By how much an attack has won, [B]: positive where it has.

    Args:
        logits: [B, K].
        labels: [B]; the classes to leave or, if `targeted`, those to reach.
        targeted: whether they are to be reached.
    """
    lead = _losses.margin(logits, labels)
    return -lead if targeted else lead


def fooled(
    logits: jax.Array, labels: jax.Array, *, targeted: bool = False, tie: float = TIE
) -> jax.Array:
    """Where the attack has won by more than rounding, [B] bool; arguments as of `margin`."""
    room = tie * jnp.max(jnp.abs(logits), 1)
    return margin(logits, labels, targeted=targeted) > room


def finite(eps: float | jax.Array, images: jax.Array, norm: str) -> jax.Array:
    """`eps`, or the diameter of [0, 1]^n if that is less: the same ball, but never infinite."""
    size = math.prod(images.shape[1:])
    diameter = {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[_balls.check_norm(norm)]
    return jnp.minimum(jnp.float32(eps), jnp.float32(1.001 * diameter))


def settle(
    logits_fn: LogitsFn,
    found: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: float | jax.Array,
    norm: str,
    targeted: bool = False,
) -> jax.Array:
    """The found images where they win inside the ball, the clean ones elsewhere.

    What lies outside is projected first, as the radius may be met only up to rounding. So a changed
    image is always an adversarial one, in the ball.
    """
    inside = _balls.project(found, images, finite(eps, images, norm), norm)
    # Half the room will do: what the search took must not be lost to rounding.
    won = fooled(logits_fn(inside), labels, targeted=targeted, tie=TIE / 2)
    return jnp.where(_balls.per_example(won), inside, images)
