"""The fifteen corruptions of Hendrycks & Dietterich 2019: their operations and constants.

An operation takes planes [N, C, H, W] float64 in [0, 1], one generator an image, and the constants
of a severity; it gives planes of the same shape, which the caller clips and truncates to uint8.
Everything is NumPy and SciPy in float64 on the host: the result is data, the same on every machine
whatever accelerator trains beside it, and no severity, shape or chunk waits for a compilation.
What is sequential in the original is vectorised over pixels or images. No matrix product: its
threads cost many times what they bring where other processes compute.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import fft, ndimage

Planes = np.ndarray
Draws = Iterator[np.random.Generator]

_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601, which OpenCV and Pillow have
_TEXTURE_SIDE = 512


def draws(label: str, positions: Iterable[int]) -> Draws:
    """A generator for each position, whose stream depends on the label and the position only.

    It is one object, set anew (a generator each takes five times as long to make): use it up
    before taking the next.
    """
    key = np.frombuffer(hashlib.blake2b(label.encode(), digest_size=16).digest(), "<u8")
    bits = np.random.Philox(key=key.astype(np.uint64))
    start = bits.state
    generator = np.random.Generator(bits)
    for position in positions:
        # The counter's low words count up within an image and never reach the highest.
        start["state"]["counter"] = np.array([0, 0, 0, position], np.uint64)
        bits.state = start
        yield generator


# Noise


def gaussian_noise(planes: Planes, each: Draws, std: float) -> Planes:
    """Normal noise on every channel."""
    return planes + std * np.stack([g.standard_normal(planes.shape[1:]) for g in each])


def shot_noise(planes: Planes, each: Draws, photons: float) -> Planes:
    """Poisson noise: white is `photons` on average."""
    counts = [g.poisson(p) for g, p in zip(each, planes * photons, strict=True)]
    return np.stack(counts) / photons


def impulse_noise(planes: Planes, each: Draws, amount: float) -> Planes:
    """Salt and pepper, equally likely, on this share of the values of every channel."""
    u = np.stack([g.random(planes.shape[1:]) for g in each])
    return np.where(u < amount / 2, 0.0, np.where(u < amount, 1.0, planes))


# Blur


def defocus_blur(planes: Planes, each: Draws, radius: float, alias: float) -> Planes:
    """Convolution with a disk whose rim is softened by a Gaussian of std `alias`."""
    reach, soften = (8, 1) if radius <= 8 else (int(radius), 2)
    taps = np.exp(-(np.arange(-soften, soften + 1) ** 2) / (2 * alias**2))
    span = np.arange(-reach, reach + 1)
    kernel = (span[:, None] ** 2 + span**2 <= radius**2).astype(float)
    kernel /= (
        kernel.sum()
    )  # not again after softening, which adds 1 % where the disk fills its grid
    for axis in (0, 1):
        kernel = ndimage.convolve1d(kernel, taps / taps.sum(), axis=axis, mode="mirror")
    used = int(np.abs(span[kernel.max(0) > 0]).max())
    kernel = kernel[reach - used : reach + used + 1, reach - used : reach + used + 1]
    padded = np.pad(planes, ((0, 0), (0, 0), (used, used), (used, used)), mode="reflect")
    sizes = [fft.next_fast_len(size, real=True) for size in padded.shape[2:]]
    product = fft.rfft2(padded, sizes) * fft.rfft2(kernel, sizes)
    height, width = planes.shape[2:]
    blurred = fft.irfft2(product, sizes)
    return blurred[..., 2 * used : 2 * used + height, 2 * used : 2 * used + width]


def glass_blur(planes: Planes, each: Draws, std: float, reach: int, rounds: int) -> Planes:
    """Gaussian blur, pixels replaced by near ones, Gaussian blur.

    The original goes through the pixels from the last to the first and means to swap each with one
    at most `reach` away. Its swap of two NumPy views copies the near pixel and loses the other, and
    so the published sets were made; so it is done here. A copy of a pixel already replaced is a
    copy of what replaced it: following these references for all pixels at once, doubling the way
    at each turn, gives what the sequential pass gives.
    """
    count, channels, height, width = planes.shape
    area = height * width
    blurred = np.floor(_gaussian(planes, std) * 255 + 1e-6) / 255
    rows, columns = (
        np.arange(reach + 1, height - reach + 1),
        np.arange(reach + 1, width - reach + 1),
    )
    place = (rows[:, None] * width + columns).astype(np.int32)
    replaced = np.zeros(area, bool)
    replaced[place] = True
    shape = (rounds, 2, *place.shape)
    moves = np.stack([g.integers(-reach, reach, shape, dtype=np.int32) for g in each])
    source = np.tile(np.arange(area, dtype=np.int32), (count, 1))
    for turn in range(rounds):
        near = place + moves[:, turn, 0] * width + moves[:, turn, 1]
        # Per image, `area` nodes for the pixels before the pass and as many for those after it.
        before = np.tile(np.arange(area, dtype=np.int32), (count, 2))
        before[:, area + place] = np.where((near > place) & replaced[near], area + near, near)
        pointer = before + 2 * area * np.arange(count, dtype=np.int32)[:, None]
        pointer = pointer.reshape(-1)
        while not np.array_equal(further := pointer[pointer], pointer):
            pointer = further
        after = pointer.reshape(count, 2 * area)[:, area:] % (2 * area)
        source = np.take_along_axis(source, after, 1)
    moved = np.take_along_axis(blurred.reshape(count, channels, area), source[:, None], 2)
    return _gaussian(moved.reshape(planes.shape), std)


def motion_blur(planes: Planes, each: Draws, radius: int, std: float) -> Planes:
    """A one-sided Gaussian along a line at up to 45 degrees from the horizontal."""
    angles = [g.uniform(-45, 45) for g in each]
    return np.round(_streaked(planes, angles, radius, std) * 255) / 255  # as ImageMagick does


def zoom_blur(planes: Planes, each: Draws, stop: float, step: float) -> Planes:
    """The mean of the image and its enlargements by 1, 1 + step, ... below `stop`."""
    factors = np.arange(1, stop, step)
    total = planes.copy()
    for factor in factors:
        total += _zoom(planes, float(factor))
    return total / (len(factors) + 1)


# Weather


def snow(
    planes: Planes,
    each: Draws,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: int,
    blur: float,
    kept: float,
) -> Planes:
    """Streaks of thresholded noise, falling both ways, over a whitened image."""
    shape = (1, *planes.shape[2:])
    fields, angles = [], []
    for g in each:
        fields.append(mean + std * g.standard_normal(shape))
        angles.append(g.uniform(-135, -45))
    flakes = _zoom(np.stack(fields), zoom)
    flakes = np.where(flakes < threshold, 0.0, np.floor(np.clip(flakes, 0, 1) * 255) / 255)
    flakes = np.round(_streaked(flakes, angles, radius, blur) * 255) / 255
    white = np.maximum(planes, _grey(planes) * 1.5 + 0.5)
    return kept * planes + (1 - kept) * white + flakes + flakes[:, :, ::-1, ::-1]


def frost(planes: Planes, each: Draws, kept: float, added: float, stride: int) -> Planes:
    """The image plus a crop of a frost texture, of which every `stride`-th pixel is taken.

    The original adds photographs; see `frost_texture`.
    """
    height, width = planes.shape[2:]
    crops = []
    for g in each:
        texture = frost_texture(int(g.integers(len(_FROST))))[:, ::stride, ::stride]
        side = texture.shape[-1]
        rows, columns = (
            _fold(g.integers(max(1, side - size)) + np.arange(size), side, "symmetric")
            for size in (height, width)
        )
        crops.append(texture[:, rows[:, None], columns])
    textures = np.stack(crops)
    return kept * planes + added * (_grey(textures) if planes.shape[1] == 1 else textures)


def fog(planes: Planes, each: Draws, amount: float, decay: float) -> Planes:
    """A plasma fractal added, and the image's brightest value kept."""
    height, width = planes.shape[2:]
    side = max(2, 1 << (max(height, width) - 1).bit_length())
    uniform = np.stack([g.uniform(-1, 1, side * side - 1) for g in each])
    cloud = plasma(uniform, side, decay)[:, None, :height, :width]
    brightest = planes.max((1, 2, 3), keepdims=True)
    return (planes + amount * cloud) * brightest / (brightest + amount)


