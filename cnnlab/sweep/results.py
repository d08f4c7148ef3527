"""What a finished experiment leaves under `results/` and shows on the terminal."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cnnlab import config as config_lib
from cnnlab import pipeline, record
from cnnlab.evaluation import corruption
from cnnlab.reporting import figures, tables
from cnnlab.sweep.executor import Plan
from cnnlab.sweep.experiment import Loaded
from cnnlab.training import run as run_lib
from cnnlab.types import CnnlabError


def write(
    loaded: Loaded, records: Sequence[dict[str, Any]], folder: Path
) -> tuple[tables.Table, list[Path]]:
    """Writes the table, the figures and one small JSON a run.

    Returns:
        The table, and the paths of what was written but for the runs' records.

    Raises:
        CnnlabError: the records can't stand in one table; then nothing is written.
    """
    records = with_corruption_errors(loaded.spec, records)
    table = tables.build(loaded.spec, records)
    names = file_names(loaded)
    for result in records:
        file = folder / "runs" / names[result["row"], result["seed"]]
        record.write_atomic(file, record.dump_json(result))
    # Rows and seeds that the experiment no longer has; what it has, but was not run here, stays.
    for stale in {p.name for p in (folder / "runs").glob("*.json")} - set(names.values()):
        (folder / "runs" / stale).unlink()
    written = list(tables.write(table, folder))
    if any(result["status"] == "done" for result in records):
        test = _test_split(loaded, records) if "mistakes" in loaded.figures else None
        written += figures.write_all(loaded.spec, records, folder, test, which=loaded.figures)
    return table, written


def with_corruption_errors(
    spec: tables.TableSpec, records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The records with their mean corruption error against their row's baseline.

    The baseline's errors are the means over its seeds. Where the table asks for none, or the
    baseline has not been run, the records stay as they are.
    """
    if "mce" not in spec.columns:
        return list(records)
    errors: dict[str, list[dict[str, list[float]]]] = {}
    for result in records:
        if "corrupted" in result["scores"]:
            errors.setdefault(result["row"], []).append(result["scores"]["corrupted"]["errors"])
    found = []
    for result in records:
        baseline = spec.baseline_of(result["row"])
        if baseline in errors and "corrupted" in result["scores"]:
            mean = {
                name: np.mean([one[name] for one in errors[baseline]], 0).tolist()
                for name in errors[baseline][0]
            }
            own = result["scores"]["corrupted"]
            own = own | {"mce": corruption.mean_corruption_error(own["errors"], mean)}
            result = result | {"scores": result["scores"] | {"corrupted": own}}
        found.append(result)
    return found


def read(loaded: Loaded, folder: Path, *, skip_others: bool = False) -> list[dict[str, Any]]:
    """The records under `results/`, each checked against the experiment as it stands now.

    Args:
        loaded: the experiment.
        folder: its folder under `results/`.
        skip_others: leave out what was made with other settings, instead of raising.

    Raises:
        CnnlabError: one was made with other settings; the message names them.
    """
    found = []
    names = file_names(loaded)
    for run in loaded.runs:
        file = folder / "runs" / names[run.row, run.seed]
        if not file.exists():
            continue
        result = record.read_json(file)
        if run.identity not in (result["identity"], _identity_now(result["config"])):
            if skip_others:
                continue
            different = config_lib.differences(
                result["config"], config_lib.plain(run.config), "now"
            )
            raise CnnlabError(
                f"{file} was made with other settings: {different}. Train again without --render, "
                "or restore the experiment file"
            )
        found.append(result | {"row": run.row})
    if not found and not skip_others:
        raise CnnlabError(f"{folder}/runs holds no results yet; train without --render")
    return found


def _identity_now(config: Mapping[str, Any]) -> str | None:
    """The identity of a saved config as a config of today: what it does not name has its default.

    Returns:
        `None` where today's code does not know a setting of it.
    """
    try:
        return config_lib.identity(config_lib.resolve(config_lib.from_plain(config), "a record"))
    except CnnlabError:
        return None


def show(console: Console, table: tables.Table | tables.Grid) -> None:
    """Prints the table on the terminal."""
    console.print()
    console.print(tables.to_rich(table, console.width), crop=False)


def show_scores(console: Console, result: Mapping[str, Any], folder: Path) -> None:
    """Prints the scores of one run."""
    if result["status"] == "diverged":
        console.print(f"{folder}: the loss was not finite at step {result['diverged_step']}")
        return
    print_scores(console, f"{folder.name}, test split", result["scores"]["test"])
    if result.get("overfitted_step") is not None:
        console.print(
            f"catastrophic overfitting from step {result['overfitted_step']}: training examples "
            "stand the training's single step but not PGD-10 in the same ball"
        )


def print_scores(console: Console, title: str, scores: Mapping[str, Any]) -> None:
    """Prints scores of one split, overall ones only."""
    console.print(title, soft_wrap=True)  # a title of the narrow table would be broken
    table = Table()
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


def file_names(loaded: Loaded) -> dict[tuple[str, int], str]:
    """(row, seed) -> the name of its file."""
    return {
        (row, seed): f"{slug}-s{seed}.json"
        for row, slug in slugs(loaded.spec.rows).items()
        for seed in loaded.spec.seeds
    }


def slugs(rows: Iterable[str]) -> dict[str, str]:
    """Row -> its name in plain letters, with a checksum of it where two rows would share one."""
    found = {row: re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-") for row in rows}
    shared = {slug for slug in found.values() if list(found.values()).count(slug) > 1 or not slug}
    for row, slug in found.items():
        if slug in shared:
            found[row] = f"{slug}-{zlib.crc32(row.encode()):08x}"
    return found


def _test_split(loaded: Loaded, records: Sequence[dict[str, Any]]) -> pipeline.Split:
    """The test split that the figure of mistakes shows: that of the row that it shows.

    Raises:
        CnnlabError: the data set here is not the one that was scored.
    """
    row = figures.shown_row(loaded.spec, records)
    test = run_lib.load_split(next(r for r in loaded.runs if r.row == row).config, "test")
    scored = next(r["test_set"]["fingerprint"] for r in records if r["row"] == row)
    if test.fingerprint != scored:
        raise CnnlabError(
            f"row {row!r}: the test images of {test.info.name} here (fingerprint "
            f"{test.fingerprint}) are not those that were scored ({scored})"
        )
    return test
