"""Square attack: random search with squares, by the model's outputs alone.

Andriushchenko, Croce, Flammarion & Hein 2020, "Square attack: a query-efficient black-box
adversarial attack via random search", algorithms 1 to 3. The version for L1 is that for L2 with
the projection of Croce & Hein 2021.

The defaults are those of the ensemble (`autoattack`).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab.attacks import LogitsFn, _balls, _losses, _search, _verdicts
from cnnlab.registry import Range

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these queries the squares' area is halved, for 10,000 queries (section 4)."""

_TILES = 5  # a side, of the first perturbation for L2 and L1


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)],
    norm: str = "linf",
    steps: int = 5000,
    restarts: int = 1,
    p_init: Annotated[float, Range(0, 1)] = 0.8,
    rescale_schedule: bool = False,
) -> jax.Array:
    """The images of highest margin in the ball; the search ends where one is misclassified.

    Args:
        key: one key, or one an example, [B].
        logits_fn: pixels [B, H, W, C] in [0, 1] to logits [B, K]; no gradient is taken.
        images: [B, H, W, C] in [0, 1].
        labels: [B] int32.
        eps: the ball's radius; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: queries of each round after the first.
        restarts: rounds.
        p_init: the part of the image that the first squares cover; may be traced.
        rescale_schedule: whether the squares shrink at the same parts of `steps` as they do of
            10,000 queries, as section 4 has it; the ensemble shrinks them at the same queries.

    Returns:
        [B, H, W, C] float32; the images themselves where the model is wrong already.

    Raises:
        CnnlabError: unknown norm, or a count below 1.
    """
    own = search(
        logits_fn,
        eps=eps,
        norm=norm,
        steps=steps,
        restarts=restarts,
        p_init=p_init,
        rescale_schedule=rescale_schedule,
    )
    return _search.run(own, key, logits_fn, images, labels)


class _State(NamedTuple):
    """All [B, ...]."""

    keys: jax.Array
    clean: jax.Array
    labels: jax.Array
    images: jax.Array
    margin: jax.Array
    fallen: jax.Array


def search(
    logits_fn: LogitsFn,
    *,
    eps: float | jax.Array,
    norm: str = "linf",
    steps: int = 5000,
    restarts: int = 1,
    p_init: float | jax.Array = 0.8,
    rescale_schedule: bool = False,
) -> _search.Search:
    """The attack as a `Search`; arguments as those of `perturb`."""
    _balls.check_norm(norm)
    _search.check_counts(steps=steps, restarts=restarts)
    propose, first = (_stripes_and_squares if norm == "linf" else _humps)(eps, norm)
    query = np.arange(steps) * (10_000 / steps if rescale_schedule else 1)
    halvings = jnp.asarray(np.searchsorted(_HALVINGS, np.floor(query)), jnp.int32)

    def judge(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_fn(images)
        return _losses.margin(logits, labels), _verdicts.fooled(logits, labels)

    def start(keys: jax.Array, images: jax.Array, labels: jax.Array, number: jax.Array) -> _State:
        begun = first(keys, images)
        return _State(keys, images, labels, begun, *judge(begun, labels))

    def step(state: _State, index: jax.Array) -> _State:
        pixels = math.prod(state.clean.shape[1:3])
        area = p_init * pixels / 2.0 ** halvings[index]
        side = jnp.round(jnp.sqrt(area)).astype(jnp.int32)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index + 1))(state.keys)
        tried = propose(keys, state.clean, state.images, side)
        margin, fallen = judge(tried, state.labels)
        taken = ((margin > state.margin) | fallen) & ~state.fallen
        return state._replace(
            images=jnp.where(_balls.per_example(taken), tried, state.images),
            margin=jnp.where(taken, margin, state.margin),
            fallen=state.fallen | fallen,
        )

    def outcome(state: _State) -> tuple[jax.Array, jax.Array]:
        return state.images, jnp.where(state.fallen, _search.FALLEN, state.margin)

    return _search.Search(restarts, steps, start, step, outcome)


