"""Policies: RandAugment, TrivialAugment, AutoAugment and AugMix, an operation an example.

Each example draws its own operations, magnitudes and signs. `_operations.chain` then carries out
whatever the examples of a batch have chosen, for which it wants the batch. Operations, ranges,
signs and rounding are those of torchvision (0.29: `autoaugment.py`), and in `randaugment_timm`
those of timm (1.0.31: `auto_augment.py`). Every operation acts on 256 levels, as Pillow does, and
gives images of k / 255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab import keys
from cnnlab.augment import _geometry, _operations
from cnnlab.augment._operations import Op, Shares
from cnnlab.registry import Range, did_you_mean
from cnnlab.types import Batch, CnnlabError

EXACT, DOWN, NEAREST, UP = range(4)
"""How an operation's argument is made whole."""
SLACK = 2.0**-12  # so that what should be whole is, whatever the rounding of a division


class Entry(NamedTuple):
    """One operation of a policy, and how its argument grows with the magnitude.

    From magnitude 0 to the greatest, the argument (`Op` has the units) goes from `low` to `high`
    linearly, gets a random sign if `signed`, and `base` is added or it is made whole by `rounding`.
    Of translations, `low` and `high` are in units of the image's side if `of_side`.
    """

    op: Op
    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    base: float = 0.0
    rounding: int = EXACT
    of_side: bool = False


Space = tuple[Entry, ...]


def _space(
    shear: float,
    translate: float,
    degrees: float,
    enhance: float,
    bits: tuple[int, int],
    *,
    of_side: bool,
) -> Space:
    """The thirteen operations that torchvision's policies have in common, with their ranges."""
    moved = {"signed": True, "rounding": DOWN, "of_side": of_side}
    return (
        Entry(Op.SHEAR_X, 0, shear, signed=True),
        Entry(Op.SHEAR_Y, 0, shear, signed=True),
        Entry(Op.TRANSLATE_X, 0, translate, **moved),  # type: ignore[arg-type]
        Entry(Op.TRANSLATE_Y, 0, translate, **moved),  # type: ignore[arg-type]
        Entry(Op.ROTATE, 0, degrees, signed=True),
        Entry(Op.POSTERIZE, *bits, rounding=NEAREST),
        Entry(Op.SOLARIZE, 255, 0, rounding=UP),
        Entry(Op.AUTOCONTRAST),
        Entry(Op.EQUALIZE),
        Entry(Op.BRIGHTNESS, 0, enhance, signed=True, base=1),
        Entry(Op.SATURATION, 0, enhance, signed=True, base=1),
        Entry(Op.CONTRAST, 0, enhance, signed=True, base=1),
        Entry(Op.SHARPNESS, 0, enhance, signed=True, base=1),
    )


COMMON = _space(0.3, 150 / 331, 30, 0.9, (8, 4), of_side=True)
RANDAUGMENT = (Entry(Op.IDENTITY), *COMMON)
AUTOAUGMENT = (*COMMON, Entry(Op.INVERT))
WIDE = (Entry(Op.IDENTITY), *_space(0.99, 32, 135, 0.99, (8, 2), of_side=False))
AUGMIX = _space(0.3, 1 / 3, 30, 0.9, (4, 0), of_side=True)
COLOURS = (Op.BRIGHTNESS, Op.SATURATION, Op.CONTRAST, Op.SHARPNESS)
"""What AugMix leaves out without `all_ops`, for they are corruptions of ImageNet-C too."""

_TIMM_SHARED = (
    Entry(Op.AUTOCONTRAST),
    Entry(Op.EQUALIZE),
    Entry(Op.INVERT),
    Entry(Op.ROTATE, 0, 30, signed=True),
    Entry(Op.SOLARIZE_ADD, 0, 110, rounding=DOWN),
    Entry(Op.SHEAR_X, 0, 0.3, signed=True),
    Entry(Op.SHEAR_Y, 0, 0.3, signed=True),
    Entry(Op.TRANSLATE_X, 0, 0.45, signed=True, of_side=True),
    Entry(Op.TRANSLATE_Y, 0, 0.45, signed=True, of_side=True),
)
TIMM = (
    *_TIMM_SHARED,
    Entry(Op.POSTERIZE, 0, 4, rounding=DOWN),
    Entry(Op.SOLARIZE, 0, 256, rounding=DOWN),
    *(Entry(op, 0.1, 1.9) for op in COLOURS),
)
TIMM_INCREASING = (
    *_TIMM_SHARED,
    Entry(Op.POSTERIZE, 4, 0, rounding=UP),
    Entry(Op.SOLARIZE, 256, 0, rounding=UP),
    *(Entry(op, 0, 0.9, signed=True, base=1) for op in COLOURS),
)

