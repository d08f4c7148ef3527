"""Certified accuracy by randomised smoothing.

Cohen, Rosenfeld & Kolter 2019, "Certified Adversarial Robustness via Randomized Smoothing". The
smoothed classifier g(x) is the class that the network gives most often to x + N(0, sigma^2 I); if
it gives class A with a probability of at least p_A > 1/2, then g is A within the L2 distance
sigma Phi^-1(p_A) of x (theorem 1 with p_B = 1 - p_A). Noise is added to pixels in [0, 1] and not
clipped: the theorem is about the normal distribution itself. Both procedures of section 3.2 are
here, as functions of how often each class came up: `predict` (PREDICT) and `certify` (CERTIFY).
`count` draws; the two need no network.

A certificate is as good as the draws: those are of float32 numbers, not of real ones, and end at
5.4 standard deviations.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from cnnlab import backend, keys, parallel, record
from cnnlab.evaluation import chunks
from cnnlab.evaluation.robustness import LogitsOf
from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError, Examples, PyTree, fingerprint

ABSTAIN = -1
"""In place of a class: the draws do not tell."""

CHUNK = 8
"""Examples that are counted at a time."""


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """How a network is smoothed and what is drawn to certify it.

    Attributes:
        sigma: standard deviation of the noise, of pixels in [0, 1].
        select: draws of each example by which CERTIFY chooses its class (n0 in the paper).
        samples: further draws, which tell that class's probability (n).
        alpha: probability, at most, that what is said of an example is wrong.

    Raises:
        CnnlabError: a number is out of its range, or nothing could be certified with so few draws.
    """

    sigma: float
    select: int = 100
    samples: int = 1000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        for name, low, high in (
            ("sigma", 0, math.inf), ("select", 0, math.inf), ("samples", 0, math.inf),
            ("alpha", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low < value < high:
                expected = "above 0" if high == math.inf else f"between {low} and {high}"
                raise CnnlabError(f"{name}: expected a finite number {expected}, got {value!r}")
        if self.largest_radius <= 0:
            least = math.floor(math.log2(1 / self.alpha)) + 1
            raise CnnlabError(
                f"samples: expected at least {least}, with which alpha={self.alpha:g} can certify "
                f"anything, got {self.samples}"
            )

    @property
    def largest_radius(self) -> float:
        """The radius that is certified if all draws agree."""
        return float(
            radius(self.sigma, lower_bound(np.array(self.samples), self.samples, self.alpha))
        )

    @property
    def radii(self) -> tuple[float, ...]:
        """0, sigma / 2, sigma, ... as far as anything can be certified."""
        step = self.sigma / 2
        return tuple(i * step for i in range(int(self.largest_radius / step) + 1))

    def __str__(self) -> str:
        return f"sigma{self.sigma:g}-select{self.select}-samples{self.samples}-alpha{self.alpha:g}"


def parse(text: str) -> tuple[Smoothing, float]:
    """Reads `"certified(sigma=0.25, radius=0.5)"`: how to smooth, and the radius asked for.

    Other fields of `Smoothing` may stand there, too; a radius of 0, the default, asks for the class
    alone.

    Raises:
        CnnlabError: it can't be read, or a number is unknown, missing or out of its range.
    """
    fields = {field.name: type(field.default) for field in dataclasses.fields(Smoothing)}
    fields |= {"sigma": float, "radius": float}
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "certified" or node.args:
            raise ValueError
        given = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError):
        raise CnnlabError(
            f"expected what to certify, such as 'certified(sigma=0.25, radius=0.5)', got {text!r}"
        ) from None
    for name, value in given.items():
        if name not in fields:
            raise CnnlabError(
                f"certified: unknown argument {name!r}{did_you_mean(name, fields)}. Known: "
                f"{', '.join(fields)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | fields[name]):
            raise CnnlabError(f"certified: {name}: expected a number, got {value!r}")
    if "sigma" not in given:
        raise CnnlabError(f"certified: sigma, the noise, is missing in {text!r}")
    at = float(given.pop("radius", 0.0))
    smoothing = Smoothing(**given)
    if not 0 <= at <= smoothing.largest_radius:
        raise CnnlabError(
            f"certified: radius: expected at least 0 and at most {smoothing.largest_radius:.4g}, "
            f"beyond which {smoothing.samples} draws can't certify anything, got {at:g}"
        )
    return smoothing, at


class Counts(NamedTuple):
    """How often each class came up.

    Attributes:
        selection: [N, K] int32, of the draws by which CERTIFY chooses the class to certify.
        estimation: [N, K] int32, of the others, which tell its probability.
        seconds: [N] float64, that it took, compilation included.
    """

    selection: np.ndarray
    estimation: np.ndarray
    seconds: np.ndarray


class Certificates(NamedTuple):
    """What CERTIFY returns.

    Attributes:
        classes: [N] int32, or `ABSTAIN`.
        radii: [N] float64, of the L2 ball around the pixels in which the smoothed classifier's
            class is this one; 0 where it abstains.
    """

    classes: np.ndarray
    radii: np.ndarray


def lower_bound(hits: np.ndarray, samples: int, alpha: float) -> np.ndarray:
    """The one-sided lower confidence bound of a probability (Clopper & Pearson 1934).

    Args:
        hits: [...] how many of the draws were hits.
        samples: how many draws there were.
        alpha: probability, at most, that the bound is above the true value.

    Returns:
        [...] float64, 0 to 1.
    """
    hits = np.asarray(hits, np.float64)
    # The alpha quantile of Beta(hits, samples - hits + 1); without hits it is 0.
    bound = special.betaincinv(np.maximum(hits, 1), samples - hits + 1, alpha)
    return np.where(hits > 0, bound, 0.0)


def radius(sigma: float, probability: np.ndarray) -> np.ndarray:
    """The certified L2 radius, sigma Phi^-1(p_A) (section 3.2.2).

    Args:
        sigma: standard deviation of the noise, of pixels in [0, 1].
        probability: [...] that of the most frequent class, or a lower bound of it.

    Returns:
        [...] float64; negative below 1/2, where nothing is certified.
    """
    return sigma * special.ndtri(np.asarray(probability, np.float64))


def certify(counts: Counts, smoothing: Smoothing) -> Certificates:
    """CERTIFY (section 3.2.2): classes with radii, each wrong with at most alpha."""
    selected = counts.selection.argmax(1)
    hits = np.take_along_axis(counts.estimation, selected[:, None], 1)[:, 0]
    bound = lower_bound(hits, smoothing.samples, smoothing.alpha)
    certain = bound > 0.5
    return Certificates(
        np.where(certain, selected, ABSTAIN).astype(np.int32),
        np.where(certain, radius(smoothing.sigma, bound), 0.0),
    )


def predict(votes: np.ndarray, *, alpha: float) -> np.ndarray:
    """PREDICT (section 3.2.1): the smoothed classifier's classes, each wrong with at most alpha.

    The two classes that came up most often are told apart by a two-sided binomial test.

    Args:
        votes: [N, K] how often each class came up.
        alpha: the test's level.

    Returns:
        [N] int32, or `ABSTAIN`.
    """
    second, first = np.sort(np.asarray(votes, np.float64), 1)[:, -2:].T
    # P(X >= first) for X of the binomial distribution of first + second fair coins, twice.
    p_value = 2 * special.betainc(first, second + 1, 0.5)
    return np.where(p_value <= alpha, votes.argmax(1), ABSTAIN).astype(np.int32)


def certified_accuracy(radii: np.ndarray, right: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The fraction of examples that are certified right at certain radii.

    Args:
        radii: [N] certified radius of each example.
        right: [N] bool, whether it is certified as its true class.
        at: [R] radii, at least 0.

    Returns:
        [R] float64.
    """
    reach = np.sort(np.asarray(radii, np.float64)[np.asarray(right, bool)])
    return (len(reach) - np.searchsorted(reach, at, side="left")) / len(right)


