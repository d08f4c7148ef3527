"""Packs a folder or an archive of images into shards of ArrayRecord, and looks a folder through.

What `pack` writes is what the data set `array_record` reads. It appears under its name when it is
whole: until then it lies beside it in `.NAME.partial`, which a killed pack leaves behind and the
next one replaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cnnlab import record
from cnnlab.data import _archives, _decoding, _streaming, array_record, image_folder
from cnnlab.data._decoding import View
from cnnlab.data._source import SPLITS, channel_moments
from cnnlab.data.image_folder import Found, Part
from cnnlab.types import CnnlabError

MEGABYTE = 10**6

# Groups of one record, so that reading one reads no other. JPEGs can't be compressed further, and
# pixels are kept plain so that reading them takes no more than copying.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` has written.

    Attributes:
        folder: where.
        examples: number of images by split.
        shards: number of files by split.
        bytes: of all shards together.
        left_out: name -> reason of the images that could not be read.
    """

    folder: Path
    examples: dict[str, int]
    shards: dict[str, int]
    bytes: int
    left_out: dict[str, str]


def pack(
    folder: Path,
    output: Path,
    *,
    size: int = 0,
    channels: int = 3,
    fit: str = "crop",
    interpolation: str = "bilinear",
    raw: bool = False,
    jpeg_quality: int = 0,
    shard_size: float = 256,
    **layout: Any,
) -> Packed:
    """Writes the images of a folder or an archive as shards.

    Without `size` each file is kept to the byte, to be resized as it is read. With it the images
    are resized now, and kept as pixels (`raw`, the fastest to read: size x size x channels bytes
    each) or as JPEGs of a quality.

    Args:
        folder: a folder, or a zip, tar or compressed tar archive.
        output: the folder to make.
        size: height and width in pixels; 0 keeps the files as they are.
        channels: 3 for RGB, 1 for grey; only with `size`.
        fit: `"crop"`, `"stretch"` or `"pad"`, as in the data set `image_folder`.
        interpolation: `"bilinear"` or `"bicubic"`, antialiased.
        raw: keep pixels.
        jpeg_quality: 1 to 100.
        shard_size: about so many megabytes a file.
        **layout: how the folder is read: `train_folder`, `test_folder`, `split_seed`, `test_part`,
            `labels`, `file_column`, `class_column`, `bad`, as in `image_folder.find`.

    Raises:
        CnnlabError: the arguments contradict each other, `output` exists, another process is
            packing into it, the package array_record is missing, or as `image_folder.find`.
    """
    array_record.library()
    output = Path(output)
    if not 0 <= jpeg_quality <= 100:
        raise CnnlabError(f"--jpeg-quality: expected 1 to 100, got {jpeg_quality}")
    if not shard_size > 0:
        raise CnnlabError(f"--shard-size: expected more than 0 megabytes, got {shard_size}")
    if bool(size) != (raw or jpeg_quality > 0) or (raw and jpeg_quality):
        raise CnnlabError(
            "resized images are kept either as pixels (--size N --raw) or as JPEGs (--size N "
            "--jpeg-quality 95); without --size the files stay as they are"
        )
    view = View(size or 224, fit, channels, interpolation)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CnnlabError(f"{output} exists already; delete it, or choose another folder")
    encoding = "raw" if raw else "jpeg" if jpeg_quality else "files"
    with _partial(output) as partial:
        source = _archives.decompressed(Path(folder), partial)
        found = image_folder.find(source, view, **layout)
        splits = {
            split: _write_split(partial, split, part, view, encoding, jpeg_quality, shard_size)
            for split, part in found.parts.items()
        }
        metadata: dict[str, Any] = {
            "format": array_record.FORMAT,
            "name": output.name,
            "class_names": found.class_names,
            "encoding": encoding,
            "jpeg_quality": jpeg_quality,
            "image_shape": view.shape if size else None,
            "mean": None,
            "std": None,
            "splits": splits,
            "left_out": found.bad,
        }
        if size:
            packed = array_record.open_split(partial, metadata, "train", view)
            moments = channel_moments(_streaming.evenly_spaced(packed))
            metadata |= dict(zip(("mean", "std"), moments, strict=True))
        if source != Path(folder):
            source.unlink()
        record.write_atomic(partial / array_record.METADATA, record.dump_json(metadata))
    return Packed(
        folder=output,
        examples={split: len(found.parts[split].labels) for split in SPLITS},
        shards={split: len(splits[split]["shards"]) for split in SPLITS},
        bytes=sum(shard["bytes"] for each in splits.values() for shard in each["shards"]),
        left_out=found.bad,
    )


