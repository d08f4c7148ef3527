"""Whole runs on the 8x8 digits: resuming to the bit, stopping, diverging, keeping the best."""

import json

import numpy as np
import pytest

from cnnlab import config, encoding
from cnnlab.training import loop, run
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError, CnnlabWarning

PROGRAMS = Programs()  # shared: most of these runs differ in host settings only


def recipe(**changes):
    made = config.base(
        model="simple_conv",
        data="digits",
        optim={"learning_rate": 0.05},
        train={
            "duration": "40 steps",
            "batch_size": 64,
            "log_every": "7 steps",
            "eval_every": "10 steps",
            "checkpoint_every": "8 steps",
        },
    )
    # Everything that could lose its place: dropout, augmentation, an average, auxiliary heads.
    changes = {
        "model.widths": (16,),
        "model.hidden": 64,
        "model.norm": "batch",
        "model.dropout": 0.1,
        "model.aux": ("stage1",),
        "augment.transforms": ("flip(probability=0.1)",),
        "optim.ema_decay": 0.9,
        **changes,
    }
    return config.resolve(config.override(made, changes, "t"), "t")


def train(made, folder, *, callbacks=None, **kwargs):
    job = run.Job(made, folder, "r", callbacks or {})
    return run.train([job], programs=PROGRAMS, **kwargs)[0]


def stop_after(count):
    """Asks to stop once `count` updates have been made."""
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) >= count

    return should_stop


