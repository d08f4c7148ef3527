"""What a network sees: feature-map sizes over depth and receptive fields, drawn over an image.

One figure for one network: how the maps shrink and the fields grow from layer to layer, then for
some feature maps the theoretical field of the central unit on a photograph of the embedded data
and, beneath, its effective field, the size of its gradient with respect to every pixel (Luo, Li,
Urtasun & Zemel 2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural
Networks").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnlab import describe
from cnnlab.data import fashion_mini
from cnnlab.describe import Description, Feature
from cnnlab.ops import resize
from cnnlab.registry import did_you_mean
from cnnlab.reporting import figures
from cnnlab.types import CnnlabError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 4
"""Feature maps in a figure, at most."""

_EXAMPLE = 0
"""Position in the embedded test split of the image that fields are drawn on."""

_FIELD = figures.COLOURS[1]

_Box = tuple[tuple[int, int], tuple[int, int]]
"""(first row, the one after the last), and columns likewise."""


def draw(
    module: nn.Module,
    description: Description,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    features: Sequence[str] = (),
    draws: int = 4,
    batch: int = 4,
) -> Path:
    """Draws a network's feature-map sizes and receptive fields.

    Equal arguments give equal files on one machine.

    Args:
        module: the network.
        description: its description, which also says the input's size.
        path: where to; `.png`, `.svg` or `.pdf`.
        title: of the figure.
        features: names of at most `SHOWN` feature maps; the last ones if empty.
        draws: random initialisations that the effective field is averaged over.
        batch: images for each.

    Returns:
        The path.

    Raises:
        CnnlabError: an unknown feature, too many, none that is a map, or another file ending.
    """
    chosen = _choose(description, features)
    names = [feature.name for feature in chosen]
    shape = description.input_shape

    def paint(figure: Figure) -> None:
        effective = describe.effective_fields(module, shape, names, draws=draws, batch=batch)
        image = example_image(shape[:2])
        rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.75), hspace=0.03)
        upper, lower = rows
        sizes, fields = upper.subplots(1, 2, sharex=True)
        _draw_sizes(sizes, description)
        _draw_growth(fields, description)
        for axes in (sizes, fields):
            axes.set_xlabel("Layer")
        panels = lower.subplots(2, len(chosen), squeeze=False)
        for (over_image, over_gradient), feature in zip(panels.T, chosen, strict=True):
            strength = effective[feature.name]
            _draw_theoretical(over_image, image, feature)
            _draw_effective(over_gradient, strength, feature)
        panels[0, 0].set_ylabel("Theoretical")
        panels[1, 0].set_ylabel("Effective")
        name = f"{title}, input" if title else "Input"
        figure.suptitle(f"{name} {'×'.join(map(str, shape))}", x=0.01, ha="left", fontsize=9.5)
        figure.supxlabel(
            "Fields of each map's central unit, dashed where they go beyond the picture. "
            f"Effective: mean size of the gradient over {draws} random\nweights with {batch} "
            "random images each; its extent is the side of a square as large as the area above "
            f"{100 * describe.EFFECTIVE:.2f} % of the peak.",
            x=0.01, ha="left", fontsize=7.5, color="#555555",
        )  # fmt: skip

    return figures.save(paint, path, (max(7.2, 1.95 * len(chosen)), 6.6))


def example_image(size: tuple[int, int]) -> np.ndarray:
    """An embedded test image, dark on white, resized: [H, W] in [0, 1]."""
    pixels = 1 - fashion_mini.load("test").images[_EXAMPLE].astype(np.float32) / 255
    resized = resize.resize(jnp.asarray(pixels), size, method="bicubic")
    return np.clip(np.asarray(resized)[..., 0], 0, 1)


def _choose(description: Description, names: Sequence[str]) -> list[Feature]:
    known = {feature.name: feature for feature in description.features}
    for name in names:
        if name not in known:
            raise CnnlabError(
                f"the network has no feature {name!r}{did_you_mean(name, known)}. "
                f"It has: {', '.join(known) or 'none'}"
            )
    if len(names) > SHOWN:
        raise CnnlabError(f"a figure holds at most {SHOWN} features, got {len(names)}: {names}")
    maps = [f for f in description.features if len(f.output_shape) == 3]
    chosen = [known[name] for name in names] or maps[-SHOWN:]
    if not chosen or any(len(feature.output_shape) != 3 for feature in chosen):
        raise CnnlabError(
            "receptive fields are drawn of feature maps [h, w, c]; the network has "
            f"{', '.join(f.name for f in maps) or 'none'} among its named features"
        )
    return chosen


def _draw_sizes(axes: Axes, description: Description) -> None:
    # Gates and heads of one pixel are no part of how the maps shrink.
    maps = [
        (i, row)
        for i, row in enumerate(description.rows, 1)
        if len(row.output_shape) == 3 and max(row.output_shape[:2]) > 1
    ]
    at = [i for i, _ in maps]
    axes.plot(
        at, [max(row.output_shape[:2]) for _, row in maps], drawstyle="steps-mid",
        color=figures.COLOURS[0], linewidth=1.4, label="Side (pixels)",
    )  # fmt: skip
    axes.plot(
        at, [row.output_shape[2] for _, row in maps], linestyle="none", marker="s",
        markersize=2.4, color=figures.COLOURS[2], label="Channels",
    )  # fmt: skip
    _powers_of_two(axes)
    axes.set_title("Feature maps", loc="left")
    axes.legend(
        fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0,
        handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip


def _draw_growth(axes: Axes, description: Description) -> None:
    local: list[tuple[int, int]] = []
    whole: list[tuple[int, int]] = []
    for i, row in enumerate(description.rows, 1):
        known = [field for field in row.receptive_field if field is not None]
        if known:
            field = max(known, key=lambda f: f.size)
            (local if field.stride else whole).append((i, field.size))
    for points, label, face in ((local, "A layer's output", _FIELD), (whole, "Global", "white")):
        if points:
            axes.plot(
                *zip(*points, strict=True), linestyle="none", marker="o", markersize=3.2,
                color=_FIELD, markerfacecolor=face, markeredgewidth=0.7, label=label,
            )  # fmt: skip
    side = max(description.input_shape[:2])
    axes.axhline(
        side, color="#555555", linestyle=(0, (5, 2)), linewidth=1, label="Size of the image"
    )
    _powers_of_two(axes)
    axes.set_title("Theoretical receptive field (pixels)", loc="left")
    axes.legend(fontsize=8, loc="best", handlelength=2.2)


def _powers_of_two(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_theoretical(axes: Axes, image: np.ndarray, feature: Feature) -> None:
    box = _box(feature)
    shown: Any = np.repeat(image[..., None], 3, -1)
    if box is not None:
        (top, bottom), (left, right) = ((max(first, 0), max(end, 0)) for first, end in box)
        inside = np.zeros(image.shape, bool)
        inside[top:bottom, left:right] = True
        shown = np.where(inside[..., None], shown, 0.66 + 0.17 * shown)
    axes.imshow(shown, vmin=0, vmax=1, interpolation="nearest")
    _frame(axes, image.shape, box)
    size, stride = describe.field_words(feature.receptive_field)
    words = f"field {size}" + (f", stride {stride}" if stride and size != "?" else "")
    height, width = feature.output_shape[:2]
    axes.set_title(f"{feature.name}, {height}×{width}\n{words}", fontsize=8.5)


def _draw_effective(axes: Axes, strength: np.ndarray, feature: Feature) -> None:
    from matplotlib.colors import PowerNorm

    # A square root shows the tail that would be white beside the peak.
    axes.imshow(strength, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    _frame(axes, strength.shape, _box(feature))
    axes.set_title(f"about {describe.effective_size(strength):.0f} pixels", fontsize=8.5)


def _box(feature: Feature) -> _Box | None:
    """What the central unit sees; None where that is not known."""
    fields = [
        field.of(size // 2)
        for field, size in zip(feature.receptive_field, feature.output_shape[:2], strict=True)
        if field is not None
    ]
    return (fields[0], fields[1]) if len(fields) == 2 else None


def _frame(axes: Axes, image: tuple[int, ...], box: _Box | None) -> None:
    """The image's edge, the field's, and limits that hold both up to a whole image beyond it."""
    from matplotlib.patches import Rectangle

    side = max(image[:2])
    (top, bottom), (left, right) = box or ((0, image[0]), (0, image[1]))
    first = max(min(top, left, 0), -side)
    end = min(max(bottom, right, side), 2 * side)
    # Pixel i is drawn from i - 0.5 to i + 0.5.
    frame = Rectangle((-0.5, -0.5), image[1], image[0], fill=False, edgecolor="#888888", lw=0.6)
    axes.add_patch(frame)
    if box is not None:
        (y, y_end), (x, x_end) = ((max(low, first), min(high, end)) for low, high in box)
        whole = ((y, y_end), (x, x_end)) == box
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                x_end - x,
                y_end - y,
                fill=False,
                edgecolor=_FIELD,
                linewidth=1.4,
                linestyle="-" if whole else (0, (3, 1.5)),
            )
        )
    margin = 0.03 * (end - first)
    axes.set_xlim(first - 0.5 - margin, end - 0.5 + margin)
    axes.set_ylim(end - 0.5 + margin, first - 0.5 - margin)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
