"""Synthetic records: what finished runs would leave, without training anything."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from cnnlab.encoding import encode_labels

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def make_record(row: str, seed: int, accuracy: float = 0.85, **changes) -> dict:
    """One finished run whose mistakes fall on the same hard examples as other runs' mistakes.

    Args:
        row: the row.
        seed: the seed.
        accuracy: expected top-1; what the record holds is counted from its own predictions.
        **changes: dotted key (`"config__model__depth"` is `config.model.depth`) -> value.
    """
    examples = changes.pop("examples", 600)
    shared = np.random.default_rng(0)
    labels = shared.integers(0, 10, examples)
    difficulty = shared.random(examples)
    own = np.random.default_rng([seed, *row.encode()])
    noise = own.normal(0, 0.05, examples) + own.normal(0, 0.004)
    wrong = difficulty + noise > accuracy
    predicted = np.where(wrong, (labels + 1 + own.integers(0, 3, examples)) % 10, labels)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, predicted), 1)
    precision = np.diag(confusion) / np.maximum(confusion.sum(0), 1)
    recall = np.diag(confusion) / confusion.sum(1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    top1 = float(np.mean(predicted == labels))
    epochs = np.arange(1, 7)
    curves = [
        {
            "step": int(70 * e),
            "epoch": float(e),
            "train/loss": float(0.4 + 1.5 * np.exp(-e / 1.5) + own.normal(0, 0.03)),
            "train/top1": float(top1 - 0.4 * np.exp(-e / 1.5)),
            "validation/top1": float(top1 - 0.3 * np.exp(-e / 1.5) + own.normal(0, 0.008)),
            "validation/nll": float(0.4 + np.exp(-e)),
            "learning_rate": 0.1,
        }
        for e in epochs
    ]
    size = sum(row.encode())
    record = {
        "schema": 1,
        "row": row,
        "seed": seed,
        "identity": f"{size % 65536:05x}{seed:05x}",
        "config": {
            "data": {"name": "fashion_mini"},
            "model": {"name": row, "depth": 8},
            "optim": {"learning_rate": 0.1, "betas": [0.9, 0.99]},
            "seed": seed,
        },
        "status": "done",
        "diverged_step": None,
        "scores": {
            "validation": {"top1": top1 + 0.002, "nll": 0.4},
            "test": {
                "top1": top1,
                "top5": 0.99,
                "nll": 0.41 + 0.01 * float(own.random()),
                "ece": 0.02,
                "precision_macro": float(precision.mean()),
                "recall_macro": float(recall.mean()),
                "f1_macro": float(f1.mean()),
                "per_class": {
                    "precision": precision.tolist(),
                    "recall": recall.tolist(),
                    "f1": f1.tolist(),
                },
                "confusion": confusion.tolist(),
            },
        },
        "predictions": {"test": encode_labels(predicted), "labels": encode_labels(labels)},
        "test_set": {
            "name": "fashion_mini",
            "split": "test",
            "examples": examples,
            "fingerprint": "0123456789abcdef",
        },
        "class_names": list(CLASSES),
        "cost": {
            "parameters": 61_706 + 1000 * (size % 97),
            "macs": 416_520 + 10_000 * (size % 89),
            "seconds": 20.0 + float(own.random()),
            "images_per_second": 5000.0,
            "steps": 420,
            "examples": 53_760,
        },
        "curves": curves,
        "code": {
            "version": "0.1.0",
            "commit": "abc1234",
            "dirty": False,
            "digest": "0f1e2d3c4b5a",
        },
        "environment": {
            "python": "3.13.0",
            "jax": "0.12.0.1",
            "flax": "0.12.12",
            "platform": "cpu",
            "device": "cpu",
            "devices": 1,
        },
        "parameters_sha256": "00",
    }
    record = copy.deepcopy(record)
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = record
        for part in path:
            inner = inner[part]
        inner[last] = value
    return record


def make_diverged(row: str, seed: int, step: int, **changes) -> dict:
    """A run that stopped at a non-finite loss."""
    record = make_record(row, seed, **changes)
    record |= {"status": "diverged", "diverged_step": step, "scores": {}}
    del record["predictions"]
    return record


@pytest.fixture
def run():
    """The function that makes one finished run."""
    return make_record


@pytest.fixture
def diverged():
    """The function that makes one diverged run."""
    return make_diverged
