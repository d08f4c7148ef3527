"""Geometric transforms against Pillow, torchvision's matrices, SciPy and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cnnlab import augment, keys
from cnnlab.augment import _geometry, crop, geometric
from cnnlab.types import Batch, CnnlabError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
SHAPES = [(28, 28, 1), (24, 33, 3)]
NAMES = ("rotate", "shear(y=15.0)", "translate", "scale", "affine", "perspective", "elastic",
         "random_resized_crop", "crop", "flip", "vertical_flip")  # fmt: skip


def levels(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def picture(array):
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def array(image):
    made = np.asarray(image)
    return made[..., None] if made.ndim == 2 else made


def batch_of(images, **fields):
    count = len(images)
    return Batch(
        jnp.asarray(images, jnp.float32) / 255,
        jnp.zeros(count, jnp.int32),
        jnp.ones(count),
        **fields,
    )


def matrices(size, count=60):
    """Of every kind, in float32, as lists of Pillow's six numbers."""
    rng, width = np.random.default_rng(1), size[1]
    random = rng.normal(size=(count, 2, 3)) * [1, 1, width / 2]
    shear_x = np.stack([_geometry.shear_x(v) for v in (-0.3, 0.27, 0.1)])
    shear_y = np.stack([_geometry.shear_y(v) for v in (-0.3, 0.27, 0.5)])
    # Ties and their neighbours: on them 16-bit fixed point and floating point part ways.
    offsets = (0.45 * width, -3, 2.5, -2.5, -1e-6, 1.49999, 1.5, 1e5)
    moved = np.stack([_geometry.translation(x, y) for x in offsets for y in offsets[:-1]])
    scaled = rng.choice([0.5, 1, 1.1, 0.9, 2, -1], (count, 2))
    scaled = np.stack([_scaled(*factors, size) for factors in scaled])
    degrees = [*rng.uniform(-400, 400, count), 0, 90, -90, 180, 270, -450]
    turned = np.asarray(jax.jit(lambda d: _geometry.rotation(d, size))(jnp.array(degrees)))
    return np.concatenate([random, shear_x, shear_y, moved, scaled, turned]).astype(np.float32)


def _scaled(x, y, size):
    return np.array([[x, 0, size[1] / 2 * (1 - x)], [0, y, size[0] / 2 * (1 - y)]])


@pytest.mark.parametrize("method", FILTERS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3)])
def test_warps_equal_pillow(shape, method):
    matrix = matrices(shape[:2])
    given = levels(len(matrix), shape)
    fill = 77 if shape[2] == 1 else (7, 77, 177)
    warp = functools.partial(_geometry.warp_levels, method=method, fill=np.float32(fill))
    made = np.asarray(jax.jit(warp)(jnp.asarray(given, jnp.float32), matrix))
    wanted = np.stack([
        array(picture(image).transform(
            shape[1::-1], Image.Transform.AFFINE, m.ravel().tolist(), FILTERS[method],
            fillcolor=fill,
        ))
        for image, m in zip(given, matrix, strict=True)
    ])  # fmt: skip
    apart = np.abs(made - wanted.astype(np.float32))
    if method == "nearest":
        assert apart.max() == 0
        return
    # The border too, except where a point falls onto it: single precision may see it outside.
    assert (apart > 1).mean() < 1e-4
    assert (apart > 0).mean() < 0.02


def test_rotation_equals_pillows_rotate():
    # Whole numbers of degrees, quarter turns among them; the matrix is this project's own here.
    given = levels(73, (24, 33, 3))
    degrees = np.arange(-180, 181, 5)
    matrix = jax.jit(lambda d: _geometry.rotation(d, (24, 33)))(jnp.asarray(degrees, jnp.float32))
    warp = jax.jit(functools.partial(_geometry.warp_levels, method="nearest"))
    made = warp(jnp.asarray(given, jnp.float32), matrix)
    wanted = [array(picture(g).rotate(d)) for g, d in zip(given, degrees.tolist(), strict=True)]
    assert (np.asarray(made) != np.stack(wanted)).mean() < 1e-3


