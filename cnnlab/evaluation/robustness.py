"""Accuracy under attack.

An attack is told as text, `"pgd(eps=0.1, steps=40)"` or `"autoattack(eps=8/255)"`: a name of
`cnnlab list attacks` with its arguments. An example counts as robust if the model is right on the
clean image and on the adversarial one. `cnnlab.evaluation.checklist` says whether to believe it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cnnlab import attacks, backend, keys, parallel, record, registry
from cnnlab.attacks import autoattack
from cnnlab.evaluation import chunks
from cnnlab.types import CnnlabError, Examples, PyTree, fingerprint

LogitsOf = Callable[[PyTree, jax.Array], jax.Array]
"""(variables, pixels [B, H, W, C] in [0, 1]) -> logits [B, K], evaluation mode."""

CHUNK = 256
"""Examples that are attacked at a time."""

_BATCHES = 2
"""Batches of `CHUNK` that an ensemble, which attacks several at a time, finishes together."""


class Outcome(NamedTuple):
    """What an attack did.

    Attributes:
        images: [N, H, W, C] float32 in [0, 1], attacked; `None` where they were not asked for.
        clean: [N] bool, whether the model is right on the images as they are.
        robust: [N] bool, whether it is right before and after.
        attacked: [N] bool, whether it is right after, right before or not.
    """

    images: np.ndarray | None
    clean: np.ndarray
    robust: np.ndarray
    attacked: np.ndarray


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
    positions: np.ndarray | None = None,
    with_images: bool = True,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    source: tuple[LogitsOf, PyTree] | None = None,
    mesh: Mesh | None = None,
) -> Outcome:
    """Attacks all examples, in chunks.

    Attacks that differ in `eps` only share one compilation for each function `logits_of`.

    Args:
        text: which attack; see `parse`.
        logits_of: the model.
        variables: its first argument.
        images: [N, H, W, C] uint8.
        labels: [N] int32.
        seed: of the attack's draws; example i draws the same in any chunk.
        positions: [N], at which the examples stand in the set whose draws they take; in order from
            0 if `None`.
        with_images: whether to give back, and keep, the attacked images.
        folder: where finished chunks are kept, so that a kill loses one at most; see
            `chunks.collect`. Call `chunks.clear` once the outcome is safe.
        about: what tells `logits_of` from others, as plain JSON values: a config's identity, say.
            The attack, the variables, the examples and the seed are added.
        source: another model and its variables, which the attack is made for instead; this one
            meets what comes of it (a transfer attack: Papernot et al. 2016, "Transferability in
            Machine Learning").
        mesh: the devices, on all of which the variables are; each batch is split over them. `None`
            is where the variables are.

    Raises:
        CnnlabError: the attack does not fit.
    """
    name, given = parse(text)
    labels = np.asarray(labels, np.int32)
    own = keys.key(seed, f"attack {text}")
    if positions is None:
        positions = np.arange(len(images))
    drawn = keys.per_example(own, int(np.max(positions)) + 1)[positions]
    plugin = registry.get("attacks", name)
    ensemble = plugin.function is autoattack.perturb
    split = None
    batch = min(CHUNK, len(images))
    if mesh is not None and mesh.size > 1 and not (ensemble and autoattack.SMALLEST % mesh.size):
        split = parallel.split_batch(mesh)
        batch = -(-batch // mesh.size) * mesh.size
    fooled_of, fooled_variables = source or (logits_of, variables)

    def compute(rows: np.ndarray) -> chunks.Arrays:
        pixels = np.asarray(images[rows], np.float32) / 255
        if ensemble:
            found = autoattack.run(
                drawn[rows], fooled_of, fooled_variables, pixels, labels[rows],
                **(plugin.fields | given), chunk=CHUNK, sharding=split,
            )  # fmt: skip
            made = [found.images, found.correct, found.robust]
            if source:
                made[1:] = _verdicts(logits_of, variables, (pixels, found.images), labels[rows])
        else:
            fill = np.pad(np.arange(len(rows)), (0, batch - len(rows)), mode="edge")
            eps = {key: jnp.float32(value) for key, value in given.items() if key == "eps"}
            fixed = tuple(sorted((k, v) for k, v in given.items() if k != "eps"))
            program = _program(logits_of, fooled_of, name, fixed)
            both = (variables, fooled_variables)
            examples = (drawn[rows][fill], pixels[fill], labels[rows][fill])
            if split is not None:
                examples = jax.device_put(examples, split)
            parts = program(both, eps, *examples)
            made = [np.asarray(each)[: len(rows)] for each in parts]
        arrays = dict(zip(("images", "clean", "attacked"), made, strict=True))
        return arrays if with_images else {k: v for k, v in arrays.items() if k != "images"}

    known: dict[str, Any] = {}
    if folder is not None:
        known = {
            **(about or {}),
            "attack": text,
            "seed": seed,
            "variables": record.parameters_sha256(variables, fooled_variables),
            "examples": fingerprint(Examples(images, labels)),
            "positions": positions.tolist(),
            "with_images": with_images,
        }
    size = CHUNK * _BATCHES if ensemble else CHUNK
    found = chunks.collect(compute, len(images), size, folder=folder, about=known)
    clean, attacked = found["clean"], found["attacked"]
    return Outcome(found.get("images"), clean, clean & attacked, attacked)


def interval(robust: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy over examples.

    Clopper & Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the
    binomial": exact, and so a little wide.

    Args:
        robust: [N] bool, an example each.
    """
    from scipy import stats

    found = stats.binomtest(int(robust.sum()), len(robust)).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def _verdicts(
    logits_of: LogitsOf, variables: PyTree, several: tuple[np.ndarray, ...], labels: np.ndarray
) -> list[np.ndarray]:
    """Whether the model is right on each of these sets of pixels."""
    logits = backend.jit(logits_of)
    return [np.asarray(logits(variables, pixels)).argmax(-1) == labels for pixels in several]


@functools.lru_cache(maxsize=64)
def _program(
    logits_of: LogitsOf, fooled_of: LogitsOf, name: str, fixed: tuple[tuple[str, Any], ...]
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(variables, {"eps": ...}, keys, pixels, labels) -> attacked, right before, right after.

    The variables are those of the two models: of whose verdict counts, and of who is attacked.
    """

    def run(
        variables: tuple[PyTree, PyTree],
        eps: dict[str, jax.Array],
        own: jax.Array,
        pixels: jax.Array,
        labels: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = functools.partial(logits_of, variables[0])
        made = attacks.create(name, **dict(fixed), **eps)
        changed = made(own, functools.partial(fooled_of, variables[1]), pixels, labels)
        before, after = (jnp.argmax(model(x), -1) == labels for x in (pixels, changed))
        return changed, before, after

    program: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = backend.jit(run, often=True)
    return program
