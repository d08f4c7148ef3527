"""Pooling of NHWC images: maximum, average, both over the whole map, averages to a given size.

XLA differentiates a maximum by select-and-scatter, which is slow on CPU and, on GPU, adds
overlapping windows in the order of atomics. Here the tangent is a sum over the window's taps of
`where(this tap is the first maximum, tangent at this tap, 0)`. JAX transposes that into the
gradient, so that one rule gives reverse mode, forward mode and everything built of them. For the
backward pass nothing is kept but the number of the tap with the first maximum, a byte a window.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.types import CnnlabError

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]

NO_PADDING: Pads = ((0, 0), (0, 0))

_UNROLLED = 64
"""The most taps that are written out one by one; XLA takes long to compile more."""

_UNROLLED_TILES = 4
"""The same for windows that tile the images, which can be reduced along an axis instead."""


def max_pool(
    images: jax.Array, window: Pair, *, strides: Pair | None = None, padding: Pads = NO_PADDING
) -> jax.Array:
    """The maximum of each window; padding never wins.

    The gradient goes to the first maximum of a window in row-major order and equals that of
    `lax.reduce_window` to the last bit, overlapping windows included; only a maximum that is NaN
    has none. All derivatives work: forward and reverse mode, of any order, under `vmap`, `remat`,
    loops and `jax.export`.

    Args:
        images: [B, H, W, C], floating point.
        window: height and width.
        strides: step of the window; the window itself if None.
        padding: ((top, bottom), (left, right)), each smaller than the window. More at the bottom
            and right than at the top and left gives other frameworks' ceil mode.

    Returns:
        [B, H', W', C]; rows and columns that no window reaches are left out.

    Raises:
        CnnlabError: images that are not [B, H, W, C] or not floating point, a window that does not
            fit into the padded images, or strides or padding out of range.
    """
    strides = window if strides is None else strides
    _check(images, window, strides, padding)
    _check_padding_below_window(window, padding, "a window of padding only has no maximum")
    if math.prod(window) > _UNROLLED and window != strides:
        # Rare and slow anyway; XLA's own derivatives are as right.
        return _reduce_window(images, window, strides, padding)
    return _max_pool(images, window, strides, padding)


def avg_pool(
    images: jax.Array,
    window: Pair,
    *,
    strides: Pair | None = None,
    padding: Pads = NO_PADDING,
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window, summed in float32 at least.

    Args:
        images: [B, H, W, C], floating point.
        window: height and width.
        strides: step of the window; the window itself if None.
        padding: ((top, bottom), (left, right)); smaller than the window unless
            `count_include_pad`.
        count_include_pad: whether padding counts as zeros; otherwise the mean is that of the
            window's pixels inside the image. The name and the default are PyTorch's.

    Returns:
        [B, H', W', C]; rows and columns that no window reaches are left out.

    Raises:
        CnnlabError: as for `max_pool`.
    """
    strides = window if strides is None else strides
    _check(images, window, strides, padding)
    if not count_include_pad:
        _check_padding_below_window(window, padding, "a window of padding only has no mean")
    total = _pad(images.astype(jnp.promote_types(images.dtype, jnp.float32)), padding, 0.0)
    # Rows, then columns: the work grows with the sum of the window's sides, not their product.
    for line, step in (((window[0], 1), (strides[0], 1)), ((1, window[1]), (1, strides[1]))):
        total = functools.reduce(jnp.add, _taps(total, line, step))
    if count_include_pad:
        return (total / math.prod(window)).astype(images.dtype)
    rows, columns = (
        np.minimum(starts + extent, size) - np.maximum(starts, 0)
        for starts, extent, size in zip(
            _starts(total.shape, strides, padding), window, images.shape[1:3], strict=True
        )
    )
    inside = (rows[:, None] * columns)[None, :, :, None]
    return (total / jnp.asarray(inside, total.dtype)).astype(images.dtype)


