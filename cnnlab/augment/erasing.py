"""Transforms that remove part of an image: random erasing, cutout, channel dropout.

Segmentation masks, boxes and labels stay as they are: what is hidden is still there.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from cnnlab.registry import Range
from cnnlab.types import Batch, CnnlabError

FILLS = ("constant", "mean", "noise")
TRIES = 100
"""After as many rectangles that do not fit, random erasing leaves the image as it is."""

TRIES_AT_ONCE = 10
NOISE = 2**31 - 1  # no number of a try

Number = jax.Array | float
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Rectangle(NamedTuple):
    """Rows `top` to `top + height` (exclusive) and columns likewise; each int32, scalar."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array


def random_erasing(
    key: jax.Array,
    example: Batch,
    *,
    probability: Annotated[float, Range(0, 1)] = 0.5,
    area: Annotated[tuple[float, float], Range(0, 1)] = (0.02, 0.4),
    aspect: Annotated[float, Range(1e-3, 1)] = 0.3,
    fill: str = "constant",
    value: Annotated[tuple[float, float, float], Range(0, 1)] = (0.0, 0.0, 0.0),
) -> Batch:
    """Overwrites a random rectangle (Zhong et al. 2020, "Random erasing data augmentation", 3).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of erasing at all.
        area: the least and the greatest share of the image's area.
        aspect: the least ratio of height to width; the greatest is its inverse.
        fill: `"constant"` writes `value`; `"mean"` each channel's mean over this image, where the
            paper has the data set's (which `value` can be); `"noise"` draws every value of every
            pixel uniformly from k / 255, k 0 to 255, as the paper does. (timm and torchvision
            erase normalised images, with normal noise.)
        value: one a channel where there are three; otherwise the first for all. In [0, 1], so a
            value x that a publication gives for normalised images is mean + std * x here.

    Raises:
        CnnlabError: `fill` is none of the three.
    """
    if fill not in FILLS:
        raise CnnlabError(f"random_erasing: fill: expected one of {', '.join(FILLS)}, got {fill!r}")
    image = example.images
    rectangle, coin = _draw(key, (image.shape[0], image.shape[1]), area=area, aspect=aspect)
    erased = coin < probability
    rectangle = rectangle._replace(height=jnp.where(erased, rectangle.height, 0))
    if fill == "constant":
        filling = _per_channel(value, image)
    elif fill == "mean":
        filling = image.mean((0, 1), keepdims=True)
    else:
        filling = _noise(jax.random.fold_in(key, NOISE), image.shape)
    return dataclasses.replace(example, images=_overwritten(image, rectangle, filling))


def draw(
    key: jax.Array, size: tuple[int, int], *, area: tuple[Number, Number], aspect: Number
) -> Rectangle:
    """The rectangle of `random_erasing`: algorithm 1 of the paper, as the authors published it.

    Share of the area and ratio are uniform (timm and torchvision draw the logarithm of the ratio
    uniformly), height and width rounded to pixels; the first of `TRIES` that is lower and narrower
    than the image is put anywhere uniformly.

    Args:
        key: a typed key.
        size: (H, W).
        area: as for `random_erasing`.
        aspect: as for `random_erasing`.

    Returns:
        The rectangle; none of its pixels is outside the image. It is empty if none fitted.
    """
    return _draw(key, size, area=area, aspect=aspect)[0]


