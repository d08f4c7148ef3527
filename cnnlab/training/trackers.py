"""Trackers: callbacks that copy a run's metrics to a service; `metrics.jsonl` stays the truth.

Two services, each an optional package: Weights & Biases and MLflow. TensorBoard's events need no
tracker: `cnnlab.record` writes them for every run. Both work without a network: MLflow keeps its
database in the current folder unless `MLFLOW_TRACKING_URI` names a server, and `WANDB_MODE=offline`
keeps what `wandb sync` uploads later.

A tracker never ends a training. Whatever a service raises while a run goes on (the network is gone,
the quota used up, the key wrong) is told once, as a warning, and that run reports no more to it;
every line is in the run's folder all the same. A package that is not installed is an error, before
anything is trained.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from cnnlab.registry import did_you_mean
from cnnlab.training.loop import Callbacks, Event
from cnnlab.types import CnnlabError, CnnlabWarning

PROJECT = "cnnlab"
"""The project (of MLflow: the experiment) where none is named."""


def create(text: str, *, name: str, identity: str, config: Mapping[str, Any]) -> Callbacks:
    """The callbacks of the tracker that `"NAME"` or `"NAME:PROJECT"` names.

    Args:
        text: one of `TRACKERS`, and the project there; `PROJECT` if none is given.
        name: what to call the run.
        identity: the run's identity, by which the service knows it again.
        config: the resolved config, as plain values.

    Raises:
        CnnlabError: there is no such tracker, or its package is not installed.
    """
    service, colon, project = text.partition(":")
    if service not in TRACKERS or (colon and not project):
        raise CnnlabError(
            f"--tracker: expected {' or '.join(TRACKERS)}, or NAME:PROJECT, got {text!r}"
            f"{did_you_mean(service, set(TRACKERS) - {service})}"
        )
    made = TRACKERS[service](project or PROJECT, name=name, identity=identity, config=config)
    return {} if jax.process_index() else guard(service, name, made)  # one host reports


def wandb(project: str, *, name: str, identity: str, config: Mapping[str, Any]) -> Callbacks:
    """Callbacks that log every line of metrics to Weights & Biases.

    A run that goes on after a kill goes on there too, under the same id. `WANDB_MODE=offline` keeps
    everything on this machine.

    Args:
        project: the project there.
        name: what to call the run.
        identity: the run's identity, its id there.
        config: the resolved config, as plain values.

    Raises:
        CnnlabError: the package is not installed.
    """
    try:
        import wandb as service
    except ImportError as error:
        raise _missing("wandb", error) from error
    # Opened at the first event: a run that is finished already must not open one there.
    opened: list[Any] = []

    def start(event: Event) -> None:
        opened.append(
            service.init(
                project=project,
                name=name,
                id=identity,
                config=dict(config),
                resume="allow",
                reinit="create_new",  # runs that are trained together are open at once
            )
        )

    def log(event: Event) -> None:
        opened[0].log(dict(event.metrics), step=event.step)

    def close(event: Event) -> None:
        opened[0].finish()

    return {"start": (start,), "log": (log,), "stop": (close,), "end": (close,)}


def mlflow(project: str, *, name: str, identity: str, config: Mapping[str, Any]) -> Callbacks:
    """Callbacks that log every line of metrics, and the config once, to MLflow.

    A run that goes on after a kill goes on there too: the run of this identity is looked for by its
    tag. Lines after the last checkpoint, which the kill undid, then stand there twice, with the
    same values.

    Args:
        project: MLflow's experiment; made if it is missing.
        name: what to call the run.
        identity: the run's identity, in the tag `cnnlab.identity`.
        config: the resolved config, as plain values; logged as parameters `section.key`.

    Raises:
        CnnlabError: the package is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves this machine unasked
    try:
        from mlflow import entities
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise _missing("mlflow", error) from error
    opened: list[tuple[Any, str]] = []  # the client and the run's id, from the first event on

    def start(event: Event) -> None:
        client = MlflowClient()
        there = client.get_experiment_by_name(project)
        experiment = there.experiment_id if there else client.create_experiment(project)
        found = client.search_runs([experiment], f"tags.`cnnlab.identity` = '{identity}'")
        if found:
            opened.append((client, found[0].info.run_id))
            client.update_run(opened[0][1], status="RUNNING")
            return
        run = client.create_run(experiment, run_name=name, tags={"cnnlab.identity": identity})
        opened.append((client, run.info.run_id))
        parameters = [entities.Param(k, str(v)) for k, v in _flat(config).items()]
        for first in range(0, len(parameters), 100):  # as many as MLflow takes at once
            client.log_batch(run.info.run_id, params=parameters[first : first + 100])

    def log(event: Event) -> None:
        client, run = opened[0]
        now = int(1000 * time.time())
        values = [
            entities.Metric(key, float(value), now, event.step)
            for key, value in event.metrics.items()
            if key != "step"
        ]
        client.log_batch(run, metrics=values)

    def close(status: str) -> Callable[[Event], None]:
        return lambda event: opened[0][0].set_terminated(opened[0][1], status)

    return {
        "start": (start,),
        "log": (log,),
        "stop": (close("KILLED"),),
        "end": (close("FINISHED"),),
    }


TRACKERS: dict[str, Callable[..., Callbacks]] = {"wandb": wandb, "mlflow": mlflow}
"""Name -> what makes a run's callbacks."""


def guard(service: str, name: str, callbacks: Callbacks) -> Callbacks:
    """These callbacks, silent for good after the first that raises, which is told as a warning.

    Args:
        service: the tracker, for the message.
        name: the run, for the message.
        callbacks: what may fail.
    """
    failed: list[Exception] = []

    def guarded(callback: Callable[[Event], None]) -> Callable[[Event], None]:
        def call(event: Event) -> None:
            if failed:
                return
            try:
                callback(event)
            except Exception as error:  # whatever a service raises: it must not cost the training
                failed.append(error)
                warnings.warn(
                    f"{service} failed at step {event.step} of {name} "
                    f"({type(error).__name__}: {error}); it gets no more of this run. Training "
                    "goes on, and the run's metrics.jsonl has every line",
                    CnnlabWarning,
                    stacklevel=2,
                )

        return call

    return {event: tuple(map(guarded, functions)) for event, functions in callbacks.items()}


def merge(*parts: Callbacks) -> Callbacks:
    """All callbacks of several mappings, in order."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: tuple(f for part in parts for f in part.get(name, ())) for name in names}


def _missing(package: str, error: ImportError) -> CnnlabError:
    return CnnlabError(
        f"the tracker {package} needs {error.name or package}, which is not installed: "
        f"pip install 'cnnlab[{package}]'"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"momentum": 0.9}}` as `{"optim.momentum": 0.9}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
