"""ResNets for small images.

resnet8 ... resnet110: He et al. 2016, "Deep Residual Learning", section 4.2, depth 6n + 2: three
stages of n blocks at strides 1, 2, 4 and widths 16, 32, 64. preact_resnet*: He et al. 2016,
"Identity Mappings in Deep Residual Networks". wrn_<depth>_<widen>: Zagoruyko & Komodakis 2016,
"Wide Residual Networks", depth 6n + 4 as its authors count.

dilated_resnet20: after Yu, Koltun & Funkhouser 2017, "Dilated Residual Networks", section 2: a
stage that would stride beyond `output_stride` dilates instead, so that maps stay large and each
unit's receptive field stays what it was. The weights are those of the strided network, and so are
its activations at the pixels that the strided network has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {
    **{f"resnet{depth}": {"depth": depth} for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"preact_resnet{d}": {"depth": d, "preact": True} for d in (20, 56, 110)},
    **{
        f"wrn_{d}_{k}": {"depth": d, "widen": k, "preact": True, "shortcut": "B"}
        for d, k in ((16, 4), (16, 8), (22, 8), (28, 10), (40, 2), (40, 4))
    },
    "dilated_resnet20": {"depth": 20, "output_stride": 1},
}

STAGES = 3


def build(
    num_outputs: int,
    *,
    depth: int = 20,
    width: int = 16,
    widen: int = 1,
    stem_stride: int = 1,
    shortcut: str = "A",
    preact: bool = False,
    output_stride: int = 4,
    zero_init: bool = False,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A residual network of three stages.

    Args:
        num_outputs: logits.
        depth: 6n + 2, or 6n + 4 where `widen` is above 1.
        width: channels of the stem; stages have 1, 2 and 4 times `width * widen`.
        widen: the wide ResNets' factor k.
        stem_stride: stride of the stem; 1 as published, 2 makes the network four times cheaper.
        shortcut: what joins blocks that change the shape. `"A"`: subsampling, and zeros for the
            channels that are missing, without parameters; `"B"`: a 1x1 convolution (with
            normalisation unless `preact`).
        preact: normalise and activate ahead of the convolutions instead of after. The input of a
            block that changes the shape is activated for the shortcut too.
        output_stride: of the last stage against the stem, 4 as published; 2 or 1 make the last
            or the last two stages dilate instead of striding.
        zero_init: start each residual branch as zero (see `layers.BatchNorm.zero_scale`); needs
            `norm="batch"` and no `preact`.
        activation: a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate between the two convolutions of a block (Zagoruyko & Komodakis, 2.4).
        spatial_dropout: likewise, for whole channels.
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a depth that is no such number, or another value out of range.
    """
    layers.choose("shortcut", shortcut, ("A", "B"))
    rest = 2 if widen == 1 else 4
    if depth < 6 + rest or (depth - rest) % 6:
        nearest = max(1, round((depth - rest) / 6)) * 6 + rest
        raise CnnlabError(
            f"depth must be 6n + {rest}{' where widen is above 1' if widen != 1 else ''}, got "
            f"{depth}; the nearest is {nearest}"
        )
    if min(width, widen, stem_stride) < 1:
        raise CnnlabError(
            f"width, widen and stem_stride must be at least 1, got {width}, {widen} and "
            f"{stem_stride}"
        )
    if output_stride not in (1, 2, 4):
        nearest = min((1, 2, 4), key=lambda stride: abs(stride - output_stride))
        raise CnnlabError(
            f"output_stride must be 1, 2 or 4, got {output_stride}; the nearest is {nearest}"
        )
    if zero_init and (preact or norm != "batch"):
        raise CnnlabError(
            'zero_init needs norm="batch" and preact=False: only there does a residual branch '
            f"end in a scale; got norm={norm!r} and preact={preact}"
        )
    return ResNet(
        num_outputs,
        (depth - rest) // 6,
        width,
        widen,
        stem_stride,
        shortcut,
        preact,
        output_stride,
        zero_init,
        activation,
        norm,
        dropout,
        spatial_dropout,
        remat,
        dtype,
    )


