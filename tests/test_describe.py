"""Counts against published ones and against XLA's own cost analysis."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from cnnlab import layers, models
from cnnlab.describe import describe, render
from cnnlab.types import CnnlabError

ORIGINAL = {"head": "original", "num_outputs": 1000}
SMALL = {"num_outputs": 10}


@pytest.mark.parametrize(
    ("name", "shape", "fields", "parameters"),
    [
        ("lenet5", (28, 28, 1), SMALL, 61_706),
        ("lenet5", (32, 32, 1), SMALL | {"padding": 0}, 61_706),
        ("simple_two_conv", (28, 28, 1), SMALL, 130 + 1_260 + 160 * 32 + 32 + 330),
        ("simple_conv", (28, 28, 1), SMALL, 320 + 13 * 13 * 32 * 128 + 128 + 1_290),
        # torchvision's counts.
        ("vgg11", (224, 224, 3), ORIGINAL, 132_863_336),
        ("vgg13", (224, 224, 3), ORIGINAL, 133_047_848),
        ("vgg16", (224, 224, 3), ORIGINAL, 138_357_544),
        ("vgg19", (224, 224, 3), ORIGINAL, 143_667_240),
        ("vgg11_bn", (224, 224, 3), ORIGINAL, 132_868_840),
        ("vgg13_bn", (224, 224, 3), ORIGINAL, 133_053_736),
        ("vgg16_bn", (224, 224, 3), ORIGINAL, 138_365_992),
        ("vgg19_bn", (224, 224, 3), ORIGINAL, 143_678_248),
        # He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million.
        ("resnet20", (32, 32, 3), SMALL, 269_722),
        ("resnet32", (32, 32, 3), SMALL, 464_154),
        ("resnet44", (32, 32, 3), SMALL, 658_586),
        ("resnet56", (32, 32, 3), SMALL, 853_018),
        ("resnet110", (32, 32, 3), SMALL, 1_727_962),
        # Zagoruyko & Komodakis 2016, tables 4 and 5: 2.7, 8.9, 11.0, 17.2 and 36.5 million.
        ("wrn_16_4", (32, 32, 3), SMALL, 2_748_890),
        ("wrn_40_4", (32, 32, 3), SMALL, 8_949_210),
        ("wrn_16_8", (32, 32, 3), SMALL, 10_961_370),
        ("wrn_22_8", (32, 32, 3), SMALL, 17_158_106),
        ("wrn_28_10", (32, 32, 3), SMALL, 36_479_194),
    ],
)
def test_published_parameter_counts(name, shape, fields, parameters):
    module = models.create(name, **fields)
    assert describe(module, shape).parameters == parameters


@pytest.mark.parametrize(
    ("name", "shape", "fields", "millions"),
    [
        (
            "lenet5",
            (28, 28, 1),
            SMALL,
            0.4165,
        ),  # LeCun et al. 1998 give 0.34 with fewer connections
        (
            "resnet20",
            (32, 32, 3),
            SMALL,
            40.55,
        ),  # "40.8 M" in later pruning papers, biases included
        ("resnet56", (32, 32, 3), SMALL, 125.5),
        ("vgg16", (224, 224, 3), ORIGINAL, 15_470),
        ("wrn_28_10", (32, 32, 3), SMALL, 5_240),  # "5.2 billion multiplications", table 5
    ],
)
def test_published_macs(name, shape, fields, millions):
    description = describe(models.create(name, **fields), shape)
    assert description.macs / 1e6 == pytest.approx(millions, rel=2e-3)


def test_agrees_with_xla():
    # Without padding, whose products XLA leaves out; three channels, so that it is a convolution.
    module = models.create("simple_two_conv", num_outputs=10, widths=(32, 64))
    images = jnp.zeros((1, 32, 32, 3))
    variables = module.init(jax.random.key(0), images, train=False)
    lowered = jax.jit(lambda v, x: module.apply(v, x, train=False).logits).lower(variables, images)
    assert 2 * describe(module, (32, 32, 3)).macs == pytest.approx(
        lowered.cost_analysis()["flops"], rel=0.02
    )


def test_rows_are_the_layers():
    module = models.create("lenet5", num_outputs=10)
    rows = {row.path: row for row in describe(module, (28, 28, 1)).rows}
    assert rows["conv1/conv"].output_shape == (28, 28, 6)
    assert rows["conv2/conv"].kernel == "5x5"
    assert rows["pool2"].kernel == "2x2/2"
    assert rows["pool2"].output_shape == (5, 5, 16)
    assert (rows["dense1"].parameters, rows["dense1"].macs) == (48_120, 48_000)


def test_auxiliary_heads_count_for_training_only():
    plain = describe(models.create("resnet8", num_outputs=10), (32, 32, 3))
    module = models.create("resnet8", num_outputs=10, aux=("stage1", "stage2"))
    both = [describe(module, (32, 32, 3), train=train) for train in (False, True)]
    for description in both:
        assert (description.parameters, description.macs) == (plain.parameters, plain.macs)
        assert description.training_parameters - plain.parameters == 170 + 330
        assert description.training_macs - plain.macs == 160 + 320
    assert len(both[1].rows) == len(both[0].rows) + 4


def test_a_shared_layer_counts_its_parameters_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            conv = layers.Conv(3, 1, use_bias=False, name="conv")
            return conv(conv(images))

    (row,) = describe(Twice(), (4, 4, 3)).rows
    assert (row.parameters, row.macs) == (9, 2 * 16 * 9)


def test_a_layer_of_unknown_cost_is_an_error():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return nn.Dense(3, name="foreign")(images)

    with pytest.raises(CnnlabError, match=r"foreign.*Dense.*has no macs"):
        describe(Foreign(), (4, 4, 3))
    with pytest.raises(CnnlabError, match=r"\(H, W, C\)"):
        describe(Foreign(), (1, 4, 4, 3))


def test_render_shows_the_totals():
    description = describe(models.create("lenet5", num_outputs=10), (28, 28, 1))
    console = Console(file=io.StringIO(), width=120)
    console.print(render(description))
    text = console.file.getvalue()
    assert "61,706" in text
    assert f"{np.sum([row.macs for row in description.rows]):,}" in text
