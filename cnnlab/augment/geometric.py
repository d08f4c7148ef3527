"""Random changes of geometry: affine, perspective, elastic, and crops of random size.

Laws and signs are torchvision's (0.29, `transforms/v2/_geometry.py`); pixels are Pillow's (see
`_geometry`). Each example draws its own parameters, uniformly. `method` is the filter, `"nearest"`,
`"bilinear"` or `"bicubic"`, and `fill` what moves into the image, 0 to 1. Masks move by nearest, 0
moving in; a box becomes the box around its moved corners, clipped to the image, and has no area if
it left the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.augment import _geometry
from cnnlab.registry import Range
from cnnlab.types import Batch

Degrees = Annotated[float, Range(0, 360)]
Slant = Annotated[float, Range(0, 89)]
Fraction = Annotated[float, Range(0, 1)]
Factors = Annotated[tuple[float, float], Range(0.01, 100)]


def rotate(
    key: jax.Array,
    example: Batch,
    *,
    degrees: Degrees = 30.0,
    method: str = "nearest",
    fill: Fraction = 0.0,
) -> Batch:
    """Turns the image about its centre (`RandomRotation`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        degrees: the angle is within ± this.
        method: the filter.
        fill: what moves in.
    """
    angle = degrees * _symmetric(key)
    matrix = _geometry.affine(angle, (0.0, 0.0), 1.0, (0.0, 0.0), _size(example))
    return _warped(example, matrix, method, fill)


def shear(
    key: jax.Array,
    example: Batch,
    *,
    x: Slant = 15.0,
    y: Slant = 0.0,
    method: str = "nearest",
    fill: Fraction = 0.0,
) -> Batch:
    """Slants the image about its centre (`RandomAffine(0, shear=(-x, x, -y, y))`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        x: the angle along x is within ± this, in degrees.
        y: the angle along y likewise.
        method: the filter.
        fill: what moves in.
    """
    size, (first, second) = _size(example), _symmetric(key, (2,))
    matrix = _geometry.affine(0.0, (0.0, 0.0), 1.0, (x * first, y * second), size)
    return _warped(example, matrix, method, fill)


def translate(
    key: jax.Array,
    example: Batch,
    *,
    x: Fraction = 0.1,
    y: Fraction = 0.1,
    method: str = "nearest",
    fill: Fraction = 0.0,
) -> Batch:
    """Shifts the image by whole pixels (`RandomAffine(0, translate=(x, y))`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        x: the shift to the right is within ± this share of the width.
        y: the shift down is within ± this share of the height.
        method: the filter; all give the same here.
        fill: what moves in.
    """
    size = _size(example)
    matrix = _geometry.affine(
        0.0, _shift(_symmetric(key, (2,)), (x, y), size), 1.0, (0.0, 0.0), size
    )
    return _warped(example, matrix, method, fill)


def scale(
    key: jax.Array,
    example: Batch,
    *,
    factors: Factors = (0.8, 1.2),
    method: str = "nearest",
    fill: Fraction = 0.0,
) -> Batch:
    """Magnifies the image about its centre (`RandomAffine(0, scale=factors)`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        factors: the least and the greatest factor by which what is seen grows, above 0.
        method: the filter.
        fill: what moves in.
    """
    size, factor = _size(example), _between(_symmetric(key), factors)
    matrix = _geometry.affine(0.0, (0.0, 0.0), factor, (0.0, 0.0), size)
    return _warped(example, matrix, method, fill)


def affine(
    key: jax.Array,
    example: Batch,
    *,
    degrees: Degrees = 15.0,
    translation: Annotated[tuple[float, float], Range(0, 1)] = (0.1, 0.1),
    factors: Factors = (0.8, 1.2),
    slant: Annotated[tuple[float, float], Range(0, 89)] = (10.0, 10.0),
    method: str = "nearest",
    fill: Fraction = 0.0,
) -> Batch:
    """Turns, shifts, magnifies and slants the image in a single warp (`RandomAffine`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        degrees: the angle is within ± this.
        translation: (x, y), as for `translate`.
        factors: as for `scale`.
        slant: (x, y), as for `shear`.
        method: the filter.
        fill: what moves in.
    """
    size, drawn = _size(example), _symmetric(key, (6,))
    matrix = _geometry.affine(
        degrees * drawn[0],
        _shift(drawn[1:3], translation, size),
        _between(drawn[3], factors),
        (slant[0] * drawn[4], slant[1] * drawn[5]),
        size,
    )
    return _warped(example, matrix, method, fill)


def perspective(
    key: jax.Array,
    example: Batch,
    *,
    distortion: Fraction = 0.5,
    method: str = "bilinear",
    fill: Fraction = 0.0,
) -> Batch:
    """Looks at the image aslant (`RandomPerspective`): its corners move inwards.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        distortion: each corner moves by a whole number of pixels from 0 to this share of half the
            width, and of half the height.
        method: the filter.
        fill: what moves in.
    """
    height, width = _size(example)
    half = np.array([[width // 2, height // 2]], np.float32)
    most = jnp.floor(distortion * half).astype(jnp.int32)
    inwards = jax.random.randint(key, (4, 2), 0, most + 1)
    # A side of one pixel has nowhere to move, and its two ends must not meet.
    right, low = max(width - 1, 1), max(height - 1, 1)
    start = np.array([[0, 0], [right, 0], [right, low], [0, low]], np.int32)
    towards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.int32)
    end = (jnp.asarray(start) + inwards * towards).astype(jnp.float32)
    matrix = _geometry.homography((right, low), end)
    across, down = np.arange(width) + 0.5, np.arange(height) + 0.5
    u, v, s = (_geometry.plane(m[0], m[1], m[2], across, down) for m in matrix)
    return dataclasses.replace(
        _sampled(example, u / s, v / s, method, fill),
        boxes=None
        if example.boxes is None
        else _geometry.warp_boxes(example.boxes, matrix, (height, width)),
    )


def elastic(
    key: jax.Array,
    example: Batch,
    *,
    alpha: Annotated[float, Range(0, 10_000)] = 50.0,
    sigma: Annotated[float, Range(0, 1_000)] = 5.0,
    method: str = "bilinear",
    fill: Fraction = 0.0,
) -> Batch:
    """Displaces pixels by smoothed noise (Simard et al. 2003, section 2; `ElasticTransform`).

    A box becomes the one around all pixels that come from inside it.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        alpha: displacements are alpha / 2 pixels times noise within ± 1, smoothed.
        sigma: the standard deviation of the smoothing Gaussian, in pixels. It is cut off after
            four of them and at the size of the image, and mirrored at the border.
        method: the filter.
        fill: what moves in.
    """
    height, width = _size(example)
    noise = _symmetric(key, (2, height, width))
    # Both matrices are the same for all examples: a batch is one product with each.
    smoothed = noise
    for length in (height, width):  # each turns the axes round
        smoothed = jnp.tensordot(
            smoothed, _smoothing(length, sigma), axes=(1, 1), precision=lax.Precision.HIGHEST
        )
    # The last digits of a product differ with the batch that it is made for.
    field = jnp.round(alpha / 2 * smoothed * 1024) / 1024
    x = field[0] + (np.arange(width, dtype=np.float32) + 0.5)[None]
    y = field[1] + (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    moved = _sampled(example, x, y, method, fill)
    if example.boxes is None:
        return moved
    top, left, bottom, right = (example.boxes[:, i, None, None] for i in range(4))
    inside = (x[None] >= left) & (x[None] < right) & (y[None] >= top) & (y[None] < bottom)
    rows, columns = inside.any(2), inside.any(1)
    ends = [rows.argmax(1), columns.argmax(1)]
    ends += [height - rows[:, ::-1].argmax(1), width - columns[:, ::-1].argmax(1)]
    boxes = jnp.stack(ends, 1).astype(jnp.float32)
    return dataclasses.replace(moved, boxes=jnp.where(rows.any(1)[:, None], boxes, 0.0))


def random_resized_crop(
    key: jax.Array,
    example: Batch,
    *,
    area: Annotated[tuple[float, float], Range(0, 1)] = (0.08, 1.0),
    ratio: Factors = (3 / 4, 4 / 3),
    method: str = "bilinear",
) -> Batch:
    """Cuts out a part of random area and aspect ratio, resized to the image's size.

    `RandomResizedCrop`, after Szegedy et al. 2015, "Going deeper with convolutions", section 6: ten
    tries, and if none of them fits the largest part in the centre whose aspect ratio is allowed. A
    part is never larger than the image, so antialiasing would change nothing. Pixels are those of
    `Image.resize`.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        area: the least and the greatest share of the image's area.
        ratio: the least and the greatest width / height, uniform in its logarithm.
        method: the filter.
    """
    size = _size(example)
    top, left, height, width = crop_window(key, size, area, ratio)
    part = top, left, height, width
    moved = dataclasses.replace(
        example, images=_leveled(_geometry.resize_part, example.images, part, method)
    )
    if example.masks is not None:
        masks = _geometry.resize_part(example.masks[..., None], part, "nearest")[..., 0]
        moved = dataclasses.replace(moved, masks=masks)
    if example.boxes is not None:
        corner = jnp.stack([top, left, top, left]).astype(jnp.float32)
        sides = np.array([*size, *size], np.float32)
        grown = sides / jnp.stack([height, width, height, width]).astype(jnp.float32)
        boxes = jnp.clip((example.boxes - corner[None]) * grown[None], 0, sides[None])
        moved = dataclasses.replace(moved, boxes=boxes)
    return moved


def crop_window(
    key: jax.Array,
    size: tuple[int, int],
    area: tuple[Any, Any],
    ratio: tuple[Any, Any],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The part that `random_resized_crop` cuts out: top, left, height, width, int32 scalars.

    Args:
        key: a typed key.
        size: (H, W) of the image.
        area: as for `random_resized_crop`.
        ratio: as for `random_resized_crop`.
    """
    height, width = size
    drawn = _symmetric(key, (11, 2))  # ten tries, and the place
    low, high = jnp.log(jnp.asarray(ratio[0])), jnp.log(jnp.asarray(ratio[1]))
    pixels = height * width * _between(drawn[:10, 0], area)
    aspect = jnp.exp(_between(drawn[:10, 1], (low, high)))
    widths, heights = jnp.round(jnp.sqrt(pixels * aspect)), jnp.round(jnp.sqrt(pixels / aspect))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax()
    whole = width / height
    narrowest, widest = jnp.minimum(*ratio), jnp.maximum(*ratio)
    central_h = jnp.where(whole < narrowest, jnp.round(width / narrowest), float(height))
    central_w = jnp.where(whole > widest, jnp.round(height * widest), float(width))
    found = fits.any()
    h, w = (
        jnp.where(found, tried[first], jnp.maximum(central, 1)).astype(jnp.int32)
        for tried, central in ((heights, central_h), (widths, central_w))
    )
    top, left = (
        jnp.where(found, _below(place, spare + 1), spare // 2)
        for place, spare in ((drawn[10, 0], height - h), (drawn[10, 1], width - w))
    )
    return top, left, h, w


def _symmetric(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniform in [-1, 1)."""
    return jax.random.uniform(key, shape, minval=-1.0)


def _between(symmetric: jax.Array, ends: tuple[Any, Any]) -> jax.Array:
    """Uniform in [low, high) of uniform in [-1, 1)."""
    return ends[0] + (symmetric + 1) / 2 * (ends[1] - ends[0])


def _below(symmetric: jax.Array, count: jax.Array) -> jax.Array:
    """A whole number from 0 to count - 1, of uniform in [-1, 1)."""
    return jnp.floor((symmetric + 1) / 2 * count).astype(jnp.int32)


def _shift(
    symmetric: jax.Array, shares: tuple[Any, Any], size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """To the right and down, in whole pixels."""
    right, down = symmetric[0] * (shares[0] * size[1]), symmetric[1] * (shares[1] * size[0])
    return jnp.round(right), jnp.round(down)


def _size(example: Batch) -> tuple[int, int]:
    return example.images.shape[0], example.images.shape[1]


def _smoothing(length: int, sigma: Any) -> jax.Array:
    """The Gaussian as a matrix [length, length], mirrored about the border pixels' centres."""
    sigma = jnp.asarray(sigma, jnp.float32)
    half = jnp.minimum(jnp.floor((8 * sigma + 1) / 2), length - 1)
    i, j = (np.arange(length, dtype=np.float32).reshape(shape) for shape in ((-1, 1), (1, -1)))

    def weight(offset: np.ndarray) -> jax.Array:
        far = jnp.exp(-(offset**2) / (2 * jnp.maximum(sigma, 1e-3) ** 2))
        return jnp.where(np.abs(offset) <= half, far, 0.0)

    mirrored = jnp.where(j > 0, weight(i + j), 0.0)
    mirrored += jnp.where(j < length - 1, weight(2 * (length - 1) - i - j), 0.0)
    matrix = weight(i - j) + mirrored
    return matrix / matrix.sum(1, keepdims=True)


def _leveled(function: Callable[..., jax.Array], images: jax.Array, *rest: Any) -> jax.Array:
    return function(jnp.round(images * 255), *rest) / 255


def _warped(example: Batch, matrix: jax.Array, method: str, fill: Any) -> Batch:
    chosen, level = _method(method), jnp.round(jnp.asarray(fill) * 255)
    if chosen == "nearest":  # which moves values without computing any
        images = _geometry.warp_nearest(example.images, matrix, fill=level / 255)
    else:
        levels = jnp.round(example.images * 255)
        images = _geometry.warp_levels(levels, matrix, method=chosen, fill=level) / 255
    moved = dataclasses.replace(example, images=images)
    if example.masks is not None:
        masks = _geometry.warp_nearest(example.masks[..., None], matrix)[..., 0]
        moved = dataclasses.replace(moved, masks=masks)
    if example.boxes is not None:
        boxes = _geometry.warp_boxes(example.boxes, matrix, _size(example))
        moved = dataclasses.replace(moved, boxes=boxes)
    return moved


def _sampled(example: Batch, x: jax.Array, y: jax.Array, method: str, fill: Any) -> Batch:
    """Without the boxes."""
    levels, level = jnp.round(example.images * 255), jnp.round(jnp.asarray(fill) * 255)
    images = _geometry.sample_levels(levels, x, y, method=_method(method), fill=level) / 255
    moved = dataclasses.replace(example, images=images)
    if example.masks is not None:
        # In the masks' own dtype: class numbers are no levels.
        columns, rows = (jnp.floor(v).astype(jnp.int32) for v in (x, y))
        masks = _geometry.read(example.masks[..., None], columns, rows)[..., 0]
        moved = dataclasses.replace(moved, masks=masks)
    return moved


def _method(name: str) -> _geometry.Method:
    return cast(_geometry.Method, name)  # which `_geometry` checks


PLUGINS = {
    "rotate": rotate,
    "shear": shear,
    "translate": translate,
    "scale": scale,
    "affine": affine,
    "perspective": perspective,
    "elastic": elastic,
    "random_resized_crop": random_resized_crop,
}
