"""What every data source needs: a checked split name and the statistics of its channels."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError

SPLITS = ("train", "test")
"""The splits that every data source has. Validation is cut from `train` by seed."""


def check_split(name: str, split: str) -> None:
    """Checks that `split` is one of `SPLITS`.

    Args:
        name: the data set's name in the registry, for the message.
        split: what was asked for.

    Raises:
        CnnlabError: it is not.
    """
    if split not in SPLITS:
        raise CnnlabError(
            f"data set {name!r} has no split {split!r}{did_you_mean(split, SPLITS)}: its splits "
            f"are {' and '.join(map(repr, SPLITS))}; a validation split is cut from 'train' by "
            "the run's seed"
        )


def channel_moments(
    batches: Iterable[np.ndarray],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, with pixels scaled to [0, 1].

    Counts the 256 values per channel and sums in integers: the result depends neither on the order
    of the images nor on how they are cut into batches.

    Args:
        batches: images, each batch [B, H, W, C] uint8; at least one image in all.

    Returns:
        (mean, std), each one float a channel, rounded to 6 decimals. The standard deviation is
        that of the population (divided by the number of pixels).
    """
    # The channels of the first batch decide how many there are.
    counts: np.ndarray | None = None
    for images in batches:
        histograms = np.stack(
            [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
        )
        counts = histograms if counts is None else counts + histograms
    if counts is None:
        raise ValueError("channel_moments needs at least one batch")
    moments = [_moments([int(n) for n in histogram]) for histogram in counts]
    return tuple(m for m, _ in moments), tuple(s for _, s in moments)


def _moments(histogram: list[int]) -> tuple[float, float]:
    # Python's integers do not overflow, so nothing is rounded before the divisions.
    total = sum(histogram)
    first = sum(n * value for value, n in enumerate(histogram))
    second = sum(n * value**2 for value, n in enumerate(histogram))
    std = math.sqrt(second * total - first**2) / total
    return round(first / total / 255, 6), round(std / 255, 6)