SubPolicy = tuple[tuple[Op, float, int], tuple[Op, float, int]]


def _sub_policies(text: str) -> tuple[SubPolicy, ...]:
    """Lines of `operation probability bin, operation probability bin`."""

    def step(words: str) -> tuple[Op, float, int]:
        op, probability, magnitude = words.split()
        return Op[op.upper()], float(probability), int(magnitude)

    lines = (line.split(",") for line in text.strip().splitlines())
    return tuple((step(first), step(second)) for first, second in lines)


AUTOAUGMENT_POLICIES: dict[str, tuple[SubPolicy, ...]] = {
    "cifar10": _sub_policies("""
        invert 0.1 0, contrast 0.2 6
        rotate 0.7 2, translate_x 0.3 9
        sharpness 0.8 1, sharpness 0.9 3
        shear_y 0.5 8, translate_y 0.7 9
        autocontrast 0.5 0, equalize 0.9 0
        shear_y 0.2 7, posterize 0.3 7
        saturation 0.4 3, brightness 0.6 7
        sharpness 0.3 9, brightness 0.7 9
        equalize 0.6 0, equalize 0.5 0
        contrast 0.6 7, sharpness 0.6 5
        saturation 0.7 7, translate_x 0.5 8
        equalize 0.3 0, autocontrast 0.4 0
        translate_y 0.4 3, sharpness 0.2 6
        brightness 0.9 6, saturation 0.2 8
        solarize 0.5 2, invert 0.0 0
        equalize 0.2 0, autocontrast 0.6 0
        equalize 0.2 0, equalize 0.6 0
        saturation 0.9 9, equalize 0.6 0
        autocontrast 0.8 0, solarize 0.2 8
        brightness 0.1 3, saturation 0.7 0
        solarize 0.4 5, autocontrast 0.9 0
        translate_y 0.9 9, translate_y 0.7 9
        autocontrast 0.9 0, solarize 0.8 3
        equalize 0.8 0, invert 0.1 0
        translate_y 0.7 9, autocontrast 0.9 0
    """),
    "svhn": _sub_policies("""
        shear_x 0.9 4, invert 0.2 0
        shear_y 0.9 8, invert 0.7 0
        equalize 0.6 0, solarize 0.6 6
        invert 0.9 0, equalize 0.6 0
        equalize 0.6 0, rotate 0.9 3
        shear_x 0.9 4, autocontrast 0.8 0
        shear_y 0.9 8, invert 0.4 0
        shear_y 0.9 5, solarize 0.2 6
        invert 0.9 0, autocontrast 0.8 0
        equalize 0.6 0, rotate 0.9 3
        shear_x 0.9 4, solarize 0.3 3
        shear_y 0.8 8, invert 0.7 0
        equalize 0.9 0, translate_y 0.6 6
        invert 0.9 0, equalize 0.6 0
        contrast 0.3 3, rotate 0.8 4
        invert 0.8 0, translate_y 0.0 2
        shear_y 0.7 6, solarize 0.4 8
        invert 0.6 0, rotate 0.8 4
        shear_y 0.3 7, translate_x 0.9 3
        shear_x 0.1 6, invert 0.6 0
        solarize 0.7 2, translate_y 0.6 7
        shear_y 0.8 4, invert 0.8 0
        shear_x 0.7 9, translate_y 0.8 3
        shear_y 0.8 5, autocontrast 0.7 0
        shear_x 0.7 2, invert 0.1 0
    """),
    "imagenet": _sub_policies("""
        posterize 0.4 8, rotate 0.6 9
        solarize 0.6 5, autocontrast 0.6 0
        equalize 0.8 0, equalize 0.6 0
        posterize 0.6 7, posterize 0.6 6
        equalize 0.4 0, solarize 0.2 4
        equalize 0.4 0, rotate 0.8 8
        solarize 0.6 3, equalize 0.6 0
        posterize 0.8 5, equalize 1.0 0
        rotate 0.2 3, solarize 0.6 8
        equalize 0.6 0, posterize 0.4 6
        rotate 0.8 8, saturation 0.4 0
        rotate 0.4 9, equalize 0.6 0
        equalize 0.0 0, equalize 0.8 0
        invert 0.6 0, equalize 1.0 0
        saturation 0.6 4, contrast 1.0 8
        rotate 0.8 8, saturation 1.0 2
        saturation 0.8 8, solarize 0.8 7
        sharpness 0.4 7, invert 0.6 0
        shear_x 0.6 5, equalize 1.0 0
        saturation 0.4 0, equalize 0.6 0
        equalize 0.4 0, solarize 0.2 4
        solarize 0.6 5, autocontrast 0.6 0
        invert 0.6 0, equalize 1.0 0
        saturation 0.6 4, contrast 1.0 8
        equalize 0.8 0, equalize 0.6 0
    """),
}
"""Name -> 25 sub-policies of two steps: operation, probability, magnitude bin of 0 to 9 (Cubuk et
al. 2019, tables 7 to 9 of the appendix; the bin of an operation without a magnitude is 0)."""


