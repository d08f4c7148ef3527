"""Convolution arithmetic: output sizes, parameters, multiply-accumulates, receptive fields.

Pure functions of integers, per axis where nothing else is said. After Dumoulin & Visin 2016, "A
guide to convolution arithmetic for deep learning", and Araujo, Norris & Sim 2019, "Computing
receptive fields of convolutional neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cnnlab.types import CnnlabError


def effective_kernel(kernel_size: int, dilation: int = 1) -> int:
    """The extent of a dilated kernel: F_eff = D (F - 1) + 1 pixels."""
    return dilation * (kernel_size - 1) + 1


def conv_output_size(
    size: int, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> int:
    """The output's extent: W' = floor((W - F_eff + 2 P) / S) + 1.

    Args:
        size: W, the input's extent in pixels.
        kernel_size: F; the window of a pooling counts as a kernel.
        stride: S, at least 1.
        padding: P, pixels on each side.
        dilation: D, at least 1.

    Returns:
        W' in pixels, at least 1.

    Raises:
        CnnlabError: the kernel does not fit into the padded input.
    """
    extent = effective_kernel(kernel_size, dilation)
    if size + 2 * padding < extent:
        raise CnnlabError(
            f"a window of {extent} pixels (kernel_size {kernel_size}, dilation {dilation}) does "
            f"not fit into {size} pixels with padding {padding}; the image must be at least "
            f"{extent - 2 * padding} pixels here"
        )
    return (size - extent + 2 * padding) // stride + 1


def conv_parameters(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    groups: int = 1,
    use_bias: bool = True,
) -> int:
    """Trained numbers of a convolution: F_h F_w (C_in / groups) C_out, plus C_out biases."""
    weights = math.prod(kernel_size) * (in_channels // groups) * out_channels
    return weights + use_bias * out_channels


def conv_macs(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    output_size: Sequence[int],
    *,
    groups: int = 1,
) -> int:
    """Multiply-accumulates of a convolution on one image, bias not counted.

    H' W' F_h F_w (C_in / groups) C_out. Taps that fall on padding count, as in published tables.
    """
    weights = conv_parameters(in_channels, out_channels, kernel_size, groups=groups, use_bias=False)
    return math.prod(output_size) * weights


def dense_parameters(in_features: int, out_features: int, *, use_bias: bool = True) -> int:
    """Trained numbers of a dense layer: N_in N_out, plus N_out biases."""
    return in_features * out_features + use_bias * out_features


def dense_macs(in_features: int, out_features: int) -> int:
    """Multiply-accumulates of a dense layer on one example, bias not counted: N_in N_out."""
    return in_features * out_features


class ReceptiveField(NamedTuple):
    """What one output pixel sees of the input, along one axis.

    Attributes:
        size: its extent in input pixels.
        stride: distance in input pixels between neighbouring outputs' fields.
    """

    size: int = 1
    stride: int = 1

    def then(self, kernel_size: int, stride: int = 1, dilation: int = 1) -> ReceptiveField:
        """The field after one more layer: size + (F_eff - 1) stride, and stride times S."""
        extent = effective_kernel(kernel_size, dilation)
        return ReceptiveField(self.size + (extent - 1) * self.stride, self.stride * stride)


def receptive_field(layers: Iterable[tuple[int, int, int]]) -> ReceptiveField:
    """The receptive field of a chain of (kernel_size, stride, dilation), first layer first."""
    field = ReceptiveField()
    for kernel_size, stride, dilation in layers:
        field = field.then(kernel_size, stride, dilation)
    return field