def global_avg_pool(images: jax.Array) -> jax.Array:
    """The mean over height and width, summed in float32 at least: [B, H, W, C] to [B, C].

    Args:
        images: [B, H, W, C], floating point.

    Raises:
        CnnlabError: images that are not [B, H, W, C] or not floating point.
    """
    _check_images(images)
    accurate = jnp.promote_types(images.dtype, jnp.float32)
    return jnp.mean(images, axis=(1, 2), dtype=accurate).astype(images.dtype)


def global_max_pool(images: jax.Array) -> jax.Array:
    """The maximum over height and width: [B, H, W, C] to [B, C].

    The gradient goes to the first maximum in row-major order, as in `max_pool`; `jnp.max` would
    share it between equal maxima.

    Args:
        images: [B, H, W, C], floating point.

    Raises:
        CnnlabError: images that are not [B, H, W, C] or not floating point.
    """
    _check_images(images)
    height, width = images.shape[1:3]
    return max_pool(images, (height, width))[:, 0, 0]


def adaptive_avg_pool(images: jax.Array, size: Pair) -> jax.Array:
    """The mean of each of `size` regions that together cover the images.

    Along an axis of n pixels and m outputs, output i is the mean of the pixels from floor(i n / m)
    to ceil((i + 1) n / m), the last not included, as PyTorch's layer of this name has it. So every
    pixel counts; regions overlap where m does not divide n, and pixels are repeated where m > n.
    Sums are float32 at least.

    Args:
        images: [B, H, W, C], floating point.
        size: height and width of the output.

    Returns:
        [B, *size, C].

    Raises:
        CnnlabError: images that are not [B, H, W, C] or not floating point, or a size that is not
            two integers of at least 1.
    """
    _check_images(images)
    if not _is_pair(size, 1):
        raise CnnlabError(
            f"size must be (height, width), both integers of at least 1, got {size!r}; give for "
            "instance (7, 7)"
        )
    if images.shape[1:3] == size:
        return images
    accurate = jnp.promote_types(images.dtype, jnp.float32)
    rows, columns = (
        jnp.asarray(_regions(n, m), accurate) for n, m in zip(images.shape[1:3], size, strict=True)
    )
    # Matrix units round float32 to fewer bits unless told not to.
    highest = lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, images.astype(accurate), precision=highest)
    x = jnp.einsum("jw,biwc->bijc", columns, x, precision=highest)
    return x.astype(images.dtype)


def _regions(pixels: int, outputs: int) -> np.ndarray:
    """[outputs, pixels]: the weight of each pixel in the mean of each region, rows sum to 1."""
    i, pixel = np.arange(outputs)[:, None], np.arange(pixels)
    first, end = i * pixels // outputs, -(-(i + 1) * pixels // outputs)
    inside = (pixel >= first) & (pixel < end)
    return inside / (end - first)


