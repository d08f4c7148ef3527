"""Geometric warps in levels, 0 to 255, as Pillow computes them, and the matrices they take.

A matrix [2, 3] is Pillow's AFFINE data ((a, b, c), (d, e, f)): the output pixel at (x, y) reads the
input at (a x + b y + c, d x + e y + f), where x counts columns, y rows, from the image's corner, so
that the first pixel's centre is (1/2, 1/2). Pillow reads nothing outside the image's rectangle (it
puts the fill there, without blending) and repeats the border pixels for a filter that reaches over
the border. Both are done here likewise, so that border pixels are equal too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab.types import CnnlabError

Method = Literal["nearest", "bilinear", "bicubic"]
Scalar = jax.Array | np.ndarray | float
Fill = jax.Array | np.ndarray | float | Sequence[float]


def warp_levels(
    levels: jax.Array, matrix: jax.Array, *, method: Method, fill: Fill = 0.0
) -> jax.Array:
    """Pillow's `Image.transform(size, AFFINE, matrix, method, fillcolor=fill)`.

    `"nearest"` is equal to Pillow's result; `"bilinear"` and `"bicubic"` are rounded down as there
    and can differ by one level where single and double precision fall on two sides of a whole
    number.

    Args:
        levels: [..., H, W, C] float32, whole numbers 0 to 255; H and W at most 4096.
        matrix: [..., 2, 3] with the leading axes of the levels. It must not lead further than
            32,000 pixels away from the image.
        method: the filter; `"bicubic"` is Keys' with a = -1.
        fill: level of what moves in; a number or [C].

    Returns:
        [..., H, W, C] float32, whole numbers 0 to 255.

    Raises:
        CnnlabError: the method is unknown.
    """
    check(method)
    size = levels.shape[-3], levels.shape[-2]
    if method == "nearest":
        return warp_nearest(levels, matrix, fill=fill)
    return _interpolate(levels, *points(matrix, size), method, fill)


def warp_nearest(values: jax.Array, matrix: jax.Array, *, fill: Fill = 0) -> jax.Array:
    """`warp_levels` by `"nearest"` of any dtype: label maps too.

    Args:
        values: [..., H, W, C].
        matrix: [..., 2, 3] with the leading axes of the values.
        fill: what moves in; a number or [C].

    Returns:
        [..., H, W, C] of the values' dtype.
    """
    height, width, channels = values.shape[-3:]
    # One position per value, not per pixel: XLA makes vectors of the last axis only, and three
    # channels would be a short one (512 images of 32x32x3: 3 ms in place of 8).
    columns, rows = nearest_pixels(matrix, np.arange(width).repeat(channels), np.arange(height))
    return read(values, columns, rows, fill=fill)


def sample_levels(
    levels: jax.Array, x: jax.Array, y: jax.Array, *, method: Method, fill: Fill = 0.0
) -> jax.Array:
    """Reads levels at real-valued points, with Pillow's filters and its treatment of the border.

    Args:
        levels: [..., H, W, C] float32, whole numbers 0 to 255.
        x: [..., h, w] float32, columns from the corner, finite.
        y: [..., h, w] float32, rows from the corner, finite.
        method: the filter.
        fill: level of points outside the image; a number or [C].

    Returns:
        [..., h, w, C] float32, whole numbers 0 to 255.

    Raises:
        CnnlabError: the method is unknown.
    """
    check(method)
    if method == "nearest":
        channels = levels.shape[-1]
        return read(levels, *(jnp.repeat(_floor(v), channels, -1) for v in (x, y)), fill=fill)
    return _interpolate(levels, x, y, method, fill)


def resize_part(
    values: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array, jax.Array], method: Method
) -> jax.Array:
    """Pillow's `crop` of a part and `resize` of it to the size of the whole image.

    Pillow rounds to whole levels after the rows and again after the columns, and leaves out what a
    filter would read beyond the part. Bilinear repeats its fixed point. Nearest works on any dtype
    and differs only where a pixel's centre falls between two pixels, which Pillow decides by its
    rounding errors; here the second has it.

    Args:
        values: [H, W, C]; whole levels but for nearest.
        part: (top, left, height, width), int32 scalars; inside the image, at least one pixel.
        method: the filter; `"bicubic"` is Keys' with a = -1/2.

    Returns:
        [H, W, C].

    Raises:
        CnnlabError: the method is unknown.
    """
    check(method)
    height, width, channels = values.shape
    top, left, h, w = part
    if method == "nearest":
        columns = left + (2 * np.arange(width).repeat(channels) + 1) * w // (2 * width)
        rows = top + (2 * np.arange(height) + 1) * h // (2 * height)
        shape = height, len(columns)
        return read(
            values, jnp.broadcast_to(columns[None], shape), jnp.broadcast_to(rows[:, None], shape)
        )
    flat = values.reshape(height * width, channels).astype(jnp.int32)
    across, down = _filter(width, w, method), _filter(height, h, method)

    def row(tap: jax.Array) -> jax.Array:
        start = (top + tap)[:, None] * width + left
        terms = [
            flat.at[start + column[None]].get(mode="promise_in_bounds") * weight[None, :, None]
            for column, weight in across
        ]
        return _rounded(terms)

    terms = [row(tap) * weight[:, None, None] for tap, weight in down]
    return _rounded(terms).astype(values.dtype)


_WEIGHT_BITS = 22  # of the fixed point in which Pillow resizes


def _filter(length: int, part: jax.Array, method: Method) -> list[tuple[jax.Array, jax.Array]]:
    """For each tap of a filter that enlarges `part` pixels to `length`: pixels and weights."""
    # In 1 / (2 length), which is exact.
    position = (2 * jnp.arange(length) + 1) * part - length
    first = position // (2 * length)
    beyond = position - first * 2 * length
    if method == "bilinear":
        taps = [first, first + 1]
        weights = [_share(2 * length - beyond, 2 * length), _share(beyond, 2 * length)]
        whole = jnp.int32(2**_WEIGHT_BITS)
        weights[0] = jnp.where(first + 1 >= part, whole, weights[0])
        weights[1] = jnp.where(first < 0, whole, weights[1])
    else:
        taps = [first + k for k in (-1, 0, 1, 2)]
        far = beyond.astype(jnp.float32) / (2 * length)
        inside = [(tap >= 0) & (tap < part) for tap in taps]
        keys = [_keys(jnp.abs(far - k)) for k in (-1, 0, 1, 2)]
        keys = [jnp.where(has, key, 0.0) for has, key in zip(inside, keys, strict=True)]
        total = functools.reduce(jnp.add, keys)
        weights = [_floor(key / total * 2**_WEIGHT_BITS + 0.5) for key in keys]
    weights = [jnp.where((t >= 0) & (t < part), v, 0) for t, v in zip(taps, weights, strict=True)]
    return [(jnp.clip(t, 0, part - 1), v) for t, v in zip(taps, weights, strict=True)]


def _share(number: jax.Array, total: int) -> jax.Array:
    """The quotient of whole numbers of at most 2**13, rounded to fixed point."""
    half = (_WEIGHT_BITS + 1) // 2
    high, rest = jnp.divmod(number << half, total)
    doubled = (high << (_WEIGHT_BITS + 1 - half)) + (rest << (_WEIGHT_BITS + 1 - half)) // total
    return (doubled + 1) >> 1


def _keys(distance: jax.Array) -> jax.Array:
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))


def _rounded(terms: Sequence[jax.Array]) -> jax.Array:
    total = functools.reduce(jnp.add, terms) + 2 ** (_WEIGHT_BITS - 1)
    return jnp.clip(total >> _WEIGHT_BITS, 0, 255)


def read(values: jax.Array, columns: jax.Array, rows: jax.Array, *, fill: Fill = 0) -> jax.Array:
    """The values at whole positions, `fill` where there is none.

    Args:
        values: [..., H, W, C], any dtype.
        columns: [..., h, w * C] int32, of each value of the result.
        rows: [..., h, w * C] int32.
        fill: a number or [C].

    Returns:
        [..., h, w, C] of the values' dtype.
    """
    *batch, height, width, channels = values.shape
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    start = jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(*batch, 1, 1) * height
    index = (start + jnp.clip(rows, 0, height - 1)) * width + jnp.clip(columns, 0, width - 1)
    if channels > 1:
        channel = np.tile(np.arange(channels, dtype=np.int32), columns.shape[-1] // channels)
        index = index * channels + channel.reshape((1,) * len(batch) + (1, -1))
    found = values.reshape(-1).at[index].get(mode="promise_in_bounds")
    found = found.reshape(*found.shape[:-1], -1, channels)
    return _filled(inside.reshape(found.shape), found, fill)


def points(matrix: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Where the centres of the output pixels of (H, W) are read: x and y, each [..., H, W]."""
    across, down = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    x, y = (plane(*_row(matrix, i), across, down) for i in range(2))
    return x, y


