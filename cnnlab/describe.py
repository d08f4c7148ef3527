"""What a model is made of and what it sees: layers, sizes, costs and receptive fields.

Nothing is computed and nothing is asked of XLA: the module is traced abstractly, each layer counts
its own cost by the formulas of `cnnlab.geometry`, and receptive fields are followed from the image
through every primitive of the trace. So they hold for any graph, however its branches meet. Only
`effective_fields` runs the network.

A field is what an output depends on for some weights and images. Squeeze-and-excitation gates and
normalisation over positions (group normalisation) make that the whole image. Where a primitive is
met whose field is not known, all that follows is unknown and the description says why.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from cnnlab import backend, geometry, registry
from cnnlab.geometry import ReceptiveField
from cnnlab.ops.conv_algorithms import Face
from cnnlab.types import CnnlabError

if TYPE_CHECKING:
    from rich.table import Table

Shape = tuple[int, ...]
Fields = tuple[ReceptiveField | None, ReceptiveField | None]
"""Along height and along width; None where it is not known."""

EFFECTIVE = 1 - 0.9545
"""From this share of the peak on a pixel belongs to the effective field (Luo et al. 2016)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        path: names of the modules down to the layer, joined by `/`.
        kind: the layer's class.
        output_shape: for one image.
        kernel: `3x3`, with `/2` for a stride and `:2` for a dilation; empty where there is none.
        parameters: trained numbers that this layer itself holds.
        macs: multiply-accumulates for one image.
        activation_bytes: memory of the output for one image.
        receptive_field: of the output at inference (of the last call), along height and width.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...]
    kernel: str
    parameters: int
    macs: int
    activation_bytes: int
    receptive_field: Fields = (None, None)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One named feature map of `Outputs.features`.

    Attributes:
        name: such as `stage1`.
        output_shape: for one image.
        receptive_field: along height and width.
    """

    name: str
    output_shape: tuple[int, ...]
    receptive_field: Fields


@dataclasses.dataclass(frozen=True)
class Description:
    """A model's layers and totals.

    Attributes:
        input_shape: (H, W, C).
        rows: layers in the order of their first call.
        parameters: trained numbers that inference needs; auxiliary heads are not among them.
        macs: multiply-accumulates of inference for one image. Convolutions and dense layers
            count, as in published tables; biases, normalisation, activation, pooling do not.
        training_parameters: `parameters` and those of auxiliary heads.
        training_macs: likewise, forward pass only.
        activation_bytes: memory of all rows' outputs together, for one image. A backward pass
            that kept each would need so much; inference needs only some of them at a time.
        features: the named feature maps, in order.
        unknown: why some receptive fields are not known; empty if all are.
    """

    input_shape: tuple[int, int, int]
    rows: tuple[Row, ...]
    parameters: int
    macs: int
    training_parameters: int
    training_macs: int
    activation_bytes: int
    features: tuple[Feature, ...]
    unknown: str


def describe(
    module: nn.Module, input_shape: tuple[int, int, int], *, train: bool = False
) -> Description:
    """Counts a model's layers and follows their receptive fields.

    Args:
        module: with `__call__(images, *, train)`, such as `models.create` gives.
        input_shape: (H, W, C) of one image.
        train: whether the rows are those of training, auxiliary heads and dropout included; the
            totals of parameters and MACs are given for both whatever it is. Layers that only
            training has are given no receptive field.

    Returns:
        The description, for one image.

    Raises:
        CnnlabError: the shape is not (H, W, C), or a layer holds parameters but does not say
            what it costs.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise CnnlabError(
            f"expected an input shape (H, W, C), such as (32, 32, 3), got {input_shape}"
        )
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    key = jax.random.key(0)
    rngs = {"params": key, "dropout": key}
    training, _, variables = _record(lambda x: module.init(rngs, x, train=True), images)

    def infer(variables: Any, images: jax.Array) -> list[Any]:
        outputs = module.apply(variables, images, train=False)
        found = getattr(outputs, "features", {})
        names[:] = found  # a dict would come back sorted
        return [_tagged(x, _FEATURE + name) for name, x in found.items()]

    names: list[str] = []

    inference, jaxpr, features = _record(infer, variables, images)
    seen = [_follow(jaxpr, axis) for axis in (0, 1)]

    def fields(tag: str) -> Fields:
        high, wide = (of_axis.get(tag) for of_axis in seen)
        return (
            high if isinstance(high, ReceptiveField) else None,
            wide if isinstance(wide, ReceptiveField) else None,
        )

    rows = tuple(
        dataclasses.replace(row, receptive_field=fields(_LAYER + row.path))
        for row in (training if train else inference)
    )
    unknown = (
        f"{tag.split(' ', 2)[2]}: {field}"
        for of_axis in seen
        for tag, field in of_axis.items()
        if isinstance(field, _UnknownFieldError)
    )
    return Description(
        input_shape,
        rows,
        parameters=sum(row.parameters for row in inference),
        macs=sum(row.macs for row in inference),
        training_parameters=sum(row.parameters for row in training),
        training_macs=sum(row.macs for row in training),
        activation_bytes=sum(row.activation_bytes for row in rows),
        features=tuple(
            Feature(name, tuple(feature.shape[1:]), fields(_FEATURE + name))
            for name, feature in zip(names, features, strict=True)
        ),
        unknown=next(unknown, ""),
    )


