"""ConvNeXt, dilated networks without gridding, the context module, and rematerialisation."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from flax import linen as nn
from flax import traverse_util

from cnnlab import describe, geometry, layers, models, pretrained, registry
from cnnlab.models import convnext, dilated
from cnnlab.types import CnnlabError

KEY = jax.random.key(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def shapes(module: nn.Module, size: int, channels: int = 3) -> tuple[dict, dict]:
    """Shapes of the features (without batch) and of the variables."""
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    outputs, variables = jax.eval_shape(
        lambda x: module.init_with_output(KEY, x, train=False), images
    )
    return {name: f.shape[1:] for name, f in outputs.features.items()}, variables


def count(name: str, num_outputs: int, size: int) -> int:
    _, variables = shapes(models.create(name, num_outputs=num_outputs), size)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def quick(function, *arguments):
    """Runs a function once: compiling without optimisation costs less than it saves."""
    compiled = jax.jit(function).lower(*arguments)
    return jax.device_get(compiled.compile({"xla_backend_optimization_level": 0})(*arguments))


def start(module: nn.Module, images: jax.Array) -> tuple[dict, dict]:
    """Features and parameters of a network as it starts."""
    outputs, variables = quick(lambda k: module.init_with_output(k, images, train=False), KEY)
    return outputs.features, variables["params"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As timm 1.0.31 builds them.
        ("convnext_atto", 3_695_520),
        ("convnext_femto", 5_217_784),
        ("convnext_pico", 9_045_672),
        ("convnext_nano", 15_593_560),
        ("convnext_tiny", 28_589_128),
        ("convnext_small", 50_223_688),
        ("convnext_base", 88_591_464),
        ("convnext_atto_ols", 3_702_912),
        ("convnext_nano_ols", 15_649_560),
    ],
)
def test_convnext_has_the_published_parameters(name, parameters):
    assert count(name, 1000, 64) == parameters


def test_convnext_costs_what_the_paper_says():
    """Liu et al. 2022, table 1: 4.5 G at 224x224; dense layers count at every position."""
    description = describe.describe(models.create("convnext_tiny", num_outputs=1000), (224, 224, 3))
    assert round(description.macs / 1e9, 1) == 4.5


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_convnext_block_is_the_papers(conv_mlp, draw_variables):
    """Figure 4 in float64, by SciPy."""
    block = convnext.ConvNeXtBlock(7, conv_mlp, 1e-6, "gelu", "layer", 0.0, "float32")
    x = normal(2, 9, 8, 4)
    variables = draw_variables(block, x)
    assert variables["params"]["mlp_fc1"]["kernel"].ndim == (4 if conv_mlp else 2)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    y = np.zeros(x.shape)
    for b, c in np.ndindex(2, 4):
        padded = np.pad(np.asarray(x[b, :, :, c], np.float64), 3)
        kernel = p["conv_dw"]["kernel"][:, :, 0, c]
        y[b, :, :, c] = scipy.signal.correlate2d(padded, kernel, "valid") + p["conv_dw"]["bias"][c]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * p["norm"]["scale"] + p["norm"]["bias"]
    y = y @ p["mlp_fc1"]["kernel"].reshape(4, 16) + p["mlp_fc1"]["bias"]
    y = y * (1 + scipy.special.erf(y / np.sqrt(2))) / 2
    y = y @ p["mlp_fc2"]["kernel"].reshape(16, 4) + p["mlp_fc2"]["bias"]
    expected = x + p["gamma"]["gamma"] * y
    np.testing.assert_allclose(
        quick(lambda v: block.apply(v, x, train=False), variables), expected, rtol=1e-5, atol=1e-5
    )


def test_convnext_takes_published_names():
    names = {entry.name: entry.published_shape for entry in pretrained.entries("convnext_nano_ols")}
    expected = {
        "stem.0.weight": (80, 3, 3, 3),
        "stem.1.bias": (80,),
        "stem.2.weight": (80,),
        "stages.0.blocks.1.gamma": (80,),
        "stages.2.blocks.7.conv_dw.weight": (320, 1, 7, 7),
        "stages.2.blocks.7.norm.bias": (320,),
        "stages.3.blocks.0.mlp.fc1.weight": (2560, 640, 1, 1),
        "stages.3.downsample.0.weight": (320,),
        "stages.3.downsample.1.weight": (640, 320, 2, 2),
        "head.norm.weight": (640,),
        "head.fc.weight": (1000, 640),
    }
    assert {name: names.get(name) for name in expected} == expected
    found = pretrained.entries("convnext_tiny", stage_sizes=(1,))
    tiny = {entry.name: entry.published_shape for entry in found}
    assert tiny["stages.0.blocks.0.mlp.fc1.weight"] == (384, 96)
    assert tiny["stem.0.weight"] == (96, 3, 4, 4)


def test_convnext_starts_with_nearly_closed_branches():
    module = models.create("convnext_tiny", num_outputs=7, stage_sizes=(1,), width=32)
    features, params = start(module, normal(1, 16, 16, 3))
    np.testing.assert_allclose(features["stage1"], features["stem"], atol=1e-4)
    flat = traverse_util.flatten_dict(params)
    gammas = [leaf for path, leaf in flat.items() if path[-1] == "gamma"]
    assert [(gamma == np.float32(1e-6)).all() for gamma in gammas] == [True]
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            # Four standard errors of the standard deviation of so many draws.
            assert abs(leaf.std() / 0.02 - 1) < 4 / np.sqrt(2 * leaf.size), path
        elif path[-1] == "bias":
            assert not leaf.any(), path
    without = models.create("convnext_tiny", num_outputs=7, width=4, layer_scale=0.0)
    paths = traverse_util.flatten_dict(shapes(without, 32)[1]["params"])
    assert not [path for path in paths if "gamma" in path]


def test_stochastic_depth_keeps_the_expectation(draw_variables):
    rate, examples = 0.25, 4096
    block = convnext.ConvNeXtBlock(3, False, 1.0, "gelu", "layer", rate, "float32")
    one = normal(1, 3, 3, 4)
    variables = draw_variables(block, one)
    x = jnp.broadcast_to(one, (examples, 3, 3, 4))
    branch = quick(lambda v: block.apply(v, one, train=False) - one, variables)
    trained = quick(lambda v: block.apply(v, x, train=True, rngs={"dropout": KEY}) - x, variables)
    kept = np.abs(trained).max((1, 2, 3)) > 0
    # A whole example's branch is dropped, or scaled so that the mean over examples is the branch.
    np.testing.assert_allclose(
        trained[kept] * (1 - rate), np.broadcast_to(branch, trained[kept].shape), atol=1e-5
    )
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / examples)


@pytest.mark.parametrize(
    ("name", "blocks"), [("convnext_atto", 12), ("drn_c_26", 10), ("drn_d_22", 8)]
)
def test_rates_of_stochastic_depth_rise_from_0_to_the_given_one(name, blocks):
    module = models.create(name, num_outputs=7, width=4, drop_path=0.3)
    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, layers.DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes(module, 32)
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, blocks))


@pytest.mark.parametrize(
    ("name", "fields", "size", "stages"),
    [
        ("convnext_atto", {}, 224, (56, 28, 14, 7)),
        ("convnext_atto_ols", {}, 224, (56, 28, 14, 7)),
        ("convnext_atto", {"stem": "small"}, 28, (14, 7, 3, 1)),
        ("convnext_atto", {"stem": "small"}, 64, (32, 16, 8, 4)),
        # Yu et al. 2017, section 2: maps of 28x28 from images of 224x224.
        ("drn_c_26", {}, 224, (224, 112, 56, 28, 28, 28, 28, 28)),
        ("drn_d_22", {"stem": "small"}, 28, (28, 28, 14, 7, 7, 7, 7, 7)),
        ("context_basic", {"stem_stride": 1}, 28, (28,) * 8),
    ],
)
def test_maps_have_the_sizes_of_the_papers(name, fields, size, stages):
    features, _ = shapes(models.create(name, num_outputs=7, **fields), size)
    assert set(features) == {"stem", *(f"stage{i + 1}" for i in range(len(stages)))}
    assert tuple(features[f"stage{i + 1}"][0] for i in range(len(stages))) == stages


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("drn_d_22", 16.4),
        ("drn_c_26", 21.1),
        ("drn_d_38", 26.5),
        ("drn_c_42", 31.2),
        ("drn_d_54", 35.8),
        ("drn_d_105", 54.8),
    ],
)
def test_drn_has_the_published_parameters(name, millions):
    """The table of the authors' release."""
    assert round(count(name, 1000, 64) / 1e6, 1) == millions