def _draw(
    key: jax.Array, size: tuple[int, int], *, area: tuple[Number, Number], aspect: Number
) -> tuple[Rectangle, jax.Array]:
    """The rectangle, and one more uniform number.

    On CPU each call of the generator takes its time, however few numbers it makes: one call makes
    what nearly all examples need.
    """
    rows, columns = size
    low, high = jnp.asarray([area[0], aspect]), jnp.asarray([area[1], 1 / jnp.asarray(aspect)])

    def tried(drawn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        share, ratio = low[:, None] + (high - low)[:, None] * drawn
        heights = jnp.round(jnp.sqrt(rows * columns * share * ratio))
        widths = jnp.round(jnp.sqrt(rows * columns * share / ratio))
        fits = (heights < rows) & (widths < columns)
        first = jnp.argmax(fits)
        height, width = (jnp.where(fits[first], sides[first], 0.0) for sides in (heights, widths))
        return fits[first], height, width

    def again(state: State) -> State:
        done = state[0]
        drawn = jax.random.uniform(jax.random.fold_in(key, done), (2, TRIES_AT_ONCE))
        return done + TRIES_AT_ONCE, *tried(drawn)

    numbers = jax.random.uniform(key, (3 + 2 * TRIES_AT_ONCE,))
    begun = (jnp.asarray(TRIES_AT_ONCE), *tried(numbers[3:].reshape(2, TRIES_AT_ONCE)))
    *_, height, width = jax.lax.while_loop(
        lambda state: ~state[1] & (state[0] < TRIES), again, begun
    )
    top = jnp.floor(numbers[0] * (rows - height + 1))
    left = jnp.floor(numbers[1] * (columns - width + 1))
    corners = (number.astype(jnp.int32) for number in (top, left, height, width))
    return Rectangle(*corners), numbers[2]


def cutout(
    key: jax.Array,
    example: Batch,
    *,
    size: Annotated[int, Range(1)] = 16,
    value: Annotated[tuple[float, float, float], Range(0, 1)] = (0.0, 0.0, 0.0),
) -> Batch:
    """Overwrites a square around a random pixel, clipped at the border.

    After DeVries & Taylor 2017, "Improved regularization of convolutional neural networks with
    cutout", 3.2: 16 pixels for CIFAR-10, 8 for CIFAR-100, 20 for SVHN. They write zeros into
    normalised images: that is `value` at the data set's mean.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        size: pixels a side. `size // 2` of them lie above and to the left of the random pixel.
        value: as for `random_erasing`.
    """
    image = example.images
    centre = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))
    side = jnp.asarray(size)
    square = Rectangle(centre[0] - size // 2, centre[1] - size // 2, side, side)
    filled = _overwritten(image, square, _per_channel(value, image))
    return dataclasses.replace(example, images=filled)


def channel_dropout(
    key: jax.Array,
    example: Batch,
    *,
    channels: Annotated[int, Range(1)] = 1,
    value: Annotated[float, Range(0, 1)] = 0.0,
) -> Batch:
    """Overwrites whole channels, chosen uniformly; at least one stays.

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        channels: how many; C - 1 where that is fewer, so greyscale images stay as they are.
        value: what is written.
    """
    image = example.images
    count = image.shape[-1]
    rank = jax.random.permutation(key, count)
    dropped = rank < min(channels, count - 1)
    return dataclasses.replace(example, images=jnp.where(dropped[None, None], value, image))


def _overwritten(image: jax.Array, rectangle: Rectangle, filling: jax.Array) -> jax.Array:
    """The image [H, W, C] with the filling, of a shape that broadcasts, in the rectangle."""
    rows, columns, channels = image.shape
    # Of the draws XLA would make again what it can for every pixel. And channels within the columns
    # are one long axis to vectorise, in half the time.
    top, left, height, width = jax.lax.optimization_barrier(rectangle)
    row = jnp.arange(rows)[:, None] - top
    column = (np.arange(columns * channels) // channels)[None] - left
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    filling = jnp.broadcast_to(filling, (filling.shape[0], columns, channels))
    filling = filling.reshape(-1, columns * channels)
    flat = image.reshape(rows, columns * channels)
    return jnp.where(inside, filling, flat).reshape(image.shape)


def _per_channel(value: tuple[Number, ...], image: jax.Array) -> jax.Array:
    """[1, 1, C], or [1, 1, 1] where the values are not one a channel."""
    chosen = value if len(value) == image.shape[-1] else value[:1]
    return jnp.asarray(chosen, image.dtype)[None, None]


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform k / 255; four values of each 32 bits, which are what takes the time.

    Threefry makes two words at a time, of which `jax.random.bits` gives one.
    """
    rows, columns, channels = shape
    count = rows * columns * channels
    words = jnp.arange(-(-count // 8) * 2, dtype=jnp.uint32)
    drawn = threefry_2x32(jax.random.key_data(key), words)
    octets = jax.lax.bitcast_convert_type(drawn, jnp.uint8).reshape(-1)
    return octets[:count].reshape(shape).astype(jnp.float32) / 255


PLUGINS = {"random_erasing": random_erasing, "cutout": cutout, "channel_dropout": channel_dropout}
