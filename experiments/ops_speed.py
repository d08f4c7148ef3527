"""Array operations: cnnlab against plain JAX and PyTorch, forward and backward.

    cnnlab table experiments/ops_speed.py
    cnnlab table experiments/ops_speed.py --rows "depthwise*" --without PyTorch "PyTorch, kept heap"

Half an hour on two CPU cores; PyTorch comes with `pip install 'cnnlab[bench]'`. Shapes are those of
LeNet-5 (LeCun et al. 1998), a VGG (Simonyan & Zisserman 2015) and ResNet-20 (He et al. 2016) on
28x28 images, batch 128. Plain JAX and PyTorch (channels_last) run with their own defaults; PyTorch
also with cnnlab's heap settings, which spare it most page faults. "cnnlab, outside" does what a
loop or `vmap` does without one: unrolled, and one kernel after another.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from cnnlab import backend
from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]

BATCH = 128
ITERATIONS = 8
# Steps of the loop cases: large enough to show in the outputs, small enough to stay finite.
IMAGE_STEP, KERNEL_STEP = 1e-2, 1e-5

CONVOLUTIONS = {
    "LeNet-5 28x28x1 -> 6, 5x5": ((28, 28, 1), 6, 5, 1, 2),
    "LeNet-5 14x14x6 -> 16, 5x5": ((14, 14, 6), 16, 5, 1, 0),
    "VGG 28x28x1 -> 64, 3x3": ((28, 28, 1), 64, 3, 1, 1),
    "VGG 14x14x64 -> 128, 3x3": ((14, 14, 64), 128, 3, 1, 1),
    "VGG 7x7x128 -> 256, 3x3": ((7, 7, 128), 256, 3, 1, 1),
    "VGG 7x7x256 -> 256, 3x3": ((7, 7, 256), 256, 3, 1, 1),
    "ResNet-20 28x28x16 -> 16, 3x3": ((28, 28, 16), 16, 3, 1, 1),
    "ResNet-20 28x28x16 -> 32, 3x3 / 2": ((28, 28, 16), 32, 3, 2, 1),
    "ResNet-20 14x14x32 -> 32, 3x3": ((14, 14, 32), 32, 3, 1, 1),
    "ResNet-20 14x14x32 -> 64, 3x3 / 2": ((14, 14, 32), 64, 3, 2, 1),
    "ResNet-20 7x7x64 -> 64, 3x3": ((7, 7, 64), 64, 3, 1, 1),
}
"""Name -> (image shape, output channels, kernel size, stride, padding)."""


def conv(
    shape: tuple[int, ...],
    features: int,
    size: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    **more: Any,
) -> Case:
    """A convolution; `more` has `what`: `forward`, `input`, `kernel` (gradients) or `all`."""
    return {
        "op": "conv", "shape": list(shape), "features": features, "size": size, "stride": stride,
        "padding": padding, "groups": groups, **more,
    }  # fmt: skip


def cases() -> dict[str, Case]:
    """Name -> case."""
    found: dict[str, Case] = {}
    for name, (shape, features, size, stride, padding) in CONVOLUTIONS.items():
        for what, title in (
            ("forward", "forward"),
            ("input", "input gradient"),
            ("kernel", "kernel gradient"),
        ):
            found[f"{name}, {title}"] = conv(
                (BATCH, *shape), features, size, stride, padding, what=what
            )
    found["pointwise 32x32x32 -> 64, forward and backward"] = conv(
        (BATCH, 32, 32, 32), 64, 1, what="all"
    )
    for size in (3, 7):
        for whole in ((32, 14, 14, 192), (128, 32, 32, 64)):
            channels = whole[-1]
            title = "x".join(map(str, whole))
            found[f"depthwise {size}x{size}, {title}, forward and backward"] = conv(
                whole, channels, size, 1, size // 2, channels, what="all"
            )
    pool = {"shape": [BATCH, 28, 28, 64], "what": "all"}
    found |= {
        "max pool 2x2, 28x28x64": pool
        | {"op": "max_pool", "size": 2, "stride": 2, "padding": 0},
        "max pool 3x3 / 2, 28x28x64": pool
        | {"op": "max_pool", "size": 3, "stride": 2, "padding": 1},
        "average pool 2x2, 28x28x64": pool
        | {"op": "avg_pool", "size": 2, "stride": 2, "padding": 0},
        "batch norm 28x28x16": {"op": "batch_norm", "shape": [BATCH, 28, 28, 16], "what": "all"},
        "batch norm 14x14x64": {"op": "batch_norm", "shape": [BATCH, 14, 14, 64], "what": "all"},
        "layer norm 14x14x64": {"op": "layer_norm", "shape": [BATCH, 14, 14, 64], "what": "all"},
        "resize 28x28x16 -> 56x56, bilinear": {
            "op": "resize", "shape": [BATCH, 28, 28, 16], "size": 56, "what": "all",
        },
        "affine warp 32x32x3": {"op": "warp", "shape": [BATCH, 32, 32, 3], "what": "forward"},
    }  # fmt: skip
    found |= {
        f"loop of {ITERATIONS}, both gradients, 32x32x16 -> 16, 3x3": conv(
            (BATCH, 32, 32, 16), 16, 3, 1, 1, what="loop", rounds=7
        ),
        f"loop of {ITERATIONS}, both gradients, 28x28x6 -> 16, 5x5": conv(
            (BATCH, 28, 28, 6), 16, 5, 1, 2, what="loop", rounds=7
        ),
        "vmap over 4 kernels, forward and backward, 32x32x16 -> 16, 3x3": conv(
            (BATCH, 32, 32, 16), 16, 3, 1, 1, what="vmap", copies=4, rounds=7
        ),
    }
    return found


# ------------------------------------------------------------------------ inputs and their cost


def output_shape(case: Case) -> tuple[int, ...]:
    """Of one application."""
    batch, height, width, channels = case["shape"]
    if case["op"] == "resize":
        return (batch, case["size"], case["size"], channels)
    if "stride" not in case:
        return tuple(case["shape"])
    height, width = (
        (n + 2 * case["padding"] - case["size"]) // case["stride"] + 1 for n in (height, width)
    )
    return (batch, height, width, case.get("features", channels))


def shapes(case: Case) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The shapes of the arguments, images (NHWC) first, and of the output."""
    channels = case["shape"][-1]
    found: list[tuple[int, ...]] = [tuple(case["shape"])]
    if case["op"] == "conv":
        size = case["size"]
        found.append((size, size, channels // case["groups"], case["features"]))
    if case["op"] in ("batch_norm", "layer_norm"):
        found += [(channels,), (channels,)]
    if case["op"] == "warp":
        found.append((case["shape"][0], 2, 3))
    copies = (case["copies"],) if "copies" in case else ()
    return [(*copies, *shape) for shape in found], (*copies, *output_shape(case))


def inputs(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """The arguments and the cotangent of the output, float32."""
    rng = np.random.default_rng(0)
    of_arguments, of_output = shapes(case)
    arguments = [rng.standard_normal(shape, np.float32) for shape in of_arguments]
    if case["op"] == "conv":
        arguments[1] /= np.float32(math.sqrt(math.prod(arguments[1].shape[-4:-1])))
    if case["op"] == "warp":
        arguments[1] = affine(case["shape"][0], case["shape"][1])
    return arguments, rng.standard_normal(of_output, np.float32)


def cost(case: Case) -> tuple[float, float]:
    """Operations (of convolutions and products alone) and bytes of one call."""
    if case["op"] == "product":
        return 2.0 * case["size"] ** 3, 0.0
    if case["op"] == "copy":
        return 0.0, 2.0 * 4 * case["numbers"]
    of_arguments, of_output = shapes(case)
    arguments, output = sum(map(math.prod, of_arguments)), math.prod(of_output)
    # A gradient reads the cotangent, as large as the output, and writes what the arguments hold.
    both = 3 * arguments + 2 * output
    loop = ITERATIONS * (2 * arguments + output)
    one = arguments + output
    numbers = {"all": both, "vmap": both, "loop": loop}.get(case["what"], one)
    operations = 0
    if case["op"] == "conv":
        times = {"all": 3, "vmap": 3, "loop": 2 * ITERATIONS}.get(case["what"], 1)
        operations = 2 * times * math.prod(of_arguments[1][-4:-1]) * output
    return float(operations), 4.0 * numbers


def affine(count: int, size: int) -> np.ndarray:
    """[count, 2, 3] float32: rotations by up to half a radian, zoomed by 1.1 and shifted.

    Each maps output (row, column, 1) to input (row, column), in pixels of a square image.
    """
    angles = np.linspace(-0.5, 0.5, count)
    c, s = np.cos(angles) / 1.1, np.sin(angles) / 1.1
    linear = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], 1)
    centre = np.full(2, (size - 1) / 2)
    shift = centre - linear @ centre + np.array([0.7, -1.3])
    return np.concatenate([linear, shift[..., None]], -1).astype(np.float32)


# ---------------------------------------------------------------------------------------- JAX


def with_jax(case: Case, ops: Any, *, outside: bool = False) -> Workload:
    """A case in JAX, with the operations of `ops`, jitted by its `jit`.

    Args:
        case: which.
        ops: a namespace of operations.
        outside: loops unrolled, and one kernel after another.
    """
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind

    def workload(function: Callable[..., Any], *arguments: Any) -> Workload:
        compiled = ops.jit(function)
        held = jax.block_until_ready([jnp.array(a) for a in arguments])
        return Workload(
            run=lambda: jax.block_until_ready(compiled(*held)),
            outputs=lambda result: [np.asarray(x) for x in result],
            device=kind,
            options=getattr(compiled, "options", ops.options),
        )

    if case["op"] == "product":
        side = np.random.default_rng(0).standard_normal((case["size"],) * 2, np.float32)
        return workload(lambda a, b: (a @ b,), side, side)
    if case["op"] == "copy":
        return workload(lambda a: (jnp.copy(a),), np.ones(case["numbers"], np.float32))

    functions: dict[str, Callable[..., Any]] = {
        "conv": lambda x, k: ops.conv(x, k, case),
        "max_pool": lambda x: ops.max_pool(x, case),
        "avg_pool": lambda x: ops.avg_pool(x, case),
        "batch_norm": lambda x, scale, bias: ops.batch_norm(x, scale, bias),
        "layer_norm": lambda x, scale, bias: ops.layer_norm(x, scale, bias),
        "resize": lambda x: ops.resize(x, case["size"]),
        "warp": lambda x, matrices: ops.warp(x, matrices),
    }
    f = functions[case["op"]]

    def all_of(*arguments: Any) -> Any:
        *primals, g = arguments
        y, pull = jax.vjp(f, *primals)
        return (y, *pull(g))

    def descend(carry: Any, _: Any, g: Any) -> Any:
        x, k = carry
        dx, dk = jax.vjp(f, x, k)[1](g)
        return (x - IMAGE_STEP * dx, k - KERNEL_STEP * dk), None

    def loop(x: Any, k: Any, g: Any) -> Any:
        if not outside:
            return jax.lax.scan(lambda c, _: descend(c, _, g), (x, k), length=ITERATIONS)[0]
        for _ in range(ITERATIONS):
            (x, k), _ = descend((x, k), None, g)
        return x, k

    def vmapped(*arguments: Any) -> Any:
        if not outside:
            return jax.vmap(all_of)(*arguments)
        each = [all_of(*(a[i] for a in arguments)) for i in range(case["copies"])]
        return tuple(jnp.stack(parts) for parts in zip(*each, strict=True))

    arguments, cotangent = inputs(case)
    tasks: dict[str, tuple[Callable[..., Any], list[np.ndarray]]] = {
        "forward": (lambda *a: (f(*a),), arguments),
        "input": (lambda x, k, g: jax.vjp(lambda x: f(x, k), x)[1](g), [*arguments, cotangent]),
        "kernel": (lambda x, k, g: jax.vjp(lambda k: f(x, k), k)[1](g), [*arguments, cotangent]),
        "all": (all_of, [*arguments, cotangent]),
        "loop": (loop, [*arguments, cotangent]),
        "vmap": (vmapped, [*arguments, cotangent]),
    }
    function, held = tasks[case["what"]]
    return workload(function, *held)


def cnnlab_ops() -> Any:
    """The operations of `cnnlab.ops`."""
    from cnnlab.ops import conv, norm, pool, resize, warp

    def pads(case: Case) -> Any:
        return ((case["padding"],) * 2,) * 2

    return SimpleNamespace(
        jit=functools.partial(backend.jit, often=True),
        options=backend.compiler_options(often=True),
        conv=lambda x, k, case: conv.conv(
            x, k, strides=(case["stride"],) * 2, padding=pads(case), groups=case["groups"]
        ),
        max_pool=lambda x, case: pool.max_pool(
            x, (case["size"],) * 2, strides=(case["stride"],) * 2, padding=pads(case)
        ),
        avg_pool=lambda x, case: pool.avg_pool(
            x, (case["size"],) * 2, strides=(case["stride"],) * 2, padding=pads(case)
        ),
        batch_norm=lambda x, scale, bias: norm.batch_norm(x, scale, bias)[0],
        layer_norm=lambda x, scale, bias: norm.layer_norm(x, scale, bias),
        resize=lambda x, size: resize.resize(x, (size, size), method="bilinear"),
        warp=lambda x, matrices: warp.affine(x, matrices, method="bilinear"),
    )


def plain_ops() -> Any:
    """The same from `jax.lax`, `flax.linen`, `jax.nn`, `jax.image` and `jax.scipy`."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from jax import lax
    from jax.scipy import ndimage

    def pads(case: Case) -> Any:
        return ((case["padding"],) * 2,) * 2

    def normalize(x: Any, scale: Any, bias: Any, axes: tuple[int, ...]) -> Any:
        # As `flax.linen` computes it by default: the mean of squares minus the squared mean.
        mean = jnp.mean(x, axes, keepdims=True)
        var = jnp.maximum(jnp.mean(jnp.square(x), axes, keepdims=True) - jnp.square(mean), 0)
        return (x - mean) * (lax.rsqrt(var + 1e-5) * scale) + bias

    def warp(image: Any, matrix: Any) -> Any:
        grid = jnp.meshgrid(*(jnp.arange(n) for n in image.shape[:2]), indexing="ij")
        where = [row[0] * grid[0] + row[1] * grid[1] + row[2] for row in matrix]

        def one(channel: Any) -> Any:
            return ndimage.map_coordinates(channel, where, order=1, mode="constant")

        return jax.vmap(one, in_axes=-1, out_axes=-1)(image)

    return SimpleNamespace(
        jit=jax.jit,
        options={},
        conv=lambda x, k, case: lax.conv_general_dilated(
            x, k, (case["stride"],) * 2, pads(case), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=case["groups"],
        ),
        max_pool=lambda x, case: nn.max_pool(
            x, (case["size"],) * 2, (case["stride"],) * 2, pads(case)
        ),
        avg_pool=lambda x, case: nn.avg_pool(
            x, (case["size"],) * 2, (case["stride"],) * 2, pads(case)
        ),
        batch_norm=lambda x, scale, bias: normalize(x, scale, bias, (0, 1, 2)),
        layer_norm=lambda x, scale, bias: normalize(x, scale, bias, (3,)),
        resize=lambda x, size: jax.image.resize(
            x, (x.shape[0], size, size, x.shape[3]), "bilinear", antialias=False
        ),
        warp=jax.vmap(warp),
    )  # fmt: skip


def ours(case: Case) -> Workload:
    return with_jax(case, cnnlab_ops())


def ours_outside(case: Case) -> Workload | None:
    if case.get("what") not in ("loop", "vmap"):
        return None
    return with_jax(case, cnnlab_ops(), outside=True)


def plain(case: Case) -> Workload:
    return with_jax(case, plain_ops())


# ------------------------------------------------------------------------------------ PyTorch


def pytorch(case: Case) -> Workload:
    import torch  # type: ignore[import-not-found,unused-ignore]
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

    if case["op"] == "product":
        side = np.random.default_rng(0).standard_normal((case["size"],) * 2, np.float32)
        a = torch.from_numpy(side).to(on)
        return workload(lambda: a @ a, lambda result: [result.cpu().numpy()])
    if case["op"] == "copy":
        source = torch.ones(case["numbers"], device=on)
        target = torch.empty_like(source)
        return workload(lambda: target.copy_(source), lambda result: [result.cpu().numpy()])

    def images(array: np.ndarray) -> Any:
        t = torch.from_numpy(array).to(on).permute(0, 3, 1, 2)
        return t.contiguous(memory_format=torch.channels_last)

    def kernel(array: np.ndarray) -> Any:
        t = torch.from_numpy(array).to(on).permute(3, 2, 0, 1)
        return t.contiguous(memory_format=torch.channels_last)

    def layouts(array: np.ndarray, position: int) -> Any:
        if array.ndim in (1, 3):
            return torch.from_numpy(array).to(on)
        return kernel(array) if case["op"] == "conv" and position == 1 else images(array)

    def back(tensor: Any, position: int) -> np.ndarray:
        array = tensor.detach().cpu()
        if array.ndim == 4:
            is_kernel = case["op"] == "conv" and position == 1
            array = array.permute(*((2, 3, 1, 0) if is_kernel else (0, 2, 3, 1)))
        return np.asarray(array.numpy())

    stride, padding, groups = (case.get(key, 1) for key in ("stride", "padding", "groups"))

    def warp(x: Any, matrices: Any) -> Any:
        # Theirs go from (x, y) to (x, y) and have the origin in the centre, the edge at 1.
        size = x.shape[2]
        linear = matrices[:, :, :2].flip((1, 2))
        centre = torch.full((2, 1), (size - 1) / 2, device=on)
        shift = matrices[:, :, 2:].flip(1) - centre + linear @ centre
        theta = torch.cat([linear, shift * 2 / size], 2)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    functions: dict[str, Callable[..., Any]] = {
        "conv": lambda x, k: F.conv2d(x, k, None, stride, padding, 1, groups),
        "max_pool": lambda x: F.max_pool2d(x, case["size"], stride, padding),
        "avg_pool": lambda x: F.avg_pool2d(x, case["size"], stride, padding),
        "batch_norm": lambda x, s, b: F.batch_norm(x, None, None, s, b, training=True),
        "layer_norm": lambda x, s, b: F.layer_norm(
            x.permute(0, 2, 3, 1), (x.shape[1],), s, b
        ).permute(0, 3, 1, 2),
        "resize": lambda x: F.interpolate(x, (case["size"],) * 2, mode="bilinear"),
        "warp": warp,
    }
    f = functions[case["op"]]

    def gradients(x: Any, k: Any, g: Any, of: tuple[bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            g, x, k, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [*of, False]
        )

    def all_of(held: list[Any], g: Any) -> Any:
        y = f(*held)
        return (y, *torch.autograd.grad(y, held, g))

    arrays, cotangent = inputs(case)
    what = case["what"]
    if what == "vmap":
        each = [
            ([layouts(a[i], j).requires_grad_() for j, a in enumerate(arrays)], images(c))
            for i, c in enumerate(cotangent)
        ]

        def stacked(result: Any) -> Any:
            # The outputs are: result, images' gradient, kernel's gradient.
            return [
                np.stack([back(one[j], j - 1) for one in result]) for j in range(len(result[0]))
            ]

        return workload(lambda: [all_of(held, g) for held, g in each], stacked)

    tensors = [layouts(a, j) for j, a in enumerate(arrays)]
    g = images(cotangent)
    if what == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return f(*tensors)

        return workload(forward, lambda y: [back(y, 0)])
    if what in ("input", "kernel"):
        position = ("input", "kernel").index(what)
        mask = (position == 0, position == 1)
        x, k = tensors
        return workload(lambda: gradients(x, k, g, mask)[position], lambda d: [back(d, position)])
    if what == "loop":

        def loop() -> Any:
            x, k = tensors
            with torch.no_grad():
                for _ in range(ITERATIONS):
                    dx, dk, _ = gradients(x, k, g, (True, True))
                    x, k = x - IMAGE_STEP * dx, k - KERNEL_STEP * dk
            return x, k

        return workload(loop, lambda pair: [back(t, j) for j, t in enumerate(pair)])
    for tensor in tensors:
        tensor.requires_grad_()
    return workload(
        lambda: all_of(tensors, g), lambda result: [back(t, j - 1) for j, t in enumerate(result)]
    )


def get_experiment() -> Benchmark:
    # XLA would otherwise take most of a GPU's memory for each process.
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    settings = shared | backend.environment()
    return Benchmark(
        cases=cases(),
        contenders={
            "cnnlab": Contender(ours, ("jax",), settings, keep_heap=True),
            "plain JAX": Contender(plain, ("jax", "flax"), shared),
            "PyTorch": Contender(pytorch, ("torch",)),
            "PyTorch, kept heap": Contender(pytorch, ("torch",), keep_heap=True),
            "cnnlab, outside": Contender(ours_outside, ("jax",), settings, keep_heap=True),
        },
        cost=cost,
        peak={"op": "product", "size": 2048},
        bandwidth={"op": "copy", "numbers": 2**26},
    )