def test_drn_c_58_leaves_out_only_the_projection_that_its_authors_do_not_use():
    """Their count, 41.6 million, has a shortcut from 2048 to 512 channels that is never added."""
    assert round((count("drn_c_58", 1000, 64) + 2048 * 512 + 2 * 512) / 1e6, 1) == 41.6


@pytest.mark.parametrize(("name", "convolutions"), [("drn_c_26", 2), ("drn_d_22", 1)])
def test_drn_ends_in_falling_dilations_without_shortcuts(name, convolutions):
    module = models.create(name, num_outputs=7, width=4)
    rows = describe.describe(module, (64, 64, 3)).rows
    kernels = {
        f"stage{i}": [row.kernel for row in rows if row.path.startswith(f"stage{i}") and row.kernel]
        for i in range(1, 9)
    }
    assert kernels["stage7"] == ["3x3:2"] * convolutions
    assert kernels["stage8"] == ["3x3"] * convolutions
    assert kernels["stage5"] == ["1x1", *["3x3:2"] * 4]
    assert kernels["stage6"] == ["1x1", *["3x3:4"] * 4]
    assert kernels["stage3"] == ["1x1/2", "3x3/2", *["3x3"] * 3]
    first = ["3x3"] if convolutions == 1 else ["3x3", "3x3"]
    assert kernels["stage1"] == first
    assert not [row.path for row in rows if row.kind == "Pool" and row.kernel != "global"]


