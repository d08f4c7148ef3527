"""Convolution (cross-correlation) in one to three dimensions, channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.ops import conv_primitive
from cnnlab.ops.conv_algorithms import Face, Spec
from cnnlab.types import CnnlabError

Padding = str | Sequence[tuple[int, int]]
"""`"SAME"`, `"VALID"`, or explicit (low, high) zeros for each spatial axis."""


def conv(
    images: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] | None = None,
    padding: Padding,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> jax.Array:
    """Cross-correlates images with a kernel, as every framework's "convolution" does.

    Reverse and forward mode, derivatives of any order, `vmap`, loops, `remat`, export and sharded
    batches all work, and stay fast on CPU inside loops and under `vmap` over kernels. How it is
    computed follows from shapes and platform, never from timing: one program gives the same bits.

    Args:
        images: [B, *spatial, C] with one, two or three spatial axes (`[B, H, W, C]` for images).
        kernel: [*window, C / groups, K], with as many spatial axes.
        strides: step along each spatial axis, at least 1; ones if None.
        padding: `"SAME"`, `"VALID"` or (low, high) zeros for each spatial axis; negative numbers
            crop.
        dilation: distance of neighbouring kernel taps along each spatial axis, at least 1; ones if
            None.
        groups: number of channel groups; divides C and K.

    Returns:
        [B, *spatial', K] with sizes from `cnnlab.geometry.conv_output_size`; the dtype is the
        common one of both operands.

    Raises:
        CnnlabError: the shapes or settings do not fit each other.
    """
    rank = _check(images, kernel, "images", groups)
    spec = _spec(images.shape[1:-1], kernel.shape[:-2], strides, padding, dilation, groups, rank)
    if images.shape[-1] != kernel.shape[-2] * groups:
        raise CnnlabError(
            f"conv: expected kernels of {images.shape[-1]} / {groups} input channels (images "
            f"{images.shape}, groups {groups}), got a kernel {kernel.shape}"
        )
    return conv_primitive.bind(Face.RESULT, *_same_dtype(images, kernel), spec)


def middle_mean(
    images: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] | None = None,
    padding: Padding,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    share: int = 16,
) -> jax.Array:
    """Each channel's mean over a middle part of what `conv` gives, from the images.

    A convolution is linear, so it is what the batch's mean image gives: little is read, and less
    is multiplied. The part is a block around the middle, short along the first axes and long along
    the last.

    Args:
        images: [B, *spatial, C].
        kernel: [*window, C / groups, K].
        strides: as in `conv`.
        padding: as in `conv`.
        dilation: as in `conv`.
        groups: as in `conv`.
        share: the block has at least one in so many positions of the result.

    Returns:
        [K], in the common dtype of both operands.

    Raises:
        CnnlabError: as `conv`.
    """
    rank = _check(images, kernel, "images", groups)
    spec = _spec(images.shape[1:-1], kernel.shape[:-2], strides, padding, dilation, groups, rank)
    starts, stops, pads = [], [], []
    missing = -(-math.prod(spec.result) // share)  # positions still to be had from further axes
    sizes = zip(spec.images, spec.extents, spec.result, spec.strides, spec.padding, strict=True)
    for i, (image, extent, result, stride, (low, _)) in enumerate(sizes):
        rest = math.prod(spec.result[i + 1 :])
        count = min(-(-missing // max(rest, 1)), result)
        missing = -(-missing // max(count, 1))
        start = (result - count) // 2 * stride - low
        stop = start + (count - 1) * stride + extent
        starts.append(min(max(start, 0), image))
        stops.append(max(min(stop, image), starts[-1]))
        pads.append((starts[-1] - start, stop - stops[-1]))
    images = lax.optimization_barrier(images)  # read them as they are, don't make a part anew
    part = lax.slice(images, (0, *starts, 0), (images.shape[0], *stops, images.shape[-1]))
    made = conv(
        jnp.sum(part, 0, keepdims=True),
        kernel,
        strides=spec.strides,
        padding=pads,
        dilation=spec.dilation,
        groups=groups,
    )
    return jnp.sum(made, tuple(range(rank + 1))) / (images.shape[0] * math.prod(made.shape[:-1]))


def conv_transpose(
    images: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] | None = None,
    padding: Padding,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    size: Sequence[int] | None = None,
) -> jax.Array:
    """The transpose of `conv`: what its gradient does to a result (a "deconvolution").

    Zeiler et al. 2010, "Deconvolutional networks"; Long et al. 2015, section 3.3. The kernel is
    that of the convolution which it transposes, so `conv_transpose(y, w)` is the gradient of
    `sum(conv(x, w) * y)` by x.

    Args:
        images: [B, *spatial, K].
        kernel: [*window, C / groups, K].
        strides: factors of upsampling, at least 1; ones if None.
        padding: `"SAME"` (each size times its stride), `"VALID"`, or what `conv` would pad, which
            is cut off here.
        dilation: as in `conv`.
        groups: as in `conv`.
        size: spatial size of the output where more than one fits, which is so for strides over 1
            (PyTorch's `output_padding`); the smallest if None.

    Returns:
        [B, *size, C].

    Raises:
        CnnlabError: the shapes or settings do not fit each other.
    """
    rank = _check(images, kernel, "images", groups)
    if images.shape[-1] != kernel.shape[-1]:
        raise CnnlabError(
            f"conv_transpose: expected a kernel [*window, C / groups, K] with K = "
            f"{images.shape[-1]} as the images {images.shape} have, got {kernel.shape}"
        )
    steps = _per_axis(strides, "strides", rank)
    gaps = _per_axis(dilation, "dilation", rank)
    extents = [d * (k - 1) + 1 for k, d in zip(kernel.shape[:-2], gaps, strict=True)]
    given = images.shape[1:-1]
    if isinstance(padding, str):
        if padding.upper() == "SAME":
            made = [n * s for n, s in zip(given, steps, strict=True)]
        elif padding.upper() == "VALID":
            made = [(n - 1) * s + e for n, s, e in zip(given, steps, extents, strict=True)]
        else:
            raise _padding_error(padding, rank)
    else:
        pads = _pads(padding, (), (), (), rank)
        made = [
            (n - 1) * s + e - low - high
            for n, s, e, (low, high) in zip(given, steps, extents, pads, strict=True)
        ]
    wanted = tuple(made) if size is None else tuple(size)
    spec = _spec(wanted, kernel.shape[:-2], steps, padding, gaps, groups, rank)
    if spec.result != tuple(given) or min(wanted) < 1:
        raise CnnlabError(
            f"conv_transpose: expected a size of which conv makes {tuple(given)} (the smallest is "
            f"{tuple(made)}), got {wanted}, of which it makes {spec.result}"
        )
    return conv_primitive.bind(Face.IMAGES, *_same_dtype(images, kernel), spec)


def _check(images: jax.Array, kernel: jax.Array, name: str, groups: int) -> int:
    rank = images.ndim - 2
    if rank not in (1, 2, 3) or kernel.ndim != images.ndim:
        raise CnnlabError(
            f"conv: expected {name} [B, *spatial, C] with one to three spatial axes and a kernel "
            f"[*window, C / groups, K] with as many, got {images.shape} and {kernel.shape}"
        )
    if groups < 1 or kernel.shape[-1] % groups:
        raise CnnlabError(
            f"conv: groups: expected a positive divisor of {kernel.shape[-1]} output channels, got "
            f"{groups}"
        )
    return rank


def _same_dtype(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.result_type(a, b)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise CnnlabError(
            f"conv: expected floating-point operands, got {a.dtype} and {b.dtype}; convert with "
            "astype(jnp.float32)"
        )
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def _per_axis(given: Sequence[int] | None, name: str, rank: int) -> tuple[int, ...]:
    values = (1,) * rank if given is None else tuple(given)
    if len(values) != rank or min(values) < 1:
        raise CnnlabError(f"conv: {name}: expected {rank} numbers of at least 1, got {values}")
    return values


def _padding_error(padding: object, rank: int) -> CnnlabError:
    return CnnlabError(
        f'conv: padding: expected "SAME", "VALID" or {rank} pairs (low, high), got {padding!r}'
    )


def _pads(
    padding: Padding,
    sizes: Sequence[int],
    extents: Sequence[int],
    strides: Sequence[int],
    rank: int,
) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise _padding_error(padding, rank)
        made = lax.padtype_to_pads(sizes, extents, strides, padding.upper())
        return tuple((int(low), int(high)) for low, high in made)
    pads = tuple(tuple(pair) for pair in padding)
    if len(pads) != rank or any(len(pair) != 2 for pair in pads):
        raise _padding_error(padding, rank)
    return tuple((int(low), int(high)) for low, high in pads)


def _spec(
    images: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
    dilation: Sequence[int] | None,
    groups: int,
    rank: int,
) -> Spec:
    steps = _per_axis(strides, "strides", rank)
    gaps = _per_axis(dilation, "dilation", rank)
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, gaps, strict=True)]
    return Spec(
        images=tuple(images),
        kernel=tuple(kernel),
        strides=steps,
        padding=_pads(padding, images, extents, steps, rank),
        dilation=gaps,
        groups=groups,
    )