def arguments(
    space: Space,
    choice: jax.Array,
    magnitude: jax.Array | float,
    greatest: int,
    signs: jax.Array,
    size: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """What `_operations.chain` is told for these draws.

    Args:
        space: the operations.
        choice: int32, any shape: positions in `space`.
        magnitude: 0 to `greatest`; broadcasts against `choice`.
        greatest: the magnitude at which an argument is `high`.
        signs: float32, -1 or 1, of the shape of `choice`.
        size: (H, W) of the images.

    Returns:
        The operations, int32, and their arguments, float32, of the shape of `choice`.
    """
    sides = {Op.TRANSLATE_X: size[1], Op.TRANSLATE_Y: size[0]}
    rows = []
    for entry in space:
        unit = 100 * (sides[entry.op] if entry.of_side else 1)
        ends = entry.low * unit, entry.high * unit, entry.base * 100 * greatest
        rows.append((*ends, 100 * greatest, entry.op, entry.signed, entry.rounding))
    columns = jnp.asarray(np.asarray(rows, np.float32))[choice]
    low, high, base, scale, op, signed, rounding = jnp.moveaxis(columns, -1, 0)
    # In hundredths, whose sum is exact at a whole magnitude, and with one division: so the argument
    # is the nearest float32 to the decimal number that it stands for. The divisor comes from the
    # table because XLA would multiply by the reciprocal of a constant.
    sign = jnp.where(signed == 1, signs, 1.0)
    amount = low * (greatest - magnitude) + high * magnitude
    value = (base + sign * amount) / scale
    whole = jnp.select(
        [rounding == DOWN, rounding == NEAREST],
        [jnp.floor(amount / scale + SLACK), jnp.round(amount / scale)],
        jnp.ceil(amount / scale - SLACK),
    )
    return op.astype(jnp.int32), jnp.where(rounding == EXACT, value, sign * whole)


class Draws(NamedTuple):
    """What each example draws, [B, *shape] each.

    Attributes:
        choice: int32, uniform below the number of choices.
        bins: int32, uniform below the number of bins.
        signs: float32, -1 or 1.
        chance: float32, uniform in [0, 1).
        spread: float32, uniform in [0, 1), for what else has a magnitude or a length.
        cubic: bool, true half of the time.
        rest: [B] typed keys for what else is drawn.
    """

    choice: jax.Array
    bins: jax.Array
    signs: jax.Array
    chance: jax.Array
    spread: jax.Array
    cubic: jax.Array
    rest: jax.Array


def draw(
    key: jax.Array, count: int, shape: tuple[int, ...], *, choices: int, bins: int = 1
) -> Draws:
    """The draws of `count` examples."""

    # One call of the generator for all, for each call takes long to compile. A number below n is
    # floor(n u), with u one of 2**23 numbers: uniform but for a part in 2**23 / n.
    def one(own: jax.Array) -> Draws:
        mine, rest = jax.random.split(own)
        choice, level, sign, chance, spread, cubic = jax.random.uniform(mine, (6, *shape))
        return Draws(
            (choice * choices).astype(jnp.int32),
            (level * bins).astype(jnp.int32),
            jnp.where(sign < 0.5, -1.0, 1.0),
            chance,
            spread,
            cubic < 0.5,
            rest,
        )

    return jax.vmap(one)(keys.per_example(key, count))


def around(
    magnitude: jax.Array | float, std: jax.Array | float, drawn: Draws, greatest: int
) -> jax.Array:
    """Magnitudes with normal noise, clipped to 0 and the greatest."""
    smallest = jnp.finfo(jnp.float32).tiny  # of 0 the normal quantile is infinite
    noise = jax.scipy.special.ndtri(jnp.maximum(drawn.spread, smallest))
    return jnp.clip(magnitude + std * noise, 0, greatest)


def uniform(space: Space, probability: float = 1.0) -> Shares:
    """The expected share of each operation of a space, of which one is applied so often."""
    return {entry.op: probability / len(space) for entry in space if entry.op != Op.IDENTITY}


def _size(batch: Batch) -> tuple[int, int]:
    return batch.images.shape[1], batch.images.shape[2]


def _through(
    batch: Batch,
    operations: jax.Array,
    values: jax.Array,
    shares: Sequence[Shares],
    interpolation: str,
    cubic: jax.Array,
    fill: jax.Array | float,
) -> Batch:
    """The batch after each example's operations [B, n], one after another."""
    images = _operations.chain(
        batch.images, operations, values, shares,
        interpolation=interpolation, cubic=cubic, fill=fill,
    )  # fmt: skip
    masks, boxes, size = batch.masks, batch.boxes, _size(batch)
    for i in range(operations.shape[1]):
        matrix = _operations.matrices(operations[:, i], values[:, i], size)
        if masks is not None:
            masks = _geometry.warp_nearest(masks[..., None], matrix)[..., 0]
        if boxes is not None:
            boxes = jax.vmap(lambda box, m: _geometry.warp_boxes(box, m, size))(boxes, matrix)
    return dataclasses.replace(batch, images=images, masks=masks, boxes=boxes)


def randaugment(
    key: jax.Array,
    batch: Batch,
    *,
    num_ops: Annotated[int, Range(1)] = 2,
    magnitude: Annotated[float, Range(0, 30)] = 9.0,
    magnitude_std: Annotated[float, Range(0)] = 0.0,
    interpolation: str = "nearest",
    fill: Annotated[float, Range(0, 1)] = 0.0,
) -> Batch:
    """RandAugment with torchvision's operations: `num_ops` of 14, drawn with replacement.

    Cubuk et al. 2020, "RandAugment: practical automated data augmentation with a reduced search
    space".

    Args:
        key: a typed key, of the step.
        batch: `images` [B, H, W, C].
        num_ops: how many operations an example goes through.
        magnitude: of all operations, 0 to 30.
        magnitude_std: standard deviation of normal noise on the magnitude of each operation and
            example, which is then clipped (timm's `mstd`).
        interpolation: of the geometric operations: "nearest", "bilinear", "bicubic", or "random",
            bilinear or bicubic by each operation and example.
        fill: what moves in from beyond the image, 0 to 1.

    Raises:
        CnnlabError: there is no such interpolation.
    """
    drawn = draw(key, len(batch.images), (num_ops,), choices=len(RANDAUGMENT))
    level = around(magnitude, magnitude_std, drawn, 30)
    op, value = arguments(RANDAUGMENT, drawn.choice, level, 30, drawn.signs, _size(batch))
    shares = [uniform(RANDAUGMENT)] * num_ops
    return _through(batch, op, value, shares, interpolation, drawn.cubic, fill)


def randaugment_timm(
    key: jax.Array,
    batch: Batch,
    *,
    num_ops: Annotated[int, Range(1)] = 2,
    magnitude: Annotated[float, Range(0, 10)] = 9.0,
    magnitude_std: Annotated[float, Range(0)] = 0.5,
    increasing: bool = True,
    op_probability: Annotated[float, Range(0, 1)] = 0.5,
    interpolation: str = "random",
    fill: Annotated[float, Range(0, 1)] = 128 / 255,
) -> Batch:
    """RandAugment as timm has it: 15 operations, each applied with a probability.

    The defaults are those of its `rand-m9-n2-mstd0.5-inc1`.

    Args:
        key: a typed key, of the step.
        batch: `images` [B, H, W, C].
        num_ops: how many operations are drawn for an example, with replacement.
        magnitude: of all operations, 0 to 10.
        magnitude_std: standard deviation of normal noise on the magnitude of each operation and
            example, which is then clipped.
        increasing: whether posterize, solarize and the four enhancements depart further from the
            image as the magnitude grows; without, posterize and solarize do less then, and
            enhancements go from a factor of 0.1 to 1.9.
        op_probability: with which an operation that was drawn is applied, 0 to 1.
        interpolation: as for `randaugment`.
        fill: what moves in from beyond the image, 0 to 1.

    Raises:
        CnnlabError: there is no such interpolation.
    """
    space = TIMM_INCREASING if increasing else TIMM
    drawn = draw(key, len(batch.images), (num_ops,), choices=len(space))
    level = around(magnitude, magnitude_std, drawn, 10)
    op, value = arguments(space, drawn.choice, level, 10, drawn.signs, _size(batch))
    op = jnp.where(drawn.chance < op_probability, op, Op.IDENTITY)
    shares = [uniform(space)] * num_ops  # for any probability, which may be traced
    return _through(batch, op, value, shares, interpolation, drawn.cubic, fill)


def trivialaugment(
    key: jax.Array,
    batch: Batch,
    *,
    num_magnitude_bins: Annotated[int, Range(2)] = 31,
    interpolation: str = "nearest",
    fill: Annotated[float, Range(0, 1)] = 0.0,
) -> Batch:
    """TrivialAugment on its wide space: one of 14 operations, at a magnitude drawn uniformly.

    Müller & Hutter 2021, "TrivialAugment: tuning-free yet state-of-the-art data augmentation",
    table 2 ("Wide").

    Args:
        key: a typed key, of the step.
        batch: `images` [B, H, W, C].
        num_magnitude_bins: how many magnitudes there are.
        interpolation: as for `randaugment`.
        fill: what moves in from beyond the image, 0 to 1.

    Raises:
        CnnlabError: there is no such interpolation.
    """
    top = num_magnitude_bins - 1
    count, size = len(batch.images), _size(batch)
    drawn = draw(key, count, (1,), choices=len(WIDE), bins=num_magnitude_bins)
    op, value = arguments(WIDE, drawn.choice, drawn.bins, top, drawn.signs, size)
    return _through(batch, op, value, [uniform(WIDE)], interpolation, drawn.cubic, fill)


def autoaugment(
    key: jax.Array,
    batch: Batch,
    *,
    policy: str = "cifar10",
    interpolation: str = "nearest",
    fill: Annotated[float, Range(0, 1)] = 0.0,
) -> Batch:
    """AutoAugment: one of 25 learnt sub-policies, of two operations with their probabilities.

    Cubuk et al. 2019, "AutoAugment: learning augmentation strategies from data".

    Args:
        key: a typed key, of the step.
        batch: `images` [B, H, W, C].
        policy: "cifar10", "svhn" or "imagenet": of the data on which it was learnt.
        interpolation: as for `randaugment`.
        fill: what moves in from beyond the image, 0 to 1.

    Raises:
        CnnlabError: there is no such policy or interpolation.
    """
    if policy not in AUTOAUGMENT_POLICIES:
        raise CnnlabError(
            f"autoaugment: policy: expected one of {', '.join(AUTOAUGMENT_POLICIES)}, got "
            f"{policy!r}{did_you_mean(policy, AUTOAUGMENT_POLICIES)}"
        )
    table = AUTOAUGMENT_POLICIES[policy]
    position = {entry.op: i for i, entry in enumerate(AUTOAUGMENT)}
    rows = [[(position[op], chance, level) for op, chance, level in steps] for steps in table]
    drawn = draw(key, len(batch.images), (2,), choices=len(table))
    steps = jnp.asarray(np.asarray(rows, np.float32))[drawn.choice[:, 0]]
    choice, chance, level = steps[..., 0].astype(jnp.int32), steps[..., 1], steps[..., 2]
    op, value = arguments(AUTOAUGMENT, choice, level, 9, drawn.signs, _size(batch))
    op = jnp.where(drawn.chance < chance, op, Op.IDENTITY)
    shares: list[dict[Op, float]] = [{}, {}]
    for steps_of_one in table:
        for share, (name, chance_of_one, _) in zip(shares, steps_of_one, strict=True):
            share[name] = share.get(name, 0.0) + chance_of_one / len(table)
    return _through(batch, op, value, shares, interpolation, drawn.cubic, fill)


def augmix(
    key: jax.Array,
    batch: Batch,
    *,
    severity: Annotated[int, Range(1, 10)] = 3,
    width: Annotated[int, Range(1)] = 3,
    depth: Annotated[int, Range(-1)] = -1,
    alpha: Annotated[float, Range(0.01)] = 1.0,
    all_ops: bool = True,
    interpolation: str = "bilinear",
    fill: Annotated[float, Range(0, 1)] = 0.0,
) -> Batch:
    """AugMix: the image mixed with a mixture of `width` chains of random operations of it.

    Hendrycks et al. 2020, "AugMix: a simple data processing method to improve robustness and
    uncertainty", algorithm 1; operations and magnitudes as in torchvision. The weights of the
    chains are Dirichlet(alpha, ..., alpha), that of the mixture Beta(alpha, alpha). Images are
    mixed as pixels: all weights sum to 1, so normalising before (as the paper does) or after is the
    same, and the mixture is not rounded to 256 levels. Labels, masks and boxes stay as they are.

    Args:
        key: a typed key, of the step.
        batch: `images` [B, H, W, C].
        severity: how many of 10 magnitudes are drawn from, the lowest first.
        width: the number of chains.
        depth: operations in a chain; not positive draws 1, 2 or 3 for each chain.
        alpha: of both distributions of weights.
        all_ops: also brightness, saturation, contrast and sharpness, which ImageNet-C's
            corruptions contain and the paper therefore leaves out.
        interpolation: as for `randaugment`.
        fill: what moves in from beyond the image, 0 to 1.

    Raises:
        CnnlabError: there is no such interpolation.
    """
    space = tuple(entry for entry in AUGMIX if all_ops or entry.op not in COLOURS)
    count, size = len(batch.images), _size(batch)
    steps = depth if depth > 0 else 3
    drawn = draw(key, count, (width, steps), choices=len(space), bins=severity)
    op, value = arguments(space, drawn.choice, drawn.bins, 9, drawn.signs, size)
    if depth <= 0:
        op = jnp.where(in_chain(drawn), op, Op.IDENTITY)
    weights, share = mixing_weights(drawn.rest, alpha, width)
    copies = jnp.repeat(batch.images, width, 0)
    op, value, cubic = (x.reshape(count * width, steps) for x in (op, value, drawn.cubic))
    shares = [uniform(space, 1 if depth > 0 else (3 - i) / 3) for i in range(steps)]
    chains = _operations.chain(
        copies, op, value, shares, interpolation=interpolation, cubic=cubic, fill=fill
    ).reshape(count, width, *batch.images.shape[1:])
    mixture = sum(_each(weights[:, i]) * chains[:, i] for i in range(width))
    mixed = (1 - _each(share)) * batch.images + _each(share) * mixture
    return dataclasses.replace(batch, images=jnp.clip(mixed, 0, 1))


def in_chain(drawn: Draws) -> jax.Array:
    """Which of three operations are in their chain, of 1, 2 or 3 of them: [B, width, 3] bool."""
    lengths = 1 + (3 * drawn.spread[..., :1]).astype(jnp.int32)
    return jnp.arange(3)[None, None] < lengths


def mixing_weights(
    own: jax.Array, alpha: jax.Array | float, width: int
) -> tuple[jax.Array, jax.Array]:
    """AugMix's weights: of the chains [B, width], which sum to 1, and of their mixture [B].

    Args:
        own: [B] typed keys.
        alpha: of the Dirichlet and the Beta distribution.
        width: the number of chains.
    """
    # Dirichlet and Beta variables are gamma variables over their sum.
    logs = jax.vmap(lambda one: jax.random.loggamma(one, alpha, (width + 2,)))(own)
    return jax.nn.softmax(logs[:, :width]), jax.nn.softmax(logs[:, width:])[:, 1]


def _each(numbers: jax.Array) -> jax.Array:
    return numbers[:, None, None, None]


PLUGINS = {
    "randaugment": randaugment,
    "randaugment_timm": randaugment_timm,
    "trivialaugment": trivialaugment,
    "autoaugment": autoaugment,
    "augmix": augmix,
}
