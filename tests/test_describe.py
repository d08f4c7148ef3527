"""Counts against published ones and XLA's analysis, fields against published ones and gradients."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cnnlab import cli, geometry, layers, models, registry
from cnnlab.describe import (
    describe,
    effective_fields,
    effective_size,
    field_words,
    memory,
    render,
    usual_input,
)
from cnnlab.geometry import ReceptiveField
from cnnlab.types import CnnlabError, Outputs

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


@functools.cache
def described(name, shape=None, **fields):
    usual, classes = usual_input(name)
    return describe(models.create(name, num_outputs=classes, **fields), shape or usual)


def stages(name, shape=None, **fields):
    """Feature -> receptive field, the same along both axes."""
    description = described(name, shape, **fields)
    assert description.unknown == ""
    assert all(high == wide for high, wide in (f.receptive_field for f in description.features))
    return {feature.name: feature.receptive_field[0] for feature in description.features}


@pytest.mark.parametrize(
    ("name", "feature", "size", "stride"),
    [
        # Araujo, Norris & Sim 2019, table 1; ResNets there stride in other layers, but for these.
        ("vgg16", "stage5", 212, 32),
        ("resnet18", "stage4", 435, 32),
        ("resnet34", "stage4", 899, 32),
        ("mobilenetv2_100", "stage7", 491, 32),
        # By hand: blocks of one 3x3 at strides 4, 8, 16 and 32, strided ones in the stage before.
        ("resnet50", "stage4", 11 + 2 * (3 * 4 + 4 + 3 * 8 + 8 + 5 * 16 + 16 + 2 * 32), 32),
        ("densenet121", "stage4", 2071, 32),
    ],
)
def test_published_receptive_fields(name, feature, size, stride):
    field = stages(name)[feature]
    assert (field.size, field.stride) == (size, stride)


def test_dilation_keeps_the_field_of_the_strided_network():
    strided, dilated = (stages("resnet18", output_stride=stride)["stage3"] for stride in (32, 8))
    assert (dilated.stride, strided.stride) == (8, 16)
    assert dilated.size == strided.size  # 3x3 / 2 and 3x3 dilated by 2 after it
    assert dilated.centre == strided.centre == 0.0


def test_gates_and_norms_over_positions_see_the_whole_image():
    for name, fields in (("seresnet18", {}), ("resnet8", {"norm": "group"})):
        field = stages(name, (64, 64, 3), **fields)["stage2"]
        assert field.stride == 0
        assert field.start <= 0
        assert field.start + field.size >= 64
    local = stages("resnet8", (64, 64, 3))["stage2"]
    assert local.stride == 2
    assert stages("resnet8", (64, 64, 3), norm="layer")["stage2"] == local


def test_fields_are_found_inside_rematerialised_blocks():
    plain, kept = (
        describe(models.create("resnet18", num_outputs=10, remat=remat), (64, 64, 3))
        for remat in (False, True)
    )
    assert plain == kept


ANY_LAYER = st.one_of(
    st.builds(
        lambda kernel, stride, dilation, padding, groups: layers.Conv(
            4, kernel, stride, padding, dilation, groups
        ),
        st.tuples(st.integers(1, 5), st.integers(1, 3)),
        st.tuples(st.integers(1, 2), st.integers(1, 3)),
        st.tuples(st.integers(1, 3), st.integers(1, 2)),
        st.one_of(st.integers(0, 2), st.sampled_from(["SAME", "VALID"])),
        st.sampled_from([1, 2, 4]),
    ),
    st.builds(
        lambda kind, window, stride, padding, ceil: layers.Pool(
            kind, window, stride, min(padding, window - 1), ceil
        ),
        st.sampled_from(["max", "average"]),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(0, 2),
        st.booleans(),
    ),
)


class Chain(nn.Module):
    layers: tuple

    @nn.compact
    def __call__(self, x, *, train):
        del train
        features = {}
        for i, layer in enumerate(self.layers):
            x = features[f"f{i}"] = layer(x)
        return Outputs(x.mean((1, 2)), features=features)


# Any four layers fit into 364 pixels: 13 for the largest window, after three poolings of 4 by 3.
@settings(deadline=None, max_examples=40)
@given(st.lists(ANY_LAYER, min_size=1, max_size=4), st.integers(364, 384))
def test_traced_fields_are_those_of_the_formulas(chain, size):
    shape = (size, size + 13, 4)
    description = describe(Chain(tuple(chain)), shape)
    assert description.unknown == ""
    for axis in (0, 1):
        field, length = ReceptiveField(), shape[axis]
        for layer, row in zip(chain, description.rows, strict=True):
            if isinstance(layer, layers.Pool):
                kernel, stride, dilation, padding = layer.window, layer.strides, 1, layer.padding
            else:
                kernel, stride, dilation = (
                    value[axis] for value in (layer.kernel_size, layer.strides, layer.dilation)
                )
                padding = {
                    "VALID": 0,
                    "SAME": geometry.same_padding(length, kernel, stride, dilation)[0],
                }.get(layer.padding, layer.padding)
            field = field.then(kernel, stride, dilation, padding)
            assert row.receptive_field[axis] == field, row
            length = row.output_shape[axis]


class Graph(nn.Module):
    """A residual sum, branches side by side and a pooling that hangs over the edge."""

    @nn.compact
    def __call__(self, x, *, train):
        del train
        ones = {"use_bias": False, "kernel_init": nn.initializers.ones}
        stem = layers.Conv(2, 3, 2, 1, name="stem", **ones)(x)
        branch = layers.Conv(2, 3, 2, 1, name="down", **ones)(stem)
        branch = layers.Conv(2, 3, 1, "SAME", 2, name="dilated", **ones)(branch)
        joined = branch + layers.Conv(2, 1, 2, name="shortcut", **ones)(stem)
        wide = layers.Conv(2, (5, 1), 1, ((4, 0), (0, 0)), name="tall", **ones)(joined)
        both = jnp.concatenate([joined, wide], -1)
        pooled = layers.Pool("average", 3, 2, ceil=True, name="pool")(both)
        return Outputs(
            pooled.mean((1, 2)),
            features={"joined": joined, "both": both, "pooled": pooled, "tall": wide},
        )


def test_the_field_of_a_graph_is_the_support_of_the_gradient():
    shape = (160, 128, 1)  # far larger than the fields
    images = jnp.ones((1, *shape))
    variables = Graph().init(jax.random.key(0), images, train=False)
    found, pull_back = jax.vjp(lambda x: Graph().apply(variables, x, train=False).features, images)
    for feature in describe(Graph(), shape).features:
        high, wide = feature.receptive_field
        for unit in ((9, 6), (8, 6), (9, 7)):
            cotangents = jax.tree.map(jnp.zeros_like, found)
            cotangents[feature.name] = cotangents[feature.name].at[0, *unit].set(1.0)
            seen = np.asarray(pull_back(cotangents)[0])[0, ..., 0] != 0
            for field, lines, place in ((high, seen.any(1), unit[0]), (wide, seen.any(0), unit[1])):
                pixels = np.flatnonzero(lines)
                assert (pixels[0], pixels[-1] + 1) == field.of(place), feature.name


def test_branches_of_different_strides_are_unknown_from_there_on():
    class Skewed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            a = layers.Conv(2, 3, 2, 1, name="strided")(x)
            b = layers.Conv(2, 1, 1, name="corner")(x)[:, : a.shape[1], : a.shape[2]]
            return layers.Conv(2, 3, 1, 1, name="after")(a + b)

    description = describe(Skewed(), (16, 16, 1))
    strided, corner, after = description.rows
    assert strided.receptive_field[0] == ReceptiveField(3, 2, -1)
    assert corner.receptive_field[0] == ReceptiveField(1, 1, 0)
    assert after.receptive_field == (None, None)
    assert description.unknown.startswith("after: ")
    assert field_words(after.receptive_field) == ("?", "?")


def test_a_primitive_that_is_not_known_is_named_and_not_guessed():
    class Cumulative(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            return layers.Conv(2, 1, name="after")(jnp.cumsum(x, 1))

    description = describe(Cumulative(), (16, 16, 1))
    assert description.rows[0].receptive_field == (None, None)
    assert "'cumsum'" in description.unknown


@pytest.mark.parametrize(
    "name",
    [
        next(n for n, p in registry.plugins("models").items() if p.module.__name__ == module)
        for module in sorted({p.module.__name__ for p in registry.plugins("models").values()})
    ],
)
def test_every_family_is_known_at_its_usual_input(name):
    description = described(name, None)
    assert description.unknown == ""
    for row in description.rows:
        assert None not in row.receptive_field, row.path
    logits = description.rows[-1].receptive_field[0]
    assert logits.stride == 0


def test_usual_inputs():
    assert usual_input("resnet18") == ((224, 224, 3), 1000)
    assert usual_input("preact_resnet18") == ((32, 32, 3), 10)
    assert usual_input("resnet20") == ((32, 32, 3), 10)
    assert usual_input("lenet5") == ((28, 28, 1), 10)
    assert usual_input("drn_c_26") == ((224, 224, 3), 1000)
    assert usual_input("drn_c_26", stem="small") == ((32, 32, 3), 10)
    assert usual_input("tf_efficientnet_lite2") == ((260, 260, 3), 1000)
    assert usual_input("convnext_small") == ((224, 224, 3), 1000)  # a width's name


def test_activation_memory_follows_the_dtype():
    wide, narrow = (
        describe(models.create("vgg_small", num_outputs=10, dtype=dtype), (28, 28, 1))
        for dtype in ("float32", "bfloat16")
    )
    assert wide.rows[0].activation_bytes == 28 * 28 * 16 * 4
    assert narrow.rows[0].activation_bytes == 28 * 28 * 16 * 2
    assert wide.activation_bytes == sum(row.activation_bytes for row in wide.rows)
    assert memory(28 * 28 * 16 * 4) == "49 KiB"
    assert (memory(40), memory(3 << 30)) == ("40 B", "3 GiB")


def test_the_effective_field_lies_within_the_theoretical_one():
    module = Chain((layers.Conv(4, 3, 1, 1), layers.Conv(4, 3, 2, 1), layers.Conv(4, 3, 1, 1)))
    strength = effective_fields(module, (24, 20, 1), ("f0", "f2"), draws=2, batch=8)
    description = describe(module, (24, 20, 1))
    for name in ("f0", "f2"):
        (feature,) = (f for f in description.features if f.name == name)
        (top, bottom), (left, right) = (
            field.of(size // 2)
            for field, size in zip(feature.receptive_field, feature.output_shape[:2], strict=True)
        )
        inside = np.zeros((24, 20), bool)
        inside[top:bottom, left:right] = True
        assert strength[name].shape == (24, 20)
        assert strength[name].max() == 1.0
        np.testing.assert_array_equal(strength[name] > 0, inside)
    # The middle of a stack is on more paths than the rim (Luo et al. 2016, section 2).
    rim = strength["f2"][[top, bottom - 1], left:right].mean()
    middle = strength["f2"][(top + bottom) // 2, left:right].mean()
    assert rim < 0.7 * middle
    assert effective_size(strength["f0"]) == 3.0
    with pytest.raises(CnnlabError, match=r"no feature 'f9'"):
        effective_fields(module, (24, 20, 1), ("f9",))


def test_the_command_says_what_it_took_and_gives_all_as_json(capsys):
    assert cli.main(["describe", "resnet18", "--json"]) == 0
    printed = capsys.readouterr()
    assert "--input 224x224x3 and --classes 1000" in printed.err
    whole = json.loads(printed.out)
    assert whole["parameters"] == 11_689_512
    fields = {f["name"]: f["receptive_field"] for f in whole["features"]}
    assert fields["stage4"] == [{"size": 435, "stride": 32, "start": -217}] * 2


def test_the_command_prints_whole_numbers_into_a_file(capsys):
    assert cli.main(["describe", "vgg_small", "--input", "28x28x1", "--classes", "10"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    row = next(line for line in printed.out.splitlines() if "stage1_conv2/conv" in line)
    assert " ".join(row.split()) == (
        "stage1_conv2/conv Conv 3x3 28x28x16 5 1 2,320 1,806,336 49 KiB"
    )
