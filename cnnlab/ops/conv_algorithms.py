"""How a convolution is computed: the three faces of its trilinear form, per backend.

With images x, kernel w and result y, every convolution is the form

    T(x, w, y) = sum_{b,o,t,c,k} x[b, stride * o + dilation * t - low, c] w[t, c, k] y[b, o, k]

and computing a result, the gradient of the images or the gradient of the kernel means leaving one
of the three out. `native` leaves each to XLA as JAX would. `cpu` avoids what XLA's CPU backend is
bad at, by shape alone, so that one program always gives the same bits:

- Convolutions that are written in another order than NHWC, HWIO, NHWC lose their fast kernel inside
  loops. Both gradients are written as plain convolutions with explicit transposes.
- XLA's kernel gradient packs every tap's pixels anew, and of few channels that takes longer than
  to multiply them. There one side of a matrix product holds the taps along the rows, the other
  those along the columns: all pairs are all taps, and six arrays are written instead of nine.
- One input channel leaves vector lanes empty. Its result is a sum of shifted products (the fused
  loop reads the image once for all taps; XLA's own convolution where barriers do not hold), its
  kernel gradient, if there are more channels than taps, one matrix product with stacked shifted
  planes.
- Few output channels leave them empty, too: one matrix product for all taps, then a sum of shifted
  planes (the gradient of images with three channels, say).
- Depthwise convolutions run one channel at a time. All three faces become shifted products; the
  kernel gradient adds up several taps in one loop, in vectors, and with many taps a few examples at
  a time: the sums of all taps would take several times the images' memory.
- Kernels of size one, and kernels as large as the images, are matrix products.
- A convolution with groups is one convolution a group.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab import backend

Shape = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


BARRIERS_HOLD = jax.__version_info__ >= (0, 12)
"""Whether `optimization_barrier` keeps XLA from fusing on CPU; that of jax 0.10 drops it before."""

FUSED_TAPS = 16
"""Up to this many taps of a depthwise kernel, products that are padded to their places are summed
fastest; of more, and with one input channel, products with slices of padded images."""

FEW_CHANNELS = 8
"""Up to this many channels that come out of a dense convolution, if more than twice as many go in,
one matrix product for all taps and a sum of its parts is faster than XLA's own convolution, whose
matrix product is as narrow as what comes out."""

SHORT_ROW = 3
"""Up to this many times as long as the kernel, a whole row goes through that product at once: it
multiplies by zeros, too, but what is to be summed then lies in one piece."""

CROSSED_CHANNELS, CROSSED_IMAGES, CROSSED_RESULT = 8, 192, 384
"""The kernel gradient of a dense convolution at stride one is a product of crossed taps if images
and result have at least so many channels, and each side of the product at most so many columns.
Fewer don't fill it; of more, XLA's own convolution multiplies long enough to pay for packing."""

CROSSED_PARTS = 8
"""In how many products, side by side, the batch goes through it: one core works at each."""

STRIDED_COLUMNS = 128
"""At other strides it is a product for each row of taps, up to so many columns of the images; more
cost as much to write as they save."""

TOGETHER, UNROLLED, SHORT = 5, 48, 4
"""A depthwise kernel's gradient adds up so many taps in one loop, which reads images and result
once, and in all so many products an iteration: what LLVM unrolls. A batch of fewer than `SHORT`
leaves little to unroll; then it is rows or columns that are added up."""

CACHED = 1024 * 1024
"""Bytes of padded images that stay in a core's cache beside as many of a result: so many examples
of large arrays a depthwise kernel's gradient takes at a time. All at once, each tap's sums are a
ninth of the images, those of 7x7 taps five times the images."""

LARGE_BYTES, MANY_TAPS = 4 * CACHED, FUSED_TAPS
"""From so large images and more than so many taps on."""


class Face(enum.Enum):
    """Which of the three is computed from the other two."""

    RESULT = "result"  # from images and kernel
    IMAGES = "images"  # from result and kernel
    KERNEL = "kernel"  # from images and result


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the shapes of the operands do not say.

    Attributes:
        images: spatial size of the images.
        kernel: spatial size of the kernel.
        strides: per spatial axis.
        padding: (low, high) per spatial axis; negative numbers crop.
        dilation: of the kernel, per spatial axis.
        groups: of channels.
    """

    images: Shape
    kernel: Shape
    strides: Shape
    padding: Pads
    dilation: Shape
    groups: int

    @property
    def extents(self) -> Shape:
        """Size of the dilated kernel."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def result(self) -> Shape:
        """Spatial size of the result."""
        return tuple(
            max((size + low + high - extent) // stride + 1, 0)
            for size, (low, high), extent, stride in zip(
                self.images, self.padding, self.extents, self.strides, strict=True
            )
        )

    def taps(self) -> Iterator[Shape]:
        """Positions in the kernel, row-major."""
        return itertools.product(*map(range, self.kernel))


def layout(rank: int) -> tuple[str, str, str]:
    """The canonical dimension numbers for this many spatial axes."""
    spatial = "DHW"[-rank:]
    return (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")


def _lax(
    images: jax.Array,
    kernel: jax.Array,
    strides: Shape,
    padding: Pads,
    spread: Shape,
    dilation: Shape,
    groups: int = 1,
) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        lhs_dilation=spread,
        rhs_dilation=dilation,
        dimension_numbers=layout(len(strides)),
        feature_group_count=groups,
    )


def native(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    """XLA's own convolution and JAX's own transposes of it, which its GPU and TPU backends know."""
    ones = (1,) * len(spec.strides)

    def forward(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return _lax(images, kernel, spec.strides, spec.padding, ones, spec.dilation, spec.groups)

    if face is Face.RESULT:
        return forward(a, b)
    shape = jax.ShapeDtypeStruct(output_shape(face, a.shape, b.shape, spec), a.dtype)
    if face is Face.IMAGES:
        return jax.linear_transpose(lambda images: forward(images, b), shape)(a)[0]
    return jax.linear_transpose(lambda kernel: forward(a, kernel), shape)(b)[0]


def channels(face: Face, a: Shape, b: Shape) -> tuple[int, int]:
    """Channels of the images (of a group) and of the result, from the operands' shapes."""
    if face is Face.KERNEL:
        return a[-1], b[-1]
    return b[-2], b[-1]