def average_radius(radii: np.ndarray, right: np.ndarray) -> float:
    """The mean certified radius, 0 where the class is wrong or none is given (ACR).

    Zhai et al. 2020, "MACER: Attack-free and Scalable Robust Training via Maximizing Certified
    Radius", section 5.

    Args:
        radii: [N] certified radius of each example.
        right: [N] bool, whether it is certified as its true class.
    """
    return float(np.where(right, radii, 0.0).mean())


def count(
    key: jax.Array,
    logits_of: LogitsOf,
    variables: PyTree,
    images: np.ndarray,
    smoothing: Smoothing,
    *,
    batch_size: int = 512,
    mesh: Mesh | None = None,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> Counts:
    """Adds noise to images and counts the classes that the network gives them.

    Calls with the same function `logits_of` and the same numbers of draws share one compilation.

    The noise of example i in draw j is a function of (key, i, j): not of the batches, the chunks or
    the devices.

    Args:
        key: one key.
        logits_of: the network.
        variables: its first argument.
        images: [N, H, W, C] uint8.
        smoothing: the noise and the numbers of draws.
        batch_size: noisy images at a time, at most (but at least one a device).
        mesh: the devices, among which each batch is split; `None` is the first one.
        folder: where finished chunks of examples are kept; see `chunks.collect`. Call
            `chunks.clear` once the counts are safe.
        about: what tells `logits_of` from others, as plain JSON values: a config's identity, say.
            Smoothing, key, variables and images are added.
    """
    total = smoothing.select + smoothing.samples
    together = min(len(images), CHUNK, batch_size)
    calls = math.ceil(total / max(1, batch_size // together))
    mesh = mesh or parallel.make_mesh(1)
    unit = mesh.size // math.gcd(together, mesh.size)  # so that the devices divide the batch
    draws = math.ceil(total / calls / unit) * unit
    own_keys = keys.per_example(key, len(images))
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    num_classes = jax.eval_shape(logits_of, variables, example).shape[-1]
    add = _adder(logits_of, draws, mesh)
    # Placed like the counts that `add` returns, or its second call would compile it again.
    zeros = np.zeros((2, together, num_classes), np.int32)
    zeros = jax.device_put(zeros, parallel.replicated(mesh))

    def compute(positions: np.ndarray) -> chunks.Arrays:
        begun = time.perf_counter()
        rows = np.pad(positions, (0, together - len(positions)), mode="edge")
        taken, keys_taken = images[rows], own_keys[rows]
        counts = zeros
        for first in range(0, total, draws):
            numbers = smoothing.sigma, first, smoothing.select, total
            counts = add(counts, variables, keys_taken, taken, *numbers)
        selection, estimation = np.asarray(counts)[:, : len(positions)]
        seconds = np.full(len(positions), (time.perf_counter() - begun) / len(positions))
        return {"selection": selection, "estimation": estimation, "seconds": seconds}

    known: dict[str, Any] = {}
    if folder is not None:
        unlabelled = Examples(images, np.zeros(len(images), np.int32))
        known = {
            **(about or {}),
            "smoothing": dataclasses.asdict(smoothing),
            "key": jax.random.key_data(key).tolist(),
            "variables": record.parameters_sha256(variables),
            "examples": fingerprint(unlabelled),
        }
    found = chunks.collect(compute, len(images), together, folder=folder, about=known)
    return Counts(**found)


@functools.lru_cache(maxsize=8)
def _adder(logits_of: LogitsOf, draws: int, mesh: Mesh) -> Any:
    """The compiled function that adds so many draws of each example to its counts."""

    def add(
        counts: jax.Array,
        variables: PyTree,
        own_keys: jax.Array,
        images: jax.Array,
        sigma: jax.Array,
        first: jax.Array,
        select: jax.Array,
        total: jax.Array,
    ) -> jax.Array:
        # One axis from the start, so that a mesh splits draws as well as examples.
        number = first + jnp.tile(jnp.arange(draws), len(images))
        each = jax.vmap(jax.random.fold_in)(jnp.repeat(own_keys, draws), number)
        noise = jax.vmap(functools.partial(jax.random.normal, shape=images.shape[1:]))(each)
        pixels = jnp.repeat(images.astype(jnp.float32) / 255, draws, axis=0)
        split = parallel.split_batch(mesh)
        noisy = jax.lax.with_sharding_constraint(pixels + sigma * noise, split)
        classes = jnp.argmax(logits_of(variables, noisy), -1)
        hits = classes[:, None] == jnp.arange(counts.shape[-1])[None]
        of_phase = jnp.stack([number < select, (number >= select) & (number < total)])
        found = hits[None] & of_phase[..., None]
        return counts + found.reshape(2, len(images), draws, -1).sum(2, dtype=jnp.int32)

    return backend.jit(add, often=True, out_shardings=parallel.replicated(mesh))


def summary(counts: Counts, labels: np.ndarray, smoothing: Smoothing) -> dict[str, Any]:
    """What the counts say, as JSON values.

    Args:
        counts: what came up.
        labels: [N] true classes.
        smoothing: what was drawn.

    Returns:
        `classes` (`None` for an abstention), `radii` and `right`: what CERTIFY says of each
        example; `abstained`: how often it says nothing; `average_radius`; `top1`: part of which
        PREDICT names the true class; `top1_abstained`: of which it names none; `seconds`.
    """
    classes, radii = certify(counts, smoothing)
    right = classes == labels
    voted = predict(counts.estimation, alpha=smoothing.alpha)
    return {
        "classes": [None if each == ABSTAIN else each for each in classes.tolist()],
        "radii": radii.tolist(),
        "right": right.tolist(),
        "abstained": float((classes == ABSTAIN).mean()),
        "average_radius": average_radius(radii, right),
        "top1": float((voted == labels).mean()),
        "top1_abstained": float((voted == ABSTAIN).mean()),
        "seconds": float(counts.seconds.sum()),
    }
