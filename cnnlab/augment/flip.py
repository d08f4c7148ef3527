"""Random mirroring, left to right."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cnnlab.types import Batch, CnnlabError


def apply(key: jax.Array, example: Batch, *, probability: float = 0.5) -> Batch:
    """Mirrors the image left to right.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of mirroring, 0 to 1.

    Raises:
        CnnlabError: the probability is out of range.
    """
    if not 0 <= probability <= 1:
        raise CnnlabError(f"flip: probability: expected 0 to 1, got {probability}")
    image = example.images
    mirror = jax.random.bernoulli(key, probability)
    return dataclasses.replace(example, images=jnp.where(mirror, image[:, ::-1], image))