@pytest.mark.parametrize(
    ("degrees", "shift", "scale", "shear", "wanted"),
    [  # torchvision 0.29, _get_inverse_affine_matrix with the centre (12, 16)
        (30, (0, 0), 1, (0, 0), [0.866025, 0.5, -6.392305, -0.5, 0.866025, 8.143594]),
        (
            -50,
            (3, -2),
            1.25,
            (10, -20),
            [0.589287, -0.482832, 9.920344, 0.425671, 0.737284, -0.707042],
        ),
        (
            170,
            (-4, 5),
            0.7,
            (25, 15),
            [-1.698328, -0.376969, 33.502979, -0.625038, -1.340398, 49.14867],
        ),
    ],
)
def test_affine_matrices_are_torchvisions(degrees, shift, scale, shear, wanted):
    rows = _geometry.affine(degrees, shift, scale, shear, (32, 24))
    assert np.allclose(np.ravel(rows), wanted, atol=2e-5)


def test_methods_are_checked():
    example = jax.tree.map(lambda x: x[0], batch_of(levels(1, (4, 4, 1))))
    for transform in (geometric.rotate, geometric.elastic, geometric.random_resized_crop):
        with pytest.raises(CnnlabError, match=r"\"bilinear\".*got 'cubic'"):
            jax.eval_shape(functools.partial(transform, method="cubic"), keys.key(0, "a"), example)


