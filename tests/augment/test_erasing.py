"""Random erasing, cutout and channel dropout, against the papers' algorithms in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cnnlab import augment, keys
from cnnlab.augment import erasing
from cnnlab.types import Batch, CnnlabError

RNG = np.random.default_rng(0)


def batch(count, shape, low=1):
    levels = np.broadcast_to(RNG.integers(low, 256, (1, *shape)), (count, *shape))
    images = jnp.asarray(levels.astype(np.float32) / 255)
    return Batch(images, jnp.zeros(count, jnp.int32), jnp.ones(count))


def apply(text, given, step=0):
    return np.asarray(jax.jit(augment.compose((text,)))(keys.key(0, "augment", step), given).images)


def published(rng, rows, columns, area, aspect):
    """Algorithm 1 of Zhong et al. 2020 with the rounding and the bounds of the authors' code."""
    for _ in range(100):
        target = rng.uniform(*area) * rows * columns
        ratio = rng.uniform(aspect, 1 / aspect)
        height, width = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if height < rows and width < columns:
            top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
            return top, left, height, width
    return 0, 0, 0, 0


def of_erased(changed):
    """(top, left, height, width) of the changed pixels [H, W], which must be a full rectangle."""
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert changed.sum() == height * width
    return rows[0], columns[0], height, width


def assert_same_law(ours, theirs, size):
    """Kolmogorov-Smirnov on area, aspect, position and what is left on the far sides."""
    ours, theirs = (np.asarray(drawn, np.float64)[:, :4].T for drawn in (ours, theirs))

    def numbers(top, left, height, width):
        return {
            "area": height * width,
            "aspect": height / np.maximum(width, 1),
            "height": height,
            "width": width,
            "top": top,
            "left": left,
            "below": size[0] - top - height,
            "right": size[1] - left - width,
        }

    reference = numbers(*theirs)
    for name, values in numbers(*ours).items():
        assert stats.ks_2samp(values, reference[name]).pvalue > 0.01, name


@pytest.mark.parametrize(
    ("size", "area", "aspect"),
    [((28, 28), (0.02, 0.4), 0.3), ((32, 20), (0.02, 0.4), 0.3), ((12, 12), (0.5, 1.0), 0.2)],
)
def test_rectangles_follow_the_published_algorithm(size, area, aspect):
    # The last case discards most of its first tries.
    draw = jax.jit(jax.vmap(lambda key: erasing.draw(key, size, area=area, aspect=aspect)))
    ours = np.stack(draw(jax.random.split(jax.random.key(1), 20_000)), 1)
    rng = np.random.default_rng(2)
    theirs = [published(rng, *size, area, aspect) for _ in range(20_000)]
    assert_same_law(ours, theirs, size)
    assert (ours[:, 2] < size[0]).all()
    assert (ours[:, 3] < size[1]).all()
    assert ours[:, :2].min() == 0
    assert (ours[:, 0] + ours[:, 2]).max() == size[0]
    assert (ours[:, 1] + ours[:, 3]).max() == size[1]


def test_a_constant_is_written_into_the_rectangle_and_nowhere_else():
    given = batch(4000, (14, 11, 3), low=60)
    made = apply("random_erasing(probability=1.0, value=(0.1, 0.15, 0.2))", given)
    changed = (made != given.images).all(-1)
    assert np.array_equal(changed, (made != given.images).any(-1))
    assert np.unique(made[changed], axis=0) == pytest.approx(np.array([[0.1, 0.15, 0.2]]))
    rng = np.random.default_rng(3)
    theirs = [published(rng, 14, 11, (0.02, 0.4), 0.3) for _ in range(20_000)]
    theirs = [drawn if drawn[2] * drawn[3] else (0, 0, 0, 0) for drawn in theirs]
    assert_same_law([of_erased(each) for each in changed], theirs, (14, 11))


def test_whether_an_image_is_erased_says_nothing_of_the_rectangle():
    given = batch(8000, (14, 11, 1), low=60)
    made = apply("random_erasing(probability=0.5, value=(0.1, 0.1, 0.1))", given)
    changed = (made != given.images).all(-1)
    erased = changed[changed.any((1, 2))]
    assert 3500 < len(erased) < 4500
    rng = np.random.default_rng(4)
    theirs = [published(rng, 14, 11, (0.02, 0.4), 0.3) for _ in range(20_000)]
    theirs = [drawn for drawn in theirs if drawn[2] * drawn[3]]
    assert_same_law([of_erased(each) for each in erased], theirs, (14, 11))


