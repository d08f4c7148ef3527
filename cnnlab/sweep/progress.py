"""The live view of a sweep: runs done and to do, images a second, loss, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cnnlab.sweep.experiment import Run
from cnnlab.training import loop


class LiveProgress:
    """Draws a sweep on a terminal; without one, prints a line a finished run.

    Use it as a context manager.

    Args:
        console: where to draw.
        runs: all runs of the sweep.
        runs_folder: where they lie, for the lines printed.
    """

    def __init__(self, console: Console, runs: Sequence[Run], runs_folder: Path) -> None:
        self._console = console
        self._left = [run.identity for run in runs]
        self._rows = {run.identity: run.row for run in runs}
        self._seconds: dict[str, list[float]] = {}
        self._runs_folder = runs_folder
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all = self._bars.add_task("all runs", total=len(runs), state="")
        self._tasks: dict[str, TaskID] = {}
        self._trained = 0

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, run: Run) -> loop.Callbacks:
        """Shows a run's bar and returns the callbacks that move it."""
        name = f"{run.row}, seed {run.seed}"
        task = self._bars.add_task(name, total=None, state="compiling")
        self._tasks[run.identity] = task
        first: list[tuple[int, float]] = []
        shown = [0.0]

        def on_step(event: loop.Event) -> None:
            now = time.perf_counter()
            if not first:
                first.append((event.step, now))
            if now - shown[0] < 0.2 and event.step < event.steps:
                return
            shown[0] = now
            step, start = first[0]
            loss = event.metrics["loss"]
            state = f"loss {loss:.3f}" if math.isfinite(loss) else "started"
            if event.step > step:
                rate = (event.step - step) / (now - start)
                left = (event.steps - event.step) / rate
                state += f" · {rate * run.config.train.batch_size:,.0f} images/s"
                self._show_left(run, left, left + now - start)
            self._bars.update(task, total=event.steps, completed=event.step, state=state)

        return {"step": (on_step,)}

    def end(self, run: Run, result: dict[str, Any]) -> None:
        """Takes a run off the list and prints its line if it was trained now."""
        if run.identity in self._left:
            self._left.remove(run.identity)
        self._bars.update(self._all, advance=1)
        task = self._tasks.pop(run.identity, None)
        if task is None:
            return
        self._bars.remove_task(task)
        self._trained += 1
        seconds = result["cost"]["seconds"]
        self._seconds.setdefault(run.row, []).append(seconds)
        if result["status"] == "diverged":
            outcome = f"diverged at step {result['diverged_step']}"
        else:
            top1 = result["scores"]["test"]["top1"]
            outcome = (
                f"top-1 {100 * top1:.2f} % · {seconds:.0f} s · "
                f"{result['cost']['images_per_second']:,.0f} images/s"
            )
        if result.get("overfitted_step") is not None:
            outcome += f" · catastrophic overfitting from step {result['overfitted_step']}"
        self._console.print(
            f"{run.row}, seed {run.seed}: {outcome} · {self._runs_folder / run.folder}",
            highlight=False,
            soft_wrap=True,
        )

    def _show_left(self, run: Run, left: float, whole: float) -> None:
        """Expects of each waiting run what its row took before, or else the mean of all rows."""
        known = {row: sum(s) / len(s) for row, s in self._seconds.items()} | {run.row: whole}
        mean = sum(known.values()) / len(known)
        total = left + sum(
            known.get(self._rows[identity], mean)
            for identity in self._left
            if identity not in self._tasks
        )
        self._bars.update(self._all, state=f"about {_clock(total)} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )
