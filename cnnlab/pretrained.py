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

Counters (`num_batches_tracked`) are dropped; PyTorch's own strict loading fills them in. Nothing is
ever unpickled. `load` reads weights from a file or from the hub and fits another head or one input
channel to them; `export` writes a file that timm loads.

What weights expect of images stands beside the family that they belong to, in a constant that it
may define: `PUBLISHED`, from a variant's name to what differs from the fields of `Preprocessing`,
and under `"tag"` to the weights of timm that `repository` names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from cnnlab import backend, models, registry, weights
from cnnlab.types import CnnlabError

Shape = tuple[int, ...]
Tensors = Mapping[str, np.ndarray]
Variables = dict[str, dict[str, Any]]
Classifier = Callable[[Mapping[str, Any], jax.Array], jax.Array]
"""(variables, images [B, H, W, C] in [0, 1]) -> logits [B, K]."""

HEAD = "logits"
"""What every family calls the layer that makes the logits."""

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_SHOWN = 12
_IMAGE = (224, 224)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a network's published weights expect of images; the defaults are ImageNet's usual ones.

    Attributes:
        size: height and width in pixels.
        interpolation: of resizing, `"bicubic"` or `"bilinear"`, antialiased.
        mean: of pixels in [0, 1], per channel; subtracted.
        std: likewise; divides.
    """

    size: int = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Pixels [B, H, W, C] in [0, 1] to what the network takes.

        Other images than those of three channels take the mean over the channels of both.
        """
        mean, std = (np.asarray(moment, np.float32) for moment in (self.mean, self.std))
        if images.shape[-1] != 3:
            mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
        return (images - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)


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


def is_published(name: str, **fields: Any) -> bool:
    """Whether a registered model's family says where its weights are published.

    Args:
        name: a registered model.
        **fields: as for `models.create`.
    """
    plugin = registry.get("models", name)
    publish = getattr(plugin.module, "published_name", None)
    return bool(publish and publish((HEAD,), **{**plugin.parameters, **fields}))


def published_models() -> list[str]:
    """The names of all registered models that are published, sorted."""
    return [name for name in registry.plugins("models") if is_published(name)]


def _published(name: str) -> dict[str, Any]:
    module = registry.get("models", name).module
    return dict(getattr(module, "PUBLISHED", {}).get(name, {}))


def preprocessing(name: str) -> Preprocessing:
    """What a registered model's published weights expect of images."""
    return Preprocessing(**{k: v for k, v in _published(name).items() if k != "tag"})


def repository(name: str) -> str:
    """The repository of the hub that holds a registered model's weights, timm's default ones.

    Raises:
        CnnlabError: none is known.
    """
    if tag := _published(name).get("tag"):
        return f"timm/{name}.{tag}"
    raise CnnlabError(
        f"no repository of the hub is known for {name!r}; give its weights, a .safetensors file or "
        "a repository such as timm/resnet18.a1_in1k"
    )


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
    if not is_published(name, **fields):
        raise CnnlabError(
            f"no published weights are known for {name!r}"
            + (f" with {fields}" if fields else "")
            + ". `cnnlab list models --published` shows the networks that have them"
        )
    plugin = registry.get("models", name)
    fields = {**plugin.parameters, **fields}
    shapes = traverse_util.flatten_dict(_shapes(module, input_channels))
    return [
        Entry(
            path,
            leaf.shape,
            f"{plugin.module.published_name(path[1:-1], **fields)}"
            f".{_LEAVES.get(path[-1], path[-1])}",
        )
        for path, leaf in shapes.items()
    ]


def _shapes(module: nn.Module, input_channels: int) -> dict[str, Any]:
    """The shapes of a network's variables; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, *_IMAGE, input_channels), jnp.float32)
    return dict(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images))


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
        CnnlabError: a tensor is missing, left over, of another shape, or no floating-point one;
            the message lists each.
    """
    wanted = entries(name, num_outputs=num_outputs or 1000, input_channels=input_channels, **fields)
    if num_outputs is None:
        wanted = _with_outputs_of(tensors, wanted)
    _check(name, wanted, tensors)
    flat = {entry.path: entry.read(tensors[entry.name]) for entry in wanted}
    return traverse_util.unflatten_dict(flat)


def _is_head(path: tuple[str, ...]) -> bool:
    return path[-2] == HEAD


