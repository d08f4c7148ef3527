"""SqueezeNet: fire modules, a 1x1 convolution to few channels and 1x1 and 3x3 ones to many.

Iandola et al. 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model
size". squeezenet1_0 is that of its table 1; squeezenet1_1, from the authors' repository, has a
smaller stem and pools earlier, for 2.4 times less work at the same accuracy. Neither normalises.
For images of 28 to 64 pixels set `stem="small"`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {
    "squeezenet1_0": {"stage_sizes": (3, 4, 1), "stem": "7x7"},
    "squeezenet1_1": {"stage_sizes": (2, 2, 4), "stem": "3x3"},
}

PUBLISHED: dict[str, dict] = {name: {"interpolation": "bilinear"} for name in VARIANTS}

STEMS = ("7x7", "3x3", "small")


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = (2, 2, 4),
    width: int = 128,
    squeeze_ratio: float = 0.125,
    share_3x3: float = 0.5,
    bypass: bool = False,
    stem: str = "3x3",
    activation: str = "relu",
    norm: str = "none",
    dropout: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A SqueezeNet, by the metaparameters of its paper's section 5.1.

    Args:
        num_outputs: logits.
        stage_sizes: fire modules in each stage; a 3x3 / 2 max pooling lies between stages.
        width: channels of the first two fire modules; each further two have `width` more
            (base_e and incr_e of the paper, with freq 2).
        squeeze_ratio: channels after a fire module's 1x1 squeezing, of those after its expansion.
        share_3x3: of the channels after the expansion, how many the 3x3 convolution gives.
        bypass: add the input of every second fire module to its output (section 6, "simple").
        stem: `"7x7"` (stride 2, 3/4 of `width`) or `"3x3"` (stride 2, 1/2 of `width`), both
            without padding and with a 3x3 / 2 max pooling; or `"small"` (3x3 at stride 1, 1/2 of
            `width`, padded, no pooling).
        activation: after each convolution.
        norm: after each convolution but the last, `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the last convolution, where the paper has 0.5.
        remat: compute the inside of each fire module again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range.
    """
    layers.choose("stem", stem, STEMS)
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (2, 2, 4), got {stage_sizes}"
        )
    if width < 2:
        raise CnnlabError(f"width must be at least 2, one channel a kernel size, got {width}")
    if not 0 < squeeze_ratio <= 1 or not 0 < share_3x3 < 1:
        raise CnnlabError(
            "squeeze_ratio must be in (0, 1] and share_3x3 in (0, 1), got "
            f"{squeeze_ratio} and {share_3x3}"
        )
    return SqueezeNet(
        num_outputs,
        tuple(stage_sizes),
        width,
        squeeze_ratio,
        share_3x3,
        bypass,
        stem,
        activation,
        norm,
        dropout,
        remat,
        dtype,
    )


def published_name(module: tuple[str, ...], **fields: Any) -> str | None:
    """The name that torchvision gives to a module; None where it has no such network.

    It numbers the stem's convolution, activation and pooling, and all fire modules and poolings,
    in one sequence.
    """
    if fields["stem"] == "small" or fields["norm"] != "none":
        return None
    if module == ("logits",):
        return "classifier.1"
    if module[0] == "stem":
        return "features.0"
    fire = int(module[0].removeprefix("fire")) - 2
    ends = [sum(fields["stage_sizes"][:i]) for i in range(1, len(fields["stage_sizes"]))]
    return f"features.{3 + fire + sum(end <= fire for end in ends)}.{module[1]}"


class SqueezeNet(nn.Module):
    """Stem, fire modules, a 1x1 convolution to the logits' maps, global average.

    Attributes as in `build`.
    """

    num_outputs: int
    stage_sizes: tuple[int, ...]
    width: int
    squeeze_ratio: float
    share_3x3: float
    bypass: bool
    stem: str
    activation: str
    norm: str
    dropout: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage."""
        small = self.stem == "small"
        x = layers.ConvBlock(
            max(self.width * (3 if self.stem == "7x7" else 2) // 4, 1),
            7 if self.stem == "7x7" else 3,
            1 if small else 2,
            padding=1 if small else 0,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="stem",
        )(images, train=train)
        features = {"stem": x}
        if not small:
            x = layers.Pool("max", 3, 2, ceil=True, name="pool0")(x)
        block = layers.rematerialized(Fire, self.remat)
        fires = 0
        for i, size in enumerate(self.stage_sizes, start=1):
            if i > 1:
                x = layers.Pool("max", 3, 2, ceil=True, name=f"pool{i - 1}")(x)
            for _ in range(size):
                expanded = self.width * (1 + fires // 2)
                # The paper counts the stem's convolution as its first layer.
                y = block(
                    expanded,
                    self.squeeze_ratio,
                    self.share_3x3,
                    self.activation,
                    self.norm,
                    self.dtype,
                    name=f"fire{fires + 2}",
                )(x, train=train)
                x = x + y if self.bypass and fires % 2 else y
                fires += 1
            features[f"stage{i}"] = x
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        x = layers.Conv(self.num_outputs, 1, kernel_init=layers.lecun_normal, name="logits")(x)
        x = layers.activation(self.activation)(x)
        return Outputs(layers.Pool("global", name="average")(x), features=features)


class Fire(layers.Block):
    """A fire module (section 3.2): squeeze, then two expansions side by side."""

    features: int
    squeeze_ratio: float
    share_3x3: float
    activation: str
    norm: str
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H, W, features]."""

        def conv(x: jax.Array, width: int, size: int, name: str) -> jax.Array:
            return layers.ConvBlock(
                width,
                size,
                norm=self.norm,
                activation=self.activation,
                dtype=self.dtype,
                name=name,
            )(x, train=train)

        x = conv(x, max(int(self.features * self.squeeze_ratio), 1), 1, "squeeze")
        large = min(max(int(self.features * self.share_3x3), 1), self.features - 1)
        expanded = conv(x, self.features - large, 1, "expand1x1"), conv(x, large, 3, "expand3x3")
        return jnp.concatenate(expanded, axis=-1)
