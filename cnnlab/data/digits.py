"""Handwritten digits, 8x8 grey: 1,797 real images in 40 kB, for tests and for trying things out.

The test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), in the
order in which scikit-learn distributes it. A pixel counts the black ones among 4x4 of a larger
bitmap, 0 to 16; here it is 15 times that (0 to 240), so that dividing by 15 gives it back exactly.

The test split is the last 36 images of each class, 360 in all: the file runs writer by writer, so
they are mostly of people whom training has not seen. Licences beside the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnnlab.data import _embedded
from cnnlab.data._source import check_split
from cnnlab.types import ArraySource, DatasetInfo

PATH = _embedded.FOLDER / "digits.npz"
SIZE = 39_100
SHA256 = "5a8c4acca6177716697f21770d3275b8bc5d8117eec6153c8eab81dda6278ca8"

SCALE = 15
TEST_PER_CLASS = 36

INFO = DatasetInfo(
    name="digits",
    image_shape=(8, 8, 1),
    class_names=tuple("0123456789"),
    mean=(0.287361,),
    std=(0.3534,),
    license="CC-BY-4.0 (UCI), BSD-3-Clause (scikit-learn's copy)",
    homepage="https://archive.ics.uci.edu/dataset/80",
)


def info() -> DatasetInfo:
    """What the data set is; reads nothing."""
    return INFO


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Split -> positions in the file, ascending; test is the last 36 of each class.

    Args:
        labels: [N] integer, all labels in the file's order.
    """
    test = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        test[np.flatnonzero(labels == c)[-TEST_PER_CLASS:]] = True
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}


def load(split: str) -> ArraySource:
    """One split, in scikit-learn's order.

    Args:
        split: `"train"` (1,437 images) or `"test"` (360, 36 a class).

    Raises:
        CnnlabError: unknown split; the embedded file is missing or damaged.
    """
    return load_from(PATH, split)


def load_from(path: Path, split: str) -> ArraySource:
    """As `load`, from a copy of the embedded file at `path`."""
    check_split(INFO.name, split)
    with _embedded.read(path, size=SIZE, sha256=SHA256) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    chosen = split_indices(labels)[split]
    return ArraySource(INFO, images[chosen] * np.uint8(SCALE), labels[chosen].astype(np.int32))
