"""Several workers train one experiment: what each does, wherever a launcher has started it.

There is no queue and nobody in charge. A worker goes through the runs, takes the lease on one that
is not finished and that nobody holds (`cnnlab.sweep.leases`), brings it to its end and goes on;
when all that is left is held by others it waits, and takes over what a dead worker left, from its
last checkpoint. The unit is a single run (with `together`, as many runs of one cohort as are free):
each worker starts in a cohort of its own and stays there while it finds anything, so that a program
is compiled by few workers, and a cohort is split where there are more workers than cohorts.

A launcher is a file here with a function `launch`; the command line knows its settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cnnlab import config as config_lib
from cnnlab import record
from cnnlab.sweep import executor, experiment, leases
from cnnlab.sweep.experiment import Loaded, Run
from cnnlab.sweep.progress import LiveProgress
from cnnlab.training import loop, strategies, trackers
from cnnlab.training.step import Programs

LAUNCHERS = ("local", "ray", "slurm")

LEASES = ".leases"
"""The folder of the leases, beside the runs' folders."""

WORKERS = ".workers"
"""The folder of the workers' logs, beside the runs' folders: who began and finished what, when."""

PUBLISHED = ("config.json", "metrics.jsonl", "seconds.jsonl", "predictions.npz", "result.json")
"""What of a run goes to object storage, in this order: a run that has its result there has all."""

POLL = 2.0  # seconds between two looks at what others hold, at most


