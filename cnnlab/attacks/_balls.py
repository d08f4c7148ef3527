"""Norm balls around images, exact in float32.

Whatever `project` and `random_start` return is, computed in float64, no farther from the clean
image than the given eps, and in [0, 1]. Three rules give that. A perturbation is added so that the
sum rounds towards the clean image (`add`), so it never grows by rounding. Norms are compared to a
radius that is smaller than eps by more than the error of the norm, which is summed pairwise to keep
that error at a few units in the last place for any image size. And what is measured is what is
returned (`_settled`): XLA computes a sum anew for each reader, and not always to the same bit.

`norm` is `"linf"`, `"l2"` or `"l1"`; images are [B, H, W, C] float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab import keys
from cnnlab.ops.conv_algorithms import BARRIERS_HOLD
from cnnlab.types import CnnlabError

NORMS = ("linf", "l2", "l1")

# Pairwise sums of n numbers err by a factor of 1 + log2(n) 2**-24, eps in float32 by 2**-24.
MARGIN = 1 - 2.0**-18
TINY = float(np.finfo(np.float32).tiny)


def check_norm(norm: str, known: tuple[str, ...] = NORMS) -> str:
    """The norm, if it is one of the known.

    Raises:
        CnnlabError: it is not.
    """
    if norm not in known:
        raise CnnlabError(f"norm: expected one of {', '.join(known)}, got {norm!r}")
    return norm


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """[count] keys: those given, or one for each position from a single key."""
    return keys.per_example(key, count) if key.ndim == 0 else key


def per_example(values: jax.Array) -> jax.Array:
    """[B] as [B, 1, 1, 1], to go with images."""
    return values[:, None, None, None]


def total(values: jax.Array) -> jax.Array:
    """The sum for each example, [B] of [B, ...], pairwise."""
    return _by_halves(jnp.add, values)


def largest(values: jax.Array) -> jax.Array:
    """The maximum for each example, [B] of [B, ...]; faster than XLA's own on CPU."""
    return _by_halves(jnp.maximum, values)


def _by_halves(
    combine: Callable[[jax.Array, jax.Array], jax.Array], values: jax.Array
) -> jax.Array:
    flat = values.reshape(len(values), -1)
    while (size := flat.shape[1]) > 1:
        half = 1 << (size - 1).bit_length() - 1  # the largest power of two below the size
        both = combine(flat[:, : size - half], flat[:, half:])
        flat = both if 2 * half == size else jnp.concatenate([both, flat[:, size - half : half]], 1)
    return flat[:, 0]


def radius(eps: float | jax.Array) -> jax.Array:
    """What a perturbation's `length` may be: whatever is no longer lies in the ball, exactly."""
    return jnp.float32(eps) * jnp.float32(MARGIN)


def length(delta: jax.Array, norm: str) -> jax.Array:
    """The norm of each example's perturbation, [B]."""
    if norm == "l1":
        return total(jnp.abs(delta))
    greatest = largest(jnp.abs(delta))
    if norm == "linf":
        return greatest
    scale = jnp.maximum(greatest, TINY)  # squares of small numbers vanish
    return scale * jnp.sqrt(total(jnp.square(delta / per_example(scale))))


def distance(a: jax.Array, b: jax.Array, norm: str) -> jax.Array:
    """The distance of each example of `a` from that of `b`, [B] float32."""
    return length(a - b, check_norm(norm))


def add(clean: jax.Array, delta: jax.Array) -> jax.Array:
    """`clean + delta` rounded towards `clean`, then clipped to [0, 1]: no farther than `delta`."""
    return jnp.clip(jnp.nextafter(clean + delta, clean), 0, 1)


