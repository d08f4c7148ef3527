"""MobileNetV2 and EfficientNet-Lite: stacks of inverted residuals.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2. A block
widens its input by a 1x1 convolution, filters each channel by itself, and projects back without an
activation; the shortcut joins the narrow ends. `mobilenetv2_<p>` has p % of the width; `d` is
deeper as well.

tf_efficientnet_lite0 ... lite4: Tan & Le 2019, "EfficientNet", table 1 without squeeze-and-
excitation and with ReLU6 in place of swish, for integer arithmetic. Stem, head and the depths of
the first and the last stage are those of lite0 in all five. They were trained in TensorFlow:
`padding="same"` puts the odd zero at the bottom and right, where PyTorch's networks pad evenly.

For images of 28 to 64 pixels set `stem="small"`, with less striding still by `strides`:
(1, 1, 2, 2, 1, 2, 1) brings 32x32 pixels to 4x4.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

_LITE: dict = {
    "stage_sizes": (1, 2, 2, 3, 3, 4, 1),
    "widths": (16, 24, 40, 80, 112, 192, 320),
    "kernel_sizes": (3, 3, 5, 3, 5, 5, 3),
    "scale_ends": False,
    "padding": "same",
    "norm_epsilon": 1e-3,
}


def _factors(width: float, depth: float) -> dict:
    return {"width_factor": width, "depth_factor": depth}


VARIANTS: dict[str, dict] = {
    **{f"mobilenetv2_{p:03d}": {"width_factor": p / 100} for p in (35, 50, 75, 100, 140)},
    "mobilenetv2_110d": {**_factors(1.1, 1.2), "scale_ends": False},
    "mobilenetv2_120d": {**_factors(1.2, 1.4), "scale_ends": False},
    "tf_efficientnet_lite0": {**_LITE, **_factors(1.0, 1.0)},
    "tf_efficientnet_lite1": {**_LITE, **_factors(1.0, 1.1)},
    "tf_efficientnet_lite2": {**_LITE, **_factors(1.1, 1.2)},
    "tf_efficientnet_lite3": {**_LITE, **_factors(1.2, 1.4)},
    "tf_efficientnet_lite4": {**_LITE, **_factors(1.4, 1.8)},
}

# Sizes of the lite networks: as their authors released them.
IMAGES: dict[str, tuple[int, int, int]] = {
    f"tf_efficientnet_lite{i}": (size, size, 3) for i, size in enumerate((224, 240, 260, 280, 300))
}

PUBLISHED: dict[str, dict] = {
    "mobilenetv2_050": {"tag": "lamb_in1k"},
    **{f"mobilenetv2_{p}": {"tag": "ra_in1k"} for p in ("100", "110d", "120d", "140")},
    **{
        name: {"tag": "in1k", "size": size, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        for name, (size, _, _) in IMAGES.items()
    },
}

STEMS = ("imagenet", "small")
PADDINGS = ("even", "same")


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
        blocks: how many.
        width: channels that each gives.
        kernel_size: of the depthwise convolutions.
        expansion: inner width over the block's input width.
        strides: of the first block as designed: where it is above 1 there is no shortcut.
        kept_strides: of the first block once `output_stride` is held; `strides` or 1.
        dilations: of the first depthwise convolution and of the later ones.
    """

    blocks: int
    width: int
    kernel_size: int
    expansion: int
    strides: int
    kept_strides: int
    dilations: tuple[int, int]


