"""The files of a folder, a zip or a tar archive: listed once, then read at random.

Archives are read in place and nothing is ever unpacked by a member's name. A member that names a
place outside, a link or a device makes the whole archive refused. Every read opens the file anew:
so what is here can be pickled and used by any number of threads and processes.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from cnnlab.types import CnnlabError

MAX_FILE_BYTES = 2**28
"""A file that declares more bytes (256 MiB) is no photograph, but perhaps a zip bomb."""

_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}


class Names(Sequence[str]):
    """Many file names in two arrays.

    A list of a million strings is copied into every worker process bit by bit, as each look changes
    its reference count; these two are not.

    Args:
        names: as `os.fsdecode` gives them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class Files(Protocol):
    """Some files by position."""

    @property
    def names(self) -> Sequence[str]:
        """Of each; parts are separated by `/`."""

    def open(self, index: int) -> BinaryIO:
        """The content of a file.

        Raises:
            OSError: it can't be read, with the reason.
        """

    def take(self, positions: Sequence[int]) -> Files:
        """Those at these positions, in this order."""


@dataclasses.dataclass(frozen=True, eq=False)
class FolderFiles:
    """Files below a folder.

    Attributes:
        root: the folder.
        names: relative to it.
    """

    root: str
    names: Names

    def open(self, index: int) -> BinaryIO:
        """The content of a file."""
        return open(f"{self.root}/{self.names[index]}", "rb")

    def take(self, positions: Sequence[int]) -> FolderFiles:
        """Those at these positions, in this order."""
        return FolderFiles(self.root, Names([self.names[i] for i in positions]))


@dataclasses.dataclass(frozen=True, eq=False)
class ArchiveFiles:
    """Members of a zip or tar archive.

    Attributes:
        path: the archive.
        names: of the members.
        extents: [n, 4] int64: offset (of a zip's local header), bytes stored, bytes of the content,
            CRC-32 of the content (-1 where the archive has none).
        deflated: [n] bool, whether the stored bytes are a deflate stream.
        is_zip: whether a local header comes before the stored bytes.
    """

    path: str
    names: Names
    extents: np.ndarray
    deflated: np.ndarray
    is_zip: bool

    def open(self, index: int) -> BinaryIO:
        """The content of a member."""
        offset, stored, size, crc = map(int, self.extents[index])
        with open(self.path, "rb", buffering=0) as archive:
            archive.seek(offset)
            if self.is_zip:
                header = archive.read(_ZIP_LOCAL_HEADER.size)
                if len(header) < _ZIP_LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                    raise OSError("the archive is damaged: no header where its index says")
                _, name, extra = _ZIP_LOCAL_HEADER.unpack(header)
                archive.seek(name + extra, os.SEEK_CUR)
            content = archive.read(stored)
        if self.deflated[index]:
            try:
                # No more than declared (and one byte, which shows that there was more).
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise OSError(f"the archive is damaged: {error}") from error
        if len(content) != size or (crc >= 0 and zlib.crc32(content) != crc):
            raise OSError("the archive is damaged: the content is not what its index says")
        return io.BytesIO(content)

    def take(self, positions: Sequence[int]) -> ArchiveFiles:
        """Those at these positions, in this order."""
        chosen = np.asarray(positions, np.int64)
        return ArchiveFiles(
            self.path,
            Names([self.names[i] for i in positions]),
            self.extents[chosen],
            self.deflated[chosen],
            self.is_zip,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """What a folder or an archive holds, hidden files left out.

    Attributes:
        path: of the folder or archive.
        files: all regular files, sorted by name; parts of a name are separated by `/`.
        sizes: [n] int64, bytes of each.
        folders: names of all folders.
        problems: name -> why this file can't be read, for those where that shows at once.
        stamp: digest of what tells that something has changed on this machine since.
    """

    path: Path
    files: Files
    sizes: np.ndarray
    folders: frozenset[str]
    problems: dict[str, str]
    stamp: str


def listing(path: Path) -> Listing:
    """Lists a folder, a zip or a tar archive.

    Names that begin with a dot and `__MACOSX` are left out. Links of a folder are followed.

    Raises:
        CnnlabError: it does not exist, is none of these, is damaged, is compressed as a whole, or
            holds what must not be read: links that make a loop, members that would leave their
            folder, links and devices in archives, members of one name, encrypted ones.
    """
    try:
        if path.is_dir():
            return _folder(path)
        with open(path, "rb") as file:
            head = file.read(6)
        if any(head.startswith(magic) for magic in _COMPRESSED):
            raise CnnlabError(
                f"{path} is compressed as a whole, so no file in it can be read by itself: unpack "
                f"it first, or pack it: cnnlab data pack {path} OUTPUT"
            )
        if zipfile.is_zipfile(path):
            return _zip(path)
        if tarfile.is_tarfile(path):
            return _tar(path)
    except FileNotFoundError as error:
        raise CnnlabError(f"no folder or archive {error.filename or path}") from error
    except OSError as error:
        raise CnnlabError(
            f"cannot list {error.filename or path}: {error.strerror or error}"
        ) from error
    except ValueError as error:  # a null character
        raise CnnlabError(f"cannot list {str(path)!r}: {error}") from error
    raise CnnlabError(f"{path} is neither a folder nor a zip or tar archive")


def decompressed(path: Path, folder: Path) -> Path:
    """A tar archive that is compressed as a whole, unpacked to a plain one in a folder.

    Any other path is returned as it is.

    Raises:
        CnnlabError: the compressed stream is damaged.
    """
    if not path.is_file():
        return path
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, opened in _COMPRESSED.items():
        if head.startswith(magic):
            target = folder / f"{re.sub(r'[.](tgz|tar[.][a-z0-9]+)$', '', path.name)}.tar"
            try:
                with opened(path) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out, 2**20)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
                raise CnnlabError(f"{path} is truncated or damaged: {error}") from error
            return target
    return path


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _made(
    path: Path,
    found: dict[str, tuple[int, int]],
    folders: set[str],
    problems: dict[str, str],
    files: Callable[[list[str]], Files],
) -> Listing:
    """A listing of `found`: name -> (bytes, time of the last change)."""
    names = sorted(found)
    for name in names:
        if found[name][0] > MAX_FILE_BYTES:
            problems[name] = f"it has {found[name][0]} bytes, the limit is {MAX_FILE_BYTES}"
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path)))
    for name in names:
        digest.update(os.fsencode(name) + b"\0%d %d\0" % found[name])
    sizes = np.array([found[name][0] for name in names], np.int64)
    return Listing(path, files(names), sizes, frozenset(folders), problems, digest.hexdigest())