def bounds(clean: jax.Array, eps: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and greatest pixels of the Linf ball in [0, 1]."""
    within = jnp.nextafter(jnp.float32(eps), jnp.float32(0))  # eps may have been rounded up
    return add(clean, -within), add(clean, within)


def project(images: jax.Array, clean: jax.Array, eps: float | jax.Array, norm: str) -> jax.Array:
    """The images brought into the ball around the clean ones and into [0, 1].

    For Linf and L1 this is the nearest point of both sets (Croce & Hein 2021, "Mind the Box",
    section 2.1); for L2 the nearest point of the ball, then clipped, as is usual.

    Args:
        images: [B, H, W, C] float32, anything finite.
        clean: [B, H, W, C] float32 in [0, 1].
        eps: the radius, at least 0; may be traced.
        norm: of `NORMS`.

    Returns:
        [B, H, W, C] float32; where it lies in both sets already, the image itself.
    """
    if check_norm(norm) == "linf":
        return jnp.clip(images, *bounds(clean, eps))
    within = radius(eps)
    images = _settled(images)
    clipped = jnp.clip(images, 0, 1)
    if norm == "l2":
        delta = images - clean
        size = length(delta, norm)
        shrunk = add(
            clean, delta * per_example(within / jnp.maximum(size, jnp.maximum(within, TINY)))
        )
        return jnp.where(per_example(size <= within), clipped, shrunk)
    delta = clipped - clean
    inside = total(jnp.abs(delta)) <= within
    shrunk = add(clean, _l1_projection(images - clean, clean, within))
    return jnp.where(per_example(inside), clipped, shrunk)


def _settled(images: jax.Array) -> jax.Array:
    """The same images in memory, where all readers find the same bits."""
    if BARRIERS_HOLD:
        return lax.optimization_barrier(images)
    # XLA can't look through a loop that might run and change them: for NaN, which stays NaN.
    return lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.bool_(False), carry[1] + carry[1]),
        (jnp.isnan(images.reshape(-1)[0]), images),
    )[1]


def _l1_projection(delta: jax.Array, clean: jax.Array, within: jax.Array) -> jax.Array:
    """The nearest perturbation of L1 norm at most `radius` that stays in the box.

    It is sign(delta) min(max(|delta| - threshold, 0), room): only the threshold is to be found.
    """
    size = jnp.abs(delta)
    room = jnp.where(delta > 0, 1 - clean, clean)

    def shrunk(threshold: jax.Array) -> jax.Array:
        return jnp.clip(size - per_example(threshold), 0, room)

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        fits = total(shrunk(middle)) <= within
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    greatest = largest(size)
    _, high = lax.fori_loop(0, 26, halve, (jnp.zeros_like(greatest), greatest))
    return jnp.sign(delta) * shrunk(high)


def random_start(key: jax.Array, clean: jax.Array, eps: float | jax.Array, norm: str) -> jax.Array:
    """A random point of the ball around each image, in [0, 1].

    Uniform in the Linf and L2 balls, then clipped; for L1 the projection of a Gaussian, which is
    sparse as perturbations of small L1 norm are (Croce & Hein 2021, section 3).

    Args:
        key: one key, or one an example, [B].
        clean: [B, H, W, C] float32 in [0, 1].
        eps: the radius; may be traced.
        norm: of `NORMS`.
    """
    each = example_keys(key, len(clean))
    shape = clean.shape[1:]
    if check_norm(norm) == "linf":
        draws = jax.vmap(lambda k: jax.random.uniform(k, shape, minval=-1.0))(each)
        return project(clean + eps * draws, clean, eps, norm)
    draws = jax.vmap(lambda k: jax.random.normal(k, shape))(each)
    if norm == "l1":
        return project(clean + draws, clean, eps, norm)
    parts = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(each)
    lengths = eps * parts ** (1 / np.prod(shape))
    return project(clean + draws * per_example(lengths / length(draws, norm)), clean, eps, norm)


def steepest(gradient: jax.Array, norm: str, *, share: float | jax.Array = 0.01) -> jax.Array:
    """The step of length 1 that follows the gradient best; zero where the gradient is.

    Args:
        gradient: [B, H, W, C].
        norm: in which the step has length 1.
        share: for L1, how many of the numbers the step is spread over, as a part of all (at least
            one number): scalar or [B], may be traced. One alone would be steepest, but then a step
            changes one number only (Tramer & Boneh 2019, section 4.1).
    """
    if check_norm(norm) == "linf":
        return jnp.sign(gradient)
    gradient = gradient / per_example(jnp.maximum(largest(jnp.abs(gradient)), TINY))
    if norm == "l2":
        size = jnp.sqrt(total(jnp.square(gradient)))
        return gradient / per_example(jnp.maximum(size, 1e-12))
    count = jnp.float32(share) * np.float32(np.prod(gradient.shape[1:]))
    kept = jnp.abs(gradient) >= per_example(_kth_largest(jnp.abs(gradient), count))
    signs = jnp.where(kept, jnp.sign(gradient), 0)
    return signs / per_example(jnp.maximum(total(jnp.abs(signs)), 1))


def _kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """The largest number that at least max(k, 1) of each example's numbers reach, [B].

    Numbers of at least 0 are ordered as their bits are, so halving the range of bits is exact, and
    faster than sorting.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)
    wanted = jnp.broadcast_to(jnp.maximum(jnp.floor(k), 1), (len(values),))

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # enough reach low, too few high
        middle = low + (high - low) // 2
        enough = total((bits >= per_example(middle)).astype(jnp.float32)) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(len(values), jnp.int32)
    high = jnp.full(len(values), 0x7F800000, jnp.int32)  # infinity
    low, _ = lax.fori_loop(0, 31, halve, (low, high))
    return lax.bitcast_convert_type(low, jnp.float32)
