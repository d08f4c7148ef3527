"""Evaluations in chunks go on where they were."""

from __future__ import annotations

import numpy as np
import pytest

from cnnlab.evaluation import chunks


class KilledError(Exception):
    pass


def squares(calls, killed_at=None):
    def compute(positions):
        calls.append(positions.tolist())
        if len(calls) == killed_at:
            raise KilledError
        return {"square": positions**2, "image": np.ones((len(positions), 2, 2))}

    return compute


def test_chunks_are_put_together_in_order():
    found = chunks.collect(squares([]), 5, 2)
    np.testing.assert_array_equal(found["square"], [0, 1, 4, 9, 16])
    assert found["image"].shape == (5, 2, 2)


def test_an_interrupted_evaluation_computes_only_what_is_missing(tmp_path):
    calls = []
    compute = squares(calls, killed_at=3)
    with pytest.raises(KilledError):
        chunks.collect(compute, 5, 2, folder=tmp_path / "kept", about={"attack": "a"})
    found = chunks.collect(compute, 5, 2, folder=tmp_path / "kept", about={"attack": "a"})
    assert calls == [[0, 1], [2, 3], [4], [4]]
    np.testing.assert_array_equal(found["square"], [0, 1, 4, 9, 16])
    chunks.clear(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_results_of_something_else_are_not_taken(tmp_path):
    calls = []
    compute = squares(calls)
    chunks.collect(compute, 2, 2, folder=tmp_path, about={"parameters": "x"})
    chunks.collect(compute, 2, 2, folder=tmp_path, about={"parameters": "y"})
    chunks.collect(compute, 2, 1, folder=tmp_path, about={"parameters": "x"})
    assert calls == [[0, 1], [0, 1], [0], [1]]