def _folder(root: Path) -> Listing:
    found: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    problems: dict[str, str] = {}

    def visit(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise CnnlabError(
                f"{folder} is a link to a folder that it lies in, which has no end: delete it"
            )
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if _hidden(entry.name):
                    continue
                try:
                    status = entry.stat()
                except OSError as error:  # a link to nowhere, or to itself
                    found[name] = (0, 0)
                    problems[name] = error.strerror or str(error)
                    continue
                if stat.S_ISDIR(status.st_mode):
                    folders.add(name)
                    visit(entry.path, f"{name}/", (*above, here))
                    continue
                found[name] = (status.st_size, status.st_mtime_ns)
                if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
                    problems[name] = "it is no regular file"

    visit(str(root), "", ())
    return _made(root, found, folders, problems, lambda names: FolderFiles(str(root), Names(names)))


def _checked_name(path: Path, name: str, taken: dict[str, tuple[int, int]]) -> str:
    """The name of a member without a leading `./`.

    Raises:
        CnnlabError: it leads out of the archive, or is there already.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        raise CnnlabError(
            f"{path}: member {name!r} leads out of the archive; nothing of it is read. Get the "
            "archive from a source that you trust"
        )
    clean = "/".join(part for part in name.split("/") if part not in ("", "."))
    if clean in taken:
        raise CnnlabError(f"{path} holds {clean!r} twice; make the archive anew")
    return clean


def _parents(name: str) -> set[str]:
    parts = name.split("/")
    return {"/".join(parts[:n]) for n in range(1, len(parts))}


def _archive(
    path: Path,
    rows: dict[str, tuple[int, int, int, int, bool]],
    found: dict[str, tuple[int, int]],
    folders: set[str],
    problems: dict[str, str],
    *,
    is_zip: bool,
) -> Listing:
    def files(names: list[str]) -> ArchiveFiles:
        extents = np.array([rows[name][:4] for name in names], np.int64).reshape(-1, 4)
        deflated = np.array([rows[name][4] for name in names], bool)
        return ArchiveFiles(str(path), Names(names), extents, deflated, is_zip)

    for name in found:
        folders |= _parents(name)
    return _made(path, found, folders, problems, files)


def _zip(path: Path) -> Listing:
    rows: dict[str, tuple[int, int, int, int, bool]] = {}
    found: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    problems: dict[str, str] = {}
    changed = path.stat().st_mtime_ns
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CnnlabError(f"{path} is a damaged zip archive: {error}") from error
    for member in members:
        name = _checked_name(path, member.filename, found)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise CnnlabError(
                f"{path}: member {member.filename!r} is a link or a device; nothing of the archive "
                "is read. Make it anew with the files themselves"
            )
        if member.is_dir():
            if name and not _hidden(name):
                folders |= {name, *_parents(name)}
            continue
        if _hidden(name):
            continue
        found[name] = (member.file_size, changed)
        if member.flag_bits & 0x1:
            problems[name] = "it is encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problems[name] = "it is compressed in another way than deflate"
        rows[name] = (
            member.header_offset,
            member.compress_size,
            member.file_size,
            member.CRC,
            member.compress_type == zipfile.ZIP_DEFLATED,
        )
    return _archive(path, rows, found, folders, problems, is_zip=True)


def _tar(path: Path) -> Listing:
    rows: dict[str, tuple[int, int, int, int, bool]] = {}
    found: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    changed = path.stat().st_mtime_ns
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = _checked_name(path, member.name, found)
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise CnnlabError(
                        f"{path}: member {member.name!r} is a link, a device or sparse; nothing of "
                        "the archive is read. Make it anew with the files themselves (tar -h)"
                    )
                if not name or _hidden(name):
                    continue
                if member.isdir():
                    folders |= {name, *_parents(name)}
                    continue
                end = max(end, member.offset_data + member.size)
                found[name] = (member.size, changed)
                rows[name] = (member.offset_data, member.size, member.size, -1, False)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise CnnlabError(f"{path} is a damaged tar archive: {error}") from error
    if end > path.stat().st_size:
        raise CnnlabError(f"{path} is truncated: its last file ends at byte {end}")
    return _archive(path, rows, found, folders, {}, is_zip=False)
