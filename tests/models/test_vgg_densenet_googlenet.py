"""VGG, DenseNet, GoogLeNet and SqueezeNet: published counts, sizes and names, and their heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import print_saved_residuals

from cnnlab import describe, models, pretrained
from cnnlab.models import googlenet
from cnnlab.types import CnnlabError

KEY = jax.random.key(0)


def abstract(name: str, size: int, *, num_outputs: int = 1000, **fields) -> tuple[dict, int]:
    """Shapes of the features (without batch) and the number of parameters."""
    module = models.create(name, num_outputs=num_outputs, **fields)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    outputs, variables = jax.eval_shape(
        lambda x: module.init_with_output(KEY, x, train=False), images
    )
    assert outputs.logits.shape == (1, num_outputs)
    assert outputs.aux == ()
    features = {key: feature.shape[1:] for key, feature in outputs.features.items()}
    return features, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def images_of(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).normal(size=(2, height, width, channels)).astype("float32")


def quick(function, *arguments):
    """Runs a function once: compiling without optimisation costs less than it saves."""
    compiled = jax.jit(function).lower(*arguments)
    return jax.device_get(compiled.compile({"xla_backend_optimization_level": 0})(*arguments))


def relu(x):
    return np.maximum(x, 0)


def affine(x, layer):
    """A dense layer or a 1x1 convolution in float64."""
    kernel = np.float64(layer["kernel"])
    return x @ kernel.reshape(kernel.shape[-2:]) + layer["bias"].reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )


def regions(images, size):
    """Means of the pixels floor(i n / m) to ceil((i + 1) n / m), one by one."""
    (height, width), (high, wide) = images.shape[1:3], size
    out = np.empty((len(images), high, wide, images.shape[-1]))
    for i in range(high):
        for j in range(wide):
            rows = slice(int(np.floor(i * height / high)), int(np.ceil((i + 1) * height / high)))
            columns = slice(int(np.floor(j * width / wide)), int(np.ceil((j + 1) * width / wide)))
            out[:, i, j] = np.float64(images)[:, rows, columns].mean((1, 2))
    return out


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As torchvision and timm 1.0.31 build them.
        ("vgg11", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg11_bn", 132_868_840),
        ("vgg13_bn", 133_053_736),
        ("vgg16_bn", 138_365_992),
        ("vgg19_bn", 143_678_248),
        ("densenet121", 7_978_856),
        ("densenet161", 28_681_000),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
        ("googlenet", 13_004_888),
        ("squeezenet1_0", 1_248_424),
        ("squeezenet1_1", 1_235_496),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert abstract(name, 224)[1] == parameters


@pytest.mark.parametrize(
    ("name", "fields", "millions"),
    [
        ("densenet_40_12", {}, 1.0),
        ("densenet_bc_100_12", {}, 0.8),
        ("densenet_bc_100_12", {"stage_sizes": (31, 31, 31), "growth_rate": 40}, 25.6),
    ],
)
def test_counts_of_small_densenets_are_those_of_the_papers_table_2(name, fields, millions):
    features, parameters = abstract(name, 32, num_outputs=10, **fields)
    assert round(parameters / 1e6, 1) == millions
    assert [features[f"stage{i}"][0] for i in (1, 2, 3)] == [32, 16, 8]


@pytest.mark.parametrize(
    ("name", "size", "fields", "expected"),
    [
        # Szegedy et al. 2015, table 1.
        ("googlenet", 224, {}, [(56, 192), (28, 480), (14, 832), (7, 1024)]),
        ("googlenet", 224, {"last_pool": 3}, [(56, 192), (28, 480), (14, 832), (7, 1024)]),
        # Huang et al. 2017, table 1.
        ("densenet121", 224, {}, [(112, 64), (56, 256), (28, 512), (14, 1024), (7, 1024)]),
        # Iandola et al. 2016, table 1, whose first convolution has padding.
        ("squeezenet1_0", 227, {}, [(111, 96), (55, 256), (27, 512), (13, 512)]),
        ("squeezenet1_1", 224, {}, [(111, 64), (55, 128), (27, 256), (13, 512)]),
        ("vgg16", 224, {}, [(112, 64), (56, 128), (28, 256), (14, 512), (7, 512)]),
        ("vgg16", 28, {"pools": 4}, [(14, 64), (7, 128), (3, 256), (1, 512), (1, 512)]),
        # Small images.
        ("inception_small", 28, {}, [(28, 32), (28, 64), (14, 128), (7, 256)]),
        (
            "densenet121",
            28,
            {"stem": "small"},
            [(28, 64), (28, 256), (14, 512), (7, 1024), (3, 1024)],
        ),
        ("squeezenet1_1", 28, {"stem": "small"}, [(28, 64), (28, 128), (14, 256), (7, 512)]),
    ],
)
def test_sizes_of_the_features(name, size, fields, expected):
    features, _ = abstract(name, size, num_outputs=10, **fields)
    first = 1 if name.startswith("vgg") else 0
    names = [f"stage{i}" if i else "stem" for i in range(first, first + len(expected))]
    assert features == {key: (n, n, c) for key, (n, c) in zip(names, expected, strict=True)}


def test_the_papers_googlenet_has_larger_kernels_and_only_those():
    # 5x5 instead of 3x3 taps between the reduction and the third branch's output of each block.
    more = sum(16 * p[3] * p[4] for stage in googlenet._PLANS for p in stage)
    _, parameters = abstract("googlenet", 224, large_kernel=5, last_pool=3)
    assert parameters == 13_004_888 + more


@pytest.mark.parametrize(("height", "width", "map_size"), [(64, 96, (2, 3)), (224, 290, (7, 9))])
def test_vgg_averages_small_maps_up_and_slides_over_large_ones(
    height, width, map_size, draw_variables
):
    fields = {"stage_sizes": (1,) * 5, "width": 2, "head_width": 6}
    module = models.create("vgg11", num_outputs=5, **fields)
    images = images_of(height, width)
    variables = draw_variables(module, images)
    outputs = quick(lambda v: module.apply(v, images, train=False), variables)
    x = outputs.features["stage5"]
    assert x.shape[1:3] == map_size
    x = regions(x, tuple(max(n, 7) for n in map_size))
    params = variables["params"]
    kernel = np.float64(params["hidden1"]["kernel"])
    windows = np.lib.stride_tricks.sliding_window_view(x, (7, 7), axis=(1, 2))
    hidden = np.einsum("bijchw,hwco->bijo", windows, kernel) + params["hidden1"]["bias"]
    pooled = relu(affine(relu(hidden), params["hidden2"])).mean((1, 2))
    np.testing.assert_allclose(outputs.logits, affine(pooled, params["logits"]), rtol=1e-4)


def test_vgg_drops_each_hidden_layer():
    module = models.create("vgg11", num_outputs=5, width=2, head_width=6, dropout=0.5)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda: module.init(KEY, images, train=False))
    program = jax.make_jaxpr(lambda v: module.apply(v, images, train=True, rngs={"dropout": KEY}))
    assert str(program(variables)).count("random_bits") == 2


def test_googlenets_heads_exist_in_training_only():
    module = models.create("googlenet", num_outputs=1000)
    description = describe.describe(module, (224, 224, 3), train=True)
    assert description.parameters == 6_624_904
    assert description.training_parameters == 13_004_888
    # A 1x1 convolution and two dense layers each.
    heads = 2 * (2048 * 1024 + 1024 * 1000) + 16 * 128 * (512 + 528)
    assert description.training_macs - description.macs == heads
    rows = [row for row in description.rows if row.path.startswith("aux")]
    assert sum(row.parameters for row in rows) == 13_004_888 - 6_624_904
    _, without = abstract("googlenet", 224, aux_heads=False)
    assert without == 6_624_904


def test_googlenets_own_heads_come_ahead_of_further_ones():
    fields = {"num_outputs": 7, "width": 4, "stage_sizes": (1, 3, 1), "norm": "none"}
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def trained(**more):
        module = models.create("googlenet", **fields, **more)
        variables = jax.eval_shape(lambda x: module.init(KEY, x, train=False), images)
        outputs = jax.eval_shape(lambda v, x: module.apply(v, x, train=True), variables, images)
        return [head.shape for head in outputs.aux], set(variables["params"])

    assert trained()[0] == [(2, 7)] * 2
    shapes, names = trained(aux=("stage1",))
    assert (shapes, names) == ([(2, 7)] * 3, {"net", "aux_stage1"})
    # A stage of two blocks has no last block but one beside the first.
    fields["stage_sizes"] = (1, 2, 1)
    assert trained()[0] == [(2, 7)]


@pytest.fixture(scope="module")
def small_googlenet(draw_variables):
    """Images, parameters and outputs in training, without normalisation; one block a stage."""
    images = images_of(150, 130)
    fields = {"width": 4, "stage_sizes": (1, 1, 1), "norm": "none", "large_kernel": 5}
    module = models.create("googlenet", num_outputs=7, **fields)
    variables = draw_variables(module, images)
    outputs = quick(lambda v: module.apply(v, images, train=True), variables)
    return variables["params"], outputs


def test_an_auxiliary_head_is_that_of_the_paper(small_googlenet):
    params, outputs = small_googlenet
    head = params["aux1"]
    x = regions(outputs.features["stage2"], (4, 4))
    x = relu(affine(x, head["conv"]["conv"]))
    # Published weights are those of maps with channels first.
    x = relu(affine(np.moveaxis(x, -1, 1).reshape(2, -1), head["hidden"]))
    (logits,) = outputs.aux
    np.testing.assert_allclose(logits, affine(x, head["logits"]), rtol=1e-4, atol=1e-5)


def test_an_inception_block_is_four_branches_side_by_side(small_googlenet):
    params, outputs = small_googlenet
    block = params["stage2_1"]

    def pool(x, strides, padding):
        window, strides = (1, 3, 3, 1), (1, strides, strides, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)

    def conv(x, *names):
        for name in names:
            layer = block[name]["conv"]
            x = lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.maximum(x + layer["bias"].reshape(1, 1, 1, -1), 0)
        return x

    # Even sizes: the last row and column are seen only by windows that hang over the edge.
    before = outputs.features["stage1"]
    assert before.shape[1:3] == (18, 16)
    x = pool(before, 2, ((0, 0), (0, 1), (0, 1), (0, 0)))
    pooled = pool(x, 1, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = jnp.concatenate(
        [
            conv(x, "branch1"),
            conv(x, "branch2_0", "branch2_1"),
            conv(x, "branch3_0", "branch3_1"),
            conv(pooled, "branch4_1"),
        ],
        axis=-1,
    )
    assert block["branch3_1"]["conv"]["kernel"].shape[:2] == (5, 5)
    np.testing.assert_allclose(outputs.features["stage2"], expected, rtol=1e-4, atol=1e-5)


def test_bypass_adds_the_input_of_every_second_fire_module(draw_variables):
    images = images_of(32, 32)
    fields = {"num_outputs": 5, "width": 8, "stem": "small", "stage_sizes": (1, 1, 1)}
    plain, bypass = (models.create("squeezenet1_1", **fields, bypass=b) for b in (False, True))
    variables = draw_variables(plain, images)
    a, b = quick(
        lambda v: [m.apply(v, images, train=False).features for m in (plain, bypass)], variables
    )
    np.testing.assert_array_equal(b["stage1"], a["stage1"])
    pooled = a["stage1"][:, ::2, ::2].copy()
    for i in range(3):
        for j in range(3):
            tap = a["stage1"][:, i::2, j::2]
            seen = pooled[:, : tap.shape[1], : tap.shape[2]]
            np.maximum(seen, tap, out=seen)
    np.testing.assert_allclose(b["stage2"], a["stage2"] + pooled, rtol=1e-5, atol=1e-6)


def test_squeezenets_logits_are_averages_of_rectified_maps(draw_variables):
    images = images_of(32, 32)
    module = models.create("squeezenet1_1", num_outputs=5, width=8, stem="small")
    variables = draw_variables(module, images)
    outputs = quick(lambda v: module.apply(v, images, train=False), variables)
    maps = relu(affine(np.float64(outputs.features["stage3"]), variables["params"]["logits"]))
    np.testing.assert_allclose(outputs.logits, maps.mean((1, 2)), rtol=1e-5)


def test_squeezenets_modules_grow_by_the_papers_metaparameters():
    fields = {"squeeze_ratio": 0.25, "share_3x3": 0.25, "width": 64}
    module = models.create("squeezenet1_0", num_outputs=10, **fields)
    images = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(lambda: module.init(KEY, images, train=False))["params"]
    for i in range(8):
        fire = params[f"fire{i + 2}"]
        channels = [fire[n]["conv"]["bias"].size for n in ("squeeze", "expand1x1", "expand3x3")]
        total = 64 * (1 + i // 2)
        assert channels == [total // 4, 3 * total // 4, total // 4]


@pytest.mark.parametrize(
    ("name", "some"),
    [
        (
            "vgg16",
            {
                "stage1_conv2/conv": "features.2",
                "stage5_conv3/conv": "features.28",
                "hidden1": "pre_logits.fc1",
                "logits": "head.fc",
            },
        ),
        # Convolutions, normalisations, activations and poolings in one sequence.
        ("vgg19_bn", {"stage3_conv1/norm": "features.15", "stage5_conv4/conv": "features.49"}),
        (
            "densenet121",
            {
                "conv0": "features.conv0",
                "stage3_24/norm2": "features.denseblock3.denselayer24.norm2",
                "transition1/conv": "features.transition1.conv",
                "norm5": "features.norm5",
                "logits": "classifier",
            },
        ),
        (
            "googlenet",
            {
                "conv1/conv": "conv1.conv",
                "conv3/norm": "conv3.bn",
                "stage1_1/branch2_0/conv": "inception3a.branch2.0.conv",
                "stage2_5/branch1/norm": "inception4e.branch1.bn",
                "stage3_2/branch4_1/conv": "inception5b.branch4.1.conv",
                "aux1/conv/conv": "aux1.conv.conv",
                "aux2/hidden": "aux2.fc1",
                "aux2/logits": "aux2.fc2",
                "logits": "fc",
            },
        ),
        (
            "squeezenet1_0",
            {
                "stem/conv": "features.0",
                "fire4/squeeze/conv": "features.5.squeeze",
                "fire5/expand3x3/conv": "features.7.expand3x3",
                "fire9/expand1x1/conv": "features.12.expand1x1",
                "logits": "classifier.1",
            },
        ),
        (
            "squeezenet1_1",
            {
                "fire3/squeeze/conv": "features.4.squeeze",
                "fire4/squeeze/conv": "features.6.squeeze",
                "fire6/squeeze/conv": "features.9.squeeze",
                "fire9/squeeze/conv": "features.12.squeeze",
            },
        ),
    ],
)
def test_published_names(name, some):
    found = pretrained.entries(name)
    assert len({entry.name for entry in found}) == len(found)
    names = {"/".join(entry.path[1:-1]): entry.name.rpartition(".")[0] for entry in found}
    assert {path: names[path] for path in some} == some


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vgg16", {"head": "average"}),
        ("densenet121", {"stem": "small"}),
        ("densenet_40_12", {}),
        ("inception_small", {}),
        ("squeezenet1_1", {"norm": "batch"}),
    ],
)
def test_networks_without_published_weights_say_so(name, fields):
    with pytest.raises(CnnlabError, match="no published weights are known"):
        pretrained.entries(name, **fields)


def test_remat_keeps_what_layers_add_and_not_what_they_put_together(capsys):
    """Pleiss et al. 2017: memory linear in the depth of a dense block, not quadratic."""
    images = jnp.zeros((1, 8, 8, 3))

    def saved(depth, remat):
        fields = {"stage_sizes": (depth,), "growth_rate": 4, "norm": "none", "remat": remat}
        module = models.create("densenet_bc_100_12", num_outputs=2, **fields)
        params = jax.eval_shape(lambda: module.init(KEY, images, train=False))
        print_saved_residuals(lambda v: module.apply(v, images, train=True).logits.sum(), params)
        kept = capsys.readouterr().out.splitlines()
        maps = [line.split("]")[0] for line in kept if "[1,8,8," in line and "argument" not in line]
        return sum(int(line.rpartition(",")[2]) for line in maps)

    linear, quadratic = ([saved(depth, remat) for depth in (2, 4, 6)] for remat in (True, False))
    assert np.diff(linear, 2) == 0
    assert np.diff(quadratic, 2) > 0


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vgg16", {"head_width": 0}, "head_width must be at least 1"),
        ("vgg16", {"width": 0}, "at least 1, got widths \\(0,"),
        ("densenet121", {"stage_sizes": ()}, "stage_sizes must be numbers of at least 1"),
        ("densenet121", {"growth_rate": 0}, "growth_rate must be at least 1"),
        ("densenet121", {"reduction": 0.0}, r"reduction must be in \(0, 1\], got 0.0"),
        ("densenet121", {"stem": "smal"}, "did you mean 'small'"),
        ("densenet121", {"layer_dropout": 1.0}, "layer_dropout must be a rate"),
        ("googlenet", {"stage_sizes": (2, 6, 2)}, r"\(2, 5, 2\), got \(2, 6, 2\).*give widths"),
        ("googlenet", {"stage_sizes": (1, 1, 1, 1)}, "give widths"),
        ("googlenet", {"stage_sizes": (2,)}, "aux_heads read.*set aux_heads=False"),
        ("googlenet", {"large_kernel": 4}, "large_kernel must be odd.*got 4"),
        ("googlenet", {"last_pool": 4}, "last_pool must be 2 or 3, got 4"),
        ("googlenet", {"aux_dropout": -0.1}, "aux_dropout must be a rate"),
        ("googlenet", {"width": 0}, "width must be at least 1"),
        ("inception_small", {"widths": (64, 128)}, "each of the 3 stages"),
        ("inception_small", {"widths": (64, 128, 8)}, "at least 16"),
        ("squeezenet1_1", {"width": 1}, "width must be at least 2"),
        ("squeezenet1_1", {"squeeze_ratio": 0}, "squeeze_ratio must be in"),
        ("squeezenet1_1", {"share_3x3": 1.0}, "share_3x3 in"),
        ("squeezenet1_1", {"stage_sizes": (0,)}, "at least 1"),
        ("squeezenet1_1", {"stem": "5x5"}, "unknown stem '5x5'"),
    ],
)
def test_bad_values_are_explained(name, fields, message):
    with pytest.raises(CnnlabError, match=message):
        models.create(name, num_outputs=10, **fields)
