"""The model zoo: what each network costs, sees and is known to reach, and its speed here.

    cnnlab table experiments/zoo.py
    cnnlab table experiments/zoo.py --rows "resnet*" "convnext_*"

Half a minute a network on two CPU cores, most of it compilation. Forward is inference by the
running statistics, training a step of SGD with momentum; batch 8 of 224x224x3 images with 1,000
classes for the networks of ImageNet (EfficientNet-Lite at its own sizes), batch 128 of 32x32x3
images (LeNet: 28x28x1) with 10 classes for the others. Multiply-accumulates are those of
convolutions and dense layers for one image; the receptive field is the last feature map's, global
where squeeze-and-excitation gates see the whole image.

Published top-1 accuracies on ImageNet-1k, single crop, come from

- timm: its `results/results-imagenet.csv`, in the row of the weights that are named (`tv_in1k`:
  torchvision's first recipe; `pycls_in1k`: Radosavovic et al. 2020), at 224 pixels
  but where said (EfficientNet-Lite1 and 2: 240 and 260);
- torchvision: its table of weights, `IMAGENET1K_V1`;
- Liu et al. 2022, table 1.

Those of small images are CIFAR-10 accuracies: He et al. 2016 ("Deep Residual Learning"), table 6;
He et al. 2016 ("Identity Mappings"), table 4; Zagoruyko & Komodakis 2016, tables 4 and 5.
"""

from __future__ import annotations

from typing import Any

from cnnlab import backend, registry
from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]

LEARNING_RATE, MOMENTUM = 0.01, 0.9

_TIMM: dict[str, dict[str, float]] = {
    "tv_in1k": {
        "vgg11": 69.02, "vgg13": 69.93, "vgg16": 71.59, "vgg19": 72.38,
        "vgg11_bn": 70.38, "vgg13_bn": 71.59, "vgg16_bn": 73.37, "vgg19_bn": 74.22,
        "resnet18": 69.76, "resnet50": 76.13, "resnet101": 77.38, "resnet152": 78.32,
        "resnext50_32x4d": 77.62, "resnext101_32x8d": 79.31,
        "wide_resnet50_2": 78.48, "wide_resnet101_2": 78.84,
        "densenet121": 74.76, "densenet161": 77.36, "densenet169": 75.90, "densenet201": 77.29,
    },
    "gluon_in1k": {
        "resnet34": 74.58, "resnet50d": 79.08, "resnet101d": 80.43, "resnet152d": 80.48,
        "resnext101_32x4d": 80.34, "resnext101_64x4d": 80.60,
    },
    "bt_in1k, 288 pixels": {"resnet26": 76.37, "resnet26d": 77.41},
    "ra2_in1k, 288 pixels": {"resnet18d": 73.79, "resnet34d": 78.44},
    "a1_in1k, 288 pixels": {"seresnet50": 81.10},
    "lamb_in1k": {"mobilenetv2_050": 65.95},
    "ra_in1k": {
        "mobilenetv2_100": 72.98, "mobilenetv2_110d": 75.06, "mobilenetv2_120d": 77.30,
        "mobilenetv2_140": 76.52,
    },
    "in1k": {
        "tf_efficientnet_lite0": 74.83, "tf_efficientnet_lite1": 76.64,
        "tf_efficientnet_lite2": 77.46,
    },
    "in1k, 300 pixels": {"tf_efficientnet_lite3": 79.81},
    "pycls_in1k": {
        "regnetx_002": 68.75, "regnetx_004": 72.40, "regnetx_006": 73.87, "regnetx_008": 75.03,
        "regnetx_016": 76.92, "regnetx_032": 78.17, "regnetx_040": 78.49, "regnetx_064": 79.07,
        "regnetx_080": 79.20, "regnetx_120": 79.59, "regnetx_160": 79.87, "regnetx_320": 80.25,
        "regnety_002": 70.28, "regnety_004": 74.03, "regnety_006": 75.27, "regnety_008": 76.30,
        "regnety_016": 77.86, "regnety_032": 78.88, "regnety_040": 79.23, "regnety_064": 79.71,
        "regnety_080": 79.87, "regnety_120": 80.39, "regnety_160": 80.30, "regnety_320": 80.81,
    },
    "d2_in1k, 288 pixels": {"convnext_atto": 77.01},
    "d1_in1k, 288 pixels": {
        "convnext_femto": 78.72, "convnext_femto_ols": 78.92, "convnext_pico": 80.41,
        "convnext_pico_ols": 80.46,
    },
    "a2_in1k, 288 pixels": {"convnext_atto_ols": 77.22},
}  # fmt: skip

