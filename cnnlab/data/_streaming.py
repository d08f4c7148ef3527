"""Splits whose images stay in their files: read in order by threads, scanned, measured, kept."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnnlab.data import _decoding
from cnnlab.data._archives import Files
from cnnlab.data._decoding import BadImageError, View
from cnnlab.data._source import channel_moments
from cnnlab.types import CnnlabError, CnnlabWarning, DatasetInfo, Examples, StreamedSource

MAX_IMAGES_FOR_MOMENTS = 10_000
"""Mean and standard deviation are those of at most so many images, evenly spaced."""

_CHUNK = 64
_KEPT_FORMAT = 1

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
    """One split of encoded images, decoded as they are asked for.

    Attributes:
        info: the data set.
        files: one image each.
        labels: [N] int32.
        fingerprint: 16 hex digits.
        view: what becomes of an image.
    """

    info: DatasetInfo
    files: Files
    labels: np.ndarray
    fingerprint: str
    view: View

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: np.ndarray) -> Examples:
        """The examples at these positions, in this order: [n, H, W, C] uint8 and [n] int32.

        Raises:
            CnnlabError: an image can't be read (any more).
        """
        images = np.empty((len(indices), *self.view.shape), np.uint8)
        for position, index in enumerate(indices.tolist()):
            try:
                with self.files.open(index) as file:
                    _decoding.decode(file, images[position], self.view)
            except (OSError, BadImageError) as error:
                raise CnnlabError(
                    f"{self.info.name}: cannot read {self.files.names[index]!r}: {reason(error)}. "
                    "Has it changed since the run began? Repair it, or start again"
                ) from error
        return Examples(images, self.labels[indices])


def reason(error: Exception) -> str:
    """What is wrong with a file, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def in_order(
    function: Callable[[T], R], items: Iterable[T], threads: int | None = None
) -> Iterator[R]:
    """Maps by threads, a few items ahead of what is taken: memory stays bounded.

    Args:
        function: decodes or encodes, for which Pillow and zlib let other threads run.
        items: its arguments.
        threads: default one a core, at most eight.
    """
    count = threads or min(8, os.cpu_count() or 1)
    rest = iter(items)
    with ThreadPoolExecutor(count) as pool:
        ahead = collections.deque(
            pool.submit(function, item) for item in itertools.islice(rest, 2 * count)
        )
        try:
            while ahead:
                first = ahead.popleft()
                for item in itertools.islice(rest, 1):
                    ahead.append(pool.submit(function, item))
                yield first.result()
        finally:
            for future in ahead:
                future.cancel()


def progress(title: str, total: int, steps: Iterable[int]) -> None:
    """Runs through `steps`, each the items that it has done, with a bar if a person watches."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True, highlight=False, markup=False)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        for done in steps:
            bar.advance(task, done)


def scan(files: Files, view: View) -> dict[int, str]:
    """Decodes every image once: position -> why it can't be read, for those that can't.

    This finds all that makes reading fail later: files that are empty, truncated, of another
    format, too large or not readable. It does not find damage that still decodes, as of single
    bytes within a JPEG.
    """
    bad: dict[int, str] = {}

    def check(start: int) -> dict[int, str]:
        out = np.empty(view.shape, np.uint8)
        found = {}
        for index in range(start, min(start + _CHUNK, len(files.names))):
            try:
                with files.open(index) as file:
                    _decoding.decode(file, out, view)
            except (OSError, BadImageError) as error:
                found[index] = reason(error)
        return found

    def steps() -> Iterator[int]:
        for found in in_order(check, range(0, len(files.names), _CHUNK)):
            bad.update(found)
            yield _CHUNK

    progress("checking images", len(files.names), steps())
    return bad


def evenly_spaced(source: StreamedSource) -> Iterator[np.ndarray]:
    """Images of at most `MAX_IMAGES_FOR_MOMENTS` examples, in batches [B, H, W, C]."""
    count = min(len(source), MAX_IMAGES_FOR_MOMENTS)
    indices = np.arange(count) * len(source) // count
    chunks = [indices[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
    return in_order(lambda chunk: source.get(chunk).images, chunks)


def info_with_moments(source: StreamedSource) -> DatasetInfo:
    """The source's info with mean and standard deviation of its channels, measured once, kept."""

    def measure() -> list[tuple[float, ...]]:
        return list(channel_moments(evenly_spaced(source)))

    mean, std = kept(f"moments-{MAX_IMAGES_FOR_MOMENTS}-{source.fingerprint}", measure)
    return dataclasses.replace(source.info, mean=tuple(mean), std=tuple(std))


def cache_folder() -> Path:
    """Where what took long to find out is kept: `$CNNLAB_CACHE/data`, or under `~/.cache`."""
    folder = os.environ.get("CNNLAB_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "cnnlab") / "data"


def kept(key: str, make: Callable[[], Any]) -> Any:
    """What `make` returned the first time, as JSON.

    Args:
        key: file name; names all that the result depends on.
        make: is called if there is no readable file of this key.
    """
    path = cache_folder() / f"{key}.json"
    try:
        stored = json.loads(path.read_text())
        if stored["format"] == _KEPT_FORMAT:
            return stored["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or a damaged one, which the next lines replace
    value = json.loads(json.dumps(make()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"format": _KEPT_FORMAT, "value": value}, file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"cannot keep what was found of the data in {path.parent} "
            f"({error.strerror or error}), so the next run looks again; CNNLAB_CACHE names another "
            "folder",
            CnnlabWarning,
            stacklevel=2,
        )
    return value


def settle_bad(what: str, names: Sequence[str], bad: dict[int, str], policy: str) -> None:
    """Fails for files that can't be read, or says how many are left out.

    Args:
        what: the data set, for the message.
        names: of all files.
        bad: position -> reason.
        policy: `"fail"` or `"skip"`.

    Raises:
        CnnlabError: there are some and the policy is `"fail"`.
    """
    if not bad:
        return
    first = min(bad)
    told = f"{len(bad)} of {len(names)} images can't be read; the first: {names[first]!r}: "
    told += bad[first]
    if policy == "fail":
        raise CnnlabError(
            f"{what}: {told}. Repair or delete them (`cnnlab data scan` lists all), or leave them "
            "out with data.bad='skip'"
        )
    warnings.warn(f"{what}: {told}. They are left out", CnnlabWarning, stacklevel=2)
