"""ResNets of four stages, as trained on ImageNet, and their kin.

resnet18 ... resnet152: He et al. 2016, "Deep Residual Learning", table 1, with the stride in the
3x3 convolution of a bottleneck, as all published weights have it. `d` (resnet50d ...): He et al.
2019, "Bag of Tricks", section 4, a stem of three 3x3 convolutions and averages ahead of strided
shortcuts. wide_resnet*: Zagoruyko & Komodakis 2016. resnext*: Xie et al. 2017. seresnet*: Hu et
al. 2018. preact_resnet18 ...: He et al. 2016, "Identity Mappings", for small images.

`output_stride=16` or `8` makes the last one or two stages dilate instead of striding (Yu, Koltun &
Funkhouser 2017; Chen et al. 2017, "Rethinking Atrous Convolution", section 3.1). The weights stay
those of the strided network. For images of 28 to 64 pixels set `stem="small"`.
"""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from cnnlab import layers
from cnnlab.types import CnnlabError, Outputs

_SIZES: dict[int, dict] = {
    18: {"block": "basic", "stage_sizes": (2, 2, 2, 2)},
    34: {"block": "basic", "stage_sizes": (3, 4, 6, 3)},
    26: {"block": "bottleneck", "stage_sizes": (2, 2, 2, 2)},
    50: {"block": "bottleneck", "stage_sizes": (3, 4, 6, 3)},
    101: {"block": "bottleneck", "stage_sizes": (3, 4, 23, 3)},
    152: {"block": "bottleneck", "stage_sizes": (3, 8, 36, 3)},
}

VARIANTS: dict[str, dict] = {
    **{f"resnet{d}": _SIZES[d] for d in (18, 26, 34, 50, 101, 152)},
    **{
        f"resnet{d}d": {**_SIZES[d], "stem": "deep", "average_down": True}
        for d in (18, 26, 34, 50, 101, 152)
    },
    "wide_resnet50_2": {**_SIZES[50], "base_width": 128},
    "wide_resnet101_2": {**_SIZES[101], "base_width": 128},
    "resnext50_32x4d": {**_SIZES[50], "groups": 32, "base_width": 4},
    "resnext101_32x4d": {**_SIZES[101], "groups": 32, "base_width": 4},
    "resnext101_32x8d": {**_SIZES[101], "groups": 32, "base_width": 8},
    "resnext101_64x4d": {**_SIZES[101], "groups": 64, "base_width": 4},
    **{f"seresnet{d}": {**_SIZES[d], "squeeze_excite": True} for d in (18, 34, 50, 101, 152)},
    **{f"preact_resnet{d}": {**_SIZES[d], "preact": True, "stem": "small"} for d in (18, 34, 50)},
}

_TAGS = {
    "a1_in1k": ("resnet18", "resnet34", "resnet50", "seresnet50"),
    "a1h_in1k": ("resnet101", "resnet152", "resnext50_32x4d"),
    "bt_in1k": ("resnet26", "resnet26d"),
    "ra2_in1k": ("resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet152d"),
    "racm_in1k": ("wide_resnet50_2",),
    "tv_in1k": ("wide_resnet101_2", "resnext101_32x8d"),
    "gluon_in1k": ("resnext101_32x4d",),
    "c1_in1k": ("resnext101_64x4d",),
}
PUBLISHED: dict[str, dict] = {name: {"tag": tag} for tag, names in _TAGS.items() for name in names}
for _name in ("resnet101d", "resnet152d"):
    PUBLISHED[_name]["size"] = 256
for _name in _TAGS["tv_in1k"]:
    PUBLISHED[_name]["interpolation"] = "bilinear"

STEMS = ("imagenet", "deep", "small")


