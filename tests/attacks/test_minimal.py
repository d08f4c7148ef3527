"""Attacks for the smallest perturbation, for few pixels and for all images at once.

A linear classifier gives the truth: the nearest image of another class lies beyond the nearest of
the planes that part its class from the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab import attacks, keys, registry
from cnnlab.attacks import universal
from cnnlab.types import CnnlabError

KEY = keys.key(0, "attack")
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RNG = np.random.default_rng(0)
SHAPE = (4, 3, 2)
WEIGHTS = RNG.normal(size=(24, 4)).astype(np.float32)
OFFSETS = -WEIGHTS.sum(0) / 2  # grey is on all planes


def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS + OFFSETS[None]


def flat(images):
    return np.asarray(images, np.float64).reshape(len(images), -1)


def planes(images, order):
    """Distances [B, K] to the planes between the likeliest class and each, and the steps there."""
    logits = flat(images) @ WEIGHTS.astype(np.float64) + OFFSETS
    own = logits.argmax(1)
    normals = (WEIGHTS.T[None] - WEIGHTS.T[own][:, None]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a class and itself
        away = (logits.max(1)[:, None] - logits) / np.linalg.norm(normals, order, axis=2)
    return away, normals


def far_from_planes_and_box(count):
    images = RNG.uniform(0.2, 0.8, (300, *SHAPE)).astype(np.float32)
    away, normals = planes(images, 2)
    nearest = np.nanargmin(away, 1)
    rows = np.arange(300)
    step = normals[rows, nearest] / np.linalg.norm(normals[rows, nearest], axis=1)[:, None]
    there = flat(images) + away[rows, nearest][:, None] * step
    free = (there > 0.05).all(1) & (there < 0.95).all(1)
    order = np.argsort(np.where(free, -away[rows, nearest], 0))
    return jnp.array(images[order[:count]])


IMAGES = far_from_planes_and_box(8)
LABELS = logits_fn(IMAGES).argmax(-1).astype(jnp.int32)


def run(attack, model=logits_fn, images=IMAGES, labels=LABELS):
    compiled = jax.jit(lambda k, x, y: attack(k, model, x, y), compiler_options=FAST_TO_COMPILE)
    return compiled(KEY, images, labels)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_finds_the_nearest_of_all_planes(norm):
    made = run(attacks.create("deepfool", norm=norm))
    assert (logits_fn(made).argmax(-1) != LABELS).all()
    found = np.linalg.norm(flat(made) - flat(IMAGES), {"l2": 2, "linf": np.inf}[norm], axis=1)
    # DeepFool goes 1e-4 farther than the plane; the image's float32 pixels round by less.
    nearest = np.nanmin(planes(IMAGES, {"l2": 2, "linf": 1}[norm])[0], 1)
    assert (found >= nearest * (1 - 1e-5)).all()
    assert (found <= nearest * 1.021 + 2e-4).all(), found / nearest


def test_what_needs_more_than_eps_comes_back_clean():
    nearest = np.nanmin(planes(IMAGES, 2)[0], 1)
    eps = float(np.median(nearest))
    made = run(attacks.create("deepfool", eps=eps))
    changed = (flat(made) != flat(IMAGES)).any(1)
    assert changed[nearest * 1.03 + 2e-4 < eps].all()
    assert not changed[nearest > eps].any()
    assert np.linalg.norm(flat(made) - flat(IMAGES), axis=1).max() <= eps
    assert np.array_equal(logits_fn(made).argmax(-1) != LABELS, changed)


def test_a_targeted_attack_reaches_its_targets():
    targets = (LABELS + 1 + jnp.arange(8) % 3) % 4
    made = run(attacks.create("ddn", targeted=True), labels=targets)
    assert np.array_equal(logits_fn(made).argmax(-1), targets)


def two_classes(images):
    """The boundary of the first two classes alone: one plane, through grey."""
    return logits_fn(images)[:, :2]


def check_at_the_plane(made, labels, slack):
    """Across the plane, and beyond the distance to it by a part of at most `slack`."""
    assert np.array_equal(two_classes(made).argmax(-1), 1 - labels)
    normal = (WEIGHTS[:, 0] - WEIGHTS[:, 1]).astype(np.float64)
    nearest = np.abs((flat(IMAGES) - 0.5) @ normal) / np.linalg.norm(normal)
    found = np.linalg.norm(flat(made) - flat(IMAGES), axis=1)
    assert (found >= nearest * (1 - 1e-5)).all()
    assert (found <= nearest * (1 + slack)).all(), found / nearest


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ddn", {"steps": 200, "gamma": 0.02}),
        ("carlini_wagner", {"steps": 300, "searches": 7}),
    ],
)
def test_the_nearest_image_across_a_plane(name, arguments):
    labels = two_classes(IMAGES).argmax(-1)
    made = run(attacks.create(name, **arguments), two_classes, labels=labels)
    check_at_the_plane(made, labels, 0.01)


def test_boundary_walks_from_its_starts_to_the_nearest_point_of_the_plane():
    """Each image starts from the one mirrored at grey, which is of the other class."""
    labels = two_classes(IMAGES).argmax(-1)

    def attack(key, model, images, labels):
        perturb = registry.get("attacks", "boundary").function
        given = {"steps": 1500, "starts": 1 - images, "targeted": True}
        return perturb(key, model, images, 1 - labels, **given)

    check_at_the_plane(run(attack, two_classes, labels=labels), labels, 0.02)


def test_boundary_says_what_a_targeted_attack_needs():
    with pytest.raises(CnnlabError, match="needs starts="):
        attacks.create("boundary", targeted=True)(KEY, logits_fn, IMAGES, LABELS)


def test_attacks_of_one_norm_refuse_others():
    for name, known in (("ddn", "l2"), ("deepfool", "l2, linf"), ("sparse_rs", "l0")):
        with pytest.raises(CnnlabError, match=f"expected one of {known}, got 'l7'"):
            attacks.create(name, norm="l7")(KEY, logits_fn, IMAGES, LABELS)


def best_pixels(count):
    """By how much the best `count` pixels, at their best corners, move [B] from class 0 to 1."""
    slope = (WEIGHTS[:, 1] - WEIGHTS[:, 0]).astype(np.float64)
    gains = np.maximum((0 - flat(IMAGES)) * slope, (1 - flat(IMAGES)) * slope)
    return np.sort(gains.reshape(8, 12, 2).sum(2), 1)[:, -count:].sum(1)


@functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
def sparse_rs(eps, lead):
    """From class 0 to 1, where class 0 has this lead on top; the images and the lead's model."""

    def model(images):
        return two_classes(images) + jnp.stack([lead, 0 * lead])[None]

    attack = attacks.create("sparse_rs", eps=eps, steps=1500)
    made = attack(KEY, model, IMAGES, jnp.zeros(8, jnp.int32))
    return made, model(made).argmax(-1) == 1


