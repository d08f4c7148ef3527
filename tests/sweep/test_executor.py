"""A sweep: one compilation for a cohort, nothing done twice, a diverged run among others."""

import pytest

from cnnlab import config
from cnnlab.reporting import tables
from cnnlab.sweep import executor, experiment, results
from cnnlab.sweep.experiment import Run
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError

TRAIN = {"duration": "3 steps", "batch_size": 64}


def run_of(row, seed, **changes):
    made = config.base(model="simple_conv", data="digits", train=TRAIN, seed=seed)
    made = config.resolve(config.override(made, changes, row), row)
    return Run(row, seed, made, config.identity(made))


class Watcher:
    """Counts what a sweep tells."""

    def __init__(self):
        self.begun, self.ended = [], []

    def begin(self, run):
        self.begun.append((run.row, run.seed))
        return {}

    def end(self, run, result):
        self.ended.append((run.row, run.seed, result["status"]))


def rates():
    return [
        run_of(str(rate), seed, **{"optim.learning_rate": rate})
        for rate in (0.01, 0.1, 1.0)
        for seed in range(3)
    ]


def test_three_learning_rates_times_three_seeds_compile_the_step_once(tmp_path):
    programs = Programs()
    records = executor.execute(rates(), tmp_path, programs=programs, progress=Watcher())
    assert [p.traces for p in programs] == [1]
    assert [p.train_step._cache_size() for p in programs] == [1]
    assert len({r["parameters_sha256"] for r in records}) == 9
    assert [(r["row"], r["seed"]) for r in records] == [(r.row, r.seed) for r in rates()]


def test_finished_runs_are_read_and_the_others_done(tmp_path):
    first = Watcher()
    executor.execute(rates()[:4], tmp_path, programs=Programs(), progress=first)
    second = Watcher()
    executor.execute(rates()[:6], tmp_path, programs=Programs(), progress=second)
    assert second.begun == [("0.1", 1), ("0.1", 2)]
    assert len(second.ended) == 6


def test_cohorts_stand_together_and_one_run_serves_two_rows(tmp_path):
    other = {"model.widths": (4,)}
    runs = [run_of("a", 0), run_of("b", 0, **other), run_of("c", 1), run_of("same as a", 0)]
    watcher = Watcher()
    records = executor.execute(runs, tmp_path, programs=Programs(), progress=watcher)
    assert watcher.begun == [("a", 0), ("c", 1), ("b", 0)]
    assert [r["row"] for r in records] == ["a", "b", "c", "same as a"]
    assert records[0]["parameters_sha256"] == records[3]["parameters_sha256"]


def test_a_diverged_run_is_marked_and_the_table_goes_on(tmp_path):
    runs = [run_of("good", 0), run_of("bad", 0, **{"optim.learning_rate": 1e30})]
    watcher = Watcher()
    records = executor.execute(runs, tmp_path, programs=Programs(), progress=watcher)
    assert watcher.ended == [("good", 0, "done"), ("bad", 0, "diverged")]
    spec = tables.TableSpec(
        "t", "T", ("good", "bad"), (0,), ("top1", "parameters"), "good",
        varied=("optim.learning_rate",),
    )  # fmt: skip
    text = tables.to_markdown(tables.build(spec, records))
    assert f"bad: 1 of 1 diverged (seed 0 at step {records[1]['diverged_step']})" in text
    loaded = experiment.Loaded("t", spec, tuple(runs), ("curves", "mistakes"))
    _, written = results.write(loaded, records, tmp_path / "results")
    assert {"table.md", "curves.png", "mistakes.png"} <= {path.name for path in written}


def test_nothing_trains_when_a_later_row_does_not_fit(tmp_path):
    runs = [run_of("good", 0), run_of("too deep", 0, **{"model.name": "vgg11"})]
    watcher = Watcher()
    with pytest.raises(CnnlabError, match=r"row 'too deep': .*poolings need images"):
        executor.execute(runs, tmp_path, programs=Programs(), progress=watcher)
    assert watcher.begun == []


def test_the_record_of_another_run_in_a_folder_is_refused(tmp_path):
    (run,) = rates()[:1]
    executor.execute([run], tmp_path, programs=Programs(), progress=Watcher())
    other = rates()[1]
    (tmp_path / run.folder).rename(tmp_path / other.folder)
    with pytest.raises(CnnlabError, match="is of run"):
        executor.finished(other, tmp_path)


def test_a_plan_knows_what_is_done_and_estimates_the_rest(tmp_path):
    runs = rates()[:2]
    executor.execute(runs[:1], tmp_path, programs=Programs(), progress=Watcher())
    done, todo = executor.plan(runs, tmp_path, Programs())
    assert (done.done, done.seconds, done.basis) == (True, 0.0, "done")
    assert (todo.done, todo.steps, todo.basis) == (False, 3, "another run")
    assert todo.seconds > 0
