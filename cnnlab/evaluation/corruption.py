"""Corrupted test sets: how much of a score survives noise, blur, weather and compression.

Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR: fifteen corruptions in five severities, with the constants of ImageNet-C and
CIFAR-10-C, and the mean corruption error against a baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np

from cnnlab.evaluation import _corruptions
from cnnlab.types import CnnlabError, DatasetInfo, Examples, Source

Scale = Literal["auto", "small", "large"]

CORRUPTIONS: tuple[str, ...] = tuple(_corruptions.TABLE)
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, row in _corruptions.TABLE.items() if row.group == group)
    for group in ("noise", "blur", "weather", "digital")
}

NOTES: tuple[str, ...] = (
    "Corruptions after Hendrycks & Dietterich 2019, with CIFAR-10-C's constants up to 64 pixels a "
    "side and ImageNet-C's above, drawn anew: scores are comparable within this table, not with "
    "those on the published sets.",
    "Frost blends synthetic textures of the same mean colours and contrasts: the licence of the "
    "original's photographs does not let us ship them.",
    "Glass blur copies near pixels, as the published sets do, where the paper means to swap them.",
)
"""What a table with a corrupted column says below it."""

SMALL_SIDE = 64
CACHE_BYTES = 2**32

_VALUES_AT_ONCE = 2**16  # half a MiB of float64, so that a chunk's temporaries stay in the cache

_cache: dict[tuple[str, tuple[int, ...], str, int, int, Scale], np.ndarray] = {}


def corrupt(
    images: np.ndarray,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    scale: Scale = "auto",
    positions: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Images under one corruption: a pure function of the arguments, on every machine the same.

    What is drawn for an image depends on (seed, name, severity, its position) only, so that any
    subset or chunk with its positions gets what the whole set would give it. Values are truncated
    to uint8, as in the original. A grey image is treated as a colour image of three equal channels
    would be, except that it has noise of its own.

    CIFAR-10-C's constants are made for 32 pixels a side, ImageNet-C's for 224. Lengths in pixels
    (noise grain, blur radii, snow, the frost's crop) stay as they are for other sizes; the elastic
    transform, pixelation and fog scale with the side, as in the original: 28x28 is seven eighths of
    it in these, fog being cut out of the next power of two, 32x32.

    Args:
        images: [N, H, W, C] uint8; C is 1 or 3.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: any integer.
        scale: whose constants: `"small"` CIFAR-10-C's, `"large"` ImageNet-C's; `"auto"` chooses
            the former where no side is over 64 pixels.
        positions: [N] each image's number in the whole set, at least 0; 0 to N - 1 where None.

    Returns:
        [N, H, W, C] uint8.

    Raises:
        CnnlabError: an argument is not as described.
    """
    _check(images, name, severity, scale)
    where = np.arange(len(images)) if positions is None else np.asarray(positions)
    if where.shape != (len(images),) or where.dtype.kind not in "iu" or (where < 0).any():
        raise CnnlabError(
            f"corrupt: positions: expected {len(images)} integers, one an image and none below 0, "
            f"got {where.dtype} of shape {where.shape}"
        )
    operation = _corruptions.TABLE[name]
    small = scale == "small" or (scale == "auto" and max(images.shape[1:3]) <= SMALL_SIDE)
    constants = (operation.small if small else operation.large)[severity - 1]

    def changed(start: int) -> np.ndarray:
        part = slice(start, start + step)
        planes = np.moveaxis(images[part], -1, 1) / 255
        each = _corruptions.draws(f"{int(seed)} {name} {int(severity)}", where[part].tolist())
        result = operation.apply(planes, each, *constants)
        # What is a whole level but for rounding stays one.
        levels = np.floor(np.clip(result, 0, 1) * 255 + 1e-6)
        return np.moveaxis(levels.astype(np.uint8), 1, -1)

    if images.size == 0:
        return images.copy()
    step = max(1, _VALUES_AT_ONCE // images[0].size)
    with ThreadPoolExecutor() as pool:
        return np.concatenate(list(pool.map(changed, range(0, len(images), step))))


def cached(
    images: np.ndarray,
    fingerprint: str,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    scale: Scale = "auto",
) -> np.ndarray:
    """As `corrupt`, once a process for the same images: the runs of a table share the work.

    Up to `CACHE_BYTES` are kept in all (the 75 of 10,000 images of 32x32x3 are 2.1 GiB). The first
    ones stay: a table goes through all of them again and again, so a cache that drops the oldest
    would never have the next one.

    Args:
        images: as for `corrupt`.
        fingerprint: what tells these images from all others, as `cnnlab.types.fingerprint` gives.
        name: as for `corrupt`.
        severity: as for `corrupt`.
        seed: as for `corrupt`.
        scale: as for `corrupt`.

    Returns:
        [N, H, W, C] uint8, read-only: copy it to write.
    """
    _check(images, name, severity, scale)
    key = fingerprint, images.shape, name, severity, seed, scale
    if key not in _cache:
        result = corrupt(images, name, severity, seed=seed, scale=scale)
        result.setflags(write=False)
        if sum(kept.nbytes for kept in _cache.values()) + result.nbytes > CACHE_BYTES:
            return result
        _cache[key] = result
    return _cache[key]


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """A split under one corruption, made as it is read; what `corrupt` makes of the whole.

    Attributes:
        source: the split.
        name: as for `corrupt`.
        severity: as for `corrupt`.
    """

    source: Source
    name: str
    severity: int

    @property
    def info(self) -> DatasetInfo:
        """What the data set is."""
        return self.source.info

    def __len__(self) -> int:
        return len(self.source)

    def get(self, indices: np.ndarray) -> Examples:
        """The examples at these positions, corrupted."""
        images, labels = self.source.get(indices)
        return Examples(corrupt(images, self.name, self.severity, positions=indices), labels)


def corruption_errors(
    errors: Mapping[str, Sequence[float]],
    baseline_errors: Mapping[str, Sequence[float]],
    *,
    clean: tuple[float, float] | None = None,
) -> dict[str, float]:
    """The corruption error (CE) of each corruption: the model's errors over the baseline's.

    With E the top-1 error at each severity s, CE = sum_s E[s] / sum_s E_baseline[s] (section 4.1 of
    the paper). The relative CE subtracts the error on clean images from every E first: it tells
    robustness from accuracy.

    Args:
        errors: corruption -> top-1 errors of the model at each severity, fractions.
        baseline_errors: likewise of the baseline: the same corruptions, as many severities.
        clean: (the model's, the baseline's) top-1 error on clean images for the relative CE; None
            for the plain one.

    Returns:
        Corruption -> CE; 1 is as good as the baseline, less is better. The paper prints 100 times.

    Raises:
        CnnlabError: the two do not match, an error is no fraction, or the baseline makes no errors
            (none beyond its clean ones) under some corruption.
    """
    if not errors or set(errors) != set(baseline_errors):
        raise CnnlabError(
            "corruption error: expected errors of the model and the baseline for the same "
            f"corruptions, got {sorted(errors)} and {sorted(baseline_errors)}"
        )
    own_clean, baseline_clean = clean or (0.0, 0.0)
    result = {}
    for name in errors:
        own, other = np.asarray(errors[name], float), np.asarray(baseline_errors[name], float)
        values = np.concatenate([own.ravel(), other.ravel(), [own_clean, baseline_clean]])
        in_range = ((values >= 0) & (values <= 1)).all()
        if own.ndim != 1 or own.shape != other.shape or not own.size or not in_range:
            raise CnnlabError(
                f"corruption error: {name}: expected one error in [0, 1] a severity, as many of "
                f"the model as of the baseline, got {own.tolist()} and {other.tolist()}, clean "
                f"{own_clean} and {baseline_clean}"
            )
        below = float((other - baseline_clean).sum())
        if below <= 0:
            raise CnnlabError(
                f"corruption error: {name}: the baseline's errors {other.tolist()} are not above "
                f"{baseline_clean}, so nothing can be measured by them: take a weaker baseline"
            )
        result[name] = float((own - own_clean).sum()) / below
    return result


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]],
    baseline_errors: Mapping[str, Sequence[float]],
    *,
    clean: tuple[float, float] | None = None,
) -> float:
    """The mean of `corruption_errors`: mCE, or relative mCE where `clean` errors are given."""
    return float(np.mean(list(corruption_errors(errors, baseline_errors, clean=clean).values())))


def _check(images: np.ndarray, name: str, severity: int, scale: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise CnnlabError(
            "corrupt: images: expected uint8 [N, H, W, C] with 1 or 3 channels, got "
            f"{images.dtype} {images.shape}"
        )
    if name not in _corruptions.TABLE:
        raise CnnlabError(f"corrupt: name: expected one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise CnnlabError(f"corrupt: severity: expected 1 to 5, got {severity!r}")
    if scale not in get_args(Scale):
        raise CnnlabError(f'corrupt: scale: expected "auto", "small" or "large", got {scale!r}')
