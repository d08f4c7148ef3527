"""Random shift by padding and cropping, the usual transform of CIFAR (He et al. 2016, 4.2)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.registry import Range
from cnnlab.types import Batch


def apply(
    key: jax.Array,
    example: Batch,
    *,
    padding: Annotated[int, Range(1)] = 4,
    fill: Annotated[float, Range(0, 1)] = 0.0,
) -> Batch:
    """Shifts the image by up to `padding` pixels a direction, uniformly.

    Args:
        key: a typed key.
        example: `images` [H, W, C]; masks and boxes move along.
        padding: pixels, at least 1.
        fill: what moves into the image, 0 to 1; 0 into masks.
    """
    height, width, _ = example.images.shape
    start = jax.random.randint(key, (2,), 0, 2 * padding + 1)

    def cropped(values: jax.Array, fill: float) -> jax.Array:
        # One slice an example, which XLA copies whole: with a flip after it a gather of pixels
        # takes up to ten times as long (512 images of 32x32x3, two CPU cores).
        sides = (padding, padding, 0)
        border = jnp.asarray(fill, values.dtype)
        padded = lax.pad(values, border, [(side, side, 0) for side in sides])
        return lax.dynamic_slice(padded, (start[0], start[1], 0), values.shape)

    moved = dataclasses.replace(example, images=cropped(example.images, fill))
    if example.masks is not None:
        moved = dataclasses.replace(moved, masks=cropped(example.masks[..., None], 0)[..., 0])
    if example.boxes is not None:
        moves = (padding - start[jnp.array([[0, 1, 0, 1]])]).astype(jnp.float32)
        sides = np.array([[height, width, height, width]], np.float32)
        boxes = jnp.clip(example.boxes + moves, 0, sides)
        moved = dataclasses.replace(moved, boxes=boxes)
    return moved
