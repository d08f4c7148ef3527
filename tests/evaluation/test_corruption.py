"""Corruptions against the statistics of the original's, and against plain loops and libraries."""

import itertools

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cnnlab.evaluation import _corruptions, corruption
from cnnlab.evaluation.corruption import CORRUPTIONS, GROUPS, SEVERITIES, cached, corrupt
from cnnlab.types import CnnlabError

# What the authors' operations and constants (https://github.com/hendrycks/robustness; their motion
# blur as ported by imagecorruptions 1.1.2, their frost with the photographs) do to
# `skimage.data.astronaut()`, resized by Pillow's box filter to 32 pixels (first) and 224 (second):
# five severities' mean absolute difference to the clean image in levels, and five PSNRs in dB of
# the mean squared error. Random ones are means of 200 draws at 32 pixels and 60 at 224 (4 for glass
# blur). The first number is the relative tolerance of the difference: what is left of chance in
# their mean and ours (twice that at 224 pixels), rounding where nothing is drawn, and for JPEG what
# another version of the library may do.
REFERENCE = {
    "gaussian_noise": (
        0.01,
        ((7.68, 11.42, 15.12, 16.92, 18.74), (28.3, 24.8, 22.4, 21.4, 20.5)),
        ((14.63, 21.46, 30.97, 42.32, 56.61), (22.5, 19.2, 16.0, 13.3, 10.7)),
    ),
    "shot_noise": (
        0.015,
        ((5.55, 7.82, 12.28, 14.1, 17.14), (30.4, 27.5, 23.6, 22.4, 20.8)),
        ((15.08, 22.6, 31.23, 45.17, 55.74), (21.6, 18.2, 15.5, 12.3, 10.6)),
    ),
    "impulse_noise": (
        0.06,
        ((1.26, 2.54, 3.86, 6.31, 9.0), (24.8, 21.8, 19.9, 17.8, 16.3)),
        ((3.82, 7.63, 11.49, 21.69, 34.43), (19.8, 16.8, 15.0, 12.2, 10.2)),
    ),
    "defocus_blur": (
        0.005,
        ((2.87, 7.24, 10.89, 14.53, 19.77), (35.6, 27.7, 24.2, 21.6, 19.1)),
        ((11.41, 14.23, 19.16, 22.78, 26.22), (22.3, 20.8, 18.7, 17.5, 16.5)),
    ),
    "glass_blur": (
        0.025,
        ((20.47, 20.51, 20.45, 31.77, 30.68), (16.3, 16.4, 17.2, 13.7, 14.4)),
        ((12.76, 13.35, 21.35, 20.87, 24.06), (20.9, 20.9, 17.2, 17.7, 17.0)),
    ),
    "motion_blur": (
        0.06,
        ((14.57, 20.64, 25.22, 25.09, 28.39), (21.2, 18.4, 16.9, 16.9, 16.0)),
        ((15.4, 21.42, 27.7, 32.89, 36.08), (19.5, 17.2, 15.4, 14.3, 13.7)),
    ),
    "zoom_blur": (
        0.005,
        ((15.96, 19.39, 22.96, 26.3, 29.24), (20.3, 18.8, 17.5, 16.5, 15.8)),
        ((22.04, 26.14, 28.65, 31.56, 34.05), (16.9, 15.8, 15.3, 14.7, 14.3)),
    ),
    "snow": (
        0.05,
        ((10.8, 24.43, 26.15, 37.85, 53.06), (25.4, 19.3, 18.2, 15.5, 12.9)),
        ((40.74, 63.35, 62.95, 74.1, 85.49), (15.2, 11.4, 11.3, 9.8, 8.7)),
    ),
    "frost": (
        0.1,
        ((31.36, 47.73, 48.99, 47.91, 47.63), (17.8, 14.2, 13.5, 13.7, 13.5)),
        ((56.51, 71.44, 72.19, 72.92, 77.27), (12.5, 10.1, 9.8, 9.7, 9.2)),
    ),
    "fog": (
        0.12,
        ((12.25, 24.35, 31.46, 37.06, 44.56), (24.8, 18.8, 16.6, 15.2, 13.5)),
        ((46.58, 52.29, 56.69, 56.54, 60.65), (13.2, 12.3, 11.5, 11.5, 11.0)),
    ),
    "brightness": (
        0.005,
        ((9.76, 20.1, 29.76, 38.32, 51.88), (27.9, 21.6, 18.1, 15.9, 13.1)),
        ((19.41, 36.29, 48.47, 57.81, 65.38), (21.7, 16.1, 13.4, 11.6, 10.3)),
    ),
    "contrast": (
        0.005,
        ((15.33, 30.6, 36.7, 42.85, 52.02), (23.1, 17.1, 15.6, 14.2, 12.5)),
        ((41.27, 48.12, 54.97, 61.86, 65.26), (14.7, 13.4, 12.2, 11.2, 10.7)),
    ),
    "elastic_transform": (
        0.12,
        ((37.93, 35.71, 32.31, 30.25, 25.66), (13.1, 13.6, 14.5, 15.0, 16.3)),
        ((55.38, 67.23, 24.24, 24.4, 28.06), (9.9, 8.8, 15.1, 15.1, 14.2)),
    ),
    "pixelate": (
        0.005,
        ((2.76, 5.64, 8.67, 12.02, 17.89), (29.0, 25.5, 22.7, 21.6, 19.1)),
        ((6.35, 7.35, 9.44, 11.82, 13.22), (25.8, 25.0, 22.8, 21.2, 20.4)),
    ),
    "jpeg_compression": (
        0.04,
        ((9.06, 11.63, 12.56, 13.71, 14.69), (26.2, 24.2, 23.5, 22.8, 22.2)),
        ((7.13, 8.18, 8.84, 10.48, 12.1), (27.3, 26.3, 25.7, 24.4, 23.1)),
    ),
}


