"""Convolution against SciPy and lax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import signal

from cnnlab.ops.conv import conv

CASES = [
    ((1, 1), ((2, 2), (2, 2)), (1, 1)),
    ((2, 1), "SAME", (1, 1)),
    ((1, 2), "VALID", (2, 1)),
    ((2, 2), ((1, 0), (0, 3)), (1, 2)),
]


def lax_conv(images, kernel, strides, padding, dilation):
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def sample(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_equals_scipy(channels):
    images, kernel = sample(0, 2, 9, 8, channels), sample(1, 3, 5, channels, 4)
    ours = conv(images, kernel, padding="VALID")
    for b in range(2):
        for k in range(4):
            expected = sum(
                signal.correlate2d(images[b, :, :, c], kernel[:, :, c, k], mode="valid")
                for c in range(channels)
            )
            np.testing.assert_allclose(ours[b, :, :, k], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("strides", "padding", "dilation"), CASES)
def test_one_channel_equals_lax_with_both_gradients(strides, padding, dilation):
    images, kernel = sample(2, 3, 11, 10, 1), sample(3, 3, 3, 1, 4)

    def ours(images, kernel):
        return conv(images, kernel, strides=strides, padding=padding, dilation=dilation)

    def theirs(images, kernel):
        return lax_conv(images, kernel, strides, padding, dilation)

    expected, pull_back = jax.vjp(theirs, images, kernel)
    actual, our_pull_back = jax.vjp(ours, images, kernel)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(ours)(images, kernel))
    cotangent = sample(4, *expected.shape)
    for a, b in zip(
        (actual, *our_pull_back(cotangent)), (expected, *pull_back(cotangent)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_keeps_forward_over_reverse():
    images, kernel = sample(5, 2, 8, 8, 1), sample(6, 3, 3, 1, 2)

    def product(function):
        loss = lambda k: jnp.sum(jnp.tanh(function(images, k)))  # noqa: E731
        return jax.jvp(jax.grad(loss), (kernel,), (jnp.ones_like(kernel),))[1]

    ours = product(lambda x, k: conv(x, k, padding="SAME"))
    theirs = product(lambda x, k: lax_conv(x, k, (1, 1), "SAME", (1, 1)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_groups_are_separate_convolutions():
    images, kernel = sample(7, 2, 6, 6, 4), sample(8, 3, 3, 2, 6)
    whole = conv(images, kernel, padding="SAME", groups=2)
    halves = [
        conv(images[..., 2 * g : 2 * g + 2], kernel[..., 3 * g : 3 * g + 3], padding="SAME")
        for g in (0, 1)
    ]
    np.testing.assert_allclose(whole, jnp.concatenate(halves, -1), rtol=1e-5, atol=1e-5)