def _with_outputs_of(tensors: Tensors, wanted: list[Entry]) -> list[Entry]:
    """The entries, those of the head with as many logits as the tensors have."""
    kernels = [e.name for e in wanted if _is_head(e.path) and e.path[-1] == "kernel"]
    count = next((tensors[n].shape[0] for n in kernels if n in tensors and tensors[n].ndim), 1000)
    return [
        dataclasses.replace(entry, shape=(*entry.shape[:-1], count))
        if _is_head(entry.path)
        else entry
        for entry in wanted
    ]


def _check(name: str, wanted: list[Entry], tensors: Tensors) -> None:
    given = {n: tuple(t.shape) for n, t in tensors.items() if not n.endswith(_COUNTER)}
    faults = _differences({entry.name: entry.published_shape for entry in wanted}, given)
    numbers = [
        f"{entry.name} {tensors[entry.name].dtype}"
        for entry in wanted
        if entry.name in given and not jnp.issubdtype(tensors[entry.name].dtype, jnp.floating)
    ]
    if numbers:
        faults.append(f"{len(numbers)} not of floating point: {_listed(numbers)}")
    if faults:
        raise CnnlabError("\n  ".join([f"these are not the weights of {name!r}:", *faults]))


def _differences(expected: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
    """What is wrong with the shapes that are given, a line for each kind of fault."""
    faults = {
        "missing": [f"{name} {expected[name]}" for name in expected if name not in given],
        "left over": [f"{name} {given[name]}" for name in sorted(given) if name not in expected],
        "of another shape": [
            f"{name}: expected {shape}, got {given[name]}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    return [f"{len(found)} {kind}: {_listed(found)}" for kind, found in faults.items() if found]


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    rest = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest


def load(
    name: str,
    source: str | Path,
    *,
    num_outputs: int | None = None,
    input_channels: int = 3,
    key: jax.Array | None = None,
    **fields: Any,
) -> Variables:
    """A model's variables from published weights, fitted to other classes or one input channel.

    Convolutional networks take images of any size as they are.

    Args:
        name: a registered model, such as `"resnet50"`.
        source: a `.safetensors` file, a repository of the hub such as `"timm/resnet18.a1_in1k"`,
            or a PyTorch file; see `weights.read`.
        num_outputs: logits; None for as many as the weights have. Another number makes a new head
            by the model's own initialisers; all else is filled from the weights.
        input_channels: of the images. With weights for three channels 1 sums the first kernel
            over them: the network then gives for grey images what the published one gives for
            the same values in all three channels. Other numbers must be those of the weights.
        key: for a new head; needed for one.
        **fields: as for `models.create`.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32 NumPy arrays, for `apply`; no `batch_stats`
        where the model has none.

    Raises:
        CnnlabError: the source can't be read, is not this model's weights, or can't be fitted.
    """
    tensors: Tensors = weights.read(source)
    try:
        tensors = _fit_channels(name, tensors, input_channels, fields)
        variables = convert(name, tensors, input_channels=input_channels, **fields)
    except CnnlabError as error:
        raise CnnlabError(f"{source}: {error}") from error
    flat = traverse_util.flatten_dict(variables)
    classes = next(array.shape[-1] for path, array in flat.items() if _is_head(path))
    if num_outputs in (None, classes):
        return variables
    module = models.create(name, num_outputs=num_outputs, **fields)
    if key is None:
        raise CnnlabError(
            f"{source} has {classes} classes; for {num_outputs} a new head is drawn, which needs "
            "a key: load(..., key=jax.random.key(0))"
        )
    return traverse_util.unflatten_dict(flat | _new_heads(module, input_channels, key))


def _new_heads(
    module: nn.Module, input_channels: int, key: jax.Array
) -> dict[tuple[str, ...], np.ndarray]:
    """What the initialisers of a network's heads draw, by path, without drawing all the rest."""
    heads: dict[tuple[str, ...], tuple[nn.Module, tuple[int, ...]]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and layer.path[-1:] == (HEAD,):
            heads[layer.path] = layer.clone(parent=None, name=None), args[0].shape
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        _shapes(module, input_channels)
    drawn = {
        path: layer.lazy_init(jax.random.fold_in(key, i), jax.ShapeDtypeStruct(shape, jnp.float32))
        for i, (path, (layer, shape)) in enumerate(heads.items())
    }
    return {
        ("params", *path, leaf): np.asarray(array)
        for path, variables in drawn.items()
        for leaf, array in variables["params"].items()
    }


def _fit_channels(
    name: str, tensors: Tensors, input_channels: int, fields: dict[str, Any]
) -> Tensors:
    """Tensors whose first kernel takes so many channels."""
    if input_channels == 3:
        return tensors
    fitted = dict(tensors)
    for entry in _first_kernels(name, input_channels, fields):
        kernel = tensors.get(entry.name)
        if kernel is None or kernel.ndim < 2 or kernel.shape[1] == input_channels:
            continue  # `convert` says what is wrong with it, if anything is
        if (kernel.shape[1], input_channels) != (3, 1):
            raise CnnlabError(
                f"{entry.name} takes {kernel.shape[1]} input channels and can't be fitted to "
                f"{input_channels}: only 1 can be made of 3, by their sum"
            )
        fitted[entry.name] = kernel.astype(np.float32).sum(1, keepdims=True)
    return fitted


def _first_kernels(name: str, input_channels: int, fields: dict[str, Any]) -> list[Entry]:
    """The entries whose shape depends on the channels of the images, for so many of them."""
    other = entries(name, input_channels=input_channels + 1, **fields)
    return [
        entry
        for entry, more in zip(
            entries(name, input_channels=input_channels, **fields), other, strict=True
        )
        if entry.shape != more.shape
    ]


def published(name: str, variables: Mapping[str, Any], **fields: Any) -> dict[str, np.ndarray]:
    """Tensors with PyTorch's names and layouts from a model's variables; undoes `convert`.

    Args:
        name: a registered model.
        variables: `{"params": ..., "batch_stats": ...}`.
        **fields: as for `models.create`.

    Raises:
        CnnlabError: the variables are not those of this model, or timm has no such network.
    """
    flat = _flat(variables)
    found = entries(
        name,
        num_outputs=num_outputs(variables),
        input_channels=input_channels(name, variables, **fields),
        **fields,
    )
    faults = _differences(
        {"/".join(entry.path): entry.shape for entry in found},
        {"/".join(path): np.shape(array) for path, array in flat.items()},
    )
    if faults:
        raise CnnlabError("\n  ".join([f"these are not the variables of {name!r}:", *faults]))
    return {entry.name: entry.write(flat[entry.path]) for entry in found}


def num_outputs(variables: Mapping[str, Any]) -> int:
    """The number of logits that a model's variables are for; 1,000 if they have no head."""
    shapes = (np.shape(array) for path, array in _flat(variables).items() if _is_head(path))
    return next((shape[-1] for shape in shapes if shape), 1000)


def input_channels(name: str, variables: Mapping[str, Any], **fields: Any) -> int:
    """The number of the images' channels that a model's variables are for.

    Args:
        name: a registered model with published weights.
        variables: `{"params": ..., "batch_stats": ...}`.
        **fields: as for `models.create`.
    """
    flat = _flat(variables)
    shapes = (np.shape(flat.get(entry.path, ())) for entry in _first_kernels(name, 3, fields))
    return next((shape[-2] for shape in shapes if len(shape) >= 2), 3)


def _flat(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    kept = {key: variables[key] for key in ("params", "batch_stats") if variables.get(key)}
    return dict(traverse_util.flatten_dict(kept))


def export(path: str | Path, name: str, variables: Mapping[str, Any], **fields: Any) -> None:
    """Writes a model's variables as a safetensors file with timm's names; `load` undoes it.

    timm reads it (`timm.create_model(name, checkpoint_path=path)`), strictly.

    Args:
        path: of the file, `.safetensors`; it is written whole or not at all.
        name: a registered model.
        variables: `{"params": ..., "batch_stats": ...}`.
        **fields: as for `models.create`.

    Raises:
        CnnlabError: another ending, or as for `published`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CnnlabError(f"expected a file that ends in .safetensors, got {path}")
    weights.write_safetensors(path, published(name, variables, **fields))


def classifier(name: str, *, num_outputs: int = 1000, **fields: Any) -> Classifier:
    """The published function of a model, from pixels: preprocessing, network, logits.

    Args:
        name: a registered model.
        num_outputs: logits.
        **fields: as for `models.create`.

    Returns:
        `classify(variables, images)`: images [B, H, W, C] in [0, 1] to logits [B, num_outputs].
    """
    module = models.create(name, num_outputs=num_outputs, **fields)
    prepare = preprocessing(name)

    def classify(variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        outputs: Any = module.apply(variables, prepare.normalize(images), train=False)
        logits: jax.Array = outputs.logits
        return logits

    return classify


def predictor(
    name: str, variables: Mapping[str, Any], **fields: Any
) -> Callable[[np.ndarray], jax.Array]:
    """`classifier` with a model's variables, compiled: images in [0, 1] to logits."""
    outputs = num_outputs(variables)
    classify = backend.jit(classifier(name, num_outputs=outputs, **fields))
    return functools.partial(classify, jax.device_put(dict(variables)))
