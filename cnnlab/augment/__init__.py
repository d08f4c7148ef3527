"""Transforms of training examples, one file a family.

A transform is `apply(key, example, *, ...) -> example`, where an example is a `types.Batch` without
its first axis: `images` [H, W, C] in [0, 1]. One whose second argument is called `batch` takes a
whole batch instead (mixers, and policies that are faster so). A config lists transforms as text,
`("crop(padding=4)", "flip")`; `compose` makes the function that a batch goes through.

Arguments that are floats, or tuples of floats, may be traced: rows of a table that differ only in
them share one compilation. Whole numbers, texts and truth values shape the program. Each transform
takes `probability`, that of being applied to an example at all.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab import keys, registry
from cnnlab.registry import Call
from cnnlab.types import Batch, CnnlabError


class Transform(Protocol):
    """What `compose` makes.

    Attributes:
        count: how many `numbers` it takes.
    """

    count: int

    def __call__(self, key: jax.Array, batch: Batch, numbers: jax.Array | None = None) -> Batch:
        """The batch with all transforms applied; `numbers` None takes those of the config."""


def compose(transforms: tuple[str, ...]) -> Transform:
    """The function of a step's key, a batch and numbers that applies all transforms in order.

    Example i draws from the key of its position i, and each transform from a key of its own, so
    the result for one example depends neither on the batch size nor on the other examples (mixers,
    whose matter that is, excepted).

    Args:
        transforms: as a config lists them.

    Returns:
        (key, batch, numbers=None) -> batch; key: of the step; numbers: float32, in place of all
        `Call.numbers` in order.

    Raises:
        CnnlabError: a transform or an argument is unknown or out of range.
    """
    steps = [registry.call("augment", text) for text in transforms]
    own = np.asarray([number for step in steps for number in step.numbers], np.float32)

    def apply(key: jax.Array, batch: Batch, numbers: jax.Array | None = None) -> Batch:
        given = jnp.asarray(own if numbers is None else numbers)
        if given.shape != own.shape:
            raise CnnlabError(f"augment: expected numbers {own.shape}, got {given.shape}")
        rest = (given[i] for i in range(len(own)))
        for position, step in enumerate(steps):
            batch = _apply(step, position, key, batch, step.bound(rest))
        return batch

    apply.count = len(own)  # type: ignore[attr-defined]
    return cast(Transform, apply)


def soft_labels(transforms: tuple[str, ...]) -> bool:
    """Whether one of these transforms wants labels as probabilities, [B, K]."""
    calls = (registry.call("augment", text) for text in transforms)
    return any(getattr(call.plugin.module, "SOFT_LABELS", False) for call in calls)


def _apply(
    step: Call, position: int, key: jax.Array, batch: Batch, arguments: dict[str, Any]
) -> Batch:
    function = step.plugin.function
    probability = None
    if "probability" not in step.plugin.parameters:
        probability = arguments.pop("probability", None)
    if step.plugin.takes_batch:
        changed = function(jax.random.fold_in(key, position), batch, **arguments)
    else:

        def one(own: jax.Array, example: Batch) -> Batch:
            return function(jax.random.fold_in(own, position), example, **arguments)

        changed = jax.vmap(one)(keys.per_example(key, len(batch.images)), batch)
    if probability is None:
        return changed
    coin = 2**31 + position  # no number of a transform
    chosen = jax.vmap(lambda own: jax.random.bernoulli(jax.random.fold_in(own, coin), probability))(
        keys.per_example(key, len(batch.images))
    )

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, changed, batch)