class ResNet(nn.Module):
    """Stem, three stages of `blocks` blocks, global average, logits; see `build`."""

    num_outputs: int
    blocks: int
    width: int
    widen: int
    stem_stride: int
    shortcut: str
    preact: bool
    output_stride: int
    zero_init: bool
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem`, `stage1`, `stage2`, `stage3`.

        With `preact` the stem and the first stages are raw sums, the last stage is taken after
        the closing normalisation and activation.
        """
        if self.preact:
            x = layers.Conv(
                self.width,
                3,
                self.stem_stride,
                padding=1,
                use_bias=self.norm == "none",
                dtype=self.dtype,
                name="stem",
            )(images)
        else:
            x = layers.ConvBlock(
                self.width,
                strides=self.stem_stride,
                norm=self.norm,
                activation=self.activation,
                dtype=self.dtype,
                name="stem",
            )(images, train=train)
        features = {"stem": x}
        block = layers.rematerialized(ResidualBlock, self.remat)
        total_stride, dilation = 1, 1
        for i in range(STAGES):
            stride, first_dilation = (1 if i == 0 else 2), dilation
            if total_stride * stride > self.output_stride:
                # The convolution that would have strided still sees the finer grid's neighbours;
                # all after it would have seen only every second pixel.
                stride, dilation = 1, dilation * 2
            total_stride *= stride
            for j in range(self.blocks):
                x = block(
                    self.width * self.widen * 2**i,
                    stride if j == 0 else 1,
                    (first_dilation if j == 0 else dilation, dilation),
                    self.shortcut,
                    self.preact,
                    self.zero_init,
                    self.activation,
                    self.norm,
                    self.dropout,
                    self.spatial_dropout,
                    self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x, train=train)
            features[f"stage{i + 1}"] = x
        if self.preact:
            x = layers.normalize(x, self.norm, train=train)
            x = features[f"stage{STAGES}"] = layers.activation(self.activation)(x)
        x = layers.Pool("global", name="pool")(x)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)


class ResidualBlock(layers.Block):
    """Two 3x3 convolutions and a shortcut; `dilations` is one for each convolution."""

    features: int
    strides: int
    dilations: tuple[int, int]
    shortcut: str
    preact: bool
    zero_init: bool
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', features]."""
        same_shape = self.strides == 1 and x.shape[-1] == self.features
        act = layers.activation(self.activation)
        if self.preact:
            active = act(layers.normalize(x, self.norm, train=train, name="norm1"))
            first = self._conv("conv1", self.strides, self.dilations[0])
            y = act(layers.conv_norm(first, active, self.norm, train=train, name="norm2"))
            y = self._drop(y, train)
            y = self._conv("conv2", 1, self.dilations[1])(y)
            return y + (x if same_shape else self._shortcut(active, train))
        y = layers.ConvBlock(
            self.features,
            strides=self.strides,
            dilation=self.dilations[0],
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="first",
        )(x, train=train)
        y = self._drop(y, train)
        y = layers.ConvBlock(
            self.features,
            dilation=self.dilations[1],
            norm=self.norm,
            activation="identity",
            zero_scale=self.zero_init,
            dtype=self.dtype,
            name="second",
        )(y, train=train)
        return act(y + (x if same_shape else self._shortcut(x, train)))

    def _conv(self, name: str, strides: int, dilation: int) -> layers.Conv:
        return layers.Conv(
            self.features,
            3,
            strides,
            padding=dilation,
            dilation=dilation,
            use_bias=self.norm == "none",
            dtype=self.dtype,
            name=name,
        )

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        x = layers.SpatialDropout(self.spatial_dropout, name="spatial_drop")(x, train=train)
        return layers.Dropout(self.dropout, name="drop")(x, train=train)

    def _shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        if self.shortcut == "A":
            x = x[:, :: self.strides, :: self.strides]
            missing = self.features - x.shape[-1]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
        if self.preact:
            return layers.Conv(
                self.features,
                1,
                self.strides,
                use_bias=self.norm == "none",
                dtype=self.dtype,
                name="shortcut",
            )(x)
        return layers.ConvBlock(
            self.features,
            kernel_size=1,
            strides=self.strides,
            norm=self.norm,
            activation="identity",
            dtype=self.dtype,
            name="shortcut",
        )(x, train=train)