def brightness(planes: Planes, each: Draws, amount: float) -> Planes:
    """The value of HSV raised; hue and saturation stay, so the channels keep their ratios."""
    value = planes.max(1, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, planes * (raised / np.where(value > 0, value, 1)), raised)


# Digital


def contrast(planes: Planes, each: Draws, factor: float) -> Planes:
    """Every channel drawn towards its mean over the image."""
    mean = planes.mean((2, 3), keepdims=True)
    return (planes - mean) * factor + mean


def elastic_transform(
    planes: Planes, each: Draws, amount: float, smooth: float, shift: float
) -> Planes:
    """A random affine map, then a smooth random displacement; all in units of the side."""
    height, width = planes.shape[2:]
    corners, fields = [], []
    for g in each:
        corners.append(g.uniform(-shift, shift, (3, 2)))
        fields.append(g.uniform(-1, 1, (2, height, width)))
    sides = np.array([height, width])
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    # Three corners of a square and where they go, (row, column).
    reach = max(1, min(height, width) // 3)
    square = sides // 2 + reach * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = square + np.stack(corners) * sides
    back = np.linalg.solve(np.concatenate([moved, np.ones((len(moved), 3, 1))], 2), square[None])
    back = back[:, :, None, None]
    grid = row[..., None] * back[:, 0] + column[..., None] * back[:, 1] + back[:, 2]
    planes = _sample(planes, grid[..., 0], grid[..., 1], "mirror")
    if amount == 0:
        return planes
    # One width for both axes, from the shorter side: the original has square images only.
    moves = _smoothed(np.stack(fields), smooth * min(height, width)) * amount
    down, right = moves[:, 0] * height, moves[:, 1] * width
    return _sample(planes, row + down, column + right, "symmetric")


def pixelate(planes: Planes, each: Draws, factor: float) -> Planes:
    """Shrunk and enlarged again, with Pillow's box filter."""
    height, width = planes.shape[2:]
    small = max(1, int(width * factor)), max(1, int(height * factor))
    box = Image.Resampling.BOX
    return _by_pillow(planes, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(planes: Planes, each: Draws, quality: int) -> Planes:
    """Saved and read by Pillow; a grey image as such, whose luminance is coded alike."""

    def recoded(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file, formats=("JPEG",))

    return _by_pillow(planes, recoded)


# What they are made of


def _grey(planes: Planes) -> Planes:
    if planes.shape[1] == 1:
        return planes
    return np.einsum("nchw,c->nhw", planes, _LUMA)[:, None]


def _by_pillow(planes: Planes, change: Callable[[Image.Image], Image.Image]) -> Planes:
    images = np.moveaxis(np.round(planes * 255).astype(np.uint8), 1, -1)
    grey = images.shape[-1] == 1
    results = [np.asarray(change(Image.fromarray(i[..., 0] if grey else i))) for i in images]
    return np.moveaxis(np.stack(results).reshape(images.shape), -1, 1) / 255


def _gaussian(planes: Planes, std: float) -> Planes:
    return ndimage.gaussian_filter(planes, (0, 0, std, std), mode="nearest", truncate=4.0)


def _smoothed(fields: np.ndarray, std: float) -> np.ndarray:
    """`gaussian_filter(fields, std, mode="reflect", truncate=3)` over the last two axes.

    Under symmetric extension such a filter is a product of cosine transforms, which costs the same
    where it is wider than the image, as ImageNet-C's is.
    """
    taps = np.arange(int(3 * std + 0.5) + 1)
    weights = np.exp(-(taps**2) / (2 * std**2)) * np.where(taps == 0, 1, 2)
    weights /= weights.sum()
    spectrum = fft.dctn(fields, axes=(-2, -1))
    for axis in (-2, -1):
        size = fields.shape[axis]
        response = np.cos(np.pi / size * np.outer(np.arange(size), taps)) @ weights
        spectrum *= response[:, None] if axis == -2 else response
    return fft.idctn(spectrum, axes=(-2, -1))


def _zoom(planes: Planes, factor: float) -> Planes:
    """The centre enlarged to the whole: `scipy.ndimage.zoom` (linear), the excess cut off."""
    for axis in (2, 3):
        size = planes.shape[axis]
        crop = math.ceil(size / factor)
        grown = max(round(crop * factor), size)
        place = np.arange(size) + (grown - size) // 2
        place = np.minimum(place * ((crop - 1) / max(grown - 1, 1)), crop - 1)
        below = place.astype(int)
        share = (place - below)[:, None] if axis == 2 else place - below
        first = (size - crop) // 2
        lower = np.take(planes, first + below, axis)
        upper = np.take(planes, first + np.minimum(below + 1, crop - 1), axis)
        planes = lower + share * (upper - lower)
    return planes


def _streaked(planes: Planes, degrees: Iterable[float], radius: int, std: float) -> Planes:
    """ImageMagick's motion blur: a Gaussian on one side only, of pixels nearest to a line."""
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * std**2))
    weights /= weights.sum()
    taps = taps[weights > 1e-9]  # the rest moves no value by a level
    reach, (height, width) = len(taps), planes.shape[2:]
    padded = np.pad(planes, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    # [N, C, row, column, H, W]: a view, of which a tap takes one window an image.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    image, angle = np.arange(len(planes)), np.deg2rad(list(degrees))
    result = np.zeros_like(planes)
    for tap, weight in zip(taps, weights, strict=False):
        row = reach + np.ceil(tap * np.sin(angle) - 0.5).astype(int)
        column = reach + np.ceil(tap * np.cos(angle) - 0.5).astype(int)
        result += weight * windows[image, :, row, column]
    return result


def _fold(index: np.ndarray, size: int, mode: Literal["mirror", "symmetric"]) -> np.ndarray:
    """Indices beyond the border folded back, about the border pixel's centre or its edge."""
    if mode == "mirror":
        period = max(1, 2 * size - 2)
        index = np.abs(index) % period
        return np.minimum(index, period - index) if size > 1 else np.zeros_like(index)
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def _sample(
    planes: Planes, rows: np.ndarray, columns: np.ndarray, mode: Literal["mirror", "symmetric"]
) -> Planes:
    """Bilinear reading at coordinates [N, H, W]."""
    count, channels, height, width = planes.shape
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    flat = planes.reshape(count, channels, height * width)

    rows_read = [_fold(top + i, height, mode) * width for i in (0, 1)]
    columns_read = [_fold(left + i, width, mode) for i in (0, 1)]

    def read(row: int, column: int) -> np.ndarray:
        place = (rows_read[row] + columns_read[column]).reshape(count, 1, -1)
        return np.take_along_axis(flat, place, 2).reshape(planes.shape)

    upper = (1 - right) * read(0, 0) + right * read(0, 1)
    lower = (1 - right) * read(1, 0) + right * read(1, 1)
    return (1 - down) * upper + down * lower


def plasma(uniform: np.ndarray, side: int, decay: float) -> np.ndarray:
    """The diamond-square fractal on a torus, from 0 to 1 in each image; [N, side, side].

    Fournier, Fussell & Carpenter 1982, "Computer rendering of stochastic models". The noise of a
    level has `decay` squared times the amplitude of the next, as in the original.

    Args:
        uniform: [N, side**2 - 1] draws in [-1, 1).
        side: a power of two, at least 2.
        decay: more is smoother.
    """
    count = len(uniform)
    grid = np.zeros((count, side, side))
    step, amplitude, used = side, 1.0, 0
    while step >= 2:
        half, cells = step // 2, side // step
        level = uniform[:, used : used + 3 * cells**2].reshape(count, 3, cells, cells) * amplitude
        corners = grid[:, ::step, ::step]
        edges = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 2)
        centres = (edges[0] + np.roll(edges[0], -1, 2)) / 4 + level[:, 0]
        grid[:, half::step, half::step] = centres
        grid[:, ::step, half::step] = (edges[1] + centres + np.roll(centres, 1, 1)) / 4 + level[
            :, 1
        ]
        grid[:, half::step, ::step] = (edges[0] + centres + np.roll(centres, 1, 2)) / 4 + level[
            :, 2
        ]
        step, amplitude, used = half, amplitude / decay**2, used + 3 * cells**2
    grid -= grid.min((1, 2), keepdims=True)
    return grid / grid.max((1, 2), keepdims=True)