def test_context_modules_are_those_of_the_papers_table():
    """Yu & Koltun 2016, table 1: receptive fields, channels; section 3: about 64 C^2 weights."""
    fields = registry.get("models", "context_basic").fields
    chain = [*((3, 1, d) for d in fields["dilations"]), (1, 1, 1)]
    seen = [geometry.receptive_field(chain[: i + 1]).size for i in range(8)]
    assert seen == [3, 5, 9, 17, 33, 65, 67, 67]
    for name, channels in (
        ("context_basic", (1, 1, 1, 1, 1, 1, 1, 1)),
        ("context_large", (2, 2, 4, 8, 16, 32, 32, 1)),
    ):
        features, variables = shapes(models.create(name, num_outputs=7, width=21), 32)
        assert tuple(features[f"stage{i}"][-1] / 21 for i in range(1, 9)) == channels
        flat = traverse_util.flatten_dict(variables["params"])
        weights = sum(
            leaf.size for path, leaf in flat.items() if "stage" in path[0] and "kernel" in path
        )
        widths = (1, *channels)
        assert weights == 21**2 * sum(
            a * b * (1 if i == 7 else 9) for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        if name == "context_basic":
            assert weights == 64 * 21**2


def test_a_context_module_sees_67_pixels(draw_variables):
    """And the 3x3 stem at stride 1 two more."""
    module = models.create(
        "context_basic", num_outputs=7, width=2, stem_stride=1, activation="identity"
    )
    images = normal(1, 75, 75, 1)
    variables = draw_variables(module, images)
    pixel = lambda x: module.apply(variables, x, train=False).features["stage8"][0, 37, 37, 0]  # noqa: E731
    seen = quick(jax.grad(pixel), images)[0, :, :, 0] != 0
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert (rows[0], rows[-1]) == (columns[0], columns[-1]) == (37 - 34, 37 + 34)


@pytest.mark.parametrize("name", ["context_basic", "context_large"])
def test_context_modules_start_as_the_identity(name, monkeypatch):
    """Equations 4 and 5, whose noise is left out here: what the stem gives passes unchanged."""
    monkeypatch.setattr(dilated, "_NOISE", 0.0)
    module = models.create(name, num_outputs=7, width=2)
    features, _ = start(module, normal(1, 24, 24, 3))
    assert (features["stem"] > 0).any()
    np.testing.assert_allclose(features["stage8"], features["stem"], rtol=1e-6)


def test_equation_5_breaks_the_symmetry_of_groups():
    channels, inner, outer = 8, 16, 64
    kernel = np.asarray(dilated.identity_kernel(channels)(KEY, (3, 3, inner, outer)))
    share = channels / outer
    passed = np.equal.outer(np.arange(inner) // 2, np.arange(outer) // 8)
    assert (kernel[1, 1][passed] == share).all()
    mask = np.ones(kernel.shape, bool)
    mask[1, 1] = ~passed
    rest = kernel[mask]
    assert len(np.unique(rest)) > 0.99 * rest.size
    assert abs(rest.mean()) < 4 * 0.01 * share / np.sqrt(rest.size)
    assert abs(rest.std() / (0.01 * share) - 1) < 4 / np.sqrt(2 * rest.size)
    # Equation 4: without groups there is no symmetry to break.
    basic = np.asarray(dilated.identity_kernel(8)(KEY, (3, 3, 8, 8)))
    assert basic.sum() == 8
    np.testing.assert_array_equal(basic[1, 1], np.eye(8))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("convnext_atto", {"stem": "pach"}, "unknown stem 'pach'.*Valid: 'imagenet', 'small'"),
        ("convnext_atto", {"stage_sizes": (2, 0)}, "at least 1, such as"),
        ("convnext_atto", {"width": 0}, "width must be at least 1, got 0"),
        ("convnext_atto", {"kernel_size": 6}, "odd.*got 6; use 7"),
        ("convnext_atto", {"layer_scale": -1.0}, "layer_scale.*got -1"),
        ("convnext_atto", {"drop_path": 1.0}, "drop_path must be a rate"),
        ("drn_c_26", {"stage_sizes": (1,) * 7}, "eight numbers"),
        ("drn_c_26", {"stage_sizes": (1, 1, 0, 1, 1, 1, 0, 0)}, "eight numbers"),
        ("drn_c_26", {"block": "bottle"}, "did you mean 'bottleneck'"),
        ("drn_c_26", {"stem": "deep"}, "unknown stem 'deep'"),
        ("drn_c_26", {"width": 0}, "width must be at least 1"),
        ("context_large", {"multipliers": (1, 2)}, "each of the 7 dilations"),
        ("context_large", {"multipliers": (0,) * 7}, "at least 1 for each"),
        ("context_basic", {"kernel_init": "id"}, "unknown kernel_init 'id'"),
    ],
)
def test_bad_values_are_explained(name, fields, message):
    with pytest.raises(CnnlabError, match=message):
        models.create(name, num_outputs=10, **fields)


