"""What a model is made of: layers, output sizes, parameters and multiply-accumulates.

Nothing is computed and nothing is asked of XLA: the module is traced abstractly, and each layer
counts its own cost by the formulas of `cnnlab.geometry`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab.types import CnnlabError

if TYPE_CHECKING:
    from rich.table import Table


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
    """

    path: str
    kind: str
    output_shape: tuple[int, ...]
    kernel: str
    parameters: int
    macs: int


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
    """

    input_shape: tuple[int, int, int]
    rows: tuple[Row, ...]
    parameters: int
    macs: int
    training_parameters: int
    training_macs: int


def describe(
    module: nn.Module, input_shape: tuple[int, int, int], *, train: bool = False
) -> Description:
    """Counts a model's layers.

    Args:
        module: with `__call__(images, *, train)`, such as `models.create` gives.
        input_shape: (H, W, C) of one image.
        train: whether the rows are those of training, auxiliary heads and dropout included; the
            totals are given for both whatever it is.

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
    training, variables = _record(lambda x: module.init(rngs, x, train=True), images)
    inference, _ = _record(lambda v, x: module.apply(v, x, train=False), variables, images)
    return Description(
        input_shape,
        training if train else inference,
        parameters=sum(row.parameters for row in inference),
        macs=sum(row.macs for row in inference),
        training_parameters=sum(row.parameters for row in training),
        training_macs=sum(row.macs for row in training),
    )


def _record(function: Callable[..., Any], *arguments: Any) -> tuple[tuple[Row, ...], Any]:
    """One row for each layer that is called while `function` is traced, and its result."""
    rows: dict[str, Row] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__":
            own = layer.variables.get("params", {}).values()
            count = sum(math.prod(leaf.shape) for leaf in own if not isinstance(leaf, dict))
            if hasattr(layer, "macs"):
                row = _row(layer, args[0].shape, outputs.shape, count)
                if row.path in rows:  # a shared layer: its parameters count once, its work twice
                    row = dataclasses.replace(row, macs=row.macs + rows[row.path].macs)
                rows[row.path] = row
            elif count:
                raise CnnlabError(
                    f"layer {'/'.join(layer.path)} ({type(layer).__name__}) holds parameters but "
                    "has no macs(input_shape, output_shape); give it one, or build it of the "
                    "modules in cnnlab.layers"
                )
        return outputs

    with nn.intercept_methods(watch):
        result = jax.eval_shape(function, *arguments)
    return tuple(rows.values()), result


def _row(layer: Any, inputs: tuple[int, ...], outputs: tuple[int, ...], count: int) -> Row:
    return Row(
        path="/".join(layer.path),
        kind=type(layer).__name__,
        output_shape=tuple(outputs[1:]),
        kernel=_kernel(layer),
        parameters=count,
        macs=layer.macs(inputs, outputs),
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


def render(description: Description) -> Table:
    """The description as a table for the terminal, totals at the foot."""
    from rich.table import Table

    table = Table(title=f"input {_size(description.input_shape)}, per image", show_footer=True)
    extra = description.training_parameters - description.parameters
    foot = f"total (+ {extra:,} parameters in auxiliary heads)" if extra else "total"
    table.add_column("layer", foot, overflow="fold")
    table.add_column("kind")
    table.add_column("output", justify="right")
    table.add_column("kernel")
    table.add_column("parameters", f"{description.parameters:,}", justify="right")
    table.add_column("MACs", f"{description.macs:,}", justify="right")
    for row in description.rows:
        table.add_row(
            row.path,
            row.kind,
            _size(row.output_shape),
            row.kernel,
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.macs:,}" if row.macs else "",
        )
    return table


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
