"""Whether an accuracy under attack can be believed: a checklist of common mistakes, automated.

Carlini et al. 2019, "On Evaluating Adversarial Robustness", sections 3 to 5; for the signs of
masked gradients also Athalye, Carlini & Wagner 2018, "Obfuscated Gradients Give a False Sense of
Security", section 3.1.

What is wrong is a `Finding`. `outputs` and `above_clean` are cheap and go with every attack;
`full` attacks the first examples several times. Where two attacks are compared they met the same
examples, and only a difference that chance alone makes at most once in a hundred times
(`SIGNIFICANT`, exact sign test) counts: an honest model fails no check by noise.

Log-probabilities are no finding: softmax gives back the same probabilities, so no loss changes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab import backend
from cnnlab.evaluation import robustness
from cnnlab.evaluation.robustness import LogitsOf
from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError, PyTree

CHECKS = {
    "robust-above-clean": "the model is right more often under attack than without",
    "random-outputs": "the same image twice gives different logits",
    "probabilities": "the outputs are probabilities, no logits",
    "zero-gradients": "the loss has no gradient with respect to the image",
    "square-stronger": "Square, which sees outputs only, beats PGD, which follows the gradient",
    "steps-weaker": "PGD with more steps fools fewer examples than with fewer steps",
    "unbounded": "PGD does not fool the model even where any image is allowed",
    "not-monotone": "the accuracy under attack rises with eps",
}
"""Name -> what is wrong."""

EXAMPLES = 256
"""As many examples are looked at, the first."""

SIGNIFICANT = 0.01
"""The chance with which an honest comparison of two attacks makes a finding."""

ZERO_GRADIENTS = 0.05
"""The part of the correctly classified examples that may lack a gradient."""

UNBOUNDED = 0.01
"""The part of all examples that an attack without bounds may leave."""

_ROUNDING = 1e-3  # of the largest logit; TF32 products, the coarsest in use, have 5e-4
_STEPS, _FEWER, _QUERIES = 40, 10, 1000


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong with an accuracy under attack.

    Attributes:
        name: one of `CHECKS`.
        severity: `"invalid"` if the accuracy is not what it says; `"overestimate"` if a better
            attack would likely find a lower one.
        message: what was seen and what to do about it.
        figures: the numbers behind it.
    """

    name: str
    severity: str
    message: str
    figures: dict[str, float]


class UntrustworthyError(CnnlabError):
    """An accuracy under attack with findings that nobody allowed.

    Attributes:
        findings: those.
    """

    def __init__(self, findings: Sequence[Finding], how: str) -> None:
        self.findings = tuple(findings)
        told = "; ".join(f"{each.name}: {each.message}" for each in findings)
        super().__init__(f"{told}. To accept it all the same, {how}")


def require(findings: Iterable[Finding], allow: Sequence[str], how: str) -> None:
    """Lets pass what is allowed.

    Args:
        findings: what the checks found.
        allow: names of `CHECKS` whose findings are accepted.
        how: how to allow one, for the message: "give allow=(...)".

    Raises:
        UntrustworthyError: something else was found.
    """
    left = [finding for finding in findings if finding.name not in allow]
    if left:
        raise UntrustworthyError(left, how)


def check_names(allow: Sequence[str]) -> None:
    """Raises CnnlabError where one of these is no name of `CHECKS`."""
    for name in allow:
        if name not in CHECKS:
            raise CnnlabError(
                f"allow: unknown check {name!r}{did_you_mean(name, CHECKS)}. Known: "
                f"{', '.join(CHECKS)}"
            )


def above_clean(clean: np.ndarray, attacked: np.ndarray) -> list[Finding]:
    """Finds `robust-above-clean`.

    Args:
        clean: [N] bool, right on the images as they are.
        attacked: [N] bool, right on the attacked images.
    """
    chance = _sign_test(attacked & ~clean, clean & ~attacked)
    if chance > SIGNIFICANT:
        return []
    figures = {"clean": float(clean.mean()), "attacked": float(attacked.mean()), "p": chance}
    message = (
        f"{_percent(figures['attacked'])} right under attack but {_percent(figures['clean'])} "
        "without: the attack helps the model, so its labels or the sign of its loss are wrong"
    )
    return [Finding("robust-above-clean", "invalid", message, figures)]


