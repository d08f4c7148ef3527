"""Runs to be done, to runs that are done: one after another, cohorts sharing a compilation."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from cnnlab import augment, parallel, record
from cnnlab import config as config_lib
from cnnlab.sweep.experiment import Run
from cnnlab.training import loop, optim, strategies, trackers
from cnnlab.training import run as run_lib
from cnnlab.training.step import Programs
from cnnlab.types import Batch, CnnlabError


class Progress(Protocol):
    """Who watches a sweep; see `cnnlab.sweep.progress`."""

    def begin(self, run: Run) -> loop.Callbacks:
        """A run starts (or goes on)."""

    def end(self, run: Run, result: dict[str, Any]) -> None:
        """A run has finished, now or earlier."""


def finished(run: Run, runs_folder: Path) -> dict[str, Any] | None:
    """The record of a run that is done, under this run's row name, or `None`.

    Raises:
        CnnlabError: the record is damaged, or is another run's.
    """
    result = record.read_result(runs_folder / run.folder)
    if result is None:
        return None
    if result["identity"] != run.identity:
        raise CnnlabError(
            f"{runs_folder / run.folder}/result.json is of run {result['identity']}, not of "
            f"{run.identity}; remove the folder"
        )
    return result | {"row": run.row}


def tracked(names: Sequence[str], run: Run) -> loop.Callbacks:
    """The callbacks of the trackers of these names, each as `trackers.create` takes it.

    Raises:
        CnnlabError: there is no such tracker, or its package is not installed.
    """
    if not parallel.is_first():
        return {}
    called, config = f"{run.row}, seed {run.seed}", config_lib.plain(run.config)
    return trackers.merge(
        *(trackers.create(n, name=called, identity=run.identity, config=config) for n in names)
    )


def execute(
    runs: Sequence[Run],
    runs_folder: Path,
    *,
    programs: Programs,
    progress: Progress,
    track: Callable[[Run], loop.Callbacks] = lambda _: {},
    should_stop: Callable[[], bool] = lambda: False,
    together: int = 1,
    strategy: str = strategies.AUTO,
    extras: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Brings all runs to their end and returns their records, in the order of `runs`.

    Finished runs are read, not repeated. The others go cohort by cohort: those that share a
    compiled program stand together. Every cohort's model is checked against the data before
    anything trains.

    Args:
        runs: what to do.
        runs_folder: where the runs' folders lie.
        programs: the compiled programs, shared.
        progress: told of begins and ends.
        track: more callbacks for a run; see `tracked`.
        should_stop: see `loop.fit`.
        together: how many runs of a cohort are trained at once; 0: all.
        strategy: how they are, see `cnnlab.training.strategies`; `auto` measures.
        extras: scores to measure after training, of `run.EXTRAS`.
        allow: findings about attacks that are accepted, of `checklist.CHECKS`.

    Raises:
        CnnlabError: something does not fit.
        loop.Interrupted: `should_stop` said so.
    """
    record.code_version()  # before anything can change the sources on disk
    records: dict[str, dict[str, Any]] = {}
    waiting: dict[str, list[Run]] = {}
    for run in runs:
        result = finished(run, runs_folder)
        if result is None:
            waiting.setdefault(config_lib.program(run.config), []).append(run)
        else:
            records[run.identity] = result
            progress.end(run, result)
    check([run for cohort in waiting.values() for run in cohort], programs)
    for cohort in waiting.values():
        by_identity: dict[str, Run] = {}
        for run in cohort:
            by_identity.setdefault(run.identity, run)
        new = list(by_identity.values())
        for start in range(0, len(new), together or len(new)):
            group = new[start : start + (together or len(new))]
            jobs = [
                run_lib.Job(
                    run.config,
                    runs_folder / run.folder,
                    run.row,
                    trackers.merge(progress.begin(run), track(run)),
                )
                for run in group
            ]
            results = run_lib.train(
                jobs, programs=programs, should_stop=should_stop, strategy=strategy
            )
            for run, result in zip(group, results, strict=True):
                records[run.identity] = result
                for same in cohort:
                    if same.identity == run.identity:
                        progress.end(same, result)
    if extras:
        for run in runs:
            folder = runs_folder / run.folder
            records[run.identity] = run_lib.extend(folder, extras, programs, allow=allow)
            if parallel.anywhere(should_stop()):
                raise loop.Interrupted
    return [records[run.identity] | {"row": run.row} for run in runs]


