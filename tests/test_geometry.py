"""Convolution arithmetic against lax's shapes, measured receptive fields and published ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cnnlab import geometry
from cnnlab.geometry import ReceptiveField
from cnnlab.types import CnnlabError

CONV = ("NWC", "WIO", "NWC")


def lax_size(size, kernel, stride, padding, dilation):
    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (stride,), padding, (1,), (dilation,), CONV)

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, size, 1), (kernel, 1, 1)))
    return jax.eval_shape(convolve, *shapes).shape[1]


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 300),
    kernel=st.integers(1, 11),
    stride=st.integers(1, 7),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dilation=st.integers(1, 5),
)
def test_output_size_equals_lax(size, kernel, stride, padding, dilation):
    expected = lax_size(size, kernel, stride, [padding], dilation)
    if expected == 0:
        with pytest.raises(CnnlabError, match="does not fit"):
            geometry.conv_output_size(size, kernel, stride, padding, dilation)
        return
    assert geometry.conv_output_size(size, kernel, stride, padding, dilation) == expected
    if padding[0] == padding[1]:
        assert geometry.conv_output_size(size, kernel, stride, padding[0], dilation) == expected


@settings(deadline=None, max_examples=100)
@given(
    size=st.integers(1, 300),
    kernel=st.integers(1, 11),
    stride=st.integers(1, 7),
    dilation=st.integers(1, 5),
)
def test_same_padding_equals_lax(size, kernel, stride, dilation):
    extent = geometry.effective_kernel(kernel, dilation)
    padding = geometry.same_padding(size, kernel, stride, dilation)
    assert [padding] == lax.padtype_to_pads((size,), (extent,), (stride,), "SAME")
    ours = geometry.conv_output_size(size, kernel, stride, padding, dilation)
    assert ours == lax_size(size, kernel, stride, "SAME", dilation) == -(-size // stride)


def test_a_window_that_does_not_fit_says_how_large_the_image_must_be():
    with pytest.raises(CnnlabError, match=r"window of 9 pixels.*at least 7 pixels"):
        geometry.conv_output_size(4, kernel_size=5, padding=1, dilation=2)
    with pytest.raises(CnnlabError, match=r"padding \(0, 1\).*at least 8 pixels"):
        geometry.conv_output_size(4, kernel_size=5, padding=(0, 1), dilation=2)


def test_published_costs():
    # AlexNet as one tower (Krizhevsky 2014), first layer and the largest dense one.
    assert geometry.conv_parameters(3, 64, (11, 11)) == 23_296
    assert geometry.dense_parameters(9216, 4096) == 37_752_832
    # MobileNet (Howard et al. 2017, table 1): depthwise 3x3 on 112x112x32, then pointwise to 64.
    assert geometry.conv_macs(32, 32, (3, 3), (112, 112), groups=32) == 3_612_672
    assert geometry.conv_macs(32, 64, (1, 1), (112, 112)) == 25_690_112
    assert geometry.dense_macs(1024, 1000) == 1_024_000
    assert geometry.activation_bytes((112, 112, 64), itemsize=2) == 1_605_632


LAYERS = st.lists(
    st.builds(
        lambda window, kernel, stride, dilation, padding: (
            kernel,
            stride,
            1 if window else dilation,
            min(padding, geometry.effective_kernel(kernel, 1 if window else dilation) - 1),
            window,
        ),
        st.booleans(),
        st.integers(1, 5),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=4,
)


def network(layers, x):
    """Convolutions by ones and average poolings of [1, W, 1]."""
    for kernel, stride, dilation, padding, pool in layers:
        pads = ((0, 0), (padding, padding), (0, 0))
        if pool:
            total = lax.reduce_window(x, 0.0, lax.add, (1, kernel, 1), (1, stride, 1), pads)
            x = total / kernel
        else:
            ones = jnp.ones((kernel, 1, 1))
            x = lax.conv_general_dilated(x, ones, (stride,), pads[1:2], (1,), (dilation,), CONV)
    return x[0, :, 0]


@settings(deadline=None, max_examples=20)
@given(LAYERS)
def test_the_field_of_a_random_stack_is_the_support_of_the_gradient(layers):
    field = geometry.receptive_field(layer[:4] for layer in layers)
    # The first output that sees no padding, and the next one. 1,500 pixels are enough for those
    # of the largest stack to be far from the other end.
    first = -(field.start // field.stride)
    value, pull_back = jax.vjp(functools.partial(network, layers), jnp.ones((1, 1500, 1)))
    for output in (first, first + 1):
        (gradient,) = pull_back(jnp.zeros_like(value).at[output].set(1.0))
        seen = np.flatnonzero(np.asarray(gradient))
        assert (seen[0], seen[-1] + 1) == field.of(output)


def test_receptive_field_of_vgg16():
    # Araujo, Norris & Sim 2019, table 1: 212 pixels at stride 32 after the last pooling, and an
    # effective padding of 90.
    stages = [[(3, 1, 1, 1)] * n + [(2, 2)] for n in (2, 2, 3, 3, 3)]
    assert geometry.receptive_field(itertools.chain(*stages)) == ReceptiveField(212, 32, -90)


def test_receptive_field_of_alexnet():
    # Araujo, Norris & Sim 2019, table 1 (alexnet_v2): 195 pixels, stride 32, padding 64.
    convolutions = [(11, 4), (3, 2), (5, 1, 1, 2), (3, 2), *[(3, 1, 1, 1)] * 3, (3, 2)]
    field = geometry.receptive_field(convolutions)
    assert field == ReceptiveField(195, 32, -64)
    assert field.centre == -64 + 97
    assert field.of(2) == (0, 195)


def test_the_field_of_branches_is_their_union():
    trunk = ReceptiveField(7, 2, -3)
    branch = trunk.then(3, 2, padding=1).then(3, padding=1)
    assert branch == ReceptiveField(19, 4, -9)
    # A shortcut by a strided 1x1 convolution has the same centre and a smaller field.
    assert branch.union(trunk.then(1, 2)) == branch
    # Branches with other centres: pixels -9 to 9 and 5 to 19.
    assert branch.union(ReceptiveField(15, 4, 5)) == ReceptiveField(29, 4, -9)
    with pytest.raises(CnnlabError, match=r"equal strides.*\[2, 4\]"):
        branch.union(trunk)
