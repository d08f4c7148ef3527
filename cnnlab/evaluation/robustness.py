"""Accuracy under attack.

An attack is told as text, `"pgd(eps=0.1, steps=40)"` or `"autoattack(eps=8/255)"`: a name of
`cnnlab list attacks` with its arguments. An example counts as robust if the model is right on the
clean image and on the adversarial one.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab import attacks, backend, keys, registry
from cnnlab.attacks import autoattack
from cnnlab.types import CnnlabError, PyTree

LogitsOf = Callable[[PyTree, jax.Array], jax.Array]
"""(variables, pixels [B, H, W, C] in [0, 1]) -> logits [B, K], evaluation mode."""

CHUNK = 256
"""Examples that are attacked at a time."""


class Outcome(NamedTuple):
    """What an attack did.

    Attributes:
        images: [N, H, W, C] float32 in [0, 1], attacked.
        clean: [N] bool, whether the model is right on the images as they are.
        robust: [N] bool, whether it is right before and after.
    """

    images: np.ndarray
    clean: np.ndarray
    robust: np.ndarray


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of an attack told as text; fractions may stand as `8/255`.

    Raises:
        CnnlabError: it can't be read, or the attack does not take these arguments.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            raise ValueError
        given = {
            str(keyword.arg): ast.unparse(keyword.value)
            if isinstance(keyword.value, ast.BinOp)
            else ast.literal_eval(keyword.value)
            for keyword in tree.keywords
        }
    except (SyntaxError, ValueError):
        raise CnnlabError(
            f"expected an attack with its strength such as 'pgd(eps=0.1, steps=40)', got {text!r}"
        ) from None
    attacks.create(tree.func.id, **given)  # says what does not fit
    if "eps" in given:
        given["eps"] = attacks.strength(given["eps"])
    return tree.func.id, given


def attack(
    text: str,
    logits_of: LogitsOf,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
) -> Outcome:
    """Attacks all examples, in chunks.

    Args:
        text: which attack; see `parse`.
        logits_of: the model.
        variables: its first argument.
        images: [N, H, W, C] uint8.
        labels: [N] int32.
        seed: of the attack's draws; example i draws the same in any chunk.

    Raises:
        CnnlabError: the attack does not fit.
    """
    name, given = parse(text)
    pixels = np.asarray(images, np.float32) / 255
    labels = np.asarray(labels, np.int32)
    own = keys.per_example(keys.key(seed, f"attack {text}"), len(pixels))
    plugin = registry.get("attacks", name)
    if plugin.function is autoattack.perturb:
        found = autoattack.run(
            own, logits_of, variables, pixels, labels, **(plugin.fields | given), chunk=CHUNK
        )
        return Outcome(found.images, found.correct, found.robust)
    made = attacks.create(name, **given)

    @backend.jit
    def one_chunk(
        variables: PyTree, own: jax.Array, pixels: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = functools.partial(logits_of, variables)
        changed = made(own, model, pixels, labels)
        right = [jnp.argmax(model(x), -1) == labels for x in (pixels, changed)]
        return changed, right[0], right[0] & right[1]

    parts = []
    for start in range(0, len(pixels), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(pixels)))
        padded = np.pad(rows, (0, min(CHUNK, len(pixels)) - len(rows)), mode="edge")
        result = one_chunk(variables, own[padded], pixels[padded], labels[padded])
        parts.append([np.asarray(each)[: len(rows)] for each in result])
    return Outcome(*(np.concatenate(each) for each in zip(*parts, strict=True)))
