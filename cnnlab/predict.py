"""What a network sees in a photograph: image files in, the likeliest classes out.

Files of any size, orientation and colour mode that Pillow reads become the pixels that the
network's published weights were trained on: upright, RGB, the central square, resized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from PIL import Image, ImageOps

from cnnlab.data import _imagenet
from cnnlab.data._decoding import flattened
from cnnlab.types import CnnlabError

if TYPE_CHECKING:
    from rich.table import Table

BATCH = 32
"""Images that go through the network together."""

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One of the likeliest classes.

    Attributes:
        index: the class's number.
        name: what it is called.
        probability: in [0, 1].
    """

    index: int
    name: str
    probability: float


def read_image(
    path: str | Path,
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    crop: float = 1.0,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Reads an image file as a network takes it.

    The image is turned upright as its EXIF orientation says, laid on white where it is transparent,
    converted to RGB (or grey), cut to its central square and resized.

    Args:
        path: of a file that Pillow reads; of an animation the first frame.
        size: height and width of the result in pixels, or one number for both.
        channels: 3 for RGB, 1 for grey.
        crop: share of the shorter side that the square covers, in (0, 1].
        interpolation: `"bicubic"` or `"bilinear"`, antialiased.

    Returns:
        [height, width, channels] float32 in [0, 1].

    Raises:
        CnnlabError: the file can't be read or is no image, or an argument is out of range.
    """
    if not 0 < crop <= 1:
        raise CnnlabError(f"crop must be a share in (0, 1] of the shorter side, got {crop}")
    if channels not in (1, 3):
        raise CnnlabError(f"images have 1 or 3 channels, but the network takes {channels}")
    try:
        with Image.open(path) as opened:
            image = flattened(ImageOps.exif_transpose(opened), "RGB" if channels == 3 else "L")
    # A file that is damaged within: Pillow's decoders raise each of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CnnlabError(f"cannot read the image {path}: {error}") from error
    side = max(1, round(crop * min(image.size)))
    left, top = ((length - side) // 2 for length in image.size)
    height, width = (size, size) if isinstance(size, int) else size
    square = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(square.resize((width, height), _FILTERS[interpolation]), np.float32) / 255
    return pixels.reshape(height, width, channels)


def logits(classify: Callable[[np.ndarray], jax.Array], images: Iterable[np.ndarray]) -> np.ndarray:
    """Runs a network over images, some at a time.

    Args:
        classify: images [B, H, W, C] in [0, 1] to logits [B, K]; it is called with one B only.
        images: [H, W, C] in [0, 1], all of one shape.

    Returns:
        [N, K] float32.
    """
    stacked = np.stack(list(images))
    size = min(BATCH, len(stacked))
    found = []
    for start in range(0, len(stacked), size):
        batch = stacked[start : start + size]
        padding = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
        made = np.asarray(classify(np.concatenate([batch, padding])))
        found.append(made[: len(batch)])
    return np.concatenate(found)


def top(scores: np.ndarray, names: Sequence[str], count: int = 5) -> list[Ranked]:
    """The likeliest classes of one image, the likeliest first.

    Args:
        scores: logits [K].
        names: of the K classes.
        count: how many; all K if there are fewer.
    """
    shifted = np.exp(scores.astype(np.float64) - scores.max())
    probabilities = shifted / shifted.sum()
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [Ranked(int(i), names[i], float(probabilities[i])) for i in order]


def class_names(num_outputs: int, file: str | Path | None = None) -> tuple[str, ...]:
    """The names of a network's classes.

    Args:
        num_outputs: the number of its classes.
        file: a text file, one name a line; None for ImageNet's thousand.

    Raises:
        CnnlabError: the file can't be read, or has another number of names.
    """
    if file is None:
        names = _imagenet.class_names()
        if num_outputs != len(names):
            raise CnnlabError(
                f"the network has {num_outputs} classes, and ImageNet's are {len(names)}: give "
                "their names, a text file with one a line (--classes FILE)"
            )
        return names
    try:
        names = tuple(Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise CnnlabError(f"cannot read the names of classes {file}: {error}") from error
    if num_outputs != len(names):
        raise CnnlabError(
            f"the network has {num_outputs} classes, but {file} has {len(names)} lines"
        )
    return names


def render(path: str, ranked: Sequence[Ranked]) -> Table:
    """One image's classes as a table for the terminal."""
    from rich.table import Table

    table = Table("class", title=path, title_justify="left")
    table.add_column("number", justify="right")
    table.add_column("probability", justify="right")
    for entry in ranked:
        table.add_row(entry.name, str(entry.index), f"{100 * entry.probability:.2f} %")
    return table