def usual_input(name: str, **fields: Any) -> tuple[tuple[int, int, int], int]:
    """The input shape and number of classes that a registered model is usually described at.

    Args:
        name: of the model.
        **fields: as for `models.create`.

    Returns:
        ImageNet's, (224, 224, 3) and 1,000, for networks with its stem or with published weights
        (the family has a `published_name` that knows them); for others CIFAR's, (32, 32, 3) and
        10. A family's `IMAGES` (variant -> shape) says what other shape one is meant for.

    Raises:
        CnnlabError: an unknown model.
    """
    plugin = registry.get("models", name)
    fields = plugin.parameters | fields
    published = getattr(plugin.module, "published_name", lambda module, **fields: None)
    large = fields.get("stem") == "imagenet" or published(("logits",), **fields)
    shape, classes = ((224, 224, 3), 1000) if large else ((32, 32, 3), 10)
    return getattr(plugin.module, "IMAGES", {}).get(name, shape), classes


_LAYER, _FEATURE = "cnnlab layer ", "cnnlab feature "


def _tagged(x: jax.Array, tag: str) -> jax.Array:
    """`x`, found by its tag in the trace wherever it lies, in rematerialised parts too."""
    tagged: jax.Array = checkpoint_name(x, tag)
    return tagged


def _record(function: Callable[..., Any], *arguments: Any) -> tuple[tuple[Row, ...], Any, Any]:
    """Traces: a row for each layer that is called, the jaxpr, and the result's shapes."""
    rows: dict[str, Row] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__":
            own = layer.variables.get("params", {}).values()
            count = sum(math.prod(leaf.shape) for leaf in own if not isinstance(leaf, dict))
            if hasattr(layer, "macs"):
                row = _row(layer, args[0].shape, outputs, count)
                if row.path in rows:  # a shared layer: its parameters count once, its work twice
                    before = rows[row.path]
                    row = dataclasses.replace(
                        row,
                        macs=row.macs + before.macs,
                        activation_bytes=row.activation_bytes + before.activation_bytes,
                    )
                rows[row.path] = row
                outputs = _tagged(outputs, _LAYER + row.path)
            elif count:
                raise CnnlabError(
                    f"layer {'/'.join(layer.path)} ({type(layer).__name__}) holds parameters but "
                    "has no macs(input_shape, output_shape); give it one, or build it of the "
                    "modules in cnnlab.layers"
                )
        return outputs

    with nn.intercept_methods(watch):
        jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return tuple(rows.values()), jaxpr, result


def _row(layer: Any, inputs: Shape, outputs: jax.Array, count: int) -> Row:
    return Row(
        path="/".join(layer.path),
        kind=type(layer).__name__,
        output_shape=tuple(outputs.shape[1:]),
        kernel=_kernel(layer),
        parameters=count,
        macs=layer.macs(inputs, outputs.shape),
        activation_bytes=geometry.activation_bytes(outputs.shape[1:], outputs.dtype.itemsize),
    )


