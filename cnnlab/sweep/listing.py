"""What there is: models, data sets, configs, experiments and runs."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cnnlab import record, registry
from cnnlab.types import CnnlabError


def show(console: Console, what: str, runs_folder: Path) -> None:
    """Prints one list.

    Args:
        console: where.
        what: a plug-in folder (`models`, `data`, ...), `configs`, `experiments` or `runs`.
        runs_folder: where the runs' folders lie.

    Raises:
        CnnlabError: the folder to list does not exist.
    """
    if what in registry.FUNCTIONS:
        _plugins(console, what)
    elif what == "runs":
        _runs(console, runs_folder)
    else:
        _files(console, Path(what))


def _plugins(console: Console, folder: str) -> None:
    table = Table("name", "about", "fields", title=folder, title_justify="left")
    for plugin in registry.plugins(folder).values():
        # Of a file with several plug-ins, each has a docstring of its own.
        where = plugin.function if hasattr(plugin.module, "PLUGINS") else plugin.module
        about = (inspect.getdoc(where) or "").partition("\n")[0]
        fields = ", ".join(f"{name}={value!r}" for name, value in plugin.parameters.items())
        table.add_row(plugin.name, about, fields)
    console.print(table)


def _files(console: Console, folder: Path) -> None:
    if not folder.is_dir():
        raise CnnlabError(f"no folder {folder}/ here; run the command at the top of a checkout")
    table = Table("file", "about", title=str(folder), title_justify="left")
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            about = ast.get_docstring(ast.parse(file.read_text())) or ""
            table.add_row(str(file), about.partition("\n")[0])
    console.print(table)


def _runs(console: Console, folder: Path) -> None:
    table = Table("run", "row", "status", "top-1", title=str(folder), title_justify="left")
    for path in sorted(p for p in folder.glob("*") if (p / "config.json").exists()):
        result = record.read_result(path)
        if result is None:
            table.add_row(path.name, "", "unfinished", "")
        else:
            top1 = result["scores"].get("test", {}).get("top1")
            score = "" if top1 is None else f"{100 * top1:.2f} %"
            table.add_row(path.name, result["row"], result["status"], score)
    console.print(table)