@contextlib.contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, which becomes it if all goes well.

    Raises:
        CnnlabError: another process has it.
    """
    partial = output.parent / f".{output.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = partial.exists() and os.path.samestat(os.fstat(lock), partial.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise CnnlabError(f"another process is packing into {output}; wait for it")
        try:
            _clear(partial)  # what a killed pack has left
            yield partial
            _to_disk(partial)
            os.replace(partial, output)
            _to_disk(output.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_split(
    folder: Path,
    split: str,
    part: Part,
    view: View,
    encoding: str,
    jpeg_quality: int,
    shard_size: float,
) -> dict[str, Any]:
    """Writes shards and labels; returns the split's entry of the metadata."""
    kind = array_record.ENCODINGS.index(encoding)

    def encoded(index: int) -> bytes:
        with part.files.open(index) as file:
            if encoding == "files":
                content = file.read()
            else:
                pixels = np.empty(view.shape, np.uint8)
                _decoding.decode(file, pixels, view)
                raw = encoding == "raw"
                content = pixels.tobytes() if raw else _decoding.encode_jpeg(pixels, jpeg_quality)
        header = array_record.HEADER.pack(array_record.FORMAT, kind, int(part.labels[index]))
        return header + content

    shards: list[dict[str, Any]] = []

    def path() -> Path:
        return folder / f"{split}-{len(shards):05d}.array_record"

    def steps() -> Iterator[int]:
        writer, used, count = None, 0, 0
        for content in _streaming.in_order(encoded, range(len(part.labels))):
            if writer is not None and used + len(content) > shard_size * MEGABYTE:
                writer.close()
                shards.append(_shard(path(), count))
                writer = None
            if writer is None:
                writer = array_record.library().ArrayRecordWriter(str(path()), _WRITER_OPTIONS)
                used, count = 0, 0
            writer.write(content)
            used, count = used + len(content), count + 1
            yield 1
        if writer is not None:
            writer.close()
            shards.append(_shard(path(), count))

    _streaming.progress(f"packing {split}", len(part.labels), steps())
    buffer = io.BytesIO()
    np.save(buffer, part.labels)
    labels = f"{split}.labels.npy"
    record.write_atomic(folder / labels, buffer.getvalue())
    return {
        "examples": len(part.labels),
        "labels": {"file": labels, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
        "shards": shards,
    }


def _shard(path: Path, examples: int) -> dict[str, Any]:
    _to_disk(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": path.name,
        "examples": examples,
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def scan(folder: Path, **layout: Any) -> Found:
    """Looks a folder or an archive through and decodes every image.

    Args:
        folder: a folder or a zip or tar archive.
        **layout: as in `pack`, without `bad`.

    Raises:
        CnnlabError: as `image_folder.find`, but not for images that can't be read.
    """
    return image_folder.find(Path(folder), View(224), **layout, bad="tell")


def render(found: Found) -> list[Table]:
    """A table of classes with their images, one of sizes, and one of bad files if there are any."""
    counts = {
        split: np.bincount(part.labels, minlength=len(found.class_names))
        for split, part in found.parts.items()
    }
    classes = Table("class", title=found.name, title_justify="left")
    for split in SPLITS:
        classes.add_column(split, justify="right")
    for number, name in enumerate(found.class_names):
        classes.add_row(name, *(str(counts[split][number]) for split in SPLITS))
    classes.add_section()
    classes.add_row(
        f"{len(found.class_names)} classes", *(str(counts[split].sum()) for split in SPLITS)
    )
    tables = [classes]
    sizes = _dimensions(found)
    if len(sizes):
        pixels = Table("", "smallest", "median", "largest", title="sizes", title_justify="left")
        encoded = np.concatenate([part.sizes for part in found.parts.values()]) / 1000
        for name, values, form in (
            ("width (pixels)", sizes[:, 0], ".0f"),
            ("height (pixels)", sizes[:, 1], ".0f"),
            ("file (kB)", encoded, ".1f"),
        ):
            figures = np.quantile(values, (0, 0.5, 1))
            pixels.add_row(name, *(format(figure, form) for figure in figures))
        tables.append(pixels)
    if found.bad:
        title = f"{len(found.bad)} images can't be read"
        bad = Table("file", "reason", title=title, title_justify="left")
        for name, why in found.bad.items():
            bad.add_row(repr(name)[1:-1], why)
        tables.append(bad)
    return tables


def _dimensions(found: Found) -> np.ndarray:
    """[N, 2] width and height of all good images, from their headers."""

    def read(job: tuple[Part, int]) -> tuple[int, int]:
        part, index = job
        with part.files.open(index) as file:
            return _decoding.dimensions(file)

    jobs = ((part, i) for part in found.parts.values() for i in range(len(part.labels)))
    return np.array(list(_streaming.in_order(read, jobs))).reshape(-1, 2)
