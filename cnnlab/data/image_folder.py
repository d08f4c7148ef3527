r"""Any folder of images, or a zip or tar archive of one: a class a folder, or classes from a CSV.

    FOLDER/train/CLASS/**/x.jpg   and   FOLDER/test/CLASS/**/y.jpg   (or val, validation, valid)
    FOLDER/CLASS/**/x.jpg         split by `split_seed`
    FOLDER/**/x.jpg               and a CSV of file names and classes

JPEG, PNG, WebP, BMP and GIF (the first frame), known by their content. Images are read as they are
needed, so the set may be larger than memory. Other files, hidden ones (`.x`) and `__MACOSX` are
left out. An archive may be one of all files or of one folder with all files.

The first run decodes every image once, with a progress bar, so that a damaged one stops it at the
start and not in the night (see `_streaming.scan` for what that finds); what it found, and the mean
and standard deviation, are kept in a cache for the next run.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from cnnlab.data import _archives, _decoding, _streaming
from cnnlab.data._archives import Files, Listing
from cnnlab.data._decoding import View
from cnnlab.data._source import check_split
from cnnlab.data._streaming import StreamedImages
from cnnlab.registry import Range, did_you_mean
from cnnlab.types import CnnlabError, DatasetInfo, StreamedSource

TEST_FOLDERS = ("test", "val", "validation", "valid")
"""The folders that are looked for where `test_folder` is empty, in this order."""

BAD = ("fail", "skip")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One split before any image is decoded.

    Attributes:
        files: one image each, sorted by name.
        labels: [N] int32.
        sizes: [N] int64, bytes of the encoded images.
    """

    files: Files
    labels: np.ndarray
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a folder holds.

    Attributes:
        name: for messages and for `DatasetInfo`.
        class_names: sorted.
        parts: by split, `"train"` and `"test"`.
        bad: name -> reason of the images that can't be read; they are in no part.
    """

    name: str
    class_names: tuple[str, ...]
    parts: dict[str, Part]
    bad: dict[str, str]


def info(**fields: Any) -> DatasetInfo:
    """What the data set is; the arguments are those of `load` but for the split.

    Raises:
        CnnlabError: as `load`.
    """
    return load("train", **fields).info


def load(
    split: str,
    folder: str = "",
    size: Annotated[int, Range(1, 65536)] = 224,
    channels: int = 3,
    fit: str = "crop",
    interpolation: str = "bilinear",
    train_folder: str = "train",
    test_folder: str = "",
    split_seed: int = 0,
    test_part: Annotated[float, Range(0.001, 0.9)] = 0.2,
    labels: str = "",
    file_column: str = "",
    class_column: str = "",
    bad: str = "fail",
) -> StreamedSource:
    """One split, sorted by file name; a process looks at a folder once.

    Args:
        split: `"train"` or `"test"`.
        folder: a folder or a zip or tar archive, absolute or relative to `$CNNLAB_DATA` (which
            `--data-dir` sets), or to the current folder where that is not set.
        size: height and width in pixels that images are resized to.
        channels: 3 for RGB, 1 for grey.
        fit: `"crop"` resizes so that the shorter side becomes `size` and cuts out the centre,
            `"stretch"` resizes the whole image whatever its aspect, `"pad"` puts black beside it.
        interpolation: `"bilinear"` or `"bicubic"`, antialiased.
        train_folder: name of the folder of training images; where there is none, `folder` itself
            has the class folders.
        test_folder: name of the folder of test images; empty: the first that there is of test,
            val, validation and valid. Where there is none, test images are cut from the others.
        split_seed: chooses these test images. An image's side depends on the seed and its name
            only, but for the last of each class.
        test_part: the part of each class that becomes test images.
        labels: a CSV file with a header, relative to `folder` or absolute: a row an image, its name
            (relative to `folder` or to the folder of its split, with or without its ending) and its
            class. Empty: classes are folders. A test folder that was not asked for and of which
            the CSV names no image is left out (Kaggle's unlabelled ones).
        file_column: the CSV's column of names; empty: the first.
        class_column: its column of classes; empty: the second.
        bad: what to do about images that can't be read: `"fail"` at the start, or `"skip"` them
            and say how many.

    Raises:
        CnnlabError: the folder, its images, its classes or the CSV are not as described; the
            message names the file.
    """
    check_split("image_folder", split)
    view = View(size, fit, channels, interpolation)
    layout = (train_folder, test_folder, split_seed, test_part, labels, file_column, class_column)
    return _loaded(resolved_path(folder), view, layout, bad)[split]


def resolved_path(folder: str) -> Path:
    """The folder or archive that `data.folder` names.

    Raises:
        CnnlabError: it names none.
    """
    if not folder:
        raise CnnlabError(
            "data.folder: expected a folder or a zip or tar archive of images, got none, as in "
            "--config.data.folder=flowers"
        )
    root = os.environ.get("CNNLAB_DATA") or "."
    return Path(root).expanduser() / Path(folder).expanduser()


def find(
    path: Path,
    view: View,
    *,
    train_folder: str = "train",
    test_folder: str = "",
    split_seed: int = 0,
    test_part: float = 0.2,
    labels: str = "",
    file_column: str = "",
    class_column: str = "",
    bad: str = "fail",
) -> Found:
    """Lists a folder or archive, gives each image its class and split, and checks every image.

    Args:
        path: the folder or archive.
        view: as which images are decoded for the check.
        train_folder: as in `load`, and so the others.
        test_folder: as in `load`.
        split_seed: as in `load`.
        test_part: as in `load`.
        labels: as in `load`.
        file_column: as in `load`.
        class_column: as in `load`.
        bad: as in `load`; also `"tell"`, which leaves out bad images without a word and accepts
            classes that have no other.

    Raises:
        CnnlabError: as `load`.
    """
    if bad not in (*BAD, "tell"):
        raise CnnlabError(f"data.bad: expected fail or skip, got {bad!r}{did_you_mean(bad, BAD)}")
    if not 0 < test_part < 1:
        raise CnnlabError(f"data.test_part: expected a part between 0 and 1, got {test_part}")
    listed = _archives.listing(path)
    name = f"image_folder:{path.name}"
    images = [n for n in listed.files.names if _suffix(n) in _decoding.SUFFIXES]
    strange = [n for n in listed.files.names if _suffix(n) in _decoding.OTHER_SUFFIXES]
    if not images:
        hint = f"; there are {len(strange)} such as {strange[0]!r}" if strange else ""
        raise CnnlabError(
            f"{path}: no images in it (of {' '.join(_decoding.SUFFIXES)}, capitals too){hint}. "
            "Is it the right folder?"
        )
    top = _top(listed, images, train_folder, labels)
    sides = _sides(path, listed, images + strange, top, train_folder, test_folder, labels)
    if labels:
        table = _read_labels(listed, top, labels, file_column, class_column)
        classes = _classes_of_csv(path, top, sides, table, asked=bool(test_folder))
    else:
        classes = _classes_of_folders(path, listed, sides)
    split = {n: side for side, (_, names) in sides.items() for n in names if n in classes}
    if len(sides) == 1:
        split = _cut(classes, top, split_seed, test_part)

    names = sorted(classes)
    positions = {n: i for i, n in enumerate(listed.files.names)}
    chosen = [positions[n] for n in names]
    problems = dict(listed.problems)
    problems |= {n: f"{_suffix(n)} files are not read" for n in strange}
    reasons = _bad(listed, chosen, names, problems, view)
    if bad != "tell":
        _streaming.settle_bad(name, names, reasons, bad)

    class_names = tuple(sorted(set(classes.values())))
    numbers = {c: i for i, c in enumerate(class_names)}
    parts = {}
    for side in ("train", "test"):
        mine = [i for i, n in enumerate(names) if split[n] == side and i not in reasons]
        parts[side] = Part(
            listed.files.take([chosen[i] for i in mine]),
            np.array([numbers[classes[names[i]]] for i in mine], np.int32),
            listed.sizes[np.array([chosen[i] for i in mine], np.int64)],
        )
    if bad != "tell":
        _check_parts(path, class_names, parts)
    return Found(name, class_names, parts, {names[i]: r for i, r in sorted(reasons.items())})


@functools.lru_cache(maxsize=16)
def _loaded(
    path: Path, view: View, layout: tuple[str, str, int, float, str, str, str], bad: str
) -> Mapping[str, StreamedImages]:
    fields = (
        "train_folder",
        "test_folder",
        "split_seed",
        "test_part",
        "labels",
        "file_column",
        "class_column",
    )
    found = find(path, view, **dict(zip(fields, layout, strict=True)), bad=bad)  # type: ignore[arg-type]
    bare = DatasetInfo(
        name=found.name,
        image_shape=view.shape,
        class_names=found.class_names,
        mean=(),
        std=(),
        license="see where the images come from",
        homepage="",
    )
    sources = {
        side: StreamedImages(bare, part.files, part.labels, fingerprint(found, side, view), view)
        for side, part in found.parts.items()
    }
    known = _streaming.info_with_moments(sources["train"])
    return {side: dataclasses.replace(each, info=known) for side, each in sources.items()}


def fingerprint(found: Found, side: str, view: View) -> str:
    """16 hex digits of the settings and each image's relative name, bytes and class."""
    part = found.parts[side]
    digest = hashlib.sha256(repr((dataclasses.astuple(view), found.class_names)).encode())
    for index, name in enumerate(part.files.names):
        row = b"\0%d %d\0" % (part.sizes[index], part.labels[index])
        digest.update(os.fsencode(name) + row)
    return digest.hexdigest()[:16]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _top(listed: Listing, images: Sequence[str], train_folder: str, labels: str) -> str:
    """The one folder that holds all others, as archives often have; with a final `/`."""
    first = images[0].split("/")
    top = f"{first[0]}/"
    alone = all(n.startswith(top) for n in images) and first[0] not in (train_folder, "train")
    # One that holds images itself, or only folders that do, may be a class.
    nested = any(f"{top}{t}" in listed.folders for t in (train_folder, *TEST_FOLDERS))
    nested = nested or len({n.split("/")[1] for n in images if n.count("/") > 1}) > 1
    nested = nested or bool(labels and f"{top}{labels}" in listed.files.names)
    return top if alone and (labels or len(first) > 2) and nested else ""


def _sides(
    path: Path,
    listed: Listing,
    images: Sequence[str],
    top: str,
    train_folder: str,
    test_folder: str,
    labels: str,
) -> dict[str, tuple[str, list[str]]]:
    """Split -> (its folder with a final `/`, names of its images); `"train"` only if not split."""

    def inside(folder: str) -> tuple[str, list[str]]:
        return folder, [n for n in images if n.startswith(folder)]

    def exists(folder: str) -> bool:
        return f"{top}{folder}" in listed.folders

    train = train_folder.strip("/")
    test = test_folder.strip("/") or next(filter(exists, TEST_FOLDERS), "")
    if test_folder and not exists(test):
        raise CnnlabError(
            f"data.test_folder: {path} has no folder {top}{test}"
            f"{did_you_mean(test, _within(listed, top))}"
        )
    if not exists(train):
        if train_folder != "train" or test_folder:
            raise CnnlabError(
                f"data.train_folder: {path} has no folder {top}{train}"
                f"{did_you_mean(train, _within(listed, top))}"
            )
        if test and not labels:
            raise CnnlabError(
                f"{path} has a folder {top}{test}, but none called {top}{train}; name that of the "
                "training images with data.train_folder"
            )
        return {"train": inside(top)}
    sides = {"train": inside(f"{top}{train}/")}
    if not sides["train"][1]:
        raise CnnlabError(f"{path}: the folder {top}{train} has no images")
    if test:
        sides["test"] = inside(f"{top}{test}/")
        if not sides["test"][1]:
            raise CnnlabError(
                f"{path}: the folder {top}{test} has no images; delete it, or name another with "
                "data.test_folder"
            )
    return sides


def _within(listed: Listing, top: str) -> list[str]:
    inner = (f.removeprefix(top) for f in listed.folders if f.startswith(top))
    return sorted(f for f in inner if f and "/" not in f)


def _classes_of_folders(
    path: Path, listed: Listing, sides: Mapping[str, tuple[str, list[str]]]
) -> dict[str, str]:
    """Name -> class, from the first folder below that of the split."""
    classes: dict[str, str] = {}
    for folder, names in sides.values():
        for name in names:
            label, slash, _ = name.removeprefix(folder).partition("/")
            if not slash:
                raise CnnlabError(
                    f"{path}: {name!r} lies in no class folder; expected {folder}CLASS/... (or "
                    "name a CSV of classes with data.labels)"
                )
            classes[name] = label
    train_folder, train_names = sides["train"]
    known = {classes[n] for n in train_names}
    for folder in _within(listed, train_folder):
        if folder not in known:
            raise CnnlabError(
                f"{path}: the class folder {train_folder}{folder} has no images; fill or delete it"
            )
    for name in sides.get("test", ("", []))[1]:
        if classes[name] not in known:
            raise CnnlabError(
                f"{path}: {name!r} is of class {classes[name]!r}, which has no folder in "
                f"{train_folder.rstrip('/')}{did_you_mean(classes[name], known)}"
            )
    return classes


@dataclasses.dataclass(frozen=True)
class _Labels:
    """A CSV: name of an image -> (line, class)."""

    file: str
    rows: dict[str, tuple[int, str]]


def _read_labels(
    listed: Listing, top: str, labels: str, file_column: str, class_column: str
) -> _Labels:
    where = f"data.labels: {labels}"
    try:
        text = _content(listed, top, labels).decode("utf-8-sig")
        lines = list(_rows(text))
    except OSError as error:
        raise CnnlabError(f"{where}: cannot be read: {_streaming.reason(error)}") from error
    except (ValueError, csv.Error) as error:  # also a null character in the name
        raise CnnlabError(f"{where} is no CSV file in UTF-8: {error}") from error
    if len(lines) < 2:
        raise CnnlabError(f"{where}: expected a header and a row an image, it is empty")
    header = [cell.strip() for cell in lines[0][1]]
    columns = []
    for field, column, default in (
        ("file_column", file_column, 0),
        ("class_column", class_column, 1),
    ):
        if not column and len(header) > default:
            columns.append(default)
        elif column in header:
            columns.append(header.index(column))
        else:
            raise CnnlabError(
                f"data.{field}: {labels} has no column {column or default + 1!r}"
                f"{did_you_mean(column, header)}: it has {', '.join(map(repr, header))}"
            )
    rows: dict[str, tuple[int, str]] = {}
    for line, cells in lines[1:]:
        if len(cells) <= max(columns) or not all(cells[c].strip() for c in columns):
            raise CnnlabError(f"{where}, line {line}: expected a file and its class, got {cells}")
        name, label = (cells[c].strip() for c in columns)
        name = "/".join(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))
        if name in rows:
            raise CnnlabError(f"{where}: {name!r} stands in lines {rows[name][0]} and {line}")
        rows[name] = (line, label)
    return _Labels(labels, rows)


