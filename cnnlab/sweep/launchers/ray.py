"""Workers that are tasks of a Ray cluster: one a cohort, or more."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from cnnlab import backend
from cnnlab.sweep.launchers import Work, cohort_of, unfinished, work
from cnnlab.training import loop
from cnnlab.types import CnnlabError

VARIABLES = ("CNNLAB_", "JAX_", "XLA_")
"""Beginnings of the names of those variables that the tasks get from here."""


def launch(
    task: Work,
    *,
    workers: int | None = None,
    address: str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    max_retries: int = 3,
    should_stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = print,
) -> None:
    """Gives the cluster a task for each cohort and returns when all are done.

    A task whose node has died is started on another one and goes on from the last checkpoints, if
    the runs' folder is shared, or begins its unfinished runs anew.

    Args:
        task: what to do; file and folders must be at the same path on all nodes.
        workers: how many tasks; at least, and by default, one for each unfinished cohort.
        address: of the cluster, `auto` for the one of this machine; if `None`, what `RAY_ADDRESS`
            names, or else a cluster of this machine alone that ends with the command.
        num_cpus: cores that a task asks for.
        num_gpus: likewise GPUs.
        resources: likewise what else the cluster's nodes offer, as in `{"TPU": 4}`.
        max_retries: how often a task is started again; -1: always.
        should_stop: when true, all tasks are cancelled; their runs go on from their checkpoints.
        tell: takes a line for each task that is done.

    Raises:
        CnnlabError: Ray is not installed, or can't be reached, or a task failed.
        loop.Interrupted: `should_stop` said so.
    """
    try:
        import ray
    except ImportError as error:
        raise CnnlabError(
            "--launcher ray needs the package ray: pip install 'cnnlab[ray]'"
        ) from error
    cohorts = list(dict.fromkeys(cohort_of(run) for run in unfinished(task)))
    if not ray.is_initialized():
        try:
            ray.init(address=address, include_dashboard=False if address is None else None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise CnnlabError(
                f"--address: expected a Ray cluster that is up, got {address!r}: {error}"
            ) from error
    inherited = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}
    remote = ray.remote(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        resources=dict(resources or {}),
        max_retries=max_retries,
        runtime_env={"env_vars": inherited},
    )(_worker)
    number = max(workers or 0, len(cohorts))
    waiting: dict[Any, str] = {}
    for index in range(number):
        part, parts = index // len(cohorts), -(-(number - index % len(cohorts)) // len(cohorts))
        name = f"cohort {index % len(cohorts) + 1} of {len(cohorts)}, worker {part + 1} of {parts}"
        waiting[remote.remote(task, cohorts[index % len(cohorts)], part, parts)] = name
    try:
        while waiting:
            if should_stop():
                raise loop.Interrupted
            done, _ = ray.wait(list(waiting), timeout=0.5)
            for reference in done:
                name = waiting.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise CnnlabError(f"{name}: {_reason(error)}") from error
                tell(f"{name}: done")
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _worker(task: Work, cohort: str, part: int, parts: int) -> None:
    """What a task does, in a process of the cluster."""
    backend.start()
    work(task, index=part, of=parts, cohort=cohort)


def _reason(error: BaseException) -> str:
    """What a user needs of an error that came from a task."""
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, CnnlabError) else str(error).strip()