def test_sparse_rs_finds_the_best_pixels_where_it_cannot_succeed():
    for pixels in (1, 3):
        made, fooled = sparse_rs(pixels + 0.5, 1000.0)
        delta = flat(made) - flat(IMAGES)
        assert not fooled.any()
        assert ((delta != 0).reshape(8, 12, 2).any(2).sum(1) <= pixels).all()
        gained = delta @ (WEIGHTS[:, 1] - WEIGHTS[:, 0])
        np.testing.assert_allclose(gained, best_pixels(pixels), rtol=1e-5)


def test_one_pixel_succeeds_where_the_best_one_does():
    assert registry.get("attacks", "one_pixel").fields == {"eps": 1.0}
    logits = two_classes(IMAGES)
    needed = np.asarray(logits[:, 0] - logits[:, 1])
    lead = float(np.median(best_pixels(1) - needed))
    possible = best_pixels(1) > needed + lead
    assert possible.sum() == 4
    assert np.array_equal(sparse_rs(1.0, lead)[1], possible)


def test_the_universal_perturbation_of_a_linear_model():
    """With one class to leave and one to reach, the best is the same for all: the dual vector."""
    labels, eps = jnp.zeros(8, jnp.int32), 0.1

    def two_classes(images):
        return logits_fn(images)[:, :2]

    slope = (WEIGHTS[:, 1] - WEIGHTS[:, 0]).astype(np.float64)
    best = eps * slope / np.linalg.norm(slope)

    def fitted(key, images, labels):
        return universal.fit(
            key, two_classes, images, labels, eps=eps, norm="l2", steps=60, batch_size=3
        )

    delta = jax.jit(fitted, compiler_options=FAST_TO_COMPILE)(KEY, IMAGES, labels)
    np.testing.assert_allclose(np.ravel(delta), best, atol=2e-3)
    made = universal.apply(delta, IMAGES, eps=eps, norm="l2")
    np.testing.assert_allclose(flat(made) - flat(IMAGES), np.tile(best, (8, 1)), atol=2e-3)


def test_no_universal_perturbation_is_better_than_a_harmful_one():
    """A step that goes far beyond the maximum of the loss, which is at grey."""
    images, labels = jnp.full((2, 1, 1, 1), 0.45), jnp.zeros(2, jnp.int32)

    def near_grey(images):
        away = jnp.abs(images.reshape(2, 1) - 0.5)
        return jnp.concatenate([away, 0 * away], 1)

    made = run(
        attacks.create("universal", eps=0.3, steps=1, relative_step=1.0), near_grey, images, labels
    )
    assert np.array_equal(made, images)
