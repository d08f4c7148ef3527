"""Batch normalisation with a hand-written gradient (Ioffe & Szegedy 2015, section 3)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = 1e-5
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the batch's own statistics.

    Statistics are computed in float32 whatever the dtype of `x`, the variance as the mean of
    squared deviations from the mean: on CPU as fast as E[x^2] - E[x]^2, which loses all digits
    where the mean is large against the deviation. The backward pass reads its two sums in one
    pass. Under `jit` over a sharded batch the statistics are those of the global batch.

    Args:
        x: [..., C].
        scale: [C] float32.
        bias: [C] float32.
        epsilon: added to the variance.

    Returns:
        y [..., C] in the dtype of `x`; mean and (biased) variance [C], float32.
    """
    return _batch_norm(x, scale, bias, epsilon)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-5,
) -> jax.Array:
    """`(x - mean) / sqrt(var + epsilon) * scale + bias`, computed in float32.

    Args:
        x: [..., C].
        mean: [C] float32.
        var: [C] float32.
        scale: [C] float32.
        bias: [C] float32.
        epsilon: added to the variance.

    Returns:
        [..., C] in the dtype of `x`.
    """
    factor = lax.rsqrt(var + epsilon) * scale
    centred = x.astype(jnp.float32) - _over(mean, x)
    return (centred * _over(factor, x) + _over(bias, x)).astype(x.dtype)


def _over(per_channel: jax.Array, x: jax.Array) -> jax.Array:
    return per_channel.reshape((1,) * (x.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    rough = jnp.mean(wide, axes)
    # The second pass also finds by how much rounding moved the mean (Chan, Golub & LeVeque 1983,
    # "Algorithms for computing the sample variance", equation 1.7).
    deviation = wide - _over(rough, x)
    correction = jnp.mean(deviation, axes)
    mean = rough + correction
    var = jnp.mean(jnp.square(deviation), axes) - jnp.square(correction)
    return normalize(x, mean, var, scale, bias, epsilon=epsilon), mean, var


def _forward(x, scale, bias, epsilon):  # type: ignore[no-untyped-def]
    y, mean, var = _batch_norm(x, scale, bias, epsilon)
    return (y, mean, var), (x, scale, mean, var)


def _backward(epsilon, residuals, cotangents):  # type: ignore[no-untyped-def]
    x, scale, mean, var = residuals
    g, g_mean, g_var = cotangents
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    g = g.astype(jnp.float32)
    centred = x.astype(jnp.float32) - _over(mean, x)
    inverse = lax.rsqrt(var + epsilon)
    sum_g = jnp.sum(g, axes)
    sum_g_centred = jnp.sum(g * centred, axes)
    # dx = scale * inverse * (g - mean(g) - centred * inverse^2 * mean(g * centred)), plus what
    # reaches x through the returned statistics: d mean / dx = 1 / n, d var / dx = 2 centred / n.
    slope = (2.0 * g_var - scale * inverse**3 * sum_g_centred) / count
    offset = (g_mean - scale * inverse * sum_g) / count
    dx = g * _over(scale * inverse, x) + centred * _over(slope, x) + _over(offset, x)
    return dx.astype(x.dtype), sum_g_centred * inverse, sum_g


_batch_norm.defvjp(_forward, _backward)
