"""The trackers' callbacks, against stand-ins for the services."""

import builtins
import sys
import types

import jax.numpy as jnp
import pytest

from cnnlab import config as config_lib
from cnnlab.training import run as run_lib
from cnnlab.training import trackers
from cnnlab.training.loop import Event
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError, CnnlabWarning, TrainState

STATE = TrainState(jnp.int32(0), {}, {}, {}, None)
ABOUT = {"name": "n", "identity": "abc", "config": {"seed": 1, "optim": {"betas": (0.9, 0.99)}}}


def event(name, step=0, metrics=None):
    return Event(name, step, 10, metrics or {}, lambda: STATE)


def play(callbacks, *events):
    for happened in events:
        for callback in callbacks.get(happened.name, ()):
            callback(happened)


class FakeWandb:
    """wandb's module: runs that are open at once are told apart only with `create_new`."""

    def __init__(self):
        self.calls = []

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))
        assert kwargs.pop("reinit") == "create_new"

        def log(values, step):
            self.calls.append(("log", kwargs["id"], values, step))

        return types.SimpleNamespace(
            log=log, finish=lambda: self.calls.append(("finish", kwargs["id"]))
        )


class FakeStore:
    """What MLflow's client keeps: experiments by name, and runs."""

    def __init__(self):
        self.experiments, self.runs = {}, []

    def get_experiment_by_name(self, name):
        there = self.experiments.get(name)
        return there and types.SimpleNamespace(experiment_id=there)

    def create_experiment(self, name):
        return self.experiments.setdefault(name, str(len(self.experiments) + 1))

    def create_run(self, experiment, run_name, tags):
        info = types.SimpleNamespace(run_id=f"r{len(self.runs)}", run_name=run_name)
        self.runs.append(
            types.SimpleNamespace(
                info=info, tags=tags, params={}, metrics=[], status="RUNNING", experiment=experiment
            )
        )
        return self.runs[-1]

    def search_runs(self, experiments, query):
        return [
            run
            for run in self.runs
            if run.experiment in experiments
            and query == f"tags.`cnnlab.identity` = '{run.tags['cnnlab.identity']}'"
        ]

    def _run(self, run_id):
        return next(run for run in self.runs if run.info.run_id == run_id)

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        self._run(run_id).params |= dict(params)
        self._run(run_id).metrics += metrics

    def update_run(self, run_id, status):
        self._run(run_id).status = status

    def set_terminated(self, run_id, status):
        self._run(run_id).status = status


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    store = FakeStore()
    entities = types.SimpleNamespace(Param=lambda k, v: (k, v), Metric=lambda *values: values)
    tracking = types.SimpleNamespace(MlflowClient=lambda: store)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    return store


def test_every_line_goes_to_the_wandb_run_of_this_identity(wandb):
    one = trackers.create("wandb:p", **ABOUT)
    other = trackers.create("wandb", **ABOUT | {"identity": "def"})
    assert wandb.calls == []  # a finished run opens nothing
    play(one, event("start"))
    play(other, event("start"))
    play(one, event("log", 5, {"train/loss": 0.5}), event("end", 10))
    play(other, event("stop", 10))
    first, second = (call[1] for call in wandb.calls[:2])
    assert first == {"project": "p", "resume": "allow", "id": "abc"} | {
        key: ABOUT[key] for key in ("name", "config")
    }
    assert second["project"] == "cnnlab"
    logged = ("log", "abc", {"train/loss": 0.5}, 5)
    assert wandb.calls[2:] == [logged, ("finish", "abc"), ("finish", "def")]


def test_a_killed_run_goes_on_in_its_mlflow_run(mlflow):
    wide = ABOUT["config"] | {"data": {f"field{i}": i for i in range(200)}}
    for wanted, ending in (("KILLED", "stop"), ("FINISHED", "end")):
        callbacks = trackers.create("mlflow:p", **ABOUT | {"config": wide})
        line = {"step": 5, "train/loss": 0.5}
        play(callbacks, event("start"))
        assert mlflow.runs[0].status == "RUNNING"
        play(callbacks, event("log", 5, line), event(ending, 10))
        (run,) = mlflow.runs
        assert run.status == wanted
    assert mlflow.experiments == {"p": "1"}
    assert run.info.run_name == "n"
    assert run.params["optim.betas"] == "(0.9, 0.99)"
    assert len(run.params) == 202
    assert [(key, value, step) for key, value, _, step in run.metrics] == [
        ("train/loss", 0.5, 5)
    ] * 2


def test_other_identities_get_other_mlflow_runs(mlflow):
    for identity in ("abc", "def"):
        play(trackers.create("mlflow", **ABOUT | {"identity": identity}), event("start"))
    assert [run.tags["cnnlab.identity"] for run in mlflow.runs] == ["abc", "def"]


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_package_names_the_command(name, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CnnlabError, match=rf"pip install 'cnnlab\[{name}\]'"):
        trackers.create(name, **ABOUT)


@pytest.mark.parametrize("text", ["wanbd", "wanbd:p", "mlflow:", ""])
def test_an_unknown_tracker_names_those_there_are(text):
    with pytest.raises(CnnlabError, match="expected wandb or mlflow") as raised:
        trackers.create(text, **ABOUT)
    assert ("did you mean 'wandb'" in str(raised.value)) == text.startswith("wanbd")


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_service_that_fails_ends_no_training(when, tmp_path, monkeypatch):
    calls = []

    def call(name):
        def act(*args, **kwargs):
            calls.append(name)
            if name == when:
                raise ConnectionError("the network is gone")
            return run

        return act

    run = types.SimpleNamespace(log=call("log"), finish=call("finish"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=call("init")))
    config = config_lib.resolve(
        config_lib.base(
            model="simple_conv",
            data="digits",
            optim={"learning_rate": 0.02},
            train={"duration": "6 steps", "batch_size": 64, "log_every": "2 steps"},
        ),
        "here",
    )
    callbacks = trackers.create("wandb", **ABOUT)
    job = run_lib.Job(config, tmp_path, "row", callbacks)
    with pytest.warns(
        CnnlabWarning, match="wandb failed at step .* of n .*network is gone"
    ) as told:
        (result,) = run_lib.train([job], programs=Programs())
    assert len(told) == 1
    assert result["status"] == "done"
    assert [line["step"] for line in result["curves"]] == [2, 4, 6]
    at = {
        "init": ["init"],
        "log": ["init", "log"],
        "finish": ["init", "log", "log", "log", "finish"],
    }
    assert calls == at[when]  # and after it nothing more


def test_only_the_first_host_reports(wandb, monkeypatch):
    monkeypatch.setattr(trackers.jax, "process_index", lambda: 1)
    assert trackers.create("wandb", **ABOUT) == {}


def test_merged_callbacks_keep_their_order():
    seen = []
    one = {"log": [lambda e: seen.append(1)], "end": [lambda e: seen.append("end")]}
    two = {"log": [lambda e: seen.append(2)]}
    play(trackers.merge(one, two), event("log"), event("end"))
    assert seen == [1, 2, "end"]