def scaled_sizes(sizes: tuple[int, ...], factor: float, ends: bool) -> tuple[int, ...]:
    """Blocks in each stage times a factor, rounded up, as Tan & Le 2019 scale depth.

    Args:
        sizes: blocks in each stage.
        factor: above 0.
        ends: whether the first and the last stage grow, too.
    """
    kept = () if ends else (0, len(sizes) - 1)
    return tuple(n if i in kept else math.ceil(n * factor) for i, n in enumerate(sizes))


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1),
    widths: tuple[int, ...] = (16, 24, 32, 64, 96, 160, 320),
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1),
    kernel_sizes: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 3),
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6),
    stem_width: int = 32,
    head_width: int = 1280,
    width_factor: float = 1.0,
    depth_factor: float = 1.0,
    scale_ends: bool = True,
    stem: str = "imagenet",
    output_stride: int = 32,
    padding: str = "even",
    norm_epsilon: float = 1e-5,
    activation: str = "relu6",
    norm: str = "batch",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A stem, stages of inverted residuals, a 1x1 head and the logits.

    Args:
        num_outputs: logits.
        stage_sizes: blocks in each stage, ahead of `depth_factor`.
        widths: channels that each stage gives, ahead of `width_factor`.
        strides: of each stage's first block.
        kernel_sizes: of each stage's depthwise convolutions, odd.
        expansions: each stage's inner width over its blocks' input width. At 1 a block has no
            widening convolution: it is a depthwise-separable one.
        stem_width: channels of the stem.
        head_width: channels of the 1x1 convolution ahead of the average.
        width_factor: of all widths, which are rounded to multiples of 8 by
            `layers.make_divisible`. The head is not made narrower (Sandler et al., section 4).
        depth_factor: of all stage sizes, which are rounded up.
        scale_ends: whether the factors apply to the stem's and the head's width and to the first
            and the last stage's size, too.
        stem: `"imagenet"` (3x3 at stride 2) or `"small"` (at stride 1).
        output_stride: of the last stage, 8, 16 or 32 with the `"imagenet"` stem. Stages that would
            stride beyond it dilate instead. A `"small"` stem halves it: 32 means 16.
        padding: `"even"` (as many zeros on each side) or `"same"` (TensorFlow's: at stride 2 and
            an even size one less at the top and left).
        norm_epsilon: of the normalisation; 1e-3 in TensorFlow's networks.
        activation: a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits; 0.2 to 0.4 in EfficientNet's training.
        drop_path: the last block's rate of stochastic depth; earlier ones have less.
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range, or fields that do not fit each other.
    """
    layers.choose("stem", stem, STEMS)
    layers.choose("padding", padding, PADDINGS)
    per_stage = {
        "widths": widths,
        "strides": strides,
        "kernel_sizes": kernel_sizes,
        "expansions": expansions,
    }
    for field, values in {"stage_sizes": stage_sizes, **per_stage}.items():
        if not values or min(values) < 1:
            raise CnnlabError(f"{field} must be numbers of at least 1, got {values}")
        if len(values) != len(stage_sizes):
            raise CnnlabError(
                f"{field} must have one number for each of the {len(stage_sizes)} stages of "
                f"stage_sizes {stage_sizes}, got {values}"
            )
    if any(size % 2 == 0 for size in kernel_sizes):
        raise CnnlabError(f"kernel_sizes must be odd, such as 3, 5 or 7, got {kernel_sizes}")
    if min(stem_width, head_width) < 1:
        raise CnnlabError(
            f"stem_width and head_width must be at least 1, got {stem_width} and {head_width}"
        )
    if min(width_factor, depth_factor, norm_epsilon) <= 0:
        raise CnnlabError(
            "width_factor, depth_factor and norm_epsilon must be above 0, got "
            f"{width_factor}, {depth_factor} and {norm_epsilon}"
        )
    plan = layers.dilated_stages((2, *strides), output_stride)
    sizes = scaled_sizes(stage_sizes, depth_factor, scale_ends)
    stages = tuple(
        Stage(
            size,
            layers.make_divisible(width * width_factor),
            kernel_size,
            expansion,
            stride,
            kept,
            (first, later),
        )
        for size, width, kernel_size, expansion, stride, (kept, first, later) in zip(
            sizes, widths, kernel_sizes, expansions, strides, plan, strict=True
        )
    )
    if scale_ends:
        stem_width = layers.make_divisible(stem_width * width_factor)
        head_width = max(head_width, layers.make_divisible(head_width * width_factor))
    return MobileNet(
        num_outputs,
        stages,
        stem_width,
        head_width,
        stem,
        padding,
        norm_epsilon,
        activation,
        norm,
        dropout,
        drop_path,
        remat,
        dtype,
    )


def published_name(module: tuple[str, ...], **fields: object) -> str | None:
    """The name that timm gives to a module."""
    del fields
    return {"logits": "classifier"}.get(module[0], layers.dotted(*module).replace("norm", "bn"))


class MobileNet(nn.Module):
    """Stem, stages, head, global average, logits; attributes as in `build`."""

    num_outputs: int
    stages: tuple[Stage, ...]
    stem_width: int
    head_width: int
    stem: str
    padding: str
    norm_epsilon: float
    activation: str
    norm: str
    dropout: float
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem`, one `stage<i>` a stage, and `head`."""
        act = layers.activation(self.activation)
        bias = self.norm == "none"
        normed = functools.partial(
            layers.conv_norm, norm=self.norm, train=train, epsilon=self.norm_epsilon
        )
        stem = layers.Conv(
            self.stem_width,
            3,
            1 if self.stem == "small" else 2,
            _zeros(self.padding, 3),
            use_bias=bias,
            dtype=self.dtype,
            name="conv_stem",
        )
        x = act(normed(stem, images, name="norm1"))
        features = {"stem": x}
        block = layers.rematerialized(InvertedResidual, self.remat)
        blocks = sum(stage.blocks for stage in self.stages)
        rates = iter(layers.drop_path_rates(self.drop_path, blocks))
        for i, stage in enumerate(self.stages):
            for j in range(stage.blocks):
                x = block(
                    stage.width,
                    stage.kernel_size,
                    stage.kept_strides if j == 0 else 1,
                    stage.dilations[min(j, 1)],
                    stage.expansion,
                    j > 0 or (stage.strides == 1 and x.shape[-1] == stage.width),
                    self.padding,
                    self.norm_epsilon,
                    self.activation,
                    self.norm,
                    next(rates),
                    self.dtype,
                    name=f"blocks_{i}_{j}",
                )(x, train=train)
            features[f"stage{i + 1}"] = x
        head = layers.Conv(self.head_width, 1, use_bias=bias, dtype=self.dtype, name="conv_head")
        x = act(normed(head, x, name="norm2"))
        features["head"] = x
        x = layers.Pool("global", name="average")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)


