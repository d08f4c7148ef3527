"""Long evaluations in chunks, each of which is kept: after a kill they go on where they were."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnlab import parallel, record

Arrays = dict[str, np.ndarray]
"""Name -> an array with one entry an example."""


def collect(
    compute: Callable[[np.ndarray], Arrays],
    count: int,
    size: int,
    *,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> Arrays:
    """What `compute` finds for all examples, one chunk of them after another.

    Several processes share the chunks; each computes its own, and all have the whole result.

    Args:
        compute: the positions of a chunk's examples [n], in order -> arrays of `n` entries.
        count: how many examples there are.
        size: of a chunk, the last excepted.
        folder: where the chunks are kept until all are done; `None` keeps nothing. Each is written
            atomically, and read again by the next call that is about the same.
        about: everything on which the results depend, the model's parameters included, as plain
            JSON values. The version of the code and `size` are added.
    """
    place = folder and folder / _digest({**(about or {}), "size": size})

    def part(number: int) -> Arrays:
        positions = np.arange(number * size, min((number + 1) * size, count))
        file = place and place / f"{number:05}.npz"
        if file is not None and file.exists():
            with np.load(file, allow_pickle=False) as kept:
                return dict(kept)
        found: dict[str, Any] = {
            name: np.asarray(array) for name, array in compute(positions).items()
        }
        if file is not None:
            packed = io.BytesIO()
            np.savez(packed, **found)
            record.write_atomic(file, packed.getvalue())
        return found

    def filled(number: int) -> Arrays:  # as large as the others
        found, least = part(number), min((number + 1) * size, count) - number * size
        if least == min(size, count):
            return found
        rows = np.arange(min(size, count)) % least
        return {name: array[rows] for name, array in found.items()}

    parts = parallel.shared_out(filled, -(-count // size))
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def clear(folder: Path) -> None:
    """Removes what `collect` kept; call it once the result of all chunks is written."""
    # Where several processes share the folder, another may be at it.
    shutil.rmtree(folder, ignore_errors=parallel.several() or not folder.exists())


def _digest(about: Mapping[str, Any]) -> str:
    text = record.dump_json({**about, "code": record.code_version()["digest"]})
    return hashlib.sha256(text.encode()).hexdigest()[:16]
