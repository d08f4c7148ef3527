"""Random mirroring, left to right."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cnnlab.registry import Range
from cnnlab.types import Batch


def apply(
    key: jax.Array, example: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.5
) -> Batch:
    """Mirrors the image left to right.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of mirroring, 0 to 1.
    """
    image = example.images
    mirror = jax.random.bernoulli(key, probability)
    return dataclasses.replace(example, images=jnp.where(mirror, image[:, ::-1], image))
