"""Accuracy under attack, on a classifier whose robustness is known in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab.evaluation import robustness
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
