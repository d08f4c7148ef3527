"""Two-dimensional convolution (cross-correlation), NHWC images and HWIO kernels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]
"""`"SAME"`, `"VALID"`, or explicit ((top, bottom), (left, right))."""

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(
    images: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding,
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> jax.Array:
    """Cross-correlates images with a kernel, as every framework's "convolution" does.

    The implementation is chosen from shapes and the backend while tracing, never by timing, so
    one program always gives the same bits.

    Args:
        images: [B, H, W, C].
        kernel: [h, w, C / groups, K].
        strides: step in height and width, at least 1.
        padding: `"SAME"`, `"VALID"` or ((top, bottom), (left, right)) zeros.
        dilation: distance of neighbouring kernel taps, at least 1.
        groups: number of channel groups; divides C and K.

    Returns:
        [B, H', W', K] with H', W' from `cnnlab.geometry.conv_output_size`, in the images' dtype.
    """
    if images.shape[-1] == 1 and jax.default_backend() == "cpu":
        return _conv_by_patches(images, kernel, strides, padding, dilation)
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=groups,
    )


def _conv_by_patches(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> jax.Array:
    # With one input channel XLA's CPU convolution leaves most of its vector lanes empty. A matrix
    # product over patches takes about two thirds of its time for 5x5 -> 6 and half of it for
    # 3x3 -> 16 (batch 128, 28x28, forward and kernel gradient) and less still for the input
    # gradient, and keeps every derivative. Shifted products are faster forward, slower backward.
    taps = kernel.shape[:2]
    extents = tuple(d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], extents, strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    height, width = (
        (size - extent) // stride + 1
        for size, extent, stride in zip(padded.shape[1:3], extents, strides, strict=True)
    )
    patches = jnp.concatenate(
        [
            padded[
                :,
                i * dilation[0] : i * dilation[0] + (height - 1) * strides[0] + 1 : strides[0],
                j * dilation[1] : j * dilation[1] + (width - 1) * strides[1] + 1 : strides[1],
            ]
            for i in range(taps[0])
            for j in range(taps[1])
        ],
        axis=-1,
    )
    flat = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return flat.reshape(*patches.shape[:3], kernel.shape[-1])
