"""Batches as a function of (seed, step), from data that lives on the device.

A run sees an endless stream of examples: the training split in a new order each epoch. Step t takes
the examples t·B to (t + 1)·B of that stream, so nothing is dropped at the end of an epoch and a
resumed run needs only its step. Data sets that fit are put on the devices once, as uint8; what
travels each step is B indices.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from cnnlab import keys, parallel, registry
from cnnlab.types import CnnlabError, DatasetInfo, Examples, Source, fingerprint


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, on the host and on the devices of a mesh.

    Attributes:
        info: the data set.
        examples: on the host.
        images: [N, H, W, C] uint8, on every device.
        labels: [N] int32, on every device.
        fingerprint: SHA-256 of the examples, 16 digits.
    """

    info: DatasetInfo
    examples: Examples
    images: jax.Array
    labels: jax.Array
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples.labels)


@functools.lru_cache(maxsize=8)
def load(name: str, split: str, mesh: Mesh, **fields: object) -> Split:
    """Reads a split of a data set and puts it on the devices; the last eight stay there.

    Args:
        name: the data set's name in the registry.
        split: `"train"` or `"test"`.
        mesh: the devices.
        **fields: the source's own arguments.

    Raises:
        CnnlabError: the data set is unknown, missing or damaged.
    """
    plugin = registry.get("data", name)
    source: Source = plugin.function(split, **plugin.fields | fields)
    examples = source.get(np.arange(len(source)))
    everywhere = parallel.replicated(mesh)
    return Split(
        info=source.info,
        examples=examples,
        images=jax.device_put(examples.images, everywhere),
        labels=jax.device_put(examples.labels, everywhere),
        fingerprint=fingerprint(examples),
    )


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
        if number not in self._orders:
            key = keys.key(self.seed, "shuffle", number)
            order = self.train[np.asarray(jax.random.permutation(key, len(self.train)))]
            # A batch spans two epochs at most. Each stream keeps its own: many may run at once.
            for old in [n for n in self._orders if abs(n - number) > 1]:
                del self._orders[old]
            self._orders[number] = order
        return self._orders[number]

    def batch(self, step: int) -> np.ndarray:
        """The positions of the examples of one step, [B] int32."""
        first_example = step // self.replays * self.batch_size
        seen = (np.arange(self.batch_size) + first_example) // self.repeats
        epochs, places = np.divmod(seen, len(self.train))
        first, last = int(epochs[0]), int(epochs[-1])
        if first == last:
            return self.epoch(first)[places]
        return np.where(epochs == first, self.epoch(first)[places], self.epoch(last)[places])
