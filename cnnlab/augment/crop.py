"""Random shift by padding and cropping, the usual transform of CIFAR (He et al. 2016, 4.2)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cnnlab.registry import Range
from cnnlab.types import Batch


def apply(key: jax.Array, example: Batch, *, padding: Annotated[int, Range(1)] = 4) -> Batch:
    """Shifts the image by up to `padding` pixels a direction, uniformly, zeros moving in.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        padding: pixels, at least 1.
    """
    image = example.images
    offset = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return dataclasses.replace(
        example, images=jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)
    )
