"""Policies against Pillow, the published tables, and the laws of their draws."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from cnnlab import backend, keys, parallel
from cnnlab.augment import _operations, policies
from cnnlab.augment._operations import Op
from cnnlab.types import Batch, CnnlabError

METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
ENHANCERS = {
    Op.BRIGHTNESS: ImageEnhance.Brightness,
    Op.SATURATION: ImageEnhance.Color,
    Op.CONTRAST: ImageEnhance.Contrast,
    Op.SHARPNESS: ImageEnhance.Sharpness,
}


def pillow(image, op, value, method="nearest", fill=0):
    """The operation by Pillow: a uint8 array [H, W, C] of one."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    colour = fill if image.shape[2] == 1 else (fill,) * 3

    def affine(*data):
        return picture.transform(
            picture.size, Image.Transform.AFFINE, data, METHODS[method], fillcolor=colour
        )

    changed = {
        Op.IDENTITY: lambda: picture,
        Op.SHEAR_X: lambda: affine(1, value, 0, 0, 1, 0),
        Op.SHEAR_Y: lambda: affine(1, 0, 0, value, 1, 0),
        Op.TRANSLATE_X: lambda: affine(1, 0, -value, 0, 1, 0),
        Op.TRANSLATE_Y: lambda: affine(1, 0, 0, 0, 1, -value),
        Op.ROTATE: lambda: picture.rotate(value, METHODS[method], fillcolor=colour),
        # Without any bits, which Pillow refuses, black is left.
        Op.POSTERIZE: lambda: ImageOps.posterize(picture, int(value)) if value else image * 0,
        Op.SOLARIZE: lambda: ImageOps.solarize(picture, value),
        Op.SOLARIZE_ADD: lambda: picture.point(
            [min(255, i + int(value)) if i < 128 else i for i in range(256)] * image.shape[2]
        ),
        Op.AUTOCONTRAST: lambda: ImageOps.autocontrast(picture),
        Op.EQUALIZE: lambda: ImageOps.equalize(picture),
        Op.INVERT: lambda: ImageOps.invert(picture),
        **{op: functools.partial(lambda e: e(picture).enhance(value), e)
           for op, e in ENHANCERS.items()},
    }[op]()  # fmt: skip
    return np.asarray(changed).reshape(image.shape)


