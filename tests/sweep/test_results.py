"""What a table adds to its records."""

import numpy as np
import pytest

from cnnlab.reporting import tables
from cnnlab.sweep import results


def record(row, seed, scale):
    errors = {"fog": [0.1 * scale, 0.2 * scale], "snow": [0.2 * scale, 0.4 * scale]}
    return {
        "row": row,
        "seed": seed,
        "scores": {"corrupted": {"errors": errors, "top1": 1 - np.mean(list(errors.values()))}},
    }


def test_the_mean_corruption_error_is_relative_to_the_baselines_mean():
    spec = tables.TableSpec("t", "T", ("a", "b"), (0, 1), ("mce",), baseline="a")
    records = [record("a", 0, 0.9), record("a", 1, 1.1), record("b", 0, 0.5)]
    made = results.with_corruption_errors(spec, records)
    assert [r["scores"]["corrupted"]["mce"] for r in made] == pytest.approx([0.9, 1.1, 0.5])
    assert "mce" not in records[0]["scores"]["corrupted"]
    plain = tables.TableSpec("t", "T", ("a", "b"), (0, 1), ("corrupted",), baseline="a")
    assert results.with_corruption_errors(plain, records) == records
