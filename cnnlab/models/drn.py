"""Dilated residual networks without gridding artifacts.

Yu, Koltun & Funkhouser 2017, "Dilated Residual Networks": ResNets at output stride 8 whose last
stages dilate, with three changes against the grid that dilated convolutions draw into their maps
(section 4, figure 5). Strided residual blocks stand in for the max pooling, whose spikes the
dilated layers would copy; blocks of falling dilation, 2 and 1, follow the most dilated stage; and
those have no shortcuts, which would carry the grid past them.

drn_c_*: the paper's. drn_d_*: its authors' simplification, where the first two and the last two
stages are plain convolutions, as many as a `drn_c` has blocks. Numbers of convolutions and dense
layers give the names. The paper's DRN-A is `resnet18` ... `resnet50` with `output_stride=8`.

For images of 28 to 64 pixels set `stem="small"`.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.models.imagenet_resnet import ResidualBlock
from cnnlab.types import CnnlabError, Outputs

# Blocks of stages 1 to 8; those of 3 to 6 are the blocks of ResNet-18, -34 (-50) and -101.
_SIZES = {
    18: (1, 1, 2, 2, 2, 2, 1, 1),
    34: (1, 1, 3, 4, 6, 3, 1, 1),
    101: (1, 1, 3, 4, 23, 3, 1, 1),
}

VARIANTS: dict[str, dict] = {
    "drn_c_26": {"stage_sizes": _SIZES[18]},
    "drn_c_42": {"stage_sizes": _SIZES[34]},
    "drn_c_58": {"stage_sizes": _SIZES[34], "block": "bottleneck"},
    "drn_d_22": {"stage_sizes": _SIZES[18], "plain": True},
    "drn_d_38": {"stage_sizes": _SIZES[34], "plain": True},
    "drn_d_54": {"stage_sizes": _SIZES[34], "block": "bottleneck", "plain": True},
    "drn_d_105": {"stage_sizes": _SIZES[101], "block": "bottleneck", "plain": True},
}

_STRIDES = (1, 2, 2, 2, 1, 1, 1, 1)
_DILATIONS = (1, 1, 1, 1, 2, 4, 2, 1)
_WIDTHS = (1, 2, 4, 8, 16, 32, 32, 32)


def build(
    num_outputs: int,
    *,
    block: str = "basic",
    stage_sizes: tuple[int, ...] = _SIZES[18],
    width: int = 16,
    plain: bool = False,
    stem: str = "imagenet",
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A dilated residual network of eight stages.

    Args:
        num_outputs: logits.
        block: of stages 3 to 6, `"basic"` or `"bottleneck"`; the others have basic ones.
        stage_sizes: blocks in each of the eight stages; 0 leaves one of the last two out.
        width: channels of the stem and the first stage; the eight stages have 1, 2, 4, 8, 16, 32,
            32, 32 times as many, and bottlenecks give out four times that.
        plain: stages 1, 2, 7 and 8 are single convolutions instead of pairs, and none has a
            shortcut. Without, the last two stages are pairs without shortcuts.
        stem: `"imagenet"` (a 7x7 convolution at stride 1; stages 2, 3 and 4 have stride 2) or
            `"small"` (3x3; stages 3 and 4 have stride 2, so that the output stride is 4).
        activation: a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        drop_path: the last residual block's rate of stochastic depth; earlier ones have less.
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range.
    """
    layers.choose("block", block, ("basic", "bottleneck"))
    layers.choose("stem", stem, ("imagenet", "small"))
    if len(stage_sizes) != 8 or min(stage_sizes[:6]) < 1 or min(stage_sizes[6:]) < 0:
        raise CnnlabError(
            "stage_sizes must be eight numbers of at least 1 (the last two at least 0), such as "
            f"(1, 1, 2, 2, 2, 2, 1, 1), got {stage_sizes}"
        )
    if width < 1:
        raise CnnlabError(f"width must be at least 1, got {width}")
    return DRN(
        num_outputs,
        block,
        tuple(stage_sizes),
        width,
        plain,
        stem,
        activation,
        norm,
        dropout,
        drop_path,
        remat,
        dtype,
    )


class DRN(nn.Module):
    """Stem, eight stages, global average, logits; attributes as in `build`."""

    num_outputs: int
    block: str
    stage_sizes: tuple[int, ...]
    width: int
    plain: bool
    stem: str
    activation: str
    norm: str
    dropout: float
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage."""
        small = self.stem == "small"
        x = self._conv(images, self.width, 3 if small else 7, 1, 1, train, "stem")
        features = {"stem": x}
        residual = (2, 3, 4, 5) if self.plain else (0, 1, 2, 3, 4, 5)
        block = layers.rematerialized(ResidualBlock, self.remat)
        count = sum(self.stage_sizes[i] for i in residual)
        rates = iter(layers.drop_path_rates(self.drop_path, count))
        for i, size in enumerate(self.stage_sizes):
            width, dilation = self.width * _WIDTHS[i], _DILATIONS[i]
            stride = 1 if i == 1 and small else _STRIDES[i]
            # Without its shortcut, a basic block is two convolutions.
            convolutions = 0 if i in residual else size if self.plain else 2 * size
            for j in range(convolutions):
                strides = stride if j == 0 else 1
                x = self._conv(x, width, 3, strides, dilation, train, f"stage{i + 1}_conv{j + 1}")
            for j in range(size if i in residual else 0):
                x = block(
                    kind=self.block if 2 <= i <= 5 else "basic",
                    planes=width,
                    base_width=64,
                    groups=1,
                    strides=stride if j == 0 else 1,
                    dilations=(dilation, dilation),
                    average_down=False,
                    squeeze_excite=False,
                    preact=False,
                    zero_init=False,
                    activation=self.activation,
                    norm=self.norm,
                    drop_path=next(rates),
                    dtype=self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x, train=train)
            if size:
                features[f"stage{i + 1}"] = x
        x = layers.Pool("global", name="average")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)

    def _conv(
        self,
        x: jax.Array,
        width: int,
        size: int,
        strides: int,
        dilation: int,
        train: bool,
        name: str,
    ) -> jax.Array:
        return layers.rematerialized(layers.ConvBlock, self.remat)(
            width,
            size,
            strides,
            dilation=dilation,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name=name,
        )(x, train=train)
