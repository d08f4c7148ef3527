"""DenseNet: every layer of a block sees the outputs of all layers ahead of it in the block.

Huang et al. 2017, "Densely Connected Convolutional Networks". densenet121, 161, 169 and 201 are
those of table 1 (161 with the growth rate 48 of the published weights). `densenet_40_12` and
`densenet_bc_100_12` (depth, growth rate) are those of table 2, for small images. Any of them takes
images of 28 to 64 pixels with `stem="small"`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {
    "densenet121": {"stage_sizes": (6, 12, 24, 16)},
    "densenet161": {"stage_sizes": (6, 12, 36, 24), "growth_rate": 48},
    "densenet169": {"stage_sizes": (6, 12, 32, 32)},
    "densenet201": {"stage_sizes": (6, 12, 48, 32)},
    "densenet_40_12": {
        "stage_sizes": (12, 12, 12),
        "growth_rate": 12,
        "width": 16,
        "bottleneck": 0,
        "reduction": 1.0,
        "stem": "small",
    },
    "densenet_bc_100_12": {"stage_sizes": (16, 16, 16), "growth_rate": 12, "stem": "small"},
}

PUBLISHED: dict[str, dict] = {
    "densenet121": {"tag": "ra_in1k"},
    **{f"densenet{depth}": {"tag": "tv_in1k"} for depth in (161, 169, 201)},
}

STEMS = ("imagenet", "small")


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = (6, 12, 24, 16),
    growth_rate: int = 32,
    width: int = 0,
    bottleneck: int = 4,
    reduction: float = 0.5,
    stem: str = "imagenet",
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    layer_dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A DenseNet.

    Args:
        num_outputs: logits.
        stage_sizes: layers in each dense block.
        growth_rate: k, the channels that each layer adds.
        width: channels of the stem; 0 for 2 k.
        bottleneck: a 1x1 convolution to so many times k channels precedes each 3x3 one ("B");
            0 for none.
        reduction: theta, the share of the channels that a transition between blocks keeps ("C").
        stem: `"imagenet"` (7x7 / 2, normalisation, 3x3 / 2 max pooling) or `"small"` (one 3x3
            convolution at stride 1).
        activation: a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        layer_dropout: rate after each layer's 3x3 convolution, where the paper has 0.2 for small
            images without augmentation (section 4.2).
        remat: compute the inside of each layer again in the backward pass: memory then grows
            linearly with depth instead of quadratically (Pleiss et al. 2017).
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range.
    """
    layers.choose("stem", stem, STEMS)
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (6, 12, 24, 16), got {stage_sizes}"
        )
    if growth_rate < 1 or width < 0 or bottleneck < 0:
        raise CnnlabError(
            "growth_rate must be at least 1, width and bottleneck at least 0, got "
            f"{growth_rate}, {width} and {bottleneck}"
        )
    if not 0 < reduction <= 1:
        raise CnnlabError(f"reduction must be in (0, 1], got {reduction}; 1 keeps all channels")
    return DenseNet(
        num_outputs,
        tuple(stage_sizes),
        growth_rate,
        width or 2 * growth_rate,
        bottleneck,
        reduction,
        stem,
        activation,
        norm,
        dropout,
        layer_dropout,
        remat,
        dtype,
    )


def published_name(module: tuple[str, ...], **fields: Any) -> str | None:
    """The name that timm gives to a module; None where timm has no such network."""
    if fields["stem"] == "small" or not fields["bottleneck"]:
        return None
    if module == ("logits",):
        return "classifier"
    # "stage1_2" is the second layer of the first block.
    stage, _, layer = module[0].partition("_")
    if layer:
        stage = f"{stage.replace('stage', 'denseblock')}.denselayer{layer}"
    return ".".join(("features", stage, *module[1:]))


class DenseNet(nn.Module):
    """Stem, dense blocks with transitions between, global average, logits.

    Attributes as in `build`.
    """

    num_outputs: int
    stage_sizes: tuple[int, ...]
    growth_rate: int
    width: int
    bottleneck: int
    reduction: float
    stem: str
    activation: str
    norm: str
    dropout: float
    layer_dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a dense block.

        Stages are ahead of their transition; the last one is normalised and activated.
        """
        small = self.stem == "small"
        bias = self.norm == "none"
        act = layers.activation(self.activation)
        size, strides = (3, 1) if small else (7, 2)
        stem = layers.Conv(
            self.width, size, strides, size // 2, use_bias=bias, dtype=self.dtype, name="conv0"
        )
        if small:
            x = stem(images)
        else:
            x = act(layers.conv_norm(stem, images, self.norm, train=train, name="norm0"))
        features = {"stem": x}
        if not small:
            x = layers.Pool("max", 3, 2, 1, name="pool0")(x)
        layer = layers.rematerialized(DenseLayer, self.remat)
        for i, size in enumerate(self.stage_sizes, start=1):
            if i > 1:
                x = Transition(
                    max(int(x.shape[-1] * self.reduction), 1),
                    self.activation,
                    self.norm,
                    self.dtype,
                    name=f"transition{i - 1}",
                )(x, train=train)
            pieces: tuple[jax.Array, ...] = (x,)
            for j in range(1, size + 1):
                new = layer(
                    self.growth_rate,
                    self.bottleneck * self.growth_rate,
                    self.activation,
                    self.norm,
                    self.layer_dropout,
                    self.dtype,
                    name=f"stage{i}_{j}",
                )(pieces, train=train)
                pieces = (*pieces, new)
            x = features[f"stage{i}"] = jnp.concatenate(pieces, axis=-1)
        x = act(layers.normalize(x, self.norm, train=train, name="norm5"))
        features[f"stage{len(self.stage_sizes)}"] = x
        x = layers.Pool("global", name="average")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)


class DenseLayer(layers.Block):
    """What one layer adds to a dense block; it takes all that is there as separate arrays.

    They are put together inside, so that `remat` does not keep each layer's own copy of them.
    """

    features: int
    inner: int
    activation: str
    norm: str
    dropout: float
    dtype: str

    @nn.compact
    def forward(self, pieces: tuple[jax.Array, ...], train: bool) -> jax.Array:
        """Arrays [B, H, W, C_i] to [B, H, W, features]."""
        act = layers.activation(self.activation)
        x = jnp.concatenate(pieces, axis=-1)
        plan = [(self.inner, 1)] if self.inner else []
        for i, (width, size) in enumerate([*plan, (self.features, 3)], start=1):
            x = act(layers.normalize(x, self.norm, train=train, name=f"norm{i}"))
            x = layers.Conv(
                width,
                size,
                padding=size // 2,
                use_bias=self.norm == "none",
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
        return layers.Dropout(self.dropout, name="drop")(x, train=train)


class Transition(nn.Module):
    """Between two blocks: fewer channels, half the size."""

    features: int
    activation: str
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H // 2, W // 2, features]."""
        x = layers.activation(self.activation)(layers.normalize(x, self.norm, train=train))
        x = layers.Conv(
            self.features, 1, use_bias=self.norm == "none", dtype=self.dtype, name="conv"
        )(x)
        return layers.Pool("average", 2, name="pool")(x)
