"""Published weights: from PyTorch's names and layouts to a model's variables, and back.

Weights come as named arrays in the layout of PyTorch, as timm publishes them for its networks. A
family that has published weights says in `published_name(module, **fields)` what timm calls each
of its modules; all else follows by rule:

| here                         | there                           |
|------------------------------|---------------------------------|
| `kernel` [h, w, in, out]     | `weight` [out, in, h, w]        |
| `kernel` [in, out]           | `weight` [out, in]              |
| `scale`, `bias`, `gamma`     | `weight`, `bias`, `gamma`       |
| `batch_stats`: `mean`, `var` | `running_mean`, `running_var`   |

Counters (`num_batches_tracked`) are dropped. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cnnlab import models, registry
from cnnlab.types import CnnlabError

Tensors = Mapping[str, np.ndarray]
Variables = dict[str, dict[str, Any]]

HEAD = "logits"
"""What every family calls the layer that makes the logits."""

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_SHOWN = 12
_IMAGE = (224, 224)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a model and its published counterpart.

    Attributes:
        path: names down to the array, the collection (`params` or `batch_stats`) first.
        shape: of the array here.
        name: of the published tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    name: str

    @property
    def published_shape(self) -> tuple[int, ...]:
        """The shape that the published tensor must have."""
        if self.path[-1] != "kernel":
            return self.shape
        *window, inner, outer = self.shape
        return (outer, inner, *window)

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The array here from the published one, float32."""
        array = np.asarray(tensor).astype(np.float32)
        if self.path[-1] != "kernel":
            return array
        return np.ascontiguousarray(array.transpose(*range(2, array.ndim), 1, 0))

    def write(self, array: Any) -> np.ndarray:
        """The published tensor from the array here, float32."""
        array = np.asarray(array).astype(np.float32)
        if self.path[-1] != "kernel":
            return array
        return np.ascontiguousarray(array.transpose(-1, -2, *range(array.ndim - 2)))


def entries(
    name: str, *, num_outputs: int = 1000, input_channels: int = 3, **fields: Any
) -> list[Entry]:
    """A model's arrays, in the order of its variables, with their published names.

    Args:
        name: a registered model.
        num_outputs: logits.
        input_channels: of the images.
        **fields: as for `models.create`.

    Raises:
        CnnlabError: an unknown model or field, or a network that timm does not publish.
    """
    module = models.create(name, num_outputs=num_outputs, **fields)
    plugin = registry.get("models", name)
    publish = getattr(plugin.module, "published_name", None)
    images = jax.ShapeDtypeStruct((1, *_IMAGE, input_channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images)
    found = []
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        there = publish and publish(path[1:-1], **{**plugin.parameters, **fields})
        if not there:
            raise CnnlabError(
                f"no published weights are known for {name!r}"
                + (f" with {fields}" if fields else "")
                + ". `cnnlab list models --published` shows the networks that have them"
            )
        found.append(Entry(path, leaf.shape, f"{there}.{_LEAVES.get(path[-1], path[-1])}"))
    return found


def convert(
    name: str,
    tensors: Tensors,
    *,
    num_outputs: int | None = None,
    input_channels: int = 3,
    **fields: Any,
) -> Variables:
    """A model's variables from published tensors: all are used and all are filled, or it raises.

    Args:
        name: a registered model, such as `"resnet50"`.
        tensors: PyTorch's names and layouts, any floating dtype.
        num_outputs: logits; None for as many as the tensors have.
        input_channels: of the images.
        **fields: as for `models.create`.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32 NumPy arrays, for `apply`; no `batch_stats`
        where the model has none.

    Raises:
        CnnlabError: a tensor is missing, left over or of another shape; the message lists each.
    """
    if num_outputs is None:
        num_outputs = _outputs(name, tensors, input_channels, fields)
    wanted = entries(name, num_outputs=num_outputs, input_channels=input_channels, **fields)
    _check(name, wanted, tensors)
    flat = {entry.path: entry.read(tensors[entry.name]) for entry in wanted}
    return traverse_util.unflatten_dict(flat)


def _outputs(name: str, tensors: Tensors, input_channels: int, fields: dict[str, Any]) -> int:
    """How many classes the published head has; 1,000 if there is none, for `_check` to say."""
    for entry in entries(name, input_channels=input_channels, **fields):
        if entry.path[-2] == HEAD and entry.name in tensors:
            return int(tensors[entry.name].shape[0])
    return 1000


def _check(name: str, wanted: list[Entry], tensors: Tensors) -> None:
    names = {entry.name for entry in wanted}
    given = {n: tuple(t.shape) for n, t in tensors.items() if not n.endswith(_COUNTER)}
    faults = {
        "missing": [f"{e.name} {e.published_shape}" for e in wanted if e.name not in given],
        "left over": [f"{n} {shape}" for n, shape in given.items() if n not in names],
        "of another shape": [
            f"{e.name}: expected {e.published_shape}, got {given[e.name]}"
            for e in wanted
            if e.name in given and given[e.name] != e.published_shape
        ],
    }
    if any(faults.values()):
        lines = [
            f"{len(found)} {kind}: {_listed(found)}" for kind, found in faults.items() if found
        ]
        raise CnnlabError(f"these are not the weights of {name!r}:\n  " + "\n  ".join(lines))


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    rest = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest


def published(name: str, variables: Mapping[str, Any], **fields: Any) -> dict[str, np.ndarray]:
    """Tensors with PyTorch's names and layouts from a model's variables; undoes `convert`.

    Args:
        name: a registered model.
        variables: `{"params": ..., "batch_stats": ...}`.
        **fields: as for `models.create`.

    Raises:
        CnnlabError: the variables are not those of this model, or timm has no such network.
    """
    flat = traverse_util.flatten_dict(
        {key: variables[key] for key in ("params", "batch_stats") if variables.get(key)}
    )
    heads = [array.shape for path, array in flat.items() if path[-2:] == (HEAD, "bias")]
    found = entries(
        name,
        num_outputs=heads[0][0] if heads else 1000,
        input_channels=_input_channels(name, flat, fields),
        **fields,
    )
    expected = {entry.path: entry.shape for entry in found}
    given = {path: tuple(np.shape(array)) for path, array in flat.items()}
    if expected != given:
        differ = sorted(set(expected.items()) ^ set(given.items()))
        raise CnnlabError(
            f"these are not the variables of {name!r}: {len(differ)} differences, "
            + _listed("/".join(path) + f" {shape}" for path, shape in differ)
        )
    return {entry.name: entry.write(flat[entry.path]) for entry in found}


def _input_channels(name: str, flat: Mapping[tuple[str, ...], Any], fields: dict[str, Any]) -> int:
    """Of the images: what the first convolution of this model takes in these variables."""
    for three, one in zip(
        entries(name, **fields), entries(name, input_channels=1, **fields), strict=True
    ):
        if three.shape != one.shape and three.path in flat:
            return int(np.shape(flat[three.path])[-2])
    return 3
