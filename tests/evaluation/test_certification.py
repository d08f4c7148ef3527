"""Randomised smoothing, on a linear classifier of which all probabilities are known."""

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from scipy import stats

from cnnlab import keys, parallel
from cnnlab.evaluation import certification, chunks
from cnnlab.evaluation.certification import ABSTAIN, Counts, Smoothing
from cnnlab.reporting import figures
from cnnlab.types import CnnlabError

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=12)
IMAGES = RNG.integers(0, 256, (160, 2, 3, 2)).astype(np.uint8)
OFFSET = -float((IMAGES.reshape(160, -1) / 255 @ WEIGHTS).mean())
SCORES = IMAGES.reshape(160, -1) / 255 @ WEIGHTS + OFFSET
DISTANCES = abs(SCORES) / np.linalg.norm(WEIGHTS)
KEY = keys.key(0, "certification")


class KilledError(Exception):
    pass


def logits_of(variables, images):
    """Two classes by the sign of w x + b."""
    score = images.reshape(len(images), -1) @ variables["weights"] + variables["offset"]
    return jnp.stack([-score, score], -1)


VARIABLES = {"weights": jnp.array(WEIGHTS, jnp.float32), "offset": jnp.float32(OFFSET)}


def count(images, smoothing, **settings):
    return certification.count(KEY, logits_of, VARIABLES, images, smoothing, **settings)


