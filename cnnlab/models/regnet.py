"""RegNets: networks whose widths follow a line.

Radosavovic et al. 2020, "Designing Network Design Spaces": six numbers (depth, initial width,
slope, quantisation, group width, with or without gates) make a whole network, see `stages`. Its
figures 14 (X) and 15 (Y) list those found best at each cost: regnetx_032 takes 3.2 billion
multiply-accumulates for a 224x224 image. regnety_* have squeeze-and-excitation after the grouped
convolution.

For images of 28 to 64 pixels set `stem="small"`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs


def _found(depth: int, initial: int, slope: float, multiplier: float, group: int) -> dict:
    return {
        "depth": depth,
        "initial_width": initial,
        "width_slope": slope,
        "width_multiplier": multiplier,
        "group_width": group,
    }


_X: dict[str, dict] = {
    "002": _found(13, 24, 36.44, 2.49, 8),
    "004": _found(22, 24, 24.48, 2.54, 16),
    "006": _found(16, 48, 36.97, 2.24, 24),
    "008": _found(16, 56, 35.73, 2.28, 16),
    "016": _found(18, 80, 34.01, 2.25, 24),
    "032": _found(25, 88, 26.31, 2.25, 48),
    "040": _found(23, 96, 38.65, 2.43, 40),
    "064": _found(17, 184, 60.83, 2.07, 56),
    "080": _found(23, 80, 49.56, 2.88, 120),
    "120": _found(19, 168, 73.36, 2.37, 112),
    "160": _found(22, 216, 55.59, 2.1, 128),
    "320": _found(23, 320, 69.86, 2.0, 168),
}
_Y: dict[str, dict] = {
    "002": _found(13, 24, 36.44, 2.49, 8),
    "004": _found(16, 48, 27.89, 2.09, 8),
    "006": _found(15, 48, 32.54, 2.32, 16),
    "008": _found(14, 56, 38.84, 2.4, 16),
    "016": _found(27, 48, 20.71, 2.65, 24),
    "032": _found(21, 80, 42.63, 2.66, 24),
    "040": _found(22, 96, 31.41, 2.24, 64),
    "064": _found(25, 112, 33.22, 2.27, 72),
    "080": _found(17, 192, 76.82, 2.19, 56),
    "120": _found(19, 168, 73.36, 2.37, 112),
    "160": _found(18, 200, 106.23, 2.48, 112),
    "320": _found(20, 232, 115.89, 2.53, 232),
}

VARIANTS: dict[str, dict] = {
    **{f"regnetx_{size}": found for size, found in _X.items()},
    **{f"regnety_{size}": {**found, "squeeze_excite": True} for size, found in _Y.items()},
}

_TAGS = {
    "pycls_in1k": "x_002 x_004 x_006 x_040 x_064 x_120 y_002 y_006 y_008",
    "tv2_in1k": "x_008 x_016 x_032 x_080 x_160 x_320 y_004 y_016 y_320",
    "ra_in1k": "y_032",
    "ra3_in1k": "y_040 y_064 y_080",
    "sw_in12k_ft_in1k": "y_120 y_160",
}
PUBLISHED: dict[str, dict] = {
    f"regnet{size}": {"tag": tag} for tag, sizes in _TAGS.items() for size in sizes.split()
}

STEMS = ("imagenet", "small")


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
        blocks: how many.
        width: channels of each.
        group_width: channels of each group of its 3x3 convolutions; divides `width`.
    """

    blocks: int
    width: int
    group_width: int


def stages(
    depth: int,
    initial_width: int,
    width_slope: float,
    width_multiplier: float,
    group_width: int,
) -> tuple[Stage, ...]:
    """The stages of a RegNet (Radosavovic et al. 2020, section 3.3).

    Block j of d would have the width u_j = w_0 + w_a j (equation 2). Widths are to be few, so s_j
    with u_j = w_0 w_m^s_j (equation 3) is rounded: w_j = w_0 w_m^round(s_j) (equation 4), to
    multiples of 8. Blocks of one width make a stage. Its width then becomes the nearest multiple
    of the group width, which is no larger than the stage's own width.

    Args:
        depth: d, blocks in all, at least 1.
        initial_width: w_0, a positive multiple of 8.
        width_slope: w_a, at least 0: channels from a block to the next.
        width_multiplier: w_m, above 1: from a stage to the next.
        group_width: g, at least 1.

    Returns:
        The stages in order, most often four.

    Raises:
        CnnlabError: a number out of range.
    """
    if depth < 1 or group_width < 1:
        raise CnnlabError(
            f"depth and group_width must be at least 1, got {depth} and {group_width}"
        )
    if initial_width < 8 or initial_width % 8:
        raise CnnlabError(
            f"initial_width must be a positive multiple of 8, got {initial_width}; the nearest is "
            f"{layers.make_divisible(initial_width, round_limit=0.0)}"
        )
    if width_slope < 0 or width_multiplier <= 1:
        raise CnnlabError(
            "width_slope must be at least 0 and width_multiplier above 1, got "
            f"{width_slope} and {width_multiplier}"
        )
    linear = initial_width + width_slope * np.arange(depth)
    steps = np.round(np.log(linear / initial_width) / np.log(width_multiplier))
    quantised = 8 * np.round(initial_width * width_multiplier**steps / 8)
    made = []
    for width, blocks in zip(*np.unique(quantised, return_counts=True), strict=True):
        group = min(group_width, int(width))
        made.append(Stage(int(blocks), round(int(width) / group) * group, group))
    return tuple(made)


