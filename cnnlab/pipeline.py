"""Batches as a function of (seed, step), from data on the devices or streamed to them.

A run sees an endless stream of examples: the training split in a new order each epoch. Step t takes
the examples t·B to (t + 1)·B of that stream, so nothing is dropped at the end of an epoch and a
resumed run needs only its step.

Data sets that fit are put on the devices once, as uint8; what travels each step is B indices.
Larger ones are read by Grain, in threads or worker processes, some batches ahead; each host reads
only the examples of its own devices. Both ways give the same batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cnnlab import keys, parallel, registry
from cnnlab.types import CnnlabError, DatasetInfo, Examples, Source, StreamedSource, fingerprint

RESIDENT = "CNNLAB_RESIDENT"
"""Names the GiB up to which a split is kept on every device; 1 where it is not set."""

WORKERS = "CNNLAB_WORKERS"
"""Names how many processes read streamed images; 0, or not set: threads of this one."""

_CHUNK = 64
_BATCH_BYTES = 2**30
"""At most so much is read ahead."""


class Fed(NamedTuple):
    """What a compiled function takes of a split: a batch, or the whole and where the batch is.

    Attributes:
        images: [N, H, W, C] uint8 on every device; streamed: the batch, [..., B, H, W, C], split
            over the devices.
        labels: [N] int32; streamed: [..., B].
        indices: [..., B] int32; streamed: `None`.
    """

    images: jax.Array
    labels: jax.Array
    indices: np.ndarray | jax.Array | None


class Positions(Protocol):
    """Batches to be read: of each, which examples of the split; any number of leading axes."""

    def __len__(self) -> int:
        """How many batches."""

    def __getitem__(self, number: int) -> np.ndarray:
        """The positions of a batch, [..., B] int32."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set.

    Attributes:
        source: reads it.
        labels: [N] int32, on the host.
        fingerprint: 16 hex digits that tell its examples from all others.
        mesh: the devices.
        resident: images and labels on every device, or `None` where they are streamed.
    """

    source: Source
    labels: np.ndarray
    fingerprint: str
    mesh: Mesh
    resident: tuple[jax.Array, jax.Array] | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def info(self) -> DatasetInfo:
        """The data set."""
        return self.source.info

    def get(self, positions: np.ndarray) -> Examples:
        """The examples at these positions, on the host: [n, H, W, C] uint8 and [n] int32."""
        return _parallel_get(self.source, np.asarray(positions))

    def first(self, count: int) -> Examples:
        """The first examples, or all where there are fewer."""
        return self.get(np.arange(min(count, len(self))))

    def fed(self, positions: np.ndarray) -> Fed:
        """What the compiled functions take of one batch, read now."""
        return next(self.feed([positions]))

    def feed(self, batches: Positions) -> Iterator[Fed]:
        """What the compiled functions take, batch by batch.

        Streamed batches are read and sent to the devices ahead of their use; close the iterator to
        end that early.
        """
        if self.resident is None:
            return _streamed(self.source, batches, self.mesh)
        images, labels = self.resident
        return (Fed(images, labels, batches[number]) for number in range(len(batches)))

    def with_images(self, images: np.ndarray | Source) -> Split:
        """The same split with other images.

        Args:
            images: [N, H, W, C] uint8, which are put on the devices, or what reads them.
        """
        if not isinstance(images, np.ndarray):
            return dataclasses.replace(self, source=images, resident=None)
        everywhere = parallel.replicated(self.mesh)
        labels = parallel.put(self.labels, everywhere) if not self.resident else self.resident[1]
        return dataclasses.replace(
            self,
            source=_InMemory(self.info, Examples(images, self.labels)),
            resident=(parallel.put(images, everywhere), labels),
        )


def load(name: str, split: str, mesh: Mesh, **fields: object) -> Split:
    """A split of a data set, on the devices if it is small enough; the last eight stay there.

    `CNNLAB_RESIDENT` says how many GiB are small enough.

    Args:
        name: the data set's name in the registry.
        split: `"train"` or `"test"`.
        mesh: the devices.
        **fields: the source's own arguments.

    Raises:
        CnnlabError: the data set is unknown, missing or damaged.
    """
    return _load(name, split, mesh, int(_number(RESIDENT, 1.0) * 2**30), **fields)


@functools.lru_cache(maxsize=8)
def _load(name: str, split: str, mesh: Mesh, limit: int, **fields: object) -> Split:
    plugin = registry.get("data", name)
    source: Source = plugin.function(split, **plugin.fields | fields)
    small = len(source) * math.prod(source.info.image_shape) <= limit
    if isinstance(source, StreamedSource):
        told = source.fingerprint
        if not small:
            return Split(source, source.labels, told, mesh, None)
        examples = _parallel_get(source, np.arange(len(source)))
    else:
        examples = source.get(np.arange(len(source)))
        told = fingerprint(examples)
    whole = Split(_InMemory(source.info, examples), examples.labels, told, mesh, None)
    return whole.with_images(examples.images) if small else whole


def _number(variable: str, default: float) -> float:
    """A number of at least 0 from the environment."""
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise CnnlabError(f"{variable}: expected a number of at least 0, got {text!r}")
    return value


@dataclasses.dataclass(frozen=True)
class _InMemory:
    info: DatasetInfo
    examples: Examples

    def __len__(self) -> int:
        return len(self.examples.labels)

    def get(self, indices: np.ndarray) -> Examples:
        return Examples(self.examples.images[indices], self.examples.labels[indices])


def _parallel_get(source: Source, positions: np.ndarray) -> Examples:
    """Reads examples in threads: decoding lets go of Python's lock."""
    if isinstance(source, _InMemory) or len(positions) <= _CHUNK:
        return source.get(positions)
    parts = [positions[at : at + _CHUNK] for at in range(0, len(positions), _CHUNK)]
    images = np.empty((len(positions), *source.info.image_shape), np.uint8)
    labels = np.empty(len(positions), np.int32)

    def read(number: int) -> None:
        at = slice(number * _CHUNK, number * _CHUNK + len(parts[number]))
        images[at], labels[at] = source.get(parts[number])

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(parts))):  # raises what a thread raised
            pass
    return Examples(images, labels)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What Grain's threads and processes run: the part of a batch that belongs to this host."""

    source: Source
    batches: Positions
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        positions = self.batches[number][..., self.rows]
        images, labels = self.source.get(positions.ravel())
        return images.reshape(*positions.shape, *images.shape[1:]), labels.reshape(positions.shape)