@pytest.mark.parametrize("method", FILTERS)
def test_perspective_equals_pillow(method):
    height, width, count = 24, 33, 40
    rng = np.random.default_rng(2)
    given = levels(count, (height, width, 3))
    rectangle = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    ends = rectangle + inwards * rng.integers(0, [width // 4, height // 4], (count, 4, 2))

    def warp(image, end):
        m = _geometry.homography((width - 1, height - 1), end)
        across, down = np.arange(width) + 0.5, np.arange(height) + 0.5
        u, v, s = (_geometry.plane(*row, across, down) for row in m)
        return _geometry.sample_levels(image, u / s, v / s, method=method, fill=9.0)

    made = jax.jit(jax.vmap(warp))(jnp.asarray(given, jnp.float32), jnp.asarray(ends, jnp.float32))
    wanted = []
    for image, end in zip(given, ends, strict=True):
        system, right = [], []
        for (x, y), (u, v) in zip(end, rectangle, strict=True):
            system += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            right += [u, v]
        data = np.linalg.solve(np.array(system, float), np.array(right, float)).tolist()
        wanted.append(np.asarray(picture(image).transform(
            (width, height), Image.Transform.PERSPECTIVE, data, FILTERS[method],
            fillcolor=(9, 9, 9),
        )))  # fmt: skip
    apart = np.abs(np.asarray(made) - np.stack(wanted).astype(np.float32))
    # Points that fall onto a pixel's border, or the image's, do so in single precision only.
    assert (apart > (method != "nearest")).mean() < 2e-3


@pytest.mark.parametrize("method", FILTERS)
def test_resized_parts_equal_pillow(method):
    rng, (height, width) = np.random.default_rng(3), (24, 33)
    count = 60
    given = levels(count, (height, width, 3))
    h, w = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    top[0], left[0], h[0], w[0] = 0, 0, height, width
    resize = jax.vmap(lambda image, *part: _geometry.resize_part(image, part, method))
    made = jax.jit(resize)(jnp.asarray(given, jnp.float32), top, left, h, w)
    wanted = [
        np.asarray(picture(image[i : i + a, j : j + b]).resize((width, height), FILTERS[method]))
        for image, i, j, a, b in zip(given, top, left, h, w, strict=True)
    ]
    apart = np.abs(np.asarray(made) - np.stack(wanted).astype(np.float32))
    if method == "nearest":  # but where a centre lies between two pixels
        ties = [
            (2 * np.arange(n) + 1) * part[:, None] % (2 * n) == 0
            for n, part in ((height, h), (width, w))
        ]
        apart = np.where(ties[0][:, :, None, None] | ties[1][:, None, :, None], 0, apart)
    assert (apart > (method == "bicubic")).mean() < 1e-4 * (method == "bicubic") + 1e-9
    assert (apart > 0).mean() < 1e-3


@pytest.mark.parametrize("sigma", [0.0, 0.4, 2.0, 3.3])
def test_the_noise_is_smoothed_by_the_gaussian_of_scipy(sigma):
    length = 30  # more than its radius
    radius = int(8 * sigma + 1) // 2
    wanted = ndimage.gaussian_filter1d(
        np.eye(length), max(sigma, 1e-3), axis=0, mode="mirror", radius=radius
    )
    assert np.allclose(geometric._smoothing(length, sigma), wanted, atol=1e-6)


def test_elastic_displacements_have_the_size_that_alpha_says():
    # A ramp shows by how much its columns moved. Half a level is what truncation takes.
    width = 48
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[:, None] * 4 + 20, (64, 48, 48, 1))
    transform = jax.jit(augment.compose(("elastic(alpha=40.0, sigma=2.0)",)))
    moved = transform(keys.key(0, "a"), batch_of(ramp))
    inner = (slice(None), slice(12, -12), slice(12, -12), slice(None))
    shift = (np.asarray(moved.images)[inner] * 255 + 0.5 - ramp[inner]) / 4
    weights = np.exp(-0.5 * (np.arange(-8, 9) / 2.0) ** 2)
    weights /= weights.sum()
    wanted = 20 * np.sqrt(1 / 3) * (weights**2).sum()
    assert abs(shift.mean()) < 0.1 * wanted
    assert np.isclose(shift.std(), wanted, rtol=0.05)


def test_moved_images_masks_and_boxes_agree():
    # A filled rectangle, class 3, well inside; a warp may take it over the border all the same.
    side, count = 256, 24
    rng = np.random.default_rng(4)
    top, left = rng.integers(60, 90, (2, count))
    bottom, right = top + rng.integers(80, 110, count), left + rng.integers(80, 110, count)
    masks = np.zeros((count, side, side), np.int32)
    for mask, a, b, c, d in zip(masks, top, left, bottom, right, strict=True):
        mask[a:c, b:d] = 3
    boxes = np.stack([top, left, bottom, right], 1)[:, None].astype(np.float32)
    given = batch_of(
        (masks[..., None] > 0) * 255, masks=jnp.asarray(masks), boxes=jnp.asarray(boxes)
    )
    transforms = (
        ("flip", "vertical_flip", "crop(padding=30)", "translate(x=0.2, y=0.2)"),
        ("affine(degrees=40.0, slant=(15.0, 10.0))",),
        ("perspective(distortion=0.4)",),
        ("random_resized_crop(area=(0.4, 1.0))",),
        ("elastic(alpha=200.0, sigma=8.0)",),
    )
    key = keys.key(1, "a")
    for text in transforms:
        moved = jax.jit(augment.compose(text))(key, given)
        image, mask = np.asarray(moved.images)[..., 0], np.asarray(moved.masks)
        assert set(np.unique(mask)) <= {0, 3}
        assert (mask != masks).any((1, 2)).mean() > 0.3, text
        # Image and mask: apart at most where bilinear mixes the two sides of an edge.
        assert ((image > 0.999) & (mask == 0)).mean() < 2e-4, text
        assert ((image < 0.001) & (mask == 3)).mean() < 2e-4, text
        ratios = []
        for one, box in zip(mask, np.asarray(moved.boxes)[:, 0], strict=True):
            seen = rectangle_around(one == 3)
            # Over the border the clipped box of the corners is more than what is left to see.
            if np.all(seen[:2] > 0) and np.all(seen[2:] < side):
                ratios.append(iou(box, seen))
        assert len(ratios) > 10, text
        assert min(ratios) > 0.97, (text, min(ratios))
        if "flip" in text:
            assert min(ratios) == 1


def rectangle_around(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return np.zeros(4)
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])


def iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    common = np.prod(np.maximum(high - low, 0))
    return common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)


def test_boxes_outside_have_no_area_and_absent_ones_stay_absent():
    box = jnp.array([[10.0, 10.0, 20.0, 20.0]])
    away = _geometry.warp_boxes(box, _geometry.translation(30.0, 0.0), (24, 33))
    assert np.array_equal(away, [[10, 0, 20, 0]])
    made = jax.eval_shape(augment.compose(NAMES), keys.key(0, "a"), batch_of(levels(2, (6, 5, 1))))
    assert made.boxes is None
    assert made.masks is None


