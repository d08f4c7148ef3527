"""The checklist, on models each of which is made to fail one check, and on one that fails none."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab.evaluation import checklist, robustness
from cnnlab.types import CnnlabError

RNG = np.random.default_rng(0)
N, EPS = 128, 0.05
IMAGES = RNG.integers(40, 216, (N, 4, 4, 1)).astype(np.uint8)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
WEIGHTS -= WEIGHTS.mean(0)  # or one class has all images
VARIABLES = jnp.asarray(WEIGHTS)


def linear(variables, images):
    return (images - 0.5).reshape(len(images), -1) @ variables * 4


LABELS = np.asarray(linear(VARIABLES, IMAGES / np.float32(255))).argmax(1).astype(np.int32)


def stairs(variables, images):
    """The same classes but for ties, and no gradient at all."""
    return jnp.round(linear(variables, images) * 64) / 64


def probabilities(variables, images):
    return jax.nn.softmax(linear(variables, images))


def names(findings):
    return [finding.name for finding in findings]


def test_an_honest_model_fails_no_check():
    found = checklist.full(linear, VARIABLES, IMAGES, LABELS, eps=EPS)
    assert found == []


def test_masked_gradients_are_found_by_all_that_they_show():
    found = checklist.full(stairs, VARIABLES, IMAGES, LABELS, eps=EPS)
    assert names(found) == ["zero-gradients", "square-stronger", "unbounded"]
    assert {finding.severity for finding in found} == {"overestimate"}
    zero, square, unbounded = (finding.figures for finding in found)
    assert zero["without_gradient"] == 1
    assert square["other"] < square["pgd"] - 0.05
    assert unbounded["robust"] > 0.05


def test_probabilities_are_found_and_log_probabilities_are_not():
    assert names(checklist.outputs(probabilities, VARIABLES, IMAGES, LABELS)) == ["probabilities"]

    def logs(variables, images):
        return jax.nn.log_softmax(linear(variables, images))

    assert checklist.outputs(logs, VARIABLES, IMAGES, LABELS) == []


def test_randomness_is_found_however_it_comes():
    seeds = itertools.count()

    def other_program(variables, images):  # draws at each compilation
        noise = jax.random.normal(jax.random.key(next(seeds)), (len(images), 3))
        return linear(variables, images) + 0.1 * noise

    def own_statistics(variables, images):  # as batch norm in training mode
        return linear(variables, images - images.mean(0, keepdims=True))

    def other_call(variables, images):
        drawn = jax.pure_callback(
            lambda: np.float32(RNG.normal()), jax.ShapeDtypeStruct((), np.float32)
        )
        return linear(variables, images) + jax.lax.stop_gradient(drawn)

    for model in (other_program, own_statistics, other_call):
        found = checklist.outputs(model, VARIABLES, IMAGES, LABELS)
        assert names(found) == ["random-outputs"]
        assert found[0].figures["difference"] > 1e-2
        assert found[0].severity == "invalid"


def test_a_few_dead_gradients_are_no_finding():
    def partly(share):
        count = round(share * N)

        def model(variables, images):
            alive = linear(variables, images)
            dead = images.shape[0] * jnp.linspace(0, 1, images.shape[0])[:, None] < count
            return jnp.where(dead, jax.lax.stop_gradient(alive), alive)

        return checklist.outputs(model, VARIABLES, IMAGES, LABELS)

    assert names(partly(0.03)) == []
    assert names(partly(0.1)) == ["zero-gradients"]


def outcome(robust):
    robust = np.arange(N) < robust
    return robustness.Outcome(None, np.ones(N, bool), robust, robust)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({}, []),
        # 6 to 0 has the chance 1 / 64, 7 to 0 has 1 / 128.
        ({("square", EPS, 1000): 54}, []),
        ({("square", EPS, 1000): 53}, ["square-stronger"]),
        ({("pgd", EPS, 10): 54}, []),
        ({("pgd", EPS, 10): 53}, ["steps-weaker"]),
        # Where 1 in 100 may be left, 4 of 128 or more are with chance 0.041, 6 with 0.002.
        ({("pgd", 1.0, 40): 4}, []),
        ({("pgd", 1.0, 40): 6}, ["unbounded"]),
        # Five neighbours: a hundredth is shared by them, 8 to 0 has the chance 1 / 256.
        ({("pgd", 2 * EPS, 40): 68}, []),
        ({("pgd", 2 * EPS, 40): 69}, ["not-monotone"]),
        ({("pgd", EPS / 4, 40): 30}, ["not-monotone"]),
    ],
)
def test_comparisons_allow_for_chance(monkeypatch, outcomes, expected):
    usual = {("pgd", EPS / 4, 40): 110, ("pgd", EPS / 2, 40): 90, ("pgd", EPS, 40): 60}
    usual |= {("pgd", 2 * EPS, 40): 20, ("pgd", 1.0, 40): 0}
    usual |= {("pgd", EPS, 10): 62, ("square", EPS, 1000): 70}

    def attack(text, *_, **__):
        name, given = robustness.parse(text)
        return outcome((usual | outcomes)[name, given["eps"], given["steps"]])

    monkeypatch.setattr(robustness, "attack", attack)
    assert names(checklist.full(linear, VARIABLES, IMAGES, LABELS, eps=EPS)) == expected


def test_an_attack_that_helps_is_found():
    clean = np.arange(N) < 100
    assert checklist.above_clean(clean, np.arange(N) < 106) == []
    assert checklist.above_clean(clean, np.arange(N) < 20) == []
    (found,) = checklist.above_clean(clean, np.arange(N) < 107)
    assert found.figures["p"] == pytest.approx(2.0**-7)


def test_what_is_allowed_passes_and_the_rest_is_told():
    found = checklist.outputs(stairs, VARIABLES, IMAGES, LABELS)
    checklist.require(found, ("zero-gradients",), "give allow=")
    with pytest.raises(checklist.UntrustworthyError, match=r"no gradient.*100\.0 %.*give allow="):
        checklist.require(found, ("probabilities",), "give allow=")
    checklist.check_names(tuple(checklist.CHECKS))
    with pytest.raises(CnnlabError, match=re.escape("did you mean 'zero-gradients'")):
        checklist.check_names(("zero-gradient",))
    with pytest.raises(CnnlabError, match="eps above 0"):
        checklist.full(linear, VARIABLES, IMAGES, LABELS, eps=0.0)