def evidence(folder):
    """What must be equal to the bit: parameters, metrics, predictions."""
    result = json.loads((folder / "result.json").read_text())
    predictions = np.load(folder / "predictions.npz")
    return (
        result["parameters_sha256"],
        result["scores"],
        result["predictions"],
        (folder / "metrics.jsonl").read_text(),
        predictions["logits"].tobytes(),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(recipe(), folder), folder


def test_a_run_learns_and_records_what_it_did(uninterrupted):
    result, folder = uninterrupted
    assert result["status"] == "done"
    assert result["scores"]["test"]["top1"] > 0.8
    assert result["scores"]["validation"]["top1"] > 0.8
    assert (result["cost"]["steps"], result["cost"]["examples"]) == (40, 40 * 64)
    assert result["identity"] == config.identity(recipe())
    assert result["test_set"]["examples"] == len(
        encoding.decode_labels(result["predictions"]["test"])
    )
    assert json.loads((folder / "result.json").read_text()) == result
    steps = [line["step"] for line in result["curves"]]
    assert steps == [7, 10, 14, 20, 21, 28, 30, 35, 40]
    assert {"train/loss", "train/aux_stage1/top1", "validation/nll"} <= set(result["curves"][-1])
    assert list((folder / "events").iterdir())


def test_the_predictions_kept_are_those_that_were_scored(uninterrupted):
    result, folder = uninterrupted
    kept = np.load(folder / "predictions.npz")
    right = (kept["logits"].argmax(1) == kept["labels"]).mean()
    assert right == result["scores"]["test"]["top1"]
    assert np.array_equal(kept["labels"], encoding.decode_labels(result["predictions"]["labels"]))


@pytest.mark.parametrize("stops", [(1,), (13,), (8, 3, 20), (39,)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(uninterrupted, tmp_path, stops):
    _, whole = uninterrupted
    for count in stops:
        with pytest.raises(loop.Interrupted):
            train(recipe(), tmp_path, should_stop=stop_after(count))
        assert not (tmp_path / "result.json").exists()
    train(recipe(), tmp_path)
    assert evidence(tmp_path) == evidence(whole)


def test_a_line_that_was_cut_short_is_dropped(uninterrupted, tmp_path):
    _, whole = uninterrupted
    with pytest.raises(loop.Interrupted):
        train(recipe(), tmp_path, should_stop=stop_after(15))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "epoch": 1.0}\n{"step": 17, "ep')
    train(recipe(), tmp_path)
    assert evidence(tmp_path) == evidence(whole)


def test_a_finished_run_is_not_touched(uninterrupted):
    result, folder = uninterrupted
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert train(recipe(), folder, should_stop=stop_after(1)) == result
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before


def test_the_folder_of_another_config_is_refused(uninterrupted):
    _, folder = uninterrupted
    with pytest.raises(CnnlabError, match=r"optim\.learning_rate \(0\.05 there, 0\.1 here\)"):
        train(recipe(**{"optim.learning_rate": 0.1}), folder)


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(tmp_path):
    result = train(recipe(**{"optim.learning_rate": 1e30}), tmp_path)
    assert result["status"] == "diverged"
    assert 1 < result["diverged_step"] <= 10
    assert result["scores"] == {}
    assert "predictions" not in result
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "diverged"


def test_early_stopping_waits_for_its_patience(tmp_path):
    made = recipe(**{"optim.learning_rate": 0.0, "train.patience": 2, "optim.ema_decay": 0.0})
    result = train(made, tmp_path)
    # Batch statistics still move, so the score may rise at first; then it stands still.
    scores = [line["validation/top1"] for line in result["curves"] if "validation/top1" in line]
    assert result["cost"]["steps"] == 10 * len(scores)
    best = int(np.argmax(scores))
    assert len(scores) == 4 or len(scores) - 1 - best == 2


def test_an_early_stop_survives_a_kill_after_it(tmp_path):
    made = recipe(**{"train.monitor": "nll", "train.patience": 1, "optim.learning_rate": 0.0})
    first = train(made, tmp_path)
    (tmp_path / "result.json").unlink()
    again = train(made, tmp_path)
    assert again["cost"]["steps"] == first["cost"]["steps"]
    assert again["parameters_sha256"] == first["parameters_sha256"]


def test_the_best_parameters_are_scored_when_asked(tmp_path):
    # A rate that ruins the network again: the best evaluation is not the last.
    made = recipe(
        **{
            "optim.learning_rate": 2.0,
            "optim.warmup": "39 steps",
            "train.keep": "best",
            "train.monitor": "nll",
            "optim.ema_decay": 0.0,
        }
    )
    result = train(made, tmp_path)
    lines = [line for line in result["curves"] if "validation/nll" in line]
    best = min(lines, key=lambda line: line["validation/nll"])
    assert best["step"] < 40
    assert result["scores"]["validation"]["nll"] == pytest.approx(best["validation/nll"], abs=1e-12)


def test_events_come_in_order_with_their_metrics(tmp_path):
    seen = []
    names = ("start", "step", "log", "eval", "checkpoint", "stop", "end")
    train(recipe(), tmp_path, callbacks={name: [seen.append] for name in names})
    assert [e.name for e in seen[:1] + seen[-1:]] == ["start", "end"]
    assert [e.step for e in seen if e.name == "step"] == list(range(1, 41))
    assert [e.step for e in seen if e.name == "eval"] == [10, 20, 30, 40]
    assert [e.step for e in seen if e.name == "checkpoint"] == [8, 16, 24, 32, 40]
    assert all("top1" in e.metrics for e in seen if e.name == "eval")
    assert all(np.isfinite(e.metrics["loss"]) for e in seen if e.name == "step" and e.step > 2)


def test_a_run_without_a_validation_split_trains_on_everything(tmp_path):
    result = train(recipe(**{"data.validation": 0.0}), tmp_path)
    assert "validation" not in result["scores"]
    assert result["scores"]["test"]["top1"] > 0.8


def test_restore_gives_the_state_that_was_scored(uninterrupted):
    result, folder = uninterrupted
    made, program, state, which = run.restore(folder, PROGRAMS)
    assert which == "last checkpoint, step 40 of a run that is done"
    split = run.load_split(made, "test")
    measured, _ = run.score(made, program, state, split, np.arange(len(split), dtype=np.int32))
    assert measured == result["scores"]["test"]


def test_two_processes_on_one_run_are_told_apart(tmp_path):
    from cnnlab import record

    with (
        record.RunFolder(tmp_path, recipe()),
        pytest.raises(CnnlabError, match="works on this run"),
    ):
        train(recipe(), tmp_path)


@pytest.mark.parametrize(
    ("every", "expected"),
    [("10 steps", [10, 20, 30]), ("1 epoch", [8, 15, 22, 29]), ("1 example", list(range(1, 31)))],
)
def test_periods_fall_on_the_first_step_that_completes_them(every, expected):
    duration = config.Duration.parse(every)  # 1 epoch is 100 / 14 = 7.1 steps
    got = [s for s in range(1, 31) if loop.due(s, duration, batch_size=14, examples=100)]
    assert got == expected


# JAX may leave the other arrays' reads unfinished when one fails, and says so as they are freed.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine object _read_array_index_and_device_put"
    ":pytest.PytestUnraisableExceptionWarning"
)
def test_a_run_whose_last_checkpoint_is_damaged_ends_with_the_same_bits(tmp_path):
    whole = train(recipe(), tmp_path / "whole")
    with pytest.raises(loop.Interrupted):
        train(recipe(), tmp_path / "damaged", should_stop=stop_after(20))
    steps = sorted(int(p.name) for p in (tmp_path / "damaged/checkpoints").glob("[0-9]*"))
    assert steps == [16, 20]
    largest = max(
        (tmp_path / "damaged/checkpoints/20").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.warns(CnnlabWarning, match=r"step 20 .*the run goes on from step 16"):
        again = train(recipe(), tmp_path / "damaged")
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert evidence(tmp_path / "damaged") == evidence(tmp_path / "whole")


def test_another_network_than_the_recorded_one_is_not_scored(tmp_path):
    train(recipe(), tmp_path / "run")
    (tmp_path / "run/checkpoints/40/_CHECKPOINT_METADATA").unlink()
    with (
        pytest.warns(CnnlabWarning, match="damaged"),
        pytest.raises(CnnlabError, match="not the network that its record tells of"),
    ):
        run.restore(tmp_path / "run", PROGRAMS)