def outputs(
    logits_of: LogitsOf, variables: PyTree, images: np.ndarray, labels: np.ndarray
) -> list[Finding]:
    """Finds `random-outputs`, `probabilities` and `zero-gradients` in the first `EXAMPLES`.

    A backward pass and four forward ones. Outputs are random if they differ between two calls, two
    compilations, or two batches: the last is what a batch's own statistics do.

    Args:
        logits_of: the model.
        variables: its first argument.
        images: [N, H, W, C] uint8.
        labels: [N] int32.
    """
    pixels = np.asarray(images[:EXAMPLES], np.float32) / 255
    labels = np.asarray(labels[:EXAMPLES], np.int32)
    first, second, slope = _programs(logits_of)
    logits = np.asarray(first(variables, pixels))
    again = np.asarray(first(variables, pixels))
    # In other places of another batch: each of the first half twice.
    half = np.arange(len(pixels)) // 2
    moved = np.asarray(second(variables, pixels[half]))
    found = []
    difference = float(max(np.abs(again - logits).max(), np.abs(moved - logits[half]).max()))
    largest = float(np.abs(logits).max())
    if difference > _ROUNDING * largest:
        message = (
            f"logits of the same images differ by up to {difference:.3g} between two calls or "
            f"batches, and are at most {largest:.3g}: use evaluation mode, or attack the "
            "expectation of a random model (autoattack_rand)"
        )
        figures = {"difference": difference, "largest": largest}
        found.append(Finding("random-outputs", "invalid", message, figures))
    sums = logits.sum(1, dtype=np.float64)
    if logits.min() >= 0 and logits.max() <= 1 and np.abs(sums - 1).max() <= 1e-3:
        message = (
            "the outputs are probabilities: they lie in [0, 1] and sum to 1. Losses of logits have "
            "small or no gradients there; hand over what goes into the softmax"
        )
        figures = {"low": float(logits.min()), "high": float(logits.max())}
        found.append(Finding("probabilities", "invalid", message, figures))
    right = logits.argmax(1) == labels
    without = ~np.asarray(slope(variables, pixels, labels))
    part = float(without[right].mean()) if right.any() else 0.0
    if part > ZERO_GRADIENTS:
        message = (
            f"the loss has no gradient, or none that is finite, at {_percent(part)} of the "
            "correctly classified images: an attack that follows it stays where it is. Look for "
            "rounding, saturated outputs or steps that cannot be differentiated, and attack with "
            "square as well"
        )
        figures = {"without_gradient": part, "examples": float(right.sum())}
        found.append(Finding("zero-gradients", "overestimate", message, figures))
    return found


def monotone(curve: Mapping[float, np.ndarray]) -> list[Finding]:
    """Finds `not-monotone`.

    Args:
        curve: eps -> [N] bool, robust; the same examples everywhere.
    """
    strengths = sorted(curve)
    for low, high in itertools.pairwise(strengths):
        chance = _sign_test(curve[high] & ~curve[low], curve[low] & ~curve[high])
        if chance <= SIGNIFICANT / (len(strengths) - 1):  # Bonferroni's, for all neighbours
            parts = [float(curve[eps].mean()) for eps in (low, high)]
            message = (
                f"{_percent(parts[0])} robust at eps {low:.4g} but {_percent(parts[1])} at "
                f"{high:.4g}, whose ball holds the smaller one: the attack misses what is there; "
                "give it more steps, smaller ones, or restarts"
            )
            figures = {"eps": low, "robust": parts[0], "larger_eps": high, "larger": parts[1]}
            return [Finding("not-monotone", "overestimate", message, figures | {"p": chance})]
    return []