@pytest.mark.parametrize("samples", [1, 17, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_bound_is_clopper_pearsons(samples, alpha):
    hits = np.unique(np.linspace(0, samples, 30).astype(int))
    want = [
        stats.binomtest(int(k), samples, alternative="greater").proportion_ci(1 - alpha).low
        for k in hits
    ]
    got = certification.lower_bound(hits, samples, alpha)
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_the_bound_is_too_high_with_a_probability_of_at_most_alpha_and_of_no_less():
    samples, alpha = 40, 0.05
    hits = np.arange(samples + 1)
    bounds = certification.lower_bound(hits, samples, alpha)

    def missed(probability):
        return stats.binom.pmf(hits, samples, probability) @ (bounds > probability)

    assert max(missed(p) for p in np.linspace(0, 1, 997)) <= alpha
    # Just below a bound it is alpha exactly: no greater bound would do.
    for bound in bounds[1:]:
        assert missed(bound - 1e-12) == pytest.approx(alpha, rel=1e-6)


def test_with_the_exact_probability_the_radius_is_the_distance_to_the_hyperplane():
    for sigma in (0.1, 1.0):
        probability = stats.norm.cdf(DISTANCES / sigma)
        below_one = probability < 1 - 1e-12
        got = certification.radius(sigma, probability)
        np.testing.assert_allclose(got[below_one], DISTANCES[below_one], rtol=1e-4)
    assert certification.radius(0.5, np.array(0.5)) == 0


def test_sampled_radii_exceed_the_distance_as_often_as_alpha_says():
    smoothing = Smoothing(sigma=0.5, select=20, samples=2000, alpha=0.05)
    found = count(np.concatenate([IMAGES] * 3), smoothing)  # each draws noise of its own
    classes, radii = certification.certify(found, smoothing)
    distances, truth = np.tile(DISTANCES, 3), np.tile(SCORES > 0, 3)
    certain = classes != ABSTAIN
    wrong = certain & ((classes != truth) | (radii > distances))
    # The bound is met exactly only at some probabilities, and is safe at all others.
    possible = distances < smoothing.largest_radius
    assert stats.binomtest(wrong.sum(), len(wrong), 0.05, alternative="greater").pvalue > 1e-3
    assert stats.binomtest(wrong.sum(), possible.sum(), 0.04, alternative="less").pvalue > 1e-3
    assert (radii[~certain] == 0).all()
    assert radii.max() <= smoothing.largest_radius


@pytest.mark.parametrize("samples", [400, 10000])
def test_sampled_radii_approach_the_distance(samples):
    smoothing = Smoothing(sigma=0.5, select=100, samples=samples, alpha=0.02)
    chosen = (DISTANCES > 0.3) & (DISTANCES < 0.7)
    radii = certification.certify(count(IMAGES[chosen], smoothing), smoothing).radii
    z = DISTANCES[chosen] / 0.5
    probability = stats.norm.cdf(z)
    deviation = 0.5 * np.sqrt(probability * (1 - probability) / samples) / stats.norm.pdf(z)
    # A quantile of the bound's normal approximation, moved by what its skewness is worth.
    gap = (DISTANCES[chosen] - radii).mean()
    assert gap == pytest.approx(stats.norm.isf(0.02) * deviation.mean(), rel=0.3)


def test_abstentions_are_as_frequent_as_the_binomial_distribution_says():
    smoothing = Smoothing(sigma=1.0, select=11, samples=150, alpha=0.05)
    place = int(np.argmin(abs(stats.norm.cdf(DISTANCES) - 0.58)))
    found = count(np.repeat(IMAGES[[place]], 2000, 0), smoothing)
    hit = float(stats.norm.cdf(DISTANCES[place]))
    label = int(SCORES[place] > 0)

    hits = np.arange(151)
    chance = stats.binom.pmf(hits, 150, hit)
    silent = np.array(
        [stats.binomtest(int(k), 150, alternative="greater").pvalue > 0.05 for k in hits]
    )
    selected = stats.binom.sf(5, 11, hit)  # most of 11
    abstained = selected * (chance @ silent) + (1 - selected) * (chance @ silent[::-1])
    assert 0.2 < abstained < 0.8
    classes = certification.certify(found, smoothing).classes
    assert stats.binomtest(int((classes == ABSTAIN).sum()), 2000, abstained).pvalue > 0.01
    named = selected * (chance @ ~silent)
    assert stats.binomtest(int((classes == label).sum()), 2000, named).pvalue > 0.01

    untold = chance @ [stats.binomtest(int(k), 150).pvalue > 0.05 for k in hits]
    voted = certification.predict(found.estimation, alpha=0.05)
    assert stats.binomtest(int((voted == ABSTAIN).sum()), 2000, untold).pvalue > 0.01


def test_predict_is_the_binomial_test_of_the_two_most_frequent_classes():
    votes = np.array([[3, first, second] for first in range(3, 40) for second in range(3, first)])
    votes = np.concatenate([votes, votes[:, ::-1], [[0, 9, 9], [0, 0, 1], [0, 30, 0]]])
    for alpha in (0.05, 0.001):
        want = []
        for row in votes:
            second, first = np.sort(row)[1:]
            told = stats.binomtest(int(first), int(first + second)).pvalue <= alpha
            want.append(row.argmax() if told else ABSTAIN)
        assert certification.predict(votes, alpha=alpha).tolist() == want
        assert 0 < want.count(ABSTAIN) < len(want)


def test_certify_takes_the_class_from_some_draws_and_its_probability_from_others():
    selection = np.array([[5, 1, 4], [1, 5, 4], [0, 9, 1]])
    estimation = np.array([[0, 100, 0], [0, 100, 0], [0, 40, 60]])
    smoothing = Smoothing(sigma=0.25, select=10, samples=100, alpha=0.001)
    found = certification.certify(Counts(selection, estimation, np.zeros(3)), smoothing)
    assert found.classes.tolist() == [ABSTAIN, 1, ABSTAIN]
    # All draws agree: alpha to the 1/n is the bound.
    want = [0, 0.25 * stats.norm.ppf(0.001**0.01), 0]
    np.testing.assert_allclose(found.radii, want, rtol=1e-9)


def test_counts_are_those_of_each_draw_by_itself_and_noise_is_not_clipped():
    smoothing = Smoothing(sigma=0.8, select=7, samples=12, alpha=0.01)
    found = count(IMAGES[:5], smoothing)
    for i in range(5):
        for want, draws in ((found.selection[i], range(7)), (found.estimation[i], range(7, 19))):
            each = [jax.random.fold_in(jax.random.fold_in(KEY, i), j) for j in draws]
            noise = np.array([jax.random.normal(k, (2, 3, 2)) for k in each], np.float64)
            noisy = IMAGES[i] / 255 + 0.8 * noise
            positive = (noisy.reshape(len(noisy), -1) @ WEIGHTS + OFFSET > 0).sum()
            assert want.tolist() == [len(noisy) - positive, positive]


def test_counts_depend_neither_on_batches_nor_on_devices_nor_on_the_other_examples():
    smoothing = Smoothing(sigma=0.5, select=10, samples=50)
    want = count(IMAGES[:11], smoothing)
    assert (want.selection.sum(1) == 10).all()
    assert (want.estimation.sum(1) == 50).all()
    assert len(np.unique(want.estimation[:, 0])) > 3
    for images, settings in (
        (IMAGES[:11], {"batch_size": 3}),
        (IMAGES[:3], {"batch_size": 64, "mesh": parallel.make_mesh(8)}),
    ):
        found = count(images, smoothing, **settings)
        assert np.array_equal(found.selection, want.selection[: len(images)])
        assert np.array_equal(found.estimation, want.estimation[: len(images)])


def test_all_batches_of_all_noises_share_one_compilation():
    traces = []

    def traced(variables, images):
        traces.append(images.shape)
        return logits_of(variables, images)

    for sigma in (0.25, 0.5):
        smoothing = Smoothing(sigma=sigma, select=10, samples=50)
        mesh = parallel.make_mesh(8)
        certification.count(KEY, traced, VARIABLES, IMAGES[:20], smoothing, mesh=mesh)
    assert len([shape for shape in traces if shape[0] > 1]) == 1


def test_a_killed_count_goes_on_with_the_next_chunk(tmp_path, monkeypatch):
    smoothing, images = Smoothing(sigma=0.5, select=10, samples=50), IMAGES[:20]
    want = count(images, smoothing)
    starts, killed_at = [], 2
    collect = chunks.collect

    def watched(compute, *arguments, **settings):
        def counted(positions):
            starts.append(int(positions[0]))
            if len(starts) == killed_at:
                raise KilledError
            return compute(positions)

        return collect(counted, *arguments, **settings)

    monkeypatch.setattr(chunks, "collect", watched)
    about = {"identity": "a"}
    with pytest.raises(KilledError):
        count(images, smoothing, folder=tmp_path, about=about)
    killed_at = None
    found = count(images, smoothing, folder=tmp_path, about=about)
    assert starts == [0, 8, 8, 16]
    assert np.array_equal(found.selection, want.selection)
    assert np.array_equal(found.estimation, want.estimation)
    assert (found.seconds > 0).all()

    # Kept counts are of this network, these images, this noise and these draws.
    starts.clear()
    count(images, smoothing, folder=tmp_path, about=about)
    assert starts == []
    count(images, Smoothing(sigma=0.25, select=10, samples=50), folder=tmp_path, about=about)
    count(images[::-1], smoothing, folder=tmp_path, about=about)
    count(images, smoothing, folder=tmp_path, about={"identity": "b"})
    other = {**VARIABLES, "offset": jnp.float32(0)}
    certification.count(KEY, logits_of, other, images, smoothing, folder=tmp_path, about=about)
    assert starts == 4 * [0, 8, 16]


def test_a_summary_counts_abstentions_as_wrong():
    selection = np.array([[9, 0, 1], [9, 0, 1], [9, 1, 0], [0, 0, 9]])
    estimation = np.array([[99, 1, 0], [99, 0, 1], [52, 40, 8], [0, 0, 100]])
    smoothing = Smoothing(sigma=0.5, select=10, samples=100)
    counts = Counts(selection, estimation, np.full(4, 0.5))
    found = certification.summary(counts, np.array([0, 1, 0, 2]), smoothing)
    low, high = (0.5 * stats.norm.ppf(stats.beta.ppf(0.001, k, 101 - k)) for k in (99, 100))
    assert found["classes"] == [0, 0, None, 2]
    assert found["right"] == [True, False, False, True]
    assert found["radii"] == pytest.approx([low, low, 0, high])
    assert found["abstained"] == found["top1_abstained"] == 0.25
    assert found["top1"] == 0.5
    assert found["average_radius"] == pytest.approx((low + high) / 4)
    assert found["seconds"] == 2


RADII, RIGHT = np.array([0.3, 0.1, 0.0, 0.3, 0.7]), np.array([True, True, False, True, False])


def test_accuracy_falls_right_after_each_radius():
    at = np.array([0, 0.1, 0.1 + 1e-9, 0.3, 0.3 + 1e-9])
    accuracy = certification.certified_accuracy(RADII, RIGHT, at)
    np.testing.assert_array_equal(accuracy, [0.6, 0.6, 0.4, 0.4, 0])
    assert certification.average_radius(RADII, RIGHT) == pytest.approx(0.7 / 5)


def test_the_curve_is_drawn_exactly(tmp_path, monkeypatch):
    kept = []
    original = matplotlib.figure.Figure.savefig

    def savefig(self, *arguments, **settings):
        kept.append(self)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    monkeypatch.setattr(figures, "DPI", 40)
    never = np.zeros(5, bool)
    figures.certified_accuracy({"a": (RADII, RIGHT), "b": (RADII, never)}, tmp_path / "c.png")
    line, nothing = kept[0].axes[0].lines
    x, y = line.get_data()
    # matplotlib's "pre": a value holds from the point before to its own point.
    assert line.get_drawstyle() == "steps-pre"
    at = np.array([0, 0.05, 0.1, 0.2, 0.3])
    drawn = [y[np.searchsorted(x, r)] for r in at]
    np.testing.assert_allclose(drawn, 100 * certification.certified_accuracy(RADII, RIGHT, at))
    assert (x[-1], y[-1]) == (0.3, 0)
    assert not np.any(nothing.get_ydata())
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma": 0.0}, "sigma: expected a finite number above 0, got 0.0"),
        ({"sigma": float("nan")}, "sigma: expected"),
        ({"sigma": 0.1, "select": 0}, "select: expected"),
        ({"sigma": 0.1, "samples": -3}, "samples: expected"),
        ({"sigma": 0.1, "alpha": 1.0}, "alpha: expected a finite number between 0 and 1"),
        ({"sigma": 0.1, "samples": 9}, "samples: expected at least 10, with which alpha=0.001"),
    ],
)
def test_what_can_certify_nothing_is_refused(given, message):
    with pytest.raises(CnnlabError, match=message):
        Smoothing(**given)


def test_the_fewest_samples_that_are_asked_for_suffice():
    smoothing = Smoothing(sigma=0.1, samples=10)
    assert smoothing.largest_radius > 0
    assert smoothing.radii == (0,)
    assert Smoothing(sigma=0.2).radii == pytest.approx((0, 0.1, 0.2, 0.3, 0.4))
