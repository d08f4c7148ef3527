"""A stack of dilated 3x3 convolutions.

After the "basic" context module of Yu & Koltun 2016, "Multi-Scale Context Aggregation by Dilated
Convolutions", section 3: the receptive field grows exponentially with depth while the map keeps
its size.

Differences: a strided stem ahead of the stack makes it cheap, normalisation and He-normal kernels
replace the paper's identity initialisation, and a global average with a dense layer classifies.
The ResNet whose last stages dilate instead of striding is `resnet.py`'s `dilated_resnet20`.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {"dilated_stack": {}}


def build(
    num_outputs: int,
    *,
    dilations: tuple[int, ...] = (1, 1, 2, 4, 8, 1),
    width: int = 32,
    stem_stride: int = 2,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    dtype: str = "float32",
) -> nn.Module:
    """A stem and one 3x3 convolution for each dilation, all at the stem's resolution.

    Args:
        num_outputs: logits.
        dilations: of each convolution, at least one; the paper has (1, 1, 2, 4, 8, 16, 1).
        width: channels throughout.
        stem_stride: stride of the 3x3 stem; 1 keeps the images' resolution.
        activation: after each convolution.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        spatial_dropout: rate for whole channels after each convolution of the stack.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: no dilations, or a number below 1.
    """
    if not dilations or min(*dilations, width, stem_stride) < 1:
        raise CnnlabError(
            "dilations, width and stem_stride must be at least 1 and dilations not empty, such "
            f"as (1, 2, 4), 32 and 2; got {dilations}, {width} and {stem_stride}"
        )
    return DilatedStack(
        num_outputs,
        tuple(dilations),
        width,
        stem_stride,
        activation,
        norm,
        dropout,
        spatial_dropout,
        dtype,
    )


class DilatedStack(nn.Module):
    """Stem, dilated convolutions, global average, logits; attributes as in `build`."""

    num_outputs: int
    dilations: tuple[int, ...]
    width: int
    stem_stride: int
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a dilation."""
        x = images
        features = {}
        for i, dilation in enumerate((1, *self.dilations)):
            name = f"stage{i}" if i else "stem"
            x = layers.ConvBlock(
                self.width,
                strides=1 if i else self.stem_stride,
                dilation=dilation,
                norm=self.norm,
                activation=self.activation,
                dtype=self.dtype,
                name=name,
            )(x, train=train)
            if i:
                x = layers.SpatialDropout(self.spatial_dropout, name=f"{name}_drop")(x, train=train)
            features[name] = x
        x = layers.Pool("global", name="pool")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)
