"""The operations of the policies, and how a batch goes through them, one an example.

`switch` under `vmap` computes every operation for every example. Here each is computed for those
that chose it: examples of one kind are gathered into a block of fixed size, a little above the
number expected, and read back from there. What maps a level by itself is a table of 256 entries an
example, so one look-up serves all of these operations; what moves pixels is an affine matrix, so
one warp serves those.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnnlab.augment import _geometry, _levels
from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError


class Op(enum.IntEnum):
    """An operation and what its argument is; all act on levels 0 to 255 as Pillow does."""

    IDENTITY = 0
    SHEAR_X = 1  # columns that the source moves right a row down
    SHEAR_Y = 2  # rows that the source moves down a column right
    TRANSLATE_X = 3  # pixels to the right
    TRANSLATE_Y = 4  # pixels down
    ROTATE = 5  # degrees counter-clockwise
    BRIGHTNESS = 6  # factor; 0 is black, 1 the image
    SATURATION = 7  # factor; 0 is grey, 1 the image
    CONTRAST = 8  # factor; 0 is the mean grey, 1 the image
    SHARPNESS = 9  # factor; 0 is smoothed, 1 the image
    POSTERIZE = 10  # bits kept
    SOLARIZE = 11  # level from which on levels are inverted
    SOLARIZE_ADD = 12  # what is added to levels below 128
    AUTOCONTRAST = 13
    EQUALIZE = 14
    INVERT = 15


GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "random")

Shares = Mapping[Op, float]
Take = Callable[[jax.Array], jax.Array]


class Group(NamedTuple):
    """Examples for which one thing is computed.

    Attributes:
        chosen: [B] bool, which examples.
        share: the expected share of them.
        compute: what is computed for those examples that `take` takes of arrays [B, ...].
    """

    chosen: jax.Array
    share: float
    compute: Callable[[Take], jax.Array]

    def block(self) -> int:
        """How many examples are computed at once: five standard deviations above the mean."""
        mean = len(self.chosen) * self.share
        return min(math.ceil(mean + 5 * math.sqrt(mean * (1 - self.share))), len(self.chosen))


def chain(
    images: jax.Array,
    operations: jax.Array,
    values: jax.Array,
    shares: Sequence[Shares],
    *,
    interpolation: str,
    cubic: jax.Array,
    fill: jax.Array | float,
) -> jax.Array:
    """Takes each example through its own operations, one after another.

    Args:
        images: [B, H, W, C] float32 in [0, 1]; rounded to 256 levels first.
        operations: [B, n] int32.
        values: [B, n] float32, their arguments, in the units that `Op` names.
        shares: n times: which operations there are besides the identity, and of which share of the
            examples each is expected. Results do not depend on how large the shares are.
        interpolation: one of `INTERPOLATIONS`, of what moves pixels.
        cubic: [B, n] bool, where `interpolation` is "random": bicubic, else bilinear.
        fill: what moves in, 0 to 1.

    Returns:
        [B, H, W, C] float32 of k / 255 with whole numbers k.

    Raises:
        CnnlabError: there is no such interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise CnnlabError(
            f"augment: interpolation: expected one of {', '.join(INTERPOLATIONS)}, got "
            f"{interpolation!r}{did_you_mean(interpolation, INTERPOLATIONS)}"
        )
    levels, level = _levels.to_levels(images), jnp.round(jnp.asarray(fill) * 255)
    for i, share in enumerate(shares):
        levels = _apply(
            levels, operations[:, i], values[:, i], share, interpolation, cubic[:, i], level
        )
    return _levels.to_images(levels)


def _apply(
    levels: jax.Array,
    operations: jax.Array,
    values: jax.Array,
    shares: Shares,
    interpolation: str,
    cubic: jax.Array,
    fill: jax.Array,
) -> jax.Array:
    """One operation for each example: levels [B, H, W, C] of levels [B, H, W, C]."""
    tables = _statistics(levels, operations, values, shares)
    moved = _neighbourhoods(levels, operations, values, shares, interpolation, cubic, fill)
    groups = [*tables, *moved]

    def changed(replace: Callable[..., jax.Array]) -> jax.Array:
        table = replace(_tables(operations, values, levels.shape[-1], shares), 0, len(tables))
        return replace(_levels.apply_table(levels, _once(table)), len(tables), len(groups))

    def by_all() -> jax.Array:
        return changed(lambda base, *part: _replace_by_all(base, groups[slice(*part)]))

    def by_blocks() -> jax.Array:
        blocks = _blocks(groups)
        return changed(
            lambda base, *part: _replace_by_blocks(base, groups[slice(*part)], blocks[slice(*part)])
        )

    few = groups and sum(group.block() for group in moved) < len(levels)
    if not few or jax.default_backend() != "cpu":
        return by_all()
    fits = jnp.stack([group.chosen.sum() <= group.block() for group in groups]).all()
    result: jax.Array = jax.lax.cond(fits, by_blocks, by_all)
    return result


def _replace_by_all(base: jax.Array, groups: Sequence[Group]) -> jax.Array:
    """`base` [B, ...] with the groups' examples replaced, each computed for the whole batch."""
    for group in groups:
        base = jnp.where(_spread(group.chosen, base), _once(group.compute(_once)), base)
    return base


class Block(NamedTuple):
    """A group's examples, with others in the end where the group does not fill it.

    Attributes:
        rows: [K] int32, which examples.
        place: [B] int32, where in the block those of the group are.
    """

    rows: jax.Array
    place: jax.Array


