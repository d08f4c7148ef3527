"""Records of finished runs -> one table: Markdown, LaTeX, CSV, terminal.

`build` is a pure function from a `TableSpec` and the records to a `Table`; the writers only lay it
out. A table says nothing that its runs do not support: bold means significantly better than the
baseline (never "best mean"), runs of different settings are not averaged, and missing and diverged
runs are named. Values are in the unit of their column (percent for accuracies).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cnnlab.config import flatten
from cnnlab.encoding import decode_labels
from cnnlab.record import SCHEMA, write_atomic
from cnnlab.registry import did_you_mean
from cnnlab.reporting import statistics
from cnnlab.types import CnnlabError, Record

if TYPE_CHECKING:
    from rich.console import Group

ALPHA = 0.05
MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
WORSE = "†"
Published = float | tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Column:
    """One kind of number that a table can show; an entry in `COLUMNS` is all it takes.

    Attributes:
        header: the printed heading.
        getter: record -> value in the column's unit; raises `KeyError` where the record has none.
        formatter: value -> text; also formats the standard deviation.
        higher_is_better: `None` for quantities that are chosen rather than achieved.
        unit: what the values are counted in; `""` for plain counts.
        predictions: the key in the record's `predictions` whose accuracy (or error) the column
            shows in percent; such a column is tested against the baseline.
        of_model: known before training, so a diverged run has it too.
        extra: the score that a run measures for it after training, `""` where every run has it.
    """

    header: str
    getter: Callable[[Record], float]
    formatter: Callable[[float], str]
    higher_is_better: bool | None
    unit: str
    predictions: str | None = None
    of_model: bool = False
    extra: str = ""


def compact(value: float) -> str:
    """Three significant digits with k, M, G or T: 61706 -> '61.7k', 999950 -> '1.00M'."""
    for scale, suffix in ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        scaled = value / scale
        if abs(scaled) < 999.5 or suffix == "T":
            break
    if suffix == "":
        return f"{scaled:.0f}" if float(scaled).is_integer() else f"{scaled:.3g}"
    return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{suffix}"


def _score(split: str, name: str, factor: float = 100.0) -> Callable[[Record], float]:
    return lambda record: factor * record["scores"][split][name]


def _percent(value: float) -> str:
    return f"{value:.2f}"


def _percent_column(
    header: str, name: str, split: str = "test", better: bool = True, predictions: str | None = None
) -> Column:
    return Column(header, _score(split, name), _percent, better, "%", predictions)


COLUMNS: dict[str, Column] = {
    "top1": _percent_column("Top-1 (%)", "top1", predictions="test"),
    "top1_error": Column(
        "Top-1 error (%)",
        lambda record: 100 * (1 - record["scores"]["test"]["top1"]),
        _percent,
        False,
        "%",
        predictions="test",
    ),
    "top5": _percent_column("Top-5 (%)", "top5"),
    "validation_top1": _percent_column("Validation top-1 (%)", "top1", "validation"),
    "corrupted": Column(
        "Corrupted top-1 (%)",
        _score("corrupted", "top1"),
        _percent,
        True,
        "%",
        extra="corrupted",
    ),
    "mce": Column("mCE (%)", _score("corrupted", "mce"), _percent, False, "%", extra="corrupted"),
    "nll": Column("NLL (nats)", _score("test", "nll", 1.0), "{:.4f}".format, False, "nats"),
    "ece": _percent_column("ECE (%)", "ece", better=False),
    "precision": _percent_column("Precision, macro (%)", "precision_macro"),
    "recall": _percent_column("Recall, macro (%)", "recall_macro"),
    "f1": _percent_column("F1, macro (%)", "f1_macro"),
    "parameters": Column(
        "Parameters", lambda r: r["cost"]["parameters"], compact, None, "", of_model=True
    ),
    "macs": Column("MACs", lambda r: r["cost"]["macs"], compact, None, "", of_model=True),
    "seconds": Column("Training (s)", lambda r: r["cost"]["seconds"], "{:.1f}".format, False, "s"),
    "seconds_per_epoch": Column(
        "Seconds an epoch",
        lambda r: r["cost"]["seconds"] / r["curves"][-1]["epoch"],
        "{:.1f}".format,
        False,
        "s",
    ),
    "images_per_second": Column(
        "Images/s", lambda r: r["cost"]["images_per_second"], "{:.0f}".format, True, "1/s"
    ),
    "steps": Column("Steps", lambda r: r["cost"]["steps"], "{:.5g}".format, None, ""),
    "epochs": Column("Epochs", lambda r: r["curves"][-1]["epoch"], "{:.4g}".format, None, ""),
}
"""Column name -> column, for every table and figure."""


def column(name: str) -> Column:
    """The column of this name; `"pgd(eps=0.1), first 1000"` is the accuracy under an attack.

    Raises:
        CnnlabError: there is none; the message names the nearest ones.
    """
    attack, several, examples = name.rpartition(", first ")
    if several:
        return Column(
            f"{attack}, first {examples} (%)",
            lambda record: 100 * record["scores"][name]["top1"],
            _percent,
            True,
            "%",
            predictions=name,
            extra=name,
        )
    if name not in COLUMNS:
        raise CnnlabError(
            f"unknown column {name!r}{did_you_mean(name, COLUMNS)}. Known: {', '.join(COLUMNS)}"
        )
    return COLUMNS[name]


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """What a table shows.

    Attributes:
        name: file and label name.
        title: the caption.
        rows: the rows in the order printed.
        seeds: the seeds that every row should have.
        columns: names in `COLUMNS`, in the order printed.
        baseline: the row that the others are tested against, or `None`. Several make blocks: each
            row is tested against the nearest of them above it.
        published: row -> column -> a number, or (mean, std), in the column's unit.
        published_source: where the published numbers stand.
        test: `"auto"` (bootstrap over seeds and examples; McNemar where there is one seed),
            `"bootstrap"` or `"mcnemar"`.
        varied: dotted config keys in which rows may differ. A key covers all below it: `model`
            covers `model.depth`.
        command: what makes the table again; printed below it.
        notes: what else to say below it.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[str, ...] = ("top1", "parameters", "macs", "seconds")
    baseline: str | tuple[str, ...] | None = None
    published: Mapping[str, Mapping[str, Published]] = dataclasses.field(default_factory=dict)
    published_source: str = ""
    test: Literal["auto", "bootstrap", "mcnemar"] = "auto"
    varied: tuple[str, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that every name is known and stands once."""
        for what, given in (("row", self.rows), ("seed", self.seeds), ("column", self.columns)):
            if not given:
                raise CnnlabError(f"table {self.name!r} has no {what}s; give at least one")
            twice = [item for item in dict.fromkeys(given) if given.count(item) > 1]
            if twice:
                raise CnnlabError(f"table {self.name!r} names the {what} {twice[0]!r} twice")
        for name in self.columns:
            column(name)
        for baseline in self.baselines:
            _known(baseline, self.rows, "baseline", self.name)
        if len(self.baselines) > 1 and self.rows[0] not in self.baselines:
            raise CnnlabError(
                f"table {self.name!r}: with several baselines each block of rows starts with its "
                f"own, but the first row, {self.rows[0]!r}, is none of {self.baselines}"
            )
        for row, numbers in self.published.items():
            _known(row, self.rows, "row with published numbers", self.name)
            for name in numbers:
                _known(name, self.columns, f"column with a published number of {row!r}", self.name)
        if self.published and not self.published_source:
            raise CnnlabError(
                f"table {self.name!r} has published numbers without a published_source; "
                "name the paper and its table"
            )
        if self.test not in ("auto", "bootstrap", "mcnemar"):
            raise CnnlabError(
                f"table {self.name!r}: test is {self.test!r}; "
                "expected 'auto', 'bootstrap' or 'mcnemar'"
            )

    @property
    def baselines(self) -> tuple[str, ...]:
        """All baselines."""
        if isinstance(self.baseline, str):
            return (self.baseline,)
        return self.baseline or ()

    def baseline_of(self, row: str) -> str | None:
        """The row that this one is tested against; itself for a baseline."""
        if len(self.baselines) < 2:
            return self.baselines[0] if self.baselines else None
        above = self.rows[: self.rows.index(row) + 1]
        return next(name for name in reversed(above) if name in self.baselines)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of one row: the summary over seeds (`None` where no run has it) and its text."""

    summary: statistics.Summary | None
    text: str


@dataclasses.dataclass(frozen=True)
class Tested:
    """A row against the baseline in one column, in percentage points of that column.

    Attributes:
        comparison: the difference and its interval in points; positive is a larger number.
        p_holm: the p-value after Holm's correction over all tests of the table.
        verdict: `"better"` or `"worse"` where p_holm < 0.05, else `""`.
    """

    comparison: statistics.Comparison
    p_holm: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: as in the experiment.
        cells: column -> cell.
        tests: tested column -> comparison with the baseline; empty for the baseline itself.
        done: seeds of the runs that finished.
        diverged: seed -> the step at which that run stopped.
        missing: seeds that were not run.
        code: the code versions that made the runs.
    """

    name: str
    cells: dict[str, Cell]
    tests: dict[str, Tested]
    done: tuple[int, ...]
    diverged: dict[int, int | None]
    missing: tuple[int, ...]
    code: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A finished table: its specification, its rows and the notes below it."""

    spec: TableSpec
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The texts of a table, which the writers lay out.

    Attributes:
        name: file and label name.
        title: the caption.
        headers: one a column; the first column holds the rows' names.
        lines: the cells of each row as (text, bold).
        notes: below the table.
        starts: positions of rows that a rule stands above.
    """

    name: str
    title: str
    headers: Sequence[str]
    lines: Sequence[Sequence[tuple[str, bool]]]
    notes: Sequence[str]
    starts: Sequence[int] = ()


def build(spec: TableSpec, records: Iterable[Record]) -> Table:
    """The table of these runs.

    Args:
        spec: what to show.
        records: one a run, in any order; runs that are not there are shown as missing.

    Raises:
        CnnlabError: the runs do not belong into one table: a row or seed that the specification
            does not name, a run given twice, settings that differ where they should not, different
            test sets, a record without a column's number.
    """
    runs = by_row(spec, records)
    tests = _tests(spec, runs)
    rows = tuple(_row(spec, name, runs[name], tests.get(name, {})) for name in spec.rows)
    return Table(spec, rows, tuple(_notes(spec, runs, rows)))


def by_row(spec: TableSpec, records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Row -> seed -> record, checked; rows and seeds in the order of the specification.

    Raises:
        CnnlabError: as `build`.
    """
    runs: dict[str, dict[int, Record]] = {name: {} for name in spec.rows}
    for record in records:
        name, seed = record["row"], record["seed"]
        where = f"table {spec.name!r}: {name} seed {seed}"
        if record.get("schema") != SCHEMA:
            raise CnnlabError(
                f"{where}: expected a record of schema {SCHEMA}, got {record.get('schema')!r}; "
                "it was written by another version of cnnlab"
            )
        _known(name, spec.rows, "row of a record", spec.name)
        if seed not in spec.seeds:
            raise CnnlabError(f"{where}: expected a seed out of {_listed(spec.seeds)}")
        if record["status"] not in ("done", "diverged"):
            raise CnnlabError(f"{where}: the status is {record['status']!r}, not done or diverged")
        if seed in runs[name]:
            raise CnnlabError(
                f"{where} is given twice: runs {runs[name][seed]['identity']} and "
                f"{record['identity']}; keep one of them"
            )
        runs[name][seed] = record
    runs = {name: {seed: runs[name][seed] for seed in spec.seeds if seed in runs[name]}
            for name in spec.rows}  # fmt: skip
    _check_settings(spec, runs)
    _check_test_sets(spec, runs)
    return runs


def _known(name: str, known: Sequence[str], what: str, table: str) -> None:
    if name not in known:
        raise CnnlabError(
            f"table {table!r}: unknown {what} {name!r}{did_you_mean(name, known)}. "
            f"Known: {_listed(known)}"
        )


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


_ABSENT = object()


def _first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], allowed: Sequence[str]
) -> tuple[str, str, str] | None:
    """The first key, with both values, in which two configs differ without being allowed to."""
    left, right = flatten(one), flatten(other)
    for key in sorted(left | right):
        if any(key == name or key.startswith(f"{name}.") for name in allowed):
            continue
        a, b = left.get(key, _ABSENT), right.get(key, _ABSENT)
        if a != b:
            shown = ["not set" if value is _ABSENT else repr(value) for value in (a, b)]
            return key, shown[0], shown[1]
    return None


