"""Colour and filters against Pillow; hue against the standard library, blur against scipy."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from cnnlab import augment, keys
from cnnlab.augment import _levels, colour, filtering
from cnnlab.types import Batch, CnnlabError

SHAPES = [(28, 28, 1), (9, 14, 3), (1, 1, 3), (1, 1, 1), (2, 5, 1), (17, 3, 3)]
FACTORS = np.array([0, 1, 0.5, 0.1, 1.9, 0.95, 1.05, 2.7, 0.3, 1.3, 0.7, 1.7], np.float32)
BITS = np.arange(12) % 8 + 1
THRESHOLDS = np.array([0, 1, 128, 255, 256, 26, 77, 102, 153, 179, 204, 230])
AMOUNTS = np.array([0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110, 255])


def drawn(shape, seed=0):
    """Twelve images: any levels, a narrow range, few levels, one colour."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (12, *shape))
    levels[3:6] = levels[3:6] // 5 + 90
    levels[6:9] = levels[6:9] // 90 * 60 + 30
    levels[9:] = levels[9:, :1, :1]
    return levels.astype(np.float32)


def to_pillow(levels):
    levels = np.asarray(levels).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def as_grey(image, _):
    return image.convert("L").convert(image.mode)


def solarize_add(image, i):
    return image.point(
        [min(255, level + AMOUNTS[i]) if level < 128 else level for level in range(256)]
        * len(image.getbands())
    )


