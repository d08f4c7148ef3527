"""Convolution arithmetic: output sizes, parameters, multiply-accumulates, receptive fields.

Pure functions of integers, per axis where nothing else is said. After Dumoulin & Visin 2016, "A
guide to convolution arithmetic for deep learning", and Araujo, Norris & Sim 2019, "Computing
receptive fields of convolutional neural networks".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from cnnlab.types import CnnlabError


def effective_kernel(kernel_size: int, dilation: int = 1) -> int:
    """The extent of a dilated kernel: F_eff = D (F - 1) + 1 pixels."""
    return dilation * (kernel_size - 1) + 1


def conv_output_size(
    size: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
) -> int:
    """The output's extent: W' = floor((W - F_eff + 2 P) / S) + 1.

    Args:
        size: W, the input's extent in pixels.
        kernel_size: F; the window of a pooling counts as a kernel.
        stride: S, at least 1.
        padding: P, pixels on each side, or (low, high), whose sum then takes the place of 2 P.
        dilation: D, at least 1.

    Returns:
        W' in pixels, at least 1.

    Raises:
        CnnlabError: the kernel does not fit into the padded input.
    """
    extent = effective_kernel(kernel_size, dilation)
    both = 2 * padding if isinstance(padding, int) else sum(padding)
    if size + both < extent:
        raise CnnlabError(
            f"a window of {extent} pixels (kernel_size {kernel_size}, dilation {dilation}) does "
            f"not fit into {size} pixels with padding {padding}; the image must be at least "
            f"{extent - both} pixels here"
        )
    return (size - extent + both) // stride + 1


def same_padding(
    size: int, kernel_size: int, stride: int = 1, dilation: int = 1
) -> tuple[int, int]:
    """The (low, high) padding of `"SAME"`, which makes W' = ceil(W / S).

    P_low + P_high = max((W' - 1) S + F_eff - W, 0), of which the low side gets the smaller half.
    So the centre of the first output's field lies within the image, but where the sum is odd or S
    does not divide W it depends on W: such a network sees images of two sizes differently.
    """
    outputs = -(-size // stride)
    both = max((outputs - 1) * stride + effective_kernel(kernel_size, dilation) - size, 0)
    return both // 2, both - both // 2


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


def activation_bytes(shape: Sequence[int], itemsize: int = 4) -> int:
    """Memory of one activation: H' W' C_out times the bytes of a number (4 in float32)."""
    return math.prod(shape) * itemsize


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """What the outputs of a layer see of the input, along one axis.

    Output i sees the pixels from `start + stride * i` on, `size` of them. Padding counts as
    pixels: a field may start before pixel 0 and end beyond the last.

    Attributes:
        size: the field's extent in input pixels.
        stride: distance in input pixels between neighbouring outputs' fields; 0 if all outputs
            see the same, as after a global pooling.
        start: first pixel that output 0 sees.
    """

    size: int = 1
    stride: int = 1
    start: int = 0

    @property
    def centre(self) -> float:
        """Centre of output 0's field in pixels, where pixel 0's centre is 0."""
        return self.start + (self.size - 1) / 2

    def of(self, output: int) -> tuple[int, int]:
        """First pixel that this output sees, and the one after the last."""
        first = self.start + self.stride * output
        return first, first + self.size

    def then(
        self, kernel_size: int, stride: int = 1, dilation: int = 1, padding: int = 0
    ) -> ReceptiveField:
        """The field after one more convolution or pooling (Araujo et al., equations 2 to 4).

        size + (F_eff - 1) stride; stride times S; start - P stride, of the padding on the low
        side.
        """
        extent = effective_kernel(kernel_size, dilation)
        return ReceptiveField(
            self.size + (extent - 1) * self.stride,
            self.stride * stride,
            self.start - padding * self.stride,
        )

    def union(self, *others: ReceptiveField) -> ReceptiveField:
        """The field of a sum or a concatenation of branches: from the first start to the last end.

        It is the largest branch's, unless the branches' centres differ.

        Raises:
            CnnlabError: the strides differ: then output i of one branch lies elsewhere than output
                i of another, further the larger i is, and no one size describes them.
        """
        fields = (self, *others)
        strides = sorted({field.stride for field in fields})
        if len(strides) > 1:
            raise CnnlabError(
                f"branches that meet must have equal strides to have one field, got {strides}"
            )
        start = min(field.start for field in fields)
        return ReceptiveField(max(f.start + f.size for f in fields) - start, self.stride, start)


def receptive_field(layers: Iterable[tuple[int, ...]]) -> ReceptiveField:
    """The receptive field of a chain of convolutions and poolings (Araujo et al., section 2).

    size = 1 + sum_l (F_eff,l - 1) S_1 ... S_(l-1); stride = prod_l S_l; start = - sum_l P_l S_1
    ... S_(l-1).

    Args:
        layers: (kernel_size, stride, dilation, padding) of each, the first layer first, where
            stride and dilation 1 and padding 0 may be left out at the end.
    """
    field = ReceptiveField()
    for layer in layers:
        field = field.then(*layer)
    return field
