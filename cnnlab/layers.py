"""Flax Linen modules over `cnnlab.ops`, shared by all model families.

Parameters are float32. `dtype` is the dtype of the computation, `"float32"` or `"bfloat16"`;
whatever it is, logits are computed and returned in float32. Each layer's `macs` counts the
multiply-accumulates of one image, which `cnnlab.describe` adds up.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnlab import geometry
from cnnlab.ops import conv as conv_ops
from cnnlab.ops import norm as norm_ops
from cnnlab.ops import pool as pool_ops
from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError, Outputs

Shape = tuple[int, ...]
Initializer = Callable[..., jax.Array]
"""(key, shape, dtype) -> array."""

Padding = int | str | Sequence[tuple[int, int]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "hard_swish": jax.nn.hard_swish,
    "identity": lambda x: x,
}

NORMS = ("batch", "group", "layer", "none")
DTYPES = ("float32", "bfloat16")

LARGE_BYTES = 2 << 20
"""From so large results on, `conv_norm` saves a pass over memory: over smaller ones, which stay in
the processor's cache, it takes less time than the preparations take to compile."""

_CHUNK = 1 << 16


@functools.partial(jax.jit, static_argnums=1)
def _standard_normal(key: jax.Array, chunks: int) -> jax.Array:
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(chunks))
    return jax.vmap(lambda k: jax.random.normal(k, (_CHUNK,)))(keys).reshape(-1)