def _content(listed: Listing, top: str, labels: str) -> bytes:
    names = listed.files.names
    for index, name in enumerate(names):
        if name in (labels, f"{top}{labels}"):
            with listed.files.open(index) as file:
                return file.read()
    beside = listed.path.parent if listed.path.is_file() else listed.path
    return (beside / labels).read_bytes()


def _rows(text: str) -> Iterable[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield reader.line_num, cells


def _classes_of_csv(
    path: Path,
    top: str,
    sides: dict[str, tuple[str, list[str]]],
    table: _Labels,
    *,
    asked: bool,
) -> dict[str, str]:
    """Name -> class; drops a test folder that was not asked for and has no classes.

    Each image is looked up by its name in the whole set, then in its split, each with and without
    its ending.
    """
    labels = table.file
    found: dict[str, str] = {}
    used: dict[str, str] = {}
    missing: dict[str, list[str]] = {side: [] for side in sides}
    for side, (folder, names) in sides.items():
        for name in names:
            inner = name.removeprefix(folder)
            outer = name.removeprefix(top)
            keys = (name, outer, inner, *(os.path.splitext(n)[0] for n in (name, outer, inner)))
            key = next((k for k in keys if k in table.rows), None)
            if key is None:
                missing[side].append(name)
                continue
            if key in used:
                raise CnnlabError(
                    f"{path}: {labels}, line {table.rows[key][0]}: {key!r} may be {used[key]!r} or "
                    f"{name!r}; write the whole name"
                )
            used[key], found[name] = name, table.rows[key][1]
    if not asked and "test" in sides and missing["test"] == sides["test"][1]:
        del sides["test"], missing["test"]
    for names in missing.values():
        if names:
            raise CnnlabError(
                f"{path}: {len(names)} images have no row in {labels}; the first: {names[0]!r}. "
                "Add rows, or move the images away"
            )
    for key, (line, _) in table.rows.items():
        if key not in used:
            raise CnnlabError(
                f"{path}: {labels}, line {line}: there is no image {key!r}"
                f"{did_you_mean(key, found) if len(found) < 10_000 else ''}"
            )
    return found


def _cut(classes: Mapping[str, str], top: str, seed: int, part: float) -> dict[str, str]:
    """Name -> split: of each class the images whose hash of seed and name is least are for test."""
    members: dict[str, list[str]] = {}
    for name, label in classes.items():
        members.setdefault(label, []).append(name)

    def rank(name: str) -> bytes:
        return hashlib.sha256(b"%d " % seed + os.fsencode(name.removeprefix(top))).digest()

    split = dict.fromkeys(classes, "train")
    for names in members.values():
        # Both sides get one of each class where there are two.
        count = min(max(round(part * len(names)), 1), len(names) - 1)
        split |= dict.fromkeys(sorted(names, key=rank)[:count], "test")
    return split


def _bad(
    listed: Listing,
    chosen: Sequence[int],
    names: Sequence[str],
    problems: Mapping[str, str],
    view: View,
) -> dict[int, str]:
    """Position in `names` -> why the image can't be read; decodes all, unless that is known."""
    known = {i: problems[n] for i, n in enumerate(names) if n in problems}
    rest = [i for i in range(len(names)) if i not in known]
    digest = hashlib.sha256(repr((listed.stamp, dataclasses.astuple(view))).encode())
    for i in rest:
        digest.update(os.fsencode(names[i]) + b"\0")

    def find_bad() -> list[tuple[int, str]]:
        files = listed.files.take([chosen[i] for i in rest])
        return [(rest[i], why) for i, why in _streaming.scan(files, view).items()]

    found = _streaming.kept(f"scan-{digest.hexdigest()[:32]}", find_bad)
    return dict(sorted((known | {int(i): str(why) for i, why in found}).items()))


def _check_parts(path: Path, class_names: Sequence[str], parts: Mapping[str, Part]) -> None:
    """Refuses what can't be trained on.

    Raises:
        CnnlabError: fewer than two classes, one without images to train on, no test images, or a
            class name that can't be written.
    """
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CnnlabError(
                f"{path}: the class {name!r} is not named in UTF-8; rename it"
            ) from None
    if len(class_names) < 2:
        raise CnnlabError(
            f"{path}: expected at least two classes, found only {class_names[0]!r}. Each class is "
            "a folder; is this the folder above them?"
        )
    counts = np.bincount(parts["train"].labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if not count:
            raise CnnlabError(f"{path}: class {name!r} has no images that can be trained on")
    if not len(parts["test"].labels):
        raise CnnlabError(
            f"{path}: no test images are left; give more images, or raise data.test_part"
        )
