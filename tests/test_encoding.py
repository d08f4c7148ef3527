"""Class numbers as text."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest

from cnnlab.encoding import decode_labels, encode_labels


def test_layout_and_inverse():
    labels = np.array([0, 1, 258, 65535], dtype=np.int32)
    raw = zlib.decompress(base64.b64decode(encode_labels(labels)))
    assert raw == struct.pack("<4H", 0, 1, 258, 65535)
    decoded = decode_labels(encode_labels(labels))
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, labels)
    assert decode_labels(encode_labels(np.array([], dtype=int))).shape == (0,)


@pytest.mark.parametrize("labels", [[-1], [65536], [0.5], [[1, 2]]])
def test_refuses_what_it_cannot_hold(labels):
    with pytest.raises(ValueError, match="expected"):
        encode_labels(np.array(labels))


@pytest.mark.parametrize("text", ["no base64!", "AAAA", encode_labels(np.arange(9))[:-8]])
def test_damage_is_noticed(text):
    with pytest.raises(ValueError, match="damaged"):
        decode_labels(text)
