"""FGSM, PGD and the like against closed forms, a float64 computation and reference outcomes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from cnnlab import attacks, backend, keys
from cnnlab.types import CnnlabError

KEY = keys.key(0, "attack")
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}


def linear(classes, shape=(3, 3, 1), seed=0, scale=1.0):
    """A linear classifier and its weights [pixels, classes], float64."""
    weights = np.random.default_rng(seed).normal(size=(int(np.prod(shape)), classes)) * scale
    weights = weights.astype(np.float32)

    def logits_fn(images):
        return images.reshape(len(images), -1) @ weights

    return logits_fn, weights.astype(np.float64)


def grey(count, shape=(3, 3, 1), seed=1):
    """Images far from 0 and 1, where the box does not matter."""
    images = np.random.default_rng(seed).uniform(0.4, 0.6, (count, *shape))
    return jnp.array(images, jnp.float32)


def run(attack, logits_fn, images, labels):
    compiled = jax.jit(lambda k, x, y: attack(k, logits_fn, x, y), compiler_options=FAST_TO_COMPILE)
    return compiled(KEY, images, labels)


def flat(images):
    return np.asarray(images, np.float64).reshape(len(images), -1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", np.inf)])
def test_pgd_reaches_the_maximum_of_a_linear_margin(norm, dual):
    """The largest rise of w.x in a ball is eps times the dual norm of w."""
    logits_fn, weights = linear(2)
    images, eps = grey(4), 0.2
    labels = jnp.array([0, 1, 0, 1])
    attack = attacks.create("pgd", eps=eps, norm=norm, relative_step=10.0, loss="margin")
    made = run(attack, logits_fn, images, labels)
    slope = (weights[:, 1] - weights[:, 0])[None] * np.where(labels == 0, 1, -1)[:, None]
    rise = ((flat(made) - flat(images)) * slope).sum(1)
    np.testing.assert_allclose(rise, eps * np.linalg.norm(slope[0], dual), rtol=2e-3)


def test_fgsm_and_fgm_are_one_step_of_eps():
    logits_fn, weights = linear(3)
    images, labels = grey(3), jnp.array([0, 1, 2])
    odds = np.exp(flat(images) @ weights)
    gradient = (odds / odds.sum(1, keepdims=True) - np.eye(3)) @ weights.T
    for name, step in (
        ("fgsm", np.sign(gradient)),
        ("fgm", gradient / np.linalg.norm(gradient, axis=1, keepdims=True)),
    ):
        made = run(attacks.create(name, eps=0.1), logits_fn, images, labels)
        np.testing.assert_allclose(flat(made) - flat(images), 0.1 * step, atol=2e-6)


def test_momentum_is_that_of_dong_et_al():
    """Five steps of MI-FGSM, as the paper's equations 6 and 7 in float64; no box, no restart."""
    logits_fn, weights = linear(3, seed=3)
    images, labels = grey(2), np.array([0, 1])
    attack = attacks.create(
        "mim", eps=0.3, step_size=0.02, steps=5, momentum=0.9, norm="l2", best=False
    )
    made = run(attack, logits_fn, images, jnp.array(labels))
    x, velocity = flat(images), 0.0
    for _ in range(5):
        odds = np.exp(x @ weights)
        gradient = (odds / odds.sum(1, keepdims=True) - np.eye(3)[labels]) @ weights.T
        velocity = 0.9 * velocity + gradient / np.abs(gradient).sum(1, keepdims=True)
        x = x + 0.02 * velocity / np.linalg.norm(velocity, axis=1, keepdims=True)
    np.testing.assert_allclose(flat(made), x, atol=1e-5)


def test_a_targeted_attack_reaches_its_targets():
    """Each class has a pixel of its own, so any of them can be brought to the top."""

    def logits_fn(images):
        return images.reshape(len(images), -1)[:, :4]

    images = grey(8)
    targets = (logits_fn(images).argmax(-1) + 1 + jnp.arange(8) % 3) % 4
    for name in ("fgsm", "pgd"):
        made = run(attacks.create(name, eps=0.3, targeted=True), logits_fn, images, targets)
        assert np.array_equal(logits_fn(made).argmax(-1), targets)


def bumpy(images):
    """A loss with many maxima in the ball."""
    x = images.reshape(len(images), -1)
    wave = jnp.cos(40 * x).sum(1) + x.sum(1)
    return jnp.stack([wave, jnp.zeros_like(wave)], 1)


def test_more_restarts_are_never_worse_and_the_first_is_the_same():
    images, labels = grey(16), jnp.zeros(16, jnp.int32)
    make = functools.partial(attacks.create, "pgd", eps=0.15, steps=3, relative_step=0.3)
    one, four = (run(make(restarts=restarts), bumpy, images, labels) for restarts in (1, 4))
    few, many = (np.asarray(bumpy(made)[:, 0]) for made in (one, four))
    assert (many <= few + 1e-5).all()
    assert (many < few - 0.1).any()
    assert np.array_equal(np.asarray(one)[many == few], np.asarray(four)[many == few])


