"""Accuracy under attack, on a classifier whose robustness is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cnnlab import parallel
from cnnlab.evaluation import chunks, robustness
from cnnlab.types import CnnlabError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(60, 196, (300, 4, 4, 1)).astype(np.uint8)
WEIGHTS = RNG.normal(size=16)
OFFSET = float(-(IMAGES.reshape(300, -1) / 255 @ WEIGHTS).mean())
EPS = 0.05


def logits_of(variables, images):
    """Two classes by the sign of w x + b."""
    score = images.reshape(len(images), -1) @ variables + OFFSET
    return jnp.stack([jnp.zeros_like(score), score], -1)


def test_robust_are_those_further_than_eps_from_the_hyperplane():
    score = IMAGES.reshape(300, -1) / 255 @ WEIGHTS + OFFSET
    labels = (score > 0).astype(np.int32)
    labels[:20] = 1 - labels[:20]  # on which the model is wrong
    # No pixel can leave [0, 1] by eps, so the margin shrinks by eps times the weights' L1 norm.
    expected = (abs(score) > EPS * abs(WEIGHTS).sum()) & (np.arange(300) >= 20)
    found = robustness.attack(
        f"fgsm(eps={EPS})", logits_of, jnp.array(WEIGHTS, jnp.float32), IMAGES, labels
    )
    assert np.array_equal(found.clean, np.arange(300) >= 20)
    near = abs(abs(score) - EPS * abs(WEIGHTS).sum()) < 1e-4
    assert np.array_equal(found.robust[~near], expected[~near])
    assert 50 < found.robust.sum() < 250
    assert abs(found.images - IMAGES / 255).max() <= EPS + 1e-7


@pytest.mark.parametrize("devices", [3, 8])
def test_devices_share_each_batch(devices):
    mesh = parallel.make_mesh(devices)
    labels = (IMAGES.reshape(300, -1) / 255 @ WEIGHTS + OFFSET > 0).astype(np.int32)
    seen = []

    def spied(variables, images):
        jax.debug.inspect_array_sharding(images, callback=seen.append)
        return logits_of(variables, images)

    everywhere = parallel.replicated(mesh)
    split, alone = (
        robustness.attack(
            f"pgd(eps={EPS}, steps=3)", each, weights, IMAGES, labels, mesh=where, seed=1
        )
        for each, weights, where in (
            (spied, jax.device_put(jnp.array(WEIGHTS, jnp.float32), everywhere), mesh),
            (logits_of, jnp.array(WEIGHTS, jnp.float32), None),
        )
    )
    np.testing.assert_allclose(split.images, alone.images, atol=1e-6)
    np.testing.assert_array_equal(split.robust, alone.robust)
    assert seen
    assert {len(sharding.device_set) for sharding in seen} == {devices}
    assert not any(sharding.is_fully_replicated for sharding in seen)


def test_a_transferred_attack_is_made_for_the_source_and_judged_by_the_other():
    """By a source whose hyperplane is turned, so that its attack moves images otherwise."""
    turned = WEIGHTS * np.where(np.arange(16) % 4 == 0, -1, 1)
    own, other = (jnp.asarray(each, jnp.float32) for each in (WEIGHTS, turned))
    score = IMAGES.reshape(300, -1) / 255 @ WEIGHTS + OFFSET
    labels = (score > 0).astype(np.int32)
    text = f"fgsm(eps={EPS})"
    made = robustness.attack(text, logits_of, other, IMAGES, labels)
    found = robustness.attack(text, logits_of, own, IMAGES, labels, source=(logits_of, other))
    np.testing.assert_array_equal(found.images, made.images)
    judged = np.asarray(logits_of(own, found.images)).argmax(1) == labels
    np.testing.assert_array_equal(found.attacked, judged)
    assert found.clean.all()
    assert not made.clean.all()
    strongest = robustness.attack(text, logits_of, own, IMAGES, labels)
    assert strongest.robust.sum() < found.robust.sum() < 300


def test_a_transferred_ensemble_is_judged_by_the_other(monkeypatch):
    monkeypatch.setattr(robustness.autoattack, "run", ensemble)
    own, other = (jnp.asarray(each, jnp.float32) for each in (WEIGHTS, -WEIGHTS))
    labels = (IMAGES.reshape(300, -1) / 255 @ WEIGHTS + OFFSET > 0).astype(np.int32)
    found = robustness.attack(
        f"autoattack(eps={EPS})", logits_of, own, IMAGES, labels, source=(logits_of, other)
    )
    assert found.clean.all()
    judged = np.asarray(logits_of(own, found.images)).argmax(1) == labels
    np.testing.assert_array_equal(found.attacked, judged)


class KilledError(Exception):
    """Stands for a kill."""


def attacked(text, folder, labels, **changes):
    given = {"with_images": True, "about": {"identity": "a"}} | changes
    return robustness.attack(
        text, logits_of, jnp.array(WEIGHTS, jnp.float32), IMAGES, labels, folder=folder, **given
    )


@pytest.mark.parametrize("name", ["pgd", "autoattack"])
def test_after_a_kill_the_same_outcome_costs_the_missing_chunks_only(name, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "CHUNK", 64)
    text = f"pgd(eps={EPS}, steps=3)"
    if name == "autoattack":
        text = f"autoattack(eps={EPS})"
        monkeypatch.setattr(robustness.autoattack, "run", ensemble)
    labels = RNG.integers(0, 2, 300).astype(np.int32)
    whole = attacked(text, None, labels)
    written, seen = [], []
    original = chunks.record.write_atomic

    def die_at_the_third(path, content):
        if len(written) == 2:
            raise KilledError
        written.append(path)
        original(path, content)

    monkeypatch.setattr(chunks.record, "write_atomic", die_at_the_third)
    with pytest.raises(KilledError):
        attacked(text, tmp_path, labels)
    monkeypatch.setattr(chunks.record, "write_atomic", lambda *a: seen.append(a) or original(*a))
    resumed = attacked(text, tmp_path, labels)
    assert len(seen) == {"pgd": 5, "autoattack": 3}[name] - 2
    for one, other in zip(whole, resumed, strict=True):
        assert np.array_equal(one, other)
    # What the outcome depends on is no one else's chunk.
    for changes in ({"seed": 1}, {"about": {"identity": "b"}}, {"with_images": False}):
        seen.clear()
        attacked(text, tmp_path, labels, **changes)
        assert len(seen) == {"pgd": 5, "autoattack": 3}[name]


def ensemble(own, model, variables, pixels, labels, *, eps, version, chunk, sharding):
    """In place of AutoAttack, which takes long to compile: noise."""
    assert len(own) == len(pixels) <= 2 * chunk
    assert sharding is None
    noise = jax.vmap(lambda key: jax.random.uniform(key, IMAGES.shape[1:], minval=-1))(own)
    made = np.clip(pixels + eps * np.asarray(noise), 0, 1)
    right = [np.asarray(model(variables, x)).argmax(1) == labels for x in (pixels, made)]
    return robustness.autoattack.Result(made, right[0], right[0] & right[1], {}, {})


def test_strengths_share_one_compilation():
    traces = []

    def counted(variables, images):
        traces.append(images.shape)
        return logits_of(variables, images)

    labels = np.zeros(300, np.int32)
    variables = jnp.array(WEIGHTS, jnp.float32)
    found, counts = [], []
    for eps in (0.0, 0.01, EPS, 8 / 255):
        made = robustness.attack(f"bim(eps={eps}, steps=2)", counted, variables, IMAGES, labels)
        assert abs(made.images - IMAGES / 255).max() == pytest.approx(eps, abs=1e-6)
        found.append(made.robust.sum())
        counts.append(len(traces))
    assert len(set(counts)) == 1
    assert found[0] > found[1] > found[2]
    robustness.attack("bim(eps=0.01, steps=3)", counted, variables, IMAGES, labels)
    assert len(traces) == 2 * counts[0]


def test_some_examples_draw_what_they_drew_among_all():
    labels = np.zeros(300, np.int32)
    given = (f"fgsm_rs(eps={EPS})", logits_of, jnp.array(WEIGHTS, jnp.float32))
    rows = np.array([270, 3, 40])
    whole = robustness.attack(*given, IMAGES, labels)
    some = robustness.attack(*given, IMAGES[rows], labels[rows], positions=rows)
    np.testing.assert_allclose(some.images, whole.images[rows], atol=1e-6)
    other = robustness.attack(*given, IMAGES[rows], labels[rows])
    assert abs(other.images - some.images).max() > 0.01


def test_right_after_the_attack_is_told_of_wrong_examples_too():
    score = IMAGES.reshape(300, -1) / 255 @ WEIGHTS + OFFSET
    labels = (score < 0).astype(np.int32)  # the model is wrong everywhere, and the attack agrees
    found = robustness.attack(
        f"pgd(eps={EPS}, targeted=True)", logits_of, jnp.array(WEIGHTS, jnp.float32), IMAGES, labels
    )
    assert not found.clean.any()
    assert not found.robust.any()
    assert found.attacked.sum() > 50  # as it was told to reach the labels


@pytest.mark.parametrize("hits", [0, 3, 50, 100])
def test_the_interval_is_that_of_clopper_and_pearson(hits):
    low, high = robustness.interval(np.arange(100) < hits)
    # Its defining property: each end leaves a fortieth on its side.
    assert low == 0 if hits == 0 else stats.binom.sf(hits - 1, 100, low) == pytest.approx(0.025)
    assert high == 1 if hits == 100 else stats.binom.cdf(hits, 100, high) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd", "expected an attack with its strength"),
        ("pgd(0.1)", "expected an attack with its strength"),
        ("pgdd(eps=0.1)", "did you mean 'pgd'"),
        ("pgd(steps=3)", "needs eps"),
        ("pgd(eps=-1)", "eps: expected a number of at least 0"),
        ("pgd(eps=0.1, stepz=3)", "did you mean 'steps'"),
    ],
)
def test_an_attack_that_does_not_fit_is_explained(text, message):
    with pytest.raises(CnnlabError, match=message):
        robustness.parse(text)


def test_fractions_are_read():
    assert robustness.parse("pgd(eps=8/255, steps=3)") == ("pgd", {"eps": 8 / 255, "steps": 3})