def pictures(count, shape, seed=0):
    """Smooth images with noise, of different brightness and contrast: uint8 [count, *shape]."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) / n for n in shape[:2]), indexing="ij"), -1)
    waves = rng.normal(0, 4, (count, 2, shape[2]))
    smooth = np.sin(np.einsum("ija,bac->bijc", grid, waves) + rng.uniform(0, 6, (count, 1, 1, 1)))
    low, high = np.sort(rng.uniform(0, 255, (2, count, 1, 1, 1)), 0)
    noisy = low + (high - low) * (smooth + 1) / 2 + rng.normal(0, 5, (count, *shape))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def batch_of(images):
    images = jnp.array(images, jnp.float32) / 255
    return Batch(images, jnp.zeros(len(images), jnp.int32), jnp.ones(len(images)))


def levels_of(images):
    levels = np.asarray(images) * 255
    assert np.abs(levels - np.rint(levels)).max() < 1e-4
    return np.rint(levels).astype(np.uint8)


# --------------------------------------------------------------------------------- the published

S = True  # with a random sign
TORCHVISION = {
    # magnitude: argument at 0, at the second and at the greatest magnitude, of 32 x 64 pixels
    Op.SHEAR_X: (0.0, 0.09, 0.3, S),
    Op.SHEAR_Y: (0.0, 0.09, 0.3, S),
    Op.TRANSLATE_X: (0, 8, 29, S),
    Op.TRANSLATE_Y: (0, 4, 14, S),
    Op.ROTATE: (0, 9, 30, S),
    Op.BRIGHTNESS: (1, 1.27, 1.9, S),
    Op.SATURATION: (1, 1.27, 1.9, S),
    Op.CONTRAST: (1, 1.27, 1.9, S),
    Op.SHARPNESS: (1, 1.27, 1.9, S),
    Op.POSTERIZE: (8, 7, 4, not S),
    Op.SOLARIZE: (255, 179, 0, not S),  # 178.5: the levels from 179 on are inverted
    Op.AUTOCONTRAST: None,
    Op.EQUALIZE: None,
}
ENHANCED = (Op.BRIGHTNESS, Op.SATURATION, Op.CONTRAST, Op.SHARPNESS)
TIMM = {
    Op.AUTOCONTRAST: None,
    Op.EQUALIZE: None,
    Op.INVERT: None,
    Op.ROTATE: (0, 27, 30, S),
    Op.SOLARIZE_ADD: (0, 99, 110, not S),
    Op.SHEAR_X: (0, 0.27, 0.3, S),
    Op.SHEAR_Y: (0, 0.27, 0.3, S),
    Op.TRANSLATE_X: (0, 25.92, 28.8, S),
    Op.TRANSLATE_Y: (0, 12.96, 14.4, S),
}
FACTS = {
    "randaugment": (policies.RANDAUGMENT, 30, 9, TORCHVISION | {Op.IDENTITY: None}),
    "autoaugment": (policies.AUTOAUGMENT, 9, 5, TORCHVISION | {
        Op.SHEAR_X: (0, 1 / 6, 0.3, S),
        Op.SHEAR_Y: (0, 1 / 6, 0.3, S),
        Op.TRANSLATE_X: (0, 16, 29, S),
        Op.TRANSLATE_Y: (0, 8, 14, S),
        Op.ROTATE: (0, 50 / 3, 30, S),
        Op.POSTERIZE: (8, 6, 4, not S),
        Op.SOLARIZE: (255, 114, 0, not S),
        Op.INVERT: None,
        **dict.fromkeys(ENHANCED, (1, 1.5, 1.9, S)),
    }),
    "trivialaugment": (policies.WIDE, 30, 9, TORCHVISION | {
        Op.IDENTITY: None,
        Op.SHEAR_X: (0, 0.297, 0.99, S),
        Op.SHEAR_Y: (0, 0.297, 0.99, S),
        Op.TRANSLATE_X: (0, 9, 32, S),
        Op.TRANSLATE_Y: (0, 9, 32, S),
        Op.ROTATE: (0, 40.5, 135, S),
        Op.POSTERIZE: (8, 6, 2, not S),
        **dict.fromkeys(ENHANCED, (1, 1.297, 1.99, S)),
    }),
    "augmix": (policies.AUGMIX, 9, 2, TORCHVISION | {
        Op.SHEAR_X: (0, 0.2 / 3, 0.3, S),
        Op.SHEAR_Y: (0, 0.2 / 3, 0.3, S),
        Op.TRANSLATE_X: (0, 4, 21, S),
        Op.TRANSLATE_Y: (0, 2, 10, S),
        Op.ROTATE: (0, 20 / 3, 30, S),
        Op.POSTERIZE: (4, 3, 0, not S),
        Op.SOLARIZE: (255, 199, 0, not S),
        **dict.fromkeys(ENHANCED, (1, 1.2, 1.9, S)),
    }),
    "timm": (policies.TIMM, 10, 9, TIMM | {
        Op.POSTERIZE: (0, 3, 4, not S),
        Op.SOLARIZE: (0, 230, 256, not S),
        **dict.fromkeys(ENHANCED, (0.1, 1.72, 1.9, not S)),
    }),
    "timm, increasing": (policies.TIMM_INCREASING, 10, 9, TIMM | {
        Op.POSTERIZE: (4, 1, 0, not S),
        Op.SOLARIZE: (256, 26, 0, not S),
        **dict.fromkeys(ENHANCED, (1, 1.81, 1.9, S)),
    }),
}  # fmt: skip
"""Policy -> its operations here, the greatest magnitude, another, and the arguments of torchvision
0.29 or timm 1.0.31 at 0, at the other and at the greatest, with a positive sign."""

ask = jax.jit(policies.arguments, static_argnums=(0, 3, 5))


def every_argument(space, magnitudes, greatest, size):
    """(operation, magnitude, sign, argument) of each operation, magnitude and sign."""
    shape = (len(space), len(magnitudes), 2)
    choice, magnitude, signs = np.meshgrid(
        np.arange(len(space)), np.float32(magnitudes), np.float32([1, -1]), indexing="ij"
    )
    ops, values = ask(space, choice, magnitude, greatest, signs, size)
    assert ops.shape == values.shape == shape
    columns = (np.asarray(x).ravel() for x in (ops, magnitude, signs, values))
    return [
        (Op(int(op)), float(m), int(s), float(value))
        for op, m, s, value in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("name", FACTS)
def test_operations_magnitudes_and_signs_are_those_of_the_reference(name):
    space, greatest, middle, facts = FACTS[name]
    assert {entry.op for entry in space} == set(facts)
    assert len(space) == len(facts)
    magnitudes = (0, middle, greatest)
    for op, magnitude, sign, value in every_argument(space, magnitudes, greatest, (32, 64)):
        if facts[op] is None:
            continue
        *expected, signed = facts[op]
        centre = 1 if op in ENHANCED and signed else 0
        amount = (expected[magnitudes.index(magnitude)] - centre) * (sign if signed else 1)
        assert value == np.float32(centre + amount), (op, magnitude, sign)


@pytest.mark.parametrize(
    ("policy", "digest"), [("cifar10", 3254022128), ("svhn", 2712502408), ("imagenet", 172777268)]
)
def test_autoaugment_has_the_published_sub_policies(policy, digest):
    # The digests are of torchvision's tables, written "number probability bin" a step.
    table = policies.AUTOAUGMENT_POLICIES[policy]
    text = ";".join(",".join(f"{op:d} {p} {level}" for op, p, level in steps) for steps in table)
    assert len(table) == 25
    assert zlib.crc32(text.encode()) == digest


# -------------------------------------------------------------------------- operations by Pillow

ARGUMENTS = {
    Op.IDENTITY: (0.0,),
    Op.SHEAR_X: (-0.3, 0.09, 0.99),
    Op.SHEAR_Y: (-0.99, -0.09, 0.3),
    Op.TRANSLATE_X: (-7, 3, 12.96),
    Op.TRANSLATE_Y: (-3, 2, 5.5),
    Op.ROTATE: (-30, 9, 90, 135),
    **dict.fromkeys(ENHANCED, (0.1, 0.73, 1.9)),
    Op.POSTERIZE: (0, 1, 4, 8),
    Op.SOLARIZE: (0, 26, 178.5, 256),
    Op.SOLARIZE_ADD: (0, 99, 110),
    Op.AUTOCONTRAST: (0, 0),
    Op.EQUALIZE: (0, 0),
    Op.INVERT: (0,),
}
CASES = [(op, value) for op, values in ARGUMENTS.items() for value in values]


@pytest.mark.parametrize(
    ("shape", "method"),
    [((13, 22, 3), "nearest"), ((9, 17, 1), "random")],
)
def test_each_operation_equals_pillow(shape, method):
    count = 2 * len(CASES)
    images, cubic = pictures(count, shape), np.arange(count) < len(CASES)
    shares = dict.fromkeys((op for op in Op if op), 0.05)

    @jax.jit
    def run(images, ops, values):
        return _operations.chain(
            images, ops[:, None], values[:, None], [shares],
            interpolation=method, cubic=jnp.array(cubic)[:, None], fill=60 / 255,
        )  # fmt: skip

    # Of the second batch so many are rotated that the blocks don't hold them.
    for cases in (CASES * 2, CASES + [(Op.ROTATE, 9)] * len(CASES)):
        ops, values = zip(*cases, strict=True)
        made = levels_of(
            run(batch_of(images).images, jnp.array(ops, jnp.int32), jnp.array(values, jnp.float32))
        )
        for image, got, (op, value), is_cubic in zip(images, made, cases, cubic, strict=True):
            own = method if method != "random" else "bicubic" if is_cubic else "bilinear"
            expected = pillow(image, op, value, own, fill=60).astype(int)
            difference = np.abs(got - expected)
            if own == "nearest" or op not in _operations.GEOMETRIC:
                assert difference.max() == 0, (op, value)
            else:  # where the source is the border itself, rounding decides between it and the fill
                assert (difference > 1).mean() < 0.01, (op, value, own)


# ----------------------------------------------------------------------------- laws of the draws


def expected_outcomes(image, space, magnitudes, greatest):
    """Bytes of an image after one operation -> its probability, for one uniform draw."""
    found = every_argument(space, magnitudes, greatest, image.shape[:2])
    chances = {}
    for op, _, _, value in found:
        outcome = pillow(image, op, value).tobytes()
        chances[outcome] = chances.get(outcome, 0.0) + 1 / len(found)
    return chances


def assert_follows(made, chances):
    """Each image is one of the outcomes, and they come as often as expected."""
    found = dict.fromkeys(chances, 0)
    for image in made:
        found[image.tobytes()] += 1  # a KeyError is an image that no operation gives
    expected = np.array([chances[o] * len(made) for o in found])
    observed = np.array(list(found.values()))
    assert np.isclose(expected.sum(), len(made))
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def copies_of(image, count=2560):
    """A batch of one image, each with a mask equal to it and a box."""
    images = np.broadcast_to(image, (count, *image.shape))
    return dataclasses.replace(
        batch_of(images),
        masks=jnp.array(images[..., 0], jnp.int32),
        boxes=jnp.tile(jnp.array([[2.0, 3.0, 6.0, 8.0]]), (count, 1, 1)),
    )


IMAGE, KEY = pictures(1, (8, 10, 1))[0], keys.key(0, "augment")


@pytest.fixture(scope="module")
def one_op():
    return backend.jit(functools.partial(policies.randaugment, num_ops=1))


@pytest.fixture
def accelerator(monkeypatch):
    """Compute as an accelerator does: each operation for all, without blocks."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_randaugment_draws_each_operation_and_sign_as_often(one_op):
    # With so much noise half of the magnitudes are clipped to 30, all others to 0.
    for magnitude, std, drawn in (
        (9.0, 0.0, (9.0,)),
        (30.0, 0.0, (30.0,)),
        (15.0, 1e9, (0.0, 30.0)),
    ):
        made = one_op(KEY, copies_of(IMAGE), magnitude=magnitude, magnitude_std=std)
        expected = expected_outcomes(IMAGE, policies.RANDAUGMENT, drawn, 30)
        assert_follows(levels_of(made.images), expected)
    assert one_op._cache_size() == 1  # both numbers are traced