def plane(
    a: jax.Array, b: jax.Array, c: Scalar, x: np.ndarray | jax.Array, y: np.ndarray | jax.Array
) -> jax.Array:
    """The sum a x + b y + c: [..., h, w].

    The products are exact (up to 1024 pixels and factors of 2), so it does not matter whether XLA
    fuses them with their sums, which differs from program to program: an image comes out alike
    alone and in a batch.

    Args:
        a: [...].
        b: [...].
        c: [...] or one number.
        x: [w], or [..., 1, w]: multiples of 1/2.
        y: [h], or [..., h, 1], likewise.
    """
    ones = (1,) * a.ndim
    across = jnp.asarray(x, jnp.float32)
    down = jnp.asarray(y, jnp.float32)
    across = across.reshape(*ones, 1, -1) if across.ndim == 1 else across
    down = down.reshape(*ones, -1, 1) if down.ndim == 1 else down
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    c = jnp.broadcast_to(jnp.asarray(c, jnp.float32), a.shape)[..., None, None]
    return ((c + a_high * across) + b_high * down) + (a_low * across + b_low * down)


def nearest_pixels(matrix: jax.Array, x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The pixels that Pillow's nearest takes for the output pixels of columns x and rows y.

    Pillow rounds the six numbers to multiples of 2**-16 pixel and steps by whole numbers, unless
    b and d are 0: then it takes them as they are.

    Args:
        matrix: [..., 2, 3].
        x: [w] whole numbers.
        y: [h] whole numbers.

    Returns:
        Column and row, each [..., h, w] int32.
    """
    (a, b, c), (d, e, f) = _row(matrix, 0), _row(matrix, 1)
    straight = ((b == 0) & (d == 0))[..., None, None]
    across = x.astype(np.int32).reshape((1,) * a.ndim + (1, -1))
    down = y.astype(np.int32).reshape((1,) * a.ndim + (-1, 1))

    def stepped(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        parts = [_fixed(number) for number in (c, a / 2, b / 2)]
        whole, rest = (functools.reduce(jnp.add, part) for part in zip(*parts, strict=True))
        start = whole + _floor(rest + 0.5)
        (right, r), (below, s) = _fixed(a), _fixed(b)
        right, below = right + (r >= 0.5), below + (s >= 0.5)
        start, right, below = (number[..., None, None] for number in (start, right, below))
        return (start + right * across + below * down) >> 16

    def direct(a: jax.Array, c: jax.Array, steps: np.ndarray) -> jax.Array:
        # The whole parts apart, so that the fraction keeps all of its digits.
        a, c = a[..., None, None], c[..., None, None]
        whole = jnp.round(a), jnp.round(c)
        rest = ((c - whole[1]) + a / 2) + (a - whole[0]) * steps.astype(np.float32)
        return _floor(rest) + whole[0].astype(jnp.int32) * steps + whole[1].astype(jnp.int32)

    columns = jnp.where(straight, direct(a, c, across), stepped(a, b, c))
    rows = jnp.where(straight, direct(e, f, down), stepped(d, e, f))
    return columns, rows


def check(method: str) -> None:
    """Raises `CnnlabError` unless there is such a method."""
    if method not in get_args(Method):
        raise CnnlabError(
            f'warp: method: expected "nearest", "bilinear" or "bicubic", got {method!r}'
        )


def _row(matrix: jax.Array, i: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return matrix[..., i, 0], matrix[..., i, 1], matrix[..., i, 2]


def _halves(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A number as a multiple of 2**-12 and the rest, each of at most 12 digits, [..., 1, 1]."""
    high = jnp.round(value * 4096) / 4096
    return high[..., None, None], (value - high)[..., None, None]


def _fixed(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A number in 2**-16: the nearest whole one and the rest, -1/2 to 1/2, both exact."""
    whole = jnp.round(value)
    rest = (value - whole) * 2**16
    low = jnp.round(rest)
    return whole.astype(jnp.int32) * 2**16 + low.astype(jnp.int32), rest - low


def _floor(x: jax.Array) -> jax.Array:
    return jnp.floor(x).astype(jnp.int32)


def _interpolate(
    levels: jax.Array, x: jax.Array, y: jax.Array, method: Method, fill: Fill
) -> jax.Array:
    height, width = levels.shape[-3:-1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # Elsewhere anything may be read, but only within the image: a gather does not check.
    x, y = (jnp.where(inside, v - 0.5, 0.0) for v in (x, y))
    value = jnp.floor((_bilinear if method == "bilinear" else _bicubic)(levels, x, y))
    return _filled(jnp.broadcast_to(inside[..., None], value.shape), value, fill)


def _batched_as_written(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Lets `vmap` add a leading axis, which the function takes anyway.

    A gather that `vmap` batches takes up to three times as long on CPU as one from the flat batch.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    def rule(size: int, batched: Sequence[bool], *arguments: jax.Array) -> tuple[jax.Array, bool]:
        whole = (
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(arguments, batched, strict=True)
        )
        return mapped(*whole), True

    mapped.def_vmap(rule)
    return mapped


@_batched_as_written
def _bilinear(levels: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """At points counted from the first pixel's centre; border pixels repeat."""
    height, width = levels.shape[-3:-1]
    # Beyond the border pixels: the last pair, at its nearer end.
    left, top = (jnp.clip(jnp.floor(v), 0, max(n - 2, 0)) for v, n in ((x, width), (y, height)))
    right, down = (jnp.clip(v, 0, 1)[..., None] for v in (x - left, y - top))
    i, j = top.astype(jnp.int32), left.astype(jnp.int32)
    below, beside = min(1, height - 1), min(1, width - 1)
    upper = _lerp(_at(levels, i, j), _at(levels, i, j + beside), right)
    lower = _lerp(_at(levels, i + below, j), _at(levels, i + below, j + beside), right)
    return _lerp(upper, lower, down)


@_batched_as_written
def _bicubic(levels: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """At points counted from the first pixel's centre; border pixels repeat; 0 to 255."""
    height, width = levels.shape[-3:-1]
    left, top = jnp.floor(x), jnp.floor(y)
    right, down = (x - left)[..., None], (y - top)[..., None]
    columns = [jnp.clip(_floor(left) + k, 0, width - 1) for k in range(-1, 3)]
    rows = [jnp.clip(_floor(top) + k, 0, height - 1) for k in range(-1, 3)]
    lines = [_cubic([_at(levels, i, j) for j in columns], right) for i in rows]
    return jnp.clip(_cubic(lines, down), 0.0, 255.0)


def _at(values: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """values[..., rows, columns, :], of positions in the image."""
    *batch, height, width, channels = values.shape
    start = jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(*batch, 1, 1) * height
    flat = values.reshape(-1, channels)
    return flat.at[(start + rows) * width + columns].get(mode="promise_in_bounds")


def _filled(inside: jax.Array, values: jax.Array, fill: Fill) -> jax.Array:
    outside = jnp.asarray(fill, values.dtype)
    outside = outside.reshape((1,) * (values.ndim - outside.ndim) + outside.shape)
    return jnp.where(inside, values, jnp.broadcast_to(outside, values.shape))


def _lerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    return a + (b - a) * t  # of equal levels exactly that level, which rounding down must keep


def _cubic(taps: Sequence[jax.Array], t: jax.Array) -> jax.Array:
    """Keys' filter with a = -1 in the form that keeps a constant to the bit."""
    a, b, c, d = taps
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * ((b - a) + (d - c))))


def rotation(degrees: Scalar, size: tuple[int, int]) -> jax.Array:
    """The matrix [..., 2, 3] of `Image.rotate(degrees)`: counter-clockwise about the centre."""
    cosine, sine = _turn(degrees)
    return about_centre(((cosine, -sine), (sine, cosine)), size)


def shear_x(factor: Scalar) -> jax.Array:
    """The matrix [..., 2, 3] by which x reads x + factor y: a shear about the upper border."""
    return _assemble(((1.0, factor, 0.0), (0.0, 1.0, 0.0)))


def shear_y(factor: Scalar) -> jax.Array:
    """The matrix [..., 2, 3] by which y reads y + factor x: a shear about the left border."""
    return _assemble(((1.0, 0.0, 0.0), (factor, 1.0, 0.0)))


def translation(x: Scalar, y: Scalar) -> jax.Array:
    """The matrix [..., 2, 3] that reads x pixels to the right and y below.

    What is seen moves left and up by as much: timm's sign, and that of Pillow's data. The
    translations of torchvision's `affine` have the other one.
    """
    return _assemble(((1.0, 0.0, x), (0.0, 1.0, y)))


def affine(
    degrees: Scalar,
    shift: tuple[Scalar, Scalar],
    scale: Scalar,
    shear: tuple[Scalar, Scalar],
    size: tuple[int, int],
) -> jax.Array:
    """The matrix [..., 2, 3] of torchvision's `affine`, about the centre of (H, W).

    Args:
        degrees: [...], clockwise.
        shift: (right, down) in whole pixels, [...] each.
        scale: [...], by which what is seen grows.
        shear: (along x, along y) in degrees, [...] each.
        size: (H, W).
    """
    radians = [jnp.deg2rad(jnp.asarray(angle, jnp.float32)) for angle in (degrees, *shear)]
    cosine, sine = _turn(degrees)
    across, down = jnp.tan(radians[1]), jnp.tan(radians[2])
    # Out of cos(r - t) / cos(t) and its like, with r turned and t sheared: no division.
    a, c = cosine + sine * down, sine - cosine * down
    b, d = -a * across - sine, -c * across + cosine
    linear = ((d / scale, -b / scale), (-c / scale, a / scale))
    return about_centre(linear, size, shift)


def about_centre(
    linear: tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]],
    size: tuple[int, int],
    shift: tuple[Scalar, Scalar] = (0.0, 0.0),
) -> jax.Array:
    """The matrix [..., 2, 3] with this linear part that moves the centre of (H, W) by a shift.

    Args:
        linear: ((a, b), (d, e)), [...] each.
        size: (H, W).
        shift: (right, down), [...] each, whole pixels.
    """
    numbers = (*linear[0], *linear[1], *shift)
    a, b, d, e, right, down = jnp.broadcast_arrays(*(jnp.asarray(n, jnp.float32) for n in numbers))
    x, y = size[1] / 2, size[0] / 2
    at = (x + right)[..., None, None], (y + down)[..., None, None]
    c, f = (plane(-p, -q, n, *at)[..., 0, 0] for p, q, n in ((a, b, x), (d, e, y)))
    return _assemble(((a, b, c), (d, e, f)))


