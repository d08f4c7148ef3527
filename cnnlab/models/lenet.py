"""LeNet-5, and the same with ReLU and max pooling.

LeCun, Bottou, Bengio & Haffner 1998, "Gradient-Based Learning Applied to Document Recognition",
section II.B.

`lenet5` keeps the sizes and simplifies three things, as is usual today. Subsampling is a plain
average, without the original's trained coefficient, bias and squashing for each map; the second
convolution sees all six maps instead of the paper's table of connections; the output is a dense
layer instead of radial basis functions. Its tanh is the plain one, not 1.7159 tanh(2x/3). With
28x28x1 images and 10 classes it has 61,706 parameters.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {
    "lenet5": {"activation": "tanh", "pool": "average"},
    "lenet5_modern": {"activation": "relu", "pool": "max"},
}

IMAGES: dict[str, tuple[int, int, int]] = dict.fromkeys(VARIANTS, (28, 28, 1))


def build(
    num_outputs: int,
    *,
    activation: str = "relu",
    pool: str = "max",
    widths: tuple[int, ...] = (6, 16, 120, 84),
    padding: int = 2,
    norm: str = "none",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    dtype: str = "float32",
) -> nn.Module:
    """LeNet-5.

    Args:
        num_outputs: logits.
        activation: after each convolution and hidden dense layer.
        pool: `"average"` or `"max"`.
        widths: channels of the two convolutions and units of the two dense layers.
        padding: of the first convolution; 2 for 28x28 images, 0 for 32x32 as in the paper.
        norm: after the convolutions, `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of each dense layer but the first.
        spatial_dropout: rate for whole channels after each pooling.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: not four widths, or an unknown pooling.
    """
    if len(widths) != 4:
        raise CnnlabError(f"widths must be 4 numbers, such as (6, 16, 120, 84), got {widths}")
    layers.choose("pool", pool, ("average", "max"))
    return LeNet(
        num_outputs,
        activation,
        pool,
        tuple(widths),
        padding,
        norm,
        dropout,
        spatial_dropout,
        dtype,
    )


class LeNet(nn.Module):
    """Two convolutions with pooling, two hidden dense layers; attributes as in `build`."""

    num_outputs: int
    activation: str
    pool: str
    widths: tuple[int, ...]
    padding: int
    norm: str
    dropout: float
    spatial_dropout: float
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stage1`, `stage2` (after the poolings)."""
        features = {}
        x = images
        for i, (width, padding) in enumerate(
            zip(self.widths[:2], (self.padding, 0), strict=True), start=1
        ):
            x = layers.ConvBlock(
                width,
                kernel_size=5,
                padding=padding,
                norm=self.norm,
                activation=self.activation,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x, train=train)
            x = layers.Pool(self.pool, name=f"pool{i}")(x)
            x = layers.SpatialDropout(self.spatial_dropout, name=f"drop_conv{i}")(x, train=train)
            features[f"stage{i}"] = x
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths[2:], start=1):
            x = layers.Dense(
                width, dtype=self.dtype, kernel_init=layers.he_normal, name=f"dense{i}"
            )(x)
            x = layers.activation(self.activation)(x)
            x = layers.Dropout(self.dropout, name=f"drop{i}")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)