def test_crop_fills_and_moves_along():
    given = batch_of(
        np.full((200, 5, 4, 3), 51),
        masks=jnp.ones((200, 5, 4), jnp.int32),
        boxes=jnp.tile(jnp.array([[[0.0, 0.0, 5.0, 4.0]]]), (200, 1, 1)),
    )
    made = jax.jit(augment.compose(("crop(padding=2, fill=0.8)",)))(keys.key(0, "a"), given)
    image, mask = np.asarray(made.images), np.asarray(made.masks)
    inside = mask == 1
    wanted = np.where(inside[..., None], np.asarray(given.images), np.float32(0.8))
    assert np.array_equal(image, wanted)
    sizes = np.asarray(made.boxes)[:, 0]
    assert np.array_equal(np.prod(sizes[:, 2:] - sizes[:, :2], 1), inside.sum((1, 2)))
    assert inside.sum((1, 2)).min() == 6  # two pixels off in both directions


@pytest.mark.parametrize("name", ["rotate", "shear", "translate", "scale"])
def test_parameters_fill_their_ranges_on_both_sides(name, monkeypatch):
    drawn = {}
    original = _geometry.affine

    def seen(degrees, shift, scale, shear, size):
        drawn["all"] = [degrees, *shift, scale, *shear]
        return original(degrees, shift, scale, shear, size)

    monkeypatch.setattr(geometric._geometry, "affine", seen)
    image = batch_of(levels(1, (30, 40, 1)))
    example = jax.tree.map(lambda x: x[0], image)
    ranges = {
        "rotate": ({"degrees": 20.0}, {0: (-20, 20)}),
        "shear": ({"x": 20.0, "y": 10.0}, {4: (-20, 20), 5: (-10, 10)}),
        "translate": ({"x": 0.2, "y": 0.5}, {1: (-8, 8), 2: (-15, 15)}),
        "scale": ({"factors": (0.5, 2.0)}, {3: (0.5, 2.0)}),
    }
    arguments, wanted = ranges[name]

    def one(key):
        getattr(geometric, name)(key, example, **arguments)
        return jnp.stack([jnp.asarray(v, jnp.float32) for v in drawn["all"]])

    values = np.asarray(jax.jit(jax.vmap(one))(keys.per_example(keys.key(0, "a"), 2000)))
    for i, neutral in enumerate((0, 0, 0, 1, 0, 0)):
        if i not in wanted:
            assert np.all(values[:, i] == neutral)
            continue
        low, high = wanted[i]
        assert low <= values[:, i].min() < low + 0.01 * (high - low) + (name == "translate")
        assert high >= values[:, i].max() > high - 0.01 * (high - low) - (name == "translate")
        # The standard error of the mean of 2,000 uniform draws is 0.0065 of the range.
        assert abs(values[:, i].mean() - (low + high) / 2) < 0.03 * (high - low)
        spread = (high - low) / np.sqrt(12)
        assert np.isclose(values[:, i].std(), spread, rtol=0.05)
    if name == "translate":
        assert np.array_equal(values, np.round(values))


def windows(size, area, ratio, count=4000):
    draw = functools.partial(geometric.crop_window, size=size, area=area, ratio=ratio)
    return np.stack(jax.jit(jax.vmap(draw))(keys.per_example(keys.key(0, "a"), count)), 1)


def test_random_resized_crops_have_the_area_and_the_aspect_that_were_asked_for():
    top, left, h, w = windows((300, 400), (0.2, 0.5), (0.5, 2.0)).T
    area = h * w / 120_000
    assert area.min() > 0.195
    assert area.max() < 0.505
    aspect = np.log(w / h)
    # An aspect above 4/3 / 0.5 needs more width than there is only for areas not drawn here.
    assert abs(aspect).max() < np.log(2.02)
    assert abs(area.mean() - 0.35) < 0.01
    assert abs(aspect.mean()) < 0.03
    assert np.isclose(aspect.std(), 2 * np.log(2) / np.sqrt(12), rtol=0.05)
    assert top.min() == left.min() == 0
    assert np.all(top + h <= 300)
    assert np.all(left + w <= 400)
    assert abs(((top + 0.5) / (301 - h)).mean() - 0.5) < 0.03
    assert abs(((left + 0.5) / (401 - w)).mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("size", "ratio", "wanted"),
    [
        ((100, 300), (0.5, 1.0), (0, 100, 100, 100)),
        ((300, 100), (1.0, 2.0), (100, 0, 100, 100)),
    ],
)
def test_what_never_fits_falls_back_to_the_centre(size, ratio, wanted):
    # The whole area at such an aspect is always wider or higher than the image.
    assert np.all(windows(size, (1.0, 1.0), ratio, count=50) == wanted)


