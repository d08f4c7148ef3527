"""Records of measured cases -> one table of times, laid out by `cnnlab.reporting.tables`.

The record of a case holds `schema` (1), `case` (its name), `definition`, `rounds`, `contenders`
(name -> `settings`, `versions`, `calls` in one timing, `seconds` per call of every timing; where it
has the case also `device`, `options`, `items`, `facts`, `kept_heap`, `first` call's seconds,
`checksum` of the outputs), `cost` (`flops`, `bytes`), `peaks` (`flops`, `bytes`: contender -> per
second, measured in the same run), `machine`, `code` and `file` (digest of the experiment file).
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cnnlab.registry import did_you_mean
from cnnlab.reporting.tables import MISSING, WORSE, Grid
from cnnlab.types import CnnlabError, Record

SCHEMA = 1
RESAMPLES = 2_000

COLUMNS: dict[str, str] = {
    "facts": "what is known of the case",
    "items": "each contender's images a second",
    "ms": "each contender's median",
    "ratio": "ours over each other's",
    "rate": "GFLOP/s or GB/s of ours, whichever bounds the case",
    "floor": "the least time that operations and bytes allow",
    "over_floor": "our time in floors",
}


@dataclasses.dataclass(frozen=True)
class TimesSpec:
    """What a table of times shows.

    Attributes:
        name: file and label name.
        title: the caption.
        cases: the rows, in the order printed.
        contenders: in the order printed; the first is ours.
        columns: names in `COLUMNS`.
        command: what makes the table again; printed below it.
    """

    name: str
    title: str
    cases: tuple[str, ...]
    contenders: tuple[str, ...]
    columns: tuple[str, ...]
    command: str

    def __post_init__(self) -> None:
        """Checks that there is something to show and that the columns are known."""
        if not self.cases or not self.contenders or not self.columns:
            raise CnnlabError(
                f"table {self.name!r}: expected cases, contenders and columns, at least one each; "
                f"got {len(self.cases)}, {len(self.contenders)} and {len(self.columns)}"
            )
        for name in self.columns:
            if name not in COLUMNS:
                raise CnnlabError(
                    f"table {self.name!r}: unknown column {name!r}{did_you_mean(name, COLUMNS)}. "
                    f"Known: {', '.join(COLUMNS)}"
                )


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of two medians with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def median(record: Record, contender: str) -> float | None:
    """Seconds a call, or `None` where the contender has no such case."""
    seconds = record["contenders"].get(contender, {}).get("seconds")
    return float(np.median(seconds)) if seconds else None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of the medians; the timings of either side are resampled by themselves.

    Args:
        ours: seconds, at least one.
        theirs: likewise.
    """
    rng = np.random.default_rng(0)
    medians = []
    for seconds in (ours, theirs):
        drawn = rng.integers(len(seconds), size=(RESAMPLES, len(seconds)))
        medians.append(np.median(np.asarray(seconds)[drawn], axis=1))
    low, high = np.quantile(medians[0] / medians[1], (0.025, 0.975))
    return Ratio(float(np.median(ours) / np.median(theirs)), float(low), float(high))


def floor(record: Record) -> tuple[float, str] | None:
    """Seconds that operations or bytes take at least, and which of them; `None` if unknown."""
    bounds = [
        (record["cost"][kind] / max(record["peaks"][kind].values()), kind)
        for kind in ("flops", "bytes")
        if record["cost"][kind] and record["peaks"][kind]
    ]
    return max(bounds) if bounds else None


def grid(spec: TimesSpec, records: Iterable[Record]) -> Grid:
    """The table of these cases.

    Args:
        spec: what to show.
        records: one a case, in any order.

    Raises:
        CnnlabError: a record of another schema, of a case that the specification does not name, or
            twice of one.
    """
    found = _by_case(spec, records)
    ours, others = spec.contenders[0], spec.contenders[1:]
    known = _facts(found)
    headers = ["", *(known if "facts" in spec.columns else ())]
    if "items" in spec.columns:
        headers += [f"{name} (images/s)" for name in spec.contenders]
    if "ms" in spec.columns:
        headers += [f"{name} (ms)" for name in spec.contenders]
    if "ratio" in spec.columns:
        headers += [f"{ours} / {name}" for name in others]
    titles = {"rate": f"{ours}'s rate", "floor": "floor (ms)", "over_floor": f"{ours} / floor"}
    headers += [title for name, title in titles.items() if name in spec.columns]
    lines = []
    for case in spec.cases:
        record = found.get(case)
        line = [(case, False)]
        if record is None:
            lines.append(line + [(MISSING, False)] * (len(headers) - 1))
            continue
        if "facts" in spec.columns:
            of_case = _facts({case: record})
            line += [(of_case.get(heading, MISSING), False) for heading in known]
        if "items" in spec.columns:
            line += [(_rate(record, name), False) for name in spec.contenders]
        if "ms" in spec.columns:
            line += [(_ms(median(record, name)), False) for name in spec.contenders]
        if "ratio" in spec.columns:
            line += [_ratio_cell(record, ours, name) for name in others]
        line += [(text, False) for text in _floor_cells(record, ours, spec.columns)]
        lines.append(line)
    return Grid(spec.name, spec.title, headers, lines, tuple(_notes(spec, found)))


