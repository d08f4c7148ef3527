"""Trackers: callbacks that copy a run's metrics to a service; `metrics.jsonl` stays the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnlab.training.loop import Callbacks, Event
from cnnlab.types import CnnlabError


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
        raise CnnlabError("--wandb needs the package wandb: pip install 'cnnlab[wandb]'") from error
    # Opened at the first event: a run that is finished already must not open one there.
    opened: list[Any] = []

    def start(event: Event) -> None:
        opened.append(
            service.init(
                project=project, name=name, id=identity, config=dict(config), resume="allow"
            )
        )

    def log(event: Event) -> None:
        opened[0].log(dict(event.metrics), step=event.step)

    def close(event: Event) -> None:
        opened[0].finish()

    return {"start": (start,), "log": (log,), "stop": (close,), "end": (close,)}


def merge(*parts: Callbacks) -> Callbacks:
    """All callbacks of several mappings, in order."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: tuple(f for part in parts for f in part.get(name, ())) for name in names}
