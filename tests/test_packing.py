"""The commands that pack a folder of images and look one through."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cnnlab import cli, packing
from cnnlab.data import _streaming, array_record, image_folder
from cnnlab.types import CnnlabError, CnnlabWarning

pytest.importorskip("array_record", reason="array_record is not installed")
RNG = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Eleven images in two classes, one of them truncated."""
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    image_folder._loaded.cache_clear()
    folder = tmp_path / "photos"
    for i in range(11):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (6, 8 + i, 3), np.uint8)).save(path)
    (folder / "a" / "10.png").write_bytes(path.read_bytes()[:100])
    return folder


def test_files_are_kept_to_the_byte(photos, tmp_path):
    with pytest.warns(CnnlabWarning, match="1 of 11 images"):
        packed = packing.pack(photos, tmp_path / "out", bad="skip", shard_size=0.001)
    assert packed.examples == {"train": 8, "test": 2}
    assert list(packed.left_out) == ["a/10.png"]
    metadata = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert metadata["class_names"] == ["a", "b"]
    records = []
    for shard in metadata["splits"]["train"]["shards"]:
        path = tmp_path / "out" / shard["file"]
        reader = array_record.library().ArrayRecordReader(str(path))
        assert reader.num_records() == shard["examples"]
        assert path.stat().st_size == shard["bytes"]
        records += reader.read_all()
        reader.close()
    assert packed.shards["train"] > 1
    originals = {path.read_bytes() for path in photos.rglob("*.png")}
    assert {record[array_record.HEADER.size :] for record in records} < originals
    assert not list(tmp_path.glob(".*"))


def test_a_compressed_archive_is_packed_without_leaving_anything(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
        archive.add(photos, arcname="photos")
    with pytest.warns(CnnlabWarning, match="left out"):
        packed = packing.pack(
            tmp_path / "photos.tar.gz", tmp_path / "out", size=6, raw=True, bad="skip"
        )
    assert sum(packed.examples.values()) == 10
    assert {path.suffix for path in packed.folder.iterdir()} == {".json", ".npy", ".array_record"}
    # The same images on the same sides as from the folder itself.
    for split in ("train", "test"):
        image_folder._loaded.cache_clear()
        with pytest.warns(CnnlabWarning):
            expected = image_folder.load(split, folder="photos", size=6, bad="skip")
        found = array_record.load(split, folder="out")
        count = len(expected)
        np.testing.assert_array_equal(
            found.get(np.arange(count)).images, expected.get(np.arange(count)).images
        )
        assert found.info.mean == expected.info.mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "either as pixels"),
        ({"raw": True}, "either as pixels"),
        ({"size": 8, "raw": True, "jpeg_quality": 9}, "either as pixels"),
        ({"size": 8, "jpeg_quality": 101}, "expected 1 to 100, got 101"),
        ({"shard_size": 0}, "more than 0 megabytes"),
        ({}, "1 of 11 images can't be read; the first: 'a/10.png'"),
    ],
)
def test_mistakes_leave_nothing_behind(options, message, photos, tmp_path):
    with pytest.raises(CnnlabError, match=message):
        packing.pack(photos, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} <= {"photos", "cache"}


def test_an_existing_folder_is_not_touched(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CnnlabError, match="exists already"):
        packing.pack(photos, tmp_path / "out", bad="skip")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_two_packs_at_once_are_refused(photos, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    other = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(CnnlabError, match="another process is packing"):
        packing.pack(photos, tmp_path / "out", bad="skip")
    os.close(other)


def test_a_failure_midway_leaves_nothing(photos, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.record, "write_atomic", full)
    with (
        pytest.warns(CnnlabWarning, match="left out"),
        pytest.raises(OSError, match="No space left"),
    ):
        packing.pack(photos, tmp_path / "out", bad="skip")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "cache"}


def test_a_killed_pack_looks_like_none_and_the_next_begins_anew(photos, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from cnnlab import packing\n"
        "packing.record.write_atomic = lambda *_: (print('there', flush=True), time.sleep(60))\n"
        "packing.pack(Path(sys.argv[1]), Path(sys.argv[2]), bad='skip')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(photos), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / ".out.partial").glob("*.array_record"))
    with pytest.warns(CnnlabWarning):
        packing.pack(photos, tmp_path / "out", bad="skip")
    assert not (tmp_path / ".out.partial").exists()
    assert len(array_record.load("train", folder="out", size=6)) == 8


def test_a_scan_tells_classes_sizes_and_bad_files(photos):
    found = packing.scan(photos)
    text = io.StringIO()
    for table in packing.render(found):
        Console(file=text, width=100).print(table)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().split("\n")
    ]
    assert ["a", "4", "1"] in rows
    assert ["b", "4", "1"] in rows
    assert ["width (pixels)", "8", "12", "17"] in [r[:4] for r in rows]
    assert [row[0] for row in rows if row and "truncated" in row[1].lower()] == ["a/10.png"]


@pytest.mark.filterwarnings("default::cnnlab.types.CnnlabWarning")
def test_the_commands(photos, tmp_path, capsys):
    assert cli.main(["data", "scan", str(photos)]) == 2
    assert "1 images can't be read" in capsys.readouterr().out
    assert cli.main(["data", "pack", str(photos), str(tmp_path / "out")]) == 2
    assert "data.bad='skip'" in capsys.readouterr().err
    arguments = ["--data.bad=skip", "--data.test_part", "0.5", "--size", "6", "--raw"]
    assert cli.main(["data", "pack", str(photos), str(tmp_path / "out"), *arguments]) == 0
    captured = capsys.readouterr()
    assert "6 train and 4 test images" in captured.out
    assert "1 of 11 images" in captured.err
    assert cli.main(["data", "scan", str(photos), "--data.size=9"]) == 2
    assert "--data.size has no meaning here" in capsys.readouterr().err
    assert cli.main(["data", "scan", str(photos), "--data.labls=9"]) == 2
    assert "did you mean 'labels'" in capsys.readouterr().err


def test_mapping_by_threads_keeps_the_order_and_little_ahead():
    started, taken = [], 0

    def slow(item):
        started.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    for taken, value in enumerate(_streaming.in_order(slow, iter(range(50)), threads=2)):
        assert value == taken * taken
        assert len(started) <= taken + 6
    assert taken == 49
    with pytest.raises(ZeroDivisionError):
        list(_streaming.in_order(lambda i: 1 / (3 - i), range(9), threads=2))
