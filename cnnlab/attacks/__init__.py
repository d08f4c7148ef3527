"""Adversarial attacks, one file an attack.

An attack is

    perturb(key, logits_fn, images, labels, *, eps, norm="linf", ...) -> adversarial images

with `images` [B, H, W, C] float32 in [0, 1], `labels` [B] int32 and `logits_fn` from pixels to
logits [B, K], evaluation mode. It is pure and works under `jit` and over a sharded batch. Strengths
(floats, `eps` first) may be traced; whole numbers and texts (`steps`, `restarts`, `norm`) shape the
program. What it returns lies in [0, 1] and, but for attacks that look for the smallest
perturbation, in the ball of radius `eps` around the images, exactly: checked in float64 too.

`key` is one key, from which example i draws by its position, or one key an example, [B]: whoever
cuts a data set into chunks, or drops examples that have fallen, gives each its own and so gets the
same draws for it anyhow.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax

from cnnlab import registry
from cnnlab.attacks._balls import NORMS, per_example, project, random_start, steepest
from cnnlab.types import CnnlabError

__all__ = [
    "NORMS", "Attack", "LogitsFn", "create", "per_example", "project", "random_start", "steepest",
    "strength",
]  # fmt: skip

LogitsFn = Callable[[jax.Array], jax.Array]
"""Pixels [B, H, W, C] in [0, 1] -> logits [B, K]."""


class Attack(Protocol):
    """What `create` makes."""

    def __call__(
        self, key: jax.Array, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """Adversarial images [B, H, W, C] in [0, 1]."""


def create(name: str, **arguments: Any) -> Attack:
    """An attack with its arguments, such as `create("pgd", eps=8 / 255, steps=20)`.

    Args:
        name: as `cnnlab list attacks` shows it.
        **arguments: of the attack's `perturb`; `eps` may be a text (see `strength`), and numbers
            that do not shape the program may be arrays, traced ones too.

    Raises:
        CnnlabError: the name or an argument is unknown, one is missing, of the wrong type or out of
            its range.
    """
    plugin = registry.get("attacks", name)
    required = {
        parameter.name
        for parameter in inspect.signature(plugin.function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    }
    if missing := sorted(required - set(arguments)):
        raise CnnlabError(
            f"attack {name!r} needs {', '.join(missing)}, such as "
            f"create({name!r}, {', '.join(f'{each}=8 / 255' for each in missing)})"
        )
    given = dict(arguments)
    if "eps" in given and not _is_array(given["eps"]):
        given["eps"] = strength(given["eps"])
    literals = {k: v for k, v in given.items() if k not in required and not _is_array(v)}
    text = ", ".join(f"{k}={v!r}" for k, v in literals.items())
    call = registry.call("attacks", f"{name}({text})")
    for each in set(given) - set(literals) - required:
        if not isinstance(call.arguments.get(each), float):
            # Unknown, or one that shapes the program: the registry says what fits.
            registry.call("attacks", f"{name}({each}='an array')")
    fixed = call.arguments | {k: v for k, v in given.items() if k not in literals}

    def attack(
        key: jax.Array, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        return plugin.function(key, logits_fn, images, labels, **fixed)

    return attack


def strength(eps: float | str) -> float:
    """The radius of a ball from a number, a fraction `"8/255"`, or pixel values `"8px"` of 255.

    Raises:
        CnnlabError: it is none of these, negative or not finite.
    """
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.eE+-]+)|(px|pixels?))?\s*", f"{eps}")
    try:
        if found is None or isinstance(eps, bool):
            raise ValueError
        numerator, denominator, pixels = found.groups()
        value = float(numerator) / (float(denominator or 1) if not pixels else 255)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise CnnlabError(
            f"eps: expected a number of at least 0, '8/255' or '8px' (of 255), got {eps!r}"
        ) from None
    return value


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")
