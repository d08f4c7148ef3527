"""How fast a folder of JPEGs is read: 20,000 images of 224x224, batches of 128, beside PyTorch.

    pip install 'cnnlab[bench]' torchvision
    cnnlab table experiments/loading_speed.py

About five minutes on two CPU cores. The folder is made once, in the system's temporary folder (0.3
GB). Every timing reads 1,280 images in a new order, its start included: ours by the stream that
training uses (in threads, and in two worker processes), up to arrays on the device; PyTorch's by
ImageFolder and a DataLoader of two worker processes, up to uint8 tensors, which is the least that
it can do. No image needs resizing. The system's cache holds the files after the first pass.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]

BATCH = 128
BATCHES = 10
WORKERS = 2


def folder(count: int) -> Path:
    """A folder `train/CLASS/N.jpg` of photographs-like noise, made if it is not there."""
    from PIL import Image

    place = Path(tempfile.gettempdir()) / f"cnnlab-loading-{count}"
    if place.exists():
        return place
    rng = np.random.default_rng(0)
    made = Path(tempfile.mkdtemp(dir=place.parent))
    for number in range(count):
        # Low frequencies and a little grain, so that a file is as large as a photograph's.
        coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((224, 224), Image.Resampling.BICUBIC), np.int16)
        image = image + rng.integers(-6, 7, image.shape, dtype=np.int16)
        file = made / "train" / f"class{number % 10}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, quality=90)
    for name in range(10):  # the test split has one image a class
        file = made / "test" / f"class{name}" / "0.jpg"
        file.parent.mkdir(parents=True)
        file.write_bytes((made / "train" / f"class{name}" / f"{name}.jpg").read_bytes())
    made.rename(place)
    return place


def ours(case: Case, *, workers: int) -> Workload:
    import jax

    from cnnlab import parallel, pipeline

    os.environ[pipeline.RESIDENT], os.environ[pipeline.WORKERS] = "0", str(workers)
    place = str(folder(case["images"]))
    split = pipeline.load("image_folder", "train", parallel.make_mesh(1), folder=place)
    stream = pipeline.Stream.make(seed=0, size=len(split), validation=0.0, batch_size=BATCH)
    rounds = itertools.count()

    def once() -> None:
        start = next(rounds) * BATCHES
        for fed in split.feed(pipeline.Steps([stream], start, start + BATCHES)):
            jax.block_until_ready(fed.images)

    return Workload(once, lambda _: [], "cpu", {}, items=BATCH * BATCHES)


def pytorch(case: Case) -> Workload:
    import torch
    from torchvision.datasets import ImageFolder  # type: ignore[import-not-found,unused-ignore]
    from torchvision.transforms import v2  # type: ignore[import-not-found,unused-ignore]

    images = ImageFolder(str(folder(case["images"]) / "train"), v2.PILToTensor())
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []

    def once() -> None:
        nonlocal order
        if len(order) < BATCH * BATCHES:
            order = torch.randperm(len(images), generator=generator).tolist()
        taken, order = order[: BATCH * BATCHES], order[BATCH * BATCHES :]
        part = torch.utils.data.Subset(images, taken)
        for pixels, _ in torch.utils.data.DataLoader(part, BATCH, num_workers=WORKERS):
            assert pixels.shape == (BATCH, 3, 224, 224)

    return Workload(once, lambda _: [], "cpu", {}, items=BATCH * BATCHES)


def get_experiment() -> Benchmark:
    """Images a second of the loaders."""
    return Benchmark(
        cases={"20,000 JPEGs, 224x224": {"images": 20_000}},
        contenders={
            "cnnlab": Contender(functools.partial(ours, workers=0), ("jax", "grain", "pillow")),
            "cnnlab, 2 processes": Contender(
                functools.partial(ours, workers=WORKERS), ("jax", "grain", "pillow")
            ),
            "PyTorch": Contender(pytorch, ("torch", "torchvision", "pillow")),
        },
        columns=("items", "ratio"),
        budget=200.0,
    )
