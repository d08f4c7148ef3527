"""ConvNeXt.

Liu et al. 2022, "A ConvNet for the 2020s", table 9 and section 3 (tiny to xlarge); the smaller
ones (atto to nano) and those with an overlapping stem (`_ols`) are timm's, whose published weights
all of them take. A block is a 7x7 depthwise convolution, a layer normalisation and two pointwise
layers, four times as wide between them, on a residual branch that starts nearly closed.

For images of 28 to 64 pixels set `stem="small"`.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

_SIZES: dict[str, dict] = {
    "atto": {"stage_sizes": (2, 2, 6, 2), "width": 40, "conv_mlp": True},
    "femto": {"stage_sizes": (2, 2, 6, 2), "width": 48, "conv_mlp": True},
    "pico": {"stage_sizes": (2, 2, 6, 2), "width": 64, "conv_mlp": True},
    "nano": {"stage_sizes": (2, 2, 8, 2), "width": 80, "conv_mlp": True},
    "tiny": {"stage_sizes": (3, 3, 9, 3), "width": 96},
    "small": {"stage_sizes": (3, 3, 27, 3), "width": 96},
    "base": {"stage_sizes": (3, 3, 27, 3), "width": 128},
    "large": {"stage_sizes": (3, 3, 27, 3), "width": 192},
    "xlarge": {"stage_sizes": (3, 3, 27, 3), "width": 256},
}

VARIANTS: dict[str, dict] = {
    **{f"convnext_{size}": fields for size, fields in _SIZES.items()},
    **{
        f"convnext_{size}_ols": {**_SIZES[size], "stem": "tiered"}
        for size in ("atto", "femto", "pico")
    },
    "convnext_nano_ols": {**_SIZES["nano"], "stem": "overlap"},
}

PUBLISHED: dict[str, dict] = {
    f"convnext_{size}": {"tag": tag}
    for size, tag in {
        "atto": "d2_in1k",
        "femto": "d1_in1k",
        "pico": "d1_in1k",
        "nano": "in12k_ft_in1k",
        "tiny": "in12k_ft_in1k",
        "small": "in12k_ft_in1k",
        **dict.fromkeys(("base", "large", "xlarge"), "fb_in22k_ft_in1k"),
        "atto_ols": "a2_in1k",
        "femto_ols": "d1_in1k",
        "pico_ols": "d1_in1k",
        "nano_ols": "d1h_in1k",
    }.items()
}

_PATCHES = {"imagenet": 4, "small": 2}
STEMS = (*_PATCHES, "overlap", "tiered")

_EPSILON = 1e-6
# Liu et al., appendix A.1: truncated normal, 0.02. The code of the published weights truncates at
# +-2, a hundred standard deviations out, which is no truncation.
_INIT = layers.normal(0.02)


def build(
    num_outputs: int,
    *,
    stage_sizes: tuple[int, ...] = (3, 3, 9, 3),
    width: int = 96,
    stem: str = "imagenet",
    kernel_size: int = 7,
    conv_mlp: bool = False,
    layer_scale: float = 1e-6,
    activation: str = "gelu",
    norm: str = "layer",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A ConvNeXt.

    Args:
        num_outputs: logits.
        stage_sizes: blocks in each stage; a normalisation and a 2x2 convolution at stride 2 stand
            ahead of each stage but the first.
        width: channels of the first stage; each further stage has twice the last one's.
        stem: `"imagenet"` (4x4 patches), `"small"` (2x2 patches), `"overlap"` (two 3x3
            convolutions at stride 2) or `"tiered"` (likewise, the first half as wide).
        kernel_size: height and width of the depthwise convolutions, odd; 7 as published.
        conv_mlp: the pointwise layers are 1x1 convolutions instead of dense layers: the same
            function, with kernels of rank 4 as the weights of atto to nano have them.
        layer_scale: first value of the factors that scale each channel of a branch; 0 for none.
        activation: between the pointwise layers, a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        drop_path: the last block's rate of stochastic depth; earlier ones have less. Published: 0.1
            for tiny to 0.5 for base (table 5).
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range.
    """
    layers.choose("stem", stem, STEMS)
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (3, 3, 9, 3), got {stage_sizes}"
        )
    if width < 1:
        raise CnnlabError(f"width must be at least 1, got {width}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise CnnlabError(
            f"kernel_size must be odd, such as 3, 5 or 7, got {kernel_size}; use "
            f"{max(1, kernel_size + 1)}"
        )
    if layer_scale < 0:
        raise CnnlabError(
            f"layer_scale must be a small positive number such as 1e-6, or 0 for none, got "
            f"{layer_scale}"
        )
    return ConvNeXt(
        num_outputs,
        tuple(stage_sizes),
        width,
        stem,
        kernel_size,
        conv_mlp,
        layer_scale,
        activation,
        norm,
        dropout,
        drop_path,
        remat,
        dtype,
    )