@dataclasses.dataclass(frozen=True)
class Work:
    """What a sweep's workers have to do; it travels to wherever they are.

    Attributes:
        file: the experiment file, at the same path for all.
        runs: the runs' folder, which all share; with `store`, scratch space of each machine.
        rows: only these rows; all if empty.
        seeds: only these seeds; all if empty.
        together: how many runs of a cohort a worker trains at once, as one program; 0: all it gets.
        strategy: how they are trained then; see `cnnlab.training.strategies`.
        lease_seconds: after how long without a heartbeat a worker counts as dead.
        store: where finished runs and leases lie if not in `runs`: a folder, or an address of
            object storage such as `gs://bucket/folder`. Unfinished runs stay where they train.
        trackers: what else the runs are logged to, each as `trackers.create` takes it.
    """

    file: Path
    runs: Path
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    together: int = 1
    strategy: str = strategies.AUTO
    lease_seconds: float = leases.SECONDS
    store: str = ""
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks what would otherwise be told by each worker."""
        self.held()

    def held(self) -> leases.Leases:
        """The leases on its runs, as a worker sees them.

        Raises:
            CnnlabError: `lease_seconds` is not positive, or nothing is known of such a `store`.
        """
        return leases.Leases(f"{self.store or self.runs}/{LEASES}", seconds=self.lease_seconds)

    def load(self) -> tuple[Loaded, list[Run]]:
        """The experiment, and its runs that are asked for, each once, cohort by cohort."""
        loaded = experiment.load(self.file)
        cohorts: dict[str, dict[str, Run]] = {}
        for run in experiment.select(loaded, self.rows, self.seeds):
            cohorts.setdefault(cohort_of(run), {}).setdefault(run.identity, run)
        return loaded, [run for cohort in cohorts.values() for run in cohort.values()]

    def finished(self, run: Run, extras: Sequence[str]) -> bool:
        """Whether nothing is left to do of a run: it has its result, with these scores, too.

        Raises:
            CnnlabError: the record is damaged, or is another run's.
        """
        result: dict[str, Any] | None
        if self.store:
            text = _read(self.place / run.folder / "result.json")
            result = None if text is None else json.loads(text)
        else:
            result = executor.finished(run, self.runs)
        return result is not None and (
            result["status"] != "done" or {*extras} <= {*result["scores"]}
        )

    @property
    def place(self) -> Any:
        """Where finished runs lie, as a path or an `etils.epath.Path`."""
        if "://" in self.store:
            return leases.object_path(self.store)
        return Path(self.store or self.runs)


def cohort_of(run: Run) -> str:
    """Runs of which this is equal share a compiled program."""
    return config_lib.program(run.config)


def unfinished(task: Work) -> list[Run]:
    """The runs that are left to do, cohort by cohort.

    Raises:
        CnnlabError: the experiment does not fit, or a record is damaged.
    """
    loaded, runs = task.load()
    return [run for run in runs if not task.finished(run, loaded.extras)]


def work(
    task: Work,
    *,
    index: int = 0,
    of: int = 1,
    cohort: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> None:
    """A worker's life: trains what is free until all is finished, by whomever.

    Args:
        task: what to do.
        index: which worker this is, from 0; each starts elsewhere.
        of: how many workers there are, about.
        cohort: only the runs of this cohort (`cohort_of`).
        should_stop: see `loop.fit`; also asked between runs.
        console: where finished runs are told.

    Raises:
        CnnlabError: something does not fit.
        loop.Interrupted: `should_stop` said so; the runs held are checkpointed and let go.
    """
    loaded, runs = task.load()
    runs = [run for run in runs if cohort in (None, cohort_of(run))]
    first = index * len(runs) // max(of, 1) % max(len(runs), 1)
    left = [*runs[first:], *runs[:first]]
    held = task.held()
    console = console or Console(highlight=False, markup=False)
    programs, journal = Programs(), _Journal(task.runs / WORKERS)
    with LiveProgress(console, runs, task.runs) as progress:
        while left := [run for run in left if not task.finished(run, loaded.extras)]:
            worked = False
            # Closed at once whatever happens, so that no lease outlives what was done under it.
            with contextlib.closing(_take(left, held, task, loaded, should_stop)) as groups:
                for group in groups:
                    worked = True
                    by_run = {run.identity: lease for run, lease in group}
                    try:
                        executor.execute(
                            [run for run, _ in group],
                            task.runs,
                            programs=programs,
                            progress=progress,
                            track=functools.partial(_callbacks, task, by_run, journal),
                            should_stop=should_stop,
                            together=task.together,
                            strategy=task.strategy,
                            extras=loaded.extras,
                            allow=loaded.allow,
                        )
                        for run, lease in group:
                            if task.store:
                                lease.confirm()
                                publish(task.runs / run.folder, task.place / run.folder)
                            journal.write("finish", run)
                    except leases.LeaseLostError as error:
                        console.print(f"left to another worker: {error}", soft_wrap=True)
            if not worked:
                _rest(should_stop)
                time.sleep(min(POLL, task.lease_seconds / leases.BEATS))


def _rest(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise loop.Interrupted


def _take(
    left: Sequence[Run],
    held: leases.Leases,
    task: Work,
    loaded: Loaded,
    should_stop: Callable[[], bool],
) -> Generator[list[tuple[Run, leases.Lease]], None, None]:
    """Goes once through the runs; gives those that are free, up to `together` of one cohort.

    Their leases are held until the next is asked for.
    """
    waiting = list(left)
    while waiting:
        _rest(should_stop)
        group: list[tuple[Run, leases.Lease]] = []
        cohort = cohort_of(waiting[0])
        with contextlib.ExitStack() as stack:
            while waiting and cohort_of(waiting[0]) == cohort:
                if len(group) == (task.together or len(left)):
                    break
                run = waiting.pop(0)
                lease = None
                if not task.finished(run, loaded.extras):
                    lease = held.acquire(run.folder)
                if lease is None:
                    continue
                # It may have been finished, and let go, in between.
                free = not task.finished(run, loaded.extras) and not _locked(task.runs / run.folder)
                if free:
                    group.append((run, stack.enter_context(lease)))
                else:
                    lease.release()
            if group:
                yield group


def _callbacks(
    task: Work, by_run: Mapping[str, leases.Lease], journal: _Journal, run: Run
) -> loop.Callbacks:
    return trackers.merge(_guards(by_run, journal, run), executor.tracked(task.trackers, run))


def _guards(by_run: Mapping[str, leases.Lease], journal: _Journal, run: Run) -> loop.Callbacks:
    """Callbacks that end a run whose lease is lost, before it writes anything more."""
    lease = by_run[run.identity]

    def check(_: loop.Event) -> None:
        lease.check()

    def confirm(_: loop.Event) -> None:
        lease.confirm()

    def start(event: loop.Event) -> None:
        journal.write("start", run, step=event.step)

    return {
        "start": (start,),
        **dict.fromkeys(("step", "log", "eval", "checkpoint"), (check,)),
        **dict.fromkeys(("end", "finish"), (confirm,)),
    }


def _locked(folder: Path) -> bool:
    """Whether a process of this machine still works there: one that has lost its lease, say."""
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without such locks
            raise
    return False


class _Journal:
    """What one worker began and finished, a JSON line each, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        name = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / name

    def write(self, event: str, run: Run, **facts: Any) -> None:
        line = {"event": event, "run": run.folder, "time": time.time(), **facts}
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")


def publish(folder: Path, place: Any) -> None:
    """Copies a finished run's files to where it is kept, its result last.

    Args:
        folder: the run's folder.
        place: the run's folder there, a path or an `etils.epath.Path`.
    """
    place.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        if (folder / name).exists():  # a diverged run has no predictions
            content = (folder / name).read_bytes()
            if isinstance(place, Path):
                record.write_atomic(place / name, content)
            else:
                (place / name).write_bytes(content)  # which shows at once and whole, or not at all


def fetch(task: Work, runs: Sequence[Run]) -> None:
    """Copies finished runs from the store to the runs' folder, where they are missing there."""
    if not task.store:
        return
    for run in runs:
        there, here = task.place / run.folder, task.runs / run.folder
        if not (there / "result.json").exists() or (here / "result.json").exists():
            continue
        for name in PUBLISHED:
            if (there / name).exists():
                record.write_atomic(here / name, (there / name).read_bytes())


def _read(path: Any) -> str | None:
    try:
        return str(path.read_text())
    except FileNotFoundError:
        return None
