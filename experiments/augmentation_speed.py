"""Augmentation: images a second on CPU, cnnlab's compiled batch against one example at a time.

    cnnlab table experiments/augmentation_speed.py
    cnnlab table experiments/augmentation_speed.py --rows "RandAugment*"

About 10 minutes on two CPU cores; needs PyTorch, torchvision and timm beside cnnlab. cnnlab takes a
batch of 512 uint8 images to float32 images, with all cores, as in its training step. The others do
what one worker of a data loader does: one example after another, on one thread, from a uint8 tensor
or a Pillow image to the same (random erasing: from and to float32, as they define it); decoding,
conversion and collating are left out of their time. mixup is a batch's matter for all of them.

RandAugment(2, 9) always applies both operations (Cubuk et al. 2020). "RandAugment as timm's" is the
recipe rand-m9-n2-inc1, in which each is applied with a probability of one half and pixels move by
bilinear or bicubic interpolation (its mstd0.5 ends at 0 bits in posterize, an error in Pillow 13).
TrivialAugmentWide: Müller & Hutter 2021; AugMix: Hendrycks et al. 2020, of severity and width 3;
random erasing: Zhong et al. 2020, probability 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cnnlab import backend
from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]

BATCH, CLASSES = 512, 10
SHAPES = ((28, 28, 1), (32, 32, 3))

TRANSFORMS: dict[str, tuple[str, ...]] = {
    "crop and flip": ("crop(padding=4)", "flip"),
    "RandAugment(2, 9)": ("randaugment(num_ops=2, magnitude=9.0)",),
    "RandAugment as timm's": ("randaugment_timm(magnitude_std=0.0)",),
    "TrivialAugmentWide": ("trivialaugment",),
    "AugMix": ("augmix",),
    "random erasing": ("random_erasing",),
    "mixup": ("mixup",),
}
"""Title -> the transforms as a config lists them."""


def cases() -> dict[str, Case]:
    """Name -> case."""
    return {
        f"{title}, {'x'.join(map(str, shape))}": {"transform": title, "shape": list(shape)}
        for title in TRANSFORMS
        for shape in SHAPES
    }


def examples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, H, W, C] uint8, smooth as photographs are, and labels [B]."""
    rng = np.random.default_rng(0)
    height, width, channels = case["shape"]
    coarse = rng.integers(0, 256, (BATCH, 8, 8, channels))
    rows, columns = (np.arange(length) * 8 // length for length in (height, width))
    images = coarse[:, rows][:, :, columns] + rng.integers(-16, 17, (BATCH, *case["shape"]))
    return np.clip(images, 0, 255).astype(np.uint8), rng.integers(CLASSES, size=BATCH)


def nothing(_: Any) -> Sequence[np.ndarray]:
    """Random results can't be compared; what they are is what the tests compare."""
    return []


# ---------------------------------------------------------------------------------------- cnnlab


def ours(case: Case) -> Workload:
    import jax
    import jax.numpy as jnp

    from cnnlab import augment, backend, keys
    from cnnlab.types import Batch

    transform = augment.compose(TRANSFORMS[case["transform"]])
    images, labels = examples(case)
    held = jnp.array(images)
    soft = jax.nn.one_hot(labels, CLASSES)

    @backend.jit
    def step(images: jax.Array, labels: jax.Array, number: jax.Array) -> tuple[jax.Array, ...]:
        batch = Batch(images.astype(jnp.float32) / 255, labels, jnp.ones(BATCH))
        made = transform(keys.key(0, "augment", number), batch)
        return made.images, made.labels

    number = 0

    def run() -> Any:
        nonlocal number
        number += 1
        return jax.block_until_ready(step(held, soft, number))

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    return Workload(run, nothing, kind, backend.compiler_options(), items=BATCH)


# ----------------------------------------------------------------------------------------- others


def one_by_one(transform: Callable[[Any], Any], inputs: Sequence[Any]) -> Workload:
    import torch

    torch.set_num_threads(1)
    return Workload(lambda: [transform(one) for one in inputs], nothing, items=len(inputs))


def tensors(case: Case, *, floating: bool = False) -> list[Any]:
    """Images [C, H, W]."""
    import torch

    images = torch.from_numpy(examples(case)[0]).permute(0, 3, 1, 2).contiguous()
    return list(images.float() / 255 if floating else images)


def pictures(case: Case) -> list[Any]:
    """Pillow's images."""
    from PIL import Image

    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            for image in examples(case)[0]]  # fmt: skip