def _kernel(layer: Any) -> str:
    if getattr(layer, "kind", "") == "global":
        return "global"
    size = getattr(layer, "kernel_size", None) or getattr(layer, "window", None)
    if size is None:
        return ""
    text = "x".join(map(str, _pair(size)))
    for mark, value in (
        ("/", getattr(layer, "strides", 1) or size),
        (":", getattr(layer, "dilation", 1)),
    ):
        if _pair(value) != (1, 1):
            high, wide = _pair(value)
            text += f"{mark}{high}" if high == wide else f"{mark}{high}x{wide}"
    return text


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def effective_fields(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    features: Sequence[str],
    *,
    draws: int = 4,
    batch: int = 4,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """How strongly the central unit of each feature map depends on each pixel.

    The gradient of the unit with respect to the image, its size averaged over random weights,
    random images (standard normal) and random directions in the unit's channels. After Luo, Li,
    Urtasun & Zemel 2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural
    Networks", section 3.

    Args:
        module: with `__call__(images, *, train)` and features among its `Outputs`.
        input_shape: (H, W, C).
        features: names of feature maps [B, h, w, c]; the central unit is (h // 2, w // 2).
        draws: initialisations.
        batch: images for each initialisation and feature.
        seed: of everything random.

    Returns:
        Feature -> [H, W] float32, at most 1.

    Raises:
        CnnlabError: a feature that the network has not, or that is no map.
    """
    key = jax.random.key(seed)
    # One group of images for each feature, so that one backward pass serves them all.
    shape = (len(features) * batch, *input_shape)

    def outputs(variables: Any, images: jax.Array) -> list[jax.Array]:
        found = module.apply(variables, images, train=False).features  # type: ignore[union-attr]
        for name in features:
            if name not in found:
                raise CnnlabError(
                    f"the network has no feature {name!r}{registry.did_you_mean(name, found)}. "
                    f"It has: {', '.join(found) or 'none'}"
                )
            if found[name].ndim != 4:
                raise CnnlabError(f"feature {name!r} is no map: its shape is {found[name].shape}")
        return [found[name] for name in features]

    def gradient(variables: Any, key: jax.Array) -> jax.Array:
        of_images, of_units = jax.random.split(key)
        images = jax.random.normal(of_images, shape)
        maps, pull_back = jax.vjp(lambda x: outputs(variables, x), images)
        cotangents = []
        for i, x in enumerate(maps):
            direction = jax.random.normal(
                jax.random.fold_in(of_units, i), (batch, x.shape[-1]), x.dtype
            )
            group = slice(i * batch, (i + 1) * batch)
            units = (group, x.shape[1] // 2, x.shape[2] // 2)
            cotangents.append(jnp.zeros_like(x).at[units].set(direction))
        (gradients,) = pull_back(cotangents)
        size = jnp.abs(gradients).reshape(len(features), batch, *input_shape)
        return jnp.mean(size, axis=(1, 4))

    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = backend.jit(gradient)
    total = np.zeros((len(features), *input_shape[:2]), np.float32)
    for draw in range(draws):
        weights, other = jax.random.split(jax.random.fold_in(key, draw))
        variables = module.lazy_init({"params": weights}, example, train=False)
        made = np.asarray(compiled(variables, other))
        # Each initialisation counts the same, however large its gradients are.
        total += made / np.maximum(made.max(axis=(1, 2), keepdims=True), np.finfo("float32").tiny)
    peak = np.maximum(total.max(axis=(1, 2), keepdims=True), np.finfo("float32").tiny)
    return dict(zip(features, total / peak, strict=True))


def effective_size(strength: np.ndarray) -> float:
    """Side in pixels of a square as large as the effective field.

    A pixel belongs to it from 4.55 % of the peak on, where a Gaussian is two standard deviations
    from its centre, as Luo et al. 2016 count (section 3); they compare with the central pixel,
    which the peak stands for here, as neighbouring pixels of strided networks differ much.

    Args:
        strength: [H, W], at most 1, see `effective_fields`.
    """
    return math.sqrt(np.count_nonzero(strength >= EFFECTIVE))


def render(description: Description) -> Table:
    """The description as a table for the terminal, totals at the foot."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"input {_size(description.input_shape)}, per image",
        caption=f"? {description.unknown}" if description.unknown else None,
        show_footer=True,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    extra = description.training_parameters - description.parameters
    foot = f"total (+ {extra:,} parameters in auxiliary heads)" if extra else "total"
    table.add_column("layer", foot, overflow="fold", min_width=16)
    table.add_column("kind", no_wrap=True)
    for name, total in (
        ("output", ""),
        ("field", ""),
        ("stride", ""),
        ("parameters", f"{description.parameters:,}"),
        ("MACs", f"{description.macs:,}"),
        ("memory", memory(description.activation_bytes)),
    ):
        table.add_column(name, total, justify="right", no_wrap=True)
    for row in description.rows:
        table.add_row(
            row.path,
            f"{row.kind} {row.kernel}",
            _size(row.output_shape),
            *field_words(row.receptive_field),
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.macs:,}" if row.macs else "",
            memory(row.activation_bytes),
        )
    return table


def field_words(fields: Fields) -> tuple[str, str]:
    """Size and stride as words: `212` and `32`, `212x96`, `global`, or `?` if not known."""
    high, wide = fields
    if high is None or wide is None:
        return "?", "?"
    size = "global" if high.stride == wide.stride == 0 else _one_or_two(high.size, wide.size)
    return size, "" if size == "global" else _one_or_two(high.stride, wide.stride)


def memory(count: int) -> str:
    """Bytes in the largest binary unit that they fill: `3.06 MiB`."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def _one_or_two(high: int, wide: int) -> str:
    return str(high) if high == wide else f"{high}x{wide}"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# Receptive fields of a traced function.


class _UnknownFieldError(Exception):
    """Why a receptive field is not known."""


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the entries of an array see of the image along one of its axes.

    Entry (i_0, i_1, ...) sees the pixels from start + sum_d strides[d] i_d on, `size` of them. A
    stride None says that entries along that axis of the array see different parts of these pixels,
    not in equal steps, and together all of them.
    """

    start: int
    size: int
    strides: tuple[int | None, ...]

    def spread(self, axes: Iterable[int], shape: Shape) -> _Seen:
        """What all entries along these axes of the array see together; their strides become 0."""
        size, strides = self.size, list(self.strides)
        for axis in axes:
            size += (shape[axis] - 1) * (strides[axis] or 0)
            strides[axis] = 0
        return _Seen(self.start, size, tuple(strides))

    def without(self, axes: Iterable[int]) -> _Seen:
        """With these axes of the array left out."""
        gone = set(axes)
        strides = tuple(s for axis, s in enumerate(self.strides) if axis not in gone)
        return _Seen(self.start, self.size, strides)

    def moved(self, axis: int, first: int, step: int = 1) -> _Seen:
        """Every `step`-th entry from `first` (which may lie before the array) on along an axis."""
        stride = self.strides[axis]
        if (first, step) == (0, 1):
            return self
        if stride is None:
            raise _UnknownFieldError(
                "some of the entries are taken of a map that sees irregular regions"
            )
        strides = (*self.strides[:axis], stride * step, *self.strides[axis + 1 :])
        return _Seen(self.start + first * stride, self.size, strides)

    def window(self, axis: int, kernel: int, stride: int, dilation: int, low: int) -> _Seen:
        """A convolution or pooling along one axis of the array."""
        moved = self.moved(axis, -low, stride)
        if kernel == 1:
            return moved
        if (distance := self.strides[axis]) is None:
            raise _UnknownFieldError("a window moves over a map that sees irregular regions")
        extent = geometry.effective_kernel(kernel, dilation)
        return dataclasses.replace(moved, size=self.size + (extent - 1) * distance)


_TRAINED = "trained"
"""What does not depend on the image but on parameters; what depends on neither is None."""

_Value = _Seen | _UnknownFieldError | str | None


def _union(a: _Seen, b: _Seen, shape: Shape) -> _Seen:
    """What entries of two arrays of this shape see together."""
    differ = [d for d, (s, t) in enumerate(zip(a.strides, b.strides, strict=True)) if s != t]
    if differ:
        for one, other in ((a, b), (b, a)):
            whole = other.spread(differ, shape)
            covers = one.start <= whole.start and whole.start + whole.size <= one.start + one.size
            if covers and not any(one.strides[d] != 0 for d in differ):
                return one  # such as a gate that depends on all that it multiplies
        a, b = a.spread(differ, shape), b.spread(differ, shape)
    start = min(a.start, b.start)
    end = max(a.start + a.size, b.start + b.size)
    strides = tuple(None if d in differ else s for d, s in enumerate(a.strides))
    return _Seen(start, end - start, strides)


def _reshape(seen: _Seen, before: Shape, after: Shape) -> _Seen:
    """Axes are split and merged in groups of equal numbers of entries."""
    strides: list[int | None] = []
    size, i, j = seen.size, 0, 0
    while i < len(before) or j < len(after):
        inner, outer = [i], [j]
        i, j = i + 1, j + 1
        while (a := math.prod(before[k] for k in inner if k < len(before))) != (
            b := math.prod(after[k] for k in outer if k < len(after))
        ):
            if a < b:
                inner.append(i)
                i += 1
            else:
                outer.append(j)
                j += 1
        inner = [k for k in inner if k < len(before)]
        outer = [k for k in outer if k < len(after)]
        if len(inner) == len(outer) == 1:
            strides.append(seen.strides[inner[0]])
            continue
        long = [k for k in inner if before[k] > 1]
        step = seen.strides[long[-1]] if long else 0
        flat, count = True, 1
        for k in reversed(long):
            flat &= step is not None and seen.strides[k] == step * count
            count *= before[k]
        if not flat or step is None:
            size += sum((before[k] - 1) * (seen.strides[k] or 0) for k in long)
            strides += [None if after[k] > 1 else 0 for k in outer]
            continue
        counts = itertools.accumulate(
            (after[k] for k in reversed(outer[1:])), operator.mul, initial=1
        )
        strides += [step * n for n in counts][: len(outer)][::-1]
    return _Seen(seen.start, size, tuple(strides))


_ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg",
    "nextafter", "not", "or", "pow", "real", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
    "sub", "tan", "tanh", "xor",
))  # fmt: skip
_REDUCTIONS = frozenset(
    f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or", "xor")
) | {"argmax", "argmin"}
_WINDOWS = frozenset(f"reduce_window{name}" for name in ("", "_sum", "_max", "_min"))
_CALLS = frozenset((
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call",
))  # fmt: skip


def _follow(closed: Any, axis: int) -> dict[str, ReceptiveField | _UnknownFieldError]:
    """Fields of the tagged arrays along height (0) or width (1) of the image, the last input."""
    jaxpr = closed.jaxpr
    tags: dict[str, tuple[_Value, Shape]] = {}
    rank = len(jaxpr.invars[-1].aval.shape)
    image = _Seen(0, 1, tuple(int(d == 1 + axis) for d in range(rank)))
    _evaluate(jaxpr, [*(_TRAINED for _ in jaxpr.invars[:-1]), image], tags)
    return {
        tag: _field(value, shape, axis)
        for tag, (value, shape) in tags.items()
        if tag.startswith((_LAYER, _FEATURE))
    }


def _field(value: _Value, shape: Shape, axis: int) -> ReceptiveField | _UnknownFieldError:
    """The field of an array [B, H, W, C] or [B, C]; different channels' fields are united."""
    if isinstance(value, _UnknownFieldError):
        return value
    if not isinstance(value, _Seen):
        return _UnknownFieldError("an output does not depend on the image")
    seen = value.spread([len(shape) - 1], shape)
    stride = seen.strides[1 + axis] if len(shape) == 4 else 0
    others = [s for d, s in enumerate(seen.strides) if len(shape) != 4 or d != 1 + axis]
    if stride is None or any(s != 0 for s in others):
        return _UnknownFieldError("units of the map see regions of different sizes")
    return ReceptiveField(int(seen.size), int(stride), int(seen.start))


def _evaluate(
    jaxpr: Any, inputs: Sequence[_Value], tags: dict[str, tuple[_Value, Shape]]
) -> list[_Value]:
    """What the outputs of a jaxpr see, if its inputs see `inputs`; notes tagged arrays."""
    values: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> _Value:
        return None if hasattr(variable, "val") else values.get(variable)  # literals, constants

    for equation in jaxpr.eqns:
        made = _apply(equation, [read(v) for v in equation.invars], tags)
        values.update(zip(equation.outvars, made, strict=True))
        if equation.primitive.name == "name":
            tags[equation.params["name"]] = made[0], equation.outvars[0].aval.shape
    return [read(v) for v in jaxpr.outvars]


def _apply(
    equation: Any, inputs: list[_Value], tags: dict[str, tuple[_Value, Shape]]
) -> list[_Value]:
    count = len(equation.outvars)
    for value in inputs:
        if isinstance(value, _UnknownFieldError):
            return [value] * count
    params = equation.params
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):  # functions that are called as they are
        if equation.primitive.name in _CALLS and key in params:
            return _evaluate(getattr(params[key], "jaxpr", params[key]), inputs, tags)
    if not any(isinstance(value, _Seen) for value in inputs):
        return [_TRAINED if _TRAINED in inputs else None] * count
    try:
        if equation.primitive.name == "cond" and not isinstance(inputs[0], _Seen):
            branches = [_evaluate(b.jaxpr, inputs[1:], tags) for b in params["branches"]]
            return [
                _elementwise(list(results), [v.aval.shape] * len(results), v.aval.shape)
                for v, results in zip(equation.outvars, zip(*branches, strict=True), strict=True)
            ]
        return _primitive(equation, inputs)
    except _UnknownFieldError as reason:
        return [reason] * count


def _elementwise(inputs: list[_Value], shapes: list[Shape], shape: Shape) -> _Value:
    for value in inputs:
        if isinstance(value, _UnknownFieldError):
            return value
    seen = [
        value if len(of) == len(shape) else _Seen(value.start, value.size, (0,) * len(shape))
        for value, of in zip(inputs, shapes, strict=True)
        if isinstance(value, _Seen)
    ]
    if not seen:
        return _TRAINED if _TRAINED in inputs else None
    return functools.reduce(lambda a, b: _union(a, b, shape), seen)


def _primitive(equation: Any, inputs: list[_Value]) -> list[_Value]:
    """One primitive of lax, of which some input depends on the image.

    Raises:
        _UnknownFieldError: a primitive that is not known, or of which nothing regular comes.
    """
    name, params = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.invars]
    shape = equation.outvars[0].aval.shape
    if name == "optimization_barrier":
        return list(inputs)
    if name in _ELEMENTWISE:
        return [_elementwise(inputs, shapes, shape)]
    if name == "dot_general":
        return [_contract(inputs, shapes, shape, params["dimension_numbers"][0:2])]
    if name == "concatenate":
        return [_concatenate(inputs, shapes, shape, params["dimension"])]
    x, before = inputs[0], shapes[0]
    if not isinstance(x, _Seen) or any(isinstance(value, _Seen) for value in inputs[1:]):
        raise _UnknownFieldError(f"the image meets itself in {name!r}")
    match name:
        case "cnnlab_conv" if params["face"] is Face.RESULT and not params["stacked"]:
            spec = params["spec"]
            x = _channels(x, len(before) - 1, before, spec.groups)
            for d, window in enumerate(
                zip(spec.kernel, spec.strides, spec.dilation, spec.padding, strict=True), 1
            ):
                kernel, stride, dilation, (low, _) = window
                x = x.window(d, kernel, stride, dilation, low)
            return [x]
        case "conv_general_dilated" if params["batch_group_count"] == 1:
            numbers = params["dimension_numbers"]
            batch, channel, *spatial = numbers.lhs_spec
            if any(d != 1 for d in params["lhs_dilation"]):
                raise _UnknownFieldError(
                    "a strided transposed convolution has no field of equal steps"
                )
            x = _channels(x, channel, before, params["feature_group_count"])
            for d, of_kernel, stride, dilation, (low, _) in zip(
                spatial,
                numbers.rhs_spec[2:],
                params["window_strides"],
                params["rhs_dilation"],
                params["padding"],
                strict=True,
            ):
                x = x.window(d, shapes[1][of_kernel], stride, dilation, low)
            strides: list[int | None] = [0] * len(shape)
            for there, here in zip(numbers.out_spec, (batch, channel, *spatial), strict=True):
                strides[there] = x.strides[here]
            return [dataclasses.replace(x, strides=tuple(strides))]
        case _ if name in _WINDOWS and all(d == 1 for d in params["base_dilation"]):
            for d, (kernel, stride, dilation, (low, _)) in enumerate(
                zip(
                    params["window_dimensions"],
                    params["window_strides"],
                    params["window_dilation"],
                    params["padding"],
                    strict=True,
                )
            ):
                x = x.window(d, kernel, stride, dilation, low)
            return [x]
        case _ if name in _REDUCTIONS:
            return [x.spread(params["axes"], before).without(params["axes"])]
        case "reshape" if params.get("dimensions") is None:
            return [_reshape(x, before, shape)]
        case "squeeze":
            return [x.without(params["dimensions"])]
        case "transpose":
            return [
                dataclasses.replace(x, strides=tuple(x.strides[d] for d in params["permutation"]))
            ]
        case "broadcast_in_dim":
            spread: list[int | None] = [0] * len(shape)
            for d, there in enumerate(params["broadcast_dimensions"]):
                spread[there] = x.strides[d] if before[d] == shape[there] else 0
            return [dataclasses.replace(x, strides=tuple(spread))]
        case "slice":
            steps = params["strides"] or (1,) * len(before)
            for d, (first, end, step) in enumerate(
                zip(params["start_indices"], params["limit_indices"], steps, strict=True)
            ):
                if x.strides[d] is None and end - first != before[d]:
                    raise _UnknownFieldError("a part is cut from a map that sees irregular regions")
                x = x.moved(d, first, step)
            return [x]
        case "split":
            sizes, d = params["sizes"], params["axis"]
            if x.strides[d] is None and len(sizes) > 1:
                raise _UnknownFieldError("a map that sees irregular regions is split")
            firsts = itertools.accumulate(sizes[:-1], initial=0)
            return [x.moved(d, first) for first in firsts]
        case "pad":
            for d, (low, _, between) in enumerate(params["padding_config"]):
                if between and before[d] > 1 and x.strides[d] != 0:
                    raise _UnknownFieldError("gaps between pixels have no field of equal steps")
                x = x if x.strides[d] is None else x.moved(d, -low)
            return [x]
    raise _UnknownFieldError(f"the receptive field of the primitive {name!r} is not known")