def _blocks(groups: Sequence[Group]) -> list[Block]:
    count = len(groups[0].chosen)
    kind = jnp.full(count, len(groups))
    for i, group in enumerate(groups):
        kind = jnp.where(group.chosen, i, kind)
    order = jnp.argsort(kind)
    rank = jnp.argsort(order)
    found = []
    for i, group in enumerate(groups):
        first = (kind < i).sum()
        rows = order[jnp.minimum(first + jnp.arange(group.block()), count - 1)]
        found.append(Block(rows, rank - first))
    return found


def _replace_by_blocks(
    base: jax.Array, groups: Sequence[Group], blocks: Sequence[Block]
) -> jax.Array:
    """As `_replace_by_all`, each computed for its block alone, which must hold all of the group."""
    if not groups:
        return base
    computed, place, start = [], jnp.zeros(len(base), jnp.int32), 0
    for group, block in zip(groups, blocks, strict=True):
        computed.append(_once(group.compute(functools.partial(_rows, block.rows))))
        place = jnp.where(group.chosen, start + block.place, place)
        start += len(block.rows)
    chosen = functools.reduce(jnp.logical_or, [group.chosen for group in groups])
    return jnp.where(_spread(chosen, base), _once(jnp.concatenate(computed))[place], base)


def _rows(rows: jax.Array, x: jax.Array) -> jax.Array:
    return _once(x[rows])


def _once(x: Any) -> Any:
    """Keeps XLA from computing `x` anew for each element that a gather reads of it."""
    return jax.lax.optimization_barrier(x)


def _spread(chosen: jax.Array, like: jax.Array) -> jax.Array:
    return chosen.reshape(-1, *(1,) * (like.ndim - 1))


def _tables(operations: jax.Array, values: jax.Array, channels: int, shares: Shares) -> jax.Array:
    """[B, C, 256]: of operations that need not look at the image; of others, each level itself."""
    makers: dict[Op, Callable[[jax.Array], jax.Array]] = {
        Op.BRIGHTNESS: _levels.brightness_table,
        Op.POSTERIZE: _levels.posterize_table,
        Op.SOLARIZE: _levels.solarize_table,
        Op.SOLARIZE_ADD: _levels.solarize_add_table,
        Op.INVERT: lambda _: _levels.invert_table()[None],
    }
    table = jnp.arange(256.0)[None]
    for op in shares:
        if op in makers:
            chosen = operations == op
            made = makers[op](jnp.where(chosen, values, 1.0))
            table = jnp.where(chosen[:, None], made, table)
    return jnp.broadcast_to(table[:, None], (len(operations), channels, 256))


def _statistics(
    levels: jax.Array, operations: jax.Array, values: jax.Array, shares: Shares
) -> list[Group]:
    """Tables [C, 256] that depend on the image."""
    makers: dict[Op, Callable[[Take], jax.Array]] = {
        Op.CONTRAST: lambda take: _each_channel(
            _levels.contrast_table(take(levels), take(values)), levels.shape[-1]
        ),
        Op.AUTOCONTRAST: lambda take: _levels.autocontrast_table(take(levels)),
        Op.EQUALIZE: lambda take: _levels.equalize_table(take(levels)),
    }
    return [Group(operations == op, shares[op], makers[op]) for op in shares if op in makers]


def _each_channel(table: jax.Array, channels: int) -> jax.Array:
    return jnp.broadcast_to(table[:, None], (len(table), channels, 256))


def _neighbourhoods(
    levels: jax.Array,
    operations: jax.Array,
    values: jax.Array,
    shares: Shares,
    interpolation: str,
    cubic: jax.Array,
    fill: jax.Array,
) -> list[Group]:
    """Images that are not a table's: what moves pixels, or mixes channels or neighbours."""

    def changed(op: Op, function: Callable[[jax.Array, jax.Array], jax.Array]) -> Group:
        return Group(
            operations == op, shares[op], lambda take: function(take(levels), take(values))
        )

    groups = []
    if Op.SATURATION in shares and levels.shape[-1] == 3:  # else there is no colour to change
        groups.append(changed(Op.SATURATION, _levels.saturate))
    if Op.SHARPNESS in shares:
        groups.append(changed(Op.SHARPNESS, _levels.sharpen))
    moving = [op for op in GEOMETRIC if op in shares]
    if not moving:
        return groups
    moves = functools.reduce(jnp.logical_or, [operations == op for op in moving])
    share = sum(shares[op] for op in moving)
    matrix = matrices(operations, values, (levels.shape[1], levels.shape[2]))

    def warped(method: Any) -> Callable[[Take], jax.Array]:
        return lambda take: _geometry.warp_levels(
            take(levels), take(matrix), method=method, fill=fill
        )

    if interpolation != "random":
        return [*groups, Group(moves, share, warped(interpolation))]
    return [
        *groups,
        Group(moves & cubic, share / 2, warped("bicubic")),
        Group(moves & ~cubic, share / 2, warped("bilinear")),
    ]


def matrices(operations: jax.Array, values: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, 2, 3] for `_geometry`: from where the pixels come, each from itself where none moves."""
    amount = {op: jnp.where(operations == op, values, 0.0) for op in GEOMETRIC}
    one = jnp.ones_like(values)
    shear = jnp.stack([
        jnp.stack([one, amount[Op.SHEAR_X], -amount[Op.TRANSLATE_X]], -1),
        jnp.stack([amount[Op.SHEAR_Y], one, -amount[Op.TRANSLATE_Y]], -1),
    ], -2)  # fmt: skip
    turned = _geometry.rotation(amount[Op.ROTATE], size)
    return jnp.where((operations == Op.ROTATE)[:, None, None], turned, shear)
