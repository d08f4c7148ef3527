"""Transforms of colour: each pixel anew from its own value and, at most, the image's statistics.

Draws are those of torchvision's transforms of the same name, but for every example by itself.
Results are Pillow's, to the level (`_levels`); hue alone is computed in floating point, as
torchvision computes it for tensors. Saturation, hue and greyscale change images of three channels
only.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cnnlab import keys
from cnnlab.augment import _levels
from cnnlab.registry import Range
from cnnlab.types import Batch

Number = jax.Array | float


def brightness(
    key: jax.Array, example: Batch, *, amount: Annotated[float, Range(0)] = 0.4
) -> Batch:
    """Multiplies by a factor between max(0, 1 - amount) and 1 + amount (`ColorJitter`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        amount: at least 0; the factor is uniform.
    """
    levels = _levels.to_levels(example.images)
    table = _levels.brightness_table(_factor(key, amount))
    return _with(example, _levels.apply_table(levels, table))


def contrast(key: jax.Array, example: Batch, *, amount: Annotated[float, Range(0)] = 0.4) -> Batch:
    """Stretches about the mean of the greyscale image (`ColorJitter`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        amount: at least 0; the factor is uniform from max(0, 1 - amount) to 1 + amount.
    """
    levels = _levels.to_levels(example.images)
    table = _levels.contrast_table(levels, _factor(key, amount))
    return _with(example, _levels.apply_table(levels, table))


def saturation(
    key: jax.Array, example: Batch, *, amount: Annotated[float, Range(0)] = 0.4
) -> Batch:
    """Moves away from the greyscale image or towards it (`ColorJitter`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        amount: at least 0; the factor is uniform from max(0, 1 - amount) to 1 + amount.
    """
    levels = _levels.to_levels(example.images)
    return _with(example, _levels.saturate(levels, _factor(key, amount)))


def hue(key: jax.Array, example: Batch, *, amount: Annotated[float, Range(0, 0.5)] = 0.1) -> Batch:
    """Turns the colour wheel (`ColorJitter`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        amount: 0 to 0.5; the shift is uniform from -amount to amount, in turns.
    """
    shift = jax.random.uniform(key, (), minval=-1.0) * amount
    return _with(example, shift_hue(_levels.to_levels(example.images), shift))


def colour_jitter(
    key: jax.Array,
    example: Batch,
    *,
    brightness: Annotated[float, Range(0)] = 0.4,
    contrast: Annotated[float, Range(0)] = 0.4,
    saturation: Annotated[float, Range(0)] = 0.4,
    hue: Annotated[float, Range(0, 0.5)] = 0.1,
) -> Batch:
    """Brightness, contrast, saturation and hue in random order (`ColorJitter`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        brightness: at least 0; the factor is uniform from max(0, 1 - brightness) to 1 + brightness.
        contrast: likewise.
        saturation: likewise.
        hue: 0 to 0.5; the shift is uniform from -hue to hue, in turns.
    """
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    amounts = jnp.asarray([brightness, contrast, saturation], jnp.float32)
    factors = jax.vmap(_factor)(jax.random.split(factor_key, 3), amounts)
    shift = jax.random.uniform(hue_key, (), minval=-1.0) * hue
    order = jax.random.permutation(order_key, 4)
    levels = jitter(_levels.to_levels(example.images), order, factors, shift)
    return _with(example, levels)


def greyscale(
    key: jax.Array, example: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.1
) -> Batch:
    """Takes the colour away and keeps the channels (`RandomGrayscale`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of doing so.
    """
    return _maybe(key, probability, example, _levels.greyscale(_levels.to_levels(example.images)))


def invert(
    key: jax.Array, example: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.5
) -> Batch:
    """Makes a negative (`RandomInvert`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of doing so.
    """
    return _maybe(key, probability, example, 255 - _levels.to_levels(example.images))


def solarize(
    key: jax.Array,
    example: Batch,
    *,
    threshold: Annotated[float, Range(0, 1)] = 0.5,
    probability: Annotated[float, Range(0, 1)] = 0.5,
) -> Batch:
    """Inverts what is as light as a threshold or lighter (`RandomSolarize`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        threshold: in [0, 1].
        probability: of doing so.
    """
    levels = _levels.to_levels(example.images)
    table = _levels.solarize_table(255 * jnp.asarray(threshold))
    return _maybe(key, probability, example, _levels.apply_table(levels, table))


def posterize(
    key: jax.Array,
    example: Batch,
    *,
    bits: Annotated[int, Range(1, 8)] = 4,
    probability: Annotated[float, Range(0, 1)] = 0.5,
) -> Batch:
    """Keeps the upper bits of each level (`RandomPosterize`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        bits: 1 to 8; 8 changes nothing.
        probability: of doing so.
    """
    step = 2 ** (8 - bits)
    levels = jnp.floor(_levels.to_levels(example.images) / step) * step
    return _maybe(key, probability, example, levels)


def equalize(
    key: jax.Array, batch: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.5
) -> Batch:
    """Makes the levels of each channel as frequent as one another (`RandomEqualize`).

    It takes a batch because histograms of many images are faster together.

    Args:
        key: the step's key.
        batch: `images` [B, H, W, C].
        probability: of doing so, for each example.
    """
    levels = _levels.to_levels(batch.images)
    equalized = _levels.apply_table(levels, _levels.equalize_table(levels))
    own = keys.per_example(key, len(levels))
    return jax.vmap(_maybe, in_axes=(0, None, 0, 0))(own, probability, batch, equalized)


def autocontrast(
    key: jax.Array, example: Batch, *, probability: Annotated[float, Range(0, 1)] = 0.5
) -> Batch:
    """Stretches each channel to the whole range (`RandomAutocontrast`).

    Args:
        key: a typed key.
        example: `images` [H, W, C].
        probability: of doing so.
    """
    levels = _levels.to_levels(example.images)
    table = _levels.autocontrast_table(levels)
    return _maybe(key, probability, example, _levels.apply_table(levels, table))


def jitter(levels: jax.Array, order: jax.Array, factors: jax.Array, shift: Number) -> jax.Array:
    """Brightness, contrast, saturation and hue in a given order.

    Args:
        levels: [H, W, C].
        order: [4] int32, which of the four comes first, second, ...
        factors: [3], of brightness, contrast, saturation.
        shift: of the hue, in turns.

    Returns:
        [H, W, C] levels.
    """
    # Under vmap a branch costs as much as all. The first three are blends with an image that is
    # black, of the mean grey, or the greyscale one, and a factor of 1 changes nothing: so three
    # blends before the hue and three behind it, of which three do something, and one hue.
    factors = jnp.append(factors, 1.0)[order]
    if levels.shape[-1] != 3:
        return _blends(levels, order, factors, range(4))
    place = jnp.arange(4) - jnp.argmax(order == 3)
    levels = _blends(levels, order, jnp.where(place < 0, factors, 1.0), range(3))
    levels = shift_hue(levels, shift)
    return _blends(levels, order, jnp.where(place > 0, factors, 1.0), range(1, 4))


def _blends(levels: jax.Array, order: jax.Array, factors: jax.Array, places: range) -> jax.Array:
    for place in places:
        grey, mean = _levels.greyscale(levels), _levels.grey_mean(levels)
        base = jnp.where(order[place] == 2, grey, jnp.where(order[place] == 1, mean, 0.0))
        levels = _levels.blend(base, levels, factors[place])
    return levels


def shift_hue(levels: jax.Array, shift: Number) -> jax.Array:
    """Adds to the hue of HSV, as torchvision's `adjust_hue` of tensors, rounded to levels.

    Within one level of it. (For Pillow images torchvision computes in HSV of whole numbers, whose
    own rounding moves colours by several levels.)

    Args:
        levels: [..., H, W, C]; as they are where C is not 3.
        shift: [...] or a scalar, in turns, -0.5 to 0.5.
    """
    if levels.shape[-1] != 3:
        return levels
    turns = jnp.asarray(shift, jnp.float32)[..., None, None]
    turns = jnp.broadcast_to(turns, (*levels.shape[:-3], 1, 1))
    red, green, blue = levels[..., 0], levels[..., 1], levels[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.maximum(chroma, 1)
    sector = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    # One formula for the six sectors of the wheel (A. R. Smith 1978, "Color gamut transform
    # pairs"): each channel falls from the value by the chroma and rises again, a third of a turn
    # behind the one before it.
    offsets = jnp.asarray([5.0, 3.0, 1.0]).reshape((1,) * sector.ndim + (3,))
    place = (sector + 6 * turns)[..., None] + offsets
    place -= 6 * jnp.floor(place / 6)  # `%` calls a function for each element
    fall = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return jnp.round(value[..., None] - chroma[..., None] * fall)


def _factor(key: jax.Array, amount: Number) -> jax.Array:
    """Uniform from max(0, 1 - amount) to 1 + amount."""
    low = jnp.maximum(0, 1 - jnp.asarray(amount, jnp.float32))
    return low + jax.random.uniform(key) * (1 + amount - low)


def _with(example: Batch, levels: jax.Array) -> Batch:
    return dataclasses.replace(example, images=_levels.to_images(levels))


def _maybe(key: jax.Array, probability: Number, example: Batch, levels: jax.Array) -> Batch:
    """The example with these levels, or, with the complementary probability, as it is."""
    chosen = jax.random.bernoulli(key, probability)
    images = jnp.where(chosen, _levels.to_images(levels), example.images)
    return dataclasses.replace(example, images=images)


PLUGINS = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "colour_jitter": colour_jitter,
    "greyscale": greyscale,
    "invert": invert,
    "solarize": solarize,
    "posterize": posterize,
    "equalize": equalize,
    "autocontrast": autocontrast,
}