def test_an_image_too_small_is_explained():
    with pytest.raises(CnnlabError, match=r'stage 4 would halve a map of 1x1.*set stem="small"'):
        shapes(models.create("convnext_atto", num_outputs=10), 28)
    with pytest.raises(CnnlabError, match="multiples of 3, got 4 and 6"):
        dilated.identity_kernel(3)(KEY, (3, 3, 4, 6))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # He et al. 2016, table 6, gives 0.27, 0.85 and 1.7 million with option A.
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        # Zagoruyko & Komodakis 2016, tables: 2.2, 8.9, 2.7, 11.0 and 36.5 million.
        ("wrn_40_2", 2_243_546),
        ("wrn_40_4", 8_949_210),
        ("wrn_16_4", 2_748_890),
        ("wrn_16_8", 10_961_370),
        ("wrn_28_10", 36_479_194),
    ],
)
def test_small_image_resnets_have_the_published_parameters(name, parameters):
    assert count(name, 10, 32) == parameters


@pytest.mark.parametrize(
    ("name", "output_stride"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 8)]
)
def test_a_dilated_imagenet_resnet_holds_the_strided_ones_activations(
    name, output_stride, draw_variables
):
    """Yu et al. 2017, section 2: with the same weights, the same values on the coarser grid."""
    fields = {"num_outputs": 10, "width": 4, "stage_sizes": (1, 1, 1, 1)}
    strided = models.create(name, **fields)
    dilated = models.create(name, **fields, output_stride=output_stride)
    images = normal(1, 64, 64, 3)
    variables = draw_variables(strided, images)
    coarse, fine = (
        quick(lambda v, m=m: m.apply(v, images, train=False).features, variables)
        for m in (strided, dilated)
    )
    assert fine["stage4"].shape[1] == 64 // output_stride
    assert coarse["stage4"].shape[1] == 2
    for stage, expected in coarse.items():
        step = fine[stage].shape[1] // expected.shape[1]
        np.testing.assert_allclose(
            fine[stage][:, ::step, ::step], expected, rtol=1e-3, atol=1e-4, err_msg=stage
        )


