"""An experiment file and what it expands to: rows times seeds, each one run."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnnlab import config as config_lib
from cnnlab.evaluation import certification, checklist, corruption, robustness
from cnnlab.registry import did_you_mean
from cnnlab.reporting import figures, tables
from cnnlab.types import CnnlabError

Number = float | tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a table compares; `get_experiment()` of a file in `experiments/` returns one.

    Attributes:
        base: the config that all rows start from.
        rows: row name -> changed settings, dotted key -> value, in the order of the table.
        seeds: each row runs once with each.
        baseline: the row that the others are tested against, or `None`; several start a block of
            rows each.
        columns: what the table shows; names of `cnnlab.reporting.tables`.
        attacks: one more column each, the accuracy under it: `"pgd(eps=0.1, steps=40)"`.
        attack_examples: how many examples of the test split are attacked, the first.
        certified: one more column each, the accuracy that randomised smoothing certifies at an L2
            radius: `"certified(sigma=0.25, radius=0.5)"`.
        certified_examples: of how many examples of the test split, the first.
        allow: names of `cnnlab.evaluation.checklist.CHECKS` whose findings are accepted; any other
            ends the table with an error, as an accuracy under attack could not be believed.
        published: row -> column -> a published number, or (mean, std), in the unit of the column.
        published_source: the paper and table that they are from.
        figures: which figures to draw; names of `cnnlab.reporting.figures`.
    """

    base: ConfigDict
    rows: Mapping[str, Mapping[str, Any]]
    seeds: Iterable[int] = (0, 1, 2)
    baseline: str | tuple[str, ...] | None = None
    columns: Sequence[str] = ("top1", "nll", "parameters", "macs", "seconds")
    published: Mapping[str, Mapping[str, Number]] = dataclasses.field(default_factory=dict)
    published_source: str = ""
    attacks: Sequence[str] = ()
    attack_examples: int = 1000
    certified: Sequence[str] = ()
    certified_examples: int = 500
    allow: Sequence[str] = ()
    figures: Sequence[str] = ("score_cost", "curves", "confusion", "mistakes")

    def __post_init__(self) -> None:
        """Checks the types, so that a slip is told where it was made."""
        if not isinstance(self.base, ConfigDict):
            raise CnnlabError(
                "base: expected an ml_collections.ConfigDict made by cnnlab.config.base(), got "
                f"{type(self.base).__name__}"
            )
        if not isinstance(self.rows, Mapping):
            raise CnnlabError(
                'rows: expected a dict of row name -> changed settings, as in {"a": {}}, got '
                f"{self.rows!r}"
            )
        for name, changes in self.rows.items():
            if not isinstance(name, str) or not isinstance(changes, Mapping):
                raise CnnlabError(
                    f"rows: expected a name and a dict of changed settings, got {name!r}: "
                    f"{changes!r}"
                )
        if not isinstance(self.seeds, Iterable) or not all(isinstance(s, int) for s in self.seeds):
            raise CnnlabError(
                f"seeds: expected whole numbers, as in range(3) or (0, 1, 2), got {self.seeds!r}"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell's training: a row with one seed.

    Attributes:
        row: the row's name.
        seed: the seed.
        config: resolved.
        identity: the config's hash.
    """

    row: str
    seed: int
    config: ConfigDict
    identity: str

    @property
    def folder(self) -> str:
        """The run's folder under `runs/`: a function of its config alone."""
        return folder_name(self.config)


def folder_name(config: ConfigDict) -> str:
    """`<model>-<data>-s<seed>-<identity>`."""
    name = f"{config.model.name}-{config.data.name}-s{config.seed}"
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{config_lib.identity(config)}"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An experiment that was read from a file and checked.

    Attributes:
        name: the file's name without `.py`.
        spec: what the table needs.
        runs: all rows times all seeds, row by row.
        figures: which figures to draw.
        extras: scores that its columns need beside those of every run.
        allow: findings about attacks that are accepted.
    """

    name: str
    spec: tables.TableSpec
    runs: tuple[Run, ...]
    figures: tuple[str, ...]
    extras: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()


def load(path: Path) -> Loaded:
    """Reads an experiment file, expands and checks it.

    Args:
        path: the file.

    Raises:
        CnnlabError: the file is missing or fails, or the experiment in it does not fit; the message
            names the file and the row.
    """
    return expand(path, *read(path))


def read(path: Path) -> tuple[Any, Any]:
    """The module of an experiment file, and what its `get_experiment()` returns.

    Raises:
        CnnlabError: the file is missing or fails.
    """
    module = load_file(path)
    return module, _call(module, "get_experiment", path)


def title(module: Any, path: Path) -> str:
    """The caption of a file's table: the first line of its docstring."""
    return str(module.__doc__ or path.stem).strip().splitlines()[0]


def command(path: Path) -> str:
    """What a user types at the top of a checkout to make a file's table."""
    return f"cnnlab table {path.resolve().parent.name}/{path.name}"


def expand(path: Path, module: Any, made: Any) -> Loaded:
    """Expands and checks what `read` returned.

    Raises:
        CnnlabError: see `load`.
    """
    if not isinstance(made, Experiment):
        raise CnnlabError(
            f"{path}: get_experiment(): expected a cnnlab.sweep.Experiment, got "
            f"{type(made).__name__}"
        )
    if not made.rows:
        raise CnnlabError(f"{path}: the experiment has no rows")
    for figure in made.figures:
        if figure not in figures.FIGURES:
            raise CnnlabError(
                f"{path}: figures: unknown figure {figure!r}{did_you_mean(figure, figures.FIGURES)}"
            )
    seeds = tuple(made.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise CnnlabError(f"{path}: seeds: expected at least one, all different, got {seeds}")
    runs = []
    for row, changed in made.rows.items():
        if "seed" in changed:
            raise CnnlabError(f"{path}, row {row!r}: a row can't set the seed; `seeds` does")
        where = f"{path}, row {row!r}"
        for seed in seeds:
            config = config_lib.override(made.base, {**changed, "seed": seed}, where)
            config = config_lib.resolve(config, where)
            runs.append(Run(row, seed, config, config_lib.identity(config)))
    extra_columns = []
    for field, read in (("attacks", robustness.parse), ("certified", certification.parse)):
        count = f"{field.removesuffix('s')}_examples"
        examples = getattr(made, count)
        if examples < 1:
            raise CnnlabError(f"{path}: {count}: expected at least 1, got {examples}")
        for text in getattr(made, field):
            try:
                read(text)
            except CnnlabError as error:
                raise CnnlabError(f"{path}: {field}: {error}") from None
            extra_columns.append(f"{text}, first {examples}")
    try:
        checklist.check_names(made.allow)
    except CnnlabError as error:
        raise CnnlabError(f"{path}: {error}") from None
    columns = (*made.columns, *extra_columns)
    for column in made.columns:
        unvalidated = [run.row for run in runs if not run.config.data.validation]
        if column.startswith("validation_") and unvalidated:
            raise CnnlabError(
                f"{path}, row {unvalidated[0]!r}: column {column!r} needs a validation split, but "
                "data.validation is 0"
            )
    try:
        spec = tables.TableSpec(
            name=path.stem,
            title=title(module, path),
            rows=tuple(made.rows),
            seeds=seeds,
            columns=columns,
            baseline=made.baseline,
            published={row: dict(numbers) for row, numbers in made.published.items()},
            published_source=made.published_source,
            varied=_varied(runs),
            command=command(path),
            notes=corruption.NOTES if {"corrupted", "mce"} & set(made.columns) else (),
        )
    except CnnlabError as error:
        raise CnnlabError(f"{path}: {error}") from error
    if "mce" in made.columns and not spec.baselines:
        raise CnnlabError(
            f"{path}: column 'mce' is relative to a baseline, but the table has none; give "
            "baseline="
        )
    extras = dict.fromkeys(tables.column(name).extra for name in columns)
    return Loaded(
        path.stem,
        spec,
        tuple(runs),
        tuple(made.figures),
        tuple(name for name in extras if name),
        tuple(made.allow),
    )


def select(loaded: Loaded, rows: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of these rows and seeds; all where empty.

    Raises:
        CnnlabError: the experiment has no such row or seed.
    """
    for row in rows:
        if row not in loaded.spec.rows:
            raise CnnlabError(
                f"--rows: {loaded.name} has no row {row!r}{did_you_mean(row, loaded.spec.rows)}. "
                f"Rows: {', '.join(map(repr, loaded.spec.rows))}"
            )
    for seed in seeds:
        if seed not in loaded.spec.seeds:
            raise CnnlabError(
                f"--seeds: {loaded.name} has no seed {seed}; its seeds are "
                f"{', '.join(map(str, loaded.spec.seeds))}"
            )
    return [
        run
        for run in loaded.runs
        if (not rows or run.row in rows) and (not seeds or run.seed in seeds)
    ]


def _varied(runs: Sequence[Run]) -> tuple[str, ...]:
    """The settings in which the rows differ, the fields that follow from another model included."""
    flat = [config_lib.flatten(config_lib.plain(run.config)) for run in runs]
    keys = sorted({key for settings in flat for key in settings} - {"seed"})
    missing = object()
    return tuple(
        key for key in keys if any(s.get(key, missing) != flat[0].get(key, missing) for s in flat)
    )


def load_config(path: Path, argument: str = "") -> ConfigDict:
    """The config that `get_config()` of a file in `configs/` makes; not yet resolved.

    Args:
        path: the file.
        argument: passed to `get_config`.

    Raises:
        CnnlabError: the file is missing or fails.
    """
    made = _call(load_file(path), "get_config", path, *([argument] if argument else []))
    if not isinstance(made, ConfigDict):
        raise CnnlabError(
            f"{path}: get_config(): expected an ml_collections.ConfigDict, got "
            f"{type(made).__name__}"
        )
    return made


def load_file(path: Path) -> Any:
    """Imports a Python file; `configs` beside its folder can be imported from it.

    Raises:
        CnnlabError: it is missing, fails, or has a dict with one key twice.
    """
    if not path.is_file():
        near = did_you_mean(path.stem, [p.stem for p in path.parent.glob("*.py")])
        raise CnnlabError(f"no file {path}{near}")
    try:
        source = path.read_text()
        tree = ast.parse(source, str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise CnnlabError(f"{path} is no Python file: {error}") from error
    for node in ast.walk(tree):
        # Python itself keeps the last of two rows of one name without a word.
        keys = [k.value for k in getattr(node, "keys", []) if isinstance(k, ast.Constant)]
        twice = sorted({repr(k) for k in keys if keys.count(k) > 1})
        if isinstance(node, ast.Dict) and twice:
            raise CnnlabError(
                f"{path}, line {node.lineno}: two entries named {', '.join(twice)}; give each row "
                "a name of its own"
            )
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"_cnnlab_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    _guard(lambda: loader.exec_module(module), path)
    return module


def _call(module: Any, function: str, path: Path, *arguments: Any) -> Any:
    if not hasattr(module, function):
        raise CnnlabError(f"{path} must define {function}()")
    return _guard(lambda: getattr(module, function)(*arguments), path)


def _guard(action: Any, path: Path) -> Any:
    """Runs code of the user's file; a mistake in it becomes one line with its line number."""
    try:
        return action()
    except CnnlabError as error:
        raise CnnlabError(f"{path}{_line(error, path)}: {error}") from error
    except Exception as error:
        raise CnnlabError(f"{path}{_line(error, path)}: {type(error).__name__}: {error}") from error


def _line(error: BaseException, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
    return f", line {numbers[-1]}" if numbers else ""
