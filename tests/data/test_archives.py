"""Archives that are read in place: the same content, and nothing that would leave its folder."""

import contextlib
import io
import os
import pickle
import stat
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnlab.data import _archives, image_folder
from cnnlab.types import CnnlabError, fingerprint

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache and a data folder of the test's own."""
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    image_folder._loaded.cache_clear()


@pytest.fixture
def photos(tmp_path):
    """A folder `flowers` with train and test images."""
    for name in [f"train/{c}/{i}.png" for c in "ab" for i in range(4)] + ["test/b/ä 0.png"]:
        path = tmp_path / "flowers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    return tmp_path / "flowers"


def zipped(folder: Path, path: Path, *, above: str = "", **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, above + file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname="./flowers")
    return path


def make(path: Path, kind: str, members) -> Path:
    """An archive of (name, content, what is special) triples."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content, special in members:
                member = zipfile.ZipInfo(name)
                member.external_attr = {"link": stat.S_IFLNK, "device": stat.S_IFCHR}.get(
                    special, stat.S_IFREG
                ) << 16
                archive.writestr(member, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content, special in members:
                tar_member = tarfile.TarInfo(name)
                tar_member.size = len(content)
                kinds = {
                    "link": tarfile.SYMTYPE,
                    "device": tarfile.CHRTYPE,
                    "hard": tarfile.LNKTYPE,
                }
                tar_member.type = kinds.get(special, tarfile.REGTYPE)
                tar_member.linkname = "/etc/passwd" if special in ("link", "hard") else ""
                archive.addfile(tar_member, io.BytesIO(content))
    return path


def test_archives_give_what_their_folder_gives(photos, tmp_path):
    paths = [
        zipped(photos, tmp_path / "stored.zip"),
        zipped(photos, tmp_path / "deflated.zip", compression=zipfile.ZIP_DEFLATED),
        zipped(photos, tmp_path / "nested.zip", above="flowers/"),
        tarred(photos, tmp_path / "plain.tar"),
    ]
    # As a self-extracting one: the offsets of its index count from where the archive begins.
    prefixed = tmp_path / "prefixed.zip"
    prefixed.write_bytes(b"#!/bin/sh\n" * 9 + paths[1].read_bytes())
    for split, count in (("train", 8), ("test", 1)):
        whole = image_folder.load(split, folder="flowers", size=6)
        expected = fingerprint(whole.get(np.arange(count)))
        for path in [*paths, prefixed]:
            source = image_folder.load(split, folder=path.name, size=6)
            assert fingerprint(source.get(np.arange(count))) == expected
            assert source.info.class_names == whole.info.class_names
            assert (source.info.mean, source.info.std) == (whole.info.mean, whole.info.std)
    copy = pickle.loads(pickle.dumps(image_folder.load("train", folder="deflated.zip", size=6)))
    order = np.array([7, 0, 3])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fingerprint(copy.get(order)), range(16)))
    train = image_folder.load("train", folder="flowers", size=6)
    assert set(found) == {fingerprint(train.get(order))}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("name", "special", "message"),
    [
        ("a/../../x.png", "", r"'a/../../x.png' leads out"),
        ("..", "", "leads out"),
        ("/etc/x.png", "", "'/etc/x.png' leads out"),
        ("C:/x.png", "", "leads out"),
        ("a\\..\\..\\x.png", "", "leads out"),
        ("a/x.png", "link", "'a/x.png' is a link"),
        ("a/x.png", "device", "'a/x.png' is a link.* device"),
        ("b/0.png", "", "holds 'b/0.png' twice"),
        ("./b//0.png", "", "holds 'b/0.png' twice"),
    ],
)
def test_members_that_would_leave_the_archive_are_refused(kind, name, special, message, tmp_path):
    content = b"" if special else b"x"
    members = [("b/0.png", b"x", ""), (name, content, special)]
    doubled = kind == "zip" and name == "b/0.png"
    with pytest.warns(UserWarning, match="Duplicate name") if doubled else contextlib.nullcontext():
        path = make(tmp_path / f"x.{kind}", kind, members)
    with pytest.raises(CnnlabError, match=message):
        image_folder.load("train", folder=path.name)


def test_hard_links_of_a_tar_are_refused(tmp_path):
    make(tmp_path / "x.tar", "tar", [("a/0.png", b"", "hard")])
    with pytest.raises(CnnlabError, match=r"'a/0\.png' is a link"):
        image_folder.load("train", folder="x.tar")


@pytest.mark.parametrize(
    ("mode", "ending"), [("w:gz", "tar.gz"), ("w:xz", "txz"), ("w:bz2", "tbz")]
)
def test_an_archive_compressed_as_a_whole_is_explained(mode, ending, photos, tmp_path):
    path = tarred(photos, tmp_path / f"x.{ending}", mode)
    with pytest.raises(CnnlabError, match=r"compressed as a whole.*cnnlab data pack .*x\."):
        image_folder.load("train", folder=path.name)
    (tmp_path / "out").mkdir()
    plain = _archives.decompressed(path, tmp_path / "out")
    assert len(_archives.listing(plain).files.names) == 9
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CnnlabError, match="truncated or damaged"):
        _archives.decompressed(path, tmp_path / "out")
    assert _archives.decompressed(photos, tmp_path) == photos


def test_a_member_of_too_many_bytes_is_bad_by_name(photos, tmp_path, monkeypatch):
    (photos / "train" / "a" / "bomb.png").write_bytes(bytes(10**6))
    zipped(photos, tmp_path / "x.zip", compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(_archives, "MAX_FILE_BYTES", 10**6 - 1)
    with pytest.raises(CnnlabError, match=r"'train/a/bomb.png': it has 1000000 bytes, the limit"):
        image_folder.load("train", folder="x.zip")


def test_a_member_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path):
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = bomb.compress(bytes(10**7)) + bomb.flush()
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK\3\4" + bytes(26) + stream)
    row = np.array([[0, len(stream), 100, 0]])
    files = _archives.ArchiveFiles(
        str(path), _archives.Names(["x"]), row, np.array([True]), is_zip=True
    )
    with pytest.raises(OSError, match="not what its index says"):
        files.open(0)


def test_damaged_archives_are_said(photos, tmp_path):
    path = zipped(photos, tmp_path / "x.zip")
    content = path.read_bytes()
    place = content.index(b"IDAT") + 10
    path.write_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
    with pytest.raises(CnnlabError, match=r"1 of 9 images.*archive is damaged"):
        image_folder.load("train", folder="x.zip", size=6)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CnnlabError, match="neither a folder nor a zip or tar archive"):
        image_folder.load("train", folder="x.zip", size=6)
    path = tarred(photos, tmp_path / "x.tar")
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(CnnlabError, match=r"x\.tar is (truncated|a damaged)"):
        image_folder.load("train", folder="x.tar", size=6)


def test_damage_anywhere_in_an_archive_never_surprises(photos, tmp_path):
    for kind, path in (
        ("zip", zipped(photos, tmp_path / "x.zip", compression=zipfile.ZIP_DEFLATED)),
        ("tar", tarred(photos, tmp_path / "x.tar")),
    ):
        content = path.read_bytes()
        # The index of a zip is at its end; headers of a tar are everywhere.
        places = RNG.integers(len(content) - 1200 if kind == "zip" else 0, len(content) - 8, 60)
        ends = []
        for number, at in enumerate(places.tolist()):
            damaged = tmp_path / f"{number}.{kind}"
            damaged.write_bytes(content[:at] + RNG.bytes(3) + content[at + 3 :])
            try:
                source = image_folder.load("train", folder=damaged.name, size=6)
                assert len(source.get(np.arange(len(source))).images) == len(source)
                ends.append("read")
            except CnnlabError:
                ends.append("said")
        assert {"said"} <= set(ends)


def test_names_of_any_bytes_survive(tmp_path):
    names = ["a", "", "ä", os.fsdecode(b"\xff\xfe"), "x/y"]
    kept = pickle.loads(pickle.dumps(_archives.Names(names)))
    assert list(kept) == names
    with pytest.raises(IndexError):
        kept[5]
