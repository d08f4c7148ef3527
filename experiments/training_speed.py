"""Whole networks: a training step, evaluation, PGD-10 and compilation, cnnlab against others.

    cnnlab table experiments/training_speed.py
    cnnlab table experiments/training_speed.py --rows "LeNet-5*"

About half an hour on two CPU cores; PyTorch comes with `pip install 'cnnlab[bench]'`. All
contenders build one list of layers with the same numbers in it, and must agree on the first step's
loss and gradients. A step is forward, backward and SGD with momentum, batch 128; evaluation is
forward by the running statistics; PGD-10 is ten steps in the Linf ball of radius 0.1 (Madry et al.
2018), a `fori_loop` in JAX; compilation is that of the training step, without a persistent cache.

Plain Flax and PyTorch (channels_last) run with their own defaults; PyTorch also with cnnlab's heap
settings. The networks: LeNet-5 (LeCun et al. 1998, with rectifiers and max pooling), a VGG of four
3x3 convolutions (Simonyan & Zisserman 2015), ResNet-20 (He et al. 2016) and twelve
depthwise-separable blocks (Howard et al. 2017).

MobileNetV2 (Sandler et al. 2018) and ConvNeXt-Atto (Liu et al. 2022), 64x64, batch 64, stand beside
timm's networks in PyTorch, with the same numbers in them by their published names.

Any other model of the zoo is measured by a file of one's own, against those contenders for which it
describes the layers, or names timm's network:

    from experiments import training_speed

    def get_experiment():
        return training_speed.get_experiment({
            "WRN-16-4": {"model": "wrn_16_4", "fields": {}, "input": [32, 32, 3], "layers": None},
            "ResNet-50": {
                "model": "resnet50", "timm": "resnet50", "fields": {}, "input": [224, 224, 3],
                "batch": 16, "layers": None,
            },
        })
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cnnlab import backend
from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]
Layer = list[Any]

BATCH, CLASSES = 128, 10
LEARNING_RATE, MOMENTUM = 0.01, 0.9
FILLS = {"scale": 1.0, "var": 1.0, "gamma": 0.1}  # all else starts at 0
EPS, STEP_SIZE, STEPS = 0.1, 0.025, 10

WORKLOADS = {"train": "training step", "evaluate": "evaluation", "pgd": "PGD-10",
             "compile": "compilation of the training step"}  # fmt: skip


# ------------------------------------------------------------------------------------- networks


def conv(features: int, size: int, stride: int = 1, padding: int | None = None,
         depthwise: bool = False, bias: bool = False) -> Layer:  # fmt: skip
    """A convolution that keeps the size at stride 1, unless `padding` is given."""
    return ["conv", features, size, stride, size // 2 if padding is None else padding, depthwise,
            bias]  # fmt: skip


NORM, RELU, POOL, AVERAGE, FLATTEN = (
    ["norm"], ["relu"], ["pool"], ["average"], ["flatten"],
)  # fmt: skip


def lenet5() -> list[Layer]:
    return [
        conv(6, 5, bias=True), RELU, POOL, conv(16, 5, padding=0, bias=True), RELU, POOL, FLATTEN,
        ["dense", 120], RELU, ["dense", 84], RELU, ["dense", CLASSES],
    ]  # fmt: skip


def vgg() -> list[Layer]:
    layers = []
    for width, pool in ((64, True), (128, True), (256, False), (256, False)):
        layers += [conv(width, 3, bias=True), RELU, *([POOL] if pool else [])]
    return [*layers, AVERAGE, ["dense", CLASSES]]


def resnet20() -> list[Layer]:
    layers = [conv(16, 3), NORM, RELU]
    for stage, block in itertools.product(range(3), range(3)):
        width, stride = 16 * 2**stage, 2 if stage and not block else 1
        inner = [conv(width, 3, stride), NORM, RELU, conv(width, 3), NORM]
        layers += [["residual", inner, width, stride], RELU]
    return [*layers, AVERAGE, ["dense", CLASSES]]


def separable_stack() -> list[Layer]:
    layers = [conv(32, 3), NORM, RELU]
    width = 32
    for stage, (features, blocks) in enumerate(((64, 2), (128, 4), (256, 6))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers += [conv(width, 3, stride, depthwise=True), NORM, RELU]
            layers += [conv(features, 1), NORM, RELU]
            width = features
    return [*layers, AVERAGE, ["dense", CLASSES]]


NETWORKS: dict[str, Case] = {
    "LeNet-5": {
        "model": "lenet5_modern", "fields": {}, "input": [28, 28, 1], "layers": lenet5(),
    },
    "VGG 64-128-256-256": {
        "model": "vgg_small",
        "fields": {"stage_sizes": [1, 1, 2], "widths": [64, 128, 256], "pools": 2, "norm": "none"},
        "input": [28, 28, 1],
        "layers": vgg(),
    },
    "ResNet-20": {
        "model": "resnet20", "fields": {}, "input": [28, 28, 1], "layers": resnet20(),
    },
    "separable stack": {
        "model": "separable_stack12", "fields": {}, "input": [32, 32, 3],
        "layers": separable_stack(),
    },
    "MobileNetV2": {
        "model": "mobilenetv2_100", "timm": "mobilenetv2_100", "fields": {}, "input": [64, 64, 3],
        "batch": 64, "layers": None, "macs": [884_736, 23_576_576],
    },
    "ConvNeXt-Atto": {
        "model": "convnext_atto", "timm": "convnext_atto", "fields": {}, "input": [64, 64, 3],
        "batch": 64, "layers": None, "macs": [491_520, 44_165_760],
    },
}  # fmt: skip
"""Title -> the model of the zoo, its fields, the image shape, and the same as a list of layers, or
None with timm's name of it; `batch` where it is not `BATCH`."""


