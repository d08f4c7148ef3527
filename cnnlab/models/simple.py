"""Small plain networks: convolutions with pooling, then one hidden dense layer.

`simple_two_conv` is conv 5x5x5, pool, conv 5x5x10, pool, dense 32; `simple_conv` is conv 3x3x32,
pool, dense 128. They are the floor that a table's other rows are read against.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

VARIANTS: dict[str, dict] = {
    "simple_two_conv": {"widths": (5, 10), "kernel_size": 5, "hidden": 32},
    "simple_conv": {"widths": (32,), "kernel_size": 3, "hidden": 128},
}


def build(
    num_outputs: int,
    *,
    widths: tuple[int, ...] = (5, 10),
    kernel_size: int = 5,
    hidden: int = 32,
    padding: int = 0,
    activation: str = "relu",
    norm: str = "none",
    dropout: float = 0.0,
    spatial_dropout: float = 0.0,
    dtype: str = "float32",
) -> nn.Module:
    """A plain network; each convolution is followed by a 2x2 max pooling.

    Args:
        num_outputs: logits.
        widths: channels of each convolution, at least one.
        kernel_size: of every convolution.
        hidden: units of the dense layer ahead of the logits.
        padding: pixels on every side of each convolution.
        activation: after each convolution and the dense layer.
        norm: after each convolution, `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        spatial_dropout: rate for whole channels after each pooling.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: no widths, or a width below 1.
    """
    if not widths or min(*widths, hidden, kernel_size) < 1:
        raise CnnlabError(
            f"widths, hidden and kernel_size must be at least 1 and widths not empty, such as "
            f"(5, 10), 32 and 5; got {widths}, {hidden} and {kernel_size}"
        )
    return Simple(
        num_outputs,
        tuple(widths),
        kernel_size,
        hidden,
        padding,
        activation,
        norm,
        dropout,
        spatial_dropout,
        dtype,
    )


class Simple(nn.Module):
    """Convolutions with pooling, one hidden dense layer; attributes as in `build`."""

    num_outputs: int
    widths: tuple[int, ...]
    kernel_size: int
    hidden: int
    padding: int
    activation: str
    norm: str
    dropout: float
    spatial_dropout: float
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with one feature a convolution, after its pooling."""
        features = {}
        x = images
        for i, width in enumerate(self.widths, start=1):
            x = layers.ConvBlock(
                width,
                kernel_size=self.kernel_size,
                padding=self.padding,
                norm=self.norm,
                activation=self.activation,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x, train=train)
            x = layers.Pool("max", name=f"pool{i}")(x)
            x = layers.SpatialDropout(self.spatial_dropout, name=f"drop_conv{i}")(x, train=train)
            features[f"stage{i}"] = x
        x = x.reshape(x.shape[0], -1)
        x = layers.Dense(
            self.hidden, dtype=self.dtype, kernel_init=layers.he_normal, name="hidden"
        )(x)
        x = layers.activation(self.activation)(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)
