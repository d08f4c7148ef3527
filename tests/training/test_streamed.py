"""Streamed data train the network that resident data train."""

import pytest

from cnnlab import config, pipeline
from cnnlab.training import loop, run
from cnnlab.training.step import Programs

PROGRAMS = Programs()


def job(folder, seed=0, **changes):
    made = config.base(
        model="simple_conv",
        data="digits",
        optim={"learning_rate": 0.05},
        train={"duration": "40 steps", "batch_size": 32, "checkpoint_every": "10 steps"},
        eval={"batch_size": 128},
        augment={"transforms": ("crop(padding=1)",)},
    )
    small = {"model.widths": (8,), "model.hidden": 16, "model.norm": "batch", "seed": seed}
    made = config.resolve(config.override(made, small | changes, "t"), "t")
    return run.Job(made, folder, "r")


def same(one, other):
    assert one["parameters_sha256"] == other["parameters_sha256"]
    assert one["scores"] == other["scores"]
    assert one["curves"] == other["curves"]
    assert one["test_set"] == other["test_set"]


@pytest.fixture
def resident(tmp_path):
    return run.train([job(tmp_path / "resident")], programs=PROGRAMS)[0]


def test_a_streamed_run_is_the_resident_one(tmp_path, resident, monkeypatch):
    monkeypatch.setenv(pipeline.RESIDENT, "0")
    streamed = run.train([job(tmp_path / "streamed")], programs=PROGRAMS)[0]
    same(streamed, resident)
    assert run.load_split(job(tmp_path).config, "train").resident is None
    extras = [
        run.extend(tmp_path / name, ["corrupted"], PROGRAMS)["scores"]["corrupted"]
        for name in ("streamed", "resident")
    ]
    assert extras[0] == extras[1]


def test_a_streamed_run_goes_on_in_the_middle_of_an_epoch(tmp_path, resident, monkeypatch):
    monkeypatch.setenv(pipeline.RESIDENT, "0")
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 17

    with pytest.raises(loop.Interrupted):
        run.train([job(tmp_path / "cut")], programs=PROGRAMS, should_stop=stop)
    same(run.train([job(tmp_path / "cut")], programs=PROGRAMS)[0], resident)


def test_streamed_runs_train_together(tmp_path, resident, monkeypatch):
    monkeypatch.setenv(pipeline.RESIDENT, "0")
    jobs = [job(tmp_path / str(seed), seed) for seed in (0, 1)]
    first, second = run.train(jobs, programs=PROGRAMS, strategy="vmap")
    assert first["cost"]["together"] == 2
    assert first["scores"]["test"]["nll"] == pytest.approx(
        resident["scores"]["test"]["nll"], rel=1e-3
    )
    assert first["parameters_sha256"] != second["parameters_sha256"]
