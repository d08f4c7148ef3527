"""Fashion-MNIST, whole: 60,000 training and 10,000 test images of clothes, 28x28 grey, 10 classes.

Read from the four published IDX files, which are not part of this package.

Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv:1708.07747. MIT licence, Copyright (c) 2017 Zalando SE.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnnlab.data import _idx
from cnnlab.data._source import check_split
from cnnlab.types import ArraySource, CnnlabError, DatasetInfo

INFO = DatasetInfo(
    name="fashion_mnist",
    image_shape=(28, 28, 1),
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    mean=(0.286041,),
    std=(0.353024,),
    license="MIT",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
)


class IdxFile(NamedTuple):
    """One published file: its name without `.gz`, and the MD5 of its two forms."""

    name: str
    md5_gz: str
    md5_content: str


FILES: dict[str, tuple[IdxFile, IdxFile]] = {
    "train": (
        IdxFile(
            "train-images-idx3-ubyte",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            "25c81989df183df01b3e8a0aad5dffbe",
            "9018921c3c673c538a1fc5bad174d6f9",
        ),
    ),
    "test": (
        IdxFile(
            "t10k-images-idx3-ubyte",
            "bef4ecab320f06d8554ea6380940ec79",
            "8181f5470baa50b63fa0f6fddb340f0a",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
}
"""Split -> its images and its labels.

Two checksums, because Debian's package holds the published files with the name and time removed
from their gzip headers: the same content under other MD5s.
"""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def search_path(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders where the files are looked for, in order.

    Args:
        environ: the environment; `CNNLAB_DATA` (which `--data-dir` sets) comes before Debian's
            folder.
    """
    root = environ.get("CNNLAB_DATA")
    if not root:
        return (DEBIAN_FOLDER,)
    folder = Path(root).expanduser()
    return (folder, folder / "fashion-mnist", folder / "fashion_mnist", DEBIAN_FOLDER)


def info() -> DatasetInfo:
    """What the data set is; reads nothing."""
    return INFO


def load(split: str) -> ArraySource:
    """One split of Fashion-MNIST, in the published order.

    Args:
        split: `"train"` (60,000 images) or `"test"` (10,000).

    Raises:
        CnnlabError: unknown split; a file is missing, truncated or not the published one.
    """
    check_split(INFO.name, split)
    return load_from(search_path(os.environ), FILES[split])


def load_from(folders: Sequence[Path], files: tuple[IdxFile, IdxFile]) -> ArraySource:
    """Images and labels from the first of the folders that holds the images.

    Args:
        folders: where to look, in order.
        files: the images and the labels.

    Raises:
        CnnlabError: a file is missing, truncated or has the wrong checksum.
    """
    images, labels = files
    path = _find(folders, images.name)
    # Both from one folder: files of two folders may be of two data sets.
    pixels = _read(path, images, ndim=3)
    classes = _read(_find([path.parent], labels.name), labels, ndim=1)
    return ArraySource(INFO, pixels[..., None], classes.astype(np.int32))


def _find(folders: Sequence[Path], name: str) -> Path:
    for folder in folders:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    places = "\n".join(
        f"  {folder}{'' if folder.is_dir() else '  (no such folder)'}" for folder in folders
    )
    raise CnnlabError(
        f"Fashion-MNIST: no file {name}.gz (or {name}) in\n{places}\n"
        "Two ways to get it: on Debian or Ubuntu, `apt install dataset-fashion-mnist`; anywhere, "
        f"download the four .gz files from the folder data/fashion of {INFO.homepage} into a "
        "folder FOLDER and pass `--data-dir FOLDER` (or set CNNLAB_DATA=FOLDER). "
        "The data set 'fashion_mini' needs no download"
    )


def _read(path: Path, file: IdxFile, *, ndim: int) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CnnlabError(f"cannot read {path}: {error.strerror or error}") from error
    content = _idx.decompress(data, path)
    found = _md5(content)
    if found != file.md5_content:
        expected, given = f"content with MD5 {file.md5_content}", f"content with MD5 {found}"
        if content is not data:
            expected += f" (published compressed as {file.md5_gz})"
            given += f" (the compressed file: {_md5(data)})"
        raise CnnlabError(
            f"{path} is not the published file {file.name}: expected {expected}, found {given}. "
            f"Delete it and fetch it again from {INFO.homepage}"
        )
    return _idx.decode(content, path, ndim=ndim)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