def stacked(face: Face, a: jax.Array, b: jax.Array, spec: Spec, together: int) -> jax.Array:
    """One convolution for each index of the leading axis, `together` of them as a dense one.

    The members' channels lie side by side and their kernels on the diagonal of a block matrix.
    That multiplies by many zeros, which costs a GPU's matrix units less than what grouped
    convolutions of few channels cost otherwise.

    Args:
        face: what is computed; `spec.groups` must be 1.
        a: [V, ...], as for `native`.
        b: [V, ...].
        spec: the rest.
        together: how many members, at least 1; the last convolution may have fewer.
    """
    parts = [
        _side_by_side(face, a[i : i + together], b[i : i + together], spec)
        for i in range(0, len(a), together)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _side_by_side(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    members = len(a)

    def joined(x: jax.Array) -> jax.Array:  # [V, B, *spatial, C] -> [B, *spatial, V C]
        return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)

    def apart(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:-1], members, -1), -2, 0)

    if face is Face.KERNEL:
        dense = native(face, joined(a), joined(b), spec)
        blocks = dense.reshape(*spec.kernel, members, a.shape[-1], members, b.shape[-1])
        return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, 0)
    here = jnp.eye(members, dtype=bool).reshape(members, *(1,) * len(spec.kernel), 1, members, 1)
    blocks = jnp.where(here, b[..., None, :], 0)  # [V, *window, C, V, K]
    block = jnp.moveaxis(blocks, 0, len(spec.kernel)).reshape(
        *spec.kernel, members * b.shape[-2], members * b.shape[-1]
    )
    return apart(native(face, joined(a), block, spec))