def test_trivialaugment_draws_each_magnitude_as_often(accelerator):
    run = jax.jit(functools.partial(policies.trivialaugment, num_magnitude_bins=5))
    made = levels_of(run(KEY, copies_of(IMAGE)).images)
    assert_follows(made, expected_outcomes(IMAGE, policies.WIDE, (0.0, 1.0, 2.0, 3.0, 4.0), 4))


def test_autoaugment_draws_sub_policies_and_their_steps_as_told(accelerator):
    values = {
        (op, level, sign): value
        for op, level, sign, value in every_argument(
            policies.AUTOAUGMENT, range(10), 9, IMAGE.shape[:2]
        )
    }

    def after(image, step):
        op, chance, level = step
        yield 1 - chance, image
        for sign in (1, -1):
            yield chance / 2, pillow(image, op, values[op, level, sign])

    chances = {}
    for first, second in policies.AUTOAUGMENT_POLICIES["cifar10"]:
        for chance, once in after(IMAGE, first):
            for other, twice in after(once, second):
                outcome = twice.tobytes()
                chances[outcome] = chances.get(outcome, 0.0) + chance * other / 25
    run = jax.jit(functools.partial(policies.autoaugment, policy="cifar10"))
    assert_follows(levels_of(run(KEY, copies_of(IMAGE)).images), chances)