def _streamed(source: Source, batches: Positions, mesh: Mesh) -> Iterator[Fed]:
    """Reads batches with Grain and sends them to the devices, one ahead of its use."""
    if not len(batches):
        return
    shape = batches[0].shape
    split = parallel.split_axis(mesh, len(shape) - 1)
    reader = _Reader(source, batches, parallel.local_rows(mesh, shape[-1]))
    ahead: Fed | None = None
    with contextlib.closing(_read_ahead(reader)) as read:
        for images, labels in read:
            fed = Fed(
                parallel.put(images, split, (*shape, *images.shape[len(shape) :])),
                parallel.put(labels, split, shape),
                None,
            )
            if ahead is not None:
                yield ahead
            ahead = fed
    if ahead is not None:
        yield ahead


def _read_ahead(reader: _Reader) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    import grain  # a second that only streamed data need

    size = max(1, len(reader.rows) * math.prod(reader.source.info.image_shape))
    ahead = int(min(max(_BATCH_BYTES // size, 2), 16))
    workers = int(_number(WORKERS, 0))
    threads = min(ahead, 2 if workers else max(os.cpu_count() or 1, 2))
    data = grain.MapDataset.source(reader).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if not workers else 2)
    )
    if workers:
        from absl import flags

        # Grain hands the flags of absl to its workers, and fails where nobody has read them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        data = data.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_begin_worker,
        )
    yield from data


def _begin_worker(number: int, workers: int) -> None:
    """Keeps a worker, which computes the order of examples, off the accelerator."""
    del number, workers
    jax.config.update("jax_platforms", "cpu")


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The order in which one run sees the training split.

    Attributes:
        seed: of the run.
        train: [n] int32, positions in the split that are trained on.
        validation: [v] int32, positions held out, ascending.
        batch_size: examples a step.
        repeats: how often an example comes in a row (Hoffer et al. 2020, "Augment your batch").
        replays: how many steps in a row see the same batch (Shafahi et al. 2019).
    """

    seed: int
    train: np.ndarray
    validation: np.ndarray
    batch_size: int
    repeats: int = 1
    replays: int = 1
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def make(
        cls,
        *,
        seed: int,
        size: int,
        validation: float,
        batch_size: int,
        repeats: int = 1,
        replays: int = 1,
    ) -> Stream:
        """Cuts the held-out part from `size` examples by seed.

        Args:
            seed: of the run.
            size: examples of the whole training split.
            validation: part of them held out, 0 to 0.5.
            batch_size: examples a step.
            repeats: how often an example comes in a row.
            replays: how many steps in a row see the same batch.

        Raises:
            CnnlabError: less than one batch is left to train on, or a part held out is so small
                that it has no example.
        """
        order = np.asarray(jax.random.permutation(keys.key(seed, "split"), size), np.int32)
        held_out = round(size * validation)
        if validation > 0 and not held_out:
            raise CnnlabError(
                f"data.validation: {validation:g} of {size} examples is none; give 0, or at least "
                f"{1 / size:.2g}"
            )
        if size - held_out < batch_size:
            raise CnnlabError(
                f"train.batch_size: expected at most the {size - held_out} training examples, got "
                f"{batch_size}"
            )
        train, validation_part = np.sort(order[held_out:]), np.sort(order[:held_out])
        return cls(seed, train, validation_part, batch_size, repeats, replays)

    def epoch(self, number: int) -> np.ndarray:
        """The training positions in the order of one epoch, [n] int32."""
        order = self._orders.get(number)
        if order is None:
            key = keys.key(self.seed, "shuffle", number)
            order = self.train[np.asarray(jax.random.permutation(key, len(self.train)))]
            # A batch spans two epochs at most, and several threads ask for batches near each other.
            for old in [n for n in tuple(self._orders) if abs(n - number) > 2]:
                self._orders.pop(old, None)
            self._orders[number] = order
        return order

    def batch(self, step: int) -> np.ndarray:
        """The positions of the examples of one step, [B] int32."""
        first_example = step // self.replays * self.batch_size
        seen = (np.arange(self.batch_size) + first_example) // self.repeats
        epochs, places = np.divmod(seen, len(self.train))
        first, last = int(epochs[0]), int(epochs[-1])
        if first == last:
            return self.epoch(first)[places]
        return np.where(epochs == first, self.epoch(first)[places], self.epoch(last)[places])


@dataclasses.dataclass(frozen=True)
class Steps:
    """The batches of updates `start` to `stop` of one run, or of several side by side.

    Attributes:
        streams: of the runs; several give batches with a leading axis.
        start: the first update.
        stop: the one after the last.
    """

    streams: Sequence[Stream]
    start: int
    stop: int

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, number: int) -> np.ndarray:
        """The positions of a batch, [B] or [runs, B] int32."""
        batches = [stream.batch(self.start + number) for stream in self.streams]
        return np.stack(batches) if len(batches) > 1 else batches[0]