def _check_settings(spec: TableSpec, runs: Mapping[str, Mapping[int, Record]]) -> None:
    firsts = []
    for name, of_row in runs.items():
        for record in list(of_row.values())[1:]:
            first = next(iter(of_row.values()))
            found = _first_difference(first["config"], record["config"], ("seed",))
            if found:
                raise CnnlabError(
                    f"table {spec.name!r}: row {name!r} mixes runs of different settings: "
                    f"{found[0]} is {found[1]} for seed {first['seed']} (run {first['identity']}) "
                    f"and {found[2]} for seed {record['seed']} (run {record['identity']}). "
                    "Run the seeds again with one setting"
                )
        firsts += list(of_row.values())[:1]
    for record in firsts[1:]:
        found = _first_difference(firsts[0]["config"], record["config"], ("seed", *spec.varied))
        if found:
            raise CnnlabError(
                f"table {spec.name!r}: rows {firsts[0]['row']!r} and {record['row']!r} differ in "
                f"{found[0]} ({found[1]} and {found[2]}), which the experiment does not vary "
                f"(it varies {_listed(spec.varied) or 'nothing'}). Set {found[0]} alike, or vary it"
            )


def _check_test_sets(spec: TableSpec, runs: Mapping[str, Mapping[int, Record]]) -> None:
    across_rows = bool(spec.baselines) or not any(
        key == "data" or key.startswith("data.") for key in spec.varied
    )
    seen: dict[str, Record] = {}
    for name, of_row in runs.items():
        for record in of_row.values():
            first = seen.setdefault("" if across_rows else name, record)
            a, b = first["test_set"], record["test_set"]
            if a["fingerprint"] != b["fingerprint"]:
                raise CnnlabError(
                    f"table {spec.name!r}: {first['row']} seed {first['seed']} and {name} seed "
                    f"{record['seed']} were scored on different test sets: {a['name']} "
                    f"{a['split']} {a['fingerprint']} ({a['examples']} examples) and {b['name']} "
                    f"{b['split']} {b['fingerprint']} ({b['examples']}). Score both on one"
                )