def test_draws_are_uniform_and_independent_of_each_other():
    drawn = jax.jit(lambda key: policies.draw(key, 8000, (2,), choices=14, bins=31))(
        keys.key(0, "augment")
    )
    choice, bins, signs = (np.asarray(x) for x in (drawn.choice, drawn.bins, drawn.signs))
    tables = [
        np.bincount(choice[:, 0] * 14 + choice[:, 1], minlength=196),
        np.bincount(bins[:, 0] * 14 + choice[:, 0], minlength=31 * 14),
        np.bincount((signs[:, 0] > 0) * 14 + choice[:, 0], minlength=28),
        np.bincount((signs[:, 0] > 0) * 2 + (signs[:, 1] > 0), minlength=4),
        np.bincount((drawn.chance[:, 0] * 10).astype(int) * 14 + choice[:, 0], minlength=140),
    ]
    assert min(stats.chisquare(table).pvalue for table in tables) > 1e-3
    noise = jax.jit(policies.around, static_argnums=3)(500.0, 2.0, drawn, 1000)
    assert stats.kstest((np.asarray(noise).ravel() - 500) / 2, "norm").pvalue > 1e-3


# -------------------------------------------------------------------------- examples by themselves


def test_an_example_does_not_depend_on_the_others_nor_on_the_devices(one_op):
    given = copies_of(IMAGE)
    given = dataclasses.replace(given, images=batch_of(pictures(2560, IMAGE.shape)).images)
    whole = one_op(KEY, given, magnitude=9.0, magnitude_std=0.0).images
    changed = dataclasses.replace(given, images=given.images.at[1:].set(0.0))
    alone = one_op(KEY, changed, magnitude=9.0, magnitude_std=0.0).images
    assert np.array_equal(alone[0], whole[0])
    few = jax.tree.map(lambda x: x[:8], given)
    assert np.array_equal(one_op(KEY, few).images, whole[:8])
    spread = jax.device_put(given, parallel.split_batch(parallel.make_mesh(8)))
    assert np.array_equal(one_op(KEY, spread).images, whole)