def with_remat() -> list[str]:
    """One network of each file whose `build` takes `remat`."""
    first: dict[str, str] = {}
    for name, plugin in registry.plugins("models").items():
        if "remat" in plugin.parameters:
            first.setdefault(inspect.getfile(plugin.module), name)
    return list(first.values())


def operations(jaxpr) -> tuple[list, list]:
    """What a program computes: each operation, of which earlier results, and which come out.

    Rematerialised parts are opened, so that programs that differ in nothing else are equal.
    """
    found = []

    def walk(jaxpr, inputs: list) -> list:
        names = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        read = lambda atom: str(atom) if hasattr(atom, "val") else names[atom]  # noqa: E731
        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            if equation.primitive.name == "remat2":
                results = walk(equation.params["jaxpr"], values)
            else:
                settings = {key: str(value) for key, value in equation.params.items()}
                # Functions print as addresses.
                settings = {key: text for key, text in settings.items() if " at 0x" not in text}
                found.append((equation.primitive.name, values, settings))
                results = [(len(found), i) for i in range(len(equation.outvars))]
            names.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = range(len(jaxpr.constvars) + len(jaxpr.invars))
    return found, walk(jaxpr, list(inputs))


@pytest.mark.parametrize("name", with_remat())
def test_remat_computes_what_the_plain_network_does(name):
    """Parameters, outputs, moved statistics: operation by operation, so gradients agree too."""
    known = registry.get("models", name).parameters
    small: dict = {"width": 4, "stage_sizes": (1,) * len(known.get("stage_sizes", ())), "depth": 8}
    small = {field: value for field, value in small.items() if field in known}
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    modules = [models.create(name, num_outputs=3, **small, remat=flag) for flag in (False, True)]
    # Flax raises where the other network's parameters have other names or shapes.
    variables = jax.eval_shape(lambda x: modules[0].init(KEY, x, train=False), images)

    def program(module):
        def forward(variables, images, key):
            return module.apply(
                variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )

        return jax.make_jaxpr(forward)(variables, images, KEY).jaxpr

    plain, remat = map(program, modules)
    assert "remat2" not in {equation.primitive.name for equation in plain.eqns}
    assert "remat2" in {equation.primitive.name for equation in remat.eqns}
    assert operations(remat) == operations(plain)


def test_remat_gives_the_same_gradients(draw_variables):
    """And in numbers, for one with batch statistics."""
    name, fields = "separable_stack12", {"num_outputs": 3, "width": 4, "stage_sizes": (1,)}
    images = normal(2, 16, 16, 3)
    plain, remat = (models.create(name, **fields, remat=flag) for flag in (False, True))
    variables = draw_variables(plain, images)
    rest = {collection: tree for collection, tree in variables.items() if collection != "params"}

    def loss(params, module):
        outputs, moved = module.apply(
            {"params": params, **rest}, images, train=True, mutable=["batch_stats"]
        )
        return (outputs.logits * jnp.asarray([[1.0, -2.0, 0.5]])).sum(), moved

    expected, actual = (
        quick(lambda p, m=m: jax.grad(loss, has_aux=True)(p, m), variables["params"])
        for m in (plain, remat)
    )
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + 1e-7, jax.tree_util.keystr(path)
