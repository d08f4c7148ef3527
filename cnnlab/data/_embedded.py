"""Reads the data files that ship inside the package and notices when one is damaged."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from cnnlab.types import CnnlabError

FOLDER = Path(__file__).with_name("files")
"""Where the embedded data sets and their licences stand."""


def read(path: Path, *, size: int, sha256: str) -> np.lib.npyio.NpzFile:
    """Opens an embedded `.npz` file after checking it whole.

    The members are compressed with LZMA, which `numpy.load` reads though `numpy.savez` does not
    write it; a member is decoded when it is asked for, so a split costs only itself.

    Args:
        path: the file.
        size: its size in bytes.
        sha256: its SHA-256, 64 hex digits.

    Returns:
        The arrays by name.

    Raises:
        CnnlabError: the file is missing, unreadable, truncated or damaged.
    """
    remedy = "Reinstall cnnlab (pip install --force-reinstall cnnlab, or git checkout the file)"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CnnlabError(
            f"cannot read the embedded data file {path}: {error.strerror or error}; expected "
            f"{size} bytes. {remedy}"
        ) from error
    if len(data) != size:
        raise CnnlabError(
            f"the embedded data file {path} is damaged: expected {size} bytes, found "
            f"{len(data)}. {remedy}"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CnnlabError(
            f"the embedded data file {path} is damaged: expected SHA-256 {sha256}, found {found}. "
            f"{remedy}"
        )
    archive: np.lib.npyio.NpzFile = np.load(io.BytesIO(data), allow_pickle=False)
    return archive