def _is_pair(value: object, least: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(number, int | np.integer) and number >= least for number in value)
    )


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4 or 0 in images.shape[1:3]:
        raise CnnlabError(
            f"pooling expects images [B, H, W, C] of at least one pixel, got shape {images.shape}; "
            "a single image needs a batch axis: images[None]"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise CnnlabError(
            f"pooling expects floating-point images, got {images.dtype}; convert them, for "
            "instance with images.astype(jnp.float32)"
        )


def _check(images: jax.Array, window: Pair, strides: Pair, padding: Pads) -> None:
    _check_images(images)
    for name, pair in (("window", window), ("strides", strides)):
        if not _is_pair(pair, 1):
            raise CnnlabError(
                f"{name} must be (height, width), both integers of at least 1, got {pair!r}; give "
                "for instance (2, 2)"
            )
    if not (
        isinstance(padding, tuple) and len(padding) == 2 and all(_is_pair(p, 0) for p in padding)
    ):
        raise CnnlabError(
            "padding must be ((top, bottom), (left, right)), integers of at least 0, got "
            f"{padding!r}; give for instance ((1, 1), (1, 1)), and crop the images where less is "
            "wanted"
        )
    for name, size, extent, pads in zip(
        ("height", "width"), images.shape[1:3], window, padding, strict=True
    ):
        if size + sum(pads) < extent:
            raise CnnlabError(
                f"a window of {name} {extent} does not fit into {size} pixels with padding "
                f"{pads}; use a window of at most {size + sum(pads)}, or larger images"
            )


def _check_padding_below_window(window: Pair, padding: Pads, reason: str) -> None:
    for name, extent, pads in zip(("height", "width"), window, padding, strict=True):
        if max(pads) >= extent:
            raise CnnlabError(
                f"padding must be smaller than the window, for {reason}; got padding {pads} for a "
                f"window of {name} {extent}; use at most {extent - 1}"
            )


def _starts(shape: tuple[int, ...], strides: Pair, padding: Pads) -> list[np.ndarray]:
    """The row and the column at which each window of a [B, H', W', C] result starts."""
    return [
        stride * np.arange(size) - before
        for size, stride, (before, _) in zip(shape[1:3], strides, padding, strict=True)
    ]


def _pad(images: jax.Array, padding: Pads, fill: float) -> jax.Array:
    if padding == NO_PADDING:
        return images
    return jnp.pad(images, ((0, 0), *padding, (0, 0)), constant_values=fill)


def _output_size(padded: jax.Array, window: Pair, strides: Pair) -> Pair:
    height, width = padded.shape[1:3]
    return (height - window[0]) // strides[0] + 1, (width - window[1]) // strides[1] + 1


def _fit(padded: jax.Array, height: int, width: int) -> jax.Array:
    """Cuts the bottom and right off, or adds zeros there: [B, height, width, C]."""
    rest = ((0, 0, 0), (0, height - padded.shape[1], 0), (0, width - padded.shape[2], 0), (0, 0, 0))
    return lax.pad(padded, jnp.zeros((), padded.dtype), rest)


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


def _taps(padded: jax.Array, window: Pair, strides: Pair) -> list[jax.Array]:
    """The arrays of `_views`, in a form whose transpose is fast.

    The images are first dealt out into one array for each pixel of a stride, of which a tap is a
    plain slice. Cotangents of the taps are so added on small arrays, which are interleaved once;
    those of strided slices would each be spread over the whole image, which for a 7x7 window at
    stride 7 takes 40 times as long on CPU.

    A pixel meets later taps in earlier windows, and JAX adds cotangents from the last use to the
    first. So overlapping windows are added in row-major order, as select-and-scatter does: the
    same sum to the last bit.
    """
    height, width = _output_size(padded, window, strides)
    down, right = strides
    # As many strides as there are windows, and further ones that the last window reaches into.
    rows, columns = height + -(-window[0] // down) - 1, width + -(-window[1] // right) - 1
    fitted = _fit(padded, rows * down, columns * right)
    dealt = fitted.reshape(fitted.shape[0], rows, down, columns, right, fitted.shape[-1])
    pixels = [
        [pixel[:, :, 0, :, 0] for pixel in lax.split(row, (1,) * right, axis=4)]
        for row in lax.split(dealt, (1,) * down, axis=2)
    ]
    return [
        pixels[i % down][j % right][
            :, i // down : i // down + height, j // right : j // right + width
        ]
        for i, j in itertools.product(range(window[0]), range(window[1]))
    ]


def _dealt(padded: jax.Array, window: Pair) -> jax.Array:
    """Windows that tile the images, where they lie: [B, H', h, W', w, C]."""
    height, width = _output_size(padded, window, window)
    fitted = _fit(padded, height * window[0], width * window[1])
    return fitted.reshape(padded.shape[0], height, window[0], width, window[1], padded.shape[-1])


def _tiles(padded: jax.Array, window: Pair) -> jax.Array:
    """The same, each as one axis in row-major order: [B, H', W', h w, C]."""
    swapped = _dealt(padded, window).transpose(0, 1, 3, 2, 4, 5)
    return swapped.reshape(*swapped.shape[:3], -1, padded.shape[-1])


def _reduce_window(images: jax.Array, window: Pair, strides: Pair, padding: Pads) -> jax.Array:
    return lax.reduce_window(
        images,
        images.dtype.type(-np.inf),  # a constant also under `jit`: else JAX cannot differentiate
        lax.max,
        (1, *window, 1),
        (1, *strides, 1),
        ((0, 0), *padding, (0, 0)),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(images: jax.Array, window: Pair, strides: Pair, padding: Pads) -> jax.Array:
    def by_views(images: jax.Array) -> jax.Array:
        return functools.reduce(
            jnp.maximum, _views(_pad(images, padding, -jnp.inf), window, strides)
        )

    def native(images: jax.Array) -> jax.Array:
        return _reduce_window(images, window, strides, padding)

    if math.prod(window) > (_UNROLLED_TILES if window == strides else _UNROLLED):
        return native(images)
    return lax.platform_dependent(images, cpu=by_views, default=native)


@_max_pool.defjvp
def _max_pool_jvp(
    window: Pair,
    strides: Pair,
    padding: Pads,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    (images,), (tangent,) = primals, tangents
    pooled = _max_pool(images, window, strides, padding)
    # The barriers keep XLA from computing such an intermediate result anew for each window and tap
    # that uses it, up to six times the work of all the rest.
    still = lax.stop_gradient((images, pooled))
    number = lax.optimization_barrier(_first_number(*still, window, strides, padding))

    # Without the checkpoint a mask for each tap would be kept for the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def at_first(number: jax.Array, tangent: jax.Array) -> jax.Array:
        padded = _pad(tangent, padding, 0.0)
        zero = jnp.zeros((), tangent.dtype)
        if window == strides:
            # As they lie: to put each into one axis would be a transposition on the way back.
            dealt = _dealt(padded, window)
            each = (1, 1, window[0], 1, window[1], 1)
            row, column = (lax.broadcasted_iota(number.dtype, each, axis) for axis in (2, 4))
            here = number[:, :, None, :, None] == row * window[1] + column
            return jnp.where(here, dealt, zero).sum(axis=(2, 4))
        shares = [
            jnp.where(number == tap, value, zero)
            for tap, value in enumerate(_taps(padded, window, strides))
        ]
        return functools.reduce(jnp.add, shares)

    return pooled, at_first(number, tangent)


def _first_number(
    images: jax.Array, pooled: jax.Array, window: Pair, strides: Pair, padding: Pads
) -> jax.Array:
    """The number of the tap with the first maximum, or that of no tap where the maximum is NaN.

    Taps are compared with each other, never with the maximum that was returned: XLA may have fused
    what made the images into either computation, rounded differently, so that they differ in the
    last bit and no tap would equal the maximum.
    """
    count = math.prod(window)
    dtype = np.min_scalar_type(count)
    padded = _pad(images, padding, -jnp.inf)
    if count > _UNROLLED:
        number = jnp.argmax(_tiles(padded, window), axis=3).astype(dtype)
    else:
        # Neighbours first: in a chain of comparisons each waits for the one before.
        views = _views(padded, window, strides)
        best = [(view, jnp.full(pooled.shape, tap, dtype)) for tap, view in enumerate(views)]
        while len(best) > 1:
            odd = best[len(best) // 2 * 2 :]
            pairs = zip(best[::2], best[1::2], strict=False)
            best = [_later_if_greater(*pair) for pair in pairs] + odd
        number = best[0][1]
    return jnp.where(jnp.isnan(pooled), dtype.type(count), number)


def _later_if_greater(
    first: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Of two (value, number), the one with the greater value; the first if they are equal."""
    greater = later[0] > first[0]
    value, number = (jnp.where(greater, b, a) for a, b in zip(first, later, strict=True))
    return value, number
