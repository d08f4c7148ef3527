"""Stacks of dilated 3x3 convolutions.

Yu & Koltun 2016, "Multi-Scale Context Aggregation by Dilated Convolutions", section 3: the
receptive field grows exponentially with depth while the map keeps its size.

context_basic, context_large: the paper's context module (its table 1), which takes and gives C
maps: seven 3x3 convolutions of dilations 1, 1, 2, 4, 8, 16, 1, each followed by a rectifier, and a
1x1 convolution without. It sees 67x67 pixels of its input. All layers of the basic one have C
channels, those of the large one 2C, 2C, 4C, 8C, 16C, 32C, 32C and C. They start as the identity
(its equations 4 and 5), which its authors found far better than the usual random numbers. The
paper puts the module behind a segmentation network of C classes; here a 3x3 stem, at stride 2
unless `stem_stride` says otherwise, makes the C maps, and a global average with a dense layer
classifies.

dilated_stack: the same idea made small, with normalisations and He-normal kernels.

The ResNet whose last stages dilate instead of striding is `resnet.py`'s `dilated_resnet20`, and
`drn.py` has those without gridding artifacts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

_CONTEXT: dict[str, Any] = {
    "dilations": (1, 1, 2, 4, 8, 16, 1),
    "projection": True,
    "kernel_init": "identity",
    "norm": "none",
}

VARIANTS: dict[str, dict] = {
    "dilated_stack": {},
    "context_basic": _CONTEXT,
    "context_large": {**_CONTEXT, "multipliers": (2, 2, 4, 8, 16, 32, 32), "width": 16},
}

_NOISE = 0.01


def build(
    num_outputs: int,
    *,
    dilations: tuple[int, ...] = (1, 1, 2, 4, 8, 1),
    width: int = 32,
    multipliers: tuple[int, ...] = (),
    projection: bool = False,
    kernel_init: str = "he",
    stem_stride: int = 2,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A stem and one 3x3 convolution for each dilation, all at the stem's resolution.

    Args:
        num_outputs: logits.
        dilations: of each convolution, at least one.
        width: channels of the stem, the paper's C.
        multipliers: channels of each convolution, as multiples of `width`; all 1 if empty.
        projection: end in a 1x1 convolution to `width` channels, without normalisation and
            activation.
        kernel_init: of the convolutions after the stem: `"he"`, or `"identity"`, see
            `identity_kernel`.
        stem_stride: stride of the 3x3 stem; 1 keeps the images' resolution.
        activation: after each convolution.
        norm: after each convolution, `"batch"`, `"group"`, `"layer"` or `"none"`. A normalisation
            keeps a stack with `"identity"` kernels from starting as the identity.
        dropout: rate ahead of the logits.
        spatial_dropout: rate for whole channels after each convolution of the stack.
        remat: keep only what goes into each convolution with its normalisation and activation for
            the backward pass, and compute the rest again, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: no dilations, a number below 1, or not one multiplier for each dilation.
    """
    if not dilations or min(*dilations, width, stem_stride) < 1:
        raise CnnlabError(
            "dilations, width and stem_stride must be at least 1 and dilations not empty, such "
            f"as (1, 2, 4), 32 and 2; got {dilations}, {width} and {stem_stride}"
        )
    multipliers = tuple(multipliers) or (1,) * len(dilations)
    if len(multipliers) != len(dilations) or min(multipliers) < 1:
        raise CnnlabError(
            f"multipliers must be one number of at least 1 for each of the {len(dilations)} "
            f"dilations {dilations}, or empty; got {multipliers}"
        )
    layers.choose("kernel_init", kernel_init, ("he", "identity"))
    return DilatedStack(
        num_outputs,
        tuple(dilations),
        width,
        multipliers,
        projection,
        kernel_init,
        stem_stride,
        activation,
        norm,
        dropout,
        spatial_dropout,
        remat,
        dtype,
    )


def identity_kernel(channels: int) -> layers.Initializer:
    """An initialiser with which a stack of convolutions passes its input's channels through.

    Yu & Koltun 2016, equations 4 and 5: the middle tap from input channel a to output channel b is
    C / c_out where floor(a C / c_in) = floor(b C / c_out), and all else is 0. Each of the C
    channels is so handed on by a group of channels, and a stack from C to C channels is the
    identity (of numbers that its rectifiers pass, those above 0).

    The channels of a group would stay equal for ever, so where there are groups, all else is drawn
    from a normal distribution as in equation 5. The paper leaves its deviation open, "much less
    than C / c_out"; here it is a hundredth of that.

    Args:
        channels: C, which must divide the channels in and out of every kernel.
    """

    def initialize(key: jax.Array, shape: layers.Shape, dtype: Any = jnp.float32) -> jax.Array:
        height, width, inner, outer = shape
        if inner % channels or outer % channels:
            raise CnnlabError(
                f"an identity kernel needs channels in and out that are multiples of {channels}, "
                f"got {inner} and {outer}"
            )
        share = channels / outer
        groups_in, groups_out = (jnp.arange(c) * channels // c for c in (inner, outer))
        middle = jnp.zeros((height, width, 1, 1), bool).at[height // 2, width // 2].set(True)
        passed = middle & (groups_in[:, None] == groups_out[None, :])[None, None]
        rest = jnp.zeros(shape)
        if (inner, outer) != (channels, channels):
            rest = layers.normal(_NOISE * share)(key, shape)
        return jnp.where(passed, share, rest).astype(dtype)

    return initialize


class DilatedStack(nn.Module):
    """Stem, dilated convolutions, global average, logits; attributes as in `build`."""

    num_outputs: int
    dilations: tuple[int, ...]
    width: int
    multipliers: tuple[int, ...]
    projection: bool
    kernel_init: str
    stem_stride: int
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a convolution."""
        block = layers.rematerialized(layers.ConvBlock, self.remat)
        x = block(
            self.width,
            strides=self.stem_stride,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="stem",
        )(images, train=train)
        features = {"stem": x}
        init = layers.he_normal_fan_out if self.kernel_init == "he" else identity_kernel(self.width)
        plan = [
            (multiplier * self.width, 3, dilation, self.norm, self.activation)
            for multiplier, dilation in zip(self.multipliers, self.dilations, strict=True)
        ]
        if self.projection:
            plan.append((self.width, 1, 1, "none", "identity"))
        for i, (width, kernel_size, dilation, norm, activation) in enumerate(plan, start=1):
            x = block(
                width,
                kernel_size,
                dilation=dilation,
                norm=norm,
                activation=activation,
                dtype=self.dtype,
                kernel_init=init,
                name=f"stage{i}",
            )(x, train=train)
            x = layers.SpatialDropout(self.spatial_dropout, name=f"stage{i}_drop")(x, train=train)
            features[f"stage{i}"] = x
        x = layers.Pool("global", name="pool")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)
