"""Runs trained together are the runs trained alone, up to rounding."""

import json

import jax
import numpy as np
import pytest

from cnnlab import cli, config, parallel
from cnnlab.training import loop, run, strategies
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError

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


def same_curves(one, solo):
    for line, expected in zip(one["curves"], solo["curves"], strict=True):
        assert line.keys() == expected.keys()
        assert np.allclose(list(line.values()), list(expected.values()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["vmap", "map", "unrolled"])
def test_every_run_equals_its_solo_run(alone, strategy, tmp_path):
    together = run.train(jobs(tmp_path), programs=PROGRAMS, strategy=strategy)
    assert [r["status"] for r in together] == ["done", "done", "done", "diverged", "done"]
    for solo, one in zip(alone, together, strict=True):
        assert one["diverged_step"] == solo["diverged_step"]
        assert one["cost"]["steps"] == solo["cost"]["steps"]
        assert (solo["cost"]["together"], one["cost"]["together"]) == (1, 5)
        assert (solo["cost"]["strategy"], one["cost"]["strategy"]) == ("sequential", strategy)
        same_curves(one, solo)
    assert len({json.dumps(r["curves"]) for r in together}) == 5
    assert together[4]["cost"]["steps"] == 8  # the second evaluation was no better than the first


def test_runs_that_were_stopped_together_end_with_the_same_bits(tmp_path):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 7

    whole = run.train(jobs(tmp_path / "whole")[:2], programs=PROGRAMS, strategy="vmap")
    with pytest.raises(loop.Interrupted):
        run.train(jobs(tmp_path / "cut")[:2], programs=PROGRAMS, should_stop=stop, strategy="vmap")
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


def test_one_run_on_each_device_is_the_solo_run(tmp_path, monkeypatch):
    alone = run.train([job(tmp_path / "alone", 5)], programs=PROGRAMS)[0]
    for name, limit in (("resident", "1"), ("streamed", "0")):
        monkeypatch.setenv("CNNLAB_RESIDENT", limit)
        eight = [job(tmp_path / name / str(seed), seed) for seed in range(8)]
        found = run.train(eight, programs=PROGRAMS, strategy="devices")
        assert {r["cost"]["strategy"] for r in found} == {"devices"}
        # The very update of a solo run, so the same to the bit on the same kind of device.
        assert found[5]["parameters_sha256"] == alone["parameters_sha256"]
        assert found[5]["scores"] == alone["scores"]


@pytest.mark.parametrize(("devices", "limit"), [(4, "1"), (8, "0")])
def test_groups_of_devices_share_the_runs(tmp_path, monkeypatch, devices, limit):
    monkeypatch.setenv("CNNLAB_RESIDENT", limit)
    settings = {"train.accumulate": 2}
    alone = run.train([job(tmp_path / "alone", 1, **settings)], programs=PROGRAMS)[0]
    settings["parallel.devices"] = devices
    two = [job(tmp_path / str(seed), seed, **settings) for seed in range(2)]
    found = run.train(two, programs=PROGRAMS, strategy="devices")
    assert {r["cost"]["strategy"] for r in found} == {"devices"}
    same_curves(found[1], alone)


@pytest.mark.parametrize(
    ("devices", "runs", "replicas", "each"),
    [
        *((1, n, count, 1) for n, count in ((1, 1), (2, 2), (3, 3), (7, 7), (8, 8), (11, 1))),
        *((1, 10, 5, 1), (1, 16, 8, 1)),
        *((8, 1, 1, 8), (8, 2, 2, 4), (8, 3, 1, 8), (8, 12, 4, 2), (8, 16, 8, 1)),
        *((4, 2, 2, 2), (6, 4, 2, 3)),
    ],
)
def test_runs_are_shared_equally_among_the_devices(devices, runs, replicas, each):
    mesh = parallel.side_by_side(runs, parallel.make_mesh(devices))
    assert dict(mesh.shape) == {"replica": replicas, "data": each}


def test_a_strategy_that_does_not_fit_is_told(tmp_path):
    settings = {"parallel.devices": 8}
    three = [job(tmp_path / str(seed), seed, **settings) for seed in range(3)]
    with pytest.raises(
        CnnlabError, match=r"--strategy devices: expected one of .* 3 run\(s\) on 8"
    ):
        run.train(three, programs=PROGRAMS, strategy="devices")
    settings["parallel.state"] = "sharded"
    two = [job(tmp_path / f"sharded {seed}", seed, **settings) for seed in range(2)]
    with pytest.raises(CnnlabError, match=r"expected one of sequential for 2 .* fills the devices"):
        run.train(two, programs=PROGRAMS, strategy="vmap")


def test_the_command_line_knows_all_strategies():
    assert (strategies.AUTO, *strategies.STRATEGIES) == cli.STRATEGIES


def test_the_fastest_strategy_is_chosen_kept_and_recorded(tmp_path, monkeypatch):
    figures = {"sequential": 3.0, "vmap": 2.0, "map": 1.0, "unrolled": 4.0, "devices": 5.0}
    seen = []

    def measure(update, state, rest):
        seen.append(jax.tree.leaves(state.step)[0].ndim)
        return figures[list(figures)[len(seen) - 1]] * (1 if len(seen) == 1 else 2)

    monkeypatch.setattr(strategies, "measure", measure)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 7

    two = jobs(tmp_path)[:2]
    programs = Programs()
    with pytest.raises(loop.Interrupted):
        run.train(two, programs=programs, should_stop=stop)
    assert seen == [0, 1, 1, 1, 1]
    figures["map"] = 100.0  # runs that go on are not measured again
    for one in run.train(two, programs=programs):
        assert one["cost"]["strategy"] == "map"
        assert one["cost"]["strategies"] == figures | {"map": 1.0}


def test_where_nothing_beats_one_after_another_the_runs_are_solo_runs(tmp_path, monkeypatch, alone):
    monkeypatch.setattr(strategies, "fastest", lambda figures: "sequential")
    found = run.train(jobs(tmp_path)[:2], programs=PROGRAMS)
    for one, solo in zip(found, alone, strict=False):
        assert one["parameters_sha256"] == solo["parameters_sha256"]
        assert (one["cost"]["together"], one["cost"]["strategy"]) == (1, "sequential")
        assert set(one["cost"]["strategies"]) == set(strategies.STRATEGIES)
        assert min(one["cost"]["strategies"].values()) > 0