PUBLISHED: dict[str, tuple[float, str]] = {
    **{
        name: (top1, f"timm, {weights}")
        for weights, found in _TIMM.items()
        for name, top1 in found.items()
    },
    **{
        name: (top1, "torchvision")
        for name, top1 in {
            "googlenet": 69.78,
            "squeezenet1_0": 58.09,
            "squeezenet1_1": 58.18,
        }.items()
    },
    **{
        f"convnext_{size}": (top1, "Liu et al. 2022")
        for size, top1 in {"tiny": 82.1, "small": 83.1, "base": 83.8, "large": 84.3}.items()
    },
    **{
        f"resnet{depth}": (100 - error, "CIFAR-10, He et al. 2016")
        for depth, error in {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61}.items()
    },
    "preact_resnet110": (100 - 6.37, "CIFAR-10, He et al. 2016"),
    "wrn_28_10": (96.00, "CIFAR-10, Zagoruyko & Komodakis 2016"),
    "wrn_40_4": (95.47, "CIFAR-10, Zagoruyko & Komodakis 2016"),
}
"""Variant -> its published top-1 accuracy, %, and where it stands."""


def case(name: str) -> Case:
    """What is measured of a variant."""
    from cnnlab import describe

    shape, classes = describe.usual_input(name)
    return {
        "model": name,
        "input": list(shape),
        "classes": classes,
        "batch": 128 if classes == 10 else 8,
    }


def facts(case: Case, module: Any) -> dict[str, str]:
    """What the table says of a network besides its speed."""
    from cnnlab import describe

    height, width, channels = case["input"]
    found = describe.describe(module, (height, width, channels))
    size, stride = describe.field_words(found.features[-1].receptive_field)
    top1, source = PUBLISHED.get(case["model"], (None, "–"))
    return {
        "input": "x".join(map(str, case["input"])),
        "parameters": f"{found.parameters:,}",
        "MACs (M)": f"{found.macs / 1e6:,.1f}",
        "receptive field / stride": f"{size} / {stride}" if stride else size,
        "top-1 (%)": "–" if top1 is None else f"{top1:.2f}",
        "source": source,
    }


def work(case: Case, train: bool) -> Workload:
    """A forward pass or a training step of a network with its own initial variables."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cnnlab import models

    backend.keep_programs()
    module = models.create(case["model"], num_outputs=case["classes"])
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((case["batch"], *case["input"]), np.float32))
    labels = jnp.asarray(rng.integers(case["classes"], size=case["batch"]))
    key = jax.random.key(0)
    one = jax.ShapeDtypeStruct((1, *case["input"]), jnp.float32)
    variables = module.lazy_init({"params": key, "dropout": key}, one, train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})

    if not train:

        def infer(params: Any, stats: Any, x: Any) -> Any:
            outputs: Any = module.apply({"params": params, "batch_stats": stats}, x, train=False)
            return outputs.logits

        forward = backend.jit(infer, often=True)
        return Workload(
            lambda: jax.block_until_ready(forward(params, stats, images)),
            lambda _: [],  # nothing to agree on: the other contender does something else
            items=case["batch"],
            options=forward.options,
            facts=facts(case, module),
        )

    def loss_of(params: Any, stats: Any) -> tuple[Any, Any]:
        applied: Any = module.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        outputs, moved = applied
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs.logits), labels[:, None], axis=1)
        return -jnp.mean(chosen), moved.get("batch_stats", {})

    def step(state: Any) -> Any:
        params, stats, velocity = state
        (_, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, stats)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
        return jax.tree.map(lambda p, v: p - LEARNING_RATE * v, params, velocity), stats, velocity

    compiled = backend.jit(step, often=True, donate_argnums=0)
    state = (params, stats, jax.tree.map(jnp.zeros_like, params))

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state))

    return Workload(run, lambda _: [], items=case["batch"], options=compiled.options)


def forward(case: Case) -> Workload:
    return work(case, train=False)


def training(case: Case) -> Workload:
    return work(case, train=True)


def get_experiment() -> Benchmark:
    """Every registered variant; those of one family together."""
    found = registry.plugins("models")
    order = sorted(found, key=lambda name: (found[name].module.__name__, list(found).index(name)))
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | backend.environment()
    return Benchmark(
        cases={name: case(name) for name in order},
        contenders={
            "forward": Contender(forward, ("jax", "flax"), shared, keep_heap=True),
            "training": Contender(training, ("jax", "flax"), shared, keep_heap=True),
        },
        columns=("facts", "items"),
        rounds=5,
        budget=10.0,
        build_together=True,
    )
