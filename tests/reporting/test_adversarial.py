"""Pictures of attacks."""

import numpy as np
import pytest
from PIL import Image

from cnnlab.reporting import adversarial
from cnnlab.types import CnnlabError

NAMES = ("Bag", "Coat")


@pytest.mark.parametrize(
    ("largest", "factor"),
    [(0, 1), (0.1, 5), (np.float32(0.1), 5), (0.05, 10), (8 / 255, 10), (0.001, 500), (1, 1)],
)
def test_the_magnification_is_round_and_fills_the_range(largest, factor):
    assert adversarial.magnification(largest) == factor


def shown(change, size=8, channels=1, count=2):
    clean = np.full((count, size, size, channels), 64.2 / 255, np.float32)
    labels = np.zeros(count, int)
    right = np.tile([5.0, 0.0], (count, 1))
    return adversarial.Shown("fooled: 2 of 9", clean, clean + change, labels, right, -right)


def colours(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, c)): int(n) for c, n in zip(found, counts, strict=True)}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gallery_shows_clean_magnified_and_attacked(channels, tmp_path):
    group = shown(0.1, channels=channels)
    path = adversarial.gallery([group], NAMES, tmp_path / "g.png", title="t", norm="linf")
    found = colours(path)
    # 0.5 + 5 * 0.1 is white: but for the two greys, of one area, nothing covers as much.
    first, second = sorted((n, c) for c, n in found.items() if min(c) < 255)[-2:]
    assert {first[1], second[1]} == {(64,) * 3, (89,) * 3}
    assert first[0] == pytest.approx(second[0], rel=0.02)
    third = sorted(n for c, n in found.items() if min(c) < 255)[-3]
    assert first[0] > max(10_000, 4 * third)
    again = adversarial.gallery([group], NAMES, tmp_path / "h.png", title="t", norm="linf")
    assert again.read_bytes() == path.read_bytes()


def test_predictions_stand_below_with_their_probability(tmp_path):
    path = adversarial.gallery([shown(0.1)], NAMES, tmp_path / "g.svg", title="t", norm="l2")
    texts = path.read_text()
    chance = f"{100 / (1 + np.exp(-5)):.0f} %"
    # Matplotlib writes each text into a comment beside its outlines.
    for text in ("perturbation × 5", "Bag", "Coat", "L2 0.8", "fooled: 2 of 9", chance):
        assert text in texts, text
    assert adversarial.RIGHT.lower() in texts
    assert adversarial.WRONG.lower() in texts


def test_what_cannot_be_drawn_is_explained(tmp_path):
    given = {"class_names": NAMES, "path": tmp_path / "g.png", "title": "t", "norm": "linf"}
    with pytest.raises(CnnlabError, match="no examples"):
        adversarial.gallery([shown(0.1, count=0)], **given)
    with pytest.raises(CnnlabError, match="1 or 3 channels"):
        adversarial.gallery([shown(0.1, channels=2)], **given)
    with pytest.raises(CnnlabError, match="two eps or more"):
        adversarial.curve(
            [adversarial.Point(0, 1, 1, 1)], 1.0, tmp_path / "c.png", title="t", norm="linf"
        )


def test_the_curve_falls_where_its_numbers_do(tmp_path):
    points = [adversarial.Point(0.2, 0.0, 0, 0), adversarial.Point(0.0, 1.0, 1, 1)]
    path = adversarial.curve(points, 1.0, tmp_path / "c.png", title="t", norm="linf")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The line's blue, without markers and legend: from top left to bottom right.
    y, x = np.nonzero(np.abs(pixels - (0, 114, 178)).sum(-1) < 12)
    inside = y < 0.8 * len(pixels)
    slope = np.corrcoef(x[inside], y[inside])[0, 1]
    assert slope > 0.99