def kernels(
    layers: Sequence[Layer], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """What each layer holds: its kernel's shape, multiply-accumulates an image, other parameters.

    The shapes are HWIO or (in, out); a normalisation has a kernel of shape ().
    """
    height, width, channels = shape
    for kind, *rest in layers:
        if kind == "conv":
            features, size, stride, padding, depthwise, bias = rest
            height, width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
            kernel = (size, size, 1 if depthwise else channels, features)
            yield kernel, height * width * math.prod(kernel), features * bias
            channels = features
        elif kind == "dense":
            yield (channels, rest[0]), channels * rest[0], rest[0]
            channels = rest[0]
        elif kind == "norm":
            yield (), 0, 2 * channels
        elif kind == "pool":
            height, width = height // 2, width // 2
        elif kind == "average":
            height = width = 1
        elif kind == "flatten":
            height, width, channels = 1, 1, height * width * channels
        elif kind == "residual":
            inner, features, stride = rest
            yield from kernels(inner, (height, width, channels))
            height, width = ((n - 1) // stride + 1 for n in (height, width))
            channels = features


def cost(case: Case) -> tuple[float, float]:
    """Operations of convolutions and dense layers; no bytes, for caches may hold whatever fits."""
    if "size" in case:
        return 2.0 * case["size"] ** 3, 0.0
    if case["what"] == "compile":
        return 0.0, 0.0
    # The first layer's and all others' multiply-accumulates.
    macs = case.get("macs", [0])
    if case["layers"] is not None:
        macs = [count for _, count, _ in kernels(case["layers"], case["input"])]
    count = case.get("batch", BATCH)
    forward = 2.0 * count * sum(macs)
    # Training needs no gradient by the images, an attack none by the kernels.
    train = 3 * forward - 2.0 * count * macs[0]
    return {"evaluate": forward, "train": train, "pgd": STEPS * 2 * forward}[case["what"]], 0.0


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, H, W, C] in [0, 1] and labels [B]."""
    rng = np.random.default_rng(0)
    count = int(case.get("batch", BATCH))
    classes = int(case.get("classes", CLASSES))
    return rng.random((count, *case["input"]), np.float32), rng.integers(classes, size=count)


def values(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """He-normal numbers for each kernel, a function of its position and shape."""
    found = []
    for i, shape in enumerate(shapes):
        drawn = np.random.default_rng(i).standard_normal(shape, np.float32)
        found.append(drawn * np.float32(math.sqrt(2 / math.prod(shape[:-1]))))
    return found


def named_value(name: str, shape: Sequence[int]) -> np.ndarray:
    """He-normal numbers for a kernel of PyTorch's layout, a function of its name and shape."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.standard_normal(tuple(shape), np.float32)
    return drawn * np.float32(math.sqrt(2 / math.prod(shape[1:])))


# ---------------------------------------------------------------------------------------- JAX


def natural(path: str) -> list[Any]:
    """Sorts `block10` after `block2`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def canonical(case: Case, named: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of a model's kernels in the order of the layers.

    Kernels of one shape keep the order of their names. Without a list of layers all do.

    Args:
        case: has the layers.
        named: name -> shape, of all parameters.

    Raises:
        ValueError: the model has other parameters than the layers.
    """
    names = sorted((n for n in named if n.endswith("kernel")), key=natural)
    if case["layers"] is None:
        return names
    described = list(kernels(case["layers"], case["input"]))
    shapes = [shape for shape, _, _ in described if shape]
    by_shape = defaultdict(list)
    for name in names:
        by_shape[named[name]].append(name)
    wanted = sum(math.prod(s) for s in shapes) + sum(beside for _, _, beside in described)
    count = sum(math.prod(shape) for shape in named.values())
    if sorted(shapes) != sorted(named[name] for name in names) or wanted != count:
        raise ValueError(
            f"{case['model']} has {len(names)} kernels and {count:,} parameters, its list of "
            f"layers {len(shapes)} and {wanted:,}"
        )
    return [by_shape[shape].pop(0) for shape in shapes]


def published_kernels(case: Case) -> dict[str, np.ndarray]:
    """Name -> kernel, in the order of the published names."""
    from cnnlab import pretrained

    classes = int(case.get("classes", CLASSES))
    found = pretrained.entries(case["model"], num_outputs=classes, **fields_of(case))
    kernels = sorted((e for e in found if e.path[-1] == "kernel"), key=lambda e: e.name)
    return {"/".join(e.path[1:]): e.read(named_value(e.name, e.published_shape)) for e in kernels}


def fields_of(case: Case) -> Case:
    """A model's fields, after JSON has made lists of tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in case["fields"].items()}


def with_jax(
    case: Case,
    module: Any,
    logits_of: Callable[[Any], Any],
    jit: Any,
    options: Mapping[str, Any] | None = None,
) -> Workload:
    """A case of a Flax module.

    Args:
        case: which.
        module: `module.apply(variables, images, train=...)`.
        logits_of: what `apply` returns -> logits.
        jit: `jax.jit`, or what stands for it.
        options: those that `jit` adds; recorded.
    """
    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    options = options or {}
    images, labels = (jnp.array(a) for a in batch(case))

    rngs = {"params": jax.random.key(0)}
    shapes = jax.eval_shape(lambda x: module.init(rngs, x, train=False), images)
    flat = traverse_util.flatten_dict(shapes["params"], sep="/")
    if "timm" in case:
        drawn = published_kernels(case)
        order = list(drawn)
    else:
        order = canonical(case, {name: leaf.shape for name, leaf in flat.items()})
        drawn = dict(zip(order, values([flat[name].shape for name in order]), strict=True))

    def started(name: str, shape: tuple[int, ...]) -> Any:
        if name in drawn:
            return jnp.array(drawn[name])
        return jnp.full(shape, FILLS.get(name.rpartition("/")[2], 0.0), jnp.float32)

    params, stats = (
        traverse_util.unflatten_dict(
            {
                name: started(name, leaf.shape)
                for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()
            },
            sep="/",
        )
        for tree in (shapes["params"], shapes.get("batch_stats", {}))
    )

    def forward(params: Any, stats: Any, x: Any, train: bool) -> tuple[Any, Any]:
        variables = {"params": params, **({"batch_stats": stats} if stats else {})}
        if not train:
            return logits_of(module.apply(variables, x, train=False)), stats
        outputs, moved = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits_of(outputs), moved.get("batch_stats", {})

    def loss_of(params: Any, stats: Any, x: Any, labels: Any, train: bool) -> tuple[Any, Any]:
        logits, stats = forward(params, stats, x, train)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(chosen), stats

    def step(state: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        params, stats, velocity = state
        (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            params, stats, x, labels, True
        )
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v: p - LEARNING_RATE * v, params, velocity)
        return (params, stats, velocity), loss

    def evaluate(params: Any, stats: Any, x: Any) -> Any:
        return forward(params, stats, x, False)[0]

    def pgd(params: Any, stats: Any, clean: Any, labels: Any) -> Any:
        def ascend(_: Any, x: Any) -> Any:
            slope = jax.grad(lambda x: loss_of(params, stats, x, labels, False)[0])(x)
            x = jnp.clip(x + STEP_SIZE * jnp.sign(slope), clean - EPS, clean + EPS)
            return jnp.clip(x, 0.0, 1.0)

        return jax.lax.fori_loop(0, STEPS, ascend, clean)

    state = (params, stats, jax.tree.map(jnp.zeros_like, params))
    if case["what"] == "compile":
        described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
        used = dict(options)

        def compile_anew() -> None:
            jax.clear_caches()
            # A function of its own each time: nothing that was traced before can be reused.
            fresh = jit(lambda *arguments: step(*arguments), donate_argnums=0)
            fresh.lower(described, images, labels).compile()
            used.update(getattr(fresh, "options", {}))

        return Workload(compile_anew, lambda _: [], kind, used)
    if case["what"] == "train":
        compiled = jit(step, donate_argnums=0)

        def train() -> Any:
            nonlocal state
            state, loss = jax.block_until_ready(compiled(state, images, labels))
            return loss

        def loss_and_gradients(loss: Any) -> list[np.ndarray]:
            # After the first step the velocity is the gradient.
            velocity = traverse_util.flatten_dict(state[2], sep="/")
            return [np.asarray(loss), *(np.asarray(velocity[name]) for name in order)]

        return Workload(train, loss_and_gradients, kind, getattr(compiled, "options", options))
    function, arguments = {
        "evaluate": (evaluate, (params, stats, images)),
        "pgd": (pgd, (params, stats, images, labels)),
    }[case["what"]]
    compiled = jit(function)
    return Workload(
        lambda: jax.block_until_ready(compiled(*arguments)),
        lambda y: [np.asarray(y)],
        kind,
        getattr(compiled, "options", options),
    )


def product(case: Case, jit: Any) -> Workload:
    import jax
    import jax.numpy as jnp

    side = jnp.array(np.random.default_rng(0).standard_normal((case["size"],) * 2, np.float32))
    compiled = jit(lambda a, b: a @ b)
    return Workload(lambda: jax.block_until_ready(compiled(side, side)), lambda y: [np.asarray(y)])


def ours(case: Case) -> Workload:
    from cnnlab import models

    if "size" in case:
        return product(case, backend.jit)
    module = models.create(case["model"], num_outputs=CLASSES, **fields_of(case))
    options = backend.compiler_options(often=True)
    jit = functools.partial(backend.jit, often=True)
    return with_jax(case, module, lambda outputs: outputs.logits, jit, options)


def plain(case: Case) -> Workload | None:
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    if "size" in case:
        return product(case, jax.jit)
    if case["layers"] is None:
        return None

    class Plain(nn.Module):
        layers: Any

        @nn.compact
        def __call__(self, x: Any, *, train: bool) -> Any:
            for i, (kind, *rest) in enumerate(self.layers):
                name = f"layer{i}"
                if kind == "conv":
                    features, size, stride, padding, depthwise, bias = rest
                    groups = x.shape[-1] if depthwise else 1
                    x = nn.Conv(
                        features, (size, size), (stride, stride), ((padding, padding),) * 2,
                        feature_group_count=groups, use_bias=bias, name=name,
                    )(x)  # fmt: skip
                elif kind == "norm":
                    x = nn.BatchNorm(not train, momentum=0.9, name=name)(x)
                elif kind == "relu":
                    x = nn.relu(x)
                elif kind == "pool":
                    x = nn.max_pool(x, (2, 2), (2, 2))
                elif kind == "average":
                    x = x.mean((1, 2))
                elif kind == "flatten":
                    x = x.reshape(len(x), -1)
                elif kind == "dense":
                    x = nn.Dense(rest[0], name=name)(x)
                else:
                    inner, features, stride = rest
                    y = Plain(inner, name=name)(x, train=train)
                    shortcut = x[:, ::stride, ::stride]
                    missing = features - shortcut.shape[-1]
                    x = y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, missing)))
            return x

    return with_jax(case, Plain(case["layers"]), lambda logits: logits, jax.jit)


# ------------------------------------------------------------------------------------ PyTorch


def fill_timm(model: Any) -> None:
    """Gives timm's network the same numbers by their published names."""
    import torch  # type: ignore[import-not-found,unused-ignore]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(named_value(name, parameter.shape)))
            else:
                last = name.rpartition(".")[2]
                parameter.fill_(FILLS.get({"weight": "scale"}.get(last, last), 0.0))


def pytorch(case: Case) -> Workload | None:
    import torch  # type: ignore[import-not-found,unused-ignore]
    from torch import nn
    from torch.nn import functional as F  # type: ignore[import-not-found,unused-ignore] # noqa: N812

    torch.set_num_threads(os.cpu_count() or 1)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.cuda.get_device_name() if on == "cuda" else "cpu"

    def workload(run: Callable[[], Any], outputs: Callable[[Any], Any]) -> Workload:
        def blocking() -> Any:
            result = run()
            if on == "cuda":
                torch.cuda.synchronize()
            return result

        return Workload(blocking, outputs, kind)

    if "size" in case:
        side = np.random.default_rng(0).standard_normal((case["size"],) * 2, np.float32)
        a = torch.from_numpy(side).to(on)
        return workload(lambda: a @ a, lambda y: [y.cpu().numpy()])
    if case["what"] == "compile" or (case["layers"] is None and "timm" not in case):
        return None

    class Average(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean((2, 3))

    class Flatten(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)  # NHWC, as it lies in memory

    class Residual(nn.Module):
        def __init__(self, inner: Any, features: int, stride: int) -> None:
            super().__init__()
            self.inner, self.features, self.stride = inner, features, stride

        def forward(self, x: Any) -> Any:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            missing = self.features - shortcut.shape[1]
            if missing:
                shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, missing))
            return self.inner(x) + shortcut

    found = list(kernels(case["layers"] or [], case["input"]))
    inputs = iter([shape[-2] for shape, _, _ in found if shape])

    def built(layers: Sequence[Layer], channels: int) -> Any:
        modules: list[Any] = []
        for name, *rest in layers:
            if name == "conv":
                features, size, stride, padding, depthwise, bias = rest
                groups = channels if depthwise else 1
                channels = next(inputs) * groups
                modules.append(
                    nn.Conv2d(channels, features, size, stride, padding, groups=groups, bias=bias)
                )
                channels = features
            elif name == "norm":
                modules.append(nn.BatchNorm2d(channels))
            elif name == "relu":
                modules.append(nn.ReLU(inplace=True))
            elif name == "pool":
                modules.append(nn.MaxPool2d(2))
            elif name == "average":
                modules.append(Average())
            elif name == "flatten":
                modules.append(Flatten())
            elif name == "dense":
                modules.append(nn.Linear(next(inputs), rest[0]))
                channels = rest[0]
            else:
                inner, features, stride = rest
                modules.append(Residual(built(inner, channels), features, stride))
                channels = features
        return nn.Sequential(*modules)

    def from_layers() -> tuple[Any, list[Any]]:
        """A network of the list of layers, and its kernels in their order."""
        model = built(case["layers"], case["input"][-1])
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        count = sum(p.numel() for p in model.parameters())
        wanted = sum(math.prod(shape) if shape else 0 for shape, _, _ in found)
        wanted += sum(beside for _, _, beside in found)
        if count != wanted:
            raise ValueError(f"PyTorch's network has {count:,} parameters, the layers {wanted:,}")
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            for weight, value in zip(weights, values([s for s, _, _ in found if s]), strict=True):
                axes = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
                weight.copy_(torch.from_numpy(value.transpose(axes)))
        return model, weights

    def from_timm() -> tuple[Any, list[Any]]:
        """Timm's network, and its kernels in the order of their names."""
        import timm  # type: ignore[import-not-found,unused-ignore]

        model = timm.create_model(case["timm"], num_classes=CLASSES)
        fill_timm(model)
        named = dict(model.named_parameters())
        return model, [named[name] for name in sorted(named) if named[name].ndim > 1]

    model, weights = from_timm() if "timm" in case else from_layers()
    model = model.to(on, memory_format=torch.channels_last)
    pixels, classes = batch(case)
    images = torch.from_numpy(pixels).to(on).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(classes).to(on)

    if case["what"] == "train":
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)

        def train() -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss

        def loss_and_gradients(loss: Any) -> list[np.ndarray]:
            arrays = [w.grad.cpu().numpy() for w in weights]
            axes = [(2, 3, 1, 0) if a.ndim == 4 else (1, 0) for a in arrays]
            return [
                loss.detach().cpu().numpy(),
                *(a.transpose(order) for a, order in zip(arrays, axes, strict=True)),
            ]

        return workload(train, loss_and_gradients)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if case["what"] == "evaluate":
        return workload(lambda: model(images), lambda y: [y.cpu().numpy()])

    def pgd() -> Any:
        x = images
        for _ in range(STEPS):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
            with torch.no_grad():
                x = torch.clamp(x + STEP_SIZE * slope.sign(), images - EPS, images + EPS)
                x = x.clamp(0, 1)
        return x

    return workload(pgd, lambda x: [x.permute(0, 2, 3, 1).cpu().numpy()])


