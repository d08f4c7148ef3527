"""Makes the data files that ship inside cnnlab.

    python tools/make_fashion_mini.py FOLDER

FOLDER holds the four published Fashion-MNIST files (`train-images-idx3-ubyte.gz`, ...). Writes
`fashion_mini.npz` (the first 1,000 training and the first 200 test images of each class, each split
in the published order) and `digits.npz` (scikit-learn's digits, whole and unscaled) into
`cnnlab/data/files`, and prints the size, SHA-256, mean and standard deviation that stand in
`cnnlab/data/fashion_mini.py` and `cnnlab/data/digits.py`.

LZMA members are the smallest of what the standard library can write: 12,000 images take 4.5 MB,
against 5.2 with zlib and 4.8 with bzip2; the filters of PNG (left, up, average, Paeth) before LZMA
make them larger. Another version of liblzma may pack the same arrays into other bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cnnlab.data import _embedded, fashion_mnist
from cnnlab.data._source import channel_moments
from cnnlab.data.digits import split_indices

PER_CLASS = {"train": 1_000, "test": 200}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of the first `count` examples of each class, ascending; [K * count]."""
    classes = np.unique(labels)
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in classes]))


def fashion_mini(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of `fashion_mini.npz`, out of the published files in `folder`."""
    arrays = {}
    for split, count in PER_CLASS.items():
        source = fashion_mnist.load_from([folder], fashion_mnist.FILES[split])
        chosen = first_of_each_class(source.labels, count)
        arrays[f"{split}_images"] = source.images[chosen]
        arrays[f"{split}_labels"] = source.labels[chosen].astype(np.uint8)
    return arrays


def digits() -> dict[str, np.ndarray]:
    """The arrays of `digits.npz`, out of scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return {
        "images": bunch.images.astype(np.uint8)[..., None],
        "labels": bunch.target.astype(np.uint8),
    }


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An `.npz` file with LZMA members and fixed times, so that equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, member.getvalue(), compress_type=zipfile.ZIP_LZMA)
    return buffer.getvalue()


def main() -> None:
    """Writes both files and prints their constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the published IDX files")
    parser.add_argument("--out", type=Path, default=_embedded.FOLDER, help="where to write")
    args = parser.parse_args()
    clothes, numbers = fashion_mini(args.folder), digits()
    train = split_indices(numbers["labels"])["train"]
    for name, arrays, images in (
        ("fashion_mini", clothes, clothes["train_images"]),
        ("digits", numbers, numbers["images"][train] * np.uint8(15)),
    ):
        data = pack(arrays)
        (args.out / f"{name}.npz").write_bytes(data)
        mean, std = channel_moments([images])
        print(
            f"{name}: SIZE = {len(data)}, SHA256 = {hashlib.sha256(data).hexdigest()!r}, "
            f"mean={mean}, std={std}"
        )
    for split, files in fashion_mnist.FILES.items():
        whole = fashion_mnist.load_from([args.folder], files)
        print(f"fashion_mnist {split}: {channel_moments([whole.images])}")


if __name__ == "__main__":
    main()