def output_shape(face: Face, a: Shape, b: Shape, spec: Spec) -> Shape:
    """The shape of a face from its operands' shapes."""
    if face is Face.RESULT:
        return (a[0], *spec.result, b[-1])
    if face is Face.IMAGES:
        return (a[0], *spec.images, b[-2] * spec.groups)
    return (*spec.kernel, a[-1] // spec.groups, b[-1])


def cpu(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    """The fastest way known for XLA's CPU backend."""
    shape = output_shape(face, a.shape, b.shape, spec)
    if 0 in (*a.shape, *b.shape, *spec.result):
        return jnp.zeros(shape, a.dtype)
    # What made the operands (a normalisation's gradient, say) would be fused into each tap's
    # product and each transposition, computed anew for each and slowly.
    a, b = lax.optimization_barrier((a, b))
    channels = shape[-1] if face is Face.IMAGES else a.shape[-1]
    if channels == spec.groups:  # one input channel a group; a single channel is one group
        if spec.groups > 1:
            return _depthwise(face, a, b, spec)
        return _one_channel(face, a, b, spec)
    if spec.groups > 1:
        return _grouped(face, a, b, spec)
    if math.prod(spec.kernel) == 1:
        return _pointwise(face, a, b, spec)
    if spec.kernel == spec.images and not any(itertools.chain(*spec.padding)):
        return _whole(face, a, b).reshape(shape)
    return _dense(face, a, b, spec)


# --- plain convolutions -------------------------------------------------------------------------


def _dense(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    axes = tuple(range(len(spec.kernel)))
    ones = (1,) * len(axes)
    if face is not Face.KERNEL and _planes_pay(face, b.shape, spec):
        return _planes(face, a, b, spec)
    if face is Face.RESULT:
        return _lax(a, b, spec.strides, spec.padding, ones, spec.dilation)
    if face is Face.KERNEL and _crossing_pays(a.shape, b.shape, spec):
        return _crossed(a, b, spec)
    if face is Face.KERNEL and _rows_pay(a.shape, b.shape, spec):
        return _by_rows(a, b, spec)
    # Rows and columns that no window reaches count as padding, so both gradients are exact.
    if face is Face.IMAGES:
        kernel = jnp.swapaxes(jnp.flip(b, axes), -1, -2)
        return _lax(a, kernel, ones, _flipped(spec).padding, spec.strides, spec.dilation)
    sizes = zip(spec.images, spec.extents, spec.result, spec.strides, spec.padding, strict=True)
    pads = tuple(
        (low, extent - 1 + (result - 1) * stride + 1 - image - low)
        for image, extent, result, stride, (low, _) in sizes
    )
    inner = tuple(i + 1 for i in axes)
    images = a.transpose(a.ndim - 1, *inner, 0)
    result = b.transpose(*inner, 0, b.ndim - 1)
    gradient = _lax(images, _kept_from_onednn(result), spec.dilation, pads, ones, spec.strides)
    return gradient.transpose(*inner, 0, gradient.ndim - 1)


def _crossing_pays(images: Shape, result: Shape, spec: Spec) -> bool:
    given, made = images[-1], result[-1]
    return (
        set(spec.strides) == {1}
        and isinstance(images[0], int)  # a batch that `jax.export` left open can't be divided
        and min(given, made) >= CROSSED_CHANNELS
        and spec.kernel[-1] * given <= CROSSED_IMAGES
        and math.prod(spec.kernel[:-1]) * made <= CROSSED_RESULT
    )


def _crossed(images: jax.Array, result: jax.Array, spec: Spec) -> jax.Array:
    """The kernel gradient at stride one as a product over the pixels, taps crossed.

    The convolution is split into one along the last axis and one along the others. The images'
    side holds what the taps of the first see, [B, *images, X', columns C], the result's side what
    the taps of the second saw, [B, *images, X', rows K].
    """
    one, none = (1,) * (len(spec.kernel) - 1), ((0, 0),) * (len(spec.kernel) - 1)
    along = dataclasses.replace(
        spec, kernel=(*one, spec.kernel[-1]), padding=(*none, spec.padding[-1])
    )
    across = dataclasses.replace(
        spec,
        images=along.result,
        kernel=(*spec.kernel[:-1], 1),
        padding=(*spec.padding[:-1], (0, 0)),
    )
    width = max(
        math.prod(along.kernel) * images.shape[-1], math.prod(across.kernel) * result.shape[-1]
    )
    size = math.prod(images.shape[:-2]) * along.result[-1] * width * images.dtype.itemsize
    pieces = min(-(-size // backend.LARGEST_PIECE), len(images))
    step = -(-len(images) // pieces)
    gradient = _sum(
        _crossed_piece(images[i : i + step], result[i : i + step], along, across)
        for i in range(0, len(images), step)
    )
    gradient = gradient.astype(images.dtype)
    gradient = gradient.reshape(*along.kernel, images.shape[-1], -1, result.shape[-1])
    return jnp.moveaxis(gradient, -2, 0).reshape(*spec.kernel, images.shape[-1], result.shape[-1])


def _crossed_piece(images: jax.Array, result: jax.Array, along: Spec, across: Spec) -> jax.Array:
    """Of some examples: [columns C, rows K], in float32 at least."""
    sides = lax.optimization_barrier(
        (
            _beside([_shifted(images, tap, along) for tap in along.taps()]),
            _beside([_placed(result, tap, across) for tap in across.taps()]),
        )
    )
    return _over_pixels(*sides)


def _over_pixels(seen: jax.Array, result: jax.Array) -> jax.Array:
    """Sum over the batch and its pixels: [B, *pixels, C], [B, *pixels, K] to [C, K] in float32."""
    parts = math.gcd(len(seen), CROSSED_PARTS)
    seen, result = (side.reshape(parts, -1, side.shape[-1]) for side in (seen, result))
    products = lax.dot_general(
        seen,
        result,
        (((1,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.promote_types(seen.dtype, jnp.float32),
    )
    return products.sum(0)


def _rows_pay(images: Shape, result: Shape, spec: Spec) -> bool:
    return (
        max(spec.strides) > 1
        and isinstance(images[0], int)
        and min(images[-1], result[-1]) >= CROSSED_CHANNELS
        and spec.kernel[-1] * images[-1] <= STRIDED_COLUMNS
    )


def _by_rows(images: jax.Array, result: jax.Array, spec: Spec) -> jax.Array:
    """The kernel gradient as a product over the pixels for each row of taps."""
    padded = _padded(images, spec)
    taps = list(spec.taps())
    products = []
    for i in range(0, len(taps), spec.kernel[-1]):
        row = [_window(padded, tap, spec) for tap in taps[i : i + spec.kernel[-1]]]
        products.append(_over_pixels(lax.optimization_barrier(_beside(row)), result))
    gradient = jnp.stack(products).astype(images.dtype)
    return gradient.reshape(*spec.kernel, images.shape[-1], result.shape[-1])


def _beside(parts: Sequence[jax.Array]) -> jax.Array:
    """Concatenates channels, as a sum: XLA's loop for that fills vectors, unlike its own."""
    channels = parts[0].shape[-1]
    rest = ((0, 0, 0),) * (parts[0].ndim - 1)

    def alone(part: jax.Array, i: int) -> jax.Array:
        here = (i * channels, (len(parts) - 1 - i) * channels, 0)
        return lax.pad(part, jnp.zeros((), part.dtype), (*rest, here))

    return _sum(alone(part, i) for i, part in enumerate(parts))


def _planes_pay(face: Face, kernel: Shape, spec: Spec) -> bool:
    """Whether few enough numbers come out, of enough that go in, at a stride that overlaps."""
    sizes, channels = (spec.images, spec.result), kernel[-2:]
    if face is Face.IMAGES:
        sizes, channels = sizes[::-1], channels[::-1]
    elif set(spec.strides) != {1}:
        return False  # most of what is multiplied would be thrown away
    overlaps = any(size > stride for size, stride in zip(spec.kernel, spec.strides, strict=True))
    # A tap writes `made` numbers at each place given; a convolution packs `given` at each made.
    (given, made), (places_given, places_made) = channels, map(math.prod, sizes)
    cheaper = 2 * made * places_given < given * places_made
    return overlaps and made <= FEW_CHANNELS and cheaper


def _planes(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    """One matrix product for all taps, then the sum of what each tap gives, put in its place."""
    matrices = b if face is Face.RESULT else jnp.swapaxes(b, -1, -2)
    made = (*(spec.result if face is Face.RESULT else spec.images), matrices.shape[-1])
    if a.shape[-2] <= SHORT_ROW * spec.kernel[-1]:
        matrices = _row_matrices(face, matrices, spec)
        a = a.reshape(*a.shape[:-2], -1)
        spec = _without_last_axis(spec)
    taps = list(spec.taps())
    wide = jnp.moveaxis(matrices.reshape(len(taps), *matrices.shape[-2:]), 1, 0)
    planes = _product(a, wide.reshape(len(wide), -1))
    planes = planes.reshape(*a.shape[:-1], len(taps), -1)
    each = (lax.index_in_dim(planes, i, -2, keepdims=False) for i in range(len(taps)))
    put = _placed if face is Face.IMAGES else _shifted
    total = _sum(put(plane, tap, spec) for plane, tap in zip(each, taps, strict=True))
    return lax.optimization_barrier(total).reshape(-1, *made)


def _row_matrices(face: Face, matrices: jax.Array, spec: Spec) -> jax.Array:
    """What takes a whole row to what its taps make of it: [*outer taps, X given, X' made].

    Each kernel's row becomes a banded (Toeplitz) matrix: [..., t, given, made] of numbers.
    """
    seen = np.arange(spec.images[-1])
    first = np.arange(spec.result[-1]) * spec.strides[-1] - spec.padding[-1][0]
    wide: jax.Array | int = 0
    for tap in range(spec.kernel[-1]):
        here = seen[:, None] == first + tap * spec.dilation[-1]
        here = here if face is Face.RESULT else here.T
        one = lax.index_in_dim(matrices, tap, -3, keepdims=False)[..., None, :, None, :]
        wide = wide + jnp.where(here[:, None, :, None], one, 0)
    assert isinstance(wide, jax.Array)
    *outer, x, given, y, made = wide.shape
    return lax.optimization_barrier(wide).reshape(*outer, x * given, y * made)


def _without_last_axis(spec: Spec) -> Spec:
    return Spec(
        spec.images[:-1],
        spec.kernel[:-1],
        spec.strides[:-1],
        spec.padding[:-1],
        spec.dilation[:-1],
        spec.groups,
    )


def _kept_from_onednn(kernel: jax.Array) -> jax.Array:
    """The same kernel as an operation that XLA's oneDNN rewriter passes over.

    oneDNN doubles the speed of results and image gradients with few channels, but a kernel as large
    as an image is two to three times slower there than in XLA's own convolution. The rewriter
    leaves a convolution alone whose kernel is a reversal; the barrier keeps the two reversals from
    cancelling. Without oneDNN they cost nothing that shows: 0.94 to 1.01 of a training step's time.
    """
    if backend.choice() not in ("fast", "onednn"):
        return kernel
    return jnp.flip(lax.optimization_barrier(jnp.flip(kernel, 0)), 0)


def _pointwise(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    spatial = tuple(range(1, a.ndim - 1))
    if face is Face.RESULT:
        return _product(
            _window(_padded(a, spec), (0,) * len(spatial), spec), b.reshape(b.shape[-2:])
        )
    if face is Face.IMAGES:
        product = _product(a, b.reshape(b.shape[-2:]).T)
        return _placed(product, (0,) * len(spatial), spec)
    seen = _window(_padded(a, spec), (0,) * len(spatial), spec)
    gradient = lax.dot_general(seen, b, (((0, *spatial), (0, *spatial)), ((), ())))
    return gradient.reshape(*spec.kernel, *gradient.shape)


def _whole(face: Face, a: jax.Array, b: jax.Array) -> jax.Array:
    """A kernel as large as the images: one window, so one matrix product of all pixels."""
    a = a.reshape(a.shape[0], -1)
    if face is Face.RESULT:
        return a @ b.reshape(-1, b.shape[-1])
    if face is Face.IMAGES:
        return a @ b.reshape(-1, b.shape[-1]).T
    return a.T @ b.reshape(b.shape[0], -1)


def _product(images: jax.Array, matrix: jax.Array) -> jax.Array:
    flat = images.reshape(-1, images.shape[-1]) @ matrix
    return flat.reshape(*images.shape[:-1], matrix.shape[-1])


def _grouped(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    one = dataclasses.replace(spec, groups=1)
    # A group's kernels are a slice of the last axis in all three shapes.
    pairs = zip(jnp.split(a, spec.groups, -1), jnp.split(b, spec.groups, -1), strict=True)
    return jnp.concatenate([cpu(face, *pair, one) for pair in pairs], -1)


# --- shifted products ---------------------------------------------------------------------------


def _padded(images: jax.Array, spec: Spec) -> jax.Array:
    if not any(itertools.chain(*spec.padding)):
        return images
    rest = ((0, 0, 0),)
    config = (*rest, *((low, high, 0) for low, high in spec.padding), *rest)
    return lax.pad(images, jnp.zeros((), images.dtype), config)


def _padded_size(spec: Spec) -> Shape:
    return tuple(
        size + low + high for size, (low, high) in zip(spec.images, spec.padding, strict=True)
    )


def _window(padded: jax.Array, tap: Shape, spec: Spec) -> jax.Array:
    """What this tap of the kernel sees: [B, *result, C] of the padded images."""
    starts = tuple(t * d for t, d in zip(tap, spec.dilation, strict=True))
    stops = (
        start + (size - 1) * stride + 1
        for start, size, stride in zip(starts, spec.result, spec.strides, strict=True)
    )
    return lax.slice(
        padded,
        (0, *starts, 0),
        (padded.shape[0], *stops, padded.shape[-1]),
        (1, *spec.strides, 1),
    )


def _seen(images: jax.Array, tap: Shape, spec: Spec, axis: int, start: int, stop: int) -> jax.Array:
    """`_window` of `_padded`, between two positions along an axis.

    Sliced first and padded then, which a loop that it is fused into reads in vectors.
    """
    if axis == 0:
        images = images[start:stop]
    slices, config = [slice(None)], [(0, 0, 0)]
    sizes = zip(
        tap, spec.dilation, spec.images, spec.result, spec.strides, spec.padding, strict=True
    )
    for i, (t, dilation, image, count, stride, (low, _)) in enumerate(sizes, 1):
        first, rest = divmod(t * dilation - low, stride)
        slices.append(slice(rest, None, stride))
        begin, end = (start, stop) if i == axis else (0, count)
        config.append((-first - begin, first + end - len(range(rest, image, stride)), 0))
    sliced = images[(*slices, slice(None))]
    return lax.pad(sliced, jnp.zeros((), images.dtype), [*config, (0, 0, 0)])


def _shifted(images: jax.Array, tap: Shape, spec: Spec) -> jax.Array:
    """`_window` of `_padded` at stride one, in one operation."""
    return _seen(images, tap, spec, 1, 0, spec.result[0])


def _placed(result: jax.Array, tap: Shape, spec: Spec) -> jax.Array:
    """The transpose of `_window` after `_padded`: [B, *result, C] put where this tap saw it."""
    config = [(0, 0, 0)]
    sizes = zip(
        tap, spec.dilation, spec.images, spec.result, spec.strides, spec.padding, strict=True
    )
    for t, dilation, image, count, stride, (low, _) in sizes:
        before = t * dilation - low
        config.append((before, image - before - (count - 1) * stride - 1, stride - 1))
    config.append((0, 0, 0))
    return lax.pad(result, jnp.zeros((), result.dtype), config)


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, parts)


def _rows(kernel: jax.Array, rank: int) -> list[jax.Array]:
    """Each tap's [K] of a kernel with one input channel, ready to multiply [B, *spatial, K]."""
    flat = kernel.reshape(-1, *(1,) * (rank - 1), kernel.shape[-1])
    return [lax.index_in_dim(flat, i, keepdims=False) for i in range(len(flat))]


def _shifted_products(images: jax.Array, kernel: jax.Array, spec: Spec) -> jax.Array:
    pairs = zip(spec.taps(), _rows(kernel, images.ndim), strict=True)
    few = images.shape[-1] > 1 and math.prod(spec.kernel) <= FUSED_TAPS
    if few and set(spec.strides) == {1}:
        total = _sum(_shifted(images * row, tap, spec) for tap, row in pairs)
    else:
        padded = _padded(images, spec)
        products = [_window(padded, tap, spec) * row for tap, row in pairs]
        # A sum for each row of taps: one sum of all would wait for each addition before the next.
        line = spec.kernel[-1]
        total = _sum(_sum(products[i : i + line]) for i in range(0, len(products), line))
    # Without the barrier XLA fuses the sum into whatever reads it, and computes it anew for each.
    return lax.optimization_barrier(total)


def _flipped(spec: Spec) -> Spec:
    """The convolution of a result, by the flipped kernel, that gives the image gradient."""
    sizes = zip(spec.images, spec.extents, spec.result, spec.strides, spec.padding, strict=True)
    pads = []
    for image, extent, result, stride, (low, _) in sizes:
        below = extent - 1 - low
        pads.append((below, image + extent - 1 - ((result - 1) * stride + 1) - below))
    ones = (1,) * len(pads)
    return dataclasses.replace(spec, images=spec.result, strides=ones, padding=tuple(pads))


def _depthwise(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    # The K / C results of a channel lie next to each other: repeating channels aligns the images.
    if face is Face.IMAGES:
        if set(spec.strides) == {1}:
            wide = _shifted_products(a, jnp.flip(b, tuple(range(a.ndim - 2))), _flipped(spec))
        else:
            pairs = zip(spec.taps(), _rows(b, a.ndim), strict=True)
            # Each reader would add up the taps anew, from as many arrays as large as the images.
            wide = lax.optimization_barrier(_sum(_placed(a * row, tap, spec) for tap, row in pairs))
        multiplier = wide.shape[-1] // spec.groups
        return wide.reshape(*wide.shape[:-1], spec.groups, multiplier).sum(-1)
    multiplier = b.shape[-1] // spec.groups
    aligned = a if multiplier == 1 else jnp.repeat(a, multiplier, -1)
    if face is Face.RESULT:
        return _shifted_products(aligned, b, spec)
    known = isinstance(a.shape[0], int)  # `jax.export` may leave the batch open
    large = known and aligned.size * aligned.dtype.itemsize >= LARGE_BYTES
    if large and math.prod(spec.kernel) > MANY_TAPS:
        sums = _tap_sums_by_parts(aligned, b, spec)
    else:
        sums = _tap_sums(aligned, b, spec)
    return sums.astype(a.dtype).reshape(*spec.kernel, 1, b.shape[-1])


def _tap_sums_by_parts(images: jax.Array, result: jax.Array, spec: Spec) -> jax.Array:
    """`_tap_sums`, a few examples at a time: the sums of all taps take that much less memory."""
    size = math.prod(_padded_size(spec)) * images.shape[-1] * images.dtype.itemsize
    fitting = range(max(min(CACHED // max(size, 1), len(images)), 1), 0, -1)
    examples = next(n for n in fitting if len(images) % n == 0)
    inner = spec
    if not BARRIERS_HOLD:  # there a slice at a place known late would be cut out anew for each tap
        unpadded = ((0, 0),) * len(spec.kernel)
        inner = dataclasses.replace(spec, images=_padded_size(spec), padding=unpadded)

    def add(total: jax.Array, start: Any) -> tuple[jax.Array, None]:
        part, seen = (lax.dynamic_slice_in_dim(x, start, examples) for x in (images, result))
        part = part if BARRIERS_HOLD else _padded(part, spec)
        return total + _tap_sums(part, seen, inner), None

    accurate = jnp.promote_types(images.dtype, jnp.float32)
    zeros = jnp.zeros((math.prod(spec.kernel), result.shape[-1]), accurate)
    return lax.scan(add, zeros, np.arange(0, len(images), examples))[0]


def _tap_sums(images: jax.Array, result: jax.Array, spec: Spec) -> jax.Array:
    """The kernel gradient's rows: [taps, K], float32 at least."""
    taps = list(spec.taps())
    groups = -(-len(taps) // TOGETHER)
    bounds = [len(taps) * i // groups for i in range(groups + 1)]
    # One barrier for all, so that the sums run side by side.
    parts = lax.optimization_barrier(
        [
            part
            for start, stop in itertools.pairwise(bounds)
            for part in _sums_together(images, result, taps[start:stop], spec)
        ]
    )
    axes = tuple(range(images.ndim - 1))
    return jnp.stack([_sum(jnp.sum(part, axes) for part in each) for each in parts])


def _sums_together(
    images: jax.Array, result: jax.Array, taps: Sequence[Shape], spec: Spec
) -> list[list[jax.Array]]:
    """For each tap arrays [..., K], float32 at least, that sum up to its part of the gradient.

    XLA computes several results in one loop if they are one reduction of several arrays. The loop
    for what is reduced lies inside that over the channels; unrolled, it leaves a loop that LLVM can
    fill vectors with.
    """
    batch, *places, _ = result.shape
    long = isinstance(batch, int) and batch >= SHORT  # `jax.export` may leave it open
    axis = 0 if long else 1 + places.index(max(places))
    size = result.shape[axis]
    most = max(min(UNROLLED // len(taps), backend.MOST_UNROLLED, size), 1)
    count = next((n for n in range(most, most // 2, -1) if size % n == 0), most)
    whole = size // count * count
    pieces = [_reduced(images, result, taps, spec, axis, 0, whole, count)]
    if whole < size:
        pieces.append(_reduced(images, result, taps, spec, axis, whole, size, size - whole))
    return [list(parts) for parts in zip(*pieces, strict=True)]


def _reduced(
    images: jax.Array,
    result: jax.Array,
    taps: Sequence[Shape],
    spec: Spec,
    axis: int,
    start: int,
    stop: int,
    count: int,
) -> Sequence[jax.Array]:
    """The taps' products, between two positions along an axis, added up `count` at a time."""
    accurate = jnp.promote_types(images.dtype, jnp.float32)
    seen_by = lax.slice_in_dim(result, start, stop, axis=axis).astype(accurate)
    split = (*seen_by.shape[:axis], count, (stop - start) // count, *seen_by.shape[axis + 1 :])

    def product(tap: Shape) -> jax.Array:
        seen = _seen(images, tap, spec, axis, start, stop).astype(accurate)
        return (seen * seen_by).reshape(split)

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [one + other for one, other in zip(a, b, strict=True)]

    zeros = [np.zeros((), accurate)] * len(taps)
    sums: Sequence[jax.Array] = lax.reduce([product(tap) for tap in taps], zeros, add, (axis,))
    return sums


def _one_channel(face: Face, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    if face is Face.RESULT:
        return _shifted_products(a, b, spec) if BARRIERS_HOLD else _dense(face, a, b, spec)
    count = math.prod(spec.kernel)
    # Of few results the planes would take longer to write than the product saves.
    if face is Face.IMAGES or b.shape[-1] <= count:
        return _dense(face, a, b, spec)
    padded = _padded(a, spec)
    planes = jnp.stack([_window(padded, tap, spec) for tap in spec.taps()])
    gradient = planes.reshape(count, -1) @ b.reshape(-1, b.shape[-1])
    return gradient.reshape(*spec.kernel, 1, b.shape[-1])
