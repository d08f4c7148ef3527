"""Geometric warps of NHWC images: sampling at real-valued coordinates, with defined edges.

A coordinate is (row, column) in pixels, the order of the array's own axes, with the origin in the
centre of the first pixel: pixel (i, j) covers [i - 1/2, i + 1/2) x [j - 1/2, j + 1/2), and the
centre of an image is `centre((H, W))`, ((H - 1) / 2, (W - 1) / 2). Maps go from output to input
coordinates: they say from where each output pixel is read. This is `scipy.ndimage`'s convention;
Pillow's `Image.transform` has (x, y), with the origin in the image's corner.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.types import CnnlabError

Method = Literal["nearest", "bilinear", "bicubic"]
Edge = Literal["constant", "edge", "reflect", "wrap"]
Scalar = jax.Array | np.ndarray | float
Fill = jax.Array | np.ndarray | float | Sequence[float]

# Per method: filter taps an axis, and how many pixels beyond the image its taps still reach it.
_TAPS = {"nearest": (1, 1), "bilinear": (2, 1), "bicubic": (4, 2)}
_PAD_MODES = {"edge": "edge", "reflect": "symmetric", "wrap": "wrap"}


def sample(
    images: jax.Array,
    coordinates: jax.Array,
    *,
    method: Method,
    edge: Edge = "constant",
    fill: Fill = 0.0,
    cubic_coefficient: float = -0.5,
) -> jax.Array:
    """Reads images at real-valued coordinates.

    Differentiable in images, coordinates and fill, in forward and reverse mode; at a kink of the
    bilinear surface (a pixel's centre) the derivative is the one towards the next pixel. At
    integer coordinates inside the image the result is that pixel to the bit.

    Args:
        images: [..., H, W, C]. `"nearest"` takes any dtype, the others floating point, computed
            in float32 at least.
        coordinates: [..., h, w, 2], (row, column) in pixels from the centre of the first pixel,
            finite. Leading axes broadcast against those of the images: one image may be read at
            many grids, many images at one.
        method: `"nearest"` takes the pixel that covers the coordinate; `"bilinear"`; or
            `"bicubic"`, the filter of Keys 1981, "Cubic convolution interpolation for digital
            image processing", on the 4 x 4 pixels around.
        edge: the pixels beyond the image, of which interpolation takes note too:
            `"constant"` are `fill` (`scipy.ndimage`'s "grid-constant", PyTorch's "zeros"),
            `"edge"` repeat the border pixel (a a | a b c | c c; "nearest" there),
            `"reflect"` mirror about the pixel's edge (b a | a b c | c b; "reflect"),
            `"wrap"` continue at the other side (b c | a b c | a b; "grid-wrap").
        fill: scalar or [C], finite.
        cubic_coefficient: Keys' a, -1 to 0: -0.5 is third-order exact, -0.75 PyTorch's
            `grid_sample`, -1 Pillow's `Image.transform`.

    Returns:
        [..., h, w, C] in the images' dtype.

    Raises:
        CnnlabError: a shape, a name or a number is not as above, or integer images shall be
            interpolated.
    """
    fill = jnp.asarray(fill, images.dtype)
    _check(images, coordinates, method, edge, fill, cubic_coefficient)
    coordinates = coordinates.astype(jnp.promote_types(coordinates.dtype, jnp.float32))
    one = functools.partial(
        _sample_one, method=method, edge=edge, fill=fill, a=float(cubic_coefficient)
    )
    image_batch, grid_batch = images.shape[:-3], coordinates.shape[:-3]
    if not image_batch and not grid_batch:
        return one(images, coordinates)
    batch = jnp.broadcast_shapes(image_batch, grid_batch)
    if image_batch:
        images = jnp.broadcast_to(images, (*batch, *images.shape[-3:]))
        images = images.reshape(-1, *images.shape[-3:])
    if grid_batch:
        coordinates = jnp.broadcast_to(coordinates, (*batch, *coordinates.shape[-3:]))
        coordinates = coordinates.reshape(-1, *coordinates.shape[-3:])
    axes = (0 if image_batch else None, 0 if grid_batch else None)
    sampled = jax.vmap(one, in_axes=axes)(images, coordinates)
    return sampled.reshape(*batch, *sampled.shape[1:])


def affine(
    images: jax.Array,
    matrix: jax.Array,
    *,
    method: Method,
    size: tuple[int, int] | None = None,
    edge: Edge = "constant",
    fill: Fill = 0.0,
    cubic_coefficient: float = -0.5,
) -> jax.Array:
    """Warps images by an affine map: output pixel p reads `matrix[:, :2] @ p + matrix[:, 2]`.

    Args:
        images: [..., H, W, C].
        matrix: [..., 2, 3], from output to input (row, column); leading axes broadcast against
            those of the images. `translation`, `rotation`, `scaling`, `shear` and `compose`
            make them.
        method: as for `sample`.
        size: (h, w) of the output; that of the images if None.
        edge: as for `sample`.
        fill: as for `sample`.
        cubic_coefficient: as for `sample`.

    Returns:
        [..., h, w, C] in the images' dtype.

    Raises:
        CnnlabError: the matrix is not [..., 2, 3], or as for `sample`.
    """
    coordinates = _project(_matrix("affine", matrix, (2, 3)), _size(images, size))
    return sample(
        images,
        coordinates,
        method=method,
        edge=edge,
        fill=fill,
        cubic_coefficient=cubic_coefficient,
    )


def homography(
    images: jax.Array,
    matrix: jax.Array,
    *,
    method: Method,
    size: tuple[int, int] | None = None,
    edge: Edge = "constant",
    fill: Fill = 0.0,
    cubic_coefficient: float = -0.5,
) -> jax.Array:
    """Warps images by a projective map (perspective).

    With (u, v, s) = matrix @ (row, column, 1), output pixel (row, column) reads (u, v) / s
    (Hartley & Zisserman 2003, "Multiple view geometry", 2.3).

    Args:
        images: [..., H, W, C].
        matrix: [..., 3, 3], from output to input; s is not 0 anywhere on the output.
        method: as for `sample`.
        size: (h, w) of the output; that of the images if None.
        edge: as for `sample`.
        fill: as for `sample`.
        cubic_coefficient: as for `sample`.

    Returns:
        [..., h, w, C] in the images' dtype.

    Raises:
        CnnlabError: the matrix is not [..., 3, 3], or as for `sample`.
    """
    projected = _project(_matrix("homography", matrix, (3, 3)), _size(images, size))
    coordinates = projected[..., :2] / projected[..., 2:]
    return sample(
        images,
        coordinates,
        method=method,
        edge=edge,
        fill=fill,
        cubic_coefficient=cubic_coefficient,
    )


def flow(
    images: jax.Array,
    displacement: jax.Array,
    *,
    method: Method,
    edge: Edge = "constant",
    fill: Fill = 0.0,
    cubic_coefficient: float = -0.5,
) -> jax.Array:
    """Warps images by a displacement field: output pixel p reads p + displacement[p].

    Args:
        images: [..., H, W, C].
        displacement: [..., H, W, 2], (row, column) in pixels; leading axes broadcast against
            those of the images.
        method: as for `sample`.
        edge: as for `sample`.
        fill: as for `sample`.
        cubic_coefficient: as for `sample`.

    Returns:
        [..., H, W, C] in the images' dtype.

    Raises:
        CnnlabError: the displacement is not of the images' height and width, or as for `sample`.
    """
    if displacement.shape[-3:] != (*_size(images, None), 2):
        raise CnnlabError(
            f"flow: displacement: expected [..., H, W, 2] for images of shape {images.shape}, got "
            f"shape {displacement.shape}"
        )
    displacement = displacement.astype(jnp.promote_types(displacement.dtype, jnp.float32))
    rows, columns = _grid(displacement.shape[-3:-1], displacement.dtype, displacement.ndim)
    vertical, horizontal = displacement[..., :1] + rows, displacement[..., 1:] + columns
    coordinates = jnp.concatenate([vertical, horizontal], -1)
    return sample(
        images,
        coordinates,
        method=method,
        edge=edge,
        fill=fill,
        cubic_coefficient=cubic_coefficient,
    )


def centre(size: tuple[int, int]) -> tuple[float, float]:
    """The coordinate of the centre of an image of (height, width)."""
    return (size[0] - 1) / 2, (size[1] - 1) / 2


def translation(down: Scalar, right: Scalar) -> jax.Array:
    """The matrix [..., 2, 3] that moves what is seen by this many pixels; arguments [...]."""
    return _assemble(((1.0, 0.0, -jnp.asarray(down)), (0.0, 1.0, -jnp.asarray(right))))


def rotation(angle: Scalar, *, centre: tuple[Scalar, Scalar]) -> jax.Array:
    """The matrix [..., 2, 3] that turns what is seen counter-clockwise about a point.

    Args:
        angle: [...] in radians.
        centre: (row, column) of the point that stays.
    """
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return _about(centre, ((cosine, sine), (-sine, cosine)))


def scaling(vertical: Scalar, horizontal: Scalar, *, centre: tuple[Scalar, Scalar]) -> jax.Array:
    """The matrix [..., 2, 3] that magnifies what is seen about a point; -1 mirrors.

    Args:
        vertical: [...], the factor by which heights grow; not 0.
        horizontal: [...], the factor by which widths grow; not 0.
        centre: (row, column) of the point that stays.
    """
    return _about(centre, ((1 / jnp.asarray(vertical), 0.0), (0.0, 1 / jnp.asarray(horizontal))))


def shear(down: Scalar, right: Scalar, *, centre: tuple[Scalar, Scalar]) -> jax.Array:
    """The matrix [..., 2, 3] by which (row, column) reads (row - down * x, column - right * y).

    x and y are column and row counted from the centre: with `right` alone each row of what is
    seen moves right by `right` times its distance below the centre.

    Args:
        down: [...], pixels down per pixel right.
        right: [...], pixels right per pixel down.
        centre: (row, column) of the point that stays.
    """
    return _about(centre, ((1.0, -jnp.asarray(down)), (-jnp.asarray(right), 1.0)))


def compose(*matrices: jax.Array) -> jax.Array:
    """One matrix that warps as these do one after the other, but interpolates only once.

    Args:
        *matrices: each [..., 2, 3] with the same leading axes, in the order in which the warps
            would be applied.

    Returns:
        [..., 2, 3].

    Raises:
        CnnlabError: no matrix was given, or one is not [..., 2, 3].
    """
    if not matrices:
        raise CnnlabError("compose: expected at least one matrix, got none")
    return functools.reduce(_after, (_matrix("compose", m, (2, 3)) for m in matrices))


def _after(outer: jax.Array, inner: jax.Array) -> jax.Array:
    # Maps lead from output to input, so the warp that is applied first is the outer map.
    product = jnp.matmul(outer[..., :2], inner, precision=lax.Precision.HIGHEST)
    return product + jnp.pad(outer[..., 2:], ((0, 0),) * (outer.ndim - 1) + ((2, 0),))


def _about(
    point: tuple[Scalar, Scalar], linear: tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]
) -> jax.Array:
    row, column = point
    (a, b), (c, d) = linear
    # `row - a * row`, so that a point that a matrix of ones and zeros keeps is kept to the bit.
    return _assemble(((a, b, row - a * row - b * column), (c, d, column - c * row - d * column)))


def _assemble(rows: tuple[tuple[Scalar, ...], ...]) -> jax.Array:
    entries = jnp.broadcast_arrays(*(jnp.asarray(entry) for row in rows for entry in row))
    dtype = functools.reduce(jnp.promote_types, (e.dtype for e in entries), jnp.dtype(jnp.float32))
    stacked = jnp.stack([entry.astype(dtype) for entry in entries], -1)
    return stacked.reshape(*stacked.shape[:-1], len(rows), len(rows[0]))


def _matrix(name: str, matrix: jax.Array, shape: tuple[int, int]) -> jax.Array:
    matrix = jnp.asarray(matrix)
    if matrix.shape[-2:] != shape:
        raise CnnlabError(
            f"{name}: matrix: expected [..., {shape[0]}, {shape[1]}], got shape {matrix.shape}"
        )
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def _size(images: jax.Array, size: tuple[int, int] | None) -> tuple[int, int]:
    if images.ndim < 3 or 0 in images.shape[-3:-1]:
        raise CnnlabError(f"warp: images: expected [..., H, W, C], got shape {images.shape}")
    if size is None:
        return images.shape[-3], images.shape[-2]
    if len(size) != 2 or any(length < 1 for length in size):
        raise CnnlabError(f"warp: size: expected (height, width), each at least 1, got {size}")
    return size


def _grid(size: Sequence[int], dtype: jnp.dtype, rank: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers, shaped to broadcast against [..., h, w, 1] of this rank."""
    rows, columns = (jnp.arange(length, dtype=dtype) for length in size)
    ones = (1,) * (rank - 3)
    return rows.reshape(*ones, -1, 1, 1), columns.reshape(*ones, 1, -1, 1)


def _project(matrix: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`matrix @ (row, column, 1)` for every output pixel: [..., h, w, rows of the matrix]."""
    rows, columns = _grid(size, matrix.dtype, matrix.ndim + 1)
    matrix = matrix[..., None, None, :, :]
    return matrix[..., 0] * rows + matrix[..., 1] * columns + matrix[..., 2]


def _check(
    images: jax.Array,
    coordinates: jax.Array,
    method: str,
    edge: str,
    fill: jax.Array,
    cubic_coefficient: float,
) -> None:
    _size(images, None)
    if method not in get_args(Method):
        raise CnnlabError(
            f'warp: method: expected "nearest", "bilinear" or "bicubic", got {method!r}'
        )
    if edge not in get_args(Edge):
        raise CnnlabError(
            f'warp: edge: expected "constant", "edge", "reflect" or "wrap", got {edge!r}'
        )
    if coordinates.ndim < 3 or coordinates.shape[-1] != 2:
        raise CnnlabError(
            f"warp: coordinates: expected [..., h, w, 2], got shape {coordinates.shape}"
        )
    if fill.shape not in ((), images.shape[-1:]):
        raise CnnlabError(
            f"warp: fill: expected a number or one a channel ({images.shape[-1]}), got shape "
            f"{fill.shape}"
        )
    if not -1 <= cubic_coefficient <= 0:
        raise CnnlabError(f"warp: cubic_coefficient: expected -1 to 0, got {cubic_coefficient}")
    if method != "nearest" and not jnp.issubdtype(images.dtype, jnp.floating):
        raise CnnlabError(
            f"warp: images: expected floating point for {method}, got {images.dtype}: convert "
            'first (images / 255), or use method="nearest" for labels'
        )
    try:
        jnp.broadcast_shapes(images.shape[:-3], coordinates.shape[:-3])
    except ValueError as error:
        raise CnnlabError(
            f"warp: expected leading axes that broadcast, got images {images.shape} and "
            f"coordinates {coordinates.shape}"
        ) from error


def _sample_one(
    image: jax.Array,
    coordinates: jax.Array,
    *,
    method: Method,
    edge: Edge,
    fill: jax.Array,
    a: float,
) -> jax.Array:
    taps, reach = _TAPS[method]
    # The image is padded once, so that each output pixel is one gather of a small window. Four
    # gathers of a pixel each take as long forward and longer backward; products with matrices of
    # hat functions take ten times as long (512 images of 28x28, two CPU cores).
    pad = taps // 2 + reach
    padded = _pad(image, pad, edge, fill)
    starts, fractions = [], []
    for axis in (0, 1):
        c = _fold(coordinates[..., axis], image.shape[axis], reach, edge)
        whole = jnp.floor(c + 0.5 if method == "nearest" else c)
        starts.append(whole.astype(jnp.int32) + (pad - (taps - 1) // 2))
        fractions.append(c - whole)
    windows = lax.gather(
        padded,
        jnp.stack(starts, -1),
        lax.GatherDimensionNumbers(
            offset_dims=(2, 3, 4), collapsed_slice_dims=(), start_index_map=(0, 1)
        ),
        slice_sizes=(taps, taps, image.shape[-1]),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    if method == "nearest":
        return windows[:, :, 0, 0]
    wide = jnp.promote_types(image.dtype, jnp.float32)
    windows = windows.astype(wide)
    vertical, horizontal = (
        [weight.astype(wide)[..., None] for weight in _weights(fraction, taps, a)]
        for fraction in fractions
    )
    rows = [
        functools.reduce(jnp.add, [w * windows[:, :, i, j] for j, w in enumerate(horizontal)])
        for i in range(taps)
    ]
    total = functools.reduce(jnp.add, [w * row for w, row in zip(vertical, rows, strict=True)])
    return total.astype(image.dtype)


def _weights(t: jax.Array, taps: int, a: float) -> list[jax.Array]:
    if taps == 2:
        return [1 - t, t]
    return [  # Keys' filter at the distances 1 + t, t, 1 - t and 2 - t
        a * t * (1 - t) * (1 - t),
        ((a + 2) * t - (a + 3)) * t * t + 1,
        ((-(a + 2) * t + (2 * a + 3)) * t - a) * t,
        a * t * t * (1 - t),
    ]


def _fold(c: jax.Array, size: int, reach: int, edge: Edge) -> jax.Array:
    """A coordinate at which the endless image looks the same, at most `reach` outside the image."""
    if edge == "wrap":
        return c - size * jnp.floor(c / size)
    if edge == "reflect":
        c = c - 2 * size * jnp.floor((c + 0.5) / (2 * size))
        return jnp.where(c > size - 0.5, 2 * size - 1 - c, c)
    return jnp.clip(c, -reach, size - 1 + reach)


def _pad(image: jax.Array, pad: int, edge: Edge, fill: jax.Array) -> jax.Array:
    widths = ((pad, pad), (pad, pad), (0, 0))
    if edge != "constant":
        return jnp.pad(image, widths, mode=_PAD_MODES[edge])
    if fill.ndim == 0:
        return lax.pad(image, fill, [(low, high, 0) for low, high in widths])
    padded = jnp.pad(image, widths)
    inside = np.pad(np.ones((*image.shape[:2], 1), bool), widths)
    return jnp.where(
        np.broadcast_to(inside, padded.shape), padded, jnp.broadcast_to(fill, padded.shape)
    )
