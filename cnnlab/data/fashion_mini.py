"""A class-balanced tenth of Fashion-MNIST that ships with the package: no download, no set-up.

The first 1,000 images of each class of the original training split and the first 200 of each class
of the original test split, each in the published order, whose classes are mixed: 10,000 training
and 2,000 test images, 28x28 grey. `tools/make_fashion_mini.py` makes the file.

Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv:1708.07747. MIT licence, beside the file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from cnnlab.data import _embedded, fashion_mnist
from cnnlab.data._source import check_split
from cnnlab.types import ArraySource, DatasetInfo

PATH = _embedded.FOLDER / "fashion_mini.npz"
SIZE = 4_519_825
SHA256 = "ed7153d7580438db776d5db45cadfe029723714a414201c4a026c9eccacf9119"

INFO = dataclasses.replace(
    fashion_mnist.INFO, name="fashion_mini", mean=(0.286682,), std=(0.354013,)
)


def info() -> DatasetInfo:
    """What the data set is; reads nothing."""
    return INFO


def load(split: str) -> ArraySource:
    """One split, in the published order of Fashion-MNIST.

    Args:
        split: `"train"` (10,000 images, 1,000 a class) or `"test"` (2,000, 200 a class).

    Raises:
        CnnlabError: unknown split; the embedded file is missing or damaged.
    """
    return load_from(PATH, split)


def load_from(path: Path, split: str) -> ArraySource:
    """As `load`, from a copy of the embedded file at `path`."""
    check_split(INFO.name, split)
    with _embedded.read(path, size=SIZE, sha256=SHA256) as arrays:
        return ArraySource(
            INFO, arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int32)
        )
