"""Runs trained together are the runs trained alone, up to rounding."""

import json

import numpy as np
import pytest

from cnnlab import config
from cnnlab.training import loop, run
from cnnlab.training.step import Programs

PROGRAMS = Programs()


def job(folder, seed, **changes):
    made = config.base(
        model="simple_conv",
        data="digits",
        optim={"learning_rate": 0.05},
        train={
            "duration": "12 steps",
            "batch_size": 16,
            "log_every": "4 steps",
            "eval_every": "4 steps",
            "checkpoint_every": "4 steps",
        },
        eval={"batch_size": 128},
        augment={"transforms": ("crop(padding=1)", "random_erasing(probability=0.5)")},
    )
    small = {"model.widths": (8,), "model.hidden": 16, "model.norm": "batch", "seed": seed}
    changes = small | changes
    made = config.resolve(config.override(made, changes, "t"), "t")
    return run.Job(made, folder, f"seed {seed}")


def jobs(root):
    """Three that learn, one that diverges at once and one that is stopped early."""
    return [
        job(root / "0", 0),
        job(root / "1", 1, **{"optim.learning_rate": 0.2}),
        job(root / "2", 2, **{"augment.transforms": (
            "crop(padding=1)", "random_erasing(probability=0.0)")}),
        job(root / "3", 3, **{"optim.learning_rate": 1e30}),
        job(root / "4", 4, **{"optim.learning_rate": 0.0, "train.patience": 1}),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return [
        run.train([one], programs=PROGRAMS)[0] for one in jobs(tmp_path_factory.mktemp("alone"))
    ]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run.train(jobs(tmp_path_factory.mktemp("together")), programs=PROGRAMS)


def test_every_run_equals_its_solo_run(alone, together):
    assert [r["status"] for r in together] == ["done", "done", "done", "diverged", "done"]
    for solo, one in zip(alone, together, strict=True):
        assert one["diverged_step"] == solo["diverged_step"]
        assert one["cost"]["steps"] == solo["cost"]["steps"]
        assert (solo["cost"]["together"], one["cost"]["together"]) == (1, 5)
        for line, expected in zip(one["curves"], solo["curves"], strict=True):
            assert line.keys() == expected.keys()
            assert np.allclose(list(line.values()), list(expected.values()), rtol=1e-3, atol=1e-4)
    assert len({json.dumps(r["curves"]) for r in together}) == 5
    assert together[4]["cost"]["steps"] == 8  # the second evaluation was no better than the first


def test_runs_that_were_stopped_together_end_with_the_same_bits(tmp_path):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 7

    whole = run.train(jobs(tmp_path / "whole")[:2], programs=PROGRAMS)
    with pytest.raises(loop.Interrupted):
        run.train(jobs(tmp_path / "cut")[:2], programs=PROGRAMS, should_stop=stop)
    cut = run.train(jobs(tmp_path / "cut")[:2], programs=PROGRAMS)
    for one, expected in zip(cut, whole, strict=True):
        assert one["parameters_sha256"] == expected["parameters_sha256"]
        assert one["curves"] == expected["curves"]
        assert one["scores"] == expected["scores"]


def test_runs_of_different_rhythm_go_in_waves(tmp_path):
    longer = job(tmp_path / "b", 1, **{"train.duration": "16 steps"})
    first, second = run.train([job(tmp_path / "a", 0), longer], programs=PROGRAMS)
    assert (first["cost"]["steps"], second["cost"]["steps"]) == (12, 16)
    assert first["cost"]["together"] == second["cost"]["together"] == 1
