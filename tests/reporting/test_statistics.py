"""Statistics against closed forms, published numbers, scipy, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cnnlab.reporting import statistics


def _rng():
    return np.random.default_rng(0)


def test_summarise_is_the_sample_standard_deviation():
    found = statistics.summarise([2.0, 4.0, 9.0])
    assert found.mean == pytest.approx(5)
    assert found.std == pytest.approx(math.sqrt(13))  # (9 + 1 + 16) / 2
    assert found.n == 3
    assert statistics.summarise([0.5]) == statistics.Summary(0.5, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        statistics.summarise([])


def _pairs(both: int, row: int, baseline: int, neither: int):
    """Correctness vectors with these counts of the 2 x 2 table."""
    kinds = [(1, 1)] * both + [(1, 0)] * row + [(0, 1)] * baseline + [(0, 0)] * neither
    pairs = np.random.default_rng(0).permutation(np.array(kinds, dtype=bool))
    return pairs[:, 0], pairs[:, 1]


def test_mcnemar_closed_forms():
    # 11 against 1: twice the binomial tail, 2 (1 + 12) / 2**12.
    assert statistics.mcnemar(*_pairs(70, 11, 1, 18)) == pytest.approx(26 / 4096)
    assert statistics.mcnemar(*_pairs(70, 1, 11, 18)) == pytest.approx(26 / 4096)
    assert statistics.mcnemar(*_pairs(5, 0, 0, 5)) == 1
    assert statistics.mcnemar(*_pairs(5, 3, 3, 5)) == 1


def test_mcnemar_agrees_with_the_published_score_test():
    # Agresti 2002, "Categorical data analysis", table 10.1 (approval of the prime minister, 794,
    # 150, 86, 570): z**2 = 17.36. The exact p is that of the score test up to discreteness.
    exact = statistics.mcnemar(*_pairs(794, 150, 86, 570))
    assert exact == pytest.approx(stats.chi2.sf(17.36, 1), rel=0.25)


def test_holm_against_the_definition():
    # m = 4: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1 lifted to the one before.
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1, 1])
    assert statistics.holm([]).shape == (0,)
    p = np.random.default_rng(1).random(9) ** 3
    rejected = []
    for k, i in enumerate(np.argsort(p)):  # Holm 1979: step down until the first that holds
        if p[i] > 0.05 / (9 - k):
            break
        rejected.append(i)
    assert rejected
    assert set(np.flatnonzero(statistics.holm(p) <= 0.05)) == set(rejected)


def test_one_seed_has_the_standard_error_of_a_paired_difference():
    row, baseline = _pairs(800, 70, 40, 90)
    found = statistics.paired_bootstrap(row[None], baseline[None], rng=_rng())
    difference = row.astype(float) - baseline
    error = difference.std() / math.sqrt(1000)
    assert found.difference == pytest.approx(0.03)
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 999) * error, rel=0.03)
    ours = stats.bootstrap((difference,), np.mean, n_resamples=2000, method="percentile",
                           rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((ours.low, ours.high), abs=0.002)
    assert found.p == pytest.approx(statistics.mcnemar(row, baseline), rel=0.4)


def test_where_only_seeds_differ_it_is_the_t_test_on_seeds():
    outcomes = np.array([1, 1, 0, 1])
    row = np.repeat(outcomes[:, None] == 1, 50, axis=1)
    found = statistics.paired_bootstrap(row, np.zeros_like(row), rng=_rng())
    expected = stats.ttest_1samp(outcomes, 0)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=0.05)
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.05)


def test_the_variance_is_that_of_the_crossed_bootstrap():
    rng = np.random.default_rng(3)
    d = rng.integers(-1, 2, (4, 60)).astype(float)
    found = statistics.paired_bootstrap(d > 0, d < 0, rng=_rng(), resamples=40_000)
    # Limit over many resamples: seeds (rescaled) + examples + their interaction, each from the
    # multinomial's moments.
    mean, of_seed, of_example = d.mean(), d.mean(axis=1), d.mean(axis=0)
    rest = d - of_seed[:, None] - of_example + mean
    seeds = of_seed.var(ddof=1) / 4
    examples = of_example.var() / 60 + (rest**2).sum() / (4 * 60) / (3 * 60)
    freedom = (seeds + examples) ** 2 / (seeds**2 / 3 + examples**2 / 59)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(seeds + examples)
    assert found.high - found.difference == pytest.approx(half, rel=0.02)


def test_identical_predictions_and_determinism():
    row, baseline = (x[None] for x in _pairs(50, 5, 2, 43))
    same = statistics.paired_bootstrap(row, row, rng=_rng())
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    again = [statistics.paired_bootstrap(row, baseline, rng=_rng()) for _ in range(2)]
    assert again[0] == again[1]
    swapped = statistics.paired_bootstrap(baseline, row, rng=_rng())
    assert swapped.difference == pytest.approx(-again[0].difference)
    assert swapped.p == pytest.approx(again[0].p, rel=0.05)


def _simulated(rng, seeds: int, spread: float, shift: float = 0.0):
    """Two methods whose logit margins share the difficulty of the examples."""
    difficulty = rng.normal(1.5, 1, 1000)

    def correct(mean):
        own = rng.normal(0, 0.35, (seeds, 1000)) + rng.normal(0, spread, (seeds, 1))
        return difficulty + rng.normal(0, 0.1, 1000) + own + mean > 0

    return correct(shift), correct(0.0)


@pytest.mark.parametrize(("spread", "low"), [(0.0, 0.0), (0.4, 0.015)])
def test_type_one_error_with_three_seeds(spread, low):
    """Seeds that do not matter (then it is conservative), and seeds that dominate."""
    rng = np.random.default_rng(5)
    p = [
        statistics.paired_bootstrap(*_simulated(rng, 3, spread), rng=rng, resamples=300).p
        for _ in range(300)
    ]
    # Binomial standard deviation of the rate at 0.05: 0.013.
    assert low <= np.mean(np.array(p) < 0.05) <= 0.09


def test_power():
    rng = np.random.default_rng(6)
    p = [
        statistics.paired_bootstrap(*_simulated(rng, 5, 0.02, 0.3), rng=rng, resamples=300).p
        for _ in range(40)
    ]
    assert np.mean(np.array(p) < 0.05) > 0.9


def test_compare_chooses_by_the_number_of_seeds():
    row, baseline = (np.stack([x, x[::-1]]) for x in _pairs(50, 9, 2, 39))
    assert statistics.compare(row, baseline, test="auto", rng=_rng()).test == "bootstrap"
    single = statistics.compare(row[:1], baseline[:1], test="auto", rng=_rng())
    assert single.test == "mcnemar"
    assert single.p == statistics.mcnemar(row[0], baseline[0])
    forced = statistics.compare(row[:1], baseline[:1], test="bootstrap", rng=_rng())
    assert forced.test == "bootstrap"
    with pytest.raises(ValueError, match="two single runs"):
        statistics.compare(row, baseline, test="mcnemar", rng=_rng())
    with pytest.raises(ValueError, match="one shape"):
        statistics.paired_bootstrap(row, baseline[:, 1:], rng=_rng())