def full(
    logits_of: LogitsOf,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
) -> list[Finding]:
    """Goes through the whole list, on the first `EXAMPLES`.

    About 400 forward and backward passes, of PGD, and 1,000 forward ones, of Square.

    Args:
        logits_of: the model.
        variables: its first argument.
        images: [N, H, W, C] uint8.
        labels: [N] int32.
        eps: the radius that the accuracy under attack is told for; above 0.
        norm: `"linf"`, `"l2"` or `"l1"`.
        seed: of the attacks' draws.

    Raises:
        CnnlabError: eps is 0; unknown norm.
    """
    if not eps > 0:
        raise CnnlabError(f"the checklist needs an eps above 0, got {eps}")
    images, labels = images[:EXAMPLES], np.asarray(labels[:EXAMPLES], np.int32)

    def attack(name: str, eps: float, steps: int) -> robustness.Outcome:
        return robustness.attack(
            f"{name}(eps={eps!r}, norm={norm!r}, steps={steps})",
            logits_of, variables, images, labels, seed=seed, with_images=False,
        )  # fmt: skip

    pgd = attack("pgd", eps, _STEPS)
    found = outputs(logits_of, variables, images, labels)
    found += above_clean(pgd.clean, pgd.attacked)

    def compare(name: str, other: np.ndarray, told: str, remedy: str) -> None:
        """A finding if the attack that `told` names fools more than PGD does."""
        chance = _sign_test(pgd.robust & ~other, other & ~pgd.robust)
        if chance <= SIGNIFICANT:
            parts = {"pgd": float(pgd.robust.mean()), "other": float(other.mean()), "p": chance}
            message = (
                f"{told} leaves {_percent(parts['other'])} robust, PGD of {_STEPS} steps "
                f"{_percent(parts['pgd'])} ({len(images)} examples): {remedy}"
            )
            found.append(Finding(name, "overestimate", message, parts))

    compare(
        "square-stronger", attack("square", eps, _QUERIES).robust,
        f"Square, which takes no gradient, of {_QUERIES:,} queries",
        "the gradients mislead (masking); attack with autoattack, or through an approximation of "
        "what has no useful gradient",
    )  # fmt: skip
    compare(
        "steps-weaker", attack("pgd", eps, _FEWER).robust, f"PGD of {_FEWER} steps",
        "the gradients mislead, or the steps are too small to matter; try other step sizes and "
        "losses",
    )  # fmt: skip
    size = math.prod(images.shape[1:])
    widest = {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[norm]
    unbounded = attack("pgd", widest, _STEPS).robust
    if _chance_of_more(unbounded, UNBOUNDED) <= SIGNIFICANT:
        left = float(unbounded.mean())
        message = (
            f"PGD that may turn an image into any other (eps {widest:.4g}) still leaves "
            f"{_percent(left)} robust, where an attack that works leaves 0 %: it does not work"
        )
        found.append(Finding("unbounded", "overestimate", message, {"robust": left}))
    curve = {each: attack("pgd", each, _STEPS).robust for each in (eps / 4, eps / 2, 2 * eps)}
    return found + monotone(curve | {0.0: pgd.clean, eps: pgd.robust, widest: unbounded})


@functools.lru_cache(maxsize=64)
def _programs(logits_of: LogitsOf) -> tuple[Callable[..., Any], ...]:
    """Logits, twice as they are traced anew, and where the loss has a gradient."""

    def loss(pixels: jax.Array, variables: PyTree, labels: jax.Array) -> jax.Array:
        logits = logits_of(variables, pixels)
        chosen = labels[:, None] == jnp.arange(logits.shape[-1])[None]
        return jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0), -1))

    def has_slope(variables: PyTree, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        slope = jax.grad(loss)(pixels, variables, labels).reshape(len(pixels), -1)
        return jnp.any(slope != 0, 1) & jnp.all(jnp.isfinite(slope), 1)

    # Two functions, or jit would trace one; equal programs meet again in the compilation cache.
    twice = (lambda variables, pixels: logits_of(variables, pixels) for _ in range(2))
    return (*(backend.jit(each) for each in twice), backend.jit(has_slope))


def _sign_test(more: np.ndarray, less: np.ndarray) -> float:
    """The chance of so many more than less if both are equally likely; exact, one-sided."""
    from scipy import stats

    first, second = int(more.sum()), int(less.sum())
    if not first:
        return 1.0
    return float(stats.binomtest(first, first + second, alternative="greater").pvalue)


def _chance_of_more(hits: np.ndarray, part: float) -> float:
    """The chance of so many hits if each is as likely as `part`; exact."""
    from scipy import stats

    return float(stats.binomtest(int(hits.sum()), len(hits), part, alternative="greater").pvalue)


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