def whole_batch(mix: Callable[[Any, Any], Any], case: Case) -> Workload:
    import torch

    torch.set_num_threads(1)
    images = torch.stack(tensors(case, floating=True))
    labels = torch.from_numpy(examples(case)[1])
    return Workload(lambda: mix(images.clone(), labels), nothing, items=BATCH)


def torchvision_policy(case: Case) -> Any:
    """What works on tensors and on Pillow's images alike, or None."""
    from torchvision.transforms import v2  # type: ignore[import-not-found,unused-ignore]

    height, width = case["shape"][:2]
    makers: dict[str, Callable[[], Any]] = {
        "crop and flip": lambda: v2.Compose(
            [v2.RandomCrop((height, width), padding=4), v2.RandomHorizontalFlip()]
        ),
        "RandAugment(2, 9)": lambda: v2.RandAugment(num_ops=2, magnitude=9),
        "TrivialAugmentWide": v2.TrivialAugmentWide,
        "AugMix": v2.AugMix,
    }
    return makers[case["transform"]]() if case["transform"] in makers else None


def torchvision(case: Case) -> Workload | None:
    from torchvision.transforms import v2  # type: ignore[import-not-found,unused-ignore]

    if case["transform"] == "mixup":
        return whole_batch(v2.MixUp(num_classes=CLASSES), case)
    if case["transform"] == "random erasing":
        return one_by_one(v2.RandomErasing(p=0.5), tensors(case, floating=True))
    policy = torchvision_policy(case)
    return policy and one_by_one(policy, tensors(case))


def torchvision_pil(case: Case) -> Workload | None:
    policy = torchvision_policy(case)
    return policy and one_by_one(policy, pictures(case))


def timm(case: Case) -> Workload | None:
    from timm.data import auto_augment, mixup, random_erasing  # type: ignore[import-not-found,unused-ignore]

    if case["transform"] == "mixup":
        return whole_batch(mixup.Mixup(mixup_alpha=1.0, num_classes=CLASSES), case)
    if case["transform"] == "random erasing":
        erase = random_erasing.RandomErasing(probability=0.5, device="cpu")
        return one_by_one(erase, tensors(case, floating=True))
    # Its own default, a tuple of three, is no colour of an image with one channel.
    settings = {"img_mean": 128 if case["shape"][2] == 1 else (128,) * 3}
    policies = {
        "RandAugment(2, 9)": (auto_augment.rand_augment_transform, "rand-m9-n2-p1.0"),
        "RandAugment as timm's": (auto_augment.rand_augment_transform, "rand-m9-n2-inc1"),
        "AugMix": (auto_augment.augment_and_mix_transform, "augmix-m3-w3"),
    }  # fmt: skip
    if case["transform"] not in policies:
        return None
    make, recipe = policies[case["transform"]]
    return one_by_one(make(recipe, settings), pictures(case))


def get_experiment() -> Benchmark:
    return Benchmark(
        cases=cases(),
        contenders={
            "cnnlab": Contender(ours, ("jax",), backend.environment(), keep_heap=True),
            "torchvision": Contender(torchvision, ("torch", "torchvision")),
            "torchvision (PIL)": Contender(torchvision_pil, ("torchvision", "pillow")),
            "timm": Contender(timm, ("timm", "torch", "pillow")),
        },
        columns=("items", "ratio"),
    )
