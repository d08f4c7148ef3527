"""Convolution arithmetic against lax's shapes, measured receptive fields and published ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnnlab import geometry
from cnnlab.types import CnnlabError

CONV = ("NWC", "WIO", "NWC")


def test_output_size_equals_lax():
    for size, kernel, stride, padding, dilation in itertools.product(
        (5, 8, 11), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2)
    ):
        convolve = functools.partial(
            lax.conv_general_dilated,
            window_strides=(stride,),
            padding=((padding, padding),),
            rhs_dilation=(dilation,),
            dimension_numbers=CONV,
        )
        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, size, 1), (kernel, 1, 1)))
        out = jax.eval_shape(convolve, *shapes)
        ours = geometry.conv_output_size(size, kernel, stride, padding, dilation)
        assert ours == out.shape[1], (size, kernel, stride, padding, dilation)


def test_a_window_that_does_not_fit_says_how_large_the_image_must_be():
    with pytest.raises(CnnlabError, match=r"window of 9 pixels.*at least 7 pixels"):
        geometry.conv_output_size(4, kernel_size=5, padding=1, dilation=2)


def test_published_costs():
    # AlexNet as one tower (Krizhevsky 2014), first layer and the largest dense one.
    assert geometry.conv_parameters(3, 64, (11, 11)) == 23_296
    assert geometry.dense_parameters(9216, 4096) == 37_752_832
    # MobileNet (Howard et al. 2017, table 1): depthwise 3x3 on 112x112x32, then pointwise to 64.
    assert geometry.conv_macs(32, 32, (3, 3), (112, 112), groups=32) == 3_612_672
    assert geometry.conv_macs(32, 64, (1, 1), (112, 112)) == 25_690_112
    assert geometry.dense_macs(1024, 1000) == 1_024_000


@pytest.mark.parametrize(
    "layers",
    [
        [(3, 1, 1), (3, 1, 1), (2, 2, 1), (3, 1, 1)],
        [(3, 2, 1), (3, 1, 2), (3, 1, 4), (5, 2, 1)],
    ],
)
def test_receptive_field_is_where_the_gradient_is(layers):
    def network(x):
        for kernel, stride, dilation in layers:
            x = lax.conv_general_dilated(
                x, jnp.ones((kernel, 1, 1)), (stride,), "VALID", (1,), (dilation,), CONV
            )
        return x[0, :2, 0]

    seen = np.asarray(jax.jacobian(network)(jnp.ones((1, 96, 1))))[:, 0, :, 0] != 0
    field = geometry.receptive_field(layers)
    first, second = (np.flatnonzero(row) for row in seen)
    assert first[-1] - first[0] + 1 == field.size
    assert second[0] - first[0] == field.stride


def test_receptive_field_of_vgg16():
    # Araujo, Norris & Sim 2019, table 1: 212 pixels at stride 32 after the last pooling.
    stages = [[(3, 1, 1)] * n + [(2, 2, 1)] for n in (2, 2, 3, 3, 3)]
    assert geometry.receptive_field(itertools.chain(*stages)) == (212, 32)