def _normal(fan: str, gain: float) -> Initializer:
    """An initialiser that draws kernels from a normal distribution with variance gain / fan.

    XLA's CPU compiler takes about a second for each new shape of random numbers, which is most of
    a cold start. So numbers are drawn in chunks of one size and cut to shape: outside `jit` (and
    in `Module.lazy_init`) nearly all kernels of all networks share one compiled draw.
    """

    def initialize(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        count = math.prod(shape)
        flat = _standard_normal(key, -(-count // _CHUNK))[:count]
        fans = {"in": count // shape[-1], "out": count // shape[-2]}
        return (flat * math.sqrt(gain / fans[fan])).reshape(shape).astype(dtype)

    return initialize


he_normal = _normal("in", 2.0)
"""Normal with variance 2 / fan-in (He et al. 2015, equation 10): keeps forward variance."""

he_normal_fan_out = _normal("out", 2.0)
"""Normal with variance 2 / fan-out (He et al. 2015, equation 14): keeps backward variance."""

lecun_normal = _normal("in", 1.0)
"""Normal with variance 1 / fan-in (LeCun et al. 1998, "Efficient BackProp", section 4.6)."""


def normal(deviation: float) -> Initializer:
    """An initialiser that draws with this standard deviation, whatever the shape."""

    def initialize(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        count = math.prod(shape)
        flat = _standard_normal(key, -(-count // _CHUNK))[:count]
        return (deviation * flat).reshape(shape).astype(dtype)

    return initialize


def choose(field: str, given: str, known: Sequence[str]) -> str:
    """`given`, checked.

    Raises:
        CnnlabError: it is none of `known`; the message names the nearest.
    """
    if given not in known:
        raise CnnlabError(
            f"unknown {field} {given!r}{did_you_mean(given, known)}. "
            f"Valid: {', '.join(map(repr, known))}"
        )
    return given


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function of this name.

    Raises:
        CnnlabError: there is none; the message names the nearest.
    """
    return ACTIVATIONS[choose("activation", name, tuple(ACTIVATIONS))]


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of the computation: `"float32"` or `"bfloat16"`.

    Raises:
        CnnlabError: another name.
    """
    return jnp.dtype(choose("dtype", name, DTYPES))


def check_fields(fields: Mapping[str, object]) -> None:
    """Checks the fields that mean the same in every family, before anything is traced.

    Raises:
        CnnlabError: an unknown `activation`, `norm` or `dtype`, or a rate out of [0, 1), which
            every field named `...dropout` or `...drop_path` is.
    """
    for field, known in (("activation", ACTIVATIONS), ("norm", NORMS), ("dtype", DTYPES)):
        if field in fields:
            choose(field, str(fields[field]), tuple(known))
    for field in (name for name in fields if name.endswith(("dropout", "drop_path"))):
        rate = fields[field]
        if not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise CnnlabError(f"{field} must be a rate in [0, 1), got {rate!r}")


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class Conv(nn.Module):
    """Convolution of [B, H, W, C] images.

    Attributes:
        features: output channels.
        kernel_size: height and width, or one number for both.
        strides: likewise.
        padding: pixels on every side, ((top, bottom), (left, right)), `"SAME"` or `"VALID"`.
            `"SAME"` at stride 2 pads less at the top and left than at the bottom and right.
        dilation: distance of neighbouring taps.
        groups: channel groups.
        use_bias: whether a bias is added; needless before a normalisation.
        dtype: dtype of the computation.
        kernel_init: He-normal over the fan-out unless given. Ahead of a normalisation the
            forward variance is taken care of, so the backward one is kept, as ResNets do.
    """

    features: int
    kernel_size: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: Padding = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Initializer = he_normal_fan_out

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, H', W', features]."""
        dtype = compute_dtype(self.dtype)
        channels = images.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise CnnlabError(
                f"groups must divide the channels in and out, got groups {self.groups} for "
                f"{channels} -> {self.features} channels"
            )
        taps = _pair(self.kernel_size)
        shape = (*taps, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = conv_ops.conv(images.astype(dtype), kernel.astype(dtype), **self._settings())
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(dtype).reshape(1, 1, 1, -1)
        return y

    def middle_mean(self, images: jax.Array) -> jax.Array:
        """[features]: means over a middle part of the result, constants to derivatives.

        See `ops.conv.middle_mean`; the layer must have been called before.
        """
        kernel: jax.Array = self.get_variable("params", "kernel")
        images = images.astype(compute_dtype(self.dtype))
        mean = conv_ops.middle_mean(*jax.lax.stop_gradient((images, kernel)), **self._settings())
        return mean + self.get_variable("params", "bias") if self.use_bias else mean

    @nn.nowrap
    def _settings(self) -> dict[str, Any]:
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        return {
            "strides": _pair(self.strides),
            "padding": padding,
            "dilation": _pair(self.dilation),
            "groups": self.groups,
        }

    def macs(self, inputs: Shape, outputs: Shape) -> int:
        """Multiply-accumulates for one image."""
        taps = _pair(self.kernel_size)
        return geometry.conv_macs(inputs[-1], self.features, taps, outputs[1:3], groups=self.groups)


class Dense(nn.Module):
    """Affine map of the last axis.

    Attributes:
        features: outputs.
        use_bias: whether a bias is added.
        dtype: dtype of the computation.
        kernel_init: LeCun-normal unless given, right for logits; hidden layers with a rectifier
            take `he_normal`.
    """

    features: int
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Initializer = lecun_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., features]."""
        dtype = compute_dtype(self.dtype)
        shape = (x.shape[-1], self.features)
        y = x.astype(dtype) @ self.param("kernel", self.kernel_init, shape, jnp.float32).astype(
            dtype
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def macs(self, inputs: Shape, outputs: Shape) -> int:
        """Multiply-accumulates for one example, over all its positions."""
        return math.prod(outputs[1:-1]) * geometry.dense_macs(inputs[-1], self.features)


class _Norm(nn.Module):
    def _scale_and_bias(self, x: jax.Array, zero_scale: bool) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1],)
        start = nn.initializers.zeros if zero_scale else nn.initializers.ones
        scale = self.param("scale", start, shape, jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, shape, jnp.float32)

    def macs(self, inputs: Shape, outputs: Shape) -> int:
        """0: published tables count no normalisation."""
        del inputs, outputs
        return 0


_PARTS: contextvars.ContextVar[int] = contextvars.ContextVar("sub_batches", default=1)


@contextlib.contextmanager
def statistics_of_parts(sub_batches: int) -> Iterator[None]:
    """Within it, every `BatchNorm` that does not say otherwise has so many `sub_batches`."""
    token = _PARTS.set(sub_batches)
    try:
        yield
    finally:
        _PARTS.reset(token)


class BatchNorm(_Norm):
    """Batch normalisation (Ioffe & Szegedy 2015) over all axes but the last.

    Running statistics live in the collection `batch_stats` under `mean` and `var` (the biased
    variance), float32, and move by running = momentum * running + (1 - momentum) * batch.

    Attributes:
        momentum: share of the old running statistics kept at each step (Flax's convention: 0.9
            here is PyTorch's 0.1).
        epsilon: added to the variance.
        zero_scale: start the scale at 0 instead of 1, so that a residual branch that ends in
            this layer starts as the identity (Goyal et al. 2017, section 5.1).
        sub_batches: normalise so many equal parts of the batch each by its own statistics, as
            so many devices without synchronised statistics do; see `ops.norm.batch_norm`. 0: as
            `statistics_of_parts` says, else 1.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    zero_scale: bool = False
    sub_batches: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, shift: Callable[[], jax.Array] | None = None
    ) -> jax.Array:
        """[B, ..., C] to the same, by the batch's statistics if `train`, else the running ones.

        `shift`, called if it is of use, gives numbers as in `ops.norm.batch_norm`.
        """
        scale, bias = self._scale_and_bias(x, self.zero_scale)
        mean = self.variable("batch_stats", "mean", jnp.zeros, scale.shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, scale.shape, jnp.float32)
        if not train:
            return norm_ops.normalize(x, mean.value, var.value, scale, bias, epsilon=self.epsilon)
        # A network is initialised on one image, which has no parts.
        sub_batches = 1 if self.is_initializing() else self.sub_batches or _PARTS.get()
        if self.is_initializing() or sub_batches > 1:  # parts have means of their own
            shift = None
        y, batch_mean, batch_var = norm_ops.batch_norm(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            sub_batches=sub_batches,
            shift=None if shift is None else shift(),
        )
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * batch_mean
            var.value = keep * var.value + (1 - keep) * batch_var
        return y


class GroupNorm(_Norm):
    """Group normalisation (Wu & He 2018) over an example's positions and groups of channels.

    Attributes:
        groups: must divide the channels. 0: groups of 16 channels, the best of that paper's
            table 3, or of the next size that divides the channels.
        epsilon: added to the variance.
        zero_scale: see `BatchNorm`.
    """

    groups: int = 0
    epsilon: float = 1e-5
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ..., C] to the same."""
        channels = x.shape[-1]
        most = max(1, channels // 16)
        groups = self.groups or max(n for n in range(1, most + 1) if channels % n == 0)
        scale, bias = self._scale_and_bias(x, self.zero_scale)
        return norm_ops.group_norm(x, scale, bias, groups=groups, epsilon=self.epsilon)


class LayerNorm(_Norm):
    """Layer normalisation (Ba, Kiros & Hinton 2016) of each position over its channels.

    Attributes:
        epsilon: added to the variance.
        zero_scale: see `BatchNorm`.
    """

    epsilon: float = 1e-5
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to the same."""
        scale, bias = self._scale_and_bias(x, self.zero_scale)
        return norm_ops.layer_norm(x, scale, bias, epsilon=self.epsilon)


class RMSNorm(_Norm):
    """Normalisation of each position by its channels' root mean square (Zhang & Sennrich 2019).

    Attributes:
        epsilon: added to the mean square.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to the same."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return norm_ops.rms_norm(x, scale, epsilon=self.epsilon)


def normalize(
    x: jax.Array,
    norm: str,
    *,
    train: bool,
    zero_scale: bool = False,
    epsilon: float = 1e-5,
    name: str = "norm",
    shift: Callable[[], jax.Array] | None = None,
) -> jax.Array:
    """Normalises within the `@nn.compact` method of the calling module.

    Args:
        x: [B, ..., C].
        norm: `"batch"`, `"group"` (of 16 channels), `"layer"` (over channels) or `"none"`.
        train: whether `"batch"` takes the batch's statistics; the others do not depend on it.
        zero_scale: see `BatchNorm`.
        epsilon: added to the variance.
        name: of the submodule; `"none"` has none.
        shift: see `BatchNorm`.

    Returns:
        [B, ..., C].

    Raises:
        CnnlabError: an unknown `norm`.
    """
    match choose("norm", norm, NORMS):
        case "batch":
            norm_layer = BatchNorm(epsilon=epsilon, zero_scale=zero_scale, name=name)
            return norm_layer(x, train=train, shift=shift)
        case "group":
            return GroupNorm(epsilon=epsilon, zero_scale=zero_scale, name=name)(x)
        case "layer":
            return LayerNorm(epsilon=epsilon, zero_scale=zero_scale, name=name)(x)
    return x


def conv_norm(
    conv: Conv,
    images: jax.Array,
    norm: str,
    *,
    train: bool,
    zero_scale: bool = False,
    epsilon: float = 1e-5,
    name: str = "norm",
) -> jax.Array:
    """`normalize(conv(images), ...)`, which on CPU takes a pass over memory less.

    Args:
        conv: of the calling module.
        images: [B, H, W, C].
        norm: see `normalize`, also for the rest and for what is raised.
        train: see there.
        zero_scale: see there.
        epsilon: see there.
        name: see there.

    Returns:
        [B, H', W', features].
    """
    x = conv(images)
    # Where the convolution can add a bias while it writes: not where it is a sum of shifted images.
    adds = conv.groups == 1 and images.shape[-1] > 1 and x.dtype == jnp.float32
    known = all(isinstance(size, int) for size in x.shape)  # `jax.export` may leave some open
    large = adds and known and x.size * x.dtype.itemsize >= LARGE_BYTES
    shift = functools.partial(conv.middle_mean, images) if large else None
    return normalize(
        x, norm, train=train, zero_scale=zero_scale, epsilon=epsilon, name=name, shift=shift
    )


class Pool(nn.Module):
    """Pooling as a layer, so that it shows in a description; it has no parameters.

    Attributes:
        kind: `"max"`, `"average"`, or `"global"` for the average over the whole map.
        window: height and width of the window; not used by `"global"`.
        strides: step; the window itself if 0.
        padding: pixels on every side, or ((top, bottom), (left, right)); an average counts them
            as zeros.
        ceil: also take the windows that hang over the bottom and right edge (and start on the
            image), for what they see of it. An average is that of the pixels seen.
    """

    kind: str
    window: int = 2
    strides: int = 0
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0
    ceil: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, H', W', C], or to [B, C] for `"global"`."""
        kind = choose("pooling", self.kind, ("max", "average", "global"))
        if kind == "global":
            return pool_ops.global_avg_pool(images)
        strides = self.strides or self.window
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        if self.ceil:
            (top, bottom), (left, right) = padding
            bottom += self._overhang(images.shape[1], top, bottom, strides)
            right += self._overhang(images.shape[2], left, right, strides)
            padding = ((top, bottom), (left, right))
        for size, (low, high) in zip(images.shape[1:3], padding, strict=True):
            # A clear error where the map is smaller than the window.
            geometry.conv_output_size(size + low + high, self.window, strides)
        window, step = _pair(self.window), _pair(strides)
        if kind == "max":
            return pool_ops.max_pool(images, window, strides=step, padding=padding)
        return pool_ops.avg_pool(
            images, window, strides=step, padding=padding, count_include_pad=not self.ceil
        )

    def _overhang(self, size: int, low: int, high: int, strides: int) -> int:
        """Pixels that one more window needs, 0 if it would start beyond the image."""
        whole = (size + low + high - self.window) // strides + 1
        missing = whole * strides + self.window - (size + low + high)
        starts_inside = whole * strides < size + low
        return missing if missing < strides and starts_inside else 0

    def macs(self, inputs: Shape, outputs: Shape) -> int:
        """0: published tables count no pooling."""
        del inputs, outputs
        return 0


class AdaptivePool(nn.Module):
    """Average pooling to a map of a given size, whatever the size of the input.

    Attributes:
        size: height and width of the output, or one number for both; see
            `ops.pool.adaptive_avg_pool`.
    """

    size: int | tuple[int, int]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, *size, C]."""
        return pool_ops.adaptive_avg_pool(images, _pair(self.size))

    def macs(self, inputs: Shape, outputs: Shape) -> int:
        """0: published tables count no pooling."""
        del inputs, outputs
        return 0


class Dropout(nn.Module):
    """Sets each number to 0 with probability `rate` and scales the rest by 1 / (1 - rate).

    Draws from the stream `dropout`. After Srivastava et al. 2014.

    Attributes:
        rate: in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, ...] to the same shape; the identity unless `train`."""
        return self._drop(x, x.shape, train)

    def _drop(self, x: jax.Array, shape: Shape, train: bool) -> jax.Array:
        if not 0.0 <= self.rate < 1.0:
            raise CnnlabError(f"a dropout rate must be in [0, 1), got {self.rate}")
        if not train or self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class SpatialDropout(Dropout):
    """Dropout of whole channels of an image (Tompson et al. 2015, section 3.2).

    Neighbouring pixels of a feature map are strongly correlated, so that dropping single ones
    hardly regularises.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] to the same shape; the identity unless `train`."""
        return self._drop(x, (x.shape[0], 1, 1, x.shape[-1]), train)


class DropPath(Dropout):
    """Dropout of a residual branch as a whole, example by example.

    Huang et al. 2016, "Deep Networks with Stochastic Depth", as later networks do it: kept
    branches are scaled by 1 / (1 - rate) in training, instead of by 1 - rate at inference.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, ...] to the same shape; the identity unless `train`."""
        return self._drop(x, (x.shape[0],) + (1,) * (x.ndim - 1), train)


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """From 0 for the first block to `rate` for the last, in equal steps (Huang et al., 3.2)."""
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]


class LayerScale(nn.Module):
    """A trained factor for each channel of a residual branch (Touvron et al. 2021, section 2.1).

    Attributes:
        start: its first value.
    """

    start: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to the same."""
        gamma = self.param(
            "gamma", nn.initializers.constant(self.start), (x.shape[-1],), jnp.float32
        )
        return x * gamma.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

    def macs(self, inputs: Shape, outputs: Shape) -> int:
        """0: published tables count convolutions and dense layers."""
        del inputs, outputs
        return 0


class SqueezeExcite(nn.Module):
    """Channel gates from global averages (Hu et al. 2018, section 3).

    Attributes:
        hidden: channels between the two 1x1 convolutions `fc1` and `fc2`.
        activation: after the first.
        dtype: dtype of the computation.
    """

    hidden: int
    activation: str = "relu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same, each channel times its gate in (0, 1)."""
        x = Pool("global", name="pool")(images)[:, None, None, :]
        x = Conv(self.hidden, 1, dtype=self.dtype, kernel_init=he_normal, name="fc1")(x)
        x = activation(self.activation)(x)
        x = Conv(images.shape[-1], 1, dtype=self.dtype, kernel_init=lecun_normal, name="fc2")(x)
        return images * jax.nn.sigmoid(x)


class Block(nn.Module):
    """A part of a network that `rematerialized` can wrap.

    A subclass defines `forward(self, x, train)` as its compact method and is called like any
    other module, `block(x, train=train)`. `x` is [B, H, W, C], or a tuple of such arrays.
    """

    def __call__(self, x: Any, *, train: bool) -> jax.Array:
        """What `forward` does."""
        return self.forward(x, train)

    def forward(self, x: Any, train: bool) -> jax.Array:
        """To be defined by each block."""
        raise NotImplementedError


AnyBlock = TypeVar("AnyBlock", bound=Block)


def rematerialized(block: type[AnyBlock], remat: bool) -> type[AnyBlock]:
    """The block's class, or one that keeps only the block's input for the backward pass.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost": activations inside the block
    are computed again, for about a third more work a step. Parameters keep their names.
    """
    if not remat:
        return block
    wrapped: type[AnyBlock] = nn.remat(block, static_argnums=(2,), methods=["forward"])
    return wrapped


def make_divisible(channels: float, divisor: int = 8, round_limit: float = 0.9) -> int:
    """The nearest multiple of `divisor`, but not below `round_limit` of `channels`.

    As the networks scaled by a width factor round (Sandler et al. 2018 and after).
    """
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < round_limit * channels else nearest


def dilated_stages(strides: Sequence[int], output_stride: int) -> list[tuple[int, int, int]]:
    """Strides and dilations of stages whose map shrinks to 1 / `output_stride` and no further.

    A stage that would stride beyond it keeps the map's size and multiplies the dilation of all
    that follows its own strided convolution, which reads the map as it is (Yu, Koltun & Funkhouser
    2017, "Dilated Residual Networks", section 2). With even padding the strided network's values
    so stand on the finer map, some pixels apart.

    Args:
        strides: of the stem, then of the first block of each stage.
        output_stride: 8, 16 or 32.

    Returns:
        For each stage its stride, the dilation of its strided convolution, and that of the rest.

    Raises:
        CnnlabError: another `output_stride`.
    """
    if output_stride not in (8, 16, 32):
        nearest = min((8, 16, 32), key=lambda stride: abs(stride - output_stride))
        raise CnnlabError(
            f"output_stride must be 8, 16 or 32, got {output_stride}; the nearest is {nearest}"
        )
    total, *rest = strides
    dilation, plan = 1, []
    for stride in rest:
        first, kept = dilation, stride
        if total * stride > output_stride:
            dilation, kept = dilation * stride, 1
        total *= kept
        plan.append((kept, first, dilation))
    return plan


def dotted(*names: str) -> str:
    """`("layer1_0", "conv1")` to `"layer1.0.conv1"`, as PyTorch names the same module."""
    return re.sub(r"(?<=\d)_|_(?=\d)", ".", ".".join(names))


class ConvBlock(Block):
    """Convolution, normalisation, activation: the brick of most families.

    Attributes:
        features: output channels.
        kernel_size: height and width.
        strides: step.
        padding: pixels on every side; negative for (F_eff - 1) / 2, which keeps the size at
            stride 1 and odd kernels; or `"SAME"`, see `Conv`.
        dilation: distance of neighbouring taps.
        groups: of channels.
        norm: a name in `NORMS`, see `normalize`.
        activation: a name in `ACTIVATIONS`.
        use_bias: whether the convolution has a bias even where a normalisation follows; without
            one it always has.
        zero_scale: see `BatchNorm`.
        epsilon: of the normalisation.
        dtype: dtype of the computation.
        kernel_init: of the convolution, see `Conv`.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | str = -1
    dilation: int = 1
    groups: int = 1
    norm: str = "batch"
    activation: str = "relu"
    use_bias: bool = False
    zero_scale: bool = False
    epsilon: float = 1e-5
    dtype: str = "float32"
    kernel_init: Initializer = he_normal_fan_out

    @nn.compact
    def forward(self, images: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to [B, H', W', features]."""
        padding = self.padding
        if isinstance(padding, int):
            if padding < 0:
                padding = (geometry.effective_kernel(self.kernel_size, self.dilation) - 1) // 2
            for size in images.shape[1:3]:
                geometry.conv_output_size(
                    size, self.kernel_size, self.strides, padding, self.dilation
                )
        conv = Conv(
            self.features,
            self.kernel_size,
            self.strides,
            padding,
            self.dilation,
            self.groups,
            use_bias=self.use_bias or self.norm == "none",
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )
        x = conv_norm(
            conv,
            images,
            self.norm,
            train=train,
            zero_scale=self.zero_scale,
            epsilon=self.epsilon,
        )
        return activation(self.activation)(x)


class AuxHead(nn.Module):
    """Auxiliary classifier on an inner feature map: global average pooling, then logits.

    The heads of GoogLeNet (Szegedy et al. 2015, section 5) pool 5x5 averages and add a 1x1
    convolution and a hidden layer of 1,024; those of deeply-supervised nets (Lee et al. 2015,
    section 2) put a classifier straight on each layer. Here the pooling is global, so that one
    head fits maps of any size, and the hidden layer is a choice.

    Attributes:
        num_outputs: logits.
        hidden: width of a hidden layer with ReLU; 0 for none.
        dtype: dtype of the hidden layer's computation.
    """

    num_outputs: int
    hidden: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[B, H, W, C] to logits [B, num_outputs], float32."""
        x = Pool("global", name="pool")(features)
        if self.hidden:
            x = Dense(self.hidden, dtype=self.dtype, kernel_init=he_normal, name="hidden")(x)
            x = jax.nn.relu(x)
        return Dense(self.num_outputs, name="logits")(x)


class WithAuxHeads(nn.Module):
    """A network with auxiliary heads, which exist in training only.

    They come after those that the network itself has, such as GoogLeNet's. Parameters: `{"net":
    ..., "aux_<feature>": ...}`. At `train=False` the heads are not computed and `apply` works
    whether their parameters are there or stripped.

    Attributes:
        net: the network, whose `Outputs.features` the heads read.
        aux: names of features, one head each, in the order of `Outputs.aux`.
        num_outputs: logits of each head.
        hidden: see `AuxHead`.
        dtype: see `AuxHead`.
    """

    net: nn.Module
    aux: tuple[str, ...]
    num_outputs: int
    hidden: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Outputs:
        """[B, H, W, C] to `Outputs`, with one more array of logits per head if `train`."""
        outputs = self.net(images, train=train)
        for name in self.aux:
            choose("feature for an auxiliary head", name, tuple(outputs.features))
        if not train and not self.is_initializing():
            return outputs
        logits = tuple(
            AuxHead(self.num_outputs, self.hidden, self.dtype, name=f"aux_{name}")(
                outputs.features[name]
            )
            for name in self.aux
        )
        return outputs.replace(aux=(*outputs.aux, *logits) if train else ())