# Mean colour and standard deviation, in levels, of the five photographs that the original draws
# from (the second and the third are the same).
_FROST = (
    ((78, 149, 166), 18),
    ((201, 205, 214), 22),
    ((201, 205, 214), 22),
    ((138, 153, 165), 29),
    ((112, 123, 135), 43),
)


@functools.cache
def frost_texture(number: int) -> np.ndarray:
    """A synthetic picture of frost; [3, 512, 512] float64 in [0, 1], always the same.

    Ice crystals (cells around random seeds, with needles that radiate from the seed) of three
    sizes, and clouds of 1/f noise. Mean colour and standard deviation are those of the photograph
    in its place.
    """
    side = _TEXTURE_SIDE
    rng = next(draws("frost texture", [number]))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency
    clouds = _standardised(np.fft.irfft2(spectrum, (side, side)))
    total = 0.6 * clouds
    for crystals, weight in ((30, 0.6), (150, 0.6), (700, 0.45)):
        total = total + weight * _standardised(_crystals(rng, side, crystals, clouds))
    (red, green, blue), std = _FROST[number]
    mean = np.array([red, green, blue])[:, None, None]
    texture = np.clip(mean + std * _standardised(total), 0, 255) / 255
    texture.setflags(write=False)
    return texture


def _crystals(rng: np.random.Generator, side: int, count: int, clouds: np.ndarray) -> np.ndarray:
    seeds = rng.integers(side, size=(2, count))
    number = np.zeros((side, side), int)
    number[seeds[0], seeds[1]] = np.arange(count)
    free = np.ones((side, side), bool)
    free[seeds[0], seeds[1]] = False
    distance, (rows, columns) = ndimage.distance_transform_edt(free, return_indices=True)
    cell = number[rows, columns]
    angle = np.arctan2(np.arange(side)[:, None] - rows, np.arange(side) - columns)
    needles = 40
    table = rng.standard_normal((count, needles))
    # The clouds bend the needles a little.
    place = (angle / (2 * np.pi) * needles + 0.4 * clouds) % needles
    first = place.astype(int) % needles
    share = place - np.floor(place)
    ray = (1 - share) * table[cell, first] + share * table[cell, (first + 1) % needles]
    size = side / math.sqrt(count)
    return np.abs(ray) * np.exp(-distance / size) + 0.4 * rng.standard_normal(count)[cell]


