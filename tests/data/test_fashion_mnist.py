"""IDX files and the whole Fashion-MNIST: found in order, checked, refused when damaged."""

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from cnnlab.data import _idx, fashion_mnist
from cnnlab.data._source import channel_moments
from cnnlab.data.fashion_mnist import FILES, IdxFile
from cnnlab.types import CnnlabError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
LABELS = np.arange(7, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The bytes of a uint8 IDX file, written from the format's description."""
    head = b"\x00\x00\x08" + bytes([array.ndim])
    return head + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def entry(name: str, array: np.ndarray) -> IdxFile:
    return IdxFile(name, md5(gzip.compress(idx(array), mtime=0)), md5(idx(array)))


SMALL = (entry("images", IMAGES), entry("labels", LABELS))


def write(folder: Path, *, compressed: bool = True) -> Path:
    """Puts the small data set into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images", IMAGES), ("labels", LABELS)):
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), mtime=0))
        else:
            (folder / name).write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("array", [IMAGES, LABELS, IMAGES[:0]])
def test_idx_reads_back_what_was_written(array, compressed, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(array), mtime=0) if compressed else idx(array))
    read = _idx.read(path, ndim=array.ndim)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "found nothing in 0 bytes"),
        (b"\x00\x00\x08", "found 00 00 08 in 3 bytes"),
        (idx(IMAGES)[:10], "found 00 00 08 03 in 10 bytes"),
        (b"\x00\x00\x0d\x03" + idx(IMAGES)[4:], "found 00 00 0d 03"),
        (idx(LABELS), "found 00 00 08 01"),
        (idx(IMAGES)[:-1], "7 x 28 x 28 elements, so 5504 bytes were expected, found 5503"),
        (idx(IMAGES) + b"\x00", "5504 bytes were expected, found 5505"),
        (b"<!DOCTYPE html>", "found 3c 21 44 4f"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-20], "truncated or damaged gzip"),
        (gzip.compress(idx(IMAGES), mtime=0)[:6], "truncated or damaged gzip"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-8] + bytes(8), "truncated or damaged gzip"),
        (b"\x1f\x8b" + bytes(30), "truncated or damaged gzip"),
    ],
)
def test_idx_refuses_a_damaged_file(content, expected, tmp_path):
    path = tmp_path / "broken-idx3"
    path.write_bytes(content)
    with pytest.raises(CnnlabError) as caught:
        _idx.read(path, ndim=3)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compressed", [True, False])
def test_images_and_labels_are_read_and_checked(compressed, tmp_path):
    source = fashion_mnist.load_from([write(tmp_path, compressed=compressed)], SMALL)
    np.testing.assert_array_equal(source.images, IMAGES[..., None])
    np.testing.assert_array_equal(source.labels, LABELS)
    assert source.info == fashion_mnist.info()


def test_the_same_content_in_another_gzip_stream_is_accepted(tmp_path):
    # As in Debian's package: the published content with other gzip headers.
    write(tmp_path)
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(LABELS), 1, mtime=12345))
    assert len(fashion_mnist.load_from([tmp_path], SMALL)) == 7


def test_the_first_folder_that_has_the_images_wins(tmp_path):
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    (second / "images.gz").write_bytes(b"never read")
    fashion_mnist.load_from([tmp_path, first, second], SMALL)
    (first / "labels.gz").unlink()
    with pytest.raises(CnnlabError, match=r"no file labels\.gz") as caught:
        fashion_mnist.load_from([first, second], SMALL)
    assert str(second) not in str(caught.value)


@pytest.mark.parametrize("compressed", [True, False])
def test_another_file_is_refused_with_both_checksums(compressed, tmp_path):
    write(tmp_path, compressed=compressed)
    content = idx(IMAGES[::-1])
    data = gzip.compress(content, mtime=0) if compressed else content
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(data)
    with pytest.raises(CnnlabError) as caught:
        fashion_mnist.load_from([tmp_path], SMALL)
    message = str(caught.value)
    assert str(path) in message
    assert md5(data) in message
    assert (SMALL[0].md5_gz if compressed else SMALL[0].md5_content) in message
    assert md5(content) in message


def test_a_truncated_download_is_refused(tmp_path):
    path = write(tmp_path) / "images.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CnnlabError, match=r"images\.gz is a truncated or damaged gzip"):
        fashion_mnist.load_from([tmp_path], SMALL)


def test_missing_files_name_every_place_and_both_remedies(tmp_path):
    folders = fashion_mnist.search_path({"CNNLAB_DATA": str(tmp_path / "no")})[:-1]
    with pytest.raises(CnnlabError) as caught:
        fashion_mnist.load_from(folders, FILES["test"])
    message = str(caught.value)
    for expected in (
        *map(str, folders),
        "no such folder",
        "t10k-images-idx3-ubyte.gz",
        "apt install dataset-fashion-mnist",
        "github.com/zalandoresearch/fashion-mnist",
        "--data-dir",
    ):
        assert expected in message


def test_the_search_path_puts_the_users_folder_first():
    debian = Path("/usr/share/datasets/fashion-mnist")
    assert fashion_mnist.search_path({}) == (debian,)
    assert fashion_mnist.search_path({"CNNLAB_DATA": ""}) == (debian,)
    assert fashion_mnist.search_path({"CNNLAB_DATA": "/data"}) == (
        Path("/data"),
        Path("/data/fashion-mnist"),
        Path("/data/fashion_mnist"),
        debian,
    )
    home = fashion_mnist.search_path({"CNNLAB_DATA": "~/sets"})[0]
    assert home == Path.home() / "sets"


def test_load_reads_the_environment_variable(tmp_path, monkeypatch):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    with pytest.raises(CnnlabError, match="is not the published file") as caught:
        fashion_mnist.load("train")
    assert FILES["train"][0].md5_content in str(caught.value)


@pytest.fixture(scope="module")
def whole_folder():
    for folder in fashion_mnist.search_path(os.environ):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    pytest.skip("the whole Fashion-MNIST is not here (set CNNLAB_DATA to its folder)")


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_the_whole_set(split, count, whole_folder):
    source = fashion_mnist.load_from([whole_folder], FILES[split])
    assert np.bincount(source.labels).tolist() == [count // 10] * 10
    if split == "train":
        assert channel_moments([source.images]) == (source.info.mean, source.info.std)


@pytest.mark.parametrize("file", [file for files in FILES.values() for file in files])
def test_content_checksums_belong_to_the_published_ones(file, whole_folder):
    # The published files carry their name and time in the gzip header, which packagers strip:
    # with it put back, the checksum must be the published one.
    data = (whole_folder / f"{file.name}.gz").read_bytes()
    if md5(data) != file.md5_gz:
        time = 1504176606 if file.name.startswith("train") else 1504176627
        header = b"\x1f\x8b\x08\x08" + struct.pack("<I", time) + b"\x00\x03"
        data = header + file.name.encode() + b"\x00" + data[10:]
    assert md5(data) == file.md5_gz
    assert md5(gzip.decompress(data)) == file.md5_content
