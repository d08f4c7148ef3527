"""Random mirroring, left to right and top to bottom."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cnnlab.registry import Range
from cnnlab.types import Batch


def flip(
    key: jax.Array, example: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.5
) -> Batch:
    """Mirrors the image left to right, masks and boxes along with it.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of mirroring, 0 to 1.
    """
    return _mirrored(jax.random.bernoulli(key, probability), example, 1)


def vertical_flip(
    key: jax.Array, example: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.5
) -> Batch:
    """Mirrors the image top to bottom, masks and boxes along with it.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of mirroring, 0 to 1.
    """
    return _mirrored(jax.random.bernoulli(key, probability), example, 0)


def _mirrored(mirror: jax.Array, example: Batch, axis: int) -> Batch:
    def mirrored(values: jax.Array) -> jax.Array:
        return jnp.where(mirror, jnp.flip(values, axis), values)

    changed = dataclasses.replace(example, images=mirrored(example.images))
    if example.masks is not None:
        changed = dataclasses.replace(changed, masks=mirrored(example.masks))
    if example.boxes is not None:
        ends = [0, 1, 2, 3]  # top, left, bottom, right
        ends[axis], ends[axis + 2] = axis + 2, axis
        across = example.images.shape[axis] - example.boxes
        moved = [across[:, end] if end != i else example.boxes[:, i] for i, end in enumerate(ends)]
        changed = dataclasses.replace(
            changed, boxes=jnp.where(mirror, jnp.stack(moved, 1), example.boxes)
        )
    return changed


PLUGINS = {"flip": flip, "vertical_flip": vertical_flip}
