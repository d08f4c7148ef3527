"""GoogLeNet: inception blocks, and two auxiliary heads while it trains.

Szegedy et al. 2015, "Going Deeper with Convolutions", table 1, with batch normalisation after each
convolution in place of the paper's two local response normalisations. The variant `googlenet` is
the network of the published weights, which differ from the paper in two fields: `large_kernel=5`
and `last_pool=3` are the paper's. They expect channels scaled by mean 0.5 and deviation 0.5.

The auxiliary heads (section 5) exist in training only: their logits are in `Outputs.aux`, ahead of
those of `models.create(..., aux=...)`, and the paper adds their losses with weight 0.3 each.

`inception_small` is a free-form stack for images of 28 to 64 pixels: `widths` gives each stage's
channels, which every block shares out as the paper's first block does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

Plan = tuple[int, ...]
"""Channels of a block, as in table 1: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection."""

_PLANS: tuple[tuple[Plan, ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
_SIZES = tuple(len(stage) for stage in _PLANS)
_WIDTH = 64
_HEAD_MAP = 4
_EPSILON = 1e-3
"""Of the normalisation, as the published weights were trained."""

VARIANTS: dict[str, dict] = {
    "googlenet": {"aux_heads": True},
    "inception_small": {
        "stage_sizes": (2, 2, 2),
        "widths": (64, 128, 256),
        "width": 32,
        "stem": "small",
    },
}

PUBLISHED: dict[str, dict] = {
    "googlenet": {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
}

STEMS = ("imagenet", "small")


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = _SIZES,
    width: int = _WIDTH,
    widths: tuple[int, ...] = (),
    large_kernel: int = 3,
    last_pool: int = 2,
    aux_heads: bool = False,
    stem: str = "imagenet",
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    aux_dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A network of inception blocks.

    Args:
        num_outputs: logits.
        stage_sizes: inception blocks in each stage; without `widths` the first so many of each
            stage of table 1.
        width: channels of the first convolution; all of table 1 is scaled by width / 64.
        widths: channels out of each stage's blocks, of which a quarter comes from the 1x1
            convolution, half from the 3x3, an eighth each from the large kernel and the pooling
            (block 3a's shares); `()` for table 1.
        large_kernel: kernel size of a block's third branch, odd: 3 as the published weights have
            it, or the paper's 5.
        last_pool: window of the pooling ahead of the last stage, 2 as the published weights have
            it, or the paper's 3.
        aux_heads: in training, a head after the first block of the stage before the last (4a), and
            if that stage has three blocks or more, one after its last block but one (4d).
        stem: `"imagenet"` (three convolutions and two poolings, stride 8 in all) or `"small"` (one
            3x3 convolution at stride 1).
        activation: after each convolution.
        norm: after each convolution, `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits, where the paper has 0.4.
        aux_dropout: rate ahead of the auxiliary heads' logits, where the paper has 0.7.
        remat: compute the inside of each block again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range, or fields that do not fit each other.
    """
    layers.choose("stem", stem, STEMS)
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (2, 5, 2), got {stage_sizes}"
        )
    if large_kernel < 1 or large_kernel % 2 == 0:
        raise CnnlabError(f"large_kernel must be odd and at least 1, got {large_kernel}")
    if last_pool not in (2, 3):
        raise CnnlabError(f"last_pool must be 2 or 3, got {last_pool}")
    if aux_heads and len(stage_sizes) < 2:
        raise CnnlabError(
            "aux_heads read the stage before the last, so stage_sizes must have two numbers or "
            f"more, got {stage_sizes}; set aux_heads=False"
        )
    if width < 1:
        raise CnnlabError(f"width must be at least 1, got {width}")
    return GoogLeNet(
        num_outputs,
        _plans(tuple(stage_sizes), width, tuple(widths)),
        width,
        large_kernel,
        last_pool,
        aux_heads,
        stem,
        activation,
        norm,
        dropout,
        aux_dropout,
        remat,
        dtype,
    )


