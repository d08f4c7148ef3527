"""Resizing of NHWC images: separable interpolation with its conventions written down.

Libraries disagree on what "bicubic" means. Here every convention is a parameter, and for each axis
one small matrix [out, in], computed on the host in float64, holds all of them:

| this function | equals |
|---|---|
| the defaults | Pillow's `Image.resize` on mode "F"; `jax.image.resize` |
| `antialias=True` | PyTorch's `interpolate(antialias=True)` |
| `antialias=False`, `outside="repeat"`, `cubic_coefficient=-0.75` | PyTorch's `interpolate` |
| the same with `align="centres"` | PyTorch's `interpolate(align_corners=True)` |
| `method="nearest"` | Pillow's `NEAREST`; PyTorch's `"nearest-exact"` |
"""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.types import CnnlabError

Method = Literal["nearest", "bilinear", "bicubic"]
Align = Literal["edges", "centres"]
Outside = Literal["drop", "repeat"]

# Beyond this many slices an axis they cost more than the matrix product, compilation included.
MAX_SLICES = 32


def resize(
    images: jax.Array,
    size: tuple[int, int],
    *,
    method: Method,
    antialias: bool = True,
    align: Align = "edges",
    outside: Outside = "drop",
    cubic_coefficient: float = -0.5,
) -> jax.Array:
    """Resizes images to a height and a width.

    An axis whose size does not change is left as it is, to the bit. `"nearest"` only moves values,
    so it takes any dtype (label maps); the others compute in float32 at least and return the
    images' dtype. All derivatives exist in forward and reverse mode.

    Args:
        images: [..., H, W, C].
        size: (h, w), at least 1 each.
        method: `"nearest"` takes the pixel in which the centre of the output pixel lies, on a
            border the next one (in exact arithmetic: other libraries round there); `"bilinear"` is
            the triangle filter; `"bicubic"` the filter of Keys 1981, "Cubic convolution
            interpolation for digital image processing", eq. 15.
        antialias: widens the filter by the factor by which an axis shrinks (Heckbert 1989,
            "Fundamentals of texture mapping and image warping", 3.5.3). Without effect on nearest
            and on an axis that grows.
        align: what the first and last pixels of input and output share: their outer `"edges"`
            (half-pixel centres: output i lies at (i + 1/2) * in / out - 1/2) or their `"centres"`
            (i * (in - 1) / (out - 1); PyTorch's `align_corners=True`).
        outside: what filter taps beyond the image do: `"drop"` leaves them out and rescales the
            others to sum to 1, `"repeat"` gives them the border pixel's value.
        cubic_coefficient: Keys' a, -1 to 0, the slope of the filter at distance 1: -0.5 (Pillow,
            third-order exact) or -0.75 (OpenCV, PyTorch without antialiasing).

    Returns:
        [..., h, w, C] in the images' dtype. Bicubic can overshoot the range of the input.

    Raises:
        CnnlabError: a shape, a name or a number is not as above, or integer images shall be
            interpolated.
    """
    _check(images, size, method, align)
    if method == "nearest":
        for axis, length in zip((-3, -2), size, strict=True):
            index = nearest_index(images.shape[axis], length, align=align)
            images = _pick(images, index, images.ndim + axis)
        return images
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    # The axis that shrinks most goes first: the other then has less to do.
    order = sorted(((-3, size[0]), (-2, size[1])), key=lambda a: a[1] / images.shape[a[0]])
    for axis, length in order:
        if length != images.shape[axis]:
            weights = interpolation_weights(
                images.shape[axis],
                length,
                method=method,
                antialias=antialias,
                align=align,
                outside=outside,
                cubic_coefficient=float(cubic_coefficient),
            )
            x = _apply(x, weights, images.ndim + axis, align)
    return x.astype(images.dtype)


