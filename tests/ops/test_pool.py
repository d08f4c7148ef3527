"""Pooling against lax to the last bit, and against NumPy in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnnlab.ops import pool
from cnnlab.types import CnnlabError

NONE = ((0, 0), (0, 0))

# Unoptimised code, where each program runs once and only its compilation costs.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def lax_max_pool(images, window, strides, padding):
    return lax.reduce_window(
        images,
        images.dtype.type(-np.inf),
        lax.max,
        (1, *window, 1),
        (1, *strides, 1),
        ((0, 0), *padding, (0, 0)),
    )


def max_pool(images, window, strides, padding):
    return pool.max_pool(images, window, strides=strides, padding=padding)


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@st.composite
def poolings(draw_from):
    """(window, strides, padding, height and width) such that at least one window fits."""
    axis = []
    for _ in range(2):
        window = draw_from(st.integers(1, 4))
        pads = tuple(draw_from(st.integers(0, window - 1)) for _ in range(2))
        stride = draw_from(st.one_of(st.just(window), st.integers(1, 5)))
        axis.append((window, stride, pads, draw_from(st.integers(max(1, window - sum(pads)), 9))))
    return tuple(zip(*axis, strict=True))


def value_and_gradient(function, pooling, images, cotangent):
    pooled, pull_back = jax.vjp(lambda x: function(x, *pooling), images)
    return pooled, pull_back(cotangent)[0]


@settings(derandomize=True, deadline=None, max_examples=5)
@given(poolings(), st.integers(0, 2**31 - 1))
@example(((2, 2), (2, 2), NONE, (9, 7)), 0)
@example(((2, 3), (2, 3), ((0, 1), (1, 1)), (7, 8)), 1)
@example(((5, 4), (5, 4), ((2, 0), (0, 3)), (12, 9)), 2)
@example(((3, 3), (2, 2), ((1, 1), (1, 1)), (9, 8)), 3)
@example(((3, 3), (1, 1), ((1, 1), (1, 1)), (7, 7)), 4)
@example(((2, 2), (3, 3), NONE, (8, 9)), 5)
@example(((9, 8), (3, 2), ((4, 1), (0, 7)), (11, 12)), 6)
def test_max_pool_and_gradient_equal_lax_to_the_bit(pooling, seed):
    *pooling, size = pooling
    rng = np.random.default_rng(seed)
    ties = jnp.asarray(rng.integers(-1, 2, (2, *size, 3)), jnp.float32)
    smooth = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    shape = jax.eval_shape(lambda: max_pool(ties, *pooling)).shape
    cotangent = jnp.asarray(rng.normal(size=shape), jnp.float32)

    @jax.jit
    def both(images):
        return [value_and_gradient(f, pooling, images, cotangent) for f in (max_pool, lax_max_pool)]

    for images in (ties, smooth):
        (pooled, gradient), (expected_pooled, expected_gradient) = both(images)
        np.testing.assert_array_equal(pooled, expected_pooled)
        np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_lax_to_the_bit(dtype):
    images, pooling = draw((2, 9, 8, 3), dtype=dtype), ((3, 3), (2, 2), ((1, 1), (1, 1)))
    cotangent = draw((2, 5, 4, 3), 1, dtype)
    ours, theirs = (
        jax.jit(functools.partial(value_and_gradient, f, pooling))(images, cotangent)
        for f in (max_pool, lax_max_pool)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


POOLINGS = {
    "tiles": ((2, 2), (2, 2), NONE),
    "large tiles": ((3, 2), (3, 2), ((0, 1), (1, 0))),
    "overlapping": ((3, 3), (2, 2), ((1, 1), (1, 0))),
}
poolings_of_each_kind = pytest.mark.parametrize(
    "pooling", list(POOLINGS.values()), ids=list(POOLINGS)
)


def loss(function, pooling):
    return lambda x: jnp.sum(jnp.sin(function(x, *pooling)) * function(x, *pooling) ** 2)


@poolings_of_each_kind
def test_forward_mode_and_second_order_equal_lax(pooling):
    images, direction = draw((1, 5, 6, 2)), draw((1, 5, 6, 2), 1)

    @jit_once
    def derivatives(images):
        def of(function):
            f, total = (lambda x: function(x, *pooling)), loss(function, pooling)
            return {
                "jvp": jax.jvp(f, (images,), (direction,)),
                "jacfwd": jax.jacfwd(f)(images),
                "jacrev": jax.jacrev(f)(images),
                "forward over reverse": jax.jvp(jax.grad(total), (images,), (direction,))[1],
                "reverse over forward": jax.grad(lambda x: jax.jvp(total, (x,), (direction,))[1])(
                    images
                ),
                "reverse over reverse": jax.grad(lambda x: jnp.vdot(jax.grad(total)(x), direction))(
                    images
                ),
            }

        return of(max_pool), of(lax_max_pool)

    ours, theirs = derivatives(images)
    np.testing.assert_array_equal(ours["jacfwd"], ours["jacrev"])
    assert np.abs(ours["reverse over reverse"]).max() > 0.1
    for name, expected in theirs.items():
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


@poolings_of_each_kind
def test_gradients_under_vmap_loops_and_remat(pooling):
    stack = draw((3, 2, 6, 5, 2))
    total = loss(max_pool, pooling)
    gradient = jax.grad(total)
    expected = np.stack([jit_once(gradient)(images) for images in stack])

    @jit_once
    def gradients(stack):
        def put(i, into):
            return into.at[i].set(gradient(stack[i]))

        def add(carry, images):
            return carry + total(images), None

        return {
            "vmap": jax.vmap(gradient)(stack),
            "map": lax.map(gradient, stack),
            "fori_loop": lax.fori_loop(0, 3, put, jnp.zeros_like(stack)),
            "gradient of scan": jax.grad(lambda s: lax.scan(add, 0.0, s)[0])(stack),
            "remat": jax.grad(lambda s: jax.checkpoint(jax.vmap(total))(s).sum())(stack),
        }

    for name, actual in gradients(stack).items():
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6, err_msg=name)


@poolings_of_each_kind
def test_backward_keeps_a_byte_a_window(pooling, capsys):
    images = draw((2, 6, 5, 3))
    print_saved_residuals(lambda x: max_pool(x, *pooling).sum(), images)
    (kept,) = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert kept == "u8[{},{},{},{}]".format(*max_pool(images, *pooling).shape)


def test_each_window_has_one_gradient_whatever_the_images_are_fused_with():
    # What makes the images is cheap, so XLA computes it twice, not always rounded alike.
    kernel, bias = draw((9, 1, 1, 1, 64)), draw((1, 1, 1, 64))

    def total(offset, image):
        taps = [kernel[i] * jnp.roll(image, (i // 3, i % 3), (1, 2)) for i in range(9)]
        return jnp.sum(
            max_pool(functools.reduce(jnp.add, taps) + bias + offset, (2, 2), (2, 2), NONE)
        )

    image, offset = (
        jax.random.uniform(jax.random.key(0), (16, 28, 28, 1)),
        jnp.zeros((16, 28, 28, 64)),
    )
    value, by_pixel = jax.jit(jax.value_and_grad(total))(offset, image)
    assert jnp.sum(by_pixel) == 16 * 14 * 14 * 64
    taps = [kernel[i] * jnp.roll(image, (i // 3, i % 3), (1, 2)) for i in range(9)]
    made = functools.reduce(jnp.add, taps) + bias
    np.testing.assert_allclose(jnp.vdot(by_pixel, made), value, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tiles", "overlapping"])
def test_platform_is_chosen_when_lowering(kind):
    function = jax.jit(jax.value_and_grad(loss(max_pool, POOLINGS[kind])))
    images = draw((2, 6, 5, 3))
    for platform, native in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = function.trace(images).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.reduce_window" in text) == native
        assert "select_and_scatter" not in text


def test_exported_program_runs_for_any_batch_on_all_platforms():
    function = jax.jit(jax.grad(loss(max_pool, POOLINGS["overlapping"])))
    (batch,) = export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, 6, 5, 3), jnp.float32)
    exported = export.export(function, platforms=["cpu", "cuda", "tpu"])(shape)
    images = draw((3, 6, 5, 3))
    np.testing.assert_allclose(exported.call(images), function(images), rtol=1e-5, atol=1e-6)


@poolings_of_each_kind
def test_sharded_batch_stays_where_it_is(pooling):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    images = draw((16, 6, 5, 3))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    cotangent = jnp.ones_like(max_pool(images, *pooling))
    function = jax.jit(functools.partial(value_and_gradient, max_pool, pooling))
    inputs = jax.device_put((images, cotangent), sharding)
    outputs = function(*inputs)
    for sharded, whole in zip(outputs, function(images, cotangent), strict=True):
        assert sharded.sharding.is_equivalent_to(sharding, 4)
        np.testing.assert_array_equal(sharded, whole)
    compiled = function.lower(*inputs).compile().as_text()
    assert not any(word in compiled for word in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("window", [(2, 2), (3, 3)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 3)])
def test_infinite_and_undefined_maxima(window, strides):
    images = np.zeros((1, 6, 6, 3))
    images[..., 0], images[:, 2, 3, 1], images[:, 3, 2, 2] = -np.inf, np.inf, np.nan
    pooling, images = (window, strides, ((1, 0), (1, 1))), jnp.asarray(images, jnp.float32)
    cotangent = draw(jax.eval_shape(lambda: max_pool(images, *pooling)).shape)
    (pooled, gradient), (expected_pooled, expected_gradient) = jit_once(
        lambda x: [value_and_gradient(f, pooling, x, cotangent) for f in (max_pool, lax_max_pool)]
    )(images)
    np.testing.assert_array_equal(pooled, expected_pooled)
    np.testing.assert_array_equal(gradient[..., :2], expected_gradient[..., :2])
    defined = np.where(np.isnan(pooled), 0, cotangent)  # lax gives the rest to some pixel
    np.testing.assert_allclose(gradient[..., 2].sum(), defined[..., 2].sum(), rtol=1e-5)


def numpy_mean(images, window, strides, padding, count_include_pad):
    def windows(x):
        x = np.pad(x, ((0, 0), *padding, (0, 0)))
        views = np.lib.stride_tricks.sliding_window_view(x, window, axis=(1, 2))
        return views[:, :: strides[0], :: strides[1]].sum((-2, -1))

    images = np.asarray(images, np.float64)
    count = np.prod(window) if count_include_pad else windows(np.ones_like(images))
    return windows(images) / count


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), None, NONE),
        ((3, 2), (2, 3), ((1, 0), (0, 1))),
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((9, 7), (5, 1), ((0, 8), (6, 0))),
    ],
)
def test_avg_pool_and_gradient_equal_numpy(window, strides, padding, count_include_pad):
    images = draw((2, 9, 8, 3))
    expected = numpy_mean(images, window, strides or window, padding, count_include_pad)
    cotangent = draw(expected.shape, 1)

    @jit_once
    def ours(images):
        pooled, pull_back = jax.vjp(
            lambda x: pool.avg_pool(
                x, window, strides=strides, padding=padding, count_include_pad=count_include_pad
            ),
            images,
        )
        return pooled, pull_back(cotangent)[0]

    pooled, gradient = ours(images)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    # Linear: its transpose is known from what it makes of each single pixel.
    pixels = np.eye(9 * 8).reshape(72, 9, 8, 1)
    columns = numpy_mean(pixels, window, strides or window, padding, count_include_pad)
    by_pixel = np.einsum("pijo,bijc->bpc", columns, np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(gradient, by_pixel.reshape(2, 9, 8, 3), rtol=1e-5, atol=1e-6)


def test_averages_are_summed_in_float32():
    images = jnp.full((1, 64, 64, 2), 1.0078125, jnp.bfloat16)  # a bfloat16 sum would stall at 256
    means = jit_once(lambda x: (pool.global_avg_pool(x), pool.avg_pool(x, (32, 64))))(images)
    for mean in means:
        np.testing.assert_array_equal(mean, np.full(mean.shape, 1.0078125))


@pytest.mark.parametrize("size", [(1, 2), (4, 5), (9, 9)])
def test_global_max_pool_gives_all_to_the_first_maximum(size):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, *size, 3)), jnp.float32)
    cotangent = draw((2, 3), 1)
    pooled, pull_back = jax.vjp(jax.jit(pool.global_max_pool), images)
    flat = np.asarray(images).reshape(2, -1, 3)
    expected = np.zeros_like(flat)
    np.put_along_axis(expected, flat.argmax(1)[:, None], np.asarray(cotangent)[:, None], axis=1)
    np.testing.assert_array_equal(pooled, flat.max(1))
    np.testing.assert_array_equal(pull_back(cotangent)[0], expected.reshape(images.shape))


@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((6, 8), (3, 2)),  # tiles
        ((14, 9), (4, 4)),  # overlapping regions, different ones along each axis
        ((2, 3), (7, 7)),  # enlarged
        ((9, 4), (1, 5)),
        ((5, 6), (5, 6)),
    ],
)
def test_adaptive_avg_pool_and_gradient_equal_numpy(size, out):
    images, cotangent = draw((2, *size, 3)), draw((2, *out, 3), 1)
    expected = np.zeros((2, *out, 3))
    expected_gradient = np.zeros(images.shape)
    for i, j in itertools.product(*map(range, out)):
        # From floor(i n / m) to ceil((i + 1) n / m).
        rows, columns = (
            slice(math.floor(k * n / m), math.ceil((k + 1) * n / m))
            for k, n, m in zip((i, j), size, out, strict=True)
        )
        region = np.float64(images)[:, rows, columns]
        expected[:, i, j] = region.mean((1, 2))
        share = np.float64(cotangent)[:, i, j] / (region.shape[1] * region.shape[2])
        expected_gradient[:, rows, columns] += share[:, None, None]
    pooled, pull_back = jax.vjp(lambda x: pool.adaptive_avg_pool(x, out), images)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull_back(cotangent)[0], expected_gradient, rtol=1e-5, atol=1e-6)
    half = images.astype(jnp.bfloat16)
    pooled = pool.adaptive_avg_pool(half, out)
    assert pooled.dtype == jnp.bfloat16
    in_float32 = pool.adaptive_avg_pool(half.astype(jnp.float32), out)
    np.testing.assert_array_equal(pooled, in_float32.astype(jnp.bfloat16))


IMAGES = jnp.zeros((1, 6, 5, 2))
MAX, AVG = pool.max_pool, pool.avg_pool


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MAX(IMAGES.astype(int), (2, 2)), "int32.*astype"),
        (lambda: pool.global_avg_pool(IMAGES > 0), "bool.*astype"),
        (lambda: pool.global_max_pool(IMAGES[0]), r"\(6, 5, 2\).*images\[None\]"),
        (lambda: AVG(IMAGES[:, :0], (1, 1)), "at least one pixel"),
        (lambda: MAX(IMAGES, (7, 2)), "height 7 does not fit into 6 .*at most 6"),
        (lambda: AVG(IMAGES, (1, 8), padding=((0, 0), (1, 1))), "width 8 .* into 5 .*at most 7"),
        (lambda: MAX(IMAGES, (0, 2)), r"window must be.*got \(0, 2\)"),
        (lambda: MAX(IMAGES, 2), "window must be.*got 2"),
        (lambda: pool.adaptive_avg_pool(IMAGES, (0, 7)), r"size must be.*got \(0, 7\).*\(7, 7\)"),
        (lambda: pool.adaptive_avg_pool(IMAGES[0], (7, 7)), r"images\[None\]"),
        (lambda: MAX(IMAGES, (2, 2), strides=(2, 0)), r"strides must be.*got \(2, 0\)"),
        (lambda: AVG(IMAGES, (2, 2), strides=(2, 1.5)), "strides must be"),
        (lambda: AVG(IMAGES, (2, 2), padding=((0, -1), (0, 0))), "padding must be.*-1.*crop"),
        (lambda: MAX(IMAGES, (2, 2), padding=(1, 1)), "padding must be"),
        (lambda: MAX(IMAGES, (3, 2), padding=((0, 0), (0, 2))), "no maximum.*width 2.*at most 1"),
        (
            lambda: AVG(IMAGES, (2, 2), padding=((2, 0), (0, 0)), count_include_pad=False),
            "no mean.*height 2.*at most 1",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(CnnlabError, match=message):
        call()
