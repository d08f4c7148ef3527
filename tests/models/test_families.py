"""What single families promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab import describe, geometry, models
from cnnlab.types import CnnlabError

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)


def shapes(module, images=IMAGES):
    outputs, variables = jax.eval_shape(lambda: module.init_with_output(KEY, images, train=False))
    return {name: f.shape[1:] for name, f in outputs.features.items()}, variables


@pytest.mark.parametrize(
    ("output_stride", "preact", "shortcut"), [(1, False, "A"), (1, True, "B"), (2, False, "B")]
)
def test_a_dilated_resnet_holds_the_strided_ones_activations(
    output_stride, preact, shortcut, draw_variables
):
    """Yu et al. 2017, section 2: with the same weights, the same values on the coarser grid."""
    fields = {"num_outputs": 10, "depth": 14, "width": 4, "preact": preact, "shortcut": shortcut}
    strided = models.create("resnet14", **fields)
    dilated = models.create("resnet14", **fields, output_stride=output_stride)
    variables = draw_variables(strided, IMAGES)
    coarse, fine = (
        jax.jit(lambda v, m=m: m.apply(v, IMAGES, train=False).features)(variables)
        for m in (strided, dilated)
    )
    assert fine["stage3"].shape[1] == 32 // output_stride
    for name, expected in coarse.items():
        step = fine[name].shape[1] // expected.shape[1]
        np.testing.assert_allclose(
            fine[name][:, ::step, ::step], expected, rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_option_a_pads_and_option_b_projects():
    a, b = (models.create("resnet20", num_outputs=10, shortcut=shortcut) for shortcut in ("A", "B"))
    count = lambda m: sum(x.size for x in jax.tree.leaves(shapes(m)[1]["params"]))  # noqa: E731
    # Two 1x1 projections, 16 -> 32 and 32 -> 64, each with a normalisation.
    assert count(b) - count(a) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_zero_init_starts_as_the_shortcuts_alone():
    module = models.create("resnet8", num_outputs=10, width=4, zero_init=True)
    abstract = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    variables = module.lazy_init(KEY, abstract, train=False)
    features = jax.jit(lambda v: module.apply(v, IMAGES, train=False).features)(variables)
    np.testing.assert_array_equal(features["stage1"], features["stem"])
    np.testing.assert_array_equal(features["stage3"][..., :4], features["stem"][:, ::4, ::4])
    assert not np.asarray(features["stage3"][..., 4:]).any()


def test_sizes_of_the_papers():
    lenet, _ = shapes(models.create("lenet5", num_outputs=10), jnp.zeros((1, 28, 28, 1)))
    assert lenet == {"stage1": (14, 14, 6), "stage2": (5, 5, 16)}  # S2 and S4 of figure 2
    vgg, _ = shapes(models.create("vgg16", num_outputs=10))
    assert list(vgg.values()) == [
        (16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512), (1, 1, 512),
    ]  # fmt: skip
    cheap, _ = shapes(models.create("resnet8", num_outputs=10, stem_stride=2))
    assert cheap["stem"] == (16, 16, 16)
    assert cheap["stage3"] == (4, 4, 64)
    wide, _ = shapes(models.create("wrn_28_10", num_outputs=10))
    assert wide["stage3"] == (8, 8, 640)


def test_free_form_vgg_is_the_stack_that_was_asked_for():
    by_hand = {
        "stage_sizes": (2, 2, 2),
        "widths": (16, 32, 64),
        "pools": 2,
        "norm": "batch",
        "head": "average",
    }
    assert models.create("vgg_small", num_outputs=10) == models.create(
        "vgg16", num_outputs=10, **by_hand
    )
    features, _ = shapes(models.create("vgg11", num_outputs=10, pools=4), jnp.zeros((1, 28, 28, 1)))
    assert features["stage5"] == (1, 1, 512)


def test_dilated_stack_keeps_its_map_and_sees_what_geometry_says(draw_variables):
    dilations = (1, 2, 4)
    module = models.create(
        "dilated_stack",
        num_outputs=10,
        dilations=dilations,
        width=2,
        stem_stride=1,
        norm="none",
        activation="identity",
    )
    variables = draw_variables(module, IMAGES)
    pixel = lambda x: module.apply(variables, x, train=False).features["stage3"][0, 16, 16, 0]  # noqa: E731
    seen = np.abs(jax.jit(jax.grad(pixel))(IMAGES)[0]).sum(-1) > 0
    field = geometry.receptive_field([(3, 1, d) for d in (1, *dilations)])
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == field.size == 17
    assert shapes(module)[0]["stage3"] == (32, 32, 2)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_separable_stack_has_the_parameters_of_its_blocks(kernel_size):
    module = models.create("separable_stack12", num_outputs=10, kernel_size=kernel_size)
    features, variables = shapes(module)
    assert features == {
        "stem": (32, 32, 32), "stage1": (32, 32, 64), "stage2": (16, 16, 128), "stage3": (8, 8, 256)
    }  # fmt: skip
    widths = [32, *[64] * 2, *[128] * 4, *[256] * 6]
    norms = sum(2 * 2 * width for width in widths) - 2 * 256  # all but the last feed a depthwise
    kernels = 3 * 3 * 3 * 32 + sum(c * (kernel_size**2 + f) for c, f in itertools.pairwise(widths))
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert count == kernels + norms + 257 * 10


def test_separable_blocks_make_the_published_mobilenet():
    """Howard et al. 2017, table 8: 4.2 million parameters, 569 million multiply-adds."""
    module = models.create(
        "separable_stack12", num_outputs=1000, stage_sizes=(1, 2, 2, 6, 2), stem_stride=2
    )
    description = describe.describe(module, (224, 224, 3))
    assert description.parameters == 4_231_976
    assert round(description.macs / 1e6) == 569


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage_sizes": (2, 0)}, "at least 1, such as"),
        ({"widths": (32, 64)}, "each of the 3 stages"),
        ({"stem_width": 0}, "stem_width 0"),
        ({"kernel_size": 4}, "odd.*got 4; use 5"),
    ],
)
def test_separable_stack_explains_bad_values(fields, message):
    with pytest.raises(CnnlabError, match=message):
        models.create("separable_stack12", num_outputs=10, **fields)
