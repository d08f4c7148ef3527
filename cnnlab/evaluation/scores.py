"""Scores of a classifier, exact over a whole split.

The device gives logits; everything else is computed from them on the host in float64, so a score
depends neither on the batch size nor on how the last batch is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from scipy.special import log_softmax

_Fed = TypeVar("_Fed")

_QUEUED = 8


def predict(
    logits_fn: Callable[[_Fed], jax.Array],
    feed: Callable[[Sequence[np.ndarray]], Iterator[_Fed]],
    positions: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """The logits of all examples at these positions; [n, K] float32.

    Args:
        logits_fn: gives [batch_size, K] for what `feed` makes of one batch.
        feed: takes batches of positions, each [batch_size] int32, gives what `logits_fn` takes, as
            `pipeline.Split.feed` does.
        positions: [n] int32; n may be any number: the last batch is padded, its padding dropped.
        batch_size: examples a call.
    """
    starts = range(0, len(positions), batch_size)
    batches = [positions[start : start + batch_size] for start in starts]
    padded = [np.pad(b, (0, batch_size - len(b)), mode="edge") for b in batches]
    parts: list[jax.Array] = []
    for batch, fed in zip(batches, feed(padded), strict=True):
        parts.append(logits_fn(fed)[: len(batch)])
        if len(parts) > _QUEUED:  # or all batches of a streamed split would wait on the device
            jax.block_until_ready(parts[-_QUEUED - 1])
    return np.concatenate(jax.device_get(parts))


def summary(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` (fractions) and `nll` (nats an example): the scores logged while training.

    Args:
        logits: [n, K].
        labels: [n] int.

    Ties are broken as by argmax: the true class ranks after every class with a greater logit and
    after every equal one of a lower number.
    """
    logits = logits.astype(np.float64)
    true = np.take_along_axis(logits, labels[:, None], 1)
    classes = np.arange(logits.shape[1])[None]
    rank = ((logits > true) | ((logits == true) & (classes < labels[:, None]))).sum(1)
    nll = -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], 1)
    return {
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "nll": float(nll.mean()),
    }


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """The expected calibration error (Guo et al. 2017, eq. 3) of the softmax's maximum, 0 to 1.

    The sum over `bins` equal-width bins of confidence, (m/bins, (m + 1)/bins], of the bin's share
    of examples times |accuracy - mean confidence|.
    """
    probabilities = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    confidence = probabilities.max(1)
    right = logits.argmax(1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def confusion(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[K, K] counts: row the true class, column the predicted one."""
    flat = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification(logits: np.ndarray, labels: np.ndarray, *, bins: int) -> dict[str, Any]:
    """All scores of a split, as JSON values.

    Precision, recall and F1 of a class that is never predicted (or never occurs) are 0, and the
    macro averages are plain means over all classes.

    Args:
        logits: [n, K].
        labels: [n] int.
        bins: of the calibration error.
    """
    counts = confusion(logits.argmax(1), labels, logits.shape[1])
    hits = np.diag(counts).astype(np.float64)
    precision = hits / np.maximum(counts.sum(0), 1)
    recall = hits / np.maximum(counts.sum(1), 1)
    f1 = 2 * hits / np.maximum(counts.sum(0) + counts.sum(1), 1)
    per_class = {"precision": precision, "recall": recall, "f1": f1}
    return (
        summary(logits, labels)
        | {"ece": calibration_error(logits, labels, bins)}
        | {f"{name}_macro": float(values.mean()) for name, values in per_class.items()}
        | {
            "per_class": {name: values.tolist() for name, values in per_class.items()},
            "confusion": counts.tolist(),
        }
    )
