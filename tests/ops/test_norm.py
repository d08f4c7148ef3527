"""Batch normalisation against float64 and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cnnlab.ops.norm import batch_norm, normalize


def plain(x, scale, bias):
    mean = jnp.mean(x, (0, 1, 2), keepdims=True)
    var = jnp.mean((x - mean) ** 2, (0, 1, 2), keepdims=True)
    y = (x - mean) / jnp.sqrt(var + 1e-5) * scale.reshape(1, 1, 1, -1)
    return y + bias.reshape(1, 1, 1, -1), mean.ravel(), var.ravel()


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 3.0, size=(4, 5, 6, 3)), jnp.float32)
    scale, bias = (jnp.asarray(rng.normal(size=3), jnp.float32) for _ in range(2))
    return x, scale, bias


def test_values_and_all_gradients(inputs):
    rng = np.random.default_rng(1)
    expected, pull_back = jax.vjp(plain, *inputs)
    actual, our_pull_back = jax.vjp(batch_norm, *inputs)
    # Cotangents of the returned statistics too: whoever differentiates them gets what is true.
    cotangents = tuple(jnp.asarray(rng.normal(size=e.shape), jnp.float32) for e in expected)
    for a, b in zip(
        (*actual, *our_pull_back(cotangents)), (*expected, *pull_back(cotangents)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [1e3, -3e4])
def test_variance_survives_a_large_mean(mean):
    x = np.random.default_rng(2).normal(mean, 1.0, size=(8, 6, 6, 4)).astype(np.float32)
    y, our_mean, our_var = batch_norm(jnp.asarray(x), jnp.ones(4), jnp.zeros(4))
    exact = x.astype(np.float64)
    centre, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    np.testing.assert_allclose(our_mean, centre, rtol=1e-6)
    np.testing.assert_allclose(our_var, var, rtol=1e-4)
    np.testing.assert_allclose(y, (exact - centre) / np.sqrt(var + 1e-5), atol=5e-3)


def test_statistics_of_bfloat16_are_float32():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(64, 8, 8, 2)), jnp.bfloat16)
    y, mean, var = batch_norm(x, jnp.ones(2), jnp.zeros(2))
    exact = np.asarray(x, np.float64)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-5)


def test_normalize_with_the_batch_statistics_is_batch_norm(inputs):
    x, scale, bias = inputs
    y, mean, var = batch_norm(x, scale, bias)
    np.testing.assert_array_equal(y, normalize(x, mean, var, scale, bias))


def test_statistics_of_a_sharded_batch_are_global(inputs):
    _, scale, bias = inputs
    devices = jax.device_count()
    x = jnp.arange(2.0 * devices * 3).reshape(2 * devices, 1, 1, 3)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    for a, b in zip(
        jax.jit(batch_norm)(sharded, scale, bias), batch_norm(x, scale, bias), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
