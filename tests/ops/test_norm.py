"""Normalisations against float64: values in NumPy, every derivative in the plain formula."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from cnnlab.ops import norm
from cnnlab.types import CnnlabError

EPSILON = 1e-3  # large enough to be seen in every value


def with_shift(x, scale, bias, *, epsilon):
    """Batch normalisation that is told the mean of a part, as of a convolution's result."""
    shift = jnp.mean(x[:, :2], (0, 1, 2))
    return norm.batch_norm(x, scale, bias, epsilon=epsilon, shift=shift)


NORMS = {
    "batch": norm.batch_norm,
    "batch_shift": with_shift,
    "sub_batches": functools.partial(norm.batch_norm, sub_batches=2),
    "groups": functools.partial(norm.group_norm, groups=2),
    "one_group": functools.partial(norm.group_norm, groups=1),
    "layer": norm.layer_norm,
    "rms": lambda x, scale, bias, *, epsilon: norm.rms_norm(x, scale, epsilon=epsilon),
}
NORMS = {
    kind: jax.jit(functools.partial(function, epsilon=EPSILON)) for kind, function in NORMS.items()
}


def plain(kind, x, scale, bias, np=np):
    """Textbook formula on [B, H, W, C]; statistics returned where ours are."""
    b, h, w, c = x.shape
    if kind == "rms":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON) * scale
    split, axes = {
        "batch": ((1, b, h, w, 1, c), (1, 2, 3)),
        "batch_shift": ((1, b, h, w, 1, c), (1, 2, 3)),
        "sub_batches": ((2, b // 2, h, w, 1, c), (1, 2, 3)),
        "groups": ((1, b, h, w, 2, c // 2), (2, 3, 5)),
        "one_group": ((1, b, h, w, 1, c), (2, 3, 5)),
        "layer": ((1, b, h, w, 1, c), (5,)),
    }[kind]
    parts = x.reshape(split)
    mean = np.mean(parts, axes, keepdims=True)
    var = np.mean((parts - mean) ** 2, axes, keepdims=True)
    y = ((parts - mean) / np.sqrt(var + EPSILON)).reshape(x.shape) * scale.reshape(1, 1, 1, c)
    y = y + bias.reshape(1, 1, 1, c)
    if "batch" not in kind:
        return y
    return y, np.mean(mean.reshape(-1, c), 0), np.mean(var.reshape(-1, c), 0)


def sample(shape, loc=0.0, seed=0):
    rng = np.random.default_rng(seed)
    scale, bias = rng.normal(size=(2, shape[-1]))
    return rng.normal(loc, 1.0, size=shape), scale, bias


def single(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("loc", [2.0, 1e4])
@pytest.mark.parametrize("kind", NORMS)
def test_values_equal_float64(kind, loc):
    # Exactly representable inputs: what differs is what the operation lost.
    inputs = tuple(np.float64(np.float32(a)) for a in sample((8, 17, 5, 4), loc))
    actual = NORMS[kind](*single(*inputs))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(plain(kind, *inputs)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outlier", [5, 8])
def test_variance_survives_where_the_sample_misleads(outlier):
    """One row of 17, the sampled one (8) or another, lies 1e4 off the rest."""
    x, scale, bias = (np.float64(np.float32(a)) for a in sample((4, 17, 3, 2)))
    x[:, outlier] += 1e4
    for kind in ("batch", "batch_shift", "groups"):
        actual = NORMS[kind](*single(x, scale, bias))
        expected = plain(kind, x, scale, bias)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_equal_values_of_any_size_give_the_bias():
    """Their variance is rounding, below 0 as often as above, and at 1e15 far beyond epsilon."""
    rng = np.random.default_rng(1)
    x = np.tile(10.0 ** rng.uniform(-3, 15, 64), (37, 53, 3, 1))
    x[..., 0] = 0
    y, mean, var = NORMS["batch"](*single(x, np.ones(64), np.full(64, 0.5)))
    np.testing.assert_allclose(mean, x[0, 0, 0], rtol=1e-6)
    assert (np.asarray(var) >= 0).all()
    assert (np.sqrt(var) <= 1e-6 * np.abs(mean)).all()
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[..., 0], np.full(x.shape[:3], 0.5))


def gradient_and_product(f, at, tangent):
    """The gradient and the Hessian's product with the tangent, forward over reverse."""
    return jax.jvp(jax.grad(f), (at,), (tangent,))


def in_every_way(f, at, tangent):
    """The gradient in six ways, the Hessian's product in four."""
    grad = jax.grad(f)
    along = lambda g, a: jax.jvp(g, (a,), (tangent,))[1]  # noqa: E731
    dot = lambda a: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, tangent)))  # noqa: E731
    pair = jax.tree.map(lambda a, t: jnp.stack([a + t, a]), at, tangent)
    _, scanned = jax.lax.scan(lambda carry, one: (carry, grad(one)), 0, pair)
    first = (
        grad(at),
        jax.jacfwd(f)(at),
        jax.jacrev(f)(at),
        jax.grad(jax.checkpoint(f))(at),
        *(jax.tree.map(lambda a: a[1], both) for both in (scanned, jax.vmap(grad)(pair))),
    )
    second = (
        along(grad, at),
        along(jax.jacfwd(f), at),
        jax.grad(lambda a: dot(grad(a)))(at),
        jax.grad(functools.partial(along, f))(at),
    )
    return first, second


@pytest.mark.parametrize("kind", ["batch", "batch_shift", "sub_batches", "groups", "layer", "rms"])
def test_derivatives_equal_the_plain_formula_in_float64(kind):
    with jax.enable_x64(True):
        at, tangent = (
            jax.tree.map(jnp.asarray, sample((4, 2, 1, 4), loc=3.0, seed=seed)) for seed in (0, 1)
        )
        at = (at[0].at[..., 0].set(7.0), *at[1:])  # a dead channel: its curvature is not 0
        rng = np.random.default_rng(2)
        weights = [rng.normal(size=shape) for shape in ((4, 2, 1, 4), (4,), (4,))]

        # The returned statistics take part: whoever differentiates them gets what is true.
        def scalar(outputs):
            leaves = jax.tree.leaves(outputs)
            return sum(jnp.sum(w * jnp.sin(o)) for w, o in zip(weights, leaves, strict=False))

        def ours(inputs):
            return scalar(NORMS[kind](*inputs))

        def theirs(inputs):
            return scalar(plain(kind, *over(inputs), jnp))

        ways = in_every_way if kind == "batch" else gradient_and_product
        actual = jax.jit(functools.partial(ways, ours))(at, tangent)
        expected = jax.jit(functools.partial(gradient_and_product, theirs))(at, tangent)
        for order, exact in zip(actual, expected, strict=True):
            for way in order if kind == "batch" else [order]:
                for a, e in zip(way, exact, strict=True):
                    assert a.dtype == jnp.float64
                    np.testing.assert_allclose(a, e, rtol=1e-8, atol=1e-8)


def over(inputs):
    x, *rest = inputs
    return x, *(per_channel.reshape(1, 1, 1, -1) for per_channel in rest)


@pytest.mark.parametrize("kind", ["batch", "batch_shift"])
def test_gradients_in_float32_survive_a_large_mean(kind):
    with jax.enable_x64(True):
        inputs = tuple(jnp.float64(np.float32(a)) for a in sample((8, 17, 5, 4), 1e4))
        weights = jnp.asarray(sample((8, 17, 5, 4), seed=3)[0])

        def exact(inputs):
            return jnp.sum(weights * plain(kind, *over(inputs), jnp)[0] ** 2)

        expected = jax.tree.map(np.asarray, jax.jit(jax.grad(exact))(inputs))
        inputs, weights = (jax.tree.map(np.float32, a) for a in (inputs, weights))
    ours = jax.jit(jax.grad(lambda inputs: jnp.sum(weights * NORMS[kind](*inputs)[0] ** 2)))
    for a, e in zip(ours(inputs), expected, strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5 * np.abs(e).max())


@pytest.mark.parametrize("kind", ["batch", "batch_shift", "sub_batches", "groups"])
def test_backward_pass_keeps_one_array_and_sums_twice(kind):
    """What makes the gradient the efficient one."""
    x, scale, bias = single(*sample((4, 6, 6, 4)))

    out, pull_back = jax.vjp(lambda *a: jax.tree.leaves(NORMS[kind](*a))[0], x, scale, bias)
    assert sum(leaf.size == x.size for leaf in jax.tree.leaves(pull_back)) == 1
    backward = jax.jit(pull_back).lower(out).as_text()
    reduced = re.findall(r"stablehlo.reduce\(.*: \(tensor<([\dx]+)xf32>", backward)
    assert sum(math.prod(map(int, shape.split("x"))) == x.size for shape in reduced) == 2


@pytest.mark.parametrize("kind", NORMS)
def test_bfloat16_is_float32_inside(kind):
    x, scale, bias = single(*sample((16, 8, 8, 4), loc=5.0))
    x = x.astype(jnp.bfloat16)
    expected = jax.tree.leaves(plain(kind, *(np.asarray(a, np.float64) for a in (x, scale, bias))))
    y, *statistics = jax.tree.leaves(NORMS[kind](x, scale, bias))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected[0], rtol=2**-8, atol=1e-6)
    for a, e in zip(statistics, expected[1:], strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, e, rtol=1e-5)


def test_normalize_by_the_batch_statistics_is_batch_norm():
    x, scale, bias = single(*sample((8, 17, 5, 4)))
    y, mean, var = NORMS["batch"](x, scale, bias)
    again = jax.jit(norm.normalize)(x, mean, var, scale, bias, epsilon=EPSILON)
    np.testing.assert_allclose(again, y, atol=1e-6)


def test_dense_features_and_sub_batches_are_batches_of_their_own():
    x, scale, bias = single(*sample((12, 5), loc=100.0))
    y, mean, var = jax.jit(functools.partial(norm.batch_norm, sub_batches=3))(x, scale, bias)
    batch_norm = jax.jit(norm.batch_norm)
    parts = [batch_norm(part, scale, bias) for part in np.split(np.asarray(x), 3)]
    np.testing.assert_allclose(y, np.concatenate([p[0] for p in parts]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, np.mean([p[1] for p in parts], 0), rtol=1e-6)
    np.testing.assert_allclose(var, np.mean([p[2] for p in parts], 0), rtol=1e-5)
    np.testing.assert_allclose(mean, np.asarray(x, np.float64).mean(0), rtol=1e-6)
    assert (np.asarray(var) < np.asarray(x).var(0)).all()  # without the spread of the means


@pytest.mark.parametrize("sub_batches", [1, 4])
def test_a_sharded_batch_gives_the_same_and_stays_sharded(sub_batches):
    inputs = single(*sample((16, 6, 6, 4), loc=3.0))
    weights = single(sample((16, 6, 6, 4), seed=1)[0])[0]

    def loss(x, scale, bias, weights):
        y, mean, var = norm.batch_norm(x, scale, bias, sub_batches=sub_batches)
        return jnp.sum(weights * y * y), (y, mean, var)

    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    sharded = jax.device_put((*inputs, weights), (split, whole, whole, split))
    compiled = step.lower(*sharded).compile()
    # Sums travel, images do not.
    moved = set(re.findall(r"all-reduce|all-gather|all-to-all|permute", compiled.as_text()))
    assert moved == {"all-reduce"}
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        compiled(*sharded),
        step(*inputs, weights),
    )


def test_exported_program_takes_any_batch_size():
    def step(x, scale, bias):
        y, mean, var = norm.batch_norm(x, scale, bias)
        y = norm.rms_norm(norm.group_norm(y, scale, bias, groups=2), scale)
        return jnp.sum(jnp.sin(y)), (mean, var)

    step = jax.jit(jax.value_and_grad(step, (0, 1, 2), has_aux=True))
    inputs = single(*sample((6, 5, 5, 4)))
    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
    shapes[0] = jax.ShapeDtypeStruct((batch, 5, 5, 4), jnp.float32)
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"])(*shapes)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
        exported.call(*inputs),
        step(*inputs),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, c: norm.batch_norm(x, c, c, sub_batches=4),
            "sub_batches must be a divisor of the batch size, got sub_batches 4 for a batch of 6",
        ),
        (lambda x, c: norm.batch_norm(x, c, c, sub_batches=0), "got sub_batches 0"),
        (
            lambda x, c: norm.group_norm(x, c, c, groups=3),
            "groups must be a divisor of the channels, got groups 3 for 4 channels",
        ),
        (lambda x, c: norm.group_norm(x, c, c, groups=-2), "got groups -2"),
        (lambda x, c: norm.group_norm(x[:, 0, 0], c, c, groups=2), "for vectors use layer_norm"),
    ],
)
def test_what_does_not_divide(call, message):
    with pytest.raises(CnnlabError, match=message):
        call(jnp.ones((6, 3, 3, 4)), jnp.ones(4))
