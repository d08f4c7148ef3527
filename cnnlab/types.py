"""The few shapes that all layers share.

Images are NHWC: uint8 at rest, float32 in [0, 1] at every public boundary. `B` is the batch size,
`C` the number of channels, `K` the number of classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Metric name -> (sum, count), both float32 scalars. Padding has weight 0 in both."""

PyTree = Any


class CnnlabError(Exception):
    """A mistake of the user's that the message explains: what, where, and what to do.

    The command line prints such a message without a traceback and exits with code 2.
    """


class CnnlabWarning(UserWarning):
    """Something that its user should know of, but that stops nothing; told without a traceback."""


@struct.dataclass
class Batch:
    """What one step sees.

    Attributes:
        images: [B, H, W, C] float32 in [0, 1].
        labels: [B] int32 class numbers, or [B, K] float32 class probabilities (soft labels).
        weights: [B] float32; 0 marks padding.
        masks: [B, H, W] int32 class number of each pixel, or None.
        boxes: [B, N, 4] float32 (top, left, bottom, right) in pixels from the image's corner, so
            that the whole image is (0, 0, H, W); or None.
    """

    images: jax.Array
    labels: jax.Array
    weights: jax.Array
    masks: jax.Array | None = None
    boxes: jax.Array | None = None


@struct.dataclass
class Outputs:
    """What a model returns.

    Attributes:
        logits: [B, K] float32.
        aux: logits of the auxiliary heads, each [B, K] float32; empty at inference.
        features: named activations (`stem`, `stage1`, ...), each [B, h, w, c].
    """

    logits: jax.Array
    aux: tuple[jax.Array, ...] = ()
    features: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class TrainState:
    """All that changes during training; nothing else is state.

    Attributes:
        step: int32 scalar, the number of updates done.
        params: trained parameters.
        batch_stats: running statistics of normalisation, `{}` where there is none.
        opt_state: the optimizer's state.
        ema: exponential moving averages, `{"params": ..., "batch_stats": ...}`, or `None`.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None


@struct.dataclass
class Hyper:
    """Numbers that may differ between runs without changing the compiled program.

    Every leaf is traced: all seeds of a row, and all rows that differ in these numbers only, share
    one compilation. `values` maps a config key (`optim.learning_rate`) to a float32 array of any
    shape; `hyper["optim.learning_rate"]` reads it.
    """

    values: dict[str, jax.Array]

    def __getitem__(self, key: str) -> jax.Array:
        return self.values[key]


class Examples(NamedTuple):
    """Some examples of a source: images [n, H, W, C] uint8 and labels [n] int32."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any image is read.

    Attributes:
        name: the name in the registry.
        image_shape: (H, W, C).
        class_names: one name a class, in the order of the label numbers.
        mean: per channel, of the training images in [0, 1].
        std: per channel, likewise.
        license: SPDX identifier or a short phrase.
        homepage: where the data comes from.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    homepage: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


class Source(Protocol):
    """One split of a data set with random access."""

    @property
    def info(self) -> DatasetInfo:
        """What the whole data set is."""

    def __len__(self) -> int:
        """The number of examples in this split."""

    def get(self, indices: np.ndarray) -> Examples:
        """The examples at these positions, in this order."""


@runtime_checkable
class StreamedSource(Source, Protocol):
    """A split that may be larger than memory: images are read as they are asked for.

    It can be pickled and is read by several threads and processes at once.
    """

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, known without reading an image."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the examples do, found without reading all of them."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A split that fits in memory.

    Attributes:
        info: the data set.
        images: [N, H, W, C] uint8.
        labels: [N] int32.
    """

    info: DatasetInfo
    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.shape[1:] != self.info.image_shape:
            raise ValueError(
                f"data set {self.info.name}: expected uint8 images of shape "
                f"[N, {', '.join(map(str, self.info.image_shape))}], got {self.images.dtype} "
                f"{self.images.shape}"
            )
        if self.labels.dtype != np.int32 or self.labels.shape != (len(self.images),):
            raise ValueError(
                f"data set {self.info.name}: expected int32 labels of shape [{len(self.images)}], "
                f"got {self.labels.dtype} {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def get(self, indices: np.ndarray) -> Examples:
        """The examples at these positions, in this order."""
        return Examples(self.images[indices], self.labels[indices])


def fingerprint(examples: Examples) -> str:
    """SHA-256 (16 hex digits) of images and labels: equal only for the same examples in order."""
    digest = hashlib.sha256()
    for array in (examples.images, examples.labels):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


Record = Mapping[str, Any]
"""One finished run as `result.json` holds it; `cnnlab.record` documents the fields."""