class InvertedResidual(layers.Block):
    """Widen by 1x1 (unless `expansion` is 1), filter each channel, project by 1x1 linearly."""

    features: int
    kernel_size: int
    strides: int
    dilation: int
    expansion: int
    shortcut: bool
    padding: str
    norm_epsilon: float
    activation: str
    norm: str
    drop_path: float
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', features]."""
        channels = x.shape[-1] * self.expansion
        names = ("conv_pw", "conv_dw", "conv_pwl") if self.expansion > 1 else ("conv_dw", "conv_pw")
        y = x
        for i, name in enumerate(names, start=1):
            last = i == len(names)
            if name == "conv_dw":
                size = (self.kernel_size - 1) * self.dilation + 1
                conv = layers.Conv(
                    channels,
                    self.kernel_size,
                    self.strides,
                    _zeros(self.padding, size),
                    self.dilation,
                    channels,
                    use_bias=self.norm == "none",
                    dtype=self.dtype,
                    # Each output sees one channel and each input feeds one: both fans are the taps.
                    kernel_init=layers.he_normal,
                    name=name,
                )
            else:
                conv = layers.Conv(
                    self.features if last else channels,
                    1,
                    use_bias=self.norm == "none",
                    dtype=self.dtype,
                    name=name,
                )
            y = layers.conv_norm(
                conv, y, self.norm, train=train, epsilon=self.norm_epsilon, name=f"norm{i}"
            )
            if not last:
                y = layers.activation(self.activation)(y)
        if not self.shortcut:
            return y
        return x + layers.DropPath(self.drop_path, name="drop_path")(y, train=train)


def _zeros(padding: str, size: int) -> int | str:
    """What `layers.Conv` calls this padding for a kernel of this (effective) size."""
    return "SAME" if padding == "same" else size // 2
