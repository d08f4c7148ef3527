"""Convolution: every algorithm and every derivative against direct sums in float64, and lax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import signal

from cnnlab import backend
from cnnlab.ops import conv_algorithms as algorithms
from cnnlab.ops import conv_primitive
from cnnlab.ops.conv import conv, conv_transpose, middle_mean
from cnnlab.ops.conv_algorithms import Face, Spec
from cnnlab.types import CnnlabError

# One for each algorithm: channels in, out, groups, kernel, strides, padding, dilation.
ALGORITHMS = {
    "dense": (3, 5, 1, (2, 4), (2, 3), ((0, 2), (1, 0)), (2, 1)),
    "one channel": (1, 4, 1, (3, 2), (2, 1), "SAME", (1, 2)),
    "depthwise": (2, 4, 2, (3, 2), (2, 1), ((-1, 3), (2, -1)), (1, 1)),
    "groups": (4, 6, 2, (2, 2), (1, 1), "VALID", (1, 2)),
    "few from many, long rows": (9, 2, 1, (3, 2), (1, 1), ((1, 0), (-1, 2)), (2, 1)),
    "few from many, short rows": (9, 2, 1, (2, 4), (1, 1), "SAME", (1, 1)),
    "many from few": (2, 9, 1, (3, 3), (2, 1), ((0, 2), (1, -1)), (1, 2)),
    "many from many": (9, 8, 1, (4, 3), (1, 1), ((2, -1), (0, 3)), (1, 2)),
    "as large as the images": (3, 5, 1, (9, 8), (1, 1), "VALID", (1, 1)),
    "pointwise": (3, 5, 1, (1, 1), (2, 1), ((1, 0), (0, 1)), (1, 1)),
}


def sample(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def by_lax(images, kernel, strides, padding, dilation, groups):
    spatial = "DHW"[-(images.ndim - 2) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


def pair(name, dtype=np.float32):
    channels, features, groups, window, strides, padding, dilation = ALGORITHMS[name]
    fields = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    images = sample(0, 2, 9, 8, channels, dtype=dtype)
    kernel = sample(1, *window, channels // groups, features, dtype=dtype)
    return functools.partial(conv, **fields), functools.partial(by_lax, **fields), images, kernel


def close(actual, expected, tolerance):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in leaves:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(float(np.abs(b).max(initial=0)), 1e-30)
        assert np.abs(np.asarray(a) - np.asarray(b)).max(initial=0) <= tolerance * scale


@st.composite
def problems(draw):
    rank = draw(st.sampled_from((2, 2, 2, 1, 3)))

    def axes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    dilation, window = axes(1, 2), axes(1, 4 if rank < 3 else 2)
    padding = tuple((draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in range(rank))
    size = tuple(
        max(n, d * (k - 1) + 1 - low - high)
        for n, k, d, (low, high) in zip(
            axes(2, 9 if rank < 3 else 4), window, dilation, padding, strict=True
        )
    )
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    inner, outer = (draw(st.sampled_from((1, 2, 3, 9))) for _ in range(2))
    batch = draw(st.sampled_from((2, 2, 35)))
    fields = {"strides": axes(1, 3), "padding": padding, "dilation": dilation, "groups": groups}
    return (batch, *size, groups * inner), (*window, inner, groups * outer), fields


def direct(images, kernel, cotangent, strides, padding, dilation, groups):
    """Result and both gradients, tap by tap and group by group, in float64."""
    rank = images.ndim - 2
    crops = [(0, 0), *((max(-a, 0), max(-b, 0)) for a, b in padding), (0, 0)]
    pads = [(0, 0), *((max(a, 0), max(b, 0)) for a, b in padding), (0, 0)]
    inside = tuple(slice(a, n - b) for n, (a, b) in zip(images.shape, crops, strict=True))
    padded = np.pad(images[inside], pads)
    padded_gradient, result = np.zeros_like(padded), np.zeros_like(cotangent)
    kernel_gradient = np.zeros_like(kernel)
    inner, outer = kernel.shape[-2], kernel.shape[-1] // groups
    for tap in itertools.product(*map(range, kernel.shape[:rank])):
        seen = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, cotangent.shape[1:-1], strides, strict=True)
        )
        for g in range(groups):
            into, out = slice(g * inner, (g + 1) * inner), slice(g * outer, (g + 1) * outer)
            here = (slice(None), *seen, into)
            result[..., out] += padded[here] @ kernel[tap][:, out]
            padded_gradient[here] += cotangent[..., out] @ kernel[tap][:, out].T
            kernel_gradient[tap][:, out] += np.tensordot(
                padded[here], cotangent[..., out], (range(rank + 1), range(rank + 1))
            )
    gradient = np.zeros_like(images)
    kept = tuple(slice(a, n - b) for n, (a, b) in zip(padded.shape, pads, strict=True))
    gradient[inside] = padded_gradient[kept]
    return result, gradient, kernel_gradient


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(problems())
def test_value_and_gradients_equal_direct_sums(problem):
    shape, window, fields = problem
    images, kernel = sample(0, *shape), sample(1, *window)
    made = jax.eval_shape(functools.partial(conv, **fields), images, kernel)
    cotangent = sample(2, *made.shape)

    def all_three(images, kernel, cotangent):
        result, pull_back = jax.vjp(functools.partial(conv, **fields), images, kernel)
        return result, *pull_back(cotangent)

    wide = [np.asarray(a, np.float64) for a in (images, kernel, cotangent)]
    expected = direct(*wide, **fields)
    close(
        jax.jit(all_three)(images, kernel, cotangent),
        [e.astype(np.float32) for e in expected],
        2e-6,
    )


def transformed(function, images, kernel):
    """What every transformation makes of it."""

    def loss(images, kernel):
        return jnp.sum(jnp.tanh(function(images, kernel)))

    by_kernel = jax.grad(loss, 1)
    two = jnp.stack([images, images + 1])
    kernels = jnp.stack([kernel, 2 * kernel])
    three = jnp.stack([kernel, kernel + 1, kernel + 2])
    return {
        "value": function(images, kernel),
        "reverse": jax.grad(loss, (0, 1))(images, kernel),
        "forward": jax.jvp(function, (images, kernel), (images + 1, kernel - 1)),
        "jacfwd": jax.jacfwd(lambda k: jnp.sum(function(images, k), (0, 1, 2)))(kernel),
        "forward over reverse": jax.jvp(jax.grad(loss, (0, 1)), (images, kernel), (images, kernel)),
        "reverse over reverse": jax.grad(
            lambda k: jnp.sum(jax.grad(loss)(images, k) * images) + jnp.sum(by_kernel(images, k))
        )(kernel),
        "reverse over forward": jax.grad(
            lambda x: jnp.sum(jax.jvp(lambda k: function(x, k), (kernel,), (kernel,))[1] ** 2)
        )(images),
        "vmap both": jax.vmap(jax.grad(loss, (0, 1)))(two, kernels),
        "vmap images": jax.vmap(jax.grad(loss, (0, 1)), (0, None))(two, kernel),
        "vmap kernels": jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(images, kernels),
        "vmap twice": jax.vmap(jax.vmap(jax.grad(loss, 1), (None, 0)), (0, None))(two, three),
        "vmap another axis": jax.vmap(function, (1, 3), 2)(
            jnp.moveaxis(two, 0, 1), jnp.moveaxis(kernels, 0, 3)
        ),
        "remat": jax.grad(jax.checkpoint(loss), (0, 1))(images, kernel),
        "map": lax.map(lambda a: jax.grad(loss, (0, 1))(*a), (two, kernels)),
        "loop": lax.fori_loop(0, 2, lambda _, k: k - 0.1 * by_kernel(images, k), kernel),
        "scan": jax.grad(lambda k: lax.scan(lambda c, x: (c + loss(x, k), None), 0.0, two)[0])(
            kernel
        ),
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_transformation_equals_that_of_lax(name):
    ours, theirs, images, kernel = pair(name)
    with jax.enable_x64(True):
        images, kernel = (jnp.asarray(np.asarray(a, np.float64)) for a in (images, kernel))
        close(
            jax.jit(functools.partial(transformed, ours))(images, kernel),
            jax.jit(functools.partial(transformed, theirs))(images, kernel),
            1e-12,
        )


@pytest.mark.parametrize("piece", [1, 10_000, 1 << 30])
@pytest.mark.parametrize(
    ("shape", "window", "padding", "dilation"),
    [
        ((5, 11, 8), (4, 8, 9), ((3, -2),), (2,)),
        ((5, 6, 7, 9), (3, 2, 9, 8), ((1, 1), (-1, 2)), (1, 2)),
        ((4, 6, 1, 8), (3, 1, 8, 8), ((1, 1), (0, 0)), (1, 1)),
        ((3, 4, 5, 3, 8), (2, 3, 2, 8, 8), ((0, 1), (1, 1), (2, 0)), (2, 1, 1)),
    ],
    ids=["1-D", "2-D", "size-one edge", "3-D"],
)
def test_crossed_taps_give_the_kernel_gradient(
    shape, window, padding, dilation, piece, monkeypatch
):
    ones = (1,) * len(padding)
    images, kernel = sample(0, *shape), sample(1, *window)
    monkeypatch.setattr(backend, "LARGEST_PIECE", piece)
    spec = Spec(shape[1:-1], window[:-2], ones, padding, dilation, 1)
    cotangent = sample(2, shape[0], *spec.result, window[-1])
    assert algorithms._crossing_pays(images.shape, cotangent.shape, spec)
    made = jax.jit(functools.partial(algorithms.cpu, Face.KERNEL, spec=spec))
    text = made.lower(images, cotangent).as_text()
    assert "dot_general" in text
    assert "convolution" not in text
    wide = [np.asarray(a, np.float64) for a in (images, kernel, cotangent)]
    _, _, expected = direct(*wide, strides=ones, padding=padding, dilation=dilation, groups=1)
    close(made(images, cotangent), expected.astype(np.float32), 2e-6)


@pytest.mark.parametrize(
    ("shape", "window", "strides", "padding", "dilation"),
    [
        ((5, 11, 8), (4, 8, 9), (3,), ((3, -2),), (2,)),
        ((5, 8, 9, 8), (3, 3, 8, 10), (2, 2), ((1, 1), (1, 0)), (1, 1)),
        ((3, 8, 8, 9), (2, 2, 9, 8), (2, 2), ((0, 0), (0, 0)), (1, 1)),
        ((4, 6, 1, 8), (3, 1, 8, 8), (1, 2), ((1, 1), (0, 0)), (1, 1)),
        ((3, 4, 5, 6, 8), (2, 3, 2, 8, 8), (2, 1, 3), ((0, 1), (1, 1), (2, 0)), (2, 1, 1)),
    ],
    ids=["1-D", "2-D", "patches", "size-one edge", "3-D"],
)
def test_rows_of_taps_give_the_kernel_gradient_at_any_stride(
    shape, window, strides, padding, dilation
):
    images, kernel = sample(0, *shape), sample(1, *window)
    spec = Spec(shape[1:-1], window[:-2], strides, padding, dilation, 1)
    cotangent = sample(2, shape[0], *spec.result, window[-1])
    assert algorithms._rows_pay(images.shape, cotangent.shape, spec)
    made = jax.jit(functools.partial(algorithms.cpu, Face.KERNEL, spec=spec))
    text = made.lower(images, cotangent).as_text()
    assert text.count("dot_general") == np.prod(window[:-3], dtype=int)
    assert "convolution" not in text
    wide = [np.asarray(a, np.float64) for a in (images, kernel, cotangent)]
    _, _, expected = direct(*wide, strides=strides, padding=padding, dilation=dilation, groups=1)
    close(made(images, cotangent), expected.astype(np.float32), 2e-6)


def test_onednn_is_not_given_kernels_as_large_as_images():
    spec = Spec((14, 14), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    images, cotangent = sample(0, 8, 14, 14, 4), sample(1, 8, 14, 14, 5)
    made = functools.partial(algorithms.cpu, Face.KERNEL, spec=spec)
    options = backend.OPTIONS["onednn"]
    text = jax.jit(made, compiler_options=options).lower(images, cotangent).compile().as_text()
    assert "onednn$convolution" not in text
    assert " convolution(" in text
    close(jax.jit(made, compiler_options=options)(images, cotangent), made(images, cotangent), 2e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_readers_of_a_depthwise_image_gradient_share_one_sum(stride):
    spec = Spec((8, 8), (3, 3), (stride, stride), ((1, 1), (1, 1)), (1, 1), 16)
    cotangent, kernel = sample(0, 4, *spec.result, 16), sample(1, 3, 3, 1, 16)
    jaxpr = jax.make_jaxpr(functools.partial(algorithms.cpu, Face.IMAGES, spec=spec))(
        cotangent, kernel
    )
    names = [equation.primitive.name for equation in jaxpr.eqns]
    last = len(names) - 1 - names[::-1].index("optimization_barrier")
    assert "mul" in names[:last]
    assert not {"mul", "add", "pad"} & set(names[last:])


@pytest.mark.parametrize("cached", [4, 6_000, 1 << 12])
@pytest.mark.parametrize(
    ("shape", "window", "strides", "padding", "dilation"),
    [
        ((6, 40, 40), (17, 1, 80), (1,), ((8, 8),), (1,)),
        ((6, 18, 9, 16), (5, 5, 1, 16), (1, 1), ((2, 2), (2, 2)), (1, 1)),
        ((6, 9, 20, 16), (7, 3, 1, 32), (2, 1), ((3, -1), (0, 2)), (1, 2)),
        ((6, 5, 5, 6, 8), (3, 3, 3, 1, 8), (1, 2, 1), ((1, 1), (0, 2), (1, 0)), (1, 1, 1)),
    ],
    ids=["1-D", "2-D", "strides, dilation, multiplier", "3-D"],
)
def test_depthwise_kernel_gradients_of_large_arrays_go_by_parts(
    shape, window, strides, padding, dilation, cached, monkeypatch
):
    images, kernel, groups = sample(0, *shape), sample(1, *window), shape[-1]
    spec = Spec(shape[1:-1], window[:-2], strides, padding, dilation, groups)
    cotangent = sample(2, shape[0], *spec.result, window[-1])
    made = functools.partial(algorithms.cpu, Face.KERNEL, spec=spec)
    assert "while" not in jax.jit(made).lower(images, cotangent).as_text()
    monkeypatch.setattr(algorithms, "CACHED", cached)
    monkeypatch.setattr(algorithms, "LARGE_BYTES", 4)
    by_parts = jax.jit(functools.partial(algorithms.cpu, Face.KERNEL, spec=spec))
    assert "while" in by_parts.lower(images, cotangent).as_text()
    wide = [np.asarray(a, np.float64) for a in (images, kernel, cotangent)]
    _, _, expected = direct(
        *wide, strides=strides, padding=padding, dilation=dilation, groups=groups
    )
    close(by_parts(images, cotangent), expected.astype(np.float32), 2e-6)
    few = Spec(spec.images, (1,) * len(strides), strides, padding, dilation, groups)
    few_taps = functools.partial(algorithms.cpu, Face.KERNEL, spec=few)
    cotangent = sample(2, shape[0], *few.result, window[-1])
    assert "while" not in jax.jit(few_taps).lower(images, cotangent).as_text()


@pytest.mark.parametrize(
    ("batch", "window", "strides", "reductions"),
    [
        (32, (3, 3), (1, 1), [(4, 8), (5, 8)]),
        (37, (3, 3), (2, 1), [(4, 12), (4, 1), (5, 9), (5, 1)]),
        (3, (3, 3), (1, 1), [(4, 11), (5, 9), (5, 2)]),  # rows
        (12, (2, 2), (1, 1), [(4, 12)]),
        (64, (1, 7), (1, 2), [(3, 8), (4, 8)]),
        (6, (1, 1), (1, 1), [(1, 6)]),
    ],
)
def test_a_few_taps_of_a_depthwise_kernel_share_one_loop(batch, window, strides, reductions):
    padding = tuple((k // 2, k // 2) for k in window)
    spec = Spec((11, 9), window, strides, padding, (1, 1), 16)
    images, cotangent = sample(0, batch, 11, 9, 16), sample(1, batch, *spec.result, 16)
    made = functools.partial(algorithms.cpu, Face.KERNEL, spec=spec)
    jaxpr = jax.make_jaxpr(made)(images, cotangent)
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "reduce":
            (axis,) = equation.params["dimensions"]
            found.append((len(equation.outvars), equation.invars[0].aval.shape[axis]))
    assert found == reductions
    wide = [np.asarray(a, np.float64) for a in (images, np.zeros((*window, 1, 16)), cotangent)]
    *_, expected = direct(*wide, strides=strides, padding=spec.padding, dilation=(1, 1), groups=16)
    close(jax.jit(made)(images, cotangent), expected.astype(np.float32), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_taps_of_narrow_images_add_up_in_float32(dtype):
    spec = Spec((11, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 16)
    images, cotangent = (jnp.ones((37, 11, 9, 16), dtype) for _ in range(2))
    made = jax.make_jaxpr(functools.partial(algorithms.cpu, Face.KERNEL, spec=spec))
    jaxpr = made(images, cotangent)
    sums = [e for e in jaxpr.eqns if e.primitive.name in ("reduce", "reduce_sum")]
    assert len(sums) > 9
    assert {operand.aval.dtype for e in sums for operand in e.invars} == {jnp.dtype(jnp.float32)}
    assert jaxpr.out_avals[0].dtype == dtype


def test_parts_add_up_in_float32_and_take_less_memory(monkeypatch):
    spec = Spec((12, 12), (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1), 8)
    images, cotangent = (jnp.abs(sample(i, 96, 12, 12, 8)).astype(jnp.bfloat16) for i in (0, 1))
    wide = [np.asarray(a, np.float64) for a in (images, np.zeros((5, 5, 1, 8)), cotangent)]
    _, _, expected = direct(*wide, strides=(1, 1), padding=spec.padding, dilation=(1, 1), groups=8)

    def compiled():
        made = functools.partial(algorithms.cpu, Face.KERNEL, spec=spec)
        return jax.jit(made).lower(images, cotangent).compile()

    at_once = compiled()
    monkeypatch.setattr(algorithms, "CACHED", 4)  # an example at a time
    monkeypatch.setattr(algorithms, "LARGE_BYTES", 4)
    by_parts = compiled()
    made = by_parts(images, cotangent)
    assert made.dtype == jnp.bfloat16
    # Once rounded to eight bits; added up in so few, 96 positive parts would be far below.
    np.testing.assert_allclose(np.asarray(made, np.float64), expected, rtol=2**-7)
    if not algorithms.BARRIERS_HOLD:
        pytest.skip("this JAX widens both arrays as a whole, before the loop")
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (at_once, by_parts)]
    assert sizes[1] < sizes[0] / 4


def test_few_channels_come_from_matrix_products():
    if jax.default_backend() != "cpu":
        pytest.skip("an algorithm of the CPU backend")

    def convolutions(shape, window, face):
        images, kernel = sample(0, *shape), sample(1, *window)
        made = functools.partial(conv, padding="SAME")
        if face == "result":
            text = jax.jit(made).lower(images, kernel).as_text()
        else:
            text = jax.jit(jax.grad(lambda i: made(i, kernel).sum())).lower(images).as_text()
        return text.count("stablehlo.convolution")

    assert convolutions((2, 8, 8, 16), (3, 3, 16, 3), "result") == 0
    assert convolutions((2, 8, 8, 16), (3, 3, 16, 9), "result") == 1
    assert convolutions((2, 8, 8, 3), (3, 3, 3, 16), "images") < convolutions(
        (2, 8, 8, 9), (3, 3, 9, 16), "images"
    )


def test_a_long_stack_of_kernels_becomes_a_loop():
    count = conv_primitive.MAX_UNROLLED + 1
    images, kernels = sample(0, count, 2, 5, 5, 2), sample(1, count, 3, 3, 2, 2)
    ours = jax.jit(jax.vmap(functools.partial(conv, padding="SAME")))
    assert "while" in ours.lower(images, kernels).as_text()
    assert "while" not in ours.lower(images[:-1], kernels[:-1]).as_text()
    expected = [
        by_lax(x, k, (1, 1), "SAME", (1, 1), 1) for x, k in zip(images, kernels, strict=True)
    ]
    close(ours(images, kernels), jnp.stack(expected), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_stay_narrow(dtype):
    images, kernel = sample(0, 2, 8, 8, 3), sample(1, 3, 3, 3, 4)
    narrow = conv(images.astype(dtype), kernel.astype(dtype), padding="SAME")
    assert narrow.dtype == dtype
    close(narrow.astype(jnp.float32), conv(images, kernel, padding="SAME"), 0.02)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(problems())
def test_the_mean_of_all_positions_follows_from_the_mean_image(problem):
    shape, window, fields = problem
    images, kernel = sample(0, *shape) + 1, sample(1, *window)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (images, kernel)]
        expected = np.asarray(by_lax(*wide, **fields)).mean(tuple(range(len(shape) - 1)))
    actual = jax.jit(functools.partial(middle_mean, share=1, **fields))(images, kernel)
    scale = np.abs(images).max() * np.abs(kernel).sum(tuple(range(len(window) - 1))).max()
    np.testing.assert_allclose(actual, expected, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("size", "window", "fields", "middle"),
    [
        ((28, 28), (3, 3), {"padding": "SAME"}, (slice(13, 15), slice(1, 26))),
        ((7, 7), (3, 3), {"padding": "SAME"}, (3, slice(1, 5))),
        ((14, 11), (1, 1), {"padding": "VALID", "strides": (2, 2)}, (3, slice(1, 4))),
        ((3, 2), (5, 5), {"padding": ((4, 2), (2, 3))}, (2, 1)),
        ((9, 40), (3, 2), {"padding": "SAME", "dilation": (2, 3)}, (4, slice(8, 31))),
        ((40,), (4,), {"padding": ((3, 0),), "groups": 3}, (slice(18, 21),)),
        ((4, 6, 5), (2, 2, 2), {"padding": "SAME"}, (1, slice(2, 4), slice(0, 4))),
    ],
)
def test_the_middle_is_a_sixteenth_of_the_positions(size, window, fields, middle):
    images, kernel = sample(0, 5, *size, 3), sample(1, *window, 3 // fields.get("groups", 1), 6)
    result = np.asarray(conv(images, kernel, **fields), np.float64)
    block = result[:, *middle].reshape(-1, 6)
    assert len(result.reshape(-1, 6)) <= 16 * len(block)
    np.testing.assert_allclose(middle_mean(images, kernel, **fields), block.mean(0), atol=2e-6)


def test_equals_scipy():
    images, kernel = sample(0, 1, 9, 8, 1), sample(1, 3, 5, 1, 1)
    expected = signal.correlate2d(images[0, :, :, 0], kernel[:, :, 0, 0], mode="valid")
    np.testing.assert_allclose(
        conv(images, kernel, padding="VALID")[0, :, :, 0], expected, 1e-5, 1e-5
    )


@pytest.mark.parametrize(
    ("strides", "padding", "size"),
    [((2, 2), "SAME", None), ((2, 3), "VALID", None), ((2, 2), ((1, 1), (0, 1)), (8, 9))],
)
def test_transposed_convolution_is_the_transpose(strides, padding, size):
    images, kernel = sample(0, 2, 4, 5, 6), sample(1, 3, 2, 3, 6)
    made = conv_transpose(images, kernel, strides=strides, padding=padding, size=size)
    back = sample(2, *made.shape)
    # <T y, x> = <y, C x>
    there = conv(back, kernel, strides=strides, padding=padding)
    assert there.shape == images.shape
    np.testing.assert_allclose(jnp.vdot(made, back), jnp.vdot(images, there), rtol=1e-4)
    if padding == "SAME":
        assert made.shape == (2, 8, 10, 3)


def test_a_sharded_batch_gives_the_gradient_of_the_whole():
    ours, _, _, kernel = pair("dense")
    images = sample(3, 16, 9, 8, 3)
    gradient = jax.grad(lambda k, x: jnp.sum(jnp.tanh(ours(x, k))))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    close(jax.jit(gradient)(kernel, split), jax.jit(gradient)(kernel, images), 2e-6)


def test_exports_with_a_symbolic_batch_and_chooses_by_platform():
    ours, _, images, kernel = pair("depthwise")
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    exported = jax.export.export(jax.jit(ours), platforms=["cpu", "cuda", "tpu"])(shape, kernel)
    close(exported.call(images, kernel), jax.jit(ours)(images, kernel), 0)

    def text(platform):
        made = jax.export.export(jax.jit(ours), platforms=[platform])(images, kernel)
        return str(made.mlir_module())

    assert "stablehlo.convolution" in text("cuda")
    assert "stablehlo.convolution" in text("tpu")
    assert "stablehlo.convolution" not in text("cpu")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_export_with_a_symbolic_batch(name):
    ours, _, images, kernel = pair(name)
    gradients = jax.jit(jax.grad(lambda i, k: jnp.sum(jnp.tanh(ours(i, k))), (0, 1)))
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    exported = jax.export.export(gradients)(shape, kernel)
    close(exported.call(images, kernel), gradients(images, kernel), 2e-6)


def test_jax_still_has_what_the_primitive_leans_on():
    needed = {
        "jax.extend.core.Primitive": hasattr(core, "Primitive"),
        "jax.interpreters.ad.defbilinear": hasattr(ad, "defbilinear"),
        "jax.interpreters.batching.primitive_batchers": hasattr(batching, "primitive_batchers"),
        "jax.interpreters.mlir.lower_fun": hasattr(mlir, "lower_fun"),
        "jax.interpreters.mlir.register_lowering": hasattr(mlir, "register_lowering"),
    }
    missing = [name for name, found in needed.items() if not found]
    assert not missing, f"jax {jax.__version__} lacks {missing}; ops/conv_primitive.py needs them"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding": "FULL"}, "padding"),
        ({"padding": ((1, 1),)}, "padding"),
        ({"padding": "SAME", "strides": (0, 1)}, "strides"),
        ({"padding": "SAME", "dilation": (1,)}, "dilation"),
        ({"padding": "SAME", "groups": 2}, "groups"),
        ({"padding": "SAME", "groups": 5}, "input channels"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(CnnlabError, match=message):
        conv(sample(0, 1, 6, 6, 3), sample(1, 3, 3, 3, 5), **fields)


def test_bad_operands_are_named():
    with pytest.raises(CnnlabError, match="spatial axes"):
        conv(sample(0, 6, 6, 3), sample(1, 3, 3, 3, 5), padding="SAME")
    with pytest.raises(CnnlabError, match="astype"):
        conv(jnp.ones((1, 4, 4, 1), jnp.int32), jnp.ones((3, 3, 1, 1), jnp.int32), padding="SAME")
    with pytest.raises(CnnlabError, match="size"):
        conv_transpose(sample(0, 1, 4, 4, 2), sample(1, 3, 3, 2, 2), padding="SAME", size=(9, 9))


@pytest.mark.parametrize("face", list(Face))
@pytest.mark.parametrize("together", [1, 2, 5])
def test_members_side_by_side_equal_each_alone(face, together):
    spec = Spec((9, 8), (3, 3), (2, 1), ((1, 1), (1, 0)), (1, 1), 1)
    shapes = {"x": (9, 8, 3), "y": (*spec.result, 4)}
    rng = np.random.default_rng(0)
    x, y = (jnp.array(rng.normal(size=(5, 2, *shapes[name])), jnp.float32) for name in "xy")
    w = jnp.array(rng.normal(size=(5, 3, 3, 3, 4)), jnp.float32)
    a, b = {Face.RESULT: (x, w), Face.IMAGES: (y, w), Face.KERNEL: (x, y)}[face]
    expected = np.stack(
        [algorithms.native(face, one, other, spec) for one, other in zip(a, b, strict=True)]
    )
    made = algorithms.stacked(face, a, b, spec, together)
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


def test_a_gpu_gets_a_stack_of_few_channels_as_dense_convolutions():
    images, kernels = jnp.zeros((10, 4, 8, 8, 16)), jnp.zeros((10, 3, 3, 16, 16))
    stack = jax.jit(jax.vmap(functools.partial(conv, padding="SAME")))
    text = stack.trace(images, kernels).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert "tensor<4x8x8x160xf32>" in line
    assert "feature_group_count = 1 " in line
