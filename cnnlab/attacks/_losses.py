"""Losses that attacks raise, one number an example, without gathers or sorting (slow on CPU).

Each is above zero, or its margin is, once an example is misclassified; `z` are its logits, from
the largest down, and `y` its label.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.types import CnnlabError

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits [B, K], labels [B], targets [B]) -> [B]."""


def at(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Each example's logit of a class, [B]."""
    return jnp.sum(jnp.where(_is(labels, logits), logits, 0), -1)


def wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the model is wrong, [B] bool."""
    return jnp.argmax(logits, -1) != labels


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The largest other logit less that of the label, [B]: above zero where the model is wrong."""
    others = jnp.where(_is(labels, logits), -jnp.inf, logits)
    return jnp.max(others, -1) - at(logits, labels)


def cross_entropy(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy, [B]."""
    return jax.nn.logsumexp(logits, -1) - at(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Difference of logits ratio, (max other - z_y) / (z_1 - z_3), [B].

    Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", equation 6: unlike cross-entropy's, its gradient does not depend on the
    scale of the logits.
    """
    first, _, third = _largest(logits, 3, "the DLR loss")
    others = jnp.where(_is(labels, logits), -jnp.inf, logits)
    (best,) = _largest(others, 1, "the DLR loss")
    return (best - at(logits, labels)) / (first - third + 1e-12)


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """The same towards a target class, (z_t - z_y) / (z_1 - (z_3 + z_4) / 2), [B]; equation 7."""
    first, _, third, fourth = _largest(logits, 4, "the targeted DLR loss")
    difference = at(logits, targets) - at(logits, labels)
    return difference / (first - 0.5 * (third + fourth) + 1e-12)


def difference(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """The target's logit less the label's, [B]."""
    return at(logits, targets) - at(logits, labels)


def ranked_class(logits: jax.Array, rank: int | jax.Array) -> jax.Array:
    """The class with the logit of this rank, [B] int32; 0 is the largest. `rank` may be traced."""
    return jnp.take(jnp.argsort(-logits, -1), rank, -1).astype(jnp.int32)


def _is(labels: jax.Array, logits: jax.Array) -> jax.Array:
    return labels[:, None] == jnp.arange(logits.shape[-1])[None]


def _largest(logits: jax.Array, count: int, what: str) -> list[jax.Array]:
    """The `count` largest logits, each [B]; a gradient goes to the first of equal ones."""
    if logits.shape[-1] < count:
        raise CnnlabError(
            f"{what} needs at least {count} classes, the model has {logits.shape[-1]}; use "
            "cross-entropy (attack 'apgd_ce')"
        )
    found = []
    rest = logits
    for _ in range(count):
        here = _is(lax.stop_gradient(jnp.argmax(rest, -1)), logits)
        found.append(jnp.sum(jnp.where(here, logits, 0), -1))
        rest = jnp.where(here, -jnp.inf, rest)
    return found