def test_gives_back_the_best_iterate_or_the_last():
    """A step that goes far beyond the loss's maximum, which is at 0.5."""
    images, labels = jnp.full((1, 1, 1, 1), 0.45), jnp.zeros(1, jnp.int32)

    def logits_fn(x):
        away = jnp.abs(x.reshape(1, 1) - 0.5)
        return jnp.concatenate([away, 0 * away - 1], 1)

    for best, expected in ((True, 0.45), (False, 0.75)):
        attack = attacks.create("fgsm", eps=0.3, best=best)
        made = run(attack, logits_fn, images, labels)
        np.testing.assert_allclose(made, expected, atol=1e-6)


def test_an_adversarial_iterate_is_better_than_one_of_higher_loss():
    """Two classes share what is left of the probability, until one takes it all."""
    images, labels = jnp.full((1, 1, 1, 1), 0.5), jnp.zeros(1, jnp.int32)

    def logits_fn(x):
        x = x.reshape(1, 1)
        shared = jnp.concatenate([0.6 - x, 0 * x, 0 * x], 1)
        return jnp.where(x < 0.6, shared, jnp.log(jnp.array([[0.45, 0.55, 1e-9]])))

    made = run(attacks.create("fgsm", eps=0.2), logits_fn, images, labels)
    np.testing.assert_allclose(made, 0.7, atol=1e-6)


@functools.cache
def compiled_pgd(norm, shape):
    logits_fn, weights = linear(3, shape)

    def attack(key, images, labels, eps):
        return attacks.create("pgd", eps=eps, norm=norm, steps=3)(key, logits_fn, images, labels)

    return weights, jax.jit(attack, compiler_options=FAST_TO_COMPILE)


@hypothesis.given(
    norm_and_shape=st.sampled_from(
        [("linf", (1, 1, 1)), ("linf", (5, 2, 3)), ("l2", (5, 2, 3)), ("l1", (3, 7, 1))]
    ),
    eps=st.floats(0, 8) | st.floats(1e-9, 1e-5) | st.just(8 / 255),
    seed=st.integers(0, 2**31 - 1),
    levels=st.sampled_from([1, 2, 255, 2**24]),
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_stays_in_the_ball_in_float64(norm_and_shape, eps, seed, levels):
    norm, shape = norm_and_shape
    images = np.random.default_rng(seed).integers(0, levels, (5, *shape), endpoint=True) / levels
    images = jnp.array(images, jnp.float32)
    weights, attack = compiled_pgd(norm, shape)
    labels = (flat(images) @ weights).argmax(-1)
    made = attack(keys.key(seed, "attack"), images, labels, eps)
    assert np.linalg.norm(flat(made) - flat(images), ORDERS[norm], axis=1).max() <= eps
    assert flat(made).min() >= 0
    assert flat(made).max() <= 1


def test_an_infinite_ball_is_the_whole_box():
    logits_fn, weights = linear(2)
    images, labels = grey(2), jnp.array([0, 1])
    corner = (weights[:, 1] - weights[:, 0])[None] * np.array([[1], [-1]]) > 0
    for norm in ("linf", "l1"):
        attack = attacks.create("pgd", eps=np.float32(np.inf), norm=norm, random_start=False)
        made = flat(run(attack, logits_fn, images, labels))
        if norm == "linf":
            np.testing.assert_array_equal(made, corner)
        assert np.isfinite(made).all()
        assert ((made @ weights).argmax(-1) != labels).all()


def test_errors_say_what_to_do():
    logits_fn, _ = linear(2)
    images, labels = grey(2), jnp.array([0, 1])
    for arguments, message in (
        ({"loss": "margins"}, "did you mean 'margin'"),
        ({"norm": "l3"}, "norm: expected one of linf, l2, l1"),
        ({"restarts": 2, "random_start": False}, "needs random_start=True"),
        ({"restarts": 2, "best": False}, "best=True"),
    ):
        with pytest.raises(CnnlabError, match=message):
            attacks.create("pgd", eps=0.1, **arguments)(KEY, logits_fn, images, labels)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("fgsm", {}), ("pgd", {"steps": 40, "step_size": 0.01, "random_start": False})],
)
def test_verdicts_are_those_of_the_reference(lenet, name, arguments):
    """One verdict of 256 may differ."""
    attack = attacks.create(name, eps=0.1, **arguments)

    def right(key, images, labels):
        made = attack(key, lenet.logits_fn, images, labels)
        return lenet.logits_fn(made).argmax(-1) == labels

    robust = backend.jit(right)(KEY, lenet.images, lenet.labels)
    assert (np.asarray(robust) != np.array(lenet.outcomes[name]["robust"], bool)).sum() <= 1