def _standardised(field: np.ndarray) -> np.ndarray:
    return (field - field.mean()) / field.std()


class Corruption(NamedTuple):
    """One of the fifteen: its group, its operation and five severities' constants, twice."""

    group: str
    apply: Callable[..., Planes]
    small: tuple[tuple[float, ...], ...]
    large: tuple[tuple[float, ...], ...]


def _each(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


# The side that the authors multiply ImageNet-C's elastic constants with is 244, at 224 pixels.
_SLIP = 244 / 224

# The constants with which CIFAR-10-C (small) and ImageNet-C (large) were made: facts from
# https://github.com/hendrycks/robustness, ImageNet-C/create_c. Those of `frost` end with the stride
# at which its pictures are read; those of `elastic_transform` are in units of the image's side.
TABLE: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        "noise",
        gaussian_noise,
        _each(0.04, 0.06, 0.08, 0.09, 0.10),
        _each(0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": Corruption(
        "noise", shot_noise, _each(500, 250, 100, 75, 50), _each(60, 25, 12, 5, 3)
    ),
    "impulse_noise": Corruption(
        "noise",
        impulse_noise,
        _each(0.01, 0.02, 0.03, 0.05, 0.07),
        _each(0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": Corruption(
        "blur",
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        "blur",
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        "blur",
        motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        "blur",
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        "weather",
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        "weather",
        frost,
        ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    ),
    "fog": Corruption(
        "weather",
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(
        "weather", brightness, _each(0.05, 0.1, 0.15, 0.2, 0.3), _each(0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    "contrast": Corruption(
        "digital", contrast, _each(0.75, 0.5, 0.4, 0.3, 0.15), _each(0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    "elastic_transform": Corruption(
        "digital",
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        (
            (2 * _SLIP, 0.7 * _SLIP, 0.1 * _SLIP),
            (2 * _SLIP, 0.08 * _SLIP, 0.2 * _SLIP),
            (0.05 * _SLIP, 0.01 * _SLIP, 0.02 * _SLIP),
            (0.07 * _SLIP, 0.01 * _SLIP, 0.02 * _SLIP),
            (0.12 * _SLIP, 0.01 * _SLIP, 0.02 * _SLIP),
        ),
    ),
    "pixelate": Corruption(
        "digital", pixelate, _each(0.95, 0.9, 0.85, 0.75, 0.65), _each(0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    "jpeg_compression": Corruption(
        "digital", jpeg_compression, _each(80, 65, 58, 50, 40), _each(25, 18, 15, 10, 7)
    ),
}
