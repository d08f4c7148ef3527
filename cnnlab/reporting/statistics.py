"""What several seeds and one test set allow to be said about a difference.

Two sources of chance stand between two rows of a table: the seeds (initialisation, order of the
batches, augmentation) and the test examples. With several seeds, `paired_bootstrap` accounts for
both. With one run a row only the examples can be accounted for: `mcnemar`, which Dietterich (1998)
recommends for learners that are trained once; it says nothing about other seeds.

References:
    McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
    Dietterich 1998, "Approximate statistical tests for comparing supervised classification
    learning algorithms".
    Efron and Tibshirani 1993, "An introduction to the bootstrap".
    Rao and Wu 1988, "Resampling inference with complex survey data" (rescaling of few units).
    Owen 2007, "The pigeonhole bootstrap" (two crossed factors).
    Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and spread of one number over seeds.

    Attributes:
        mean: the arithmetic mean.
        std: the standard deviation with n - 1 in the denominator; `None` for one value.
        n: how many values.
    """

    mean: float
    std: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row against the baseline.

    Attributes:
        difference: mean accuracy of the row minus that of the baseline, -1 to 1.
        low: lower end of the 95 % confidence interval.
        high: upper end.
        p: two-sided p-value, uncorrected.
        test: `"bootstrap"` or `"mcnemar"`.
        seeds: how many pairs of runs went in.
        examples: how many test examples.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    seeds: int
    examples: int


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation (ddof=1; `None` for a single value) and number of `values`.

    Raises:
        ValueError: there are none.
    """
    if len(values) == 0:
        raise ValueError("expected at least one value")
    array = np.asarray(values, dtype=np.float64)
    return Summary(
        float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size
    )


def mcnemar(row: np.ndarray, baseline: np.ndarray) -> float:
    """Exact two-sided McNemar test on paired correctness.

    Given that the two disagree on an example, each is equally likely to be the right one under
    the null hypothesis: a binomial test over the examples on which exactly one is right.

    Args:
        row: [N] bool, right or wrong for each test example.
        baseline: [N] bool, for the same examples.

    Returns:
        The p-value; 1 where the two never disagree.
    """
    from scipy import stats

    row, baseline = _paired(row, baseline, ndim=1)
    wins, losses = int(np.sum(row & ~baseline)), int(np.sum(baseline & ~row))
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def paired_bootstrap(
    row: np.ndarray,
    baseline: np.ndarray,
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Paired bootstrap of the difference in mean accuracy, over seeds and over examples.

    Every resample draws seeds with replacement (seed s of the row stays with seed s of the
    baseline) and, crossed with them, examples with replacement, since all seeds are scored on the
    same examples (Owen 2007). The deviations of S seeds are stretched by sqrt(S / (S - 1)), without
    which the variance over few seeds comes out too small (Rao and Wu 1988). The bootstrap gives
    the standard error; interval and p-value are Student's t (Efron and Tibshirani 1993, section
    12.4) with Satterthwaite's degrees of freedom, between S - 1 (the seeds dominate) and N - 1 (the
    examples do).

    Why not percentiles: resampling three numbers never leaves their range, so three seeds that
    happen to agree in sign, one time in four by chance, would count as certain. Where the seeds
    dominate, percentiles reject a true null hypothesis up to 24 times in 100 at alpha = 0.05 with
    three seeds, this test 5 to 7. Where seeds hardly matter it is conservative (about 1 in
    100), because the crossed bootstrap counts the interaction of seeds and examples too often.

    Args:
        row: [S, N] bool, right or wrong for each seed and test example.
        baseline: [S, N] bool, the same seeds and examples.
        rng: draws the resamples; equal generators give equal results.
        resamples: how many; 10,000 give the standard error to 1 %.

    Returns:
        The comparison. With one seed, only the examples are resampled.
    """
    from scipy import stats

    row, baseline = _paired(row, baseline, ndim=2)
    seeds, examples = row.shape
    differences = row.astype(np.int8) - baseline.astype(np.int8)
    # Examples on which every seed has the same outcome are exchangeable: drawing how often each
    # of the at most 3**S kinds comes up is the same as drawing N examples, and far cheaper.
    kinds, counts = np.unique(differences, axis=1, return_counts=True)
    stretch = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0.0
    draws = []
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        by_seed = rng.multinomial(examples, counts / examples, size=size) @ kinds.T / examples
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        draws.append(np.sum(by_seed * (1 / seeds + stretch * (weights - 1 / seeds)), axis=1))

    difference = float(differences.mean())
    variance = float(np.mean((np.concatenate(draws) - difference) ** 2))
    # The share of the seeds alone needs no drawing: this is its limit over many resamples.
    of_seeds = float(differences.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    of_examples = max(variance - of_seeds, 0.0)
    spread = math.sqrt(of_seeds + of_examples)
    if spread == 0:  # every pair differs alike: no chance is visible
        p, half = float(difference == 0), 0.0
    else:
        weight = of_seeds**2 / max(seeds - 1, 1) + of_examples**2 / max(examples - 1, 1)
        freedom = spread**4 / weight
        p = float(2 * stats.t.sf(abs(difference) / spread, freedom))
        half = float(stats.t.ppf(0.975, freedom)) * spread
    return Comparison(
        difference, difference - half, difference + half, p, "bootstrap", seeds, examples
    )


def compare(
    row: np.ndarray, baseline: np.ndarray, *, test: str, rng: np.random.Generator
) -> Comparison:
    """The comparison that a table prints.

    Args:
        row: [S, N] bool, right or wrong for each seed and test example.
        baseline: [S, N] bool, the same seeds and examples.
        test: `"bootstrap"`, `"mcnemar"` (one seed only) or `"auto"`: the bootstrap for several
            seeds, McNemar's test for one. The interval always comes from the bootstrap.
        rng: draws the resamples.

    Raises:
        ValueError: McNemar's test for several seeds, whose pairs are not independent.
    """
    found = paired_bootstrap(row, baseline, rng=rng)
    if test == "bootstrap" or (test == "auto" and found.seeds > 1):
        return found
    if found.seeds > 1:
        raise ValueError(f"McNemar's test compares two single runs, got {found.seeds} seeds")
    return dataclasses.replace(found, p=mcnemar(row[0], baseline[0]), test="mcnemar")


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment: compare the result with alpha itself.

    Args:
        p_values: [m], each 0 to 1, in any order.

    Returns:
        [m] adjusted p-values in the same order: the k-th smallest times m - k + 1, made monotone,
        at most 1. Rejecting those below alpha keeps the chance of any false rejection below alpha.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return adjusted


def _paired(row: np.ndarray, baseline: np.ndarray, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    row, baseline = np.asarray(row, dtype=bool), np.asarray(baseline, dtype=bool)
    if row.shape != baseline.shape or row.ndim != ndim or row.size == 0:
        raise ValueError(
            f"expected two arrays of one shape with {ndim} dimensions and at least one example, "
            f"got {row.shape} and {baseline.shape}"
        )
    return row, baseline
