"""Workers that are jobs of a Slurm array, submitted by submitit and requeued when preempted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from cnnlab import backend
from cnnlab.sweep.launchers import Work, cohort_of, unfinished, work
from cnnlab.training import loop
from cnnlab.types import CnnlabError

LOGS = ".slurm"
"""The folder of the jobs' output, beside the runs' folders."""

POLL = 1.0  # seconds between two looks at the jobs


class Worker:
    """What a job does; submitit pickles it, calls it, and asks it to checkpoint at a signal.

    Args:
        task: what to do.
        index: which worker this is.
        of: how many there are.
    """

    def __init__(self, task: Work, index: int, of: int) -> None:
        self.task, self.index, self.of = task, index, of

    def __call__(self) -> None:
        """Works in a thread of its own, so that it gets on while a signal is handled."""
        backend.start()
        self._stop, self._failed = threading.Event(), list[BaseException]()
        self._thread = threading.Thread(target=self._work)
        # Of scancel, and of a cluster that requeues by itself: submitit would let it pass.
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        self._thread.start()
        while self._thread.is_alive():
            # Not join: a signal's handler, which joins, could come while it holds a lock.
            time.sleep(0.1)
        if self._failed:
            raise self._failed[0]

    def _work(self) -> None:
        try:
            work(self.task, index=self.index, of=self.of, should_stop=self._stop.is_set)
        except BaseException as error:  # raised again where submitit sees it
            self._failed.append(error)

    def checkpoint(self) -> Any:
        """Called at the signal that comes before a preemption or the time limit (SIGUSR2)."""
        from submitit.helpers import DelayedSubmission

        self._stop.set()
        self._thread.join()
        return DelayedSubmission(Worker(self.task, self.index, self.of))


def launch(
    task: Work,
    *,
    workers: int | None = None,
    settings: Mapping[str, str] | None = None,
    detach: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = print,
) -> None:
    """Submits the workers and returns when all have ended, or at once.

    Args:
        task: what to do; file and folders must be at the same path on all nodes.
        workers: how many jobs; one for each unfinished cohort if `None`.
        settings: of submitit's executor, such as `timeout_min`, `gpus_per_node` or
            `slurm_partition`; `cluster` is `slurm` (default) or, to try it out, `local`.
        detach: whether to return at once.
        should_stop: when true, all jobs are cancelled; their runs go on from their checkpoints.
        tell: takes lines about the jobs.

    Raises:
        CnnlabError: submitit is not installed, there is no Slurm, a setting is unknown, or a job
            failed.
        loop.Interrupted: `should_stop` said so.
    """
    try:
        import submitit
    except ImportError as error:
        raise CnnlabError(
            "--launcher slurm needs the package submitit: pip install 'cnnlab[slurm]'"
        ) from error
    parameters: dict[str, Any] = {k: _value(v) for k, v in (settings or {}).items()}
    cluster = parameters.pop("cluster", "slurm")
    logs = task.runs / LOGS
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{"name": f"cnnlab-{task.file.stem}"} | parameters)
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise CnnlabError(f"--slurm: {error}") from error
    if workers is None:
        workers = len({cohort_of(run) for run in unfinished(task)})
    jobs = executor.submit_array([Worker(task, index, workers) for index in range(workers)])
    tell(f"submitted {', '.join(job.job_id for job in jobs)}; their output: {logs}")
    if detach:
        return
    while not all(job.done() for job in jobs):
        if should_stop():
            for job in jobs:
                job.cancel()
            raise loop.Interrupted
        time.sleep(POLL)
    failed = [job for job in jobs if job.exception() is not None]
    if failed:
        last = str(failed[0].exception()).strip().splitlines()[-1]
        raise CnnlabError(
            f"{len(failed)} of {len(jobs)} jobs failed; {failed[0].job_id}: {last}\n"
            f"(all of it: {failed[0].paths.stderr})"
        )


def _value(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