def get_experiment(networks: Mapping[str, Case] = NETWORKS) -> Benchmark:
    """The benchmark of these networks; see `NETWORKS`."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    settings = shared | backend.environment()
    # Rounding decides what a rectifier does near 0, which a sum of many gradients of either sign
    # shows, and what the sign of a small gradient is, which moves a pixel of the attack.
    special: dict[str, Case] = {
        "compile": {"rounds": 5},
        "train": {"tolerance": 2e-1},
        "pgd": {"tolerance": 3e-2},
    }
    return Benchmark(
        cases={
            f"{title}, {name}": network | {"what": what} | special.get(what, {})
            for title, network in networks.items()
            for what, name in WORKLOADS.items()
        },
        contenders={
            "cnnlab": Contender(ours, ("jax", "flax"), settings, keep_heap=True),
            "cnnlab, oneDNN": Contender(
                ours, ("jax", "flax"), {**settings, "CNNLAB_CPU": "onednn"}, keep_heap=True
            ),
            "plain Flax": Contender(plain, ("jax", "flax"), shared),
            "PyTorch": Contender(pytorch, ("torch", "timm")),
            "PyTorch, kept heap": Contender(pytorch, ("torch", "timm"), keep_heap=True),
        },
        cost=cost,
        peak={"size": 2048},
    )
