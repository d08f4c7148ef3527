"""Packed data sets: the same images as the folder's, and every damage said."""

import json
import multiprocessing
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from cnnlab import packing
from cnnlab.data import array_record, image_folder
from cnnlab.data._source import channel_moments
from cnnlab.types import CnnlabError, StreamedSource, fingerprint

pytest.importorskip("array_record", reason="array_record is not installed")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of 40 training and 6 test images of differing size, and two packs of it."""
    root = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNNLAB_CACHE", str(root / "cache"))
        for split, count in (("train", 20), ("test", 3)):
            for i in range(2 * count):
                path = root / "set" / split / "ab"[i % 2] / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (9 + i % 3, 12, 3)
                Image.fromarray(RNG.integers(0, 256, shape, np.uint8)).save(path)
        packing.pack(root / "set", root / "files", shard_size=0.004)
        packing.pack(root / "set", root / "raw", size=8, raw=True, shard_size=0.002)
        packing.pack(root / "set", root / "jpeg", size=8, jpeg_quality=100, channels=1)
    return root


@pytest.fixture(autouse=True)
def place(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CNNLAB_DATA", str(packed))


@pytest.mark.parametrize("split", ["train", "test"])
def test_packs_give_the_images_of_the_folder(split):
    folder = image_folder.load(split, folder="set", size=8)
    files = array_record.load(split, folder="files", size=8)
    raw = array_record.load(split, folder="raw")
    everything = np.arange(len(folder))
    expected = folder.get(everything)
    for source in (files, raw):
        assert isinstance(source, StreamedSource)
        assert len(source.shards) > 1 or split == "test"
        np.testing.assert_array_equal(source.get(everything).images, expected.images)
        assert source.labels.tolist() == expected.labels.tolist()
        assert source.info.class_names == ("a", "b")
        assert source.info.mean == folder.info.mean
        assert source.info.std == folder.info.std
        order = RNG.permutation(len(folder))[:5]
        order = np.concatenate([order, order[:2]])
        np.testing.assert_array_equal(source.get(order).images, expected.images[order])
        assert len(source.get(everything[:0]).images) == 0
    assert files.fingerprint != raw.fingerprint


def test_jpegs_of_quality_100_are_almost_the_pixels():
    grey = image_folder.load("train", folder="set", size=8, channels=1)
    source = array_record.load("train", folder="jpeg")
    assert source.info.image_shape == (8, 8, 1)
    found = source.get(np.arange(40)).images
    difference = abs(found.astype(int) - grey.get(np.arange(40)).images)
    assert difference.max() <= 3
    assert (source.info.mean, source.info.std) == channel_moments([found])
    assert array_record.info(folder="jpeg") == source.info
    # What was packed with a size may be read at another.
    assert array_record.load("test", folder="jpeg", size=5).get(np.arange(1)).images.shape[1] == 5


def test_threads_and_processes_read_the_same():
    source = array_record.load("train", folder="files", size=8)
    expected = fingerprint(source.get(np.arange(40)))
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: fingerprint(copy.get(np.arange(40))), range(12)))
    assert found == {expected}


def _read(connection, source) -> None:
    connection.send(fingerprint(source.get(np.arange(40))))


def test_a_forked_process_reads_with_readers_of_its_own():
    source = array_record.load("train", folder="files", size=8)
    expected = fingerprint(source.get(np.arange(40)))
    readers = dict(array_record._readers.opened)
    array_record._readers.process = -1  # as a fork finds it, which JAX's threads forbid here
    assert fingerprint(source.get(np.arange(40))) == expected
    assert not set(map(id, readers.values())) & set(map(id, array_record._readers.opened.values()))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(theirs, source))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    process.join()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"data\.folder: expected a folder that `cnnlab data pack` wrote"),
        ({"folder": "set"}, r"no packed data set in .*set.*cnnlab data pack"),
        ({"folder": "files"}, r"data\.size: .*packed as they were"),
        ({"folder": "raw", "size": 9}, r"holds pixels of shape \[8, 8, 3\]"),
        ({"folder": "raw", "channels": 1}, r"holds pixels of shape \[8, 8, 3\]"),
        ({"folder": "jpeg", "fit": "x"}, r"data\.fit"),
        ({"folder": "raw", "split": "val"}, r"no split 'val'"),
    ],
)
def test_what_cannot_be_read_is_said(fields, message):
    with pytest.raises(CnnlabError, match=message):
        array_record.load(**{"split": "train"} | fields)


def _edit(**changes):
    def edit(content):
        return json.dumps(json.loads(content) | changes).encode()

    return edit


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("dataset.json", lambda c: c[:50], "dataset.json is damaged"),
        ("dataset.json", lambda c: b"[]", "dataset.json is damaged"),
        ("dataset.json", _edit(format=2), "of format 2, this version of cnnlab reads 1"),
        ("dataset.json", _edit(splits={}), "dataset.json is damaged"),
        ("dataset.json", None, "no packed data set"),
        ("train-00001.array_record", None, "train-00001.array_record is missing"),
        ("train-00001.array_record", lambda c: c[:-9], "it has .* bytes, expected"),
        ("train-00000.array_record", lambda c: bytes(len(c)), "cannot read .*train-00000"),
        ("train.labels.npy", lambda c: c[:-1] + b"\7", "train.labels.npy is damaged"),
        ("train.labels.npy", None, "cannot read .*train.labels.npy"),
    ],
)
def test_damage_is_said(file, damage, message, packed, tmp_path):
    for path in (packed / "raw").iterdir():
        content = path.read_bytes()
        if path.name == file:
            if damage is None:
                continue
            content = damage(content)
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(CnnlabError, match=message):
        array_record.load("train", folder=str(tmp_path)).get(np.arange(40))


def test_a_record_under_another_label_is_refused(packed):
    source = array_record.load("train", folder="raw")
    wrong = pickle.loads(pickle.dumps(source))
    wrong.labels[:] = 1 - wrong.labels
    with pytest.raises(CnnlabError, match=r"does not agree with dataset\.json"):
        wrong.get(np.array([0]))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(CnnlabError, match="pip install array-record"):
        array_record.load("train", folder="raw")
