"""VGG: stacks of 3x3 convolutions between 2x2 max poolings.

Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition".
vgg11, 13, 16 and 19 are columns A, B, D and E of its table 1; `_bn` adds batch normalisation after
each convolution (whose bias stays, so that parameter counts equal the published ones).

These have the paper's head, `head="original"`: two hidden layers of 4,096. As in section 3.2 they
are convolutions, the first one 7x7, and the result is averaged, so that one network takes images of
many sizes; of a map below 7x7 the mean over 7x7 regions is taken first, as timm does. Small images
need no such head: `"average"` is a global average and one dense layer.

Five poolings need images of at least 32x32. For 28x28 images set `pools=4` (or fewer: the first
`pools` stages end in a pooling). `vgg_small` is the free-form stack 16-16-M-32-32-M-64-64, which
any `stage_sizes`, `widths` and `pools` give.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

_COLUMNS: dict[str, dict] = {
    "vgg11": {"stage_sizes": (1, 1, 2, 2, 2), "head": "original"},
    "vgg13": {"stage_sizes": (2, 2, 2, 2, 2), "head": "original"},
    "vgg16": {"stage_sizes": (2, 2, 3, 3, 3), "head": "original"},
    "vgg19": {"stage_sizes": (2, 2, 4, 4, 4), "head": "original"},
}

VARIANTS: dict[str, dict] = {
    **{name: {**fields, "norm": "none"} for name, fields in _COLUMNS.items()},
    **{f"{name}_bn": {**fields, "norm": "batch"} for name, fields in _COLUMNS.items()},
    "vgg_small": {"stage_sizes": (2, 2, 2), "width": 16, "pools": 2, "norm": "batch"},
}

PUBLISHED: dict[str, dict] = {
    name + norm: {"tag": "tv_in1k", "interpolation": "bilinear"}
    for name in _COLUMNS
    for norm in ("", "_bn")
}

HEADS = ("average", "flatten", "original")

_HEAD_MAP = 7
"""Height and width of the map that the original head's first hidden layer sees at once."""


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3),
    width: int = 64,
    widths: tuple[int, ...] = (),
    pools: int = 5,
    head: str = "average",
    head_width: int = 4096,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A VGG-style stack.

    Args:
        num_outputs: logits.
        stage_sizes: convolutions in each stage.
        width: channels of the first stage; each further stage has twice the last one's, up to
            eight times `width`, as in the paper.
        widths: channels of each stage, instead of those that follow from `width`.
        pools: the first so many stages end in a 2x2 max pooling.
        head: `"average"` (global average, dense), `"flatten"` (flatten, dense) or `"original"`
            (a 7x7 and a 1x1 convolution as hidden layers, global average, dense).
        head_width: channels of the original head's hidden layers.
        activation: after each convolution and hidden layer.
        norm: after each convolution, `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits; in the original head after each hidden layer, where
            the paper has 0.5.
        spatial_dropout: rate for whole channels after each stage.
        remat: compute what lies between two convolutions again in the backward pass, to save
            memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: fields that do not fit each other.
    """
    layers.choose("head", head, HEADS)
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (2, 2, 3), got {stage_sizes}"
        )
    if widths and len(widths) != len(stage_sizes):
        raise CnnlabError(
            f"widths must have one number for each of the {len(stage_sizes)} stages of "
            f"stage_sizes {stage_sizes}, got {widths}"
        )
    widths = tuple(widths) or tuple(width * min(2**i, 8) for i in range(len(stage_sizes)))
    if min(*widths, head_width) < 1:
        raise CnnlabError(
            f"width, widths and head_width must be at least 1, got widths {widths} and head_width "
            f"{head_width}"
        )
    if not 0 <= pools <= len(stage_sizes):
        raise CnnlabError(
            f"pools must be from 0 to the number of stages, {len(stage_sizes)}, got {pools}; "
            f"set pools={min(max(pools, 0), len(stage_sizes))}"
        )
    return VGG(
        num_outputs,
        tuple(stage_sizes),
        widths,
        pools,
        head,
        head_width,
        activation,
        norm,
        dropout,
        spatial_dropout,
        remat,
        dtype,
    )


def published_name(module: tuple[str, ...], **fields: Any) -> str | None:
    """The name that timm gives to a module; None where timm has no such network.

    timm numbers convolutions, normalisations, activations and poolings in one sequence.
    """
    if fields["head"] != "original":
        return None
    names = {"hidden1": "pre_logits.fc1", "hidden2": "pre_logits.fc2", "logits": "head.fc"}
    if module[0] in names:
        return names[module[0]]
    stage, conv = (int(part) for part in re.findall(r"\d+", module[0]))
    earlier = fields["stage_sizes"][: stage - 1]
    layers_a_conv = 2 if fields["norm"] == "none" else 3
    before = (sum(earlier) + conv - 1) * layers_a_conv + min(stage - 1, fields["pools"])
    return f"features.{before + (module[1] == 'norm')}"


class VGG(nn.Module):
    """Stages of 3x3 convolutions; attributes as in `build`."""

    num_outputs: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    pools: int
    head: str
    head_width: int
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with one feature a stage, after its pooling."""
        smallest = min(images.shape[1:3])
        if smallest < 2**self.pools:
            raise CnnlabError(
                f"{self.pools} poolings need images of at least {2**self.pools}x{2**self.pools}, "
                f"got {images.shape[1]}x{images.shape[2]}; set pools={smallest.bit_length() - 1}"
            )
        block = layers.rematerialized(layers.ConvBlock, self.remat)
        features = {}
        x = images
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            for j in range(1, size + 1):
                x = block(
                    width,
                    norm=self.norm,
                    activation=self.activation,
                    use_bias=True,
                    dtype=self.dtype,
                    name=f"stage{i}_conv{j}",
                )(x, train=train)
            if i <= self.pools:
                x = layers.Pool("max", name=f"stage{i}_pool")(x)
            x = layers.SpatialDropout(self.spatial_dropout, name=f"stage{i}_drop")(x, train=train)
            features[f"stage{i}"] = x
        if self.head == "original":
            x = self._hidden(x, train)
        elif self.head == "average":
            x = layers.Pool("global", name="pool")(x)
        else:
            x = x.reshape(x.shape[0], -1)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)

    def _hidden(self, x: jax.Array, train: bool) -> jax.Array:
        """The original head's hidden layers: [B, H, W, C] to [B, head_width]."""
        size = (max(x.shape[1], _HEAD_MAP), max(x.shape[2], _HEAD_MAP))
        x = layers.AdaptivePool(size, name="enlarge")(x)
        for i, kernel_size in ((1, _HEAD_MAP), (2, 1)):
            x = layers.Conv(
                self.head_width,
                kernel_size,
                dtype=self.dtype,
                kernel_init=layers.he_normal,
                name=f"hidden{i}",
            )(x)
            x = layers.activation(self.activation)(x)
            if i == 1:
                x = layers.Dropout(self.dropout, name="drop1")(x, train=train)
        return layers.Pool("global", name="pool")(x)