def homography(start: tuple[int, int], end: jax.Array) -> jax.Array:
    """The projective matrix that leads from a quadrangle to a rectangle.

    After Heckbert 1989, "Fundamentals of texture mapping and image warping", 2.2.3.

    Args:
        start: (width, height) of the rectangle whose first corner is (0, 0), not 0.
        end: [4, 2], the (x, y) of the corners of the quadrangle, clockwise from the upper left.

    Returns:
        [3, 3], for (x, y, 1).
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = ((corner[0], corner[1]) for corner in end)
    right, low = (x1 - x2, y1 - y2), (x3 - x2, y3 - y2)
    bend = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    scale = right[0] * low[1] - low[0] * right[1]
    g = bend[0] * low[1] - low[0] * bend[1]
    h = right[0] * bend[1] - bend[0] * right[1]
    # From the unit square to the quadrangle, times `scale`, by columns.
    first = (scale * (x1 - x0) + g * x1, scale * (y1 - y0) + g * y1, g)
    second = (scale * (x3 - x0) + h * x3, scale * (y3 - y0) + h * y3, h)
    third = (scale * x0, scale * y0, scale)

    def cross(p: Sequence[jax.Array], q: Sequence[jax.Array]) -> jax.Array:
        return jnp.stack(
            [p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]]
        )

    inverse = jnp.stack([cross(second, third), cross(third, first), cross(first, second)])
    return inverse / inverse[2, 2] * np.array([*start, 1.0], np.float32)[:, None]


def warp_boxes(boxes: jax.Array, matrix: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Boxes around the moved corners of boxes, clipped to the image.

    Args:
        boxes: [N, 4], (top, left, bottom, right) in pixels from the corner.
        matrix: [2, 3] or [3, 3], from output to input, invertible.
        size: (H, W).

    Returns:
        [N, 4]; of no area where the box has left the image.
    """
    last = (0.0, 0.0, 1.0) if len(matrix) == 2 else _row(matrix, 2)
    m = (_row(matrix, 0), _row(matrix, 1), last)

    def minor(i: int, j: int) -> jax.Array:
        rows, columns = [k for k in range(3) if k != i], [k for k in range(3) if k != j]
        (p, q), (r, s) = ([m[row][column] for column in columns] for row in rows)
        return (p * s - q * r) * (-1) ** (i + j)

    top, left, bottom, right = (boxes[:, i, None] for i in range(4))
    x, y = (
        jnp.concatenate([left, right, left, right], 1),
        jnp.concatenate([top, top, bottom, bottom], 1),
    )
    moved = [minor(0, i) * x + minor(1, i) * y + minor(2, i) for i in range(3)]
    return around(moved[0] / moved[2], moved[1] / moved[2], size)


def around(x: jax.Array, y: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The boxes [N, 4] around points [N, k], clipped to the image."""
    x, y = jnp.clip(x, 0, size[1]), jnp.clip(y, 0, size[0])
    return jnp.stack([y.min(1), x.min(1), y.max(1), x.max(1)], 1)


def _turn(degrees: Scalar) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, exact at quarter turns: no pixel's centre may fall to its neighbour."""
    degrees = jnp.asarray(degrees, jnp.float32)
    quarters = jnp.round(degrees / 90)
    rest = jnp.deg2rad(degrees - 90 * quarters)
    cosine, sine = jnp.cos(rest), jnp.sin(rest)
    quarter = quarters.astype(jnp.int32) % 4
    flipped, back = quarter % 2 == 1, jnp.where(quarter >= 2, -1.0, 1.0)
    return back * jnp.where(flipped, -sine, cosine), back * jnp.where(flipped, cosine, sine)


def _assemble(rows: Sequence[Sequence[Scalar]]) -> jax.Array:
    entries = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for row in rows for x in row))
    return jnp.stack(entries, -1).reshape(*entries[0].shape, 2, 3)