def check(runs: Sequence[Run], programs: Programs) -> None:
    """Finds at once what would fail hours later; each program is traced once.

    Raises:
        CnnlabError: a run's data, durations or model do not fit; the message names its row.
    """
    seen: set[str] = set()
    for run in runs:
        key = config_lib.program(run.config)
        _check(run, programs, first=key not in seen)
        seen.add(key)


def _check(run: Run, programs: Programs, *, first: bool) -> None:
    """Finds at once what would fail hours later: data, durations, and a traced model.

    Args:
        run: a run to be done.
        programs: shared.
        first: whether the run is the first of its cohort, for which the program is traced.
    """
    config = run.config
    try:
        split = run_lib.load_split(config, "train")
        run_lib.load_split(config, "test")
        stream = run_lib.make_stream(config, split)
        optim.hyper(config, examples=len(stream.train))
        if not first:
            return
        program = programs.get(config, split.info, config_lib.program(config))
        images = jax.ShapeDtypeStruct((1, *split.info.image_shape), jnp.float32)
        transforms = tuple(config.augment.transforms)
        labels = jax.ShapeDtypeStruct((1,), jnp.int32)
        if augment.soft_labels(transforms):
            labels = jax.ShapeDtypeStruct((1, split.info.num_classes), jnp.float32)
        example = Batch(
            images,  # type: ignore[arg-type]
            labels,  # type: ignore[arg-type]
            jax.ShapeDtypeStruct((1,), jnp.float32),  # type: ignore[arg-type]
        )
        key = jax.random.key(0)
        jax.eval_shape(augment.compose(transforms), key, example)
        rngs = {"params": key, "dropout": key}
        jax.eval_shape(functools.partial(program.module.init, train=True), rngs, images)
    except CnnlabError as error:
        raise CnnlabError(f"row {run.row!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        run: the run.
        done: whether it is finished already.
        steps: updates.
        seconds: expected training time, 0 where done.
        basis: where the expectation comes from: `done`, `another run` or `measured`.
    """

    run: Run
    done: bool
    steps: int
    seconds: float
    basis: str


def plan(runs: Sequence[Run], runs_folder: Path, programs: Programs) -> list[Plan]:
    """How long each run should take.

    The speed is that of a finished run of the same program, or else the median of five updates made
    now (their result is thrown away).
    """
    known: dict[str, float] = {}
    results = {run.identity: finished(run, runs_folder) for run in runs}
    for run in runs:
        result = results[run.identity]
        if result is not None and result["status"] == "done":
            known.setdefault(config_lib.program(run.config), result["cost"]["images_per_second"])
    plans = []
    for run in runs:
        split = run_lib.load_split(run.config, "train")
        steps = run_lib.steps_of(run.config, split)
        key = config_lib.program(run.config)
        if results[run.identity] is not None:
            plans.append(Plan(run, True, steps, 0.0, "done"))
            continue
        basis = "another run" if key in known else "measured"
        if key not in known:
            known[key] = _speed(run, programs)
        seconds = steps * run.config.train.batch_size / known[key]
        plans.append(Plan(run, False, steps, seconds, basis))
    return plans


def _speed(run: Run, programs: Programs) -> float:
    """Images a second, from the median of five updates after one that compiles."""
    config = run.config
    split = run_lib.load_split(config, "train")
    stream = run_lib.make_stream(config, split)
    program = programs.get(config, split.info, config_lib.program(config))
    hyper = optim.hyper(config, examples=len(stream.train))
    state, seconds = program.init(config.seed, hyper), []
    for step in range(6):
        start = time.perf_counter()
        state, _ = program.train_step(
            state, split.fed(stream.batch(step)), jnp.int32(config.seed), hyper
        )
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    return float(config.train.batch_size / statistics.median(seconds[1:]))
