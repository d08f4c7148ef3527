"""Transforms of training examples, one file a family.

A transform is `apply(key, example, *, ...) -> example`, where an example is a `types.Batch` without
its first axis: `images` [H, W, C] in [0, 1]. A config lists transforms as text,
`("crop(padding=4)", "flip")`; `compose` makes the function that a batch goes through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from cnnlab import keys, registry
from cnnlab.types import Batch


def compose(transforms: tuple[str, ...]) -> Callable[[jax.Array, Batch], Batch]:
    """The function of a step's key and a batch that applies all transforms in order.

    Example i draws from the key of its position i, and each transform from a key of its own, so
    the result for one example depends neither on the batch size nor on the other examples.

    Raises:
        CnnlabError: a transform or an argument is unknown.
    """
    steps = []
    for text in transforms:
        plugin, arguments = registry.call("augment", text)
        steps.append(functools.partial(plugin.function, **arguments))

    def one(key: jax.Array, example: Batch) -> Batch:
        for position, step in enumerate(steps):
            example = step(jax.random.fold_in(key, position), example)
        return example

    def all_of(key: jax.Array, batch: Batch) -> Batch:
        if not steps:
            return batch
        return jax.vmap(one)(keys.per_example(key, len(batch.images)), batch)

    return all_of
