"""What a finished experiment leaves under `results/` and shows on the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cnnlab import config as config_lib
from cnnlab import pipeline, record
from cnnlab.reporting import figures, tables
from cnnlab.sweep.executor import Plan
from cnnlab.sweep.experiment import Loaded, Run
from cnnlab.training import run as run_lib
from cnnlab.types import CnnlabError


def write(loaded: Loaded, records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the table, the figures and one small JSON a run; returns the paths.

    Raises:
        CnnlabError: the records can't stand in one table; then nothing is written.
    """
    table = tables.build(loaded.spec, records)
    names = {_file_name(r["row"], r["seed"]): r for r in records}
    if len(names) < len(records):
        raise CnnlabError(f"{loaded.name}: two rows have the same name but for punctuation")
    for name, result in names.items():
        record.write_atomic(folder / "runs" / name, record.dump_json(result))
    for stale in set((folder / "runs").glob("*.json")) - {folder / "runs" / name for name in names}:
        stale.unlink()
    written = list(tables.write(table, folder))
    test = _test_split(loaded.runs[0])
    drawable = [r for r in records if r["status"] == "done"]
    if drawable:
        written += figures.write_all(
            loaded.spec, drawable, folder, test.examples.images, which=loaded.figures
        )
    return written


def read(loaded: Loaded, folder: Path) -> list[dict[str, Any]]:
    """The records under `results/`, each checked against the experiment as it stands now.

    Raises:
        CnnlabError: one was made with other settings; the message names them.
    """
    found = []
    for run in loaded.runs:
        file = folder / "runs" / _file_name(run.row, run.seed)
        if not file.exists():
            continue
        result = record.read_json(file)
        if result["identity"] != run.identity:
            different = config_lib.differences(
                result["config"], config_lib.plain(run.config), "now"
            )
            raise CnnlabError(
                f"{file} was made with other settings: {different}. Train again without --render, "
                "or restore the experiment file"
            )
        found.append(result)
    if not found:
        raise CnnlabError(f"{folder}/runs holds no results yet; train without --render")
    return found


def show(console: Console, loaded: Loaded, records: Sequence[dict[str, Any]]) -> None:
    """Prints the table on the terminal."""
    console.print()
    console.print(tables.to_rich(tables.build(loaded.spec, records)))


def show_scores(console: Console, result: Mapping[str, Any], folder: Path) -> None:
    """Prints the scores of one run."""
    if result["status"] == "diverged":
        console.print(f"{folder}: the loss was not finite at step {result['diverged_step']}")
        return
    print_scores(console, f"{folder.name}, test split", result["scores"]["test"])


def print_scores(console: Console, title: str, scores: Mapping[str, Any]) -> None:
    """Prints scores of one split, overall ones only."""
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
    console.print(table)


def print_plan(console: Console, plans: Sequence[Plan]) -> None:
    """Prints what would run, how long it should take, and how many programs would be compiled."""
    table = Table(title="what would run", title_justify="left")
    for name in ("row", "seed", "steps", "expected", "after", "folder"):
        table.add_column(name, justify="left" if name in ("row", "after", "folder") else "right")
    for plan in plans:
        expected = "done" if plan.done else f"{plan.seconds:.0f} s"
        table.add_row(
            plan.run.row,
            str(plan.run.seed),
            f"{plan.steps:,}",
            expected,
            plan.basis,
            plan.run.folder,
        )
    console.print(table)
    todo = [plan for plan in plans if not plan.done]
    programs = {config_lib.program(plan.run.config) for plan in todo}
    total = sum(plan.seconds for plan in todo)
    console.print(
        f"{len(todo)} of {len(plans)} runs to do, {len(programs)} programs to compile, about "
        f"{total / 60:.1f} minutes of training (compilation, scoring and checkpoints come on top)"
    )


def _test_split(run: Run) -> pipeline.Split:
    return run_lib.load_split(run.config, "test")


def _file_name(row: str, seed: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")
    return f"{slug}-s{seed}.json"
