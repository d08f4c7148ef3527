"""Colour operations on whole levels, equal to Pillow's ImageOps and ImageEnhance to the integer.

Levels are float32 whole numbers 0 to 255 [..., H, W, C]: what uint8 holds, in the type of the
images. Leading axes are examples, and every factor has them ([...], or a scalar for all). What maps
each level by itself is a table [..., 256], or [..., C, 256] where the channels differ, and
`apply_table` reads it: a policy that draws an operation for each example chooses among tables of
256 entries, not among images.

Three channels are red, green and blue. Images of any other number of channels are their own
greyscale, and what changes colour leaves them as they are. Contrast, equalize and autocontrast look
at the whole image, of at most 2**23 values.

Arithmetic is in float32 where that is exact, because XLA vectorises it: whole numbers to 2**24.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab.types import CnnlabError

Number = jax.Array | np.ndarray | float

_LEVELS = np.arange(256, dtype=np.float32)


def to_levels(images: jax.Array) -> jax.Array:
    """The nearest levels of images in [0, 1]."""
    return jnp.round(images * 255)


def to_images(levels: jax.Array) -> jax.Array:
    """Images in [0, 1] of levels."""
    return levels / 255


def apply_table(levels: jax.Array, table: jax.Array) -> jax.Array:
    """Replaces each level by its entry.

    Args:
        levels: [..., H, W, C].
        table: [256] for all examples, or [..., 256] or [..., C, 256] with the leading axes of
            `levels`.

    Returns:
        [..., H, W, C] in the table's dtype.

    Raises:
        CnnlabError: the shapes do not fit.
    """
    lead, channels = levels.shape[:-3], levels.shape[-1]
    if table.shape == (256,):
        return jnp.take(table, levels.astype(jnp.int32), mode="clip")
    if table.shape not in ((*lead, 256), (*lead, channels, 256)):
        raise CnnlabError(
            f"apply_table: expected a table [256], {[*lead, 256]} or {[*lead, channels, 256]} for "
            f"levels of shape {levels.shape}, got {table.shape}"
        )
    # Unless it is there in memory, XLA computes an entry for each pixel that reads it.
    table = jax.lax.optimization_barrier(table)
    places = levels.astype(jnp.int32)
    if table.ndim == levels.ndim - 1:
        first = (256 * np.arange(channels, dtype=np.int32)).reshape(
            (1,) * (levels.ndim - 1) + (-1,)
        )
        places += first
        table = table.reshape(*lead, channels * 256)
    found = jnp.take_along_axis(table, places.reshape(*lead, -1), axis=-1, mode="promise_in_bounds")
    return found.reshape(levels.shape)


def blend(a: jax.Array, b: jax.Array, factor: Number) -> jax.Array:
    """`Image.blend`: a + factor * (b - a), truncated, clipped to 0 and 255.

    Args:
        a: levels, of a shape that broadcasts with `factor` and `b`.
        b: likewise.
        factor: likewise, any number; 0 gives `a`, 1 gives `b`.
    """
    # Pillow rounds the product before it adds. Compilers would fuse the two into one operation
    # without that rounding, whose result may truncate to another level; not through a minimum.
    product = jnp.minimum(jnp.asarray(factor, jnp.float32) * (b - a), 2.0**30)
    return jnp.trunc(jnp.clip(a + product, 0, 255))


def brightness_table(factor: Number) -> jax.Array:
    """`ImageEnhance.Brightness`: [..., 256] for factors [...], at least 0."""
    factor = jnp.asarray(factor, jnp.float32)[..., None]
    return jnp.trunc(jnp.clip(factor * _levels(factor), 0, 255))


def contrast_table(levels: jax.Array, factor: Number) -> jax.Array:
    """`ImageEnhance.Contrast`: [..., 256] for factors [...], at least 0."""
    mean = grey_mean(levels)[..., None]
    factor = jnp.broadcast_to(jnp.asarray(factor, jnp.float32), levels.shape[:-3])[..., None]
    return blend(mean, _levels(mean), factor)


def grey_mean(levels: jax.Array) -> jax.Array:
    """The mean of the greyscale image as a level, halves upwards: [...].

    Raises:
        CnnlabError: the image has more than 2**23 values.
    """
    grey = _luma(levels)
    values = _pixels(levels) * grey.shape[-1]
    total = grey.astype(jnp.int32).sum((-3, -2, -1))
    mean = total // values
    return (mean + (2 * (total - mean * values) >= values)).astype(jnp.float32)


def invert_table() -> jax.Array:
    """`ImageOps.invert`: [256]."""
    return jnp.asarray(255 - _LEVELS)


def solarize_table(threshold: Number) -> jax.Array:
    """`ImageOps.solarize`, which inverts levels from a threshold on: [..., 256] for [...]."""
    threshold = jnp.asarray(threshold, jnp.float32)[..., None]
    levels = _levels(threshold)
    return jnp.where(levels < threshold, levels, 255 - levels)


def solarize_add_table(amount: Number, threshold: Number = 128) -> jax.Array:
    """Adds an amount to the levels below a threshold, to at most 255: [..., 256] for [...].

    One of the operations of Cubuk et al. 2019, "AutoAugment", in its published code; Pillow has
    none of this name.
    """
    amount = jnp.trunc(jnp.asarray(amount, jnp.float32))[..., None]
    threshold = jnp.asarray(threshold, jnp.float32)
    threshold = jnp.broadcast_to(
        threshold[..., None], jnp.broadcast_shapes(threshold[..., None].shape, amount.shape)
    )
    levels = _levels(amount)
    return jnp.where(levels < threshold, jnp.clip(levels + amount, 0, 255), levels)


def posterize_table(bits: Number) -> jax.Array:
    """`ImageOps.posterize`, which keeps the upper bits: [..., 256] for bits [...], 0 to 8."""
    step = jnp.left_shift(1, 8 - jnp.asarray(bits).astype(jnp.int32))
    step = step.astype(jnp.float32)[..., None]
    return jnp.floor(_levels(step) / step) * step


def histogram(levels: jax.Array) -> jax.Array:
    """How many pixels have each level: int32 [..., C, 256].

    Raises:
        CnnlabError: the image has more than 2**23 values.
    """
    _pixels(levels)
    *lead, rows, columns, channels = levels.shape
    count = int(np.prod(lead, dtype=np.int64))
    # One scatter into one axis: XLA adds a million in 3 ms on CPU so; it takes twice as long with
    # the examples on an axis of their own, and a hundred times by comparison with every level.
    first = 256 * np.arange(count * channels, dtype=np.int32).reshape(count, 1, channels)
    places = levels.astype(jnp.int32).reshape(count, rows * columns, channels) + first
    counts = jnp.zeros(count * channels * 256, jnp.int32)
    counts = counts.at[places.reshape(-1)].add(1, mode="promise_in_bounds")
    return counts.reshape(*lead, channels, 256)


def equalize_table(levels: jax.Array) -> jax.Array:
    """`ImageOps.equalize`: [..., C, 256].

    Raises:
        CnnlabError: the image has more than 2**23 values.
    """
    pixels = _pixels(levels)
    counts = histogram(levels).astype(jnp.float32)
    below = _sums_below(counts)
    # The highest level that occurs is the one with all others below it and none above.
    highest = jnp.where((below + counts == pixels) & (counts > 0), counts, 0.0)
    step = jnp.floor((pixels - highest.max(-1, keepdims=True)) / 255)
    table = _divide(below + jnp.floor(step / 2), jnp.maximum(step, 1))
    return jnp.where(step == 0, _levels(counts), jnp.minimum(table, 255))


def autocontrast_table(levels: jax.Array) -> jax.Array:
    """`ImageOps.autocontrast` without cutoff: [..., C, 256]."""
    low, high = (level[..., None] for level in _range(levels))
    every = _levels(low)
    span = high - low
    steps = jnp.clip(every - low, 0, span)
    exact = _divide(steps * 255, jnp.maximum(span, 1))
    # Pillow truncates what it computes in double precision, so where the quotient is whole, its
    # result is one less if the rounding errors add up to more than half the distance to the double
    # below; both here times `span`, so that they are exact.
    errors, spacing = (jnp.asarray(table) for table in _double_errors())
    of_span = errors[span[..., 0].astype(jnp.int32)]
    at_low = jnp.take_along_axis(of_span, low.astype(jnp.int32), axis=-1)
    short = 2 * (of_span - at_low) < -span * spacing[exact.astype(jnp.int32)]
    short &= (every > low) & (every <= high) & (exact * span == steps * 255)
    stretched = exact - short
    return jnp.where(span == 0, every, stretched)


def greyscale(levels: jax.Array) -> jax.Array:
    """`convert("L")` in every channel: [..., H, W, C]; as it is where C is not 3."""
    # Unless it is there in memory, XLA computes it for each channel anew.
    return jnp.broadcast_to(jax.lax.optimization_barrier(_luma(levels)), levels.shape)


def saturate(levels: jax.Array, factor: Number) -> jax.Array:
    """`ImageEnhance.Color`: [..., H, W, C] for factors [...], at least 0."""
    return blend(greyscale(levels), levels, _per_example(factor, levels))


def smooth(levels: jax.Array) -> jax.Array:
    """`ImageFilter.SMOOTH`, 3 x 3 with a centre of 5 and 1 around; border pixels are kept."""
    rows, columns, channels = levels.shape[-3:]
    lead = levels.shape[:-3]
    # On one long axis, where C would be a short one, neighbours are so many places away; what wraps
    # from one row to another is border. Unless it is there in memory, XLA pads it for each term.
    margin, length = (columns + 1) * channels, rows * columns * channels
    flat = levels.reshape(*lead, length)
    padded = jnp.pad(flat, ((0, 0),) * len(lead) + ((margin, margin),))
    padded = jax.lax.optimization_barrier(padded)
    places = [(down * columns + right) * channels for down in (-1, 0, 1) for right in (-1, 0, 1)]
    terms = (padded[..., margin + place : margin + place + length] for place in places)
    smoothed = jnp.floor((functools.reduce(jnp.add, terms) + 4 * flat) / 13 + 0.5)
    inner = np.zeros((1,) * len(lead) + (rows, columns, channels), bool)
    inner[..., 1:-1, 1:-1, :] = True
    return jnp.where(inner, smoothed.reshape(levels.shape), levels)


def sharpen(levels: jax.Array, factor: Number) -> jax.Array:
    """`ImageEnhance.Sharpness`: [..., H, W, C] for factors [...], at least 0."""
    return blend(smooth(levels), levels, _per_example(factor, levels))


def _levels(like: jax.Array) -> jax.Array:
    """All levels on the last axis, of the same rank."""
    return jnp.asarray(_LEVELS.reshape((1,) * (like.ndim - 1) + (-1,)))


def _per_example(factor: Number, levels: jax.Array) -> jax.Array:
    """Factors [...] shaped to broadcast against levels [..., H, W, C]."""
    factor = jnp.asarray(factor, jnp.float32)
    return jnp.broadcast_to(factor, levels.shape[:-3])[..., None, None, None]


def _pixels(levels: jax.Array) -> int:
    rows, columns, channels = levels.shape[-3:]
    if rows * columns * channels > 2**23:  # times 255 is near what int32 holds
        raise CnnlabError(
            f"expected images of at most 2**23 values, got {rows} x {columns} x {channels}: resize "
            "them first"
        )
    return rows * columns


def _range(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest level of each channel, [..., C].

    First down the columns, where the vectors are rows with their channels, and only then along the
    row that is left: so XLA's CPU backend takes a third of the time.
    """
    *lead, _, columns, channels = levels.shape
    rows = levels.reshape(*levels.shape[:-2], columns * channels)
    low, high = jax.lax.optimization_barrier((rows.min(-2), rows.max(-2)))
    pixels = (*lead, columns, channels)
    return low.reshape(pixels).min(-2), high.reshape(pixels).max(-2)


def _luma(levels: jax.Array) -> jax.Array:
    """Pillow's L in 16-bit fixed point, [..., H, W, 1]; the levels themselves if C is not 3."""
    if levels.shape[-1] != 3:
        return levels
    red, green, blue = (levels[..., i : i + 1] for i in range(3))
    return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """The whole quotient of whole numbers a >= 0 and b > 0 below 2**24, vectorised."""
    quotient = jnp.floor(a / b)
    rest = a - quotient * b
    return quotient + (rest >= b) - (rest < 0)


def _sums_below(counts: jax.Array) -> jax.Array:
    """The sum of all counts at lower levels: exclusive cumulative sums of the last axis of 256.

    As two small products, of sixteen levels each: XLA's cumulative sum takes three times as long.
    """
    before = np.triu(np.ones((16, 16), np.float32), 1)
    blocks = counts.reshape(*counts.shape[:-1], 16, 16)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    within = product("...ij,jk->...ik", blocks, before)
    ahead = product("...i,ik->...k", blocks.sum(-1), before)
    return (within + ahead[..., None]).reshape(counts.shape)


@functools.cache
def _double_errors() -> tuple[np.ndarray, np.ndarray]:
    """What rounding to double precision does to level * (255 / span).

    Returns:
        The error of each product (span, level), times span: [256, 256], exact, since it is a few
        hundred units of the product's last place. And the distance of each whole number 0 to 255
        from the double below it.
    """
    span = np.maximum(np.arange(256, dtype=np.int64), 1)[:, None]
    level = np.arange(256, dtype=np.int64)
    mantissa, exponent = np.frexp(level * (255.0 / span))
    exponent -= 53
    found = np.ldexp(mantissa, 53).astype(np.int64) * span  # 61 bits
    errors = np.ldexp(found - (level * 255 << -exponent), exponent)
    whole = np.arange(256.0)
    spacing = whole - np.nextafter(whole, -1)
    return errors.astype(np.float32), spacing.astype(np.float32)