OPERATIONS = {
    "brightness": (
        lambda x: _levels.apply_table(x, _levels.brightness_table(FACTORS)),
        lambda image, i: ImageEnhance.Brightness(image).enhance(float(FACTORS[i])),
    ),
    "contrast": (
        lambda x: _levels.apply_table(x, _levels.contrast_table(x, FACTORS)),
        lambda image, i: ImageEnhance.Contrast(image).enhance(float(FACTORS[i])),
    ),
    "saturation": (
        lambda x: _levels.saturate(x, FACTORS),
        lambda image, i: ImageEnhance.Color(image).enhance(float(FACTORS[i])),
    ),
    "sharpness": (
        lambda x: _levels.sharpen(x, FACTORS),
        lambda image, i: ImageEnhance.Sharpness(image).enhance(float(FACTORS[i])),
    ),
    "invert": (
        lambda x: _levels.apply_table(x, _levels.invert_table()),
        lambda image, i: ImageOps.invert(image),
    ),
    "solarize": (
        lambda x: _levels.apply_table(x, _levels.solarize_table(THRESHOLDS)),
        lambda image, i: ImageOps.solarize(image, int(THRESHOLDS[i])),
    ),
    "solarize_add": (
        lambda x: _levels.apply_table(x, _levels.solarize_add_table(AMOUNTS)),
        solarize_add,
    ),
    "posterize": (
        lambda x: _levels.apply_table(x, _levels.posterize_table(BITS)),
        lambda image, i: ImageOps.posterize(image, int(BITS[i])),
    ),
    "equalize": (
        lambda x: _levels.apply_table(x, _levels.equalize_table(x)),
        lambda image, i: ImageOps.equalize(image),
    ),
    "autocontrast": (
        lambda x: _levels.apply_table(x, _levels.autocontrast_table(x)),
        lambda image, i: ImageOps.autocontrast(image),
    ),
    "greyscale": (_levels.greyscale, as_grey),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operations_equal_those_of_pillow(shape):
    levels = drawn(shape)
    made = jax.jit(lambda x: {name: ours(x) for name, (ours, _) in OPERATIONS.items()})(levels)
    for name, (_, theirs) in OPERATIONS.items():
        for i, image in enumerate(levels):
            want = np.asarray(theirs(to_pillow(image), i)).reshape(shape)
            assert np.array_equal(made[name][i], want), (name, i)


def test_equalize_equals_pillow_where_counts_are_large():
    rng = np.random.default_rng(1)
    levels = np.clip(rng.normal(120, 30, (2, 300, 260, 1)).round(), 0, 255).astype(np.float32)
    levels[1] = np.maximum(levels[1], 150)
    made = jax.jit(lambda x: _levels.apply_table(x, _levels.equalize_table(x)))(levels)
    for ours, image in zip(made, levels, strict=True):
        assert np.array_equal(ours[..., 0], np.asarray(ImageOps.equalize(to_pillow(image))))


def test_autocontrast_rounds_as_double_precision_for_every_range():
    low, high = np.triu_indices(256, 1)
    images = np.stack([low, high], 1).astype(np.float32)[:, :, None, None]
    tables = np.asarray(jax.jit(_levels.autocontrast_table)(images))[:, 0]
    # Pillow's two operations, in double precision.
    scale = 255.0 / (high - low)
    exact = np.arange(256) * scale[:, None] + (-low * scale)[:, None]
    assert np.array_equal(tables, np.clip(exact.astype(int), 0, 255))


def test_blend_equals_pillow_for_every_pair_of_levels():
    a, b = np.meshgrid(np.arange(256, dtype=np.float32), np.arange(256, dtype=np.float32))
    factors = np.concatenate([FACTORS, np.random.default_rng(2).uniform(-1, 3, 20)])
    blend = jax.jit(_levels.blend)
    for factor in factors:
        pair = (Image.fromarray(each.astype(np.uint8)) for each in (a, b))
        want = np.asarray(Image.blend(*pair, float(factor)))
        assert np.array_equal(blend(a, b, np.float32(factor)), want), factor


def test_more_leading_axes_and_none_and_shared_tables():
    levels = drawn((9, 14, 3))
    factors = FACTORS.reshape(3, 4)
    split = levels.reshape(3, 4, 9, 14, 3)
    for ours in (
        _levels.sharpen,
        lambda x, f: _levels.apply_table(x, _levels.contrast_table(x, f)),
        lambda x, _: _levels.apply_table(x, _levels.equalize_table(x)),
        lambda x, _: _levels.apply_table(x, _levels.posterize_table(4)),
    ):
        ours = jax.jit(ours)
        made = np.asarray(ours(split, factors)).reshape(levels.shape)
        assert np.array_equal(made[7], ours(levels[7], FACTORS[7]))
    with pytest.raises(CnnlabError, match=r"expected a table \[256\]"):
        _levels.apply_table(levels, jnp.zeros((5, 256)))
    with pytest.raises(CnnlabError, match="resize"):
        jax.eval_shape(_levels.histogram, jax.ShapeDtypeStruct((4096, 4096, 1), jnp.float32))


def batch(levels):
    levels = np.asarray(levels)
    count = len(levels)
    return Batch(jnp.asarray(levels / 255), jnp.zeros(count, jnp.int32), jnp.ones(count))


def apply(text, given):
    """The images that a transform makes."""
    return np.asarray(jax.jit(augment.compose((text,)))(keys.key(0, "a"), given).images)


CERTAIN = {
    "invert(probability=1.0)": lambda image: ImageOps.invert(image),
    "solarize(probability=1.0, threshold=0.3)": lambda image: ImageOps.solarize(image, 77),
    "posterize(probability=1.0, bits=3)": lambda image: ImageOps.posterize(image, 3),
    "equalize(probability=1.0)": lambda image: ImageOps.equalize(image),
    "autocontrast(probability=1.0)": lambda image: ImageOps.autocontrast(image),
    "greyscale(probability=1.0)": lambda image: as_grey(image, 0),
    "sharpness(probability=1.0, factor=1.6)": lambda image: ImageEnhance.Sharpness(image).enhance(
        1.6
    ),
    "brightness(amount=0)": lambda image: image,
    "contrast(amount=0)": lambda image: image,
    "saturation(amount=0)": lambda image: image,
    "hue(amount=0)": lambda image: image,
    "colour_jitter(brightness=0, contrast=0, saturation=0, hue=0)": lambda image: image,
}


@pytest.mark.parametrize("shape", [(9, 14, 3), (6, 5, 1)], ids=str)
def test_transforms_without_a_draw_equal_pillow(shape):
    levels = drawn(shape)
    given, key = batch(levels), keys.key(0, "a")
    made = jax.jit(lambda key: {text: augment.compose((text,))(key, given) for text in CERTAIN})(
        key
    )
    for text, theirs in CERTAIN.items():
        images = np.asarray(made[text].images)
        assert np.abs(images * 255 - np.round(images * 255)).max() < 1e-4
        for ours, image in zip(np.round(images * 255), levels, strict=True):
            assert np.array_equal(ours, np.asarray(theirs(to_pillow(image))).reshape(shape)), text


def test_solarize_takes_every_level_as_a_threshold():
    thresholds = np.arange(256) / 255
    ramp = Batch(jnp.arange(256.0).reshape(1, 256, 1) / 255, jnp.zeros(()), jnp.ones(()))

    def solarize(threshold):
        made = colour.solarize(jax.random.key(0), ramp, threshold=threshold, probability=1.0)
        return jnp.round(made.images[0, :, 0] * 255)

    made = jax.jit(jax.vmap(solarize))(thresholds)
    level = np.arange(256)
    assert np.array_equal(made, np.where(level < level[:, None], level, 255 - level))


def test_factors_are_uniform_as_in_torchvision():
    split = jax.random.split(jax.random.key(0), 5000)
    for amount, low in ((0.4, 0.6), (1.5, 0.0)):
        factors = jax.jit(jax.vmap(colour._factor, (0, None)))(split, amount)
        assert stats.kstest(factors, "uniform", (low, 1 + amount - low)).pvalue > 0.01
    # And each example has one of its own: a grey of 200 becomes 200 times the factor.
    given = batch(np.full((400, 2, 2, 3), 200.0, np.float32))
    made = apply("brightness(amount=0.2)", given)
    levels = np.round(made * 255)
    assert (levels == levels[:, :1, :1, :1]).all()
    assert stats.kstest((levels[:, 0, 0, 0] + 0.5) / 200, "uniform", (0.8, 0.4)).pvalue > 0.01


def hue_by_colorsys(image, shift):
    """In float64, not rounded."""
    flat = image.reshape(-1, 3) / 255
    turned = []
    for pixel in flat:
        hue, saturation, value = colorsys.rgb_to_hsv(*(float(part) for part in pixel))
        turned.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    return 255 * np.asarray(turned).reshape(image.shape)


@pytest.mark.parametrize("shift", [-0.5, -0.31, 0.0, 0.1, 0.37])
def test_hue_equals_the_standard_library(shift):
    levels = drawn((9, 14, 3))
    turn = jax.jit(colour.shift_hue)
    for ours, image in zip(turn(levels, shift), levels, strict=True):
        assert np.abs(ours - hue_by_colorsys(image, shift)).max() <= 0.5 + 1e-3
        assert np.array_equal(ours, np.round(ours))


def test_hue_equals_torchvision():
    # `adjust_hue` of torchvision 0.26's v2 functional on float tensors, times 255.
    pixels = np.array([[10, 200, 30], [255, 0, 0], [12, 34, 56], [90, 90, 90], [250, 249, 3]])
    turned = {
        -0.2: [[200, 182, 10], [204, 0, 255], [12, 56, 25.2], [90, 90, 90], [250, 3, 53.4]],
        0.37: [[71.8, 10, 200], [0, 255, 56.1], [56, 12, 24.32], [90, 90, 90], [3, 196.66, 250]],
    }
    for shift, want in turned.items():
        made = colour.shift_hue(jnp.asarray(pixels[None], jnp.float32), shift)[0]
        assert np.abs(made - np.asarray(want)).max() <= 0.5 + 1e-3


def test_hue_draws_both_ways_and_leaves_greyscale_images():
    rgb = np.tile(np.array([200.0, 40.0, 40.0], np.float32), (600, 1, 1, 1))
    made = apply("hue(amount=0.1)", batch(rgb))
    # Of a red, green grows by 6 * shift of the chroma forwards, and blue likewise backwards.
    pixels = np.round(made[:, 0, 0] * 255)
    shifts = (pixels[:, 1] - pixels[:, 2]) / 160 / 6
    assert stats.kstest(shifts, "uniform", (-0.1, 0.2)).pvalue > 0.01
    grey = batch(drawn((5, 4, 1)))
    for text in ("hue", "saturation"):
        made = apply(text, grey)
        assert np.abs(made - grey.images).max() < 1e-6


def test_jitter_applies_the_four_in_every_order():
    factors, shift = (1.3, 0.6, 1.7), 0.07
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = np.array(list(itertools.permutations(range(4))), np.int32)
    jitter = jax.jit(jax.vmap(colour.jitter, (None, 0, None, None)))
    turn = jax.jit(colour.shift_hue)
    results = []
    for shape in ((9, 14, 3), (6, 5, 1)):
        image = drawn(shape)[0]
        made = np.asarray(jitter(image, orders, np.float32(factors), shift))
        for ours, order in zip(made, orders, strict=True):
            want = image
            for which in order:
                if which == 3:
                    want = np.asarray(turn(want, shift))
                    continue
                enhanced = enhancers[which](to_pillow(want)).enhance(float(factors[which]))
                want = np.asarray(enhanced).reshape(shape).astype(np.float32)
            assert np.array_equal(ours, want), order
        results.append(len(np.unique(made.reshape(24, -1), axis=0)))
    assert results[0] == 24


def test_jitter_draws_an_order_for_each_example():
    # With the amounts at their largest and one image, two examples that are alike share all draws.
    given = batch(np.broadcast_to(drawn((9, 14, 3))[:1], (64, 9, 14, 3)))
    made = apply("colour_jitter", given)
    assert len(np.unique(made.reshape(64, -1), axis=0)) == 64
    orders = jax.vmap(lambda key: jax.random.permutation(key, 4))(
        jax.random.split(jax.random.key(3), 4800)
    )
    counts = np.unique(np.asarray(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("name", ["invert", "equalize", "sharpness(factor=0.0)", "greyscale"])
def test_what_has_nothing_to_draw_happens_with_its_probability(name):
    given = batch(np.broadcast_to(drawn((9, 14, 3))[:1], (4000, 9, 14, 3)))
    made = apply(name, given)
    changed = int((made != given.images).any((1, 2, 3)).sum())
    assert stats.binomtest(changed, 4000, 0.1 if name == "greyscale" else 0.5).pvalue > 0.01


@pytest.mark.parametrize("shape", [(9, 14, 3), (2, 1, 1)], ids=str)
def test_blur_equals_scipy(shape):
    image = drawn(shape)[0] / 255
    for kernel_size, sigma in ((5, 0.7), (3, 2.0), (7, 1.3)):
        half = kernel_size // 2
        taps = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
        want = image.astype(np.float64)
        for axis in (0, 1):
            want = ndimage.correlate1d(want, taps / taps.sum(), axis=axis, mode="mirror")
        assert np.abs(filtering.blur(jnp.asarray(image), kernel_size, sigma) - want).max() < 1e-6


def test_blur_draws_its_width_uniformly():
    dot = np.zeros((800, 5, 5, 1), np.float32)
    dot[:, 2, 2] = 255
    text = "gaussian_blur(kernel_size=3, sigma=(0.5, 1.0))"
    made = apply(text, batch(dot))[..., 0]
    # A tap beside the centre is exp(-1 / (2 sigma^2)) of it.
    sigma = np.sqrt(-0.5 / np.log(made[:, 1, 2] / made[:, 2, 2]))
    assert stats.kstest(sigma, "uniform", (0.5, 0.5)).pvalue > 0.01
    with pytest.raises(CnnlabError, match="odd"):
        apply("gaussian_blur(kernel_size=4)", batch(dot))


def test_noise_is_normal_and_clipped():
    given = batch(np.full((40, 20, 20, 3), 127.0, np.float32))
    made = apply("gaussian_noise(std=0.05)", given)
    added = made.astype(np.float64) - np.asarray(given.images)
    assert stats.kstest(added.ravel() / 0.05, "norm").pvalue > 0.01
    assert abs(np.corrcoef(added.reshape(-1, 3).T)[0, 1]) < 0.03
    white = batch(np.full((4, 9, 9, 1), 255.0, np.float32))
    made = apply("gaussian_noise(std=0.5)", white)
    assert made.max() == 1
    assert made.min() >= 0


def test_noise_need_not_be_clipped():
    white = batch(np.full((40, 20, 20, 3), 255.0, np.float32))
    made = apply("gaussian_noise(std=0.5, clip=False)", white)
    assert stats.kstest((made.astype(np.float64) - 1).ravel() / 0.5, "norm").pvalue > 0.01
