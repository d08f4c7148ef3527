"""Plug-ins found by file and name.

A plug-in is a Python file in one of the plug-in folders of the package (`models`, `augment`,
`attacks`, `tasks`, `data`). A file that defines `VARIANTS: dict[str, dict]` registers each of its
variants under its name, with the fields that the variant fixes; a file without registers itself
under its own file name. No list has to be edited.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable
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
        function = getattr(module, function_name, None)
        if function is None:
            raise ValueError(f"cnnlab/{folder}/{entry.name}.py must define {function_name}()")
        for name, fields in getattr(module, "VARIANTS", {entry.name: {}}).items():
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


def call(folder: str, text: str) -> tuple[Plugin, dict[str, Any]]:
    """Reads `"flip"` or `"crop(padding=4)"`: a plug-in's name with arguments.

    Returns:
        The plug-in, and all its parameters with these arguments put in.

    Raises:
        CnnlabError: it can't be read, the name or an argument is unknown, or a type is wrong.
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
    known = plugin.parameters
    for name, value in given.items():
        if name not in known:
            raise CnnlabError(
                f"{SINGULAR[folder]} {plugin.name!r} has no argument {name!r}"
                f"{did_you_mean(name, known)}. It has: {', '.join(known) or 'none'}"
            )
        kind = type(known[name])
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise CnnlabError(
                f"{SINGULAR[folder]} {plugin.name!r}: {name}: expected {kind.__name__}, "
                f"got {value!r}"
            )
    return plugin, known | given


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`" (did you mean 'a' or 'b'?)"` for the nearest known names, or an empty string."""
    near = difflib.get_close_matches(str(given), list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