def finished(of_row: Mapping[int, Record]) -> dict[int, Record]:
    """Seed -> record of the runs that did not diverge."""
    return {seed: record for seed, record in of_row.items() if record["status"] == "done"}


def values_of(name: str, records: Iterable[Record]) -> list[float]:
    """The numbers of column `name`, one a record.

    Raises:
        CnnlabError: unknown column, or a record without that number.
    """
    getter, values = column(name).getter, []
    for record in records:
        try:
            values.append(float(getter(record)))
        except (KeyError, IndexError) as error:
            raise CnnlabError(
                f"column {name!r}: {record['row']} seed {record['seed']} (run "
                f"{record['identity']}) has no such number ({error.args[0]!r} is missing); "
                "score it again or leave the column out"
            ) from error
    return values


def correct(record: Record, predictions: str = "test") -> np.ndarray:
    """[N] bool: right or wrong for each test example.

    Raises:
        CnnlabError: the record does not hold these predictions.
    """
    if "robust" in record["scores"].get(predictions, {}):  # an attack
        return decode_labels(record["scores"][predictions]["robust"]) == 1
    if predictions not in record["predictions"]:
        raise CnnlabError(
            f"{record['row']} seed {record['seed']} (run {record['identity']}) holds no "
            f"{predictions!r} predictions{did_you_mean(predictions, record['predictions'])}"
        )
    return decode_labels(record["predictions"][predictions]) == decode_labels(
        record["predictions"]["labels"]
    )


