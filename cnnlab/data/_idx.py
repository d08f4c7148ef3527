"""Reads IDX files, the format of MNIST and its descendants, plain or gzipped.

After LeCun, Cortes & Burges 1998, "The MNIST database of handwritten digits", "File formats": two
zero bytes, one byte for the type (0x08 is uint8), one for the number of dimensions, each dimension
as a big-endian uint32, then the elements, the last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from cnnlab.types import CnnlabError

GZIP_MAGIC = b"\x1f\x8b"
UINT8 = 0x08


def decompress(data: bytes, path: Path) -> bytes:
    """The content of a file that may be gzipped, which its first two bytes tell.

    Args:
        data: the file's bytes.
        path: the file, for the message.

    Raises:
        CnnlabError: the gzip stream is truncated or damaged.
    """
    if not data.startswith(GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise CnnlabError(
            f"{path} is a truncated or damaged gzip file of {len(data)} bytes ({error}). "
            "Fetch it again"
        ) from error


def decode(content: bytes, path: Path, *, ndim: int) -> np.ndarray:
    """The array in the bytes of a plain IDX file.

    Args:
        content: the file's bytes, decompressed.
        path: the file, for the message.
        ndim: the expected number of dimensions: 3 for images [N, H, W], 1 for labels [N].

    Returns:
        uint8, read-only.

    Raises:
        CnnlabError: the magic number, the number of dimensions or the length is wrong.
    """
    expected = bytes([0, 0, UINT8, ndim])
    header = 4 + 4 * ndim
    if content[:4] != expected or len(content) < header:
        raise CnnlabError(
            f"{path} is not an IDX file of {ndim}-dimensional uint8: expected it to begin with "
            f"{expected.hex(' ')} and {ndim} dimensions ({header} bytes), found "
            f"{content[:4].hex(' ') or 'nothing'} in {len(content)} bytes. Fetch it again"
        )
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) != header + math.prod(shape):
        raise CnnlabError(
            f"{path} is truncated or damaged: its header says {' x '.join(map(str, shape))} "
            f"elements, so {header + math.prod(shape)} bytes were expected, found "
            f"{len(content)}. Fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read(path: Path, *, ndim: int) -> np.ndarray:
    """The array in an IDX file, plain or gzipped; see `decompress` and `decode`."""
    return decode(decompress(path.read_bytes(), path), path, ndim=ndim)
