"""Batch, group, layer and RMS normalisation, written so that every derivative is the fast one.

All are y = (x - mean) * inverse * scale + bias with inverse = 1 / sqrt(var + epsilon). Two ways of
writing it decide over speed and digits, and neither needs a custom derivative rule, so that forward
mode, second order, `vmap`, `scan` and export work as for any sum.

*Moments of shifted values.* With d = x - shift, for any constant shift, mean = shift + E[d] and
var = E[d^2] - E[d]^2 (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance",
on shifted data). Both sums read d in one pass where the compiler fuses them. The shift is the mean
of a sixteenth of the values, which bounds what the subtraction can lose: a share f of the values
whose mean lies s off the whole mean forces var >= f * s^2, so that E[d^2] <= 17 * var for whatever
data (E[x^2] - E[x]^2 is unbounded: it loses all digits where the mean is large).

*A shift that is known before x.* On CPU d is an array of its own, which costs a pass over memory
unless what makes x writes d instead. A convolution does if the shift is there first, as its bias:
its mean over a part of the result follows from the images (`ops.conv.middle_mean`). That takes a
tenth off a ResNet's training step.

*Products of d.* y = d * factor + (bias - E[d] * factor). The derivatives of d * factor and d * d
contain no full-size value but d, and the transpose needs just sum(g) and sum(g * d), which is the
efficient backward pass of Ioffe & Szegedy 2015, section 3, dx = factor * (g - mean(g) - xhat *
mean(g * xhat)). Written with x - mean, automatic differentiation sends one more full-size sum
through the mean; written as `jnp.square(d)`, it keeps 2 * d for the backward pass beside d.

Statistics are float32 for narrower inputs, otherwise in the dtype of the input. They cover the
whole array under `jit`, however its batch is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.types import CnnlabError

_SHARE = 16
"""The shift is the mean of at least one in so many values."""


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-5,
    sub_batches: int = 1,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by the batch's own statistics (Ioffe & Szegedy 2015, section 3).

    With `sub_batches` n > 1, each of n equal, contiguous parts of the batch is normalised by its
    own statistics, as training on n devices without synchronised statistics does (Goyal et al.
    2017, section 2.3; "ghost" batches in Hoffer et al. 2017, algorithm 1). The result does not
    depend on how many devices there are. The returned statistics are then the means over the parts
    of their means and of their variances, the average of what n devices would report: the variance
    leaves out how the parts' means differ.

    Args:
        x: [B, ..., C].
        scale: [C].
        bias: [C].
        epsilon: added to the variance.
        sub_batches: parts of the batch with statistics of their own; must divide B.
        shift: [C], the mean of about one in sixteen values of each channel, known before `x` is,
            as `ops.conv.middle_mean` is: it saves time on CPU.

    Returns:
        y [B, ..., C] in the dtype of `x`; mean and (biased) variance [C].

    Raises:
        CnnlabError: `sub_batches` does not divide the batch.
    """
    channels = x.shape[-1]
    if sub_batches < 1 or x.shape[0] % sub_batches:
        raise CnnlabError(
            f"sub_batches must be a divisor of the batch size, got sub_batches {sub_batches} for "
            f"a batch of {x.shape[0]}"
        )
    parts = x.reshape(sub_batches, -1, *x.shape[1:]) if sub_batches > 1 else x
    axes = tuple(range(parts.ndim - x.ndim, parts.ndim - 1))

    def average(values: jax.Array) -> jax.Array:
        return jnp.mean(values, axes, keepdims=True)

    def sampled(sample: jax.Array, *_: jax.Array) -> jax.Array:
        return average(_wide(sample))

    # Middle rows of every image, not all rows of some: so each device of a sharded batch holds its
    # share of them. Dense features have no rows and are small enough for a pass of their own.
    constant = lax.stop_gradient(parts)
    sample = _middle(constant, axes[1]) if len(axes) > 1 else constant
    if shift is None or sub_batches > 1:
        near = sampled(sample)
    else:
        known = lax.stop_gradient(_over(_wide(shift), parts))
        near = lax.platform_dependent(sample, known, cpu=lambda _, known: known, default=sampled)
    moments = _moments(parts, near, average)
    y = _affine(moments, _over(scale, parts), _over(bias, parts), epsilon)
    mean, var = moments.shift + moments.mean, moments.var
    if sub_batches > 1:
        mean, var = (jnp.mean(statistic, 0) for statistic in (mean, var))
    mean, var = (statistic.reshape(channels) for statistic in (mean, var))
    return y.reshape(x.shape).astype(x.dtype), mean, var


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Normalises by given statistics: `(x - mean) / sqrt(var + epsilon) * scale + bias`.

    Args:
        x: [..., C].
        mean: [C].
        var: [C].
        scale: [C].
        bias: [C].
        epsilon: added to the variance.

    Returns:
        [..., C] in the dtype of `x`, computed in float32 at least.
    """
    factor = lax.rsqrt(var + epsilon) * scale
    centred = _wide(x) - _over(mean, x)
    return (centred * _over(factor, x) + _over(bias, x)).astype(x.dtype)


def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, groups: int, epsilon: float = 1e-5
) -> jax.Array:
    """Normalises each example over its positions and a group of channels (Wu & He 2018, section 3).

    One group is the layer normalisation, as many groups as channels the instance normalisation of
    that paper.

    Args:
        x: [B, ..., C] with at least one axis of positions.
        scale: [C].
        bias: [C].
        groups: equal groups of neighbouring channels; must divide C.
        epsilon: added to the variance.

    Returns:
        [B, ..., C] in the dtype of `x`.

    Raises:
        CnnlabError: `groups` does not divide the channels, or `x` has no positions.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise CnnlabError(
            f"groups must be a divisor of the channels, got groups {groups} for {channels} channels"
        )
    if x.ndim < 3:
        raise CnnlabError(
            f"group_norm expects [B, ..., C] with positions between, got shape {x.shape}; for "
            "vectors use layer_norm"
        )
    axes = tuple(range(1, x.ndim - 1))

    def average(values: jax.Array) -> jax.Array:
        # Positions first, one channel a lane: groups of few channels would leave lanes idle.
        mean = jnp.mean(values, axes, keepdims=True)
        grouped = mean.reshape(*mean.shape[:-1], groups, -1)
        shared = jnp.mean(grouped, -1, keepdims=True)
        return jnp.broadcast_to(shared, grouped.shape).reshape(mean.shape)

    near = average(_wide(_middle(lax.stop_gradient(x), 1)))
    moments = _moments(x, near, average)
    return _affine(moments, _over(scale, x), _over(bias, x), epsilon).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = 1e-5
) -> jax.Array:
    """Normalises each position over its channels (Ba, Kiros & Hinton 2016, section 3).

    On feature maps this is the layer normalisation of ConvNeXt (Liu et al. 2022, section 2.6); that
    over all positions of an example is `group_norm` with one group.

    Args:
        x: [..., C].
        scale: [C].
        bias: [C].
        epsilon: added to the variance.

    Returns:
        [..., C] in the dtype of `x`.
    """
    near = _over_channels(_wide(_middle(lax.stop_gradient(x), -1)))
    moments = _moments(x, near, _over_channels)
    # Scale comes last here: it varies along the averaged axis, times the inverse it is full-size.
    inverse = lax.rsqrt(moments.var + epsilon)
    standard = moments.shifted * inverse - moments.mean * inverse
    return (standard * _over(scale, x) + _over(bias, x)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
    """Divides each position by the root mean square of its channels (Zhang & Sennrich 2019).

    Args:
        x: [..., C].
        scale: [C].
        epsilon: added to the mean square.

    Returns:
        [..., C] in the dtype of `x`.
    """
    wide = _wide(x)
    inverse = lax.rsqrt(_over_channels(wide * wide) + epsilon)
    return (wide * inverse * _over(scale, x)).astype(x.dtype)


class _Moments(NamedTuple):
    shifted: jax.Array
    shift: jax.Array
    mean: jax.Array
    """Of the shifted values."""
    var: jax.Array


def _moments(x: jax.Array, shift: jax.Array, average: Callable[[jax.Array], jax.Array]) -> _Moments:
    """Values minus the shift, which must be a constant to derivatives, and their moments."""
    shifted = _wide(x) + -shift  # oneDNN takes what is added as a bias, not what is subtracted
    mean = average(shifted)
    var = average(shifted * shifted) - mean * mean
    # Rounding takes the variance of equal values below 0, beyond epsilon where they are large. A
    # constant lifts it: `maximum` would cut the derivatives, whose second order is not 0 there.
    return _Moments(shifted, shift, mean, var + lax.stop_gradient(jnp.maximum(-var, 0)))


def _affine(moments: _Moments, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    factor = lax.rsqrt(moments.var + epsilon) * scale
    return moments.shifted * factor + (bias - moments.mean * factor)


def _over_channels(x: jax.Array) -> jax.Array:
    return jnp.mean(x, -1, keepdims=True)


def _middle(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    width = -(-size // _SHARE)
    start = (size - width) // 2
    return lax.slice_in_dim(x, start, start + width, axis=axis)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _over(per_channel: jax.Array, x: jax.Array) -> jax.Array:
    return per_channel.reshape((1,) * (x.ndim - 1) + (-1,))