def _uniforms(keys: jax.Array, count: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def _corner(uniform: jax.Array, size: int, side: jax.Array) -> jax.Array:
    """A first row or column of a square that lies in the image, [B]."""
    return jnp.minimum((uniform * (size - side + 1)).astype(jnp.int32), size - side)


def _inside(corner: jax.Array, size: int, side: jax.Array) -> jax.Array:
    """[B, size] bool."""
    offset = jnp.arange(size)[None] - corner[:, None]
    return (offset >= 0) & (offset < side)


def _square(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return (rows[:, :, None] & columns[:, None, :])[..., None]


# --- Linf ---------------------------------------------------------------------------------------


def _stripes_and_squares(eps: float | jax.Array, norm: str) -> tuple[Any, Any]:
    """Section 4.1: vertical stripes at first, then squares, each at one end of the ball."""

    def choose(clean: jax.Array, up: jax.Array) -> jax.Array:
        low, high = _balls.bounds(clean, eps)
        return jnp.where(up, high, low)

    def first(keys: jax.Array, clean: jax.Array) -> jax.Array:
        _, _, width, channels = clean.shape
        up = _uniforms(keys, width * channels) < 0.5
        return choose(clean, up.reshape(-1, 1, width, channels))

    def propose(keys: jax.Array, clean: jax.Array, images: jax.Array, side: jax.Array) -> jax.Array:
        _, height, width, channels = clean.shape
        side = jnp.clip(side, 1, min(height, width))
        draws = _uniforms(keys, 2 + channels)
        rows = _inside(_corner(draws[:, 0], height, side), height, side)
        columns = _inside(_corner(draws[:, 1], width, side), width, side)
        up = (draws[:, 2:] < 0.5)[:, None, None]
        return jnp.where(_square(rows, columns), choose(clean, up), images)

    return propose, first


# --- L2 and L1 ----------------------------------------------------------------------------------


def _humps(eps: float | jax.Array, norm: str) -> tuple[Any, Any]:
    """Section 4.2: windows with a hump and a hollow, fed by what another window gives up."""

    def size(delta: jax.Array) -> jax.Array:
        """The norm of each channel of a window, [B, 1, 1, C]."""
        if norm == "l1":
            return jnp.sum(jnp.abs(delta), (1, 2), keepdims=True)
        return jnp.sqrt(jnp.sum(jnp.square(delta), (1, 2), keepdims=True))

    def fit(delta: jax.Array, clean: jax.Array) -> jax.Array:
        if norm == "l2":  # clipping has shortened what was in the ball: all of it is used again
            delta *= _balls.per_example(eps / jnp.maximum(_balls.length(delta, norm), 1e-12))
        return _balls.project(clean + delta, clean, eps, norm)

    def first(keys: jax.Array, clean: jax.Array) -> jax.Array:
        _, height, width, channels = clean.shape
        side = max(min(height, width) // _TILES, 1)
        down, across = height // side, width // side
        draws = _uniforms(keys, down * across * (1 + channels)).reshape(
            -1, down, across, 1 + channels
        )
        corner = jnp.zeros(1, jnp.int32)
        pattern = _placed(jnp.int32(side), corner > 0, corner, corner, (side, side))[0, ..., 0]
        turned = (draws[..., 0] < 0.5)[:, :, None, :, None]
        upright, lying = pattern[None, None, :, None], pattern.T[None, None, :, None]
        tiles = jnp.where(turned, lying, upright)
        signs = jnp.where(draws[..., 1:] < 0.5, -1.0, 1.0)[:, :, None, :, None]
        delta = (tiles[..., None] * signs).reshape(-1, down * side, across * side, channels)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        spare = ((top, height - down * side - top), (left, width - across * side - left))
        return fit(jnp.pad(delta, ((0, 0), *spare, (0, 0))), clean)

    def propose(keys: jax.Array, clean: jax.Array, images: jax.Array, side: jax.Array) -> jax.Array:
        _, height, width, channels = clean.shape
        largest = min(height, width)
        side = jnp.clip(side | 1, min(3, largest), largest)
        draws = _uniforms(keys, 5 + channels)
        corners = [
            _corner(draws[:, i], extent, side) for i, extent in enumerate((height, width) * 2)
        ]
        spans = [
            _inside(corner, extent, side)
            for corner, extent in zip(corners, (height, width) * 2, strict=True)
        ]
        window, other = _square(*spans[:2]), _square(*spans[2:])
        delta = images - clean
        whole = _balls.per_example(_balls.length(delta, norm))
        given = size(jnp.where(window | other, delta, 0))
        old = jnp.where(window, delta, 0)
        signs = jnp.where(draws[:, 5:] < 0.5, -1.0, 1.0)[:, None, None]
        turned = draws[:, 4] < 0.5
        humps = _placed(side, turned, corners[0], corners[1], (height, width)) * signs
        new = humps + old / (size(old) + 1e-12)
        if norm == "l2":
            spare = jnp.maximum(jnp.square(eps) - jnp.square(whole), 0) / channels
            budget = jnp.sqrt(spare + jnp.square(given))
        else:
            budget = jnp.maximum(eps - whole, 0) + channels * given
        new *= budget / (size(new) + 1e-12)
        delta = jnp.where(window, new, jnp.where(other, 0, delta))
        return fit(delta, clean)

    return propose, first


def _placed(
    side: jax.Array, turned: jax.Array, top: jax.Array, left: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Equation 2 in a window of this side with its corner there: [B, H, W, 1], of L2 norm 1.

    Each half is made of ever smaller rectangles laid on one another, the k-th of height 1 / k^2:
    heights[-1] less heights[ring], where a pixel's ring is the larger of its distances along both
    axes from the half's centre. As heights rise, those of both axes are looked up by themselves.

    Args:
        side: of the window, scalar.
        turned: [B]; whether the halves lie beside one another.
        top: [B], the first row.
        left: [B], the first column.
        size: (H, W).
    """
    heights = jnp.asarray(
        np.cumsum([0.0, *(1.0 / np.arange(1, max(size) + 2) ** 2)]).astype(np.float32)
    )
    half = side // 2

    def along(corner: jax.Array, extent: int, split: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Height and sign of each row or column, [B, extent]; `split` along it in two halves."""
        offset = jnp.arange(extent)[None] - corner[:, None]
        upper = offset < half
        centre = jnp.where(upper, half // 2, half + (side - half) // 2)
        centre = jnp.where(split, centre, half)
        ring = jnp.clip(jnp.abs(offset - centre), 0, half)
        sign = jnp.where(split & ~upper, -1.0, 1.0)
        inside = (offset >= 0) & (offset < side)
        return jnp.where(inside, jnp.take(heights, ring), jnp.inf), sign

    rows, row_signs = along(top, size[0], ~turned[:, None])
    columns, column_signs = along(left, size[1], turned[:, None])
    highest = jnp.maximum(rows[:, :, None], columns[:, None, :])
    hump = jnp.maximum(heights[half + 1] - highest, 0)
    hump *= row_signs[:, :, None] * column_signs[:, None, :]
    humps, hollows = (
        jnp.sum(jnp.square(part), (1, 2), keepdims=True)
        for part in (jnp.maximum(hump, 0), jnp.minimum(hump, 0))
    )
    halves = (humps > 0).astype(jnp.float32) + (hollows > 0)
    energy = jnp.where(hump > 0, humps, hollows) * halves
    return (hump / jnp.sqrt(jnp.maximum(energy, _balls.TINY)))[..., None]