@functools.lru_cache(maxsize=1024)
def interpolation_weights(
    in_size: int,
    out_size: int,
    *,
    method: Method,
    antialias: bool,
    align: Align,
    outside: Outside,
    cubic_coefficient: float,
) -> np.ndarray:
    """The matrix that `resize` applies to one axis; its rows sum to 1.

    Args:
        in_size: pixels of the input.
        out_size: pixels of the output.
        method: `"bilinear"` or `"bicubic"`.
        antialias: as for `resize`.
        align: as for `resize`.
        outside: as for `resize`.
        cubic_coefficient: as for `resize`.

    Returns:
        [out_size, in_size] float64, read-only.

    Raises:
        CnnlabError: a name or a number is not as `resize` says.
    """
    if outside not in get_args(Outside):
        raise CnnlabError(f'resize: outside: expected "drop" or "repeat", got {outside!r}')
    if not -1 <= cubic_coefficient <= 0:
        raise CnnlabError(f"resize: cubic_coefficient: expected -1 to 0, got {cubic_coefficient}")
    outputs = np.arange(out_size)
    if align == "edges":
        step = in_size / out_size
        positions = (outputs + 0.5) * step - 0.5
    else:
        step = (in_size - 1) / (out_size - 1)
        positions = outputs * step
    width = max(step, 1.0) if antialias else 1.0
    reach = math.ceil(2 * width) + 1  # past the support of either filter
    taps = np.arange(-reach, in_size + reach)
    distance = np.abs(taps - positions[:, None]) / width
    if method == "bilinear":
        weights = np.maximum(0.0, 1.0 - distance)
    else:
        weights = _keys(distance, cubic_coefficient)
    inside = weights[:, reach:-reach].copy()
    if outside == "repeat":
        inside[:, 0] += weights[:, :reach].sum(1)
        inside[:, -1] += weights[:, -reach:].sum(1)
    # Positions are rounded: a tap on the rim of the support is zero, not 1e-17.
    inside[np.abs(inside) < 1e-12] = 0.0
    inside /= inside.sum(1, keepdims=True)
    inside.setflags(write=False)
    return inside


def nearest_index(in_size: int, out_size: int, *, align: Align) -> np.ndarray:
    """For every output pixel the input pixel that `resize` takes by `"nearest"`: [out_size]."""
    outputs = np.arange(out_size)
    if align == "edges":  # floor((i + 1/2) * in / out), in integers
        return (2 * outputs + 1) * in_size // (2 * out_size)
    return (2 * outputs * (in_size - 1) + out_size - 1) // (2 * (out_size - 1))