def test_noise_is_uniform_over_all_levels_and_drawn_for_each_value():
    given = dataclasses.replace(batch(400, (16, 15, 3)), images=jnp.full((400, 16, 15, 3), 0.5))
    made = apply('random_erasing(probability=1.0, fill="noise")', given)
    drawn = made[(made != 0.5).any(-1)]
    assert len(drawn) > 10_000
    levels = np.round(drawn * 255).astype(int)
    assert np.abs(drawn - levels / 255).max() < 1e-7
    assert stats.chisquare(np.bincount(levels.ravel(), minlength=256)).pvalue > 0.001
    assert np.abs(np.corrcoef(levels.T) - np.eye(3)).max() < 0.03
    # Neighbours and other images do not repeat it.
    assert len(np.unique(levels, axis=0)) > 0.99 * len(levels)


def test_the_mean_is_that_of_each_channel():
    given = batch(8, (10, 12, 3))
    made = apply('random_erasing(probability=1.0, fill="mean", area=(0.3, 0.4))', given)
    changed = (made != given.images).any(-1)
    assert changed.any((1, 2)).all()
    mean = np.asarray(given.images[0], np.float64).mean((0, 1))
    assert np.abs(made[changed] - mean).max() < 1e-6


def test_erasing_happens_with_its_probability():
    transform = jax.jit(augment.compose(("random_erasing",)))
    given = batch(2000, (9, 9, 1))
    for probability in (0.0, 0.25, 1.0):
        numbers = jnp.array([probability, 0.3, 0.4, 0.5, 0, 0, 0])  # traced
        made = transform(keys.key(0, "augment"), given, numbers).images
        erased = (made == 0).any((1, 2, 3)).sum()
        assert stats.binomtest(int(erased), 2000, probability).pvalue > 0.01


def test_other_channels_than_three_take_the_first_value():
    given = batch(8, (9, 9, 2), low=60)
    made = apply("random_erasing(probability=1.0, area=0.3, value=(0.1, 0.2, 0.2))", given)
    assert np.unique(made[made != given.images]) == pytest.approx([0.1])


def test_one_pixel_can_not_be_erased():
    given = batch(8, (1, 1, 3))
    assert np.array_equal(apply("random_erasing(probability=1.0)", given), given.images)


def test_masks_boxes_and_labels_stay():
    given = dataclasses.replace(
        batch(4, (8, 8, 3)), masks=jnp.ones((4, 8, 8), jnp.int32), boxes=jnp.ones((4, 2, 4))
    )
    transform = augment.compose(("random_erasing", "cutout(size=3)", "channel_dropout"))
    made = jax.jit(transform)(keys.key(0, "a"), given)
    for field in ("masks", "boxes", "labels", "weights"):
        assert np.array_equal(getattr(made, field), getattr(given, field))


def test_an_unknown_fill_is_explained():
    with pytest.raises(CnnlabError, match="expected one of constant, mean, noise, got 'zero'"):
        apply('random_erasing(fill="zero")', batch(2, (8, 8, 1)))


@pytest.mark.parametrize("size", [3, 4])
def test_cutout_centres_its_square_on_any_pixel(size):
    given = batch(6300, (7, 9, 1))
    erased = apply(f"cutout(size={size})", given)[..., 0] == 0
    expected = {}
    for row in range(7):
        for column in range(9):
            mask = np.zeros((7, 9), bool)
            top, left = row - size // 2, column - size // 2
            mask[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = True
            expected.setdefault(mask.tobytes(), 0)
            expected[mask.tobytes()] += 100
    masks, counts = np.unique(erased.reshape(6300, -1), axis=0, return_counts=True)
    assert {mask.tobytes() for mask in masks} == set(expected)
    assert stats.chisquare(counts, [expected[mask.tobytes()] for mask in masks]).pvalue > 0.01


def test_channel_dropout_drops_so_many_channels_and_keeps_one():
    given = batch(900, (4, 5, 3))
    for asked, dropped in ((1, 1), (2, 2), (7, 2)):
        made = apply(f"channel_dropout(channels={asked})", given)
        gone = (made == 0).all((1, 2))
        assert (gone.sum(1) == dropped).all()
        kept = ~gone[:, None, None, :]
        assert np.array_equal(np.where(kept, made, 0), np.where(kept, given.images, 0))
        assert stats.chisquare(gone.sum(0)).pvalue > 0.01
    grey = batch(4, (4, 5, 1))
    assert np.array_equal(apply("channel_dropout", grey), grey.images)
