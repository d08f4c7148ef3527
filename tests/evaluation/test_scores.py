"""Scores against scikit-learn and closed forms."""

import numpy as np
import pytest

from cnnlab.evaluation import scores

metrics = pytest.importorskip(
    "sklearn.metrics", reason="scikit-learn is in the extra: pip install 'cnnlab[dev]'"
)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 503)
    logits = rng.normal(size=(503, 7)).astype(np.float32) * 2
    logits[np.arange(503), labels] += 1
    return logits, labels


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_all_scores_equal_scikit_learns(case):
    logits, labels = case
    ours = scores.classification(logits, labels, bins=15)
    predicted = logits.argmax(1)
    assert ours["top1"] == metrics.accuracy_score(labels, predicted)
    assert ours["top5"] == metrics.top_k_accuracy_score(labels, logits, k=5)
    assert ours["nll"] == pytest.approx(metrics.log_loss(labels, softmax(logits)), abs=1e-9)
    expected = metrics.precision_recall_fscore_support(labels, predicted)
    for name, values in zip(("precision", "recall", "f1"), expected, strict=False):
        assert ours["per_class"][name] == pytest.approx(values, abs=1e-12)
        assert ours[f"{name}_macro"] == pytest.approx(values.mean(), abs=1e-12)
    assert ours["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()


def test_calibration_error_follows_its_definition(case):
    logits, labels = case
    p = softmax(logits)
    confidence, right = p.max(1), logits.argmax(1) == labels
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert scores.calibration_error(logits, labels, 15) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_certain_predictions_is_the_error():
    logits = np.array([[100.0, 0.0]] * 4)
    assert scores.calibration_error(logits, np.array([0, 0, 0, 1]), 10) == pytest.approx(0.25)


def test_a_class_that_never_occurs_scores_zero_without_a_warning():
    logits = np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    ours = scores.classification(logits, np.array([0, 1]), bins=5)
    assert ours["per_class"]["precision"] == [0.5, 0.0, 0.0]
    assert ours["per_class"]["recall"] == [1.0, 0.0, 0.0]


def test_ties_are_broken_as_argmax_does():
    logits = np.zeros((7, 7))
    assert scores.summary(logits, np.arange(7))["top1"] == pytest.approx(1 / 7)
    assert scores.summary(logits, np.arange(7))["top5"] == pytest.approx(5 / 7)


def test_fewer_than_five_classes_have_a_top5_of_one():
    assert scores.summary(np.zeros((3, 4)), np.array([1, 2, 3]))["top5"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23, 64])
def test_padding_of_the_last_batch_is_dropped(batch_size):
    table = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    positions = np.random.default_rng(2).permutation(40)[:23].astype(np.int32)
    calls = []

    def logits_fn(taken):
        calls.append(len(taken))
        return table[taken]

    assert np.array_equal(scores.predict(logits_fn, iter, positions, batch_size), table[positions])
    assert set(calls) == {batch_size}
