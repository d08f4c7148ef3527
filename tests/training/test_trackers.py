"""The tracker's callbacks, against a stand-in for the service."""

import builtins
import sys
import types

import jax.numpy as jnp
import pytest

from cnnlab.training import trackers
from cnnlab.training.loop import Event
from cnnlab.types import CnnlabError, TrainState

STATE = TrainState(jnp.int32(0), {}, {}, {}, None)


def event(name, step=0, metrics=None):
    return Event(name, step, 10, metrics or {}, STATE)


def test_every_line_goes_to_the_run_of_this_identity(monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    callbacks = trackers.wandb("p", name="n", identity="abc", config={"seed": 1})
    assert calls == []
    for happened in (event("start"), event("log", 5, {"train/loss": 0.5}), event("end", 10)):
        for callback in callbacks[happened.name]:
            callback(happened)
    wanted = {"project": "p", "name": "n", "id": "abc", "config": {"seed": 1}, "resume": "allow"}
    assert calls == [("init", wanted), ("log", {"train/loss": 0.5}, 5), ("finish",)]


def test_a_missing_package_names_the_command(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CnnlabError, match=r"pip install 'cnnlab\[wandb\]'"):
        trackers.wandb("p", name="n", identity="abc", config={})


def test_merged_callbacks_keep_their_order():
    seen = []
    one = {"log": [lambda e: seen.append(1)], "end": [lambda e: seen.append("end")]}
    two = {"log": [lambda e: seen.append(2)]}
    merged = trackers.merge(one, two)
    for callback in (*merged["log"], *merged["end"]):
        callback(event("log"))
    assert seen == [1, 2, "end"]
