"""What augmentation costs of a training step: ResNet-20 on 28x28x1, batch 128, with and without.

    cnnlab table experiments/augmentation_share.py

About five minutes on two CPU cores, most of it compilation. Both contenders run the compiled step
that `cnnlab train` runs; the ratio is that of the step with the transforms to the step without.
AugMix is left out: its consistency loss trains on three views, which is no cost of augmentation.
"""

from __future__ import annotations

from typing import Any

from cnnlab import backend
from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]

TRANSFORMS: dict[str, tuple[str, ...]] = {
    "crop and flip": ("crop(padding=4)", "flip"),
    "crop, flip, random erasing": ("crop(padding=4)", "flip", "random_erasing"),
    "mixup": ("mixup",),
    "RandAugment(2, 9)": ("randaugment(num_ops=2, magnitude=9.0)",),
    "TrivialAugmentWide": ("trivialaugment",),
}
"""Title -> the transforms as a config lists them."""


def step(case: Case, *, augmented: bool) -> Workload:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cnnlab import config as config_lib
    from cnnlab.training import optim, run
    from cnnlab.training import step as step_lib
    from configs import resnet20_fashion_mnist

    chosen = {
        "augment.transforms": tuple(case["transforms"]) if augmented else (),
        "data.name": "fashion_mini",
    }
    config = config_lib.override(resnet20_fashion_mnist.get_config(), chosen, "augmentation_share")
    config = config_lib.resolve(config, "augmentation_share")
    split = run.load_split(config, "train")
    program = step_lib.make_program(config, split.info)
    hyper = optim.hyper(config, examples=len(split))
    state = program.init(0, hyper)
    indices = np.arange(config.train.batch_size, dtype=np.int32)

    def once() -> None:
        nonlocal state
        state, packed = program.train_step(state, split.fed(indices), jnp.int32(0), hyper)
        jax.block_until_ready(packed)

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    return Workload(
        once,
        lambda _: [],  # nothing to agree on: they train on other images
        kind,
        backend.compiler_options(),
        items=config.train.batch_size,
    )


def with_augmentation(case: Case) -> Workload:
    return step(case, augmented=True)


def without(case: Case) -> Workload:
    return step(case, augmented=False)


def get_experiment() -> Benchmark:
    """The ratio of steps with transforms to those without."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | backend.environment()
    return Benchmark(
        cases={title: {"transforms": list(names)} for title, names in TRANSFORMS.items()},
        contenders={
            "with": Contender(with_augmentation, ("jax", "flax"), shared, keep_heap=True),
            "without": Contender(without, ("jax", "flax"), shared, keep_heap=True),
        },
        columns=("ms", "ratio"),
        build_together=True,
    )
