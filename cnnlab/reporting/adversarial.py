"""Pictures of an attack: the accuracy that is left against eps, and what was done to the images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cnnlab.reporting import figures
from cnnlab.types import CnnlabError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

RIGHT, WRONG = figures.COLOURS[2], figures.COLOURS[1]
ROWS = 6
"""Examples that the gallery shows at most of each kind."""


class Point(NamedTuple):
    """The accuracy under an attack of one strength.

    Attributes:
        eps: the radius.
        robust: the accuracy, 0 to 1.
        low: lower end of its 95 % confidence interval.
        high: upper end.
    """

    eps: float
    robust: float
    low: float
    high: float


class Shown(NamedTuple):
    """Examples of one kind and what the attack did to them.

    Attributes:
        heading: what they have in common.
        clean: [n, H, W, C] in [0, 1], C 1 or 3.
        attacked: likewise.
        labels: [n], the true classes.
        clean_logits: [n, K], of the images as they are.
        attacked_logits: [n, K], of the attacked images.
    """

    heading: str
    clean: np.ndarray
    attacked: np.ndarray
    labels: np.ndarray
    clean_logits: np.ndarray
    attacked_logits: np.ndarray


def curve(points: Sequence[Point], clean: float, path: Path, *, title: str, norm: str) -> Path:
    """Draws the accuracy under attack against eps, with its confidence intervals as a band.

    The intervals hold for each eps by itself.

    Args:
        points: at least two.
        clean: the accuracy on the same examples as they are, 0 to 1.
        path: where to; `.png`, `.svg` or `.pdf`.
        title: above it.
        norm: of the ball, for the axis: `"linf"`, `"l2"` or `"l1"`.

    Raises:
        CnnlabError: fewer than two points; the ending is none of the three.
    """
    if len(points) < 2:
        raise CnnlabError(f"a curve needs two eps or more, got {len(points)}")
    points = sorted(points)
    eps, robust, low, high = np.array(points).T

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        colour = figures.COLOURS[0]
        axes.axhline(
            100 * clean, color="#666666", linewidth=1.2, linestyle=figures.LINES[1],
            label=f"clean, {100 * clean:.1f} %",
        )  # fmt: skip
        axes.fill_between(
            eps, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0, label="95 % interval"
        )
        axes.plot(
            eps, 100 * robust, color=colour, marker="o", markersize=4.5, linewidth=1.4,
            markeredgecolor="white", markeredgewidth=0.6, label="under attack", clip_on=False,
            zorder=3,
        )  # fmt: skip
        axes.set_ylim(0, 100)
        axes.set_xlim(eps[0], eps[-1])
        axes.set_xlabel(f"eps ({_NORMS[norm]})")
        axes.set_ylabel("Accuracy (%)")
        axes.set_title(title, loc="left", color="#555555")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)

    return figures.save(draw, path, (4.8, 3.5))


def gallery(
    groups: Sequence[Shown], class_names: Sequence[str], path: Path, *, title: str, norm: str
) -> Path:
    """Draws examples: clean, the perturbation magnified, attacked, and what the model makes of it.

    All perturbations are magnified alike; grey stands for no change, and one pixel in a hundred of
    those that changed may lie beyond black and white. Below each image stand the predicted class
    and its probability, in green where it is the true class, in red elsewhere.

    Args:
        groups: side by side; those without examples are left out.
        class_names: one a class.
        path: where to; `.png`, `.svg` or `.pdf`.
        title: above it.
        norm: in which the sizes of the perturbations are told: `"linf"`, `"l2"` or `"l1"`.

    Raises:
        CnnlabError: there are no examples at all; images of neither 1 nor 3 channels; the ending
            is none of the three.
    """
    groups = [Shown(group[0], *(each[:ROWS] for each in group[1:])) for group in groups]
    groups = [group for group in groups if len(group.labels)]
    if not groups:
        raise CnnlabError("there are no examples to show")
    channels = groups[0].clean.shape[-1]
    if channels not in (1, 3):
        raise CnnlabError(f"images of 1 or 3 channels can be drawn, got {channels}")
    changes = np.concatenate([np.abs(g.attacked - g.clean).ravel() for g in groups])
    changes = changes[changes > 0]
    # In L2 and L1 a few pixels change so much that all the others would look grey.
    factor = magnification(float(np.quantile(changes, 0.99)) if len(changes) else 0.0)
    rows = max(len(group.labels) for group in groups)
    lines = textwrap.wrap(f"{title} (perturbation: grey is none)", 54 * len(groups))

    def draw(figure: Figure) -> None:
        parts = figure.subfigures(1, len(groups), squeeze=False, wspace=0.04)[0]
        for part, group in zip(parts, groups, strict=True):
            _draw_group(part, group, class_names, factor, rows, norm)
        figure.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left")

    return figures.save(draw, path, (3.75 * len(groups), 1.42 * rows + 0.62 + 0.16 * len(lines)))


def magnification(largest: float) -> float:
    """The factor by which a perturbation is drawn: the round one that just fills the range.

    Args:
        largest: the largest change of a pixel.

    Returns:
        1, 2 or 5 times a power of ten, at least 1; 1 where nothing changed.
    """
    if largest <= 0:
        return 1.0
    room = 0.5 / largest * (1 + 1e-4)  # float32 puts 0.1 a little above itself
    power = 10.0 ** np.floor(np.log10(room))
    return float(max(1.0, power * max(each for each in (1, 2, 5) if each * power <= room)))


_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
_ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}


def _draw_group(
    part: SubFigure,
    group: Shown,
    class_names: Sequence[str],
    factor: float,
    rows: int,
    norm: str,
) -> None:
    grid = part.subplots(rows, 3, squeeze=False)
    headings = ("clean", f"perturbation × {factor:g}", "attacked")
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=8)
    for axes in grid[len(group.labels) :].ravel():
        axes.set_axis_off()
    for row, clean, attacked, label, before, after in zip(grid, *group[1:], strict=False):
        change = attacked - clean
        _image(row[0], clean)
        _image(row[1], np.clip(0.5 + factor * change, 0, 1))
        _image(row[2], attacked)
        _verdict(row[0], before, label, class_names)
        _verdict(row[2], after, label, class_names)
        size = np.linalg.norm(np.ravel(change).astype(np.float64), _ORDERS[norm])
        row[1].set_xlabel(f"{_NORMS[norm]} {size:.3g}", fontsize=7, color="#444444")
        row[0].set_ylabel(_short(class_names[label]), fontsize=7)
    part.suptitle(group.heading, fontsize=8.5)


def _image(axes: Axes, image: np.ndarray) -> None:
    # Three equal channels show one as grey.
    axes.imshow(
        np.broadcast_to(image, (*image.shape[:2], 3)), vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color="#BBBBBB", linewidth=0.5)


def _verdict(axes: Axes, logits: np.ndarray, label: int, class_names: Sequence[str]) -> None:
    found = int(np.argmax(logits))
    chances = np.exp(logits - logits.max(), dtype=np.float64)
    text = f"{_short(class_names[found])}\n{100 * chances[found] / chances.sum():.0f} %"
    axes.set_xlabel(text, fontsize=7, color=RIGHT if found == label else WRONG, linespacing=1.1)


def _short(name: str) -> str:
    return textwrap.shorten(name, 16, placeholder="…")
