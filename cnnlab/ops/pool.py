"""Pooling of NHWC images."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]

NO_PADDING: Pads = ((0, 0), (0, 0))


def max_pool(
    images: jax.Array, window: Pair, *, strides: Pair | None = None, padding: Pads = NO_PADDING
) -> jax.Array:
    """The maximum of each window; padding never wins.

    The gradient goes to the first maximum of a window in row-major order and equals that of
    `lax.reduce_window` to the last bit, overlapping windows included, without the
    select-and-scatter that makes XLA's slow on CPU and, on GPU, dependent on the order of atomics.

    Args:
        images: [B, H, W, C], floating point.
        window: height and width.
        strides: step of the window; the window itself if None.
        padding: ((top, bottom), (left, right)), each smaller than the window.

    Returns:
        [B, H', W', C]; rows and columns that no window reaches are left out.
    """
    return _max_pool(images, window, window if strides is None else strides, padding)


def avg_pool(
    images: jax.Array, window: Pair, *, strides: Pair | None = None, padding: Pads = NO_PADDING
) -> jax.Array:
    """The mean of each window; padding counts as zeros (PyTorch's `count_include_pad=True`).

    Args:
        images: [B, H, W, C], floating point.
        window: height and width.
        strides: step of the window; the window itself if None.
        padding: ((top, bottom), (left, right)).

    Returns:
        [B, H', W', C].
    """
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    views = _views(padded, window, window if strides is None else strides)
    return functools.reduce(jnp.add, views) / (window[0] * window[1])


def global_avg_pool(images: jax.Array) -> jax.Array:
    """The mean over height and width, summed in float32: [B, H, W, C] to [B, C]."""
    return jnp.mean(images, axis=(1, 2), dtype=jnp.float32).astype(images.dtype)


def _views(padded: jax.Array, window: Pair, strides: Pair) -> list[jax.Array]:
    """For each tap of the window in row-major order, its pixel of every window: [B, H', W', C]."""
    height, width = _output_size(padded, window, strides)
    return [
        padded[
            :,
            i : i + (height - 1) * strides[0] + 1 : strides[0],
            j : j + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for i, j in itertools.product(range(window[0]), range(window[1]))
    ]


def _output_size(padded: jax.Array, window: Pair, strides: Pair) -> Pair:
    height, width = padded.shape[1:3]
    return (height - window[0]) // strides[0] + 1, (width - window[1]) // strides[1] + 1


def _pad_lowest(images: jax.Array, padding: Pads) -> jax.Array:
    if padding == NO_PADDING:
        return images
    return jnp.pad(images, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(images: jax.Array, window: Pair, strides: Pair, padding: Pads) -> jax.Array:
    if jax.default_backend() == "cpu":
        return functools.reduce(jnp.maximum, _views(_pad_lowest(images, padding), window, strides))
    return lax.reduce_window(
        images,
        jnp.asarray(-jnp.inf, images.dtype),
        lax.max,
        (1, *window, 1),
        (1, *strides, 1),
        ((0, 0), *padding, (0, 0)),
    )


def _max_pool_forward(
    images: jax.Array, window: Pair, strides: Pair, padding: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    pooled = _max_pool(images, window, strides, padding)
    return pooled, (images, pooled)


def _max_pool_backward(
    window: Pair,
    strides: Pair,
    padding: Pads,
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array]:
    images, pooled = residuals
    padded = _pad_lowest(images, padding)
    taken = jnp.zeros(pooled.shape, bool)
    shares = []
    for view in _views(padded, window, strides):
        first = (view == pooled) & ~taken
        shares.append(jnp.where(first, cotangent, jnp.zeros_like(cotangent)))
        taken |= first
    place = _tile if window == strides else _scatter
    gradient = place(shares, padded.shape, window, strides)
    (top, _), (left, _) = padding
    height, width = images.shape[1:3]
    return (gradient[:, top : top + height, left : left + width],)


def _tile(
    shares: list[jax.Array], shape: tuple[int, ...], window: Pair, strides: Pair
) -> jax.Array:
    """Windows that do not overlap: each tap's share has a place of its own."""
    batch, height, width, channels = shares[0].shape
    tiles = jnp.stack(shares, axis=3).reshape(batch, height, width, *window, channels)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5)
    full = tiles.reshape(batch, height * window[0], width * window[1], channels)
    rest = ((0, 0), (0, shape[1] - full.shape[1]), (0, shape[2] - full.shape[2]), (0, 0))
    return jnp.pad(full, rest)


def _scatter(
    shares: list[jax.Array], shape: tuple[int, ...], window: Pair, strides: Pair
) -> jax.Array:
    """Overlapping windows: shares are spread by the strides, shifted and added.

    A pixel meets later taps in earlier windows, so adding the taps from the last to the first
    adds the windows in row-major order, as select-and-scatter does: the same sum to the last bit.
    """
    gradient = jnp.zeros(shape, shares[0].dtype)
    taps = list(itertools.product(range(window[0]), range(window[1])))
    for share, (i, j) in zip(reversed(shares), reversed(taps), strict=True):
        rows = (i, shape[1] - i - (share.shape[1] - 1) * strides[0] - 1, strides[0] - 1)
        columns = (j, shape[2] - j - (share.shape[2] - 1) * strides[1] - 1, strides[1] - 1)
        spread = lax.pad(share, jnp.zeros((), share.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))
        gradient = gradient + spread
    return gradient


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
