"""Pooling against lax to the last bit, and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnnlab.ops import pool

NONE = ((0, 0), (0, 0))
CASES = [
    ((2, 2), (2, 2), NONE, (3, 8, 8, 5)),
    ((2, 2), (2, 2), NONE, (3, 9, 7, 5)),
    ((2, 3), (2, 3), ((0, 1), (1, 1)), (2, 7, 8, 3)),
    ((3, 3), (2, 2), ((1, 1), (1, 1)), (2, 9, 8, 4)),
    ((3, 3), (1, 1), NONE, (2, 7, 7, 4)),
    ((3, 2), (1, 2), ((1, 0), (0, 1)), (2, 6, 8, 4)),
    ((2, 2), (3, 3), NONE, (2, 8, 9, 4)),
]


def lax_max_pool(images, window, strides, padding):
    return lax.reduce_window(
        images, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0))
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("window", "strides", "padding", "shape"), CASES)
def test_max_pool_and_gradient_equal_lax_to_the_bit(window, strides, padding, shape, ties):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 3, shape) if ties else rng.normal(size=shape)
    images = jnp.asarray(images, jnp.float32)
    expected, pull_back = jax.vjp(lambda x: lax_max_pool(x, window, strides, padding), images)
    actual, our_pull_back = jax.vjp(
        jax.jit(lambda x: pool.max_pool(x, window, strides=strides, padding=padding)), images
    )
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(our_pull_back(cotangent)[0], pull_back(cotangent)[0])
    assert "select_and" not in str(jax.make_jaxpr(our_pull_back)(cotangent))


def test_max_pool_off_the_cpu_is_the_same(monkeypatch):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 9, 3)), jnp.float32)
    call = lambda: pool.max_pool(images, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # noqa: E731
    here = call()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "reduce_window" in str(jax.make_jaxpr(call)())
    np.testing.assert_array_equal(here, call())


@pytest.mark.parametrize(("window", "strides", "padding", "shape"), CASES)
def test_avg_pool_equals_numpy(window, strides, padding, shape):
    images = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    padded = np.pad(images, ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(1, 2))
    expected = windows[:, :: strides[0], :: strides[1]].mean((-2, -1))
    actual = pool.avg_pool(jnp.asarray(images), window, strides=strides, padding=padding)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_global_avg_pool_sums_in_float32():
    images = jnp.full((1, 64, 64, 2), 1.0078125, jnp.bfloat16)  # a bfloat16 sum would stall at 256
    assert (pool.global_avg_pool(images) == images[:, 0, 0]).all()