def difference(images, clean):
    error = images.astype(float) - clean
    return np.abs(error).mean(), 10 * np.log10(255**2 / (error**2).mean())


@pytest.fixture(scope="module")
def astronaut():
    data = pytest.importorskip("skimage.data", reason="install the extra: pip install cnnlab[dev]")
    image = Image.fromarray(data.astronaut())
    box = Image.Resampling.BOX
    return {side: np.asarray(image.resize((side, side), box)) for side in (32, 224)}


DRAWN = sorted(
    set(CORRUPTIONS)
    - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_strength_is_the_originals(name, side, astronaut):
    tolerance, *sides = REFERENCE[name]
    expected, ratios = sides[side == 224]
    clean = astronaut[side]
    copies = 1 if name not in DRAWN else 100 if side == 32 else 6
    ours = []
    for severity in SEVERITIES:
        images = corrupt(np.stack([clean] * copies), name, severity)
        ours.append(difference(images, clean))
    loose = tolerance * (2 if copies == 6 else 1)
    np.testing.assert_allclose([d for d, _ in ours], expected, rtol=loose)
    np.testing.assert_allclose([r for _, r in ours], ratios, atol=10 * loose + 0.06)
    # More severe is worse wherever it is so in the original (its elastic transform is not).
    for (low, high), (ours_low, ours_high) in zip(
        itertools.pairwise(expected), itertools.pairwise(ours), strict=True
    ):
        if high > low * (1 + 2 * loose):
            assert ours_high[0] > ours_low[0]


PHOTOGRAPHS = np.random.default_rng(0).integers(0, 256, (5, 12, 17, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_gets_the_same_in_any_company(name, monkeypatch):
    for images in (PHOTOGRAPHS, PHOTOGRAPHS[..., :1]):
        whole = corrupt(images, name, 3, seed=1)
        assert (whole.shape, whole.dtype) == (images.shape, np.uint8)
        assert not np.array_equal(whole, images)
        subset = corrupt(images[[4, 1]], name, 3, seed=1, positions=[4, 1])
        np.testing.assert_array_equal(subset, whole[[4, 1]])
        with monkeypatch.context() as patch:
            patch.setattr(corruption, "_VALUES_AT_ONCE", 2 * images[0].size)
            np.testing.assert_array_equal(corrupt(images, name, 3, seed=1), whole)
    assert corrupt(images[:0], name, 3).shape == (0, 12, 17, 1)


@pytest.mark.parametrize("name", DRAWN)
def test_images_and_seeds_draw_differently(name):
    twice = np.stack([PHOTOGRAPHS[0], PHOTOGRAPHS[0]])
    first = corrupt(twice, name, 5)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, corrupt(twice, name, 5, seed=1))
    np.testing.assert_array_equal(first, corrupt(twice, name, 5))


@pytest.mark.parametrize("scale", ["small", "large"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_images_are_no_exception(name, scale):
    for shape in ((2, 1, 1, 1), (2, 1, 5, 3), (2, 3, 2, 1)):
        images = np.full(shape, 90, np.uint8)
        assert corrupt(images, name, 5, scale=scale).shape == shape


def test_the_constants_follow_the_size():
    for side, scale in ((64, "small"), (65, "large")):
        images = np.arange(side * side, dtype=np.uint8).reshape(1, side, side, 1)
        np.testing.assert_array_equal(
            corrupt(images, "contrast", 2), corrupt(images, "contrast", 2, scale=scale)
        )
    values = np.array([[[[0], [100]]]], np.uint8)
    assert corrupt(values, "contrast", 1, scale="small").ravel().tolist() == [12, 87]
    assert corrupt(values, "contrast", 1, scale="large").ravel().tolist() == [30, 70]


def test_glass_blur_is_the_originals_loop():
    rng = np.random.default_rng(1)
    size, reach, rounds = 14, 3, 2
    planes = rng.integers(0, 256, (1, 3, size, size)) / 255
    ours = _corruptions.glass_blur(planes, _corruptions.draws("x", [7]), 0.6, reach, rounds)

    def blur(image):
        return ndimage.gaussian_filter(image, (0.6, 0.6, 0), mode="nearest")

    image = np.moveaxis(planes[0], 0, -1)
    x = (blur(image) * 255 + 1e-6).astype(np.uint8)
    span = range(size - reach, reach, -1)
    (generator,) = itertools.islice(_corruptions.draws("x", [7]), 1)
    moves = generator.integers(-reach, reach, (rounds, 2, len(span), len(span)), dtype=np.int32)
    for turn in range(rounds):
        for h in span:
            for w in span:
                dy, dx = moves[turn, :, h - reach - 1, w - reach - 1]
                x[h, w] = x[h + dy, w + dx]  # what a swap of two views of one array comes to
    np.testing.assert_allclose(np.moveaxis(ours[0], 0, -1), blur(x / 255), atol=1e-12)


def test_plasma_is_diamond_square_on_a_torus():
    side, decay = 8, 1.5
    draws = np.random.default_rng(2).uniform(-1, 1, (1, side * side - 1))
    values, remaining, step, amplitude = {(0, 0): 0.0}, iter(draws[0]), side, 1.0
    while step > 1:
        half = step // 2
        for row, column, around in (
            (half, half, ((-1, -1), (-1, 1), (1, -1), (1, 1))),
            (0, half, ((-1, 0), (1, 0), (0, -1), (0, 1))),
            (half, 0, ((-1, 0), (1, 0), (0, -1), (0, 1))),
        ):
            for i, j in itertools.product(range(row, side, step), range(column, side, step)):
                near = [values[(i + half * a) % side, (j + half * b) % side] for a, b in around]
                values[i, j] = np.mean(near) + amplitude * next(remaining)
        step, amplitude = half, amplitude / decay**2
    expected = np.array([[values[i, j] for j in range(side)] for i in range(side)])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(_corruptions.plasma(draws, side, decay)[0], expected, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.04, 1.3, 2.25, 4.5])
def test_zoom_is_scipys_of_the_centre(factor):
    image = np.random.default_rng(3).random((29, 40))
    crops = [int(np.ceil(n / factor)) for n in image.shape]
    firsts = [(n - crop) // 2 for n, crop in zip(image.shape, crops, strict=True)]
    centre = image[firsts[0] : firsts[0] + crops[0], firsts[1] : firsts[1] + crops[1]]
    grown = ndimage.zoom(centre, factor, order=1)
    top, left = (grown.shape[0] - 29) // 2, (grown.shape[1] - 40) // 2
    ours = _corruptions._zoom(image[None, None], factor)[0, 0]
    np.testing.assert_allclose(ours, grown[top : top + 29, left : left + 40], atol=1e-12)


def test_bilinear_reading_is_scipys():
    rng = np.random.default_rng(4)
    image = rng.random((6, 9))
    rows, columns = rng.uniform(-25, 30, (2, 6, 9))
    for mode, theirs in (("mirror", "mirror"), ("symmetric", "reflect")):
        ours = _corruptions._sample(image[None, None], rows[None], columns[None], mode)[0, 0]
        expected = ndimage.map_coordinates(image, [rows, columns], order=1, mode=theirs)
        np.testing.assert_allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("std", [0.7, 5.0, 40.0])
def test_displacements_are_smoothed_as_by_scipy(std):
    fields = np.random.default_rng(5).uniform(-1, 1, (2, 11, 16))
    expected = [ndimage.gaussian_filter(f, std, mode="reflect", truncate=3) for f in fields]
    np.testing.assert_allclose(_corruptions._smoothed(fields, std), expected, atol=1e-12)


def test_motion_blur_draws_a_one_sided_gaussian_line():
    planes = np.zeros((3, 1, 21, 21))
    planes[:, :, 10, 10] = 1
    ours = _corruptions._streaked(planes, [0, 45, -90], radius=4, std=2)[:, 0]
    weights = np.exp(-(np.arange(9) ** 2) / 8)
    weights /= weights.sum()
    np.testing.assert_allclose(ours[0, 10, 10:1:-1], weights, atol=1e-9)
    np.testing.assert_allclose(ours[2, 10:19, 10], weights, atol=1e-9)
    steps = np.ceil(np.arange(9) / np.sqrt(2) - 0.5).astype(int)  # the nearest pixels, by twos
    expected = np.zeros((21, 21))
    np.add.at(expected, (10 - steps, 10 - steps), weights)
    np.testing.assert_allclose(ours[1], expected, atol=1e-9)


def test_brightness_raises_the_value_of_hsv():
    hsv = matplotlib.colors.rgb_to_hsv(PHOTOGRAPHS / 255)
    hsv[..., 2] = np.minimum(hsv[..., 2] + 0.3, 1)
    expected = matplotlib.colors.hsv_to_rgb(hsv) * 255
    ours = corrupt(PHOTOGRAPHS, "brightness", 3, scale="large")
    assert np.abs(ours - (expected - 0.5)).max() <= 0.5 + 1e-5  # truncated
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert (corrupt(black, "brightness", 5) == 76).all()


def test_frost_is_of_the_photographs_mean_and_contrast():
    for number, (mean, std) in enumerate(_corruptions._FROST):
        texture = _corruptions.frost_texture(number) * 255
        np.testing.assert_allclose(texture.mean((1, 2)), mean, atol=2)
        np.testing.assert_allclose(texture.std((1, 2)), std, rtol=0.12)  # less where it is clipped


def test_groups_hold_each_corruption_once():
    assert {group: len(names) for group, names in GROUPS.items()} == {
        "noise": 3, "blur": 4, "weather": 4, "digital": 4,
    }  # fmt: skip
    assert tuple(itertools.chain(*GROUPS.values())) == CORRUPTIONS


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": PHOTOGRAPHS / 255}, "expected uint8"),
        ({"images": PHOTOGRAPHS[..., :2]}, "1 or 3 channels"),
        ({"name": "gausian_noise"}, "expected one of gaussian_noise, shot_noise"),
        ({"severity": 0}, "expected 1 to 5, got 0"),
        ({"scale": "tiny"}, '"auto", "small" or "large"'),
        ({"positions": [1, 2]}, "expected 5 integers"),
        ({"positions": [0, 1, 2, 3, -1]}, "none below 0"),
    ],
)
def test_mistakes_are_explained(change, expected):
    arguments = {"images": PHOTOGRAPHS, "name": "fog", "severity": 1, **change}
    with pytest.raises(CnnlabError, match=expected):
        corrupt(**arguments)


def test_a_test_set_is_corrupted_once_a_process(monkeypatch):
    monkeypatch.setattr(corruption, "_cache", {})
    first = cached(PHOTOGRAPHS, "a", "contrast", 2)
    np.testing.assert_array_equal(first, corrupt(PHOTOGRAPHS, "contrast", 2))
    assert cached(PHOTOGRAPHS, "a", "contrast", 2) is first
    for other in (
        cached(PHOTOGRAPHS, "b", "contrast", 2),
        cached(PHOTOGRAPHS, "a", "contrast", 3),
        cached(PHOTOGRAPHS, "a", "contrast", 2, seed=1),
        cached(PHOTOGRAPHS, "a", "contrast", 2, scale="large"),
    ):
        assert other is not first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    monkeypatch.setattr(corruption, "CACHE_BYTES", 5 * first.nbytes + 1)
    full = cached(PHOTOGRAPHS, "a", "fog", 1)
    assert cached(PHOTOGRAPHS, "a", "fog", 1) is not full
    assert cached(PHOTOGRAPHS, "a", "contrast", 2) is first


def test_mean_corruption_error_is_the_papers():
    errors = {"fog": [0.2, 0.3, 0.4, 0.5, 0.6], "snow": [0.1, 0.1, 0.2, 0.2, 0.4]}
    baseline = {"snow": [0.4, 0.4, 0.4, 0.4, 0.4], "fog": [0.5, 0.6, 0.7, 0.8, 0.9]}
    ce = corruption.corruption_errors(errors, baseline)
    assert ce == pytest.approx({"fog": 2.0 / 3.5, "snow": 1.0 / 2.0})
    mean = corruption.mean_corruption_error(errors, baseline)
    assert mean == pytest.approx((2.0 / 3.5 + 0.5) / 2)
    relative = corruption.mean_corruption_error(errors, baseline, clean=(0.1, 0.3))
    assert relative == pytest.approx((1.5 / 2.0 + 0.5 / 0.5) / 2)
    assert corruption.mean_corruption_error(baseline, baseline) == pytest.approx(1)


@pytest.mark.parametrize(
    ("errors", "baseline", "clean", "expected"),
    [
        ({"fog": [0.1]}, {"snow": [0.1]}, None, "the same corruptions"),
        ({}, {}, None, "the same corruptions"),
        ({"fog": [0.1, 0.2]}, {"fog": [0.1]}, None, "as many of the model"),
        ({"fog": [10.0]}, {"fog": [20.0]}, None, r"in \[0, 1\]"),
        ({"fog": [0.1]}, {"fog": [0.0]}, None, "take a weaker baseline"),
        ({"fog": [0.1]}, {"fog": [0.2]}, (0.1, 0.2), "take a weaker baseline"),
    ],
)
def test_errors_that_cannot_be_compared_are_refused(errors, baseline, clean, expected):
    with pytest.raises(CnnlabError, match=expected):
        corruption.mean_corruption_error(errors, baseline, clean=clean)
