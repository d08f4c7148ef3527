"""Transforms by filters and by noise: sharpness, blur, Gaussian noise.

Draws are those of torchvision's transforms of the same name, but for every example by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab.augment import _levels
from cnnlab.registry import Range
from cnnlab.types import Batch, CnnlabError


def sharpness(
    key: jax.Array,
    example: Batch,
    *,
    factor: Annotated[float, Range(0)] = 2.0,
    probability: Annotated[float, Range(0, 1)] = 0.5,
) -> Batch:
    """Moves away from a smoothed image or towards it (`RandomAdjustSharpness`).

    Equal to Pillow's `ImageEnhance.Sharpness` to the level.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        factor: 0 gives the smoothed image, 1 the image itself, 2 a sharper one.
        probability: of doing so.
    """
    sharpened = _levels.sharpen(_levels.to_levels(example.images), factor)
    chosen = jax.random.bernoulli(key, probability)
    images = jnp.where(chosen, _levels.to_images(sharpened), example.images)
    return dataclasses.replace(example, images=images)


def gaussian_blur(
    key: jax.Array,
    example: Batch,
    *,
    kernel_size: Annotated[int, Range(1)] = 5,
    sigma: Annotated[tuple[float, float], Range(1e-3)] = (0.1, 2.0),
) -> Batch:
    """Blurs by a Gaussian of random width (`GaussianBlur`).

    The result is not rounded to levels.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        kernel_size: taps an axis, odd.
        sigma: the least and the greatest standard deviation, in pixels; uniform between them.

    Raises:
        CnnlabError: `kernel_size` is even.
    """
    if kernel_size % 2 == 0:
        raise CnnlabError(f"gaussian_blur: kernel_size: expected an odd number, got {kernel_size}")
    low, high = jnp.asarray(sigma[0]), jnp.asarray(sigma[1])
    width = low + (high - low) * jax.random.uniform(key)
    return dataclasses.replace(example, images=blur(example.images, kernel_size, width))


def blur(image: jax.Array, kernel_size: int, sigma: jax.Array) -> jax.Array:
    """The image [H, W, C] convolved by a sampled Gaussian, mirrored about its border pixels."""
    half = kernel_size // 2
    taps = jnp.exp(-0.5 * (jnp.arange(-half, half + 1) / sigma) ** 2)
    taps /= taps.sum()
    rows, columns, channels = image.shape
    flat = image.reshape(rows, columns * channels)  # a long axis, which XLA vectorises
    for axis, size, unit in ((0, rows, 1), (1, columns, channels)):
        # numpy mirrors as often as it needs to where the kernel is larger than the image.
        mirrored = np.pad(np.arange(size), half, mode="reflect").tolist()
        outside = mirrored[:half] + mirrored[half + size :]
        lines = [jax.lax.slice_in_dim(flat, i * unit, (i + 1) * unit, axis=axis) for i in outside]
        padded = jnp.concatenate([*lines[:half], flat, *lines[half:]], axis)
        padded, taps = jax.lax.optimization_barrier((padded, taps))  # or made for each tap anew
        starts = (unit * i for i in range(kernel_size))
        parts = (jax.lax.slice_in_dim(padded, i, i + size * unit, axis=axis) for i in starts)
        flat = functools.reduce(
            jnp.add, (tap * part for tap, part in zip(taps, parts, strict=True))
        )
    image = flat.reshape(image.shape)
    return jnp.clip(image, 0, 1)  # the taps' sum is 1 but for rounding


def gaussian_noise(
    key: jax.Array, example: Batch, *, std: Annotated[float, Range(0)] = 0.1, clip: bool = True
) -> Batch:
    """Adds normal noise to every value of every pixel and clips to [0, 1] (`GaussianNoise`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        std: standard deviation, of pixels in [0, 1].
        clip: whether to clip; not so for networks that randomised smoothing certifies (Cohen et al.
            2019, section 3.3), and then last: other transforms take images in [0, 1].
    """
    noisy = example.images + std * jax.random.normal(key, example.images.shape)
    return dataclasses.replace(example, images=jnp.clip(noisy, 0, 1) if clip else noisy)


PLUGINS = {
    "sharpness": sharpness,
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": gaussian_noise,
}
