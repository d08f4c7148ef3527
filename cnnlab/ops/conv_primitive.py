"""Convolution as one bilinear primitive whose transposes are itself.

`custom_vjp` would lose forward mode, and left to itself JAX writes gradients in an order that
XLA's CPU backend is slow at inside loops. A primitive with a linear transpose for each operand
keeps every derivative of any order, and chooses its algorithm for each platform when it is
lowered. This is the one file that leans on `jax.extend` and `jax.interpreters`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cnnlab.ops import conv_algorithms as algorithms
from cnnlab.ops.conv_algorithms import Face, Spec

MAX_UNROLLED = 8
"""A stack of up to this many convolutions is compiled one by one on CPU, a longer one as a loop."""

SIDE_BY_SIDE = 160
"""On a GPU, a stack of convolutions of few channels is done as dense ones of up to so many.

Ten of ResNet-20's in bfloat16 on an H100 make a training step of 7.3 ms, 64 channels 7.4, and
XLA's grouped convolutions 15.8; in float32 12.8 (at 64) and 16.9."""

_primitive = Primitive("cnnlab_conv")


def bind(face: Face, a: jax.Array, b: jax.Array, spec: Spec, *, stacked: bool = False) -> jax.Array:
    """One face of the trilinear form.

    Args:
        face: what is computed.
        a: images [B, *spatial, C], or for `Face.IMAGES` a result [B, *spatial, K].
        b: kernel [*spatial, C / groups, K], or for `Face.KERNEL` a result.
        spec: the rest.
        stacked: both operands have one more leading axis, one convolution for each index.
    """
    made: jax.Array = _primitive.bind(a, b, face=face, spec=spec, stacked=stacked)
    return made


def _abstract(a: Any, b: Any, *, face: Face, spec: Spec, stacked: bool) -> Any:
    lead = a.shape[:1] if stacked else ()
    inner = algorithms.output_shape(face, a.shape[len(lead) :], b.shape[len(lead) :], spec)
    return a.update(shape=(*lead, *inner), weak_type=False)


def _native(a: jax.Array, b: jax.Array, *, face: Face, spec: Spec, stacked: bool) -> jax.Array:
    one = functools.partial(algorithms.native, face, spec=spec)
    return jax.vmap(one)(a, b) if stacked else one(a, b)


def _cuda(a: jax.Array, b: jax.Array, *, face: Face, spec: Spec, stacked: bool) -> jax.Array:
    if stacked and spec.groups == 1:
        widest = max(algorithms.channels(face, a.shape, b.shape))
        together = min(SIDE_BY_SIDE // widest, len(a))
        if together > 1:
            parts = -(-len(a) // together)  # about equally large
            return algorithms.stacked(face, a, b, spec, together=-(-len(a) // parts))
    return _native(a, b, face=face, spec=spec, stacked=stacked)


def _cpu(a: jax.Array, b: jax.Array, *, face: Face, spec: Spec, stacked: bool) -> jax.Array:
    one = functools.partial(algorithms.cpu, face, spec=spec)
    if not stacked:
        return one(a, b)
    if len(a) <= MAX_UNROLLED:
        return jnp.stack([one(*pair) for pair in zip(a, b, strict=True)])
    return lax.map(lambda pair: one(*pair), (a, b))


@functools.cache
def _compiled(face: Face, spec: Spec, stacked: bool) -> Any:
    return jax.jit(functools.partial(bind, face, spec=spec, stacked=stacked))


def _transpose_a(g: Any, a: Any, b: Any, *, face: Face, spec: Spec, stacked: bool) -> jax.Array:
    del a
    match face:
        case Face.RESULT:  # g is a result, b a kernel
            return bind(Face.IMAGES, g, b, spec, stacked=stacked)
        case Face.IMAGES:  # g is images, b a kernel
            return bind(Face.RESULT, g, b, spec, stacked=stacked)
        case Face.KERNEL:  # g is a kernel, b a result
            return bind(Face.IMAGES, b, g, spec, stacked=stacked)


def _transpose_b(g: Any, a: Any, b: Any, *, face: Face, spec: Spec, stacked: bool) -> jax.Array:
    del b
    match face:
        case Face.RESULT:  # g is a result, a images
            return bind(Face.KERNEL, a, g, spec, stacked=stacked)
        case Face.IMAGES:  # g is images, a a result
            return bind(Face.KERNEL, g, a, spec, stacked=stacked)
        case Face.KERNEL:  # g is a kernel, a images
            return bind(Face.RESULT, a, g, spec, stacked=stacked)


def _fold(x: jax.Array, axis: int) -> jax.Array:
    """The leading axis merged into another: [V, ..., n, ...] to [..., V * n, ...]."""
    axis %= x.ndim
    moved = jnp.moveaxis(x, 0, axis - 1)
    shape = (*moved.shape[: axis - 1], -1, *moved.shape[axis + 1 :])
    return moved.reshape(shape)


def _unfold(x: jax.Array, axis: int, count: int) -> jax.Array:
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)


# Where only one operand is batched, the batch joins an axis of that operand which the result has
# too, and one larger convolution does it: (face, which operand) -> (its axis, the result's axis).
_JOINED = {
    (Face.RESULT, 0): (0, 0),
    (Face.RESULT, 1): (-1, -1),
    (Face.IMAGES, 0): (0, 0),
    (Face.IMAGES, 1): (-2, -1),
    (Face.KERNEL, 0): (-1, -2),
    (Face.KERNEL, 1): (-1, -1),
}


def _batch(
    operands: Any, dims: Any, *, face: Face, spec: Spec, stacked: bool
) -> tuple[jax.Array, int]:
    (size,) = {x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None}
    a, b = (x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True))
    if not stacked and None in dims:
        which = dims.index(None) ^ 1
        own, made = _JOINED[face, which]
        if spec.groups == 1 or own == 0:
            pair = [a, b]
            pair[which] = _fold(pair[which], own + 1 if own >= 0 else own)
            joined = bind(face, pair[0], pair[1], spec)
            return _unfold(joined, made, size), 0
    a, b = (
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
        for x, d in zip((a, b), dims, strict=True)
    )
    if not stacked:
        return bind(face, a, b, spec, stacked=True), 0
    both = bind(face, _fold(a, 1), _fold(b, 1), spec, stacked=True)
    return _unfold(both, 0, size), 0


_primitive.def_impl(lambda a, b, *, face, spec, stacked: _compiled(face, spec, stacked)(a, b))
_primitive.def_abstract_eval(_abstract)
ad.defbilinear(_primitive, _transpose_a, _transpose_b)
batching.primitive_batchers[_primitive] = _batch
mlir.register_lowering(_primitive, mlir.lower_fun(_native, multiple_results=False))
for _platform, _rule in (("cpu", _cpu), ("cuda", _cuda)):
    mlir.register_lowering(
        _primitive, mlir.lower_fun(_rule, multiple_results=False), platform=_platform
    )