def test_masks_and_boxes_move_with_the_images(one_op):
    given = copies_of(IMAGE)
    made = one_op(KEY, given, magnitude=30.0, magnitude_std=0.0)
    levels = levels_of(made.images)[..., 0]
    masks, boxes = np.asarray(made.masks), np.asarray(made.boxes)
    moved = ~(masks == given.masks).all((1, 2))
    assert np.array_equal(masks[moved], levels[moved])
    assert 800 < moved.sum() < 1030  # 5 of 14 operations move pixels: 914 expected
    kept = (boxes == given.boxes).all((1, 2))
    assert np.array_equal(kept, ~moved)


# ------------------------------------------------------------------------------------------ AugMix


def test_augmix_draws_chains_of_one_to_three_operations():
    drawn = jax.jit(lambda key: policies.draw(key, 1000, (3, 3), choices=13))(KEY)
    chosen = np.asarray(policies.in_chain(drawn))
    assert (np.diff(chosen.astype(int), axis=2) <= 0).all()  # the first ones
    lengths = np.bincount(chosen.sum(2).ravel(), minlength=4)
    assert lengths[0] == 0
    assert stats.chisquare(lengths[1:]).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_augmix_draws_dirichlet_and_beta_weights(alpha):
    own = keys.per_example(keys.key(0, "augment"), 3000)
    weights, share = jax.jit(policies.mixing_weights, static_argnums=2)(own, alpha, 3)
    assert np.allclose(weights.sum(1), 1, atol=1e-6)
    assert stats.kstest(np.asarray(share), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    for column in np.asarray(weights).T:  # a coordinate of a Dirichlet variable is a Beta one
        assert stats.kstest(column, stats.beta(alpha, 2 * alpha).cdf).pvalue > 1e-3


def test_augmix_mixes_the_image_with_its_chain(accelerator):
    run = jax.jit(functools.partial(
        policies.augmix, width=1, depth=1, severity=1, all_ops=False, interpolation="nearest"
    ))  # fmt: skip
    made = np.asarray(run(KEY, copies_of(IMAGE, 400)).images) * 255
    # At severity 1 all magnitudes are 0, where posterize keeps 4 bits and solarize from 255 on.
    outcomes = {
        op: pillow(IMAGE, op, value).astype(float) - IMAGE
        for op, value in (
            (Op.POSTERIZE, 4), (Op.SOLARIZE, 255), (Op.AUTOCONTRAST, 0), (Op.EQUALIZE, 0)
        )
    }  # fmt: skip
    shares, kept = [], 0
    for one in made - IMAGE:
        if np.abs(one).max() < 1e-3:
            kept += 1
            continue
        fits = []
        for change in outcomes.values():
            share = (one * change).sum() / max((change**2).sum(), 1e-9)
            if np.abs(one - share * change).max() < 1e-3:
                fits.append(share)
        shares.append(fits[0])  # an IndexError is an image that is no mixture
    unchanged = 5 + sum(not change.any() for change in outcomes.values())
    assert abs(kept / 400 - unchanged / 9) < 0.1
    assert stats.kstest(shares, "uniform").pvalue > 1e-3


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (policies.autoaugment, {"policy": "cifar"}, "did you mean 'cifar10'"),
        (policies.randaugment, {"interpolation": "linear"}, "expected one of nearest"),
    ],
)
def test_unknown_names_are_explained(policy, arguments, message):
    given = batch_of(pictures(2, (4, 4, 1)))
    with pytest.raises(CnnlabError, match=message):
        jax.eval_shape(functools.partial(policy, **arguments), keys.key(0, "a"), given)
