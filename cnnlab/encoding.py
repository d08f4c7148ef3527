"""Class numbers of a whole split as one short string, small enough for a JSON file."""

from __future__ import annotations

import base64
import zlib

import numpy as np


def encode_labels(labels: np.ndarray) -> str:
    """Base64 of the zlib-compressed little-endian uint16 class numbers.

    Args:
        labels: [N] integers, 0 to 65535.

    Returns:
        ASCII text; `decode_labels` inverts it exactly.

    Raises:
        ValueError: not a vector of integers in the range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected [N] integers, got {labels.dtype} {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() <= 65535:
        raise ValueError(f"expected 0 to 65535, got {labels.min()} to {labels.max()}")
    return base64.b64encode(zlib.compress(labels.astype("<u2").tobytes(), 9)).decode("ascii")


def decode_labels(text: str) -> np.ndarray:
    """The [N] int32 class numbers that `encode_labels` wrote.

    Raises:
        ValueError: the text is damaged.
    """
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
        return np.frombuffer(data, dtype="<u2").astype(np.int32)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"damaged encoded labels: {error}") from error
