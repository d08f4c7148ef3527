"""The contract of every augmentation, and what each of them does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab import augment, keys, registry
from cnnlab.types import Batch, CnnlabError

RNG = np.random.default_rng(0)


def batch(count=16, size=12):
    images = jnp.array(RNG.uniform(size=(1, size, size, 3)).repeat(count, 0), jnp.float32)
    return Batch(images, jnp.zeros(count, jnp.int32), jnp.ones(count))


def mixes(name):
    """Whether a transform is about pairs of examples: tests/augment/test_mixing.py has those."""
    return getattr(registry.get("augment", name).module, "SOFT_LABELS", False)


@pytest.mark.parametrize("name", [n for n in registry.plugins("augment") if not mixes(n)])
def test_contract(name):
    transform = jax.jit(augment.compose((name,)))
    key, given = keys.key(0, "augment", 5), batch()
    once, again, other = (
        transform(key, given),
        transform(key, given),
        transform(keys.key(0, "augment", 6), given),
    )
    assert np.array_equal(once.images, again.images)
    assert not np.array_equal(once.images, other.images)
    assert once.images.shape == given.images.shape
    assert once.images.dtype == jnp.float32
    assert once.images.min() >= 0
    assert once.images.max() <= 1
    # All examples are the same image here, so any difference comes from their own draws.
    assert len(np.unique(np.asarray(once.images).reshape(16, -1), axis=0)) > 1
    # An example's draw depends on its position, not on how many there are.
    few = transform(key, jax.tree.map(lambda x: x[:4], given))
    assert np.array_equal(few.images, once.images[:4])


def test_crop_shifts_by_every_offset_and_zeros_move_in():
    given = batch(400, size=6)
    made = np.asarray(augment.compose(("crop(padding=1)",))(keys.key(0, "a"), given).images)
    image = np.asarray(given.images[0])
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    shifts = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    counts = [sum(np.array_equal(m, s) for m in made) for s in shifts]
    assert sum(counts) == 400
    assert min(counts) > 20  # 44 expected of each


def test_flip_mirrors_with_its_probability():
    given = batch(400)
    made = np.asarray(augment.compose(("flip(probability=0.25)",))(keys.key(0, "a"), given).images)
    mirrored = np.asarray(given.images[:, :, ::-1])
    flips = sum(np.array_equal(m, f) for m, f in zip(made, mirrored, strict=True))
    kept = sum(np.array_equal(m, g) for m, g in zip(made, given.images, strict=True))
    assert flips + kept == 400
    assert 70 < flips < 130


def test_transforms_apply_in_the_order_written_with_draws_of_their_own():
    given = batch(64)
    key = keys.key(0, "a")
    both = augment.compose(("crop", "flip"))(key, given).images
    swapped = augment.compose(("flip", "crop"))(key, given).images
    assert not np.array_equal(both, swapped)
    twice = augment.compose(("flip", "flip"))(key, given).images
    assert not np.array_equal(twice, given.images)


def test_no_transform_leaves_the_batch_as_it_is():
    given = batch()
    assert augment.compose(())(keys.key(0, "a"), given) is given


def test_numbers_are_traced_and_take_the_place_of_those_written():
    given, key = batch(64), keys.key(0, "a")
    transform = augment.compose(("flip(probability=0.0)", "crop(padding=2, probability=0.5)"))
    assert transform.count == 3  # crop's fill stands between the two
    traces = []

    @jax.jit
    def run(numbers):
        traces.append(1)
        return transform(key, given, numbers).images

    assert np.array_equal(run(jnp.array([0.0, 0.0, 0.0])), given.images)
    flipped = augment.compose(("flip(probability=1.0)",))(key, given).images
    assert np.array_equal(run(jnp.array([1.0, 0.0, 0.0])), flipped)
    written = augment.compose(("flip(probability=1.0)", "crop(padding=2, probability=0.5)"))
    assert np.array_equal(run(jnp.array([1.0, 0.0, 0.5])), jax.jit(written)(key, given).images)
    assert len(traces) == 1
    with pytest.raises(CnnlabError, match=r"expected numbers \(3,\), got \(2,\)"):
        transform(key, given, jnp.zeros(2))


def test_any_transform_can_be_left_to_chance():
    given = batch(400)
    made = augment.compose(("crop(padding=3, probability=0.25)",))(keys.key(0, "a"), given).images
    changed = (np.asarray(made) != np.asarray(given.images)).any((1, 2, 3)).mean()
    assert 0.16 < changed < 0.32  # of those chosen, one in 49 is not shifted


@pytest.mark.parametrize("text", ["crop(padding=0)", "flip(probability=1.5)"])
def test_arguments_out_of_range_are_explained(text):
    with pytest.raises(CnnlabError, match="expected"):
        augment.compose((text,))(keys.key(0, "a"), batch())
