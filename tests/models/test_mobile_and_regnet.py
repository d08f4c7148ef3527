"""MobileNetV2, EfficientNet-Lite and RegNets: published sizes, names, paddings, dilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from cnnlab import layers, models, pretrained
from cnnlab.models import mobilenet, regnet
from cnnlab.types import CnnlabError

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
TINY = {
    "num_outputs": 5,
    "stage_sizes": (1, 1, 2, 1),
    "widths": (16, 24, 32, 64),
    "strides": (2, 2, 2, 2),
    "kernel_sizes": (3, 5, 3, 3),
    "expansions": (1, 2, 2, 2),
    "width_factor": 0.1,
}
TINY_REGNET = {
    "num_outputs": 5,
    "depth": 5,
    "initial_width": 8,
    "width_slope": 8.0,
    "width_multiplier": 2.0,
    "group_width": 4,
}  # widths 8, 16 and 32 in 1, 1 and 3 blocks


def shapes(module, images=IMAGES):
    """Of each feature in order (JAX itself would sort them by name), and of the parameters."""
    found = {}

    def init():
        outputs, variables = module.init_with_output(KEY, images, train=False)
        found.update({name: f.shape[1:] for name, f in outputs.features.items()})
        return variables["params"]

    params = jax.eval_shape(init)
    return found, params


def quick(function, *arguments):
    """Compiled without optimisation: each runs once."""
    lowered = jax.jit(function).lower(*arguments)
    return lowered.compile({"xla_backend_optimization_level": 0})(*arguments)


# Weights and biases at 1,000 classes, as the published files hold them. RegNets differ in the
# numbers of `REGNETS` alone.
PARAMETERS = {
    "mobilenetv2_035": 1_677_128,
    "mobilenetv2_050": 1_968_680,
    "mobilenetv2_075": 2_636_424,
    "mobilenetv2_100": 3_504_872,
    "mobilenetv2_110d": 4_516_520,
    "mobilenetv2_120d": 5_831_144,
    "mobilenetv2_140": 6_108_776,
    "tf_efficientnet_lite0": 4_652_008,
    "tf_efficientnet_lite1": 5_416_680,
    "tf_efficientnet_lite2": 6_092_072,
    "tf_efficientnet_lite3": 8_197_096,
    "tf_efficientnet_lite4": 13_006_568,
    "regnetx_002": 2_684_792,
    "regnetx_032": 15_296_552,
    "regnetx_080": 39_572_648,
    "regnetx_320": 107_811_560,
    "regnety_002": 3_162_996,
    "regnety_032": 19_436_338,
    "regnety_040": 20_646_656,
    "regnety_160": 83_590_140,
}

# Radosavovic et al. 2020, figures 14 and 15: blocks, widths and group width of each stage.
REGNETS = {
    "regnetx_002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnetx_004": ((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "regnetx_006": ((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "regnetx_008": ((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "regnetx_016": ((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "regnetx_032": ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "regnetx_040": ((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "regnetx_064": ((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "regnetx_080": ((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "regnetx_120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnetx_160": ((2, 6, 13, 1), (256, 512, 896, 2048), 128),
    "regnetx_320": ((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    "regnety_002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnety_004": ((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "regnety_006": ((1, 3, 7, 4), (48, 112, 256, 608), 16),
    "regnety_008": ((1, 3, 8, 2), (64, 128, 320, 768), 16),
    "regnety_016": ((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "regnety_032": ((2, 5, 13, 1), (72, 216, 576, 1512), 24),
    "regnety_040": ((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "regnety_064": ((2, 7, 14, 2), (144, 288, 576, 1296), 72),
    "regnety_080": ((2, 4, 10, 1), (168, 448, 896, 2016), 56),
    "regnety_120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnety_160": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
    "regnety_320": ((2, 5, 12, 1), (232, 696, 1392, 3712), 232),
}


def test_every_variant_has_a_published_size():
    assert set(PARAMETERS) >= set(mobilenet.VARIANTS)
    assert set(REGNETS) == set(regnet.VARIANTS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    _, params = shapes(models.create(name, num_outputs=1000))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize("name", REGNETS)
def test_the_design_space_makes_the_published_widths_and_depths(name):
    blocks, widths, group = REGNETS[name]
    made = models.create(name, num_outputs=10).stages
    assert tuple(stage.blocks for stage in made) == blocks
    assert tuple(stage.width for stage in made) == widths
    # A group is no wider than its stage: the first stage of regnetx_080 has 80 channels.
    assert tuple(stage.group_width for stage in made) == tuple(min(group, w) for w in widths)


def test_the_design_space_by_hand():
    """w0 = 8, wa = 8, wm = 2: u = 8 16 24 32 40, s = 0 1 1.58 2 2.32, rounded 0 1 2 2 2."""
    made = regnet.stages(5, 8, 8.0, 2.0, 12)
    # Widths 8, 16, 32: the first below the group width 12, the others brought to multiples of it.
    assert made == ((1, 8, 8), (1, 12, 12), (3, 36, 12))
    assert regnet.stages(3, 16, 0.0, 2.0, 8) == ((3, 16, 8),)


@pytest.mark.parametrize(
    ("name", "blocks", "widths"),
    [
        # Multiples of 8, not below nine tenths: 16 * 0.35 = 5.6 -> 8, 24 * 0.35 = 8.4 -> 8, and
        # the stem's 32 * 0.35 = 11.2 -> 16 because 8 would be too few.
        ("mobilenetv2_035", (1, 2, 3, 4, 3, 3, 1), (16, 8, 8, 16, 24, 32, 56, 112, 1280)),
        ("mobilenetv2_140", (1, 2, 3, 4, 3, 3, 1), (48, 24, 32, 48, 88, 136, 224, 448, 1792)),
        ("mobilenetv2_120d", (1, 3, 5, 6, 5, 5, 1), (32, 24, 32, 40, 80, 112, 192, 384, 1280)),
        ("tf_efficientnet_lite0", (1, 2, 2, 3, 3, 4, 1), (32, 16, 24, 40, 80, 112, 192, 320, 1280)),
        ("tf_efficientnet_lite3", (1, 3, 3, 5, 5, 6, 1), (32, 24, 32, 48, 96, 136, 232, 384, 1280)),
    ],
)  # fmt: skip
def test_factors_round_as_published(name, blocks, widths):
    module = models.create(name, num_outputs=10)
    assert tuple(stage.blocks for stage in module.stages) == blocks
    made = (module.stem_width, *(stage.width for stage in module.stages), module.head_width)
    assert made == widths


def test_scaled_sizes_round_up_and_may_keep_the_ends():
    assert mobilenet.scaled_sizes((1, 2, 3, 4, 1), 1.2, True) == (2, 3, 4, 5, 2)
    assert mobilenet.scaled_sizes((1, 2, 3, 4, 1), 1.2, False) == (1, 3, 4, 5, 1)
    assert mobilenet.scaled_sizes((3,), 2.0, False) == (3,)
    assert mobilenet.scaled_sizes((3, 4), 0.5, True) == (2, 2)


@pytest.mark.parametrize(
    ("name", "some", "tensors"),
    [
        (
            "mobilenetv2_100",
            {
                "conv_stem.weight": (32, 3, 3, 3),
                "bn1.running_var": (32,),
                "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
                "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
                "blocks.0.0.bn2.bias": (16,),
                "blocks.3.2.conv_pw.weight": (384, 64, 1, 1),
                "blocks.3.2.bn1.weight": (384,),
                "blocks.3.2.conv_dw.weight": (384, 1, 3, 3),
                "blocks.3.2.conv_pwl.weight": (64, 384, 1, 1),
                "blocks.3.2.bn3.running_mean": (64,),
                "conv_head.weight": (1280, 320, 1, 1),
                "bn2.weight": (1280,),
                "classifier.weight": (1000, 1280),
            },
            262,  # 52 convolutions with 4 + 1 each, and the classifier's two
        ),
        (
            "regnety_002",
            {
                "stem.conv.weight": (32, 3, 3, 3),
                "stem.bn.running_mean": (32,),
                "s1.b1.conv1.conv.weight": (24, 32, 1, 1),
                "s1.b1.conv2.conv.weight": (24, 8, 3, 3),
                # A quarter of the block's input, which is the stem's 32.
                "s1.b1.se.fc1.weight": (8, 24, 1, 1),
                "s1.b1.se.fc2.bias": (24,),
                "s1.b1.downsample.conv.weight": (24, 32, 1, 1),
                "s1.b1.downsample.bn.weight": (24,),
                "s4.b7.se.fc1.weight": (92, 368, 1, 1),
                "s4.b7.conv3.bn.bias": (368,),
                "head.fc.bias": (1000,),
            },
            13 * (3 * 5 + 4) + 4 * 5 + 5 + 2,  # blocks with gates, shortcuts, stem, logits
        ),
    ],
)
def test_published_names_and_shapes(name, some, tensors):
    found = {entry.name: entry.published_shape for entry in pretrained.entries(name)}
    assert some.items() <= found.items()
    assert len(found) == tensors


def reference_block(params, stats, x, padding):
    """An inverted residual at stride 1 with a shortcut, in float64 by NumPy."""

    def norm(y, name):
        p, s = params[name], stats[name]
        scale = p["scale"] / np.sqrt(s["var"] + 1e-3)
        return (y - s["mean"]) * scale + p["bias"]

    params, stats, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, stats, x))
    y = np.clip(norm(x @ params["conv_pw"]["kernel"][0, 0], "norm1"), 0, 6)
    taps = params["conv_dw"]["kernel"][:, :, 0]
    filled = np.pad(y, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = x.shape[1:3]
    y = sum(
        filled[:, i : i + height, j : j + width] * taps[i, j]
        for i, j in np.ndindex(*taps.shape[:2])
    )
    y = np.clip(norm(y, "norm2"), 0, 6)
    return x + norm(y @ params["conv_pwl"]["kernel"][0, 0], "norm3")


def test_an_inverted_residual_is_what_the_paper_says(draw_variables):
    block = mobilenet.InvertedResidual(
        6, 5, 1, 1, 3, True, "same", 1e-3, "relu6", "batch", 0.0, "float32"
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 6, 6)), jnp.float32)
    variables = draw_variables(block, x)
    expected = reference_block(variables["params"], variables["batch_stats"], x, 2)
    found = quick(lambda v: block.apply(v, x, train=False), variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_paddings_differ_where_an_even_size_is_halved(draw_variables):
    """`"same"` pads 3x3 taps at stride 2 by 0 and 1, `"even"` by 1 and 1; odd sizes need both."""
    even, same = (
        models.create("tf_efficientnet_lite0", padding=padding, **TINY)
        for padding in ("even", "same")
    )
    # 33 -> 17 -> 9 -> 5 -> 3 -> 2 is odd all the way to the last halving.
    odd = jnp.asarray(np.random.default_rng(1).normal(size=(1, 33, 33, 3)), jnp.float32)
    variables = draw_variables(even, odd)

    def features(module, images):
        return quick(lambda v: module.apply(v, images, train=False).features, variables)

    jax.tree.map(np.testing.assert_array_equal, features(even, odd), features(same, odd))
    kernel = variables["params"]["conv_stem"]["kernel"]
    norm, stats = variables["params"]["norm1"], variables["batch_stats"]["norm1"]
    scale = norm["scale"] / np.sqrt(stats["var"] + 1e-3)
    for module, pads in ((even, (1, 1)), (same, (0, 1))):
        y = lax.conv_general_dilated(
            IMAGES, kernel, (2, 2), (pads, pads), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        expected = np.clip((np.asarray(y) - stats["mean"]) * scale + norm["bias"], 0, 6)
        np.testing.assert_allclose(features(module, IMAGES)["stem"], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "output_stride"),
    [("mobilenetv2_100", TINY, 8), ("regnety_002", TINY_REGNET, 8)],
)
def test_dilated_networks_hold_the_strided_ones_activations(
    name, fields, output_stride, draw_variables
):
    """Yu et al. 2017, section 2: with the same weights, the same values on the coarser grid."""
    if name.startswith("regnety"):
        fields = {**fields, "squeeze_excite": False}  # gates see the whole map, which differs
    strided, dilated = (models.create(name, output_stride=o, **fields) for o in (32, output_stride))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(1, 64, 64, 3)), jnp.float32)
    variables = draw_variables(strided, images)
    coarse, fine = (
        quick(lambda v, m=m: m.apply(v, images, train=False).features, variables)
        for m in (strided, dilated)
    )
    last = "head" if "head" in fine else f"stage{len(strided.stages)}"
    assert fine[last].shape[1] == 64 // output_stride
    assert coarse[last].shape[1] < fine[last].shape[1]
    for feature, expected in coarse.items():
        step = fine[feature].shape[1] // expected.shape[1]
        np.testing.assert_allclose(
            fine[feature][:, ::step, ::step], expected, rtol=1e-3, atol=1e-3, err_msg=feature
        )


def test_dilated_stages_follow_the_strides():
    strides = (2, 1, 2, 2, 2, 1, 2, 1)
    plain = [(s, 1, 1) for s in strides[1:]]
    assert layers.dilated_stages(strides, 32) == plain
    assert layers.dilated_stages(strides, 16) == [*plain[:5], (1, 1, 2), (1, 2, 2)]
    assert layers.dilated_stages(strides, 8)[3:] == [(1, 1, 2), (1, 2, 2), (1, 2, 4), (1, 4, 4)]
    assert layers.dilated_stages((4, 4, 3), 16) == [(4, 1, 1), (1, 1, 3)]


@pytest.mark.parametrize(
    ("name", "fields", "sizes"),
    [
        ("mobilenetv2_050", {}, (14, 14, 7, 4, 2, 2, 1, 1, 1)),
        ("mobilenetv2_050", {"stem": "small"}, (28, 28, 14, 7, 4, 4, 2, 2, 2)),
        (
            "tf_efficientnet_lite0",
            {"stem": "small", "strides": (1, 1, 2, 2, 1, 2, 1)},
            (28, 28, 28, 14, 7, 7, 4, 4, 4),
        ),
        ("mobilenetv2_100", {"stem": "small", "output_stride": 8}, (28, 28, 14, 7, 7, 7, 7, 7, 7)),
        ("regnetx_002", {}, (14, 7, 4, 2, 1)),
        ("regnety_002", {"stem": "small"}, (28, 14, 7, 4, 2)),
        ("regnetx_004", {"stem": "small", "output_stride": 16}, (28, 14, 7, 4, 4)),
    ],
)
def test_small_images(name, fields, sizes):
    images = jnp.zeros((1, 28, 28, 1))
    features, _ = shapes(models.create(name, num_outputs=10, **fields), images)
    assert tuple(shape[0] for shape in features.values()) == sizes


@pytest.mark.parametrize(
    ("name", "fields"), [("mobilenetv2_100", TINY), ("regnety_002", TINY_REGNET)]
)
def test_remat_and_stochastic_depth_change_the_program_alone(name, fields):
    plain = models.create(name, **fields)
    variables = jax.eval_shape(lambda: plain.init(KEY, IMAGES, train=False))

    def program(train, **more):
        module = models.create(name, **fields, **more)
        made = jax.eval_shape(lambda: module.init(KEY, IMAGES, train=False))
        assert jax.tree.structure(made) == jax.tree.structure(variables)

        def forward(v, key):
            rngs = {"dropout": key}
            return module.apply(v, IMAGES, train=train, rngs=rngs, mutable=["batch_stats"])[
                0
            ].logits

        return str(jax.make_jaxpr(forward)(variables, KEY))

    both = program(train=True, remat=True, drop_path=0.2)
    assert "remat" in both or "checkpoint" in both
    assert "random_bits" in both
    neither = program(train=True)
    assert not any(word in neither for word in ("remat", "checkpoint", "random_bits"))
    assert "random_bits" not in program(train=False, drop_path=0.2)


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
@pytest.mark.parametrize(
    ("name", "fields"), [("tf_efficientnet_lite0", TINY), ("regnety_002", TINY_REGNET)]
)
def test_other_norms_need_no_batch_statistics(name, fields, norm):
    module = models.create(name, norm=norm, **fields)
    variables = jax.eval_shape(lambda: module.init(KEY, IMAGES, train=False))
    assert set(variables) == {"params"}
    biases = {
        path[-2].key
        for path, _ in jax.tree_util.tree_flatten_with_path(variables["params"])[0]
        if path[-1].key == "bias" and path[-2].key.startswith("conv")
    }
    assert bool(biases) == (norm == "none")


@pytest.mark.parametrize("zero_init", [True, False])
def test_zero_init_starts_each_regnet_branch_at_zero(zero_init):
    module = models.create("regnety_002", zero_init=zero_init, **TINY_REGNET)
    zero = set()

    def watch(call, args, kwargs, context):
        if isinstance(context.module, layers.BatchNorm) and context.module.zero_scale:
            zero.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        shapes(module)
    blocks = ("s1_b1", "s2_b1", "s3_b1", "s3_b2", "s3_b3")
    assert zero == ({f"{block}/conv3/norm" for block in blocks} if zero_init else set())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mobilenetv2_100", {"stem": "smal"}, "did you mean 'small'"),
        ("mobilenetv2_100", {"padding": "SAME"}, "unknown padding 'SAME'"),
        ("mobilenetv2_100", {"output_stride": 12}, "got 12; the nearest is 8"),
        ("mobilenetv2_100", {"stage_sizes": (1, 2, 0, 4, 3, 3, 1)}, "stage_sizes.*at least 1"),
        ("mobilenetv2_100", {"widths": (16, 24)}, "widths.*each of the 7 stages"),
        ("mobilenetv2_100", {"strides": (1, 2, 2, 2, 1, 2)}, "strides.*each of the 7 stages"),
        ("mobilenetv2_100", {"kernel_sizes": (3, 3, 4, 3, 3, 3, 3)}, "must be odd"),
        ("mobilenetv2_100", {"width_factor": 0.0}, "width_factor.*above 0"),
        ("mobilenetv2_100", {"norm_epsilon": -1.0}, "norm_epsilon.*above 0"),
        ("mobilenetv2_100", {"stem_width": 0}, "stem_width.*at least 1"),
        ("mobilenetv2_100", {"drop_path": 1.0}, r"drop_path must be a rate in \[0, 1\)"),
        ("regnetx_002", {"stem": "deep"}, "unknown stem 'deep'"),
        ("regnetx_002", {"depth": 0}, "depth and group_width must be at least 1, got 0"),
        ("regnetx_002", {"initial_width": 30}, "multiple of 8, got 30; the nearest is 32"),
        ("regnetx_002", {"width_multiplier": 1.0}, "width_multiplier above 1"),
        ("regnetx_002", {"width_slope": -1.0}, "width_slope must be at least 0"),
        ("regnetx_002", {"stem_width": 0}, "stem_width must be at least 1"),
        ("regnetx_002", {"output_stride": 64}, "got 64; the nearest is 32"),
        ("regnety_002", {"zero_init": True, "norm": "group"}, "zero_init needs"),
    ],
)
def test_bad_values_are_explained(name, fields, message):
    with pytest.raises(CnnlabError, match=message):
        models.create(name, num_outputs=10, **fields)
