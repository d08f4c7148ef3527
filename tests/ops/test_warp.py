"""Warps against scipy.ndimage, Pillow, PyTorch's numbers and exact turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from scipy import ndimage

from cnnlab.ops import warp
from cnnlab.types import CnnlabError

SCIPY = {"constant": "grid-constant", "edge": "nearest", "reflect": "reflect", "wrap": "grid-wrap"}
STATIC = ("method", "size", "edge", "cubic_coefficient")
affine, homography = (jax.jit(f, static_argnames=STATIC) for f in (warp.affine, warp.homography))
sample, flow = (
    jax.jit(f, static_argnames=("method", "edge", "cubic_coefficient"))
    for f in (warp.sample, warp.flow)
)
METHODS = ("nearest", "bilinear", "bicubic")
IDENTITY = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


@functools.cache
def matrices(count, size):
    """Turned, sheared, stretched and shifted."""
    rng = np.random.default_rng(3)
    middle = warp.centre(size)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, count), jnp.float32)  # noqa: E731
    return warp.compose(
        warp.rotation(draw(-3, 3), centre=middle),
        warp.shear(draw(-0.3, 0.3), draw(-0.3, 0.3), centre=middle),
        warp.scaling(draw(0.7, 1.5), draw(0.7, 1.5), centre=middle),
        warp.translation(draw(-2, 2), draw(-2, 2)),
    )


@pytest.mark.parametrize("edge", SCIPY)
@pytest.mark.parametrize(("method", "order"), [("nearest", 0), ("bilinear", 1)])
@pytest.mark.parametrize("size", [(7, 5), (1, 2)])
def test_scipy(size, method, order, edge):
    rng = np.random.default_rng(1)
    image = rng.random(size)
    # Up to three images away, and on all pixel centres, where rounding may not choose a side.
    near = np.stack(np.meshgrid(*(np.arange(-n, 2.0 * n) for n in size), indexing="ij"), -1)
    far = rng.uniform(-3, 4, (40, 50, 2)) * size
    for coordinates in (near, far):
        expected = ndimage.map_coordinates(
            image, np.moveaxis(coordinates, -1, 0), order=order, mode=SCIPY[edge], cval=0.3
        )
        with jax.enable_x64(True):
            actual = sample(
                jnp.asarray(image)[..., None], jnp.asarray(coordinates),
                method=method, edge=edge, fill=0.3,
            )  # fmt: skip
        np.testing.assert_allclose(actual[..., 0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "resample"),
    [("nearest", Image.NEAREST), ("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)],
)
def test_pillow(method, resample):
    size = (20, 24)
    image = random(*size)
    expected, interior = [], []
    for matrix in np.asarray(matrices(4, size), np.float64):
        # Pillow's (x, y), from the corner of the image, with the axes exchanged.
        (a, b, c), (d, e, f) = matrix[::-1, [1, 0, 2]]
        data = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
        expected.append(
            Image.fromarray(image).transform(size[::-1], Image.AFFINE, data, resample=resample)
        )
        pixels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
        at = pixels @ matrix[:, :2].T + matrix[:, 2]
        inside = np.all((at > 1.01) & (at < np.asarray(size) - 2.01), -1)
        tie = np.any(np.abs(at - np.floor(at) - 0.5) < 1e-4, -1) & (method == "nearest")
        interior.append(inside & ~tie)
    actual = affine(
        jnp.asarray(image)[..., None], matrices(4, size), method=method, cubic_coefficient=-1.0
    )[..., 0]
    interior = np.stack(interior)
    assert interior.sum() > 400
    np.testing.assert_allclose(
        np.asarray(actual)[interior], np.stack([np.asarray(e) for e in expected])[interior],
        atol=2e-5,
    )  # fmt: skip


def test_pytorch_bicubic():
    # torch.nn.functional.grid_sample (2.13, float64, align_corners=False) of this image.
    image = np.asarray([[0.0, 1, 4, 2], [2, 4, 1, 0], [1, 4, 2, 2]])
    at = np.asarray([[[0.3, 1.6], [-0.4, 2.2], [1.9, 3.4], [-1.2, 0.5]]])
    expected = {
        "constant": [3.243673000000003, 2.8105919999999993, 1.181601000000001, -0.021],
        "edge": [2.8992520000000024, 4.3032, 1.8143730000000013, 0.21875],
        "reflect": [2.8992520000000024, 4.548000000000001, 1.8089550000000012, 0.772],
    }
    with jax.enable_x64(True):
        for edge, values in expected.items():
            actual = sample(
                jnp.asarray(image)[..., None], jnp.asarray(at),
                method="bicubic", edge=edge, cubic_coefficient=-0.75,
            )  # fmt: skip
            np.testing.assert_allclose(actual[0, :, 0], values, atol=1e-12)


def test_bicubic_reproduces_parabolas():
    rows, columns = np.meshgrid(np.arange(9.0), np.arange(8.0), indexing="ij")

    def surface(row, column):
        return row**2 - 0.5 * row * column + 2 * column**2 + 3

    at = np.random.default_rng(0).uniform(1, 6, (3, 4, 2))
    with jax.enable_x64(True):
        image = jnp.asarray(surface(rows, columns))[..., None]
        actual = sample(image, jnp.asarray(at), method="bicubic")[..., 0]
    np.testing.assert_allclose(actual, surface(at[..., 0], at[..., 1]), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("edge", SCIPY)
def test_identity_is_exact(method, edge):
    images = jnp.asarray(random(2, 5, 6, 3))
    options = {"method": method, "edge": edge, "fill": 0.1}
    np.testing.assert_array_equal(affine(images, IDENTITY, **options), images)
    np.testing.assert_array_equal(flow(images, jnp.zeros((5, 6, 2)), **options), images)
    np.testing.assert_array_equal(homography(images, jnp.eye(3), **options), images)


def test_what_the_matrices_do_is_what_their_names_say():
    image = jnp.asarray(random(6, 6, 2))
    middle = warp.centre((6, 6))

    def seen(matrix, method="nearest"):
        return np.asarray(affine(image, matrix, method=method))

    quarter = warp.rotation(np.pi / 2, centre=middle)
    np.testing.assert_array_equal(seen(quarter), np.rot90(image))
    np.testing.assert_allclose(seen(quarter, "bilinear"), np.rot90(image), atol=2e-6)
    moved = np.zeros_like(image)
    moved[2:, :5] = image[:4, 1:]
    np.testing.assert_array_equal(seen(warp.translation(2, -1)), moved)
    np.testing.assert_array_equal(seen(warp.scaling(1, -1, centre=middle)), image[:, ::-1])
    double = seen(warp.scaling(2, 2, centre=(-0.5, -0.5)))
    np.testing.assert_array_equal(double, np.repeat(np.repeat(image, 2, 0), 2, 1)[:6, :6])
    slanted = seen(warp.shear(0, 1, centre=(2, 0)))
    for row in range(6):
        shift = row - 2
        expected = np.zeros((6, 2), np.float32)
        source = np.arange(6) - shift
        inside = (source >= 0) & (source < 6)
        expected[inside] = np.asarray(image)[row, source[inside]]
        np.testing.assert_array_equal(slanted[row], expected)
    np.testing.assert_array_equal(seen(warp.shear(1, 0, centre=(0, 2))), np.asarray(
        affine(image.swapaxes(0, 1), warp.shear(0, 1, centre=(2, 0)), method="nearest")
    ).swapaxes(0, 1))  # fmt: skip
    # Composed in the order of application: first the turn, then the move.
    both = seen(warp.compose(quarter, warp.translation(2, -1)))
    turned = affine(image, quarter, method="nearest")
    np.testing.assert_array_equal(both, affine(turned, warp.translation(2, -1), method="nearest"))


def test_homography():
    image = jnp.asarray(random(9, 8, 1))
    matrix = jnp.asarray([[1.1, 0.1, -0.5], [-0.1, 0.9, 0.4], [0.01, 0.02, 1.0]])
    pixels = np.stack(np.meshgrid(np.arange(5), np.arange(7), [1], indexing="ij"), -1)[:, :, 0]
    u, v, s = np.moveaxis(pixels @ np.asarray(matrix, np.float64).T, -1, 0)
    expected = ndimage.map_coordinates(
        np.asarray(image, np.float64)[..., 0], [u / s, v / s], order=1, mode="grid-constant"
    )
    actual = homography(image, matrix, method="bilinear", size=(5, 7))[..., 0]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_fill_per_channel():
    image = jnp.asarray(random(4, 4, 3))
    colour = jnp.asarray([0.1, 0.2, 0.3])
    away = affine(image, warp.translation(0.0, 2.5), method="bilinear", fill=colour)
    expected = np.stack(
        [affine(image[..., k : k + 1], warp.translation(0.0, 2.5), method="bilinear",
                fill=float(colour[k]))[..., 0] for k in range(3)], -1,
    )  # fmt: skip
    np.testing.assert_array_equal(away, expected)
    np.testing.assert_array_equal(away[:, :2], np.broadcast_to(colour, (4, 2, 3)))


@pytest.mark.parametrize(
    ("method", "edge"), [*(("bilinear", edge) for edge in SCIPY), ("bicubic", "reflect")]
)
def test_derivatives(method, edge):
    """Gradient and Hessian times vector, both against differences of values in float64."""
    rng = np.random.default_rng(5)
    # Away from the kinks at pixel centres, half of it outside the image.
    at = rng.integers(-3, 6, (3, 4, 2)) + rng.uniform(0.1, 0.4, (3, 4, 2))
    point = (rng.random((4, 3, 2)), at, np.asarray([0.2, 0.7]))
    along = tuple(rng.normal(size=p.shape) for p in point)

    def value(arguments):
        image, at, fill = arguments
        sampled = warp.sample(image, at, method=method, edge=edge, fill=fill)
        return jnp.sum(sampled**2)

    @jax.jit
    def derivatives(arguments, along):
        grad, hessian = jax.jvp(jax.grad(value), (arguments,), (along,))
        return value(arguments), jax.jvp(value, (arguments,), (along,))[1], grad, hessian

    step = 1e-5
    with jax.enable_x64(True):
        low, here, high = (
            derivatives(tuple(p + k * step * t for p, t in zip(point, along, strict=True)), along)
            for k in (-1, 0, 1)
        )
        low, here, high = jax.tree.map(np.asarray, (low, here, high))
    slope = (high[0] - low[0]) / (2 * step)
    np.testing.assert_allclose(here[1], slope, rtol=1e-7)
    reverse = sum(np.sum(g * t) for g, t in zip(here[2], along, strict=True))
    np.testing.assert_allclose(reverse, slope, rtol=1e-7)
    for after, before, hessian in zip(high[2], low[2], here[3], strict=True):
        np.testing.assert_allclose(hessian, (after - before) / (2 * step), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_batches_broadcast(method):
    images, turns = jnp.asarray(random(3, 8, 9, 2)), matrices(3, (8, 9))

    @jax.jit
    def turn(image, matrix):
        return warp.affine(image, matrix, method=method, edge="reflect", size=(5, 7))

    def close(actual, expected):
        # Fused otherwise, a coordinate may be rounded otherwise: no jump to another pixel here.
        np.testing.assert_allclose(actual, np.stack(expected), atol=1e-5)

    pairs = [turn(i, m) for i, m in zip(images, turns, strict=True)]
    close(turn(images, turns), pairs)
    close(jax.vmap(turn)(images, turns), pairs)
    close(jax.jit(lambda a: jax.lax.map(lambda both: turn(*both), a))((images, turns)), pairs)
    close(turn(images[0], turns), [turn(images[0], m) for m in turns])
    close(turn(images, turns[0]), [turn(i, turns[0]) for i in images])
    grid = turn(images[:, None], turns[None])
    assert grid.shape == (3, 3, 5, 7, 2)
    close(grid[2], [turn(images[2], m) for m in turns])


def test_labels_and_half_precision():
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 255, (5, 5, 1)), jnp.uint8)
    turned = affine(labels, warp.rotation(np.pi / 2, centre=(2, 2)), method="nearest", fill=255)
    assert turned.dtype == jnp.uint8
    np.testing.assert_array_equal(turned, np.rot90(labels))
    half = jnp.asarray(random(6, 6, 1), jnp.bfloat16)
    matrix = matrices(1, (6, 6))[0]
    actual = affine(half, matrix, method="bilinear")
    exact = affine(half.astype(jnp.float32), matrix, method="bilinear")
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


def test_export_and_a_sharded_batch():
    images, turns = jnp.asarray(random(8, 6, 6, 2)), matrices(8, (6, 6))

    @jax.jit
    def turn(images, turns):
        return warp.affine(images, turns, method="bilinear", edge="edge")

    expected = turn(images, turns)
    exported = export.export(turn)(images, turns)
    np.testing.assert_allclose(exported.call(images, turns), expected, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    operands = jax.device_put((images, turns), sharding)
    compiled = turn.lower(*operands).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(*operands), expected, atol=1e-5)


PIXELS = jnp.zeros((4, 4, 3))
GRID = jnp.zeros((2, 2, 2))


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (sample, (PIXELS[0], GRID), {}, r"\[\.\.\., H, W, C\].*\(4, 3\)"),
        (sample, (PIXELS, GRID[0]), {}, r"\[\.\.\., h, w, 2\].*\(2, 2\)"),
        (sample, (PIXELS, GRID), {"method": "cubic"}, "bicubic.*'cubic'"),
        (sample, (PIXELS, GRID), {"edge": "mirror"}, "reflect.*'mirror'"),
        (sample, (PIXELS, GRID), {"fill": (0.0, 1.0)}, r"one a channel \(3\).*\(2,\)"),
        (sample, (PIXELS, GRID), {"cubic_coefficient": 2.0}, "-1 to 0, got 2.0"),
        (sample, (PIXELS.astype(jnp.uint8), GRID), {}, "uint8: convert"),
        (
            sample,
            (jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 2, 2, 2))),
            {},
            r"broadcast.*\(2, 4, 4, 3\).*\(3, 2, 2, 2\)",
        ),
        (affine, (PIXELS, jnp.eye(3)), {}, r"\[\.\.\., 2, 3\].*\(3, 3\)"),
        (affine, (PIXELS, IDENTITY), {"size": (0, 3)}, r"at least 1.*\(0, 3\)"),
        (homography, (PIXELS, IDENTITY), {}, r"\[\.\.\., 3, 3\].*\(2, 3\)"),
        (flow, (PIXELS, GRID), {}, r"\[\.\.\., H, W, 2\].*\(4, 4, 3\).*\(2, 2, 2\)"),
    ],
)
def test_errors(function, arguments, options, message):
    with pytest.raises(CnnlabError, match=message):
        function(*arguments, **({"method": "bilinear"} | options))


def test_composing_nothing_is_an_error():
    with pytest.raises(CnnlabError, match="at least one matrix"):
        warp.compose()