def test_perspective_moves_corners_by_up_to_the_distortion(monkeypatch):
    ends = {}
    original = _geometry.homography
    monkeypatch.setattr(
        geometric._geometry,
        "homography",
        lambda start, end: original(start, ends.setdefault("all", end)),
    )
    example = jax.tree.map(lambda x: x[0], batch_of(levels(1, (20, 31, 1))))

    def one(key):
        ends.clear()
        geometric.perspective(key, example, distortion=0.5)
        return ends["all"]

    drawn = np.asarray(jax.jit(jax.vmap(one))(keys.per_example(keys.key(0, "a"), 1000)))
    # Half the width is 15, half the height 10; half of these, rounded down, are 7 and 5.
    x, y = drawn[..., 0], drawn[..., 1]
    for corner, (mirror_x, mirror_y) in enumerate([(0, 0), (1, 0), (1, 1), (0, 1)]):
        across = 30 - x[:, corner] if mirror_x else x[:, corner]
        down = 19 - y[:, corner] if mirror_y else y[:, corner]
        assert np.array_equal(np.unique(across), np.arange(8))
        assert np.array_equal(np.unique(down), np.arange(6))


def test_the_smallest_images_go_through_all():
    shape = (3, 1, 2)
    given = batch_of(
        levels(3, shape),
        masks=jnp.ones((3, *shape[:2]), jnp.int32),
        boxes=jnp.zeros((3, 1, 4)),
    )
    names = ("perspective", "elastic", "random_resized_crop", "crop", "affine")
    names = (*names, "affine(method='bilinear')", "vertical_flip")
    made = jax.jit(augment.compose(names))(keys.key(0, "a"), given)
    assert made.images.shape == given.images.shape
    assert np.isfinite(made.images).all()
    assert np.isfinite(made.boxes).all()


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_alone_and_in_a_batch_and_mapped_are_one(method):
    given = jnp.asarray(levels(8, (16, 17, 3)), jnp.float32)
    matrix = jax.jit(lambda d: _geometry.rotation(d, (16, 17)))(jnp.linspace(-60, 70, 8))
    warp = functools.partial(_geometry.warp_levels, method=method, fill=5.0)
    whole = jax.jit(warp)(given, matrix)
    assert np.array_equal(whole, jax.jit(jax.vmap(warp))(given, matrix))
    assert np.array_equal(whole[3], jax.jit(warp)(given[3], matrix[3]))
    twice = jax.vmap(lambda m: jax.vmap(lambda g: warp(g, m))(given[:2]))
    assert np.array_equal(jax.jit(twice)(matrix[:2])[1, 1], whole[1])


def test_label_maps_keep_classes_beyond_255():
    given = jnp.arange(20, dtype=jnp.int32).reshape(4, 5, 1) + 100_000
    matrix = _geometry.translation(1.0, 0.0)
    moved = jax.jit(functools.partial(_geometry.warp_nearest, fill=-1))(given, matrix)
    assert moved.dtype == jnp.int32
    assert np.array_equal(moved[:, :-1], given[:, 1:])
    assert np.all(np.asarray(moved)[:, -1] == -1)


def test_crop_draws_each_example_its_own():
    example = dataclasses.replace(
        jax.tree.map(lambda x: x[0], batch_of(levels(1, (9, 9, 1)))),
        boxes=jnp.array([[3.0, 3.0, 4.0, 4.0]]),
    )
    moved = jax.vmap(lambda key: crop.apply(key, example, padding=2).boxes[0, :2])
    corners = np.asarray(jax.jit(moved)(keys.per_example(keys.key(0, "a"), 500)))
    assert len(np.unique(corners, axis=0)) == 25
