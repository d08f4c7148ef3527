"""Encoded image files into arrays of one size, as quickly as Pillow allows.

An image becomes upright (EXIF), 8-bit RGB or grey, on white where it is transparent, and of the
size that a data set asks for. The first frame counts. 16-bit grey is divided by 257; 16-bit colour
keeps its high byte; CMYK is converted without a colour profile.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from cnnlab.types import CnnlabError

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
"""Endings of the files that are taken for images; the content decides which kind one is."""

OTHER_SUFFIXES = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tif", ".tiff")
"""Endings of images that are not read: naming them is better than training without them."""

FITS = ("crop", "stretch", "pad")
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
_MAY_ORIENT = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})

# The decoder may shrink a JPEG while that leaves this many times the pixels a side that are needed:
# from there on the antialiasing filter hides which of the two did the work.
_DRAFT_GAP = 2


class BadImageError(Exception):
    """An image can't be decoded; the message is the reason, without the file's name."""


@dataclasses.dataclass(frozen=True)
class View:
    """What becomes of an image.

    Attributes:
        size: height and width of the result in pixels.
        fit: `"crop"` resizes so that the shorter side becomes `size` and cuts out the centre;
            `"stretch"` resizes the whole image and ignores its aspect; `"pad"` keeps all of it and
            its aspect and fills the rest with black.
        channels: 3 for RGB, 1 for grey.
        interpolation: `"bilinear"` or `"bicubic"`, antialiased.
    """

    size: int
    fit: str = "crop"
    channels: int = 3
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("fit", FITS),
            ("channels", tuple(_MODES)),
            ("interpolation", tuple(INTERPOLATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise CnnlabError(
                    f"data.{name}: expected {' or '.join(map(str, allowed))}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.size < 1:
            raise CnnlabError(f"data.size: expected at least 1 pixel, got {self.size}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the result."""
        return self.size, self.size, self.channels


def decode(file: BinaryIO, out: np.ndarray, view: View) -> None:
    """Decodes one image into its place in a batch.

    JPEGs of more than twice the pixels that are needed are shrunk by a power of two while they are
    decoded, and grey ones are read from their luminance alone: the results differ from the long way
    by rounding and by a hair of antialiasing.

    Args:
        file: the encoded image, at its beginning, seekable.
        out: [H, W, C] uint8, contiguous, of `view.shape`; overwritten.
        view: size and colours.

    Raises:
        BadImageError: the file is damaged, truncated, empty, of another format, or has more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        image = _opened(file)
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(_MODES[view.channels], _needed(image.size, view))
        image.load()
        # Most files say nothing of an orientation, and parsing what isn't there takes time.
        if not _MAY_ORIENT.isdisjoint(image.info) and image.getexif().get(_ORIENTATION, 1) != 1:
            upright = ImageOps.exif_transpose(image)
        else:
            upright = image
        fitted = _fitted(flattened(upright, _MODES[view.channels]), view)
        out.reshape(-1)[:] = np.frombuffer(fitted.tobytes(), np.uint8)
    except BadImageError:
        raise
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    # The parsers of Pillow let out whatever a damaged file makes them stumble over (SyntaxError,
    # struct.error, KeyError, ...): no list of kinds is complete.
    except Exception as error:
        raise BadImageError(str(error) or type(error).__name__) from error


def flattened(image: Image.Image, mode: str) -> Image.Image:
    """The image in 8 bits without transparency.

    Args:
        image: loaded, of any mode that the supported formats have.
        mode: `"RGB"` or `"L"`.

    Raises:
        ValueError: its pixels are floating-point numbers.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would cut off at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """A JPEG without chroma subsampling.

    Args:
        pixels: [H, W, C] uint8, C 1 or 3.
        quality: of libjpeg, 1 to 100.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def dimensions(file: BinaryIO) -> tuple[int, int]:
    """Width and height as the header says, before any rotation.

    Raises:
        BadImageError: the header can't be read.
    """
    try:
        return _opened(file).size
    except BadImageError:
        raise
    except Exception as error:  # as in `decode`
        raise BadImageError(str(error) or type(error).__name__) from error


def _opened(file: BinaryIO) -> Image.Image:
    """The image with its header read, by content: `Image.open` without its search.

    `Image.open` would also only warn of an image between one and two times the limit.
    """
    head = file.read(12)
    file.seek(0)
    image: Image.Image
    if head.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.JpegImageFile(file)
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        image = PngImagePlugin.PngImageFile(file)
    elif head.startswith(b"RIFF") and head[8:] == b"WEBP":
        image = WebPImagePlugin.WebPImageFile(file)
    elif head.startswith((b"GIF87a", b"GIF89a")):
        image = GifImagePlugin.GifImageFile(file)
    elif head.startswith(b"BM"):
        image = BmpImagePlugin.BmpImageFile(file)
    else:
        what = f"it begins with {head[:8].hex(' ')}" if head else "it is empty"
        raise BadImageError(f"no JPEG, PNG, WebP, GIF or BMP image: {what}")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(image.size) > limit:
        raise BadImageError(
            f"{image.size[0]} x {image.size[1]} pixels, more than Pillow's limit of {limit} (a "
            "small file that unpacks to so much may be an attack)"
        )
    return image


def _needed(size: tuple[int, int], view: View) -> tuple[int, int]:
    """The least width and height that a decoder has to deliver."""
    width, height = size
    least = view.size * _DRAFT_GAP
    if view.fit == "stretch":
        return least, least
    side = max(1, max(size) if view.fit == "pad" else min(size))
    return max(1, math.ceil(width * least / side)), max(1, math.ceil(height * least / side))


def _fitted(image: Image.Image, view: View) -> Image.Image:
    size = view.size
    if image.size == (size, size):
        return image
    width, height = image.size
    resample = INTERPOLATIONS[view.interpolation]
    if view.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = (left, top, left + side, top + side)
        # Only what stays is resized, though pixels beside it count at its edge.
        return image.crop(square) if side == size else image.resize((size, size), resample, square)
    if view.fit == "stretch":
        return image.resize((size, size), resample)
    scale = size / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    padded = Image.new(image.mode, (size, size))
    padded.paste(image.resize(inner, resample), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return padded