def _channels(x: _Seen, axis: int, shape: Shape, groups: int) -> _Seen:
    """After a sum over the channels, or over each group of them."""
    if groups == 1:
        return x.spread([axis], shape)
    if x.strides[axis]:
        raise _UnknownFieldError("groups of channels see regions in equal steps")
    return x  # branches that were concatenated stay as different as they are


def _contract(
    inputs: list[_Value],
    shapes: list[Shape],
    shape: Shape,
    numbers: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> _Value:
    """A matrix product; what is summed over is seen together."""
    contracted, batched = numbers
    results: list[_Value] = []
    free = [
        [d for d in range(len(of)) if d not in contracted[i] and d not in batched[i]]
        for i, of in enumerate(shapes)
    ]
    for i, (x, other) in enumerate(zip(inputs, inputs[::-1], strict=True)):
        if not isinstance(x, _Seen):
            continue
        if other is None and any(x.strides[d] != 0 for d in contracted[i]):
            # The constant may be 0 nearly everywhere, as in resizing.
            raise _UnknownFieldError("positions are mixed by a constant matrix, as resizing does")
        whole = x.spread(contracted[i], shapes[i])
        kept = tuple(whole.strides[d] for d in batched[i])
        own = tuple(whole.strides[d] for d in free[i])
        blank = (0,) * len(free[1 - i])
        strides = (*kept, *own, *blank) if i == 0 else (*kept, *blank, *own)
        results.append(dataclasses.replace(whole, strides=strides))
    return _elementwise(results, [shape] * len(results), shape)


def _concatenate(inputs: list[_Value], shapes: list[Shape], shape: Shape, axis: int) -> _Value:
    """Pieces of one map put together again, or branches side by side."""
    pieces, offset = [], 0
    for value, of in zip(inputs, shapes, strict=True):
        if isinstance(value, _Seen):
            step = value.strides[axis]
            pieces.append(value if step is None else value.moved(axis, -offset))
        offset += of[axis]
    if all(piece == pieces[0] for piece in pieces) and pieces[0].strides[axis] is not None:
        return pieces[0]
    seen = [
        value.spread([axis], of)
        for value, of in zip(inputs, shapes, strict=True)
        if isinstance(value, _Seen)
    ]
    whole = functools.reduce(lambda a, b: _union(a, b, shape), seen)
    strides = (*whole.strides[:axis], None, *whole.strides[axis + 1 :])
    return dataclasses.replace(whole, strides=strides)
