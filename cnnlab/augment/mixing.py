"""Transforms that mix two examples of a batch, and their labels: mixup and CutMix.

They want labels as probabilities, [B, K], which the training step makes where one of them is used
(`SOFT_LABELS`). Each example is mixed with the one that a random permutation of the batch gives it.
Segmentation masks and boxes of a mixture have no meaning here and are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from cnnlab import keys
from cnnlab.registry import Range
from cnnlab.types import Batch, CnnlabError

SOFT_LABELS = True

Alpha = Annotated[float, Range(1e-3, 1e3)]


def mixup(key: jax.Array, batch: Batch, *, alpha: Alpha = 0.2, per_example: bool = False) -> Batch:
    """λ x + (1 - λ) x' with λ from Beta(alpha, alpha) (Zhang et al. 2018, eq. 1).

    Args:
        key: of the step.
        batch: images [B, H, W, C], labels [B, K].
        alpha: 0.1 to 0.4 for ImageNet, 1 for CIFAR-10 in the paper.
        per_example: whether each example draws its own λ; the paper has one a batch.

    Raises:
        CnnlabError: the labels are class numbers, or there are masks or boxes.
    """
    partner, (draw,) = _start("mixup", key, batch, 1)
    share = _coefficients(draw, batch, alpha, per_example)
    return _labelled(_blend(batch, partner, share), batch, partner, share)


def cutmix(key: jax.Array, batch: Batch, *, alpha: Alpha = 1.0, per_example: bool = False) -> Batch:
    """A box of another image in place of this one's (Yun et al. 2019, section 3.1).

    The box has the share 1 - λ of the area, λ from Beta(alpha, alpha), the image's own ratio of
    sides, and a uniform centre; what lies beyond the border is cut off, and the labels are mixed by
    what is left.

    Args:
        key: of the step.
        batch: images [B, H, W, C], labels [B, K].
        alpha: 1 in the paper, which is uniform.
        per_example: whether each example draws its own box; the paper has one a batch.

    Raises:
        CnnlabError: the labels are class numbers, or there are masks or boxes.
    """
    partner, (draw, place) = _start("cutmix", key, batch, 2)
    share = _coefficients(draw, batch, alpha, per_example)
    images, share = _pasted(batch, partner, share, _places(place, batch, per_example))
    return _labelled(images, batch, partner, share)


def mixup_cutmix(
    key: jax.Array,
    batch: Batch,
    *,
    mixup_alpha: Alpha = 0.8,
    cutmix_alpha: Alpha = 1.0,
    switch: Annotated[float, Range(0, 1)] = 0.5,
    per_example: bool = False,
) -> Batch:
    """Either of the two, CutMix with probability `switch` (as timm's `Mixup`, with its defaults).

    Args:
        key: of the step.
        batch: images [B, H, W, C], labels [B, K].
        mixup_alpha: see `mixup`.
        cutmix_alpha: see `cutmix`.
        switch: the probability of CutMix.
        per_example: whether each example draws and chooses by itself, or the batch as a whole.

    Raises:
        CnnlabError: the labels are class numbers, or there are masks or boxes.
    """
    partner, (first, second, place, coin) = _start("mixup_cutmix", key, batch, 4)
    blended = _coefficients(first, batch, mixup_alpha, per_example)
    share = _coefficients(second, batch, cutmix_alpha, per_example)
    pasted, kept = _pasted(batch, partner, share, _places(place, batch, per_example))
    cut = _drawn(coin, batch, per_example, lambda own: jax.random.bernoulli(own, switch))
    images = jnp.where(_over_pixels(cut), pasted, _blend(batch, partner, blended))
    return _labelled(images, batch, partner, jnp.where(cut, kept, blended))


def _start(
    name: str, key: jax.Array, batch: Batch, draws: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The partner's position of each example, [B], and keys."""
    if batch.labels.ndim != 2:
        raise CnnlabError(
            f"{name}: expected labels [B, K] as probabilities, got class numbers "
            f"{batch.labels.shape}; pass jax.nn.one_hot(labels, K)"
        )
    if batch.masks is not None or batch.boxes is not None:
        raise CnnlabError(f"{name} mixes labels of whole images; a batch with masks or boxes can't")
    order, *others = jax.random.split(key, draws + 1)
    return jax.random.permutation(order, len(batch.images)), tuple(others)


def _drawn(
    key: jax.Array, batch: Batch, per_example: bool, draw: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """One draw an example, or one for all; [B, ...]."""
    count = len(batch.images)
    if per_example:
        return jax.vmap(draw)(keys.per_example(key, count))
    one = draw(key)
    return jnp.broadcast_to(one, (count, *one.shape))


def _coefficients(
    key: jax.Array, batch: Batch, alpha: jax.Array | float, per_example: bool
) -> jax.Array:
    return _drawn(key, batch, per_example, lambda own: jax.random.beta(own, alpha, alpha))


def _places(key: jax.Array, batch: Batch, per_example: bool) -> jax.Array:
    """Row and column of the boxes' centres, each 0 to 1; [B, 2]."""
    return _drawn(key, batch, per_example, lambda own: jax.random.uniform(own, (2,)))


def _over_pixels(share: jax.Array) -> jax.Array:
    return share[:, None, None, None]


def _blend(batch: Batch, partner: jax.Array, share: jax.Array) -> jax.Array:
    weight = _over_pixels(share)
    return weight * batch.images + (1 - weight) * batch.images[partner]


def _pasted(
    batch: Batch, partner: jax.Array, share: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The images with a box of their partner's, and the share that is still their own, [B]."""
    _, rows, columns, _ = batch.images.shape
    size = jnp.array([[rows, columns]])
    centre = jnp.floor(places * size).astype(jnp.int32)
    half = jnp.floor(jnp.sqrt(1 - share)[:, None] * size / 2).astype(jnp.int32)
    low, high = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)
    row, column = jnp.arange(rows)[None], jnp.arange(columns)[None]
    inside = ((row >= low[:, :1]) & (row < high[:, :1]))[:, :, None] & (
        (column >= low[:, 1:]) & (column < high[:, 1:])
    )[:, None, :]
    kept = 1 - (high - low).prod(1) / (rows * columns)
    return jnp.where(inside[..., None], batch.images[partner], batch.images), kept


def _labelled(images: jax.Array, batch: Batch, partner: jax.Array, share: jax.Array) -> Batch:
    own = share[:, None]
    labels = own * batch.labels + (1 - own) * batch.labels[partner]
    return dataclasses.replace(batch, images=images, labels=labels)


PLUGINS = {"mixup": mixup, "cutmix": cutmix, "mixup_cutmix": mixup_cutmix}
