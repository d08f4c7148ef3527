"""Attacks as searches: rounds of steps that a driver may interrupt.

The same `Search` runs as one compiled loop over all examples (`perturb`), or step by step under a
driver that drops the examples which have fallen (`autoattack.run`). Each example's result is a
function of its own key, image and label, so both find the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _losses
from cnnlab.types import CnnlabError

FALLEN = float("inf")
"""The score of an example on which the model is wrong within the ball."""

HIGHEST = float(np.finfo(np.float32).max)
"""The highest score of any other."""


class Search(NamedTuple):
    """An attack in rounds (restarts, target classes), each on the examples still standing.

    Attributes:
        rounds: how many.
        steps: of each round.
        start: (keys [B], images, labels, round's number) -> state, a tree of arrays [B, ...].
        step: (state, step's number) -> state.
        outcome: state -> (images [B, H, W, C], score [B]): the best so far, and how good it is;
            `FALLEN` where it is adversarial.
    """

    rounds: int
    steps: int
    start: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any]
    step: Callable[[Any, jax.Array], Any]
    outcome: Callable[[Any], tuple[jax.Array, jax.Array]]


def round_keys(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """The keys of a round, [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def run(
    search: Search, key: jax.Array, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """The images that `best` finds; the clean one where the model is surer of the label there.

    A search that starts elsewhere than at the clean image, or climbs towards one class, may end so
    after few steps: with a lower cross-entropy and a lower margin than the clean image has.
    """
    found = best(search, key, logits_fn, images, labels)[0]

    def losses(x: jax.Array) -> jax.Array:
        logits = logits_fn(x)
        entropy = _losses.cross_entropy(logits, labels, labels)
        return jnp.stack([entropy, _losses.margin(logits, labels)])

    surer = (losses(found) < losses(images)).all(0)
    return jnp.where(_balls.per_example(surer), images, found)


def best(
    search: Search, key: jax.Array, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All rounds and steps as one loop.

    Args:
        search: the attack.
        key: one key, or one an example.
        logits_fn: pixels to logits.
        images: [B, H, W, C].
        labels: [B].

    Returns:
        The best images found, [B, H, W, C], and their scores, [B]: the clean ones and `FALLEN`
        where the model is wrong on them already.
    """
    keys = _balls.example_keys(key, len(images))
    score = jnp.where(_losses.wrong(logits_fn(images), labels), FALLEN, -jnp.inf)

    def one_round(
        number: jax.Array, old: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        state = search.start(round_keys(keys, number), images, labels, number)
        state = lax.fori_loop(0, search.steps, lambda i, s: search.step(s, i), state)
        return better(old, search.outcome(state))

    found: tuple[jax.Array, jax.Array] = lax.fori_loop(0, search.rounds, one_round, (images, score))
    return found


def better(
    old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Of two (images, score), each example's with the higher score; the old if equal."""
    higher = new[1] > old[1]
    return (
        jnp.where(_balls.per_example(higher), new[0], old[0]),
        jnp.where(higher, new[1], old[1]),
    )


def model(logits_fn: Any, draws: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(pixels, key) -> logits; a model that is drawn from once is not random and takes no key."""
    if draws > 1:
        return logits_fn
    return lambda images, _: logits_fn(images)


def classes(logits_fn: LogitsFn, images: jax.Array) -> int:
    """The number of a model's classes, without running it."""
    return int(jax.eval_shape(logits_fn, images).shape[-1])


def check_counts(**counts: int) -> None:
    """Raises a CnnlabError unless all are at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise CnnlabError(f"{name}: expected at least 1, got {count}")