def _tested_columns(spec: TableSpec) -> dict[str, str]:
    """Predictions key -> the first column that shows it; the others share its test."""
    found: dict[str, str] = {}
    for name in spec.columns:
        key = column(name).predictions
        if key is not None:
            found.setdefault(key, name)
    return found


def _tests(
    spec: TableSpec, runs: Mapping[str, Mapping[int, Record]]
) -> dict[str, dict[str, Tested]]:
    """Row -> tested column -> its test against the baseline, all corrected together."""
    if not spec.baselines:
        return {}
    found: list[tuple[str, str, statistics.Comparison]] = []
    for key, name in _tested_columns(spec).items():
        cache: dict[tuple[str, int], np.ndarray] = {
            (row, seed): correct(record, key)
            for row, of_row in runs.items()
            for seed, record in finished(of_row).items()
        }
        for row in spec.rows:
            baseline = str(spec.baseline_of(row))
            seeds = [s for s in spec.seeds if (row, s) in cache and (baseline, s) in cache]
            if row == baseline or not seeds:
                continue
            ours, theirs = (
                np.stack([cache[which, seed] for seed in seeds]) for which in (row, baseline)
            )
            if spec.test == "mcnemar" and len(seeds) > 1:
                raise CnnlabError(
                    f"table {spec.name!r}: McNemar's test compares two single runs, but {row!r} "
                    f"has {len(seeds)} seeds; use test='auto', or one seed"
                )
            result = statistics.compare(ours, theirs, test=spec.test, rng=np.random.default_rng(0))
            sign = 100 if column(name).higher_is_better else -100
            low, high = sorted((sign * result.low, sign * result.high))
            points = dataclasses.replace(
                result, difference=sign * result.difference, low=low, high=high
            )
            found.append((row, name, points))
    tests: dict[str, dict[str, Tested]] = defaultdict(dict)
    adjusted = statistics.holm([result.p for _, _, result in found])
    for (row, name, result), p_holm in zip(found, adjusted, strict=True):
        better = (result.difference > 0) == bool(column(name).higher_is_better)
        verdict = ("better" if better else "worse") if p_holm < ALPHA else ""
        tests[row][name] = Tested(result, float(p_holm), verdict)
    return dict(tests)


