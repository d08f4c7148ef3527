"""Mixers: what is mixed, by how much, and the labels that go with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cnnlab import augment, keys
from cnnlab.tasks import classification
from cnnlab.types import Batch, CnnlabError

K = 64


def batch(count=K, size=8):
    """Image i is i + 1 everywhere, in 1 / 128, and of class i: a mixture tells what it is of."""
    images = jnp.broadcast_to(
        (jnp.arange(count) + 1.0)[:, None, None, None] / 128, (count, size, size, 1)
    )
    return Batch(images, jnp.eye(count), jnp.ones(count))


@pytest.mark.parametrize("name", ["mixup", "cutmix", "mixup_cutmix"])
@pytest.mark.parametrize("per_example", [False, True])
def test_labels_say_what_share_of_each_image_is_there(name, per_example):
    made = augment.compose((f"{name}(per_example={per_example})",))(keys.key(0, "m"), batch())
    labels, images = np.asarray(made.labels, np.float64), np.asarray(made.images, np.float64)
    assert np.allclose(labels.sum(1), 1, atol=1e-6)
    # The mean grey is the labels' mean of the classes' greys.
    assert np.allclose(images.mean((1, 2, 3)) * 128, labels @ (np.arange(K) + 1), atol=1e-3)
    own = np.diag(labels)
    assert (len(np.unique(own.round(5))) > 3) == per_example or name == "cutmix"
    assert ((labels > 0).sum(1) <= 2).all()


def test_cutmix_pastes_one_box_of_the_partner():
    made = augment.compose(("cutmix(per_example=True)",))(keys.key(3, "m"), batch(size=10))
    for i, image in enumerate(np.asarray(made.images)[..., 0]):
        other = ~np.isclose(image, (i + 1) / 128)
        rows, columns = other.any(1), other.any(0)
        assert other.sum() == rows.sum() * columns.sum()  # a filled rectangle
        assert np.isclose(made.labels[i, i], 1 - other.mean(), atol=1e-6) or not other.any()


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_draws_its_share_from_the_beta_distribution(alpha):
    many = batch(count=K)
    transform = jax.jit(augment.compose((f"mixup(alpha={alpha}, per_example=True)",)))
    own = []
    for step in range(40):
        made = transform(keys.key(0, "m", step), many)
        labels = np.asarray(made.labels, np.float64)
        mixed = (labels > 0).sum(1) == 2  # one that is mixed with itself tells nothing
        own += list(np.diag(labels)[mixed])
    # Rounding to 1 hides the partner where a share is nearly 0 or 1: compare what lies between.
    inside = np.array([x for x in own if 1e-3 < x < 1 - 1e-3])
    low, high = stats.beta.cdf([1e-3, 1 - 1e-3], alpha, alpha)
    law = lambda x: (stats.beta.cdf(x, alpha, alpha) - low) / (high - low)  # noqa: E731
    assert stats.kstest(inside, law).pvalue > 0.01


def test_the_switch_chooses_cutmix_so_often():
    transform = jax.jit(augment.compose(("mixup_cutmix(switch=0.25, per_example=True)",)))
    pasted = blended = 0
    for step in range(20):
        made = np.asarray(transform(keys.key(1, "m", step), batch()).images)[..., 0]
        kinds = [len(np.unique(image)) for image in made]
        own = np.isclose(made[:, 0, 0] * 128, np.arange(K) + 1) & (np.array(kinds) == 1)
        pasted += sum(kind == 2 for kind in kinds)
        blended += int((~own).sum()) - sum(kind == 2 for kind in kinds)
    # A box may cover all of an image or nothing of it, so some of CutMix are not seen.
    assert 0.17 < pasted / (pasted + blended) < 0.27


def test_class_numbers_and_masks_are_refused():
    plain = Batch(jnp.zeros((4, 2, 2, 1)), jnp.zeros(4, jnp.int32), jnp.ones(4))
    with pytest.raises(CnnlabError, match=r"expected labels \[B, K\] as probabilities"):
        augment.compose(("mixup",))(keys.key(0, "m"), plain)
    masked = Batch(
        jnp.zeros((4, 2, 2, 1)), jnp.eye(4), jnp.ones(4), masks=jnp.zeros((4, 2, 2), jnp.int32)
    )
    with pytest.raises(CnnlabError, match="masks or boxes"):
        augment.compose(("cutmix",))(keys.key(0, "m"), masked)


def test_consistency_is_the_jensen_shannon_divergence():
    logits = np.random.default_rng(0).standard_normal((3, 5, 4)) * 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    middle = p.mean(0)
    expected = np.mean([[stats.entropy(p[v, i], middle[i]) for i in range(5)] for v in range(3)], 0)
    assert np.allclose(classification.consistency(jnp.array(logits)), expected, rtol=1e-5)
    assert np.allclose(classification.consistency(jnp.ones((3, 2, 4))), 0, atol=1e-6)
    far = jnp.array([[[200.0, 0.0]], [[0.0, 200.0]], [[200.0, 0.0]]])
    assert np.isfinite(classification.consistency(far)).all()
