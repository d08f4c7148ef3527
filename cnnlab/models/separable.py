"""Stacks of depthwise-separable convolutions.

Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", section 3.1: a depthwise convolution filters each channel by itself, a 1x1
convolution mixes the channels, and each is followed by a normalisation and a rectifier. A 3x3
block so costs about an eighth of a dense 3x3 convolution.

`separable_stack12` is such a stack for small images: a 3x3 stem of 32 channels and twelve blocks,
2 of 64, 4 of 128 and 6 of 256 channels, where the second and third stage start with stride 2. With
32x32x3 images and 10 classes it has 453,258 parameters. The paper's network (its table 1) has the
same blocks: `stage_sizes=(1, 2, 2, 6, 2)` and `stem_stride=2`.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {"separable_stack12": {}}


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = (2, 4, 6),
    width: int = 64,
    widths: tuple[int, ...] = (),
    stem_width: int = 32,
    stem_stride: int = 1,
    kernel_size: int = 3,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A stem and stages of depthwise-separable blocks.

    Args:
        num_outputs: logits.
        stage_sizes: blocks in each stage; each stage but the first starts with stride 2.
        width: channels of the first stage; each further stage has twice the last one's.
        widths: channels of each stage, instead of those that follow from `width`.
        stem_width: channels of the dense 3x3 convolution ahead of the stages.
        stem_stride: its stride; 1 for small images, 2 as published.
        kernel_size: height and width of the depthwise convolutions, odd; 3 as published.
        activation: after each convolution.
        norm: after each convolution, `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        spatial_dropout: rate for whole channels after each stage.
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a number out of range, or fields that do not fit each other.
    """
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (2, 4, 6), got {stage_sizes}"
        )
    if widths and len(widths) != len(stage_sizes):
        raise CnnlabError(
            f"widths must have one number for each of the {len(stage_sizes)} stages of "
            f"stage_sizes {stage_sizes}, got {widths}"
        )
    widths = tuple(widths) or tuple(width * 2**i for i in range(len(stage_sizes)))
    if min(*widths, stem_width, stem_stride) < 1:
        raise CnnlabError(
            "width, widths, stem_width and stem_stride must be at least 1, got widths "
            f"{widths}, stem_width {stem_width} and stem_stride {stem_stride}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise CnnlabError(
            f"kernel_size must be odd, such as 3, 5 or 7, got {kernel_size}; use "
            f"{max(1, kernel_size + 1)}"
        )
    return SeparableStack(
        num_outputs,
        tuple(stage_sizes),
        widths,
        stem_width,
        stem_stride,
        kernel_size,
        activation,
        norm,
        dropout,
        spatial_dropout,
        remat,
        dtype,
    )


class SeparableStack(nn.Module):
    """Stem, stages of separable blocks, global average, logits; attributes as in `build`."""

    num_outputs: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    stem_width: int
    stem_stride: int
    kernel_size: int
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage."""
        x = layers.ConvBlock(
            self.stem_width,
            strides=self.stem_stride,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="stem",
        )(images, train=train)
        features = {"stem": x}
        block = layers.rematerialized(SeparableBlock, self.remat)
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            for j in range(1, size + 1):
                x = block(
                    width,
                    self.kernel_size,
                    2 if i > 1 and j == 1 else 1,
                    self.activation,
                    self.norm,
                    self.dtype,
                    name=f"stage{i}_block{j}",
                )(x, train=train)
            x = layers.SpatialDropout(self.spatial_dropout, name=f"stage{i}_drop")(x, train=train)
            features[f"stage{i}"] = x
        x = layers.Pool("global", name="pool")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)


class SeparableBlock(layers.Block):
    """A depthwise and a 1x1 convolution, each with normalisation and activation."""

    features: int
    kernel_size: int
    strides: int
    activation: str
    norm: str
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', features]."""
        x = layers.Conv(
            x.shape[-1],
            self.kernel_size,
            self.strides,
            padding=self.kernel_size // 2,
            groups=x.shape[-1],
            use_bias=self.norm == "none",
            dtype=self.dtype,
            # Each output sees one channel and each input feeds one: both fans are the taps.
            kernel_init=layers.he_normal,
            name="depthwise",
        )(x)
        x = layers.normalize(x, self.norm, train=train)
        x = layers.activation(self.activation)(x)
        return layers.ConvBlock(
            self.features,
            kernel_size=1,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="pointwise",
        )(x, train=train)