def _row(spec: TableSpec, name: str, of_row: Mapping[int, Record], tests: dict[str, Tested]) -> Row:
    done = finished(of_row)
    cells = {}
    for key in spec.columns:
        source = of_row if column(key).of_model else done
        if source:
            summary = statistics.summarise(values_of(key, source.values()))
            cells[key] = Cell(summary, _cell_text(spec, key, summary))
        else:
            cells[key] = Cell(None, "diverged" if of_row else MISSING)
    return Row(
        name,
        cells,
        tests,
        tuple(done),
        {s: r["diverged_step"] for s, r in of_row.items() if r["status"] == "diverged"},
        tuple(seed for seed in spec.seeds if seed not in of_row),
        tuple(dict.fromkeys(_code(record) for record in of_row.values())),
    )


def _cell_text(spec: TableSpec, key: str, summary: statistics.Summary) -> str:
    kind = column(key)
    text = kind.formatter(summary.mean)
    # A count on which all seeds agree (parameters, steps) is exact, not a mean with no spread.
    if summary.std is not None and not (kind.higher_is_better is None and summary.std == 0):
        text += f" ± {kind.formatter(summary.std)}"
    if summary.n != len(spec.seeds) and not kind.of_model:
        text += f" (n={summary.n})"
    return text


def _code(record: Record) -> str:
    code = record["code"]
    commit = code["commit"] or "no commit"
    dirty = ", changed since" if code["dirty"] else ""
    return f"{code['version']} ({commit}{dirty}; sources {code['digest']})"


