"""Plug-ins found by file and name.

A plug-in is a Python file in one of the plug-in folders of the package (`models`, `augment`,
`attacks`, `tasks`, `data`). A file that defines `VARIANTS: dict[str, dict]` registers each of its
variants under its name, with the fields that the variant fixes; one that defines
`PLUGINS: dict[str, Callable]` registers several functions; any other file registers itself under
its own file name. No list has to be edited.

A number's range stands in its annotation, `probability: Annotated[float, Range(0, 1)] = 0.5`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cnnlab.types import CnnlabError

FUNCTIONS = {
    "models": "build",
    "augment": "apply",
    "attacks": "perturb",
    "tasks": "loss",
    "data": "load",
}
"""Plug-in folder -> the function that each of its files defines."""

SINGULAR = {
    "models": "model",
    "augment": "augmentation",
    "attacks": "attack",
    "tasks": "task",
    "data": "data set",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number, or each number of a tuple, may take: `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return (
            f"{self.low:g} to {self.high:g}" if self.low > -math.inf else f"at most {self.high:g}"
        )

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Plugin:
    """One registered name.

    Attributes:
        name: the name in the registry.
        module: the Python module that defines it.
        function: the module's function (`build`, `apply`, ...).
        fields: the arguments that this variant fixes.
    """

    name: str
    module: types.ModuleType
    function: Callable[..., Any]
    fields: dict[str, Any]

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments that a config may set, with this variant's values."""
        defaults = {
            p.name: p.default
            for p in inspect.signature(self.function).parameters.values()
            if p.default is not inspect.Parameter.empty
        }
        return defaults | self.fields

    @functools.cached_property
    def annotations(self) -> dict[str, Any]:
        """The types of `parameters`, resolved."""
        hints = typing.get_type_hints(self.function)
        return {name: hints[name] for name in self.parameters}

    @functools.cached_property
    def ranges(self) -> dict[str, Range]:
        """The ranges of those `parameters` that have one."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        found = {}
        for name in self.parameters:
            for note in getattr(hints[name], "__metadata__", ()):
                if isinstance(note, Range):
                    found[name] = note
        return found

    @functools.cached_property
    def takes_batch(self) -> bool:
        """Whether an augmentation takes a whole batch (its second argument is `batch`)."""
        return list(inspect.signature(self.function).parameters)[1:2] == ["batch"]


@dataclasses.dataclass(frozen=True)
class Call:
    """A plug-in with its arguments: what `"crop(padding=4)"` means.

    Attributes:
        plugin: what is called.
        arguments: all of them, by name.
    """

    plugin: Plugin
    arguments: dict[str, Any]

    @property
    def static(self) -> dict[str, Any]:
        """The arguments that shape the program; of the others, how many numbers they are."""
        return {
            name: size if (size := _traced(value)) else value
            for name, value in self.arguments.items()
        }

    @property
    def numbers(self) -> list[float]:
        """The arguments that may be traced, one after another."""
        found: list[float] = []
        for value in self.arguments.values():
            if _traced(value):
                found += value if isinstance(value, tuple) else (value,)
        return found

    def bound(self, numbers: Iterator[Any]) -> dict[str, Any]:
        """The arguments with these numbers in the places of `self.numbers`."""
        return {
            name: tuple(next(numbers) for _ in value)
            if _traced(value) and isinstance(value, tuple)
            else next(numbers)
            if _traced(value)
            else value
            for name, value in self.arguments.items()
        }


def _traced(value: Any) -> int:
    """How many numbers of an argument may be traced: 0 for what shapes the program."""
    parts = value if isinstance(value, tuple) else (value,)
    return len(parts) if parts and all(isinstance(part, float) for part in parts) else 0


@functools.cache
def plugins(folder: str) -> dict[str, Plugin]:
    """Every plug-in of a folder, by name, sorted.

    Raises:
        ValueError: a file breaks the contract, or two register one name.
    """
    package = importlib.import_module(f"cnnlab.{folder}")
    function_name = FUNCTIONS[folder]
    found: dict[str, Plugin] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.ispkg or entry.name.startswith("_"):
            continue
        module = importlib.import_module(f"cnnlab.{folder}.{entry.name}")
        several = getattr(module, "PLUGINS", {})
        function = getattr(module, function_name, None)
        if function is None and not several:
            raise ValueError(
                f"cnnlab/{folder}/{entry.name}.py must define {function_name}() or PLUGINS"
            )
        variants = {} if several else getattr(module, "VARIANTS", {entry.name: {}})
        entries: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
            (name, each, {}) for name, each in several.items()
        ]
        if function is not None:
            entries += [(name, function, fields) for name, fields in variants.items()]
        for name, function, fields in entries:
            if name in found:
                raise ValueError(
                    f"{SINGULAR[folder]} {name!r} is registered twice: by "
                    f"{found[name].module.__name__} and by {module.__name__}"
                )
            found[name] = Plugin(name, module, function, dict(fields))
            unknown = set(fields) - set(inspect.signature(function).parameters)
            if unknown:
                raise ValueError(
                    f"cnnlab/{folder}/{entry.name}.py: VARIANTS[{name!r}] sets {sorted(unknown)}, "
                    f"which {function_name}() does not take"
                )
    return dict(sorted(found.items()))


def get(folder: str, name: str) -> Plugin:
    """The plug-in of this name.

    Raises:
        CnnlabError: there is none; the message names the nearest ones.
    """
    known = plugins(folder)
    if name not in known:
        raise CnnlabError(
            f"unknown {SINGULAR[folder]} {name!r}{did_you_mean(name, known)}. "
            f"`cnnlab list {folder}` shows all {len(known)}"
        )
    return known[name]


def call(folder: str, text: str) -> Call:
    """Reads `"flip"` or `"crop(padding=4)"`: a plug-in's name with arguments.

    Returns:
        The plug-in with all its parameters. An augmentation also has a `probability`, unless it is
        1 and the plug-in has none of its own: what is always applied draws nothing for it.

    Raises:
        CnnlabError: it can't be read, the name or an argument is unknown, or a value is of the
            wrong type or out of its range.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        node = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if not isinstance(node.func, ast.Name) or node.args:
            raise ValueError
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError):
        raise CnnlabError(
            f"expected a name with keyword arguments such as 'crop(padding=4)', got {text!r}"
        ) from None
    plugin = get(folder, node.func.id)
    known, ranges = dict(plugin.parameters), dict(plugin.ranges)
    generic = folder == "augment" and "probability" not in known
    if generic:
        known["probability"] = 1.0
        ranges["probability"] = Range(0, 1)
    for name, value in given.items():
        if name not in known:
            raise CnnlabError(
                f"{SINGULAR[folder]} {plugin.name!r} has no argument {name!r}"
                f"{did_you_mean(name, known)}. It has: {', '.join(known) or 'none'}"
            )
        known[name] = _checked(
            value, known[name], ranges.get(name, Range()), f"{SINGULAR[folder]} {plugin.name!r}: "
            f"{name}"
        )  # fmt: skip
    if generic and known["probability"] == 1:
        del known["probability"]
    return Call(plugin, known)


def _checked(value: Any, default: Any, within: Range, what: str) -> Any:
    """The value as its default's type; each of a tuple's numbers in its range.

    Raises:
        CnnlabError: it does not fit.
    """
    if isinstance(default, tuple):
        parts = tuple(value) if isinstance(value, tuple | list) else (value,) * len(default)
        if len(parts) != len(default):
            raise CnnlabError(f"{what}: expected {len(default)} values, got {value!r}")
        return tuple(_checked(v, d, within, what) for v, d in zip(parts, default, strict=True))
    kind = type(default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise CnnlabError(f"{what}: expected {kind.__name__}, got {value!r}")
    if kind in (int, float):
        value = kind(value)
        if not math.isfinite(value) or value not in within:
            raise CnnlabError(f"{what}: expected a number of {within}, got {value!r}")
    return value


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`" (did you mean 'a' or 'b'?)"` for the nearest known names, or an empty string."""
    near = difflib.get_close_matches(str(given), list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