def to_csv(spec: TimesSpec, records: Iterable[Record]) -> str:
    """One line a case and contender, full precision, seconds; empty where there is no number.

    `ratio`, `ratio_low` and `ratio_high` are ours over that contender's time.
    """
    fields = (
        "case", "contender", "median", "least", "lower_quartile", "upper_quartile", "greatest",
        "timings", "calls", "ratio", "ratio_low", "ratio_high", "flops", "bytes", "floor",
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for case, record in _by_case(spec, records).items():
        ours = record["contenders"].get(spec.contenders[0])
        least = floor(record)
        for name in spec.contenders:
            measured = record["contenders"].get(name)
            if not measured or not measured["seconds"]:
                continue
            low, first, middle, third, high = np.quantile(
                measured["seconds"], (0, 0.25, 0.5, 0.75, 1)
            )
            line: dict[str, Any] = dict.fromkeys(fields)
            line |= {
                "case": case, "contender": name, "median": middle, "least": low,
                "lower_quartile": first, "upper_quartile": third, "greatest": high,
                "timings": len(measured["seconds"]), "calls": measured["calls"],
                "flops": record["cost"]["flops"], "bytes": record["cost"]["bytes"],
                "floor": least[0] if least else None,
            }  # fmt: skip
            if ours and ours["seconds"] and name != spec.contenders[0]:
                r = ratio(ours["seconds"], measured["seconds"])
                line |= {"ratio": r.value, "ratio_low": r.low, "ratio_high": r.high}
            writer.writerow(line)
    return text.getvalue()


def _by_case(spec: TimesSpec, records: Iterable[Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        name = record["case"]
        if record.get("schema") != SCHEMA:
            raise CnnlabError(
                f"table {spec.name!r}: {name}: expected a record of schema {SCHEMA}, got "
                f"{record.get('schema')!r}; it was written by another version of cnnlab"
            )
        if name not in spec.cases:
            raise CnnlabError(
                f"table {spec.name!r} has no case {name!r}{did_you_mean(name, spec.cases)}"
            )
        if name in found:
            raise CnnlabError(f"table {spec.name!r}: case {name!r} is given twice")
        found[name] = record
    return {name: found[name] for name in spec.cases if name in found}


def _ms(seconds: float | None) -> str:
    return MISSING if seconds is None else _three(1e3 * seconds)


def _facts(records: Mapping[str, Record]) -> dict[str, str]:
    """Heading -> text of all contenders of all these records, in the order of their first."""
    return {
        heading: text
        for record in records.values()
        for measured in record["contenders"].values()
        for heading, text in measured.get("facts", {}).items()
    }


def _rate(record: Record, contender: str) -> str:
    seconds = median(record, contender)
    items = record["contenders"].get(contender, {}).get("items", 0)
    return _three(items / seconds) if items and seconds else MISSING


def _three(value: float) -> str:
    """About three significant digits without an exponent."""
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def _ratio_cell(record: Record, ours: str, other: str) -> tuple[str, bool]:
    pair = [record["contenders"].get(name, {}).get("seconds") for name in (ours, other)]
    if not all(pair):
        return MISSING, False
    r = ratio(*pair)
    mark = WORSE if r.low > 1 else ""
    return f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]{mark}", r.high < 1


def _floor_cells(record: Record, ours: str, columns: Sequence[str]) -> list[str]:
    seconds, least = median(record, ours), floor(record)
    cells = dict.fromkeys(("rate", "floor", "over_floor"), MISSING)
    if least is not None:
        cells["floor"] = _ms(least[0])
        if seconds is not None:
            unit = "GFLOP/s" if least[1] == "flops" else "GB/s"
            cells["rate"] = f"{_three(record['cost'][least[1]] / seconds / 1e9)} {unit}"
            cells["over_floor"] = f"{seconds / least[0]:.2f}"
    return [text for name, text in cells.items() if name in columns]


def _notes(spec: TimesSpec, records: Mapping[str, Record]) -> Iterable[str]:
    ours = spec.contenders[0]
    yield (
        "Each contender runs in a process of its own; every round times them one after another, "
        "while the others sleep. Medians over the rounds"
        + (", in milliseconds a call." if "ms" in spec.columns else ".")
    )
    if "ratio" in spec.columns and len(spec.contenders) > 1:
        yield (
            f"Ratios: {ours}'s median over the other's [95 % interval of {RESAMPLES:,} bootstrap "
            f"resamples]. Bold: {ours} is faster, {WORSE}: slower (the interval leaves out 1)."
        )
    if {"floor", "over_floor", "rate"} & set(spec.columns) and any(map(floor, records.values())):
        yield (
            "Floor: the larger of operations over the measured matrix product's rate and bytes "
            "(each array read or written once) over the measured copy's. Operations are counted "
            "as the direct algorithm does them, zeros of the padding included, so that an "
            "algorithm that saves some may be below its floor."
        )
    yield from _peak_notes(spec, records)
    missing = [case for case in spec.cases if case not in records]
    if missing:
        yield f"Missing: {'; '.join(missing)} (not measured)."
    for name in spec.contenders:
        measured = [r["contenders"].get(name) for r in records.values()]
        settings = {_settings(m) for m in measured if m and m["seconds"]}
        if settings:
            yield f"{name}: {'; '.join(sorted(settings))}."
    rounds = {name: r["rounds"] for name, r in records.items()}
    fewer = [
        f"{case}, {name} ({len(m['seconds'])})"
        for case, record in records.items()
        for name, m in record["contenders"].items()
        if m["seconds"] and len(m["seconds"]) < record["rounds"]
    ]
    if rounds:
        yield f"Rounds: {_versions_text(rounds)}."
    if fewer:
        yield f"Fewer timings, for want of time: {'; '.join(fewer)}."
    for label, describe in (("Machine", _machine), ("Code", _code)):
        texts = {case: describe(record) for case, record in records.items()}
        if texts:
            yield f"{label}: {_versions_text(texts)}."
        if len(set(texts.values())) > 1:
            yield f"Warning: the cases were not all measured with one {label.lower()}."
    yield f"Made by: {spec.command}"


def _peak_notes(spec: TimesSpec, records: Mapping[str, Record]) -> Iterable[str]:
    for kind, what, unit in (("flops", "matrix product", "GFLOP/s"), ("bytes", "copy", "GB/s")):
        texts = []
        for name in spec.contenders:
            rates = [r["peaks"][kind][name] for r in records.values() if name in r["peaks"][kind]]
            if not rates:
                continue
            low, high = _three(min(rates) / 1e9), _three(max(rates) / 1e9)
            texts.append(f"{name} {low if low == high else f'{low} to {high}'} {unit}")
        if texts:
            yield f"Measured {what}: {'; '.join(texts)}. The best of a run counts."


def _versions_text(of_case: Mapping[str, Any]) -> str:
    """Each value, with its cases where there are several."""
    values = list(dict.fromkeys(of_case.values()))
    if len(values) == 1:
        return str(values[0])
    return "; ".join(
        f"{value} ({', '.join(case for case in of_case if of_case[case] == value)})"
        for value in values
    )


def _settings(contender: Mapping[str, Any]) -> str:
    heap = "cnnlab's heap settings" if contender["kept_heap"] else "the default heap"
    versions = [f"{name} {version}" for name, version in contender["versions"].items()]
    given = {**contender["options"], **contender["settings"]["environment"]}
    return ", ".join(
        [*versions, contender["device"], heap, *(f"{key}={given[key]}" for key in given)]
    )


def _machine(record: Record) -> str:
    m = record["machine"]
    hardware = f"{m['cpu']}, {m['cores']} cores, {m['ram_gib']} GiB"
    return f"{hardware}, {m['system']}, Python {m['python']}"


def _code(record: Record) -> str:
    code = record["code"]
    commit = code["commit"] or "no commit"
    dirty = ", changed since" if code["dirty"] else ""
    return (
        f"cnnlab {code['version']} ({commit}{dirty}; sources {code['digest']}; experiment file "
        f"{record['file']})"
    )