def _environment(record: Record) -> str:
    found = record["environment"]
    devices = f"{found['devices']} x " if found["devices"] != 1 else ""
    # Records from before these settings have none, or do not say which: there was one.
    changed = found.get("compiler_options") or found.get("kept_heap")
    chosen = found.get("cnnlab_cpu", "fast")
    return (
        f"jax {found['jax']}, flax {found['flax']}, Python {found['python']}, "
        f"{found['platform']} ({devices}{found['device']})"
        + (f", CNNLAB_CPU={chosen}" if changed else "")
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _notes(
    spec: TableSpec, runs: Mapping[str, Mapping[int, Record]], rows: Sequence[Row]
) -> Iterable[str]:
    everything = [record for of_row in runs.values() for record in of_row.values()]
    planned = len(spec.seeds)
    if planned > 1:
        exceptions = any(len(row.done) not in (0, planned) for row in rows)
        yield (
            f"Mean ± standard deviation over {planned} seeds ({_listed(spec.seeds)})"
            f"{', unless a cell says otherwise' if exceptions else ''}."
        )
    else:
        yield f"One run a row (seed {spec.seeds[0]}): no spread over seeds can be given."
    for examples, names in _grouped(
        (f"{r['test_set']['name']} {r['test_set']['split']}, "
         f"{r['test_set']['examples']:,} examples", r["row"]) for r in everything
    ).items():  # fmt: skip
        of = "" if set(names) == {r["row"] for r in everything} else f" ({_listed(names)})"
        yield f"Test set: {examples}{of}."
    yield from _test_notes(spec, rows)
    yield from spec.notes
    missing = [f"{row.name} {_seeds(row.missing)}" for row in rows if row.missing]
    if missing:
        yield f"Missing: {'; '.join(missing)} (not run)."
    for row in rows:
        if row.diverged:
            where = _listed(
                f"seed {seed} at step {'unknown' if step is None else step}"
                for seed, step in row.diverged.items()
            )
            rest = "; the mean is over the others" if row.done else ""
            yield (
                f"{row.name}: {len(row.diverged)} of {planned - len(row.missing)} diverged "
                f"({where}){rest}."
            )
    for name, seeds in _grouped(
        (record["row"], f"seed {record['seed']} from step {record['overfitted_step']}")
        for record in everything
        if record.get("overfitted_step") is not None
    ).items():
        yield (
            f"{name}: catastrophic overfitting ({_listed(seeds)}): training examples stand the "
            "training's single step but not PGD-10 in the same ball."
        )
    if spec.published:
        yield f"Published: {spec.published_source}. Difference: ours minus published."
    for label, describe, consequence in (
        ("Code", _code, "the runs were made by different code"),
        ("Environment", _environment, "the runs were made in different environments"),
    ):
        versions = _grouped((describe(record), record["row"]) for record in everything)
        if versions:
            counted = (f"{what}, {_plural(len(n), 'run')}" for what, n in versions.items())
            yield f"{label}: {'; '.join(counted)}."
        if len(versions) > 1:
            of = "; ".join(f"{what}: {_listed(dict.fromkeys(n))}" for what, n in versions.items())
            yield f"Warning: {consequence}: {of}."
    for record in everything:
        if len(record.get("code_history", ())) > 1:
            yield (
                f"Warning: {record['row']} seed {record['seed']} was trained by several versions "
                f"of the code, one after another: {'; '.join(record['code_history'])}."
            )
    if spec.command:
        yield f"Made by: {spec.command}"


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return found


def _test_notes(spec: TableSpec, rows: Sequence[Row]) -> Iterable[str]:
    if not spec.baselines or not _tested_columns(spec):
        return
    results = [test for row in rows for test in row.tests.values()]
    untested = [row.name for row in rows if not row.tests and row.name not in spec.baselines]
    if results:
        kinds = _grouped(
            (_test_name(test.comparison), row.name) for row in rows for test in row.tests.values()
        )
        which = "; ".join(
            kind + (f" ({_listed(dict.fromkeys(names))})" if len(kinds) > 1 else "")
            for kind, names in kinds.items()
        )
        against = (
            spec.baselines[0] if len(spec.baselines) == 1 else "the baseline of the same block"
        )
        yield (
            f"Tested against {against}: {which}; two-sided, Holm's correction over "
            f"{_plural(len(results), 'comparison')}. Bold: significantly better, {WORSE}: "
            f"significantly worse (corrected p < {ALPHA}). Intervals: 95 %, uncorrected, Student's "
            f"t with the standard error of {statistics.RESAMPLES:,} bootstrap resamples."
        )
    if untested:
        yield f"Not tested, for want of a seed finished by both: {_listed(untested)}."


def _test_name(comparison: statistics.Comparison) -> str:
    examples = f"{comparison.examples:,} test examples"
    if comparison.test == "mcnemar":
        return f"exact McNemar test on {examples} of one seed"
    over = f"{comparison.seeds} seeds and " if comparison.seeds > 1 else ""
    return f"paired bootstrap over {over}{examples}"


# ------------------------------------------------------------------------------------- layout


def _signed(value: float, formatter: Callable[[float], str]) -> str:
    text = formatter(abs(value))
    # What rounds to zero has no sign.
    return text if not re.search(r"[1-9]", text) else f"{MINUS if value < 0 else '+'}{text}"


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _published_cells(key: str, row: Row, published: Published | None) -> tuple[str, str]:
    if published is None:
        return "", ""
    mean, std = published if isinstance(published, tuple) else (published, None)
    formatter = column(key).formatter
    if column(key).unit:
        # As many decimals as the paper prints, at most our own.
        ours = len(formatter(0.5).partition(".")[2])
        decimals = min(max(len(str(mean).partition(".")[2]), 1), ours)
        text = str(mean) if std is None else f"{mean} ± {std}"
    else:
        text = formatter(mean) if std is None else f"{formatter(mean)} ± {formatter(std)}"
    summary = row.cells[key].summary
    if summary is None:
        return text, MISSING
    return text, _signed(
        summary.mean - mean, f"{{:.{decimals}f}}".format if column(key).unit else formatter
    )


def _grid(table: Table | Grid) -> Grid:
    if isinstance(table, Grid):
        return table
    spec = table.spec
    tested = set(_tested_columns(spec).values()) if spec.baselines else set()
    prints = {key for numbers in spec.published.values() for key in numbers}
    headers, lines = [""], [[(row.name, False)] for row in table.rows]
    for key in spec.columns:
        name = column(key).header
        headers.append(name)
        owner = _tested_columns(spec).get(column(key).predictions or "", "")
        for line, row in zip(lines, table.rows, strict=True):
            verdict = row.tests[owner].verdict if owner in row.tests else ""
            mark = WORSE if verdict == "worse" else ""
            line.append((row.cells[key].text + mark, verdict == "better"))
        if key in tested:
            prefix = "" if len(tested) == 1 else f"{name}: "
            headers += [f"{prefix}vs. baseline [95 % CI]", f"{prefix}p (Holm)"]
            for line, row in zip(lines, table.rows, strict=True):
                texts = ["baseline", ""] if row.name in spec.baselines else [MISSING, MISSING]
                if key in row.tests:
                    c = row.tests[key].comparison
                    low, high = (_signed(value, _percent) for value in (c.low, c.high))
                    texts = [
                        f"{_signed(c.difference, _percent)} [{low}, {high}]",
                        _p_text(row.tests[key].p_holm),
                    ]
                line += [(text, False) for text in texts]
        if key in prints:
            prefix = "" if len(prints) == 1 else f"{name}: "
            headers += [f"{prefix}published", f"{prefix}difference"]
            for line, row in zip(lines, table.rows, strict=True):
                pair = _published_cells(key, row, spec.published.get(row.name, {}).get(key))
                line += [(text, False) for text in pair]
    return Grid(spec.name, spec.title, headers, lines, table.notes, _block_starts(table))


def _block_starts(table: Table) -> list[int]:
    """The positions of rows that a rule stands above: all baselines but the first."""
    if len(table.spec.baselines) < 2:
        return []
    return [i for i, row in enumerate(table.rows) if i and row.name in table.spec.baselines]


def _width(text: str) -> int:
    """Columns that a terminal needs: wide East Asian characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def to_markdown(table: Table | Grid) -> str:
    """GitHub-flavoured Markdown whose pipes also line up as plain text."""

    def escaped(text: str) -> str:
        text = re.sub(r"([\\|*`]|<(?=[A-Za-z/!?]))", r"\\\1", " ".join(text.split()))
        return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)

    grid = _grid(table)
    headers, lines = grid.headers, grid.lines
    cells = [[escaped(header) for header in headers]]
    for line in lines:
        cells.append([f"**{escaped(t)}**" if bold else escaped(t) for t, bold in line])
    widths = [max(3, *(_width(line[i]) for line in cells)) for i in range(len(headers))]

    def joined(line: Sequence[str]) -> str:
        padded = []
        for i, (text, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - _width(text))
            padded.append(text + space if i == 0 else space + text)
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    body = [joined(cells[0]), f"| {' | '.join(rule)} |", *map(joined, cells[1:])]
    notes = [f"- {escaped(note)}" for note in grid.notes]
    return "\n".join([f"# {escaped(grid.title)}", "", *body, "", *notes]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$",
    ">": r"$>$", "|": r"$|$", "±": r"$\pm$", MINUS: "$-$", MISSING: "--", WORSE: r"$^{\dagger}$",
    "\N{MULTIPLICATION SIGN}": r"$\times$", "→": r"$\rightarrow$", "…": r"\ldots{}",
}  # fmt: skip


def to_latex(table: Table | Grid) -> str:
    r"""A `table` environment for the `booktabs` package; `\ref{tab:NAME}` refers to it."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))

    grid = _grid(table)
    # An opening bracket or star after a line's end would be read as that command's argument.
    body = [
        " & ".join(rf"\textbf{{{escaped(t)}}}" if bold else escaped(t) for t, bold in line)
        for line in grid.lines
    ]
    body = [("{}" if line[:1] in ("[", "*") else "") + line + r" \\" for line in body]
    for i in reversed(grid.starts):
        body.insert(i, r"\midrule")
    label = re.sub(r"[^A-Za-z0-9:-]+", "-", grid.name)
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            r"\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escaped(grid.title)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.headers) - 1)}}}",
            r"\toprule",
            " & ".join(escaped(header) for header in grid.headers) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"\smallskip",
            r"\begin{minipage}{\linewidth}\footnotesize",
            *(escaped(note) + r"\par" for note in grid.notes),
            r"\end{minipage}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(table: Table) -> str:
    """One line a row, full precision, in the columns' units (percent for accuracies).

    For each column C: `C_mean`, `C_std`, `C_n`; for a tested one also `C_difference`, `C_low`,
    `C_high`, `C_p`, `C_p_holm`, `C_test`; for a published one `C_published`, `C_published_std`.
    Empty fields are numbers that do not exist.
    """
    spec = table.spec
    tested = set(_tested_columns(spec).values()) if spec.baselines else set()
    prints = {key for numbers in spec.published.values() for key in numbers}
    records = []
    for row in table.rows:
        line: dict[str, Any] = {"row": row.name, "baseline": int(row.name in spec.baselines)}
        for key in spec.columns:
            summary = row.cells[key].summary
            line |= {
                f"{key}_mean": summary.mean if summary else None,
                f"{key}_std": summary.std if summary else None,
                f"{key}_n": summary.n if summary else 0,
            }
            if key in tested:
                test = row.tests.get(key)
                for field in ("difference", "low", "high", "p"):
                    line[f"{key}_{field}"] = getattr(test.comparison, field) if test else None
                line[f"{key}_p_holm"] = test.p_holm if test else None
                line[f"{key}_test"] = test.comparison.test if test else None
            if key in prints:
                published = spec.published.get(row.name, {}).get(key)
                pair = published if isinstance(published, tuple) else (published, None)
                line |= {f"{key}_published": pair[0], f"{key}_published_std": pair[1]}
        line |= {
            "done": len(row.done),
            "diverged": len(row.diverged),
            "missing": len(row.missing),
            "code": "; ".join(row.code),
        }
        records.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_rich(table: Table | Grid, width: int = 0) -> Group:
    """The table and its notes for a rich console; print it with `crop=False`.

    Args:
        table: what to show.
        width: of the console, in characters; 0 where it does not matter. Cells are broken at spaces
            to fit, but never cut: a table whose words alone are wider is shown wider.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = _grid(table)
    headers, lines = grid.headers, grid.lines
    title = Text(grid.title, "bold")
    shown = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        words = " ".join([header, *(line[i][0] for line in lines)]).split()
        least = max(_width(word) for word in words)
        shown.add_column(Text(header), justify="left" if i == 0 else "right", min_width=least)
    least = sum(column.min_width or 0 for column in shown.columns) + 2 * len(headers)
    if width and least > width:
        shown.width = least
    for i, line in enumerate(lines):
        if i in grid.starts:
            shown.add_section()
        shown.add_row(*(Text(text, "bold green" if bold else "") for text, bold in line))
    notes = (Text(n, "yellow" if n.startswith("Warning") else "dim") for n in grid.notes)
    return Group(shown, *notes)


def write(table: Table, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes `table.md`, `table.tex` and `table.csv`, each whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    return write_texts(table, to_csv(table), folder)


def write_texts(table: Table | Grid, as_csv: str, folder: str | os.PathLike[str]) -> list[Path]:
    """`write`, for a table whose numbers are given as CSV."""
    texts = {"table.md": to_markdown(table), "table.tex": to_latex(table), "table.csv": as_csv}
    for name, text in texts.items():
        write_atomic(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]