def _check(images: jax.Array, size: tuple[int, int], method: str, align: str) -> None:
    if method not in get_args(Method):
        raise CnnlabError(
            f'resize: method: expected "nearest", "bilinear" or "bicubic", got {method!r}'
        )
    if align not in get_args(Align):
        raise CnnlabError(f'resize: align: expected "edges" or "centres", got {align!r}')
    if images.ndim < 3 or 0 in images.shape[-3:-1]:
        raise CnnlabError(f"resize: images: expected [..., H, W, C], got shape {images.shape}")
    if len(size) != 2 or any(length < 1 for length in size):
        raise CnnlabError(f"resize: size: expected (height, width), each at least 1, got {size}")
    if align == "centres" and 1 in size:
        raise CnnlabError(
            f"resize: size: expected at least 2 pixels an axis, got {size}: with one pixel the "
            'first and the last cannot both be aligned; use align="edges"'
        )
    if method != "nearest" and not jnp.issubdtype(images.dtype, jnp.floating):
        raise CnnlabError(
            f"resize: images: expected floating point for {method}, got {images.dtype}: convert "
            'first (images / 255), or use method="nearest" for labels'
        )


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _pick(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
    # Repetition and slices, where they do, have gradients without a scatter.
    in_size, out_size = x.shape[axis], len(index)
    if np.array_equal(index, np.arange(in_size)):
        return x
    if out_size % in_size == 0 and np.array_equal(
        index, np.arange(out_size) // (out_size // in_size)
    ):
        return jnp.repeat(x, out_size // in_size, axis=axis)
    steps = set(np.diff(index).tolist()) or {1}
    if len(steps) == 1 and 0 not in steps:
        return lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, steps.pop(), axis)
    return jnp.take(x, index, axis=axis, indices_are_sorted=True, mode="clip")


def _apply(x: jax.Array, weights: np.ndarray, axis: int, align: Align) -> jax.Array:
    out_size, in_size = weights.shape
    if align == "edges":
        divisor = math.gcd(out_size, in_size)
        period = out_size // divisor, in_size // divisor
    else:
        divisor = math.gcd(out_size - 1, in_size - 1)
        period = (out_size - 1) // divisor, (in_size - 1) // divisor
    if jax.default_backend() == "cpu" and 0 not in period:
        windows = [_window(weights[phase :: period[0]], period[1]) for phase in range(period[0])]
        if sum(taps for _, taps in windows) <= MAX_SLICES:
            return _by_phases(x, weights, windows, period[1], axis)
    # One contraction with a constant: the unit of every accelerator, and so is its transpose.
    product = jnp.tensordot(
        jnp.asarray(weights, x.dtype), x, axes=(1, axis), precision=lax.Precision.HIGHEST
    )
    return jnp.moveaxis(product, 0, axis)


def _window(rows: np.ndarray, step: int) -> tuple[int, int]:
    """Where the window that advances by `step` a row starts (maybe before 0), and its taps."""
    offsets = step * np.arange(len(rows))
    start = int(np.min((rows != 0).argmax(1) - offsets))
    last = int(np.max(rows.shape[1] - 1 - (rows[:, ::-1] != 0).argmax(1) - offsets))
    return start, last - start + 1


def _by_phases(
    x: jax.Array, weights: np.ndarray, windows: list[tuple[int, int]], step: int, axis: int
) -> jax.Array:
    """The product as sums of slices, which skip the zeros of the matrix.

    Output pixels that are `len(windows)` apart read the input `step` pixels apart, so those of one
    phase are sums of equally strided slices. With the stride as an axis of its own a slice and its
    gradient are contiguous. Where an axis doubles or halves (14 to 28 pixels, 64 channels) forward
    and gradient take a third to a half of the matrix product's time. From 224 to 64 pixels forward
    takes a third; with the gradient bilinear takes the same, bicubic (28 slices) a third more.
    """
    out_size, in_size = weights.shape
    phases, rows = len(windows), -(-out_size // len(windows))
    before = max(0, *(-start for start, _ in windows))
    reached = before + max(start + taps for start, taps in windows) + step * (rows - 1)
    total = -(-max(reached, before + in_size) // step) * step
    after = total - before - in_size
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    blocks = jnp.pad(x, pads)
    blocks = blocks.reshape(*x.shape[:axis], total // step, step, *x.shape[axis + 1 :])
    padded = np.pad(weights, ((0, phases * rows - out_size), (before, after)))
    shape = [1] * x.ndim
    shape[axis] = rows
    sums = []
    for phase, (start, taps) in enumerate(windows):
        mine = padded[phase::phases]
        terms = []
        for first in range(before + start, before + start + taps):
            factor = mine[np.arange(rows), first + step * np.arange(rows)].reshape(shape)
            block, place = divmod(first, step)
            view = lax.slice_in_dim(blocks, block, block + rows, axis=axis)
            view = lax.index_in_dim(view, place, axis + 1, keepdims=False)
            terms.append(view * jnp.asarray(factor, x.dtype))
        sums.append(functools.reduce(jnp.add, terms))
    merged = jnp.stack(sums, axis + 1).reshape(*x.shape[:axis], rows * phases, *x.shape[axis + 1 :])
    # Else XLA fuses both axes into one loop, which computes the first axis once for every tap of
    # the second: the gradient then takes about twice as long.
    return lax.optimization_barrier(lax.slice_in_dim(merged, 0, out_size, axis=axis))