def build(
    num_outputs: int,
    *,
    block: str = "bottleneck",
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 64,
    base_width: int = 64,
    groups: int = 1,
    stem: str = "imagenet",
    average_down: bool = False,
    squeeze_excite: bool = False,
    preact: bool = False,
    output_stride: int = 32,
    zero_init: bool = False,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> nn.Module:
    """A residual network.

    Args:
        num_outputs: logits.
        block: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1, four times as
            many channels out).
        stage_sizes: blocks in each stage; all stages but the first start with stride 2.
        width: channels of the stem and of the first stage's inner convolutions; each further
            stage has twice the last one's.
        base_width: a bottleneck's inner width is groups * floor(planes * base_width / 64).
        groups: of a bottleneck's 3x3 convolution.
        stem: `"imagenet"` (7x7 / 2 and 3x3 / 2 max pooling), `"deep"` (three 3x3 convolutions, the
            first with stride 2, and the same pooling), `"small"` (one 3x3 at stride 1).
        average_down: strided shortcuts average 2x2 pixels ahead of a 1x1 convolution.
        squeeze_excite: gate each branch by `layers.SqueezeExcite`, a sixteenth as wide.
        preact: normalise and activate ahead of the convolutions.
        output_stride: of the last stage, 8, 16 or 32 with a stem that strides by 4. Stages that
            would stride beyond it dilate instead. A `"small"` stem makes it an eighth: 32 means 8.
        zero_init: start each residual branch as zero; needs `norm="batch"` and no `preact`.
        activation: a name in `layers.ACTIVATIONS`.
        norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
        dropout: rate ahead of the logits.
        drop_path: the last block's rate of stochastic depth; earlier ones have less.
        remat: compute activations inside blocks again in the backward pass, to save memory.
        dtype: dtype of the computation.

    Raises:
        CnnlabError: a value out of range, or fields that do not fit each other.
    """
    layers.choose("block", block, ("basic", "bottleneck"))
    layers.choose("stem", stem, STEMS)
    if not stage_sizes or min(stage_sizes) < 1:
        raise CnnlabError(
            f"stage_sizes must be numbers of at least 1, such as (3, 4, 6, 3), got {stage_sizes}"
        )
    if min(width, base_width, groups) < 1:
        raise CnnlabError(
            "width, base_width and groups must be at least 1, got "
            f"{width}, {base_width} and {groups}"
        )
    strides = (4, 1, *(2,) * (len(stage_sizes) - 1))  # the stem's first
    plan = tuple(layers.dilated_stages(strides, output_stride))
    if block == "basic" and (groups, base_width) != (1, 64):
        raise CnnlabError(
            f'groups and base_width shape a bottleneck; block="basic" takes neither, got groups '
            f"{groups} and base_width {base_width}"
        )
    if zero_init and (preact or norm != "batch"):
        raise CnnlabError(
            'zero_init needs norm="batch" and preact=False: only there does a residual branch '
            f"end in a scale; got norm={norm!r} and preact={preact}"
        )
    return ResNet(
        num_outputs,
        block,
        tuple(stage_sizes),
        width,
        base_width,
        groups,
        stem,
        average_down,
        squeeze_excite,
        preact,
        plan,
        zero_init,
        activation,
        norm,
        dropout,
        drop_path,
        remat,
        dtype,
    )


def published_name(module: tuple[str, ...], **fields: object) -> str | None:
    """The name that timm gives to a module; None where timm has no such network."""
    if fields["preact"]:
        return None
    names = layers.dotted(*module).replace("norm", "bn")
    if module[0] == "stem":
        return names.replace("stem.", "conv1." if fields["stem"] == "deep" else "")
    return {"logits": "fc"}.get(names, names)


class ResNet(nn.Module):
    """Stem, stages, global average, logits.

    Attributes as in `build`, but `plan`: of `layers.dilated_stages`.
    """

    num_outputs: int
    block: str
    stage_sizes: tuple[int, ...]
    width: int
    base_width: int
    groups: int
    stem: str
    average_down: bool
    squeeze_excite: bool
    preact: bool
    plan: tuple[tuple[int, int, int], ...]
    zero_init: bool
    activation: str
    norm: str
    dropout: float
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs` with features `stem` and one `stage<i>` a stage.

        With `preact` stages are raw sums but the last, which is normalised and activated.
        """
        x = Stem(
            self.width, self.stem, self.preact, self.activation, self.norm, self.dtype, name="stem"
        )(images, train=train)
        features = {"stem": x}
        if self.stem != "small":
            x = layers.Pool("max", 3, 2, 1, name="pool")(x)
        block = layers.rematerialized(ResidualBlock, self.remat)
        rates = iter(layers.drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        stages = zip(self.stage_sizes, self.plan, strict=True)
        for i, (size, (strides, first_dilation, dilation)) in enumerate(stages):
            for j in range(size):
                x = block(
                    self.block,
                    self.width * 2**i,
                    self.base_width,
                    self.groups,
                    strides if j == 0 else 1,
                    (first_dilation if j == 0 else dilation, dilation),
                    self.average_down,
                    self.squeeze_excite,
                    self.preact,
                    self.zero_init,
                    self.activation,
                    self.norm,
                    next(rates),
                    self.dtype,
                    name=f"layer{i + 1}_{j}",
                )(x, train=train)
            features[f"stage{i + 1}"] = x
        if self.preact:
            x = layers.normalize(x, self.norm, train=train)
            x = features[f"stage{len(self.stage_sizes)}"] = layers.activation(self.activation)(x)
        x = layers.Pool("global", name="average")(x)
        x = layers.Dropout(self.dropout, name="drop")(x, train=train)
        return Outputs(layers.Dense(self.num_outputs, name="logits")(x), features=features)


class Stem(nn.Module):
    """What comes ahead of the pooling; with `preact` a bare convolution."""

    width: int
    kind: str
    preact: bool
    activation: str
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', width]."""
        act = layers.activation(self.activation)
        bias = self.norm == "none"

        def conv(width: int, size: int, strides: int, name: str) -> layers.Conv:
            return layers.Conv(
                width, size, strides, size // 2, use_bias=bias, dtype=self.dtype, name=name
            )

        normed = functools.partial(layers.conv_norm, norm=self.norm, train=train)
        if self.kind != "deep":
            size, strides = (3, 1) if self.kind == "small" else (7, 2)
            last = conv(self.width, size, strides, "conv1")
        else:
            # Numbered as a sequence of convolution, normalisation and activation.
            for i, strides in ((0, 2), (3, 1)):
                step = conv(max(self.width // 2, 1), 3, strides, str(i))
                x = act(normed(step, x, name=str(i + 1)))
            last = conv(self.width, 3, 1, "6")
        return last(x) if self.preact else act(normed(last, x, name="norm1"))


class ResidualBlock(layers.Block):
    """A basic block or a bottleneck with its shortcut; `dilations` of its first and later 3x3."""

    kind: str
    planes: int
    base_width: int
    groups: int
    strides: int
    dilations: tuple[int, int]
    average_down: bool
    squeeze_excite: bool
    preact: bool
    zero_init: bool
    activation: str
    norm: str
    drop_path: float
    dtype: str

    @nn.compact
    def forward(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', C']."""
        act = layers.activation(self.activation)
        basic = self.kind == "basic"
        features = self.planes * (1 if basic else 4)
        # (features, kernel size, strides, dilation, groups) of each convolution.
        if basic:
            plan = [
                (self.planes, 3, self.strides, self.dilations[0], 1),
                (self.planes, 3, 1, self.dilations[1], 1),
            ]
        else:
            inner = self.planes * self.base_width // 64 * self.groups
            plan = [
                (inner, 1, 1, 1, 1),
                (inner, 3, self.strides, self.dilations[0], self.groups),
                (features, 1, 1, 1, 1),
            ]
        changes = self.strides > 1 or x.shape[-1] != features
        branch = x
        if self.preact:
            branch = act(layers.normalize(x, self.norm, train=train, name="norm1"))
        shortcut = self._shortcut(branch if self.preact else x, features, train) if changes else x
        for i, (width, size, strides, dilation, groups) in enumerate(plan, start=1):
            last = i == len(plan)
            conv = layers.Conv(
                width,
                size,
                strides,
                size // 2 * dilation,
                dilation,
                groups,
                use_bias=self.norm == "none",
                dtype=self.dtype,
                name=f"conv{i}",
            )
            if self.preact and last:
                branch = conv(branch)
                continue
            branch = layers.conv_norm(
                conv,
                branch,
                self.norm,
                train=train,
                zero_scale=last and self.zero_init,
                name=f"norm{i + self.preact}",
            )
            if not last:
                branch = act(branch)
        if self.squeeze_excite:
            hidden = layers.make_divisible(features / 16, round_limit=0.0)
            branch = layers.SqueezeExcite(hidden, dtype=self.dtype, name="se")(branch)
        branch = layers.DropPath(self.drop_path, name="drop_path")(branch, train=train)
        return branch + shortcut if self.preact else act(branch + shortcut)

    def _shortcut(self, x: jax.Array, features: int, train: bool) -> jax.Array:
        first = 0
        if self.average_down:
            first = 1
            if self.strides > 1:
                x = layers.Pool("average", 2, 2, ceil=True, name="downsample_0")(x)
            elif self.dilations[1] > 1:
                # As published weights were trained: zeros beyond the edge count.
                edge = ((0, 1), (0, 1))
                x = layers.Pool("average", 2, 1, padding=edge, name="downsample_0")(x)
        conv = layers.Conv(
            features,
            1,
            1 if self.average_down else self.strides,
            use_bias=self.norm == "none",
            dtype=self.dtype,
            name=f"downsample_{first}",
        )
        if self.preact:
            return conv(x)
        return layers.conv_norm(conv, x, self.norm, train=train, name=f"downsample_{first + 1}")
