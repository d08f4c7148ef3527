"""Resizing against Pillow, JAX, PyTorch's numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from cnnlab.ops import resize as resize_module
from cnnlab.ops.resize import interpolation_weights, nearest_index, resize
from cnnlab.types import CnnlabError

# Growing and shrinking, one axis each, factors with short and with long periods, sizes of one.
SIZES = [
    ((14, 10), (28, 20)),
    ((12, 14), (24, 4)),
    ((7, 9), (5, 31)),
    ((56, 21), (16, 30)),
    ((37, 40), (11, 17)),
    ((1, 5), (4, 1)),
    ((6, 6), (6, 9)),
]


@pytest.fixture(params=["slices", "product"])
def way(request, monkeypatch):
    """Both ways of applying the weights, whatever the backend and the cost model would choose."""
    monkeypatch.setattr(resize_module, "MAX_SLICES", 64 if request.param == "slices" else 0)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def in_float64(images, size, **options):
    with jax.enable_x64(True):
        resized = jax.jit(lambda x: resize(x, size, **options))
        return np.asarray(resized(jnp.asarray(images, jnp.float64)))


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
@pytest.mark.usefixtures("way")
def test_pillow(source, target, method):
    image = random(*source)
    expected = Image.fromarray(image).resize(
        target[::-1],
        {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[method],
    )
    actual = in_float64(image[..., None], target, method=method)[..., 0]
    rows, columns = (
        # On the border of two pixels Pillow's accumulated rounding decides; ours is exact.
        ((2 * np.arange(m) + 1) * n % (2 * m) != 0) | (method != "nearest")
        for n, m in zip(source, target, strict=True)
    )
    both = np.ix_(rows, columns)
    assert rows.any()
    assert columns.any()
    np.testing.assert_allclose(actual[both], np.asarray(expected)[both], atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("method", "name"), [("bilinear", "linear"), ("bicubic", "cubic")])
def test_jax(method, name, antialias):
    images = random(2, 12, 14, 3)
    actual = resize(jnp.asarray(images), (5, 21), method=method, antialias=antialias)
    expected = jax.image.resize(images, (2, 5, 21, 3), name, antialias=antialias)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


# torch.nn.functional.interpolate (2.13, float64) of this column.
COLUMN = [0.0, 1.0, 4.0, 2.0, 7.0]
PYTORCH = {
    ("bicubic", "edges", 8): [
        -0.09283447265625, 0.18756103515625, 1.19573974609375, 3.39483642578125,
        3.495849609375, 1.901611328125, 4.689453125, 7.46417236328125,
    ],
    ("bicubic", "centres", 8): [
        0.0, 0.26530612244897966, 1.4679300291545196, 3.470845481049562,
        3.5816326530612295, 1.8877551020408156, 3.889212827988336, 7.0,
    ],
    ("bilinear", "edges", 8): [0.0, 0.4375, 1.1875, 3.0625, 3.375, 2.125, 4.8125, 7.0],
    ("bilinear", "centres", 8): [
        0.0, 0.5714285714285714, 1.4285714285714284, 3.1428571428571423,
        3.428571428571429, 2.2857142857142865, 4.142857142857142, 7.0,
    ],
    ("bicubic", "edges", 3): [0.14814814814814725, 4.0, 5.314814814814818],
    ("bicubic", "centres", 3): [0.0, 4.0, 7.0],
    ("bilinear", "edges", 3): [0.33333333333333337, 4.0, 5.333333333333335],
    ("nearest", "edges", 8): [0.0, 0.0, 1.0, 4.0, 4.0, 2.0, 7.0, 7.0],
    ("nearest", "edges", 3): [0.0, 4.0, 7.0],
}  # fmt: skip
PYTORCH_ANTIALIAS = {
    ("bicubic", 8): [
        -0.07195571955719557, 0.2437492864482247, 1.1417236328125, 3.3646240234375,
        3.50927734375, 1.94189453125, 4.925333942230848, 7.359778597785978,
    ],
    ("bicubic", 3): [0.384615384615385, 2.8046511627906976, 4.953846153846156],
    ("bilinear", 3): [0.4285714285714289, 2.8888888888888893, 4.8571428571428585],
}  # fmt: skip


@pytest.mark.parametrize("case", PYTORCH)
@pytest.mark.usefixtures("way")
def test_pytorch(case):
    method, align, length = case
    actual = in_float64(
        np.tile(np.asarray(COLUMN)[:, None, None], (1, 2, 1)),
        (length, 2),
        method=method,
        align=align,
        antialias=False,
        outside="repeat",
        cubic_coefficient=-0.75,
    )
    np.testing.assert_allclose(actual[:, 0, 0], PYTORCH[case], atol=1e-12)


@pytest.mark.parametrize("case", PYTORCH_ANTIALIAS)
def test_pytorch_antialias(case):
    method, length = case
    actual = in_float64(np.asarray(COLUMN)[:, None, None], (length, 1), method=method)
    np.testing.assert_allclose(actual[:, 0, 0], PYTORCH_ANTIALIAS[case], atol=1e-12)


@pytest.mark.parametrize("align", ["edges", "centres"])
def test_polynomials_are_reproduced(align):
    # Keys' filter with a = -1/2 is exact for parabolas, the triangle for straight lines.
    n, m = 11, 27
    at = (np.arange(m) + 0.5) * n / m - 0.5 if align == "edges" else np.linspace(0, n - 1, m)
    options = {"antialias": True, "align": align, "outside": "drop", "cubic_coefficient": -0.5}
    cubic = interpolation_weights(n, m, method="bicubic", **options)
    linear = interpolation_weights(n, m, method="bilinear", **options)
    inner = (at >= 1) & (at <= n - 2)
    pixels = np.arange(n)
    np.testing.assert_allclose((cubic @ pixels**2)[inner], (at**2)[inner], atol=1e-11)
    inner = (at >= 0) & (at <= n - 1)
    np.testing.assert_allclose((linear @ (3 * pixels - 1))[inner], (3 * at - 1)[inner], atol=1e-11)
    np.testing.assert_allclose(cubic.sum(1), 1, atol=1e-14)


def test_nearest_moves_values_only():
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 255, (2, 6, 8, 1)), jnp.uint8)
    for size in [(12, 16), (3, 4), (2, 3), (9, 5)]:
        small = resize(labels, size, method="nearest")
        rows, columns = (
            np.floor((np.arange(m) + 0.5) * n / m).astype(int)
            for n, m in zip((6, 8), size, strict=True)
        )
        assert small.dtype == jnp.uint8
        np.testing.assert_array_equal(small, np.asarray(labels)[:, rows][:, :, columns])
    np.testing.assert_array_equal(nearest_index(5, 9, align="centres")[[0, 4, 8]], [0, 2, 4])


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_the_same_size_is_the_same_bits(method):
    images = jnp.asarray(random(2, 5, 7, 3)).at[0, 0, 0].set(jnp.nan)
    np.testing.assert_array_equal(resize(images, (5, 7), method=method), images)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
@pytest.mark.usefixtures("way")
def test_derivatives(method):
    rng = np.random.default_rng(2)
    x, v = rng.normal(size=(2, 2, 6, 4, 2))
    # The gradient and (forward over reverse) the Hessian of sum(resize(x) ** 3) in closed form.
    rows, columns = (in_float64(np.eye(n)[..., None], (m, n), method=method)[..., 0] for n, m in
                     ((6, 9), (4, 2)))  # fmt: skip
    y, u = (np.einsum("hH,wW,bHWc->bhwc", rows, columns, a) for a in (x, v))
    gradient, hessian = (
        np.einsum("hH,wW,bhwc->bHWc", rows, columns, a) for a in (3 * y**2, 6 * y * u)
    )
    with jax.enable_x64(True):
        grad = jax.grad(lambda x: jnp.sum(resize(x, (9, 2), method=method) ** 3))
        actual = jax.jit(lambda x, v: jax.jvp(grad, (x,), (v,)))(jnp.asarray(x), jnp.asarray(v))
    np.testing.assert_allclose(actual[0], gradient, atol=1e-12)
    np.testing.assert_allclose(actual[1], hessian, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_transformations():
    images = jnp.asarray(random(3, 2, 8, 9, 2))

    def shrink(x):
        return resize(x, (4, 15), method="bicubic")

    one = jax.jit(shrink)
    expected = jnp.stack([jnp.stack([one(image) for image in row]) for row in images])
    looped = jax.jit(lambda x: jax.lax.map(shrink, x))
    exported = export.export(jax.jit(jax.vmap(shrink)))(images)
    for actual in (one(images), looped(images), exported.call(images)):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_a_sharded_batch_stays_where_it_is():
    images = jnp.asarray(random(8, 6, 6, 2))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def grow(x):
        return resize(x, (12, 9), method="bilinear")

    sharded = jax.device_put(images, sharding)
    compiled = jax.jit(grow).lower(sharded).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled(sharded).sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(compiled(sharded), jax.jit(grow)(images), atol=1e-6)


def test_half_precision_is_computed_in_float32():
    images = random(1, 12, 12, 1)
    half = jnp.asarray(images, jnp.bfloat16)
    actual = resize(half, (5, 5), method="bilinear")
    exact = resize(half.astype(jnp.float32), (5, 5), method="bilinear")
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("images", "size", "options", "message"),
    [
        (np.zeros((4, 4)), (2, 2), {"method": "nearest"}, r"\[\.\.\., H, W, C\].*\(4, 4\)"),
        (np.zeros((4, 4, 1)), (2, 0), {"method": "nearest"}, r"at least 1.*\(2, 0\)"),
        (np.zeros((4, 4, 1)), (2, 2), {"method": "cubic"}, "bicubic.*'cubic'"),
        (np.zeros((4, 4, 1)), (2, 2), {"method": "nearest", "align": "corners"}, "'corners'"),
        (np.zeros((4, 4, 1)), (1, 2), {"method": "nearest", "align": "centres"}, "at least 2"),
        (np.zeros((4, 4, 1)), (2, 2), {"method": "bilinear", "outside": "zero"}, "'zero'"),
        (np.zeros((4, 4, 1)), (2, 2), {"method": "bicubic", "cubic_coefficient": 0.5}, "-1 to 0"),
        (np.zeros((4, 4, 1), np.uint8), (2, 2), {"method": "bilinear"}, "uint8: convert"),
    ],
)
def test_errors(images, size, options, message):
    with pytest.raises(CnnlabError, match=message):
        resize(jnp.asarray(images), size, **options)