def build(
    num_outputs: int,
    *,
    depth: int = 13,
    initial_width: int = 24,
    width_slope: float = 36.44,
    width_multiplier: float = 2.49,
    group_width: int = 8,
    squeeze_excite: bool = False,
    stem_width: int = 32,
    stem: str = "imagenet",
    output_stride: int = 32,
    zero_init: bool = False,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A stem, stages of residual blocks with bottleneck ratio 1, and the logits.

    Args:
        num_outputs: logits.
        depth: see `stages`; likewise the next four.
        initial_width: see `stages`.
        width_slope: see `stages`.
        width_multiplier: see `stages`.
        group_width: see `stages`.
        squeeze_excite: gate each branch after its 3x3 convolution by `layers.SqueezeExcite`, a
            quarter as wide as the block's input.
        stem_width: channels of the stem.
        stem: `"imagenet"` (3x3 at stride 2) or `"small"` (at stride 1).
        output_stride: of the last of four stages, 8, 16 or 32 with the `"imagenet"` stem. Stages
            that would stride beyond it dilate instead. A `"small"` stem halves it: 32 means 16.
        zero_init: start each residual branch as zero; needs `norm="batch"`.
        activation: a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        drop_path: the last block's rate of stochastic depth; earlier ones have less.
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range, or fields that do not fit each other.
    """
    layers.choose("stem", stem, STEMS)
    if stem_width < 1:
        raise CnnlabError(f"stem_width must be at least 1, got {stem_width}")
    if zero_init and norm != "batch":
        raise CnnlabError(
            f'zero_init needs norm="batch": only there does a residual branch end in a scale that '
            f"can start at 0; got norm={norm!r}"
        )
    made = stages(depth, initial_width, width_slope, width_multiplier, group_width)
    return RegNet(
        num_outputs,
        made,
        tuple(layers.dilated_stages((2,) * (len(made) + 1), output_stride)),
        squeeze_excite,
        stem_width,
        stem,
        zero_init,
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
    return {"logits": "head.fc"}.get(module[0], layers.dotted(*module).replace("norm", "bn"))


class RegNet(nn.Module):
    """Stem, stages, global average, logits; attributes as in `build`.

    `stages` come from the function of that name, `strides` from `layers.dilated_stages`.
    """

    num_outputs: int
    stages: tuple[Stage, ...]
    strides: tuple[tuple[int, int, int], ...]
    squeeze_excite: bool
    stem_width: int
    stem: str
    zero_init: bool
    activation: str
    norm: str
    dropout: float
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage."""
        x = layers.ConvBlock(
            self.stem_width,
            strides=1 if self.stem == "small" else 2,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="stem",
        )(images, train=train)
        features = {"stem": x}
        block = layers.rematerialized(GroupedBlock, self.remat)
        rates = iter(
            layers.drop_path_rates(self.drop_path, sum(stage.blocks for stage in self.stages))
        )
        for i, (stage, (strides, first_dilation, dilation)) in enumerate(
            zip(self.stages, self.strides, strict=True), start=1
        ):
            for j in range(1, stage.blocks + 1):
                first = j == 1
                x = block(
                    stage.width,
                    stage.group_width,
                    strides if first else 1,
                    first_dilation if first else dilation,
                    first,
                    self.squeeze_excite,
                    self.zero_init,
                    self.activation,
                    self.norm,
                    next(rates),
                    self.dtype,
                    name=f"s{i}_b{j}",
                )(x, train=train)
            features[f"stage{i}"] = x
        x = layers.Pool("global", name="average")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)


class GroupedBlock(layers.Block):
    """1x1, grouped 3x3, gates, 1x1, and the shortcut, projected where a stage begins."""

    features: int
    group_width: int
    strides: int
    dilation: int
    projects: bool
    squeeze_excite: bool
    zero_init: bool
    activation: str
    norm: str
    drop_path: float
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', features]."""

        def conv(x: jax.Array, size: int, name: str, **fields: Any) -> jax.Array:
            fields = {"activation": self.activation, **fields}
            return layers.ConvBlock(
                self.features, size, norm=self.norm, dtype=self.dtype, name=name, **fields
            )(x, train=train)

        y = conv(x, 1, "conv1")
        y = conv(
            y,
            3,
            "conv2",
            strides=self.strides,
            dilation=self.dilation,
            groups=self.features // self.group_width,
            kernel_init=layers.he_normal,  # its fan counts a group's channels only
        )
        if self.squeeze_excite:
            hidden = max(1, round(x.shape[-1] / 4))
            y = layers.SqueezeExcite(hidden, self.activation, self.dtype, name="se")(y)
        y = conv(y, 1, "conv3", activation="identity", zero_scale=self.zero_init)
        y = layers.DropPath(self.drop_path, name="drop_path")(y, train=train)
        if self.projects:
            x = conv(x, 1, "downsample", strides=self.strides, activation="identity")
        return layers.activation(self.activation)(x + y)
