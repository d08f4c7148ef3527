"""ResNet-50 in bfloat16 at 224 pixels on an accelerator, beside PyTorch's compiler.

    cnnlab table experiments/resnet50_speed.py

A minute and a half on an H100, most of it compilation; PyTorch and timm come with
`pip install 'cnnlab[bench]'`. Both train the network of He et al. 2016 by timm's names and with the
same numbers in it: batch 256 of 224x224x3 images with 1,000 classes, float32 parameters, bfloat16
activations, SGD with momentum. PyTorch has channels_last, autocast and `torch.compile`; the clock
runs over a step with the data on the device. The share of peak is that of a bfloat16 matrix product
of 8192x8192, measured in the same run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnlab.sweep import Benchmark, Contender, Workload
from experiments import training_speed

Case = dict[str, Any]

CLASSES = 1000
MACS = [118_013_952, 3_971_170_304]  # the stem's and all others', an image

NETWORK: Case = {
    "model": "resnet50", "timm": "resnet50", "fields": {"dtype": "bfloat16"},
    "input": [224, 224, 3], "batch": 256, "classes": CLASSES, "layers": None, "macs": MACS,
}  # fmt: skip


def cnnlab_(case: Case) -> Workload:
    import jax
    import jax.numpy as jnp

    from cnnlab import backend, models

    if "size" in case:
        drawn = np.random.default_rng(0).standard_normal((case["size"],) * 2, np.float32)
        side = jnp.array(drawn, jnp.bfloat16)
        product = jax.jit(lambda a, b: a @ b)
        return Workload(lambda: jax.block_until_ready(product(side, side)), _nothing)
    module = models.create(case["model"], num_outputs=CLASSES, **case["fields"])
    options = backend.compiler_options()
    made = training_speed.with_jax(case, module, lambda o: o.logits, backend.jit, options)
    return _with(made, case, made.outputs)


def _nothing(_: Any) -> list[np.ndarray]:
    return []


def _with(made: Workload, case: Case, outputs: Any) -> Workload:
    """The same, telling how many images; of a training step only the loss is compared."""
    first = (lambda y: outputs(y)[:1]) if case["what"] == "train" else outputs
    return Workload(made.run, first, made.device, made.options, items=case["batch"])


def pytorch(case: Case) -> Workload:
    import timm  # type: ignore[import-not-found,unused-ignore]
    import torch  # type: ignore[import-not-found,unused-ignore]
    from torch.nn import functional as F  # type: ignore[import-not-found,unused-ignore] # noqa: N812

    on = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.cuda.get_device_name() if on == "cuda" else "cpu"

    def finish() -> None:
        if on == "cuda":
            torch.cuda.synchronize()

    if "size" in case:
        drawn = np.random.default_rng(0).standard_normal((case["size"],) * 2, np.float32)
        side = torch.from_numpy(drawn).to(on, torch.bfloat16)

        def product() -> None:
            side @ side
            finish()

        return Workload(product, _nothing, kind)
    model = timm.create_model(case["timm"], num_classes=CLASSES)
    training_speed.fill_timm(model)
    model = model.to(on, memory_format=torch.channels_last)
    pixels, classes = training_speed.batch(case)
    images = torch.from_numpy(pixels).to(on).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(classes).to(on)
    compiled = torch.compile(model)

    def run() -> Any:
        if case["what"] == "evaluate":
            with torch.no_grad(), torch.autocast(on, torch.bfloat16):
                result = compiled(images)
        else:
            optimizer.zero_grad()
            with torch.autocast(on, torch.bfloat16):
                result = F.cross_entropy(compiled(images), labels)
            result.backward()
            optimizer.step()
        finish()
        return result

    if case["what"] == "evaluate":
        model.eval()
    else:
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(), training_speed.LEARNING_RATE, training_speed.MOMENTUM
        )
    made = Workload(run, lambda y: [y.detach().float().cpu().numpy()], kind)
    return _with(made, case, made.outputs)


def get_experiment() -> Benchmark:
    """The training step and evaluation of one network."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    works = {"train": "training step", "evaluate": "evaluation"}
    return Benchmark(
        cases={
            f"ResNet-50, {name}": NETWORK | {"what": what, "tolerance": 0.1}
            for what, name in works.items()
        },
        contenders={
            "cnnlab": Contender(cnnlab_, ("jax", "flax"), shared),
            "PyTorch, compiled": Contender(pytorch, ("torch", "timm")),
        },
        cost=training_speed.cost,
        peak={"size": 8192},
        columns=("ms", "items", "ratio", "rate", "floor", "over_floor"),
    )