def _plans(
    stage_sizes: tuple[int, ...], width: int, widths: tuple[int, ...]
) -> tuple[tuple[Plan, ...], ...]:
    """The plan of each block of each stage."""
    if widths:
        if len(widths) != len(stage_sizes) or min(widths) < 16:
            raise CnnlabError(
                "widths must have one number of at least 16 for each of the "
                f"{len(stage_sizes)} stages of stage_sizes {stage_sizes}, got {widths}"
            )
        return tuple(
            ((w // 4, 3 * w // 8, w // 2, w // 16, w // 8, w // 8),) * size
            for w, size in zip(widths, stage_sizes, strict=True)
        )
    if len(stage_sizes) > len(_SIZES) or any(
        size > most for size, most in zip(stage_sizes, _SIZES, strict=False)
    ):
        raise CnnlabError(
            f"the paper's stage_sizes are {_SIZES}, got {stage_sizes}; for other stacks give widths"
        )
    return tuple(
        tuple(tuple(max(n * width // _WIDTH, 1) for n in plan) for plan in stage[:size])
        for stage, size in zip(_PLANS, stage_sizes, strict=False)
    )


def own_heads(*, aux_heads: bool, stage_sizes: tuple[int, ...], **_: object) -> tuple[str, ...]:
    """Names of the network's own auxiliary heads, in the order of `Outputs.aux`."""
    if not aux_heads:
        return ()
    return ("aux1", "aux2") if stage_sizes[-2] > 2 else ("aux1",)


def published_name(module: tuple[str, ...], **fields: Any) -> str | None:
    """The name that torchvision gives to a module; None where it has no such network."""
    if fields["stem"] == "small" or fields["widths"]:
        return None
    first, *rest = module
    if first.startswith("stage"):
        stage, block = (int(n) for n in first.removeprefix("stage").split("_"))
        first = f"inception{stage + 2}{'abcde'[block - 1]}"
    name = layers.dotted(first, *rest).replace("norm", "bn").replace("hidden", "fc1")
    return name.replace("logits", "fc2" if rest else "fc")


class GoogLeNet(nn.Module):
    """Stem, stages of inception blocks, global average, logits; attributes as in `build`.

    Attributes:
        plans: of each block of each stage.
    """

    num_outputs: int
    plans: tuple[tuple[Plan, ...], ...]
    width: int
    large_kernel: int
    last_pool: int
    aux_heads: bool
    stem: str
    activation: str
    norm: str
    dropout: float
    aux_dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage."""
        x = self._stem(images, train)
        features = {"stem": x}
        if self.stem != "small":
            x = layers.Pool("max", 3, 2, ceil=True, name="pool2")(x)
        block = layers.rematerialized(Inception, self.remat)
        aux: list[jax.Array] = []
        for i, plans in enumerate(self.plans, start=1):
            if i > 1:
                window = self.last_pool if i == len(self.plans) else 3
                x = layers.Pool("max", window, 2, ceil=True, name=f"pool{i + 1}")(x)
            for j, plan in enumerate(plans, start=1):
                x = block(
                    plan,
                    self.large_kernel,
                    self.activation,
                    self.norm,
                    self.dtype,
                    name=f"stage{i}_{j}",
                )(x, train=train)
                if self._has_head(i, j) and (train or self.is_initializing()):
                    aux.append(self._head(x, f"aux{len(aux) + 1}", train))
            features[f"stage{i}"] = x
        x = layers.Pool("global", name="average")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        logits = layers.Dense(self.num_outputs, name="logits")(x)
        return Outputs(logits, tuple(aux) if train else (), features)

    def _has_head(self, stage: int, block: int) -> bool:
        if not self.aux_heads or stage != len(self.plans) - 1:
            return False
        return block in (1, max(len(self.plans[stage - 1]) - 1, 1))

    def _head(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        return Head(
            self.num_outputs,
            2 * self.width,
            16 * self.width,
            self.activation,
            self.norm,
            self.aux_dropout,
            self.dtype,
            name=name,
        )(x, train=train)

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int, strides: int, name: str) -> jax.Array:
            return layers.ConvBlock(
                width,
                size,
                strides,
                norm=self.norm,
                activation=self.activation,
                epsilon=_EPSILON,
                dtype=self.dtype,
                name=name,
            )(x, train=train)

        if self.stem == "small":
            return conv(x, self.width, 3, 1, "conv1")
        x = conv(x, self.width, 7, 2, "conv1")
        x = layers.Pool("max", 3, 2, ceil=True, name="pool1")(x)
        x = conv(x, self.width, 1, 1, "conv2")
        return conv(x, 3 * self.width, 3, 1, "conv3")


class Inception(layers.Block):
    """Four branches side by side (figure 2b): 1x1, 3x3, a larger kernel, max pooling.

    Attributes:
        plan: channels.
        large_kernel: kernel size of the third branch.
        activation: after each convolution.
        norm: likewise.
        dtype: dtype of the computation.
    """

    plan: Plan
    large_kernel: int
    activation: str
    norm: str
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H, W, C'], C' the sum of the branches' channels."""

        def conv(x: jax.Array, width: int, size: int, name: str) -> jax.Array:
            return layers.ConvBlock(
                width,
                size,
                norm=self.norm,
                activation=self.activation,
                epsilon=_EPSILON,
                dtype=self.dtype,
                name=name,
            )(x, train=train)

        small, reduce3, features3, reduce5, features5, projection = self.plan
        pooled = layers.Pool("max", 3, 1, 1, name="branch4_0")(x)
        branches = (
            conv(x, small, 1, "branch1"),
            conv(conv(x, reduce3, 1, "branch2_0"), features3, 3, "branch2_1"),
            conv(conv(x, reduce5, 1, "branch3_0"), features5, self.large_kernel, "branch3_1"),
            conv(pooled, projection, 1, "branch4_1"),
        )
        return jnp.concatenate(branches, axis=-1)


class Head(nn.Module):
    """Auxiliary head (section 5): average over 4x4 regions, 1x1 convolution, two dense layers.

    The paper's 5x5 / 3 pooling makes 4x4 of a 14x14 map; adaptive regions do so of any map.
    """

    num_outputs: int
    width: int
    hidden: int
    activation: str
    norm: str
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] to logits [B, num_outputs], float32."""
        x = layers.AdaptivePool(_HEAD_MAP, name="pool")(x)
        x = layers.ConvBlock(
            self.width,
            1,
            norm=self.norm,
            activation=self.activation,
            epsilon=_EPSILON,
            dtype=self.dtype,
            name="conv",
        )(x, train=train)
        # Channels first, as the published dense kernel expects them.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = layers.Dense(
            self.hidden, dtype=self.dtype, kernel_init=layers.he_normal, name="hidden"
        )(x)
        x = layers.activation(self.activation)(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return layers.Dense(self.num_outputs, name="logits")(x)
