r"""Any image classification set of TensorFlow Datasets that has been prepared, without TensorFlow.

Reads through `tensorflow_datasets` and its random-access data source, so the set must have been
prepared as `array_record` (or `parquet`). Preparing most sets needs TensorFlow, once:

    pip install 'cnnlab[tfds]' tensorflow
    python -c "import tensorflow_datasets as t; \
        t.builder('mnist', file_format='array_record').download_and_prepare()"

Sets are looked for under `$CNNLAB_DATA` (which `--data-dir` sets), else where TFDS keeps them
(`$TFDS_DATA_DIR`, `~/tensorflow_datasets`). Images must all have one size.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from cnnlab.data import _streaming
from cnnlab.data._source import channel_moments, check_split
from cnnlab.registry import did_you_mean
from cnnlab.types import ArraySource, CnnlabError, DatasetInfo, Examples, Source

MAX_BYTES_IN_MEMORY = 2**30
"""A split of fewer bytes is decoded at once and kept; a larger one is decoded as it is read."""

MAX_IMAGES_FOR_MOMENTS = 10_000
_CHUNK = 1_000


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split, decoded on access.

    Attributes:
        info: the data set.
        records: the data source of TFDS: decoded examples by position.
        undecoded: the same with images left as bytes.
        identity: what tells this split's files from others; "" if that can't be told.
        split: the split's name or slice in TFDS, for messages.
        image_key: the feature that holds the image.
        label_key: the feature that holds the class number.
    """

    info: DatasetInfo
    records: Any
    undecoded: Any
    identity: str
    split: str
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32; reads all files the first time, without decoding an image.

        Raises:
            CnnlabError: an example can't be read, or has no valid label.
        """

        def read() -> list[int]:
            indices = range(len(self))
            found = [int(self._record(self.undecoded, i)[self.label_key]) for i in indices]
            for index, label in enumerate(found):
                self._check_label(index, label)
            return found

        key = hashlib.sha256(f"{self.identity}{self.split}{self.label_key}".encode()).hexdigest()
        found = _streaming.kept(f"labels-{key[:32]}", read) if self.identity else read()
        return np.array(found, np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the set's version and files, the split, its labels and its images."""
        about = (self.info.name, self.info.image_shape, self.info.class_names, self.identity)
        digest = hashlib.sha256(repr((*about, self.split, self.image_key)).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def get(self, indices: np.ndarray) -> Examples:
        """The examples at these positions, in this order: [n, H, W, C] uint8 and [n] int32.

        Raises:
            CnnlabError: an image has another size than the data set's, or no valid label.
        """
        images = np.empty((len(indices), *self.info.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for position, index in enumerate(indices):
            image, label = self._decode(int(index))
            if image.shape != self.info.image_shape:
                raise CnnlabError(
                    f"{self.info.name}: images of differing size: expected "
                    f"{_by(self.info.image_shape)}, image {index} of split {self.split!r} is "
                    f"{_by(image.shape)}. Use a set whose images all have one size, or prepare a "
                    "resized copy"
                )
            self._check_label(int(index), label)
            images[position], labels[position] = image, label
        return Examples(images, labels)

    def image_shape(self) -> tuple[int, ...]:
        """The shape of the first image."""
        return self._decode(0)[0].shape

    def _check_label(self, index: int, label: int) -> None:
        if not 0 <= label < self.info.num_classes:
            raise CnnlabError(
                f"{self.info.name}: example {index} of split {self.split!r} has label {label}, "
                f"expected 0 to {self.info.num_classes - 1}. Choose a labelled split"
            )

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        record = self._record(self.records, index)
        return np.asarray(record[self.image_key]), int(record[self.label_key])

    def _record(self, records: Any, index: int) -> Any:
        try:
            return records[index]
        except (RuntimeError, OSError, ValueError) as error:
            # Of array_record's reader, of pillow, and of TFDS's parser, in this order.
            raise CnnlabError(
                f"{self.info.name}: cannot read example {index} of split {self.split!r}: {error}. "
                "If its files are truncated or damaged, delete the set and prepare it again"
            ) from error


def info(
    dataset: str = "mnist",
    train_split: str = "train",
    test_split: str = "test",
    image_key: str = "image",
    label_key: str = "label",
) -> DatasetInfo:
    """What the data set is, from the metadata of its builder.

    Only the mean and the standard deviation need images: those of up to 10,000 training images,
    evenly spaced, read once a process. An image size that the metadata leave open is that of the
    first training image.

    Args:
        dataset: name in TFDS, `name[/config][:version]`.
        train_split: TFDS split or slice used as `"train"`, such as `"train[:90%]"`.
        test_split: TFDS split or slice used as `"test"`; not read here.
        image_key: the feature that holds the image.
        label_key: the feature that holds the class number.

    Raises:
        CnnlabError: TFDS is not installed, or the set is unknown, not prepared, or not one of
            uint8 images of one size with one class label each.
    """
    del test_split
    return _info(_data_dir(), dataset, train_split, image_key, label_key)


def load(
    split: str,
    dataset: str = "mnist",
    train_split: str = "train",
    test_split: str = "test",
    image_key: str = "image",
    label_key: str = "label",
) -> Source:
    """One split of a prepared set, in memory where it is smaller than 1 GiB.

    Args:
        split: `"train"` or `"test"`.
        dataset: name in TFDS, `name[/config][:version]`.
        train_split: TFDS split or slice used as `"train"`, such as `"train[:90%]"`.
        test_split: TFDS split or slice used as `"test"`; some sets call it `"validation"`.
        image_key: the feature that holds the image.
        label_key: the feature that holds the class number.

    Raises:
        CnnlabError: as `info`; also an unknown split, or an image of another size.
    """
    check_split("tfds", split)
    data_dir = _data_dir()
    known = _info(data_dir, dataset, train_split, image_key, label_key)
    name = train_split if split == "train" else test_split
    lazy = _source(
        _builder(data_dir, dataset), known, data_dir, dataset, name, image_key, label_key
    )
    if len(lazy) * math.prod(known.image_shape) >= MAX_BYTES_IN_MEMORY:
        return lazy
    return ArraySource(known, *lazy.get(np.arange(len(lazy))))


@functools.lru_cache(maxsize=16)
def _info(
    data_dir: str | None, dataset: str, train_split: str, image_key: str, label_key: str
) -> DatasetInfo:
    builder = _builder(data_dir, dataset)
    image_shape, class_names = _features(builder, dataset, image_key, label_key)
    bare = DatasetInfo(
        name=f"tfds:{dataset}",
        image_shape=image_shape,
        class_names=class_names,
        mean=(),
        std=(),
        license=builder.info.redistribution_info.license or "see the homepage",
        homepage=builder.info.homepage,
    )
    lazy = _source(builder, bare, data_dir, dataset, train_split, image_key, label_key)
    if None in image_shape:
        height, width, channels = lazy.image_shape()
        bare = dataclasses.replace(bare, image_shape=(height, width, channels))
        lazy = dataclasses.replace(lazy, info=bare)
    mean, std = channel_moments(_evenly_spaced(lazy))
    return dataclasses.replace(bare, mean=mean, std=std)


def _evenly_spaced(source: TfdsSource) -> Iterator[np.ndarray]:
    count = min(len(source), MAX_IMAGES_FOR_MOMENTS)
    indices = np.arange(count) * len(source) // count
    for start in range(0, count, _CHUNK):
        yield source.get(indices[start : start + _CHUNK]).images


def _data_dir() -> str | None:
    folder = os.environ.get("CNNLAB_DATA")
    return os.path.expanduser(folder) if folder else None


def _builder(data_dir: str | None, dataset: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise CnnlabError(
            f"the data set 'tfds' needs {error.name or 'tensorflow_datasets'}, which is not "
            "installed: pip install 'cnnlab[tfds]'"
        ) from error
    try:
        return tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        # Without community sets: listing those needs TensorFlow.
        known = tfds.list_builders(with_community_datasets=False)
        raise CnnlabError(
            f"TFDS data set {dataset!r} is neither known to TFDS{did_you_mean(dataset, known)} nor "
            f"prepared in {data_dir or 'its default folder'}"
        ) from error
    except Exception as error:
        # TFDS has a kind of its own for a malformed name, an unknown config or version and each
        # sort of damaged metadata, and documents none.
        reason = str(error).split("\n\n")[0]
        raise CnnlabError(
            f"TFDS cannot open the data set {dataset!r} (name[/config][:version]) in "
            f"{data_dir or 'its default folder'}: {reason}"
        ) from error


def _source(
    builder: Any,
    known: DatasetInfo,
    data_dir: str | None,
    dataset: str,
    split: str,
    image_key: str,
    label_key: str,
) -> TfdsSource:
    records, undecoded = (
        _records(builder, data_dir, dataset, split, key) for key in (image_key, "")
    )
    return TfdsSource(known, records, undecoded, _identity(builder), split, image_key, label_key)


def _identity(builder: Any) -> str:
    """Version, and names and sizes of the files; "" where they do not lie on this machine."""
    try:
        files = sorted((f.name, f.stat().st_size) for f in os.scandir(builder.data_dir))
    except OSError:
        return ""
    return repr((builder.info.full_name, files))


def _records(builder: Any, data_dir: str | None, dataset: str, split: str, image_key: str) -> Any:
    import tensorflow_datasets as tfds

    # Other images (masks, depth) are not decoded: that costs time and may need more libraries.
    # Data sources do not support `PartialDecoding`, which would say this directly.
    skipped = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if key != image_key and isinstance(feature, tfds.features.Image)
    }
    try:
        return builder.as_data_source(split=split, decoders=skipped or None)
    except (NotImplementedError, AssertionError, KeyError) as error:
        # TFDS raises each of these for a set that is absent or prepared in another file format.
        place = f", data_dir={data_dir!r}" if data_dir else ""
        raise CnnlabError(
            f"TFDS data set {dataset!r} is not prepared for random access in {builder.data_dir}. "
            "Pass the folder that holds it with --data-dir, or prepare it once where TensorFlow "
            f'is installed: python -c "import tensorflow_datasets as t; t.builder({dataset!r}'
            f"{place}, file_format='array_record').download_and_prepare()\""
        ) from error
    except RuntimeError as error:
        raise CnnlabError(
            f"TFDS data set {dataset!r} in {builder.data_dir} is damaged: {error}. Delete that "
            "folder and prepare it again"
        ) from error
    except ValueError as error:
        known = list(builder.info.splits)
        raise CnnlabError(
            f"TFDS data set {dataset!r}: cannot read split {split!r}{did_you_mean(split, known)}: "
            f"{error} Set data.train_split and data.test_split"
        ) from error


def _features(
    builder: Any, dataset: str, image_key: str, label_key: str
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """The image shape (None where open) and the class names."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    for key, kind, field in (
        (image_key, tfds.features.Image, "image_key"),
        (label_key, tfds.features.ClassLabel, "label_key"),
    ):
        others = ", ".join(map(repr, features))
        if key not in features:
            raise CnnlabError(
                f"TFDS data set {dataset!r} has no feature {key!r}{did_you_mean(key, features)}: "
                f"it has {others}. Set data.{field}"
            )
        if not isinstance(features[key], kind):
            raise CnnlabError(
                f"TFDS data set {dataset!r}: expected feature {key!r} to be {kind.__name__}, it "
                f"is {type(features[key]).__name__}. Set data.{field} to another of {others}"
            )
    image, label = features[image_key], features[label_key]
    if np.dtype(image.np_dtype) != np.uint8:
        raise CnnlabError(
            f"TFDS data set {dataset!r}: expected uint8 images, {image_key!r} is "
            f"{np.dtype(image.np_dtype)}. Use a set of 8-bit images"
        )
    height, width, channels = image.shape
    return (height, width, channels), tuple(label.names)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
