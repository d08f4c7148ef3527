"""A data set that `cnnlab data pack` has written: images in shards of ArrayRecord, read at random.

A few large files instead of many small ones, which network and cloud disks read much faster. Beside
the shards `dataset.json` says what they hold; it is written last, so a folder that has it is whole.

A record is a header of eight bytes (`HEADER`: format, encoding, two zero bytes, the class number as
a little-endian int32) and the image: as the file that it was, as a JPEG, or as its pixels.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
import struct
import threading
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from cnnlab.data import _decoding, _streaming
from cnnlab.data._decoding import BadImageError, View
from cnnlab.data._source import SPLITS, check_split
from cnnlab.registry import Range
from cnnlab.types import CnnlabError, DatasetInfo, Examples, StreamedSource

FORMAT = 1
HEADER = struct.Struct("<BB2xi")
ENCODINGS = ("files", "jpeg", "raw")
"""What a record holds: the file as it was, a JPEG of `image_shape`, or pixels of that shape."""

METADATA = "dataset.json"

_MAX_OPEN = 64
# Random access: no reading ahead, and no threads of the reader's own below those of the pipeline.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True, eq=False)
class PackedImages:
    """One split in shards.

    Attributes:
        info: the data set.
        shards: path and digest of each.
        ends: [S] int64, number of examples up to the end of each shard.
        labels: [N] int32.
        fingerprint: 16 hex digits.
        view: what becomes of an image.
        raw: whether the records hold pixels.
    """

    info: DatasetInfo
    shards: tuple[tuple[str, str], ...]
    ends: np.ndarray
    labels: np.ndarray
    fingerprint: str
    view: View
    raw: bool

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: np.ndarray) -> Examples:
        """The examples at these positions, in this order: [n, H, W, C] uint8 and [n] int32.

        Raises:
            CnnlabError: a shard or an image in it can't be read.
        """
        images = np.empty((len(indices), *self.view.shape), np.uint8)
        shard_of = np.searchsorted(self.ends, indices, side="right")
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            first = self.ends[shard - 1] if shard else 0
            within = (indices[places] - first).tolist()
            path, digest = self.shards[shard]
            try:
                records = _reader(path, digest).read(within)
                for place, record in zip(places.tolist(), records, strict=True):
                    self._decode(record, int(self.labels[indices[place]]), images[place])
            # Of the reader (on a damaged or missing shard) and of our own format.
            except (RuntimeError, ValueError, IndexError, OSError, BadImageError) as error:
                raise CnnlabError(
                    f"{self.info.name}: cannot read {path}: {error}. Pack the data set anew"
                ) from error
        return Examples(images, self.labels[indices])

    def _decode(self, record: bytes, label: int, out: np.ndarray) -> None:
        if len(record) < HEADER.size:
            raise BadImageError(f"a record of {len(record)} bytes has no header")
        version, encoding, stored = HEADER.unpack_from(record)
        is_raw = encoding == ENCODINGS.index("raw")
        if version != FORMAT or stored != label or is_raw != self.raw:
            raise BadImageError(f"a record does not agree with {METADATA}")
        if not self.raw:
            _decoding.decode(io.BytesIO(memoryview(record)[HEADER.size :]), out, self.view)
            return
        pixels = np.frombuffer(record, np.uint8, offset=HEADER.size)
        if pixels.size != out.size:
            raise BadImageError(f"a record of {pixels.size} pixels, expected {out.size}")
        out.reshape(-1)[:] = pixels


def info(**fields: Any) -> DatasetInfo:
    """What the data set is; the arguments are those of `load` but for the split.

    Raises:
        CnnlabError: as `load`.
    """
    return load("train", **fields).info


def load(
    split: str,
    folder: str = "",
    size: Annotated[int, Range(0, 65536)] = 0,
    channels: int = 0,
    fit: str = "crop",
    interpolation: str = "bilinear",
) -> StreamedSource:
    """One split, in the order in which it was packed; a process looks at a folder once.

    Args:
        split: `"train"` or `"test"`.
        folder: what `cnnlab data pack` wrote, absolute or relative to `$CNNLAB_DATA` (which
            `--data-dir` sets), or to the current folder where that is not set.
        size: height and width in pixels that images are resized to; 0: as they were packed, which
            goes where they were packed with a size.
        channels: 3 for RGB, 1 for grey; 0: as packed, otherwise RGB.
        fit: `"crop"`, `"stretch"` or `"pad"`, as in the data set `image_folder`.
        interpolation: `"bilinear"` or `"bicubic"`, antialiased.

    Raises:
        CnnlabError: the folder is no packed data set or a part of it is missing or damaged, the
            package array_record is not installed, or a size is needed or differs from that of
            packed pixels.
    """
    check_split("array_record", split)
    if not folder:
        raise CnnlabError(
            "data.folder: expected a folder that `cnnlab data pack` wrote, got none, as in "
            "--config.data.folder=flowers_packed"
        )
    root = os.environ.get("CNNLAB_DATA") or "."
    path = Path(root).expanduser() / Path(folder).expanduser()
    library()
    return _loaded(path, _digest(path), size, channels, fit, interpolation)[split]


def library() -> Any:
    """The module of the package array_record.

    Raises:
        CnnlabError: it is not installed.
    """
    try:
        from array_record.python import array_record_module
    except ModuleNotFoundError as error:
        raise CnnlabError(
            "the data set 'array_record' needs a package that is not installed: "
            "pip install array-record"
        ) from error
    return array_record_module


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `dataset.json` says, checked against the files beside it.

    Raises:
        CnnlabError: it is missing, unreadable or of another format, or a file beside it is missing
            or has another length.
    """
    path = folder / METADATA
    try:
        metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = metadata["format"]
    except FileNotFoundError as error:
        raise CnnlabError(
            f"no packed data set in {folder}: there is no {METADATA}. `cnnlab data pack FOLDER "
            f"{folder}` makes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CnnlabError(f"{path} is damaged: {error}. Pack the data set anew") from error
    if version != FORMAT:
        raise CnnlabError(
            f"{path} is of format {version}, this version of cnnlab reads {FORMAT}. Pack the data "
            "set anew"
        )
    try:
        for split in SPLITS:
            for entry in metadata["splits"][split]["shards"]:
                status = (folder / entry["file"]).stat()
                if status.st_size != entry["bytes"]:
                    raise CnnlabError(
                        f"{folder / entry['file']} is damaged: it has {status.st_size} bytes, "
                        f"expected {entry['bytes']}. Copy it again, or pack the data set anew"
                    )
    except OSError as error:
        raise CnnlabError(
            f"{error.filename} is missing ({error.strerror}). Copy it again, or pack the data set "
            "anew"
        ) from error
    except (KeyError, TypeError) as error:
        raise CnnlabError(f"{path} is damaged: {error!r}. Pack the data set anew") from error
    return metadata


def open_split(folder: Path, metadata: dict[str, Any], split: str, view: View) -> PackedImages:
    """One split, with the statistics that the metadata hold.

    Raises:
        CnnlabError: the file of labels is missing or damaged.
    """
    entry = metadata["splits"][split]
    labels_path = folder / entry["labels"]["file"]
    try:
        content = labels_path.read_bytes()
    except OSError as error:
        raise CnnlabError(
            f"cannot read {labels_path}: {error.strerror}. Copy it again, or pack the data set anew"
        ) from error
    if hashlib.sha256(content).hexdigest() != entry["labels"]["sha256"]:
        raise CnnlabError(f"{labels_path} is damaged. Copy it again, or pack the data set anew")
    shards = entry["shards"]
    digest = hashlib.sha256(repr((FORMAT, dataclasses.astuple(view))).encode())
    digest.update(repr((metadata["class_names"], [s["sha256"] for s in shards])).encode())
    return PackedImages(
        info=DatasetInfo(
            name=f"array_record:{metadata['name']}",
            image_shape=view.shape,
            class_names=tuple(metadata["class_names"]),
            mean=tuple(metadata["mean"] or ()),
            std=tuple(metadata["std"] or ()),
            license="see where the images come from",
            homepage="",
        ),
        shards=tuple((str(folder / s["file"]), s["sha256"]) for s in shards),
        ends=np.cumsum([s["examples"] for s in shards]),
        labels=np.load(io.BytesIO(content), allow_pickle=False),
        fingerprint=digest.hexdigest()[:16],
        view=view,
        raw=metadata["encoding"] == "raw",
    )


def _digest(folder: Path) -> str:
    """Of the metadata, so that a set packed anew in one process is not taken for the old one."""
    path = folder / METADATA
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@functools.lru_cache(maxsize=16)
def _loaded(
    folder: Path, digest: str, size: int, channels: int, fit: str, interpolation: str
) -> dict[str, PackedImages]:
    metadata = read_metadata(folder)
    packed = metadata["image_shape"]
    if not packed and not size:
        raise CnnlabError(
            f"data.size: the images of {folder} were packed as they were, of any size; expected a "
            "size in pixels, as in --config.data.size=224"
        )
    view = View(size or packed[0], fit, channels or (packed[2] if packed else 3), interpolation)
    if metadata["encoding"] == "raw" and list(view.shape) != packed:
        raise CnnlabError(
            f"data.size and data.channels: {folder} holds pixels of shape {packed}, asked for "
            f"{list(view.shape)}. Leave both out, or pack the data set anew"
        )
    sources = {split: open_split(folder, metadata, split, view) for split in SPLITS}
    if list(view.shape) != packed:  # else the statistics stand in the metadata
        known = _streaming.info_with_moments(sources["train"])
        sources = {s: dataclasses.replace(each, info=known) for s, each in sources.items()}
    return sources


class _Readers(threading.local):
    """Open shards of one thread: a reader is not meant to be shared, and costs an index to open."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.opened: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()


_readers = _Readers()


def _reader(path: str, digest: str) -> Any:
    if _readers.process != os.getpid():  # what a fork copied shares its place in the file
        _readers.__init__()  # type: ignore[misc]
    opened, key = _readers.opened, (path, digest)
    if key not in opened:
        while len(opened) >= _MAX_OPEN:
            opened.popitem(last=False)[1].close()
        opened[key] = library().ArrayRecordReader(path, _READER_OPTIONS)
    opened.move_to_end(key)
    return opened[key]