def published_name(module: tuple[str, ...], **fields: object) -> str | None:
    """The name that timm gives to a module."""
    del fields
    names = layers.dotted(*module).removesuffix(".gamma").replace("mlp_", "mlp.")
    return {"head_norm": "head.norm", "logits": "head.fc"}.get(names, names)


class ConvNeXt(nn.Module):
    """Stem, stages, global average, normalisation, logits; attributes as in `build`."""

    num_outputs: int
    stage_sizes: tuple[int, ...]
    width: int
    stem: str
    kernel_size: int
    conv_mlp: bool
    layer_scale: float
    activation: str
    norm: str
    dropout: float
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage."""
        x = images
        if self.stem in _PATCHES:
            size = _PATCHES[self.stem]
            plan = [(self.width, size, size, 0)]
        else:
            first = layers.make_divisible(self.width // 2) if self.stem == "tiered" else self.width
            plan = [(first, 3, 2, 1), (self.width, 3, 2, 1)]
        for i, shape in enumerate(plan):
            x = self._conv(x, *shape, name=f"stem_{i}")
        x = self._normalize(x, f"stem_{len(plan)}", train)
        features = {"stem": x}
        block = layers.rematerialized(ConvNeXtBlock, self.remat)
        rates = iter(layers.drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        for i, size in enumerate(self.stage_sizes):
            if i > 0:
                if min(x.shape[1:3]) < 2:
                    raise CnnlabError(
                        f"stage {i + 1} would halve a map of {x.shape[1]}x{x.shape[2]}: images of "
                        f"{images.shape[1]}x{images.shape[2]} are too small for stem {self.stem!r} "
                        f'and {len(self.stage_sizes)} stages; set stem="small" or fewer stage_sizes'
                    )
                x = self._normalize(x, f"stages_{i}_downsample_0", train)
                x = self._conv(x, self.width * 2**i, 2, 2, 0, name=f"stages_{i}_downsample_1")
            for j in range(size):
                x = block(
                    self.kernel_size,
                    self.conv_mlp,
                    self.layer_scale,
                    self.activation,
                    self.norm,
                    next(rates),
                    self.dtype,
                    name=f"stages_{i}_blocks_{j}",
                )(x, train=train)
            features[f"stage{i + 1}"] = x
        x = layers.Pool("global", name="pool")(x)
        x = self._normalize(x, "head_norm", train)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        logits = layers.Dense(self.num_outputs, kernel_init=_INIT, name="logits")(x)
        return Outputs(logits, features=features)

    def _normalize(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        return layers.normalize(x, self.norm, train=train, epsilon=_EPSILON, name=name)

    def _conv(
        self, x: jax.Array, width: int, size: int, strides: int, padding: int, *, name: str
    ) -> jax.Array:
        return layers.Conv(
            width, size, strides, padding, dtype=self.dtype, kernel_init=_INIT, name=name
        )(x)


class ConvNeXtBlock(layers.Block):
    """Depthwise convolution, normalisation, two pointwise layers; added to the input."""

    kernel_size: int
    conv_mlp: bool
    layer_scale: float
    activation: str
    norm: str
    drop_path: float
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to the same."""
        width = x.shape[-1]
        y = layers.Conv(
            width,
            self.kernel_size,
            padding=self.kernel_size // 2,
            groups=width,
            dtype=self.dtype,
            kernel_init=_INIT,
            name="conv_dw",
        )(x)
        y = layers.normalize(y, self.norm, train=train, epsilon=_EPSILON)
        y = self._pointwise(y, 4 * width, "mlp_fc1")
        y = layers.activation(self.activation)(y)
        y = self._pointwise(y, width, "mlp_fc2")
        if self.layer_scale:
            y = layers.LayerScale(self.layer_scale, name="gamma")(y)
        return x + layers.DropPath(self.drop_path, name="drop_path")(y, train=train)

    def _pointwise(self, x: jax.Array, features: int, name: str) -> jax.Array:
        if self.conv_mlp:
            return layers.Conv(features, 1, dtype=self.dtype, kernel_init=_INIT, name=name)(x)
        return layers.Dense(features, dtype=self.dtype, kernel_init=_INIT, name=name)(x)
