"""Layers against Flax's own, closed forms and moments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnlab import backend, layers
from cnnlab.ops import norm
from cnnlab.types import CnnlabError

KEY = jax.random.key(0)


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_conv_equals_flax():
    images = sample(2, 9, 9, 4)
    ours = layers.Conv(6, (3, 5), 2, ((1, 1), (2, 2)), groups=2)
    theirs = nn.Conv(6, (3, 5), 2, ((1, 1), (2, 2)), feature_group_count=2)
    variables = ours.init(KEY, images)
    variables["params"]["bias"] = sample(6)
    np.testing.assert_allclose(
        ours.apply(variables, images), theirs.apply(variables, images), rtol=1e-5, atol=1e-5
    )


def test_batch_norm_and_its_running_statistics_equal_flax():
    ours = layers.BatchNorm()
    theirs = nn.BatchNorm(momentum=0.9, use_fast_variance=False)
    a = ours.init(KEY, sample(4, 5, 5, 3), train=True)
    b = theirs.init(KEY, sample(4, 5, 5, 3), use_running_average=False)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))  # none moved by init
    for step in range(3):
        x = sample(4, 5, 5, 3, seed=step) * 2 + 1
        y, moved = ours.apply(a, x, train=True, mutable=["batch_stats"])
        z, flax_moved = theirs.apply(b, x, use_running_average=False, mutable=["batch_stats"])
        a, b = a | moved, b | flax_moved
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    np.testing.assert_allclose(
        ours.apply(a, x, train=False), theirs.apply(b, x, use_running_average=True), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (layers.GroupNorm(4), nn.GroupNorm(4, epsilon=1e-5)),
        (layers.GroupNorm(), nn.GroupNorm(3, epsilon=1e-5)),  # 48 channels: three groups of 16
        (layers.LayerNorm(), nn.LayerNorm(epsilon=1e-5)),
        (layers.RMSNorm(), nn.RMSNorm(epsilon=1e-5)),
    ],
)
def test_norms_without_running_statistics_equal_flax(ours, theirs):
    x = sample(2, 5, 5, 48) * 2 + 1
    variables = ours.init(KEY, x)
    assert jax.tree.structure(variables) == jax.tree.structure(theirs.init(KEY, x))
    variables = jax.tree.map(lambda a: a + sample(48), variables)
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (24, 1), (88, 4)])
def test_default_groups_have_sixteen_channels_or_the_next_size_that_divides(channels, groups):
    x, parameters = sample(2, 3, 3, channels), (jnp.ones(channels), jnp.zeros(channels))
    y = layers.GroupNorm().init_with_output(KEY, x)[0]
    np.testing.assert_array_equal(y, norm.group_norm(x, *parameters, groups=groups))


def test_sub_batches_move_the_running_statistics_by_their_average():
    x = sample(6, 4, 4, 3) + jnp.arange(6.0).reshape(6, 1, 1, 1)
    layer = layers.BatchNorm(momentum=0.0, sub_batches=3)
    variables = layer.init(KEY, x[:1], train=True)
    y, moved = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = np.asarray(x, np.float64).reshape(3, 2, 4, 4, 3)
    mean, var = parts.mean((1, 2, 3)), parts.var((1, 2, 3))
    np.testing.assert_allclose(moved["batch_stats"]["mean"], mean.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["batch_stats"]["var"], var.mean(0), rtol=1e-5)
    centred = np.asarray(y).reshape(parts.shape).mean((1, 2, 3))
    np.testing.assert_allclose(centred, np.zeros((3, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "fields"),
    [
        (3, {"features": 4, "kernel_size": 3, "padding": 1}),
        (3, {"features": 4, "kernel_size": (3, 1), "strides": (2, 1), "padding": "SAME"}),
        (3, {"features": 4, "kernel_size": 1, "strides": 2, "use_bias": True}),
        (1, {"features": 4, "kernel_size": 5}),
        (4, {"features": 4, "kernel_size": 3, "dilation": 2, "padding": 2, "groups": 4}),
        (3, {"features": 4, "kernel_size": 3, "dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("sub_batches", [1, 2])
def test_convolution_and_normalisation_together_equal_one_after_the_other(
    channels, fields, sub_batches, monkeypatch
):
    monkeypatch.setattr(layers, "LARGE_BYTES", 0)

    class Pair(nn.Module):
        apart: bool

        @nn.compact
        def __call__(self, x):
            conv = layers.Conv(**({"use_bias": False} | fields), name="conv")
            if self.apart:
                return layers.normalize(conv(x), "batch", train=True)
            return layers.conv_norm(conv, x, "batch", train=True)

    x = sample(4, 9, 8, channels) + 1e3
    variables = Pair(apart=True).init(KEY, x[:1])
    assert jax.tree.structure(variables) == jax.tree.structure(Pair(apart=False).init(KEY, x[:1]))
    if "bias" in variables["params"]["conv"]:
        variables["params"]["conv"]["bias"] += 1e3

    def outcome(params, apart):
        moved = {"params": params, "batch_stats": variables["batch_stats"]}
        with layers.statistics_of_parts(sub_batches):
            y, stats = Pair(apart).apply(moved, x, mutable=["batch_stats"])
        weights = sample(*y.shape, seed=1)
        return jnp.sum(weights * jnp.sin(y.astype(jnp.float32))), (y, stats)

    step = jax.jit(jax.value_and_grad(outcome, has_aux=True), static_argnums=1)
    (_, ours), gradient = step(variables["params"], apart=False)
    (_, theirs), expected = step(variables["params"], apart=True)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.float32(a), np.float32(e), rtol=1e-3, atol=1e-3 * (0.01 + np.abs(e).max())
        ),
        (ours, gradient),
        (theirs, expected),
    )


def test_a_shift_is_as_accurate_as_the_result_whatever_the_images_dtype():
    conv = layers.Conv(4, 1)
    images = (sample(4, 5, 16, 3) + 1e3).astype(jnp.bfloat16)
    variables = conv.init(KEY, images)
    variables["params"]["kernel"] = jnp.abs(variables["params"]["kernel"])
    result = np.asarray(conv.apply(variables, images), np.float64)
    assert result[:, 2:3, 5:10].size * 16 >= result.size
    mean = conv.apply(variables, images, method="middle_mean")
    np.testing.assert_allclose(mean, result[:, 2, 5:10].mean((0, 1)), rtol=1e-6)


@pytest.mark.parametrize(("least", "arrays"), [(0, 1), (1 << 20, 2)])
def test_a_convolution_writes_what_the_normalisation_reads(least, arrays, monkeypatch):
    """No large array is written only to subtract the shift from it."""
    monkeypatch.setattr(layers, "LARGE_BYTES", least)
    block = layers.ConvBlock(16, activation="identity")
    x = sample(8, 14, 14, 16)
    variables = block.init(KEY, x[:1], train=False)

    def forward(variables, x):
        return block.apply(variables, x, train=True, mutable=["batch_stats"])

    options = backend.OPTIONS["onednn"]
    text = jax.jit(forward, compiler_options=options).lower(variables, x).compile().as_text()
    if "onednn$convolution" not in text:
        pytest.skip("this jaxlib has no oneDNN")
    assert ('"ops":["BIAS"]' in text) == (arrays == 1)
    entry = text[text.index("\nENTRY") :]
    large = re.findall(r"= f32\[(?:1,)?8,14,14,16\]\S* (?:fusion|subtract|add)\(", entry)
    assert len(large) == arrays  # the last are the normalised images


@pytest.mark.parametrize("name", layers.NORMS)
def test_every_norm_can_be_chosen(name):
    block = layers.ConvBlock(4, norm=name, activation="identity", zero_scale=True)
    y, variables = block.init_with_output(KEY, sample(2, 6, 6, 3), train=True)
    assert ("norm" in variables["params"]) == (name != "none")
    assert ("bias" in variables["params"]["conv"]) == (name == "none")
    assert ("batch_stats" in variables) == (name == "batch")
    assert (np.asarray(y) == 0).all() == (name != "none")  # the scale starts at zero


@pytest.mark.parametrize(
    ("initializer", "variance"),
    [
        (layers.he_normal, 2 / (9 * 32)),
        (layers.he_normal_fan_out, 2 / (9 * 512)),
        (layers.lecun_normal, 1 / (9 * 32)),
    ],
)
def test_initializers_have_the_papers_variance(initializer, variance):
    kernel = np.asarray(initializer(KEY, (3, 3, 32, 512), jnp.float32), np.float64).ravel()
    assert abs(kernel.var() / variance - 1) < 0.02
    assert abs(kernel.mean()) < 4 * np.sqrt(variance / kernel.size)
    # Longer than one chunk of draws: no chunk repeats another.
    chunks = kernel[: 2 * layers._CHUNK].reshape(2, -1)
    assert abs(np.corrcoef(chunks)[0, 1]) < 0.02
    jitted = jax.jit(lambda key: initializer(key, (3, 3, 32, 512), jnp.float32))(KEY)
    np.testing.assert_allclose(jitted.ravel(), kernel, rtol=1e-6)


@pytest.mark.parametrize("layer", [layers.Dropout(0.25), layers.SpatialDropout(0.25)])
def test_dropout_keeps_the_mean_and_scales(layer):
    x = jnp.ones((64, 8, 8, 32))
    y = np.asarray(layer.apply({}, x, train=True, rngs={"dropout": KEY}))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.04
    np.testing.assert_array_equal(layer.apply({}, x, train=False), x)
    whole = (y == y[:, :1, :1]).all((1, 2))
    assert whole.all() == isinstance(layer, layers.SpatialDropout)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_dropout_rate_out_of_range(rate):
    with pytest.raises(CnnlabError, match=r"\[0, 1\)"):
        layers.Dropout(rate).apply({}, jnp.ones((1, 2)), train=False)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    block = layers.ConvBlock(4, dtype="bfloat16")
    variables = block.init(KEY, sample(2, 6, 6, 3), train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert block.apply(variables, sample(2, 6, 6, 3), train=False).dtype == jnp.bfloat16


def test_names_that_are_not_known():
    with pytest.raises(CnnlabError, match=r"unknown activation 'rleu' .did you mean 'relu'"):
        layers.activation("rleu")
    with pytest.raises(CnnlabError, match=r"unknown dtype 'float16' .did you mean.*'bfloat16'"):
        layers.compute_dtype("float16")
    with pytest.raises(CnnlabError, match=r"unknown norm 'batchnorm' .did you mean 'batch'"):
        layers.check_fields({"norm": "batchnorm"})
    with pytest.raises(CnnlabError, match="groups 3 for 4 -> 6"):
        layers.Conv(6, 3, groups=3).init(KEY, sample(1, 5, 5, 4))
