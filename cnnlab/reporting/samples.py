"""A sheet of what training sees: each row one image, as it is and after its transforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnnlab.reporting import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 1.15  # inches an image


def caption(probabilities: np.ndarray, class_names: Sequence[str]) -> str:
    """`"Bag"`, or of a mixture its two greatest shares: `"Bag 0.70 + Coat 0.30"`.

    Args:
        probabilities: [K], summing to 1.
        class_names: K names.
    """
    first, second = np.argsort(-probabilities, kind="stable")[:2]
    if probabilities[second] < 0.005:
        return class_names[first]
    return " + ".join(f"{class_names[i]} {probabilities[i]:.2f}" for i in (first, second))


def sheet(
    columns: np.ndarray,
    captions: Sequence[Sequence[str]],
    headings: Sequence[str],
    title: str,
    path: Path,
) -> Path:
    """Writes the sheet, atomically; the path's ending chooses the format.

    Args:
        columns: [m, n, H, W, C] in [0, 1], C 1 or 3: n images, as they are and as m - 1 epochs
            show them.
        captions: m times n texts, below the images.
        headings: m texts, above the columns.
        title: above all.
        path: where to write.

    Raises:
        CnnlabError: the ending is none of .png, .svg and .pdf.
    """

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(columns[0]), len(columns), squeeze=False)
        for x, (images, texts, heading) in enumerate(zip(columns, captions, headings, strict=True)):
            for y, (image, text) in enumerate(zip(images, texts, strict=True)):
                axes = grid[y, x]
                # Three equal channels show one as grey.
                axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel(text.replace(" + ", "\n+ "), fontsize=6)
                if y == 0:
                    axes.set_title(heading, fontsize=8)
        figure.suptitle(title, fontsize=8)

    size = (SIDE * len(columns) + 0.2, 1.25 * SIDE * len(columns[0]) + 0.6)
    return figures.save(draw, path, size)
