"""Figures of receptive fields: what is drawn, checked on matplotlib's own objects."""

from __future__ import annotations

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import imread

from cnnlab import describe, models
from cnnlab.reporting import fields, figures
from cnnlab.types import CnnlabError

SHAPE = (32, 24, 1)


@pytest.fixture(scope="module")
def network():
    module = models.create("simple_two_conv", num_outputs=10)
    return module, describe.describe(module, SHAPE)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 60)


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved."""
    kept = []
    original = matplotlib.figure.Figure.savefig

    def savefig(self, *args, **kwargs):
        kept.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return kept


def test_the_figure_shows_sizes_and_both_fields(network, tmp_path, drawn):
    module, description = network
    first = fields.draw(module, description, tmp_path / "a.png", title="two", draws=1, batch=1)
    again = fields.draw(module, description, tmp_path / "b.png", title="two", draws=1, batch=1)
    assert first.read_bytes() == again.read_bytes()
    assert imread(first).std() > 0.05
    sizes, growth, *panels = drawn[0].get_axes()

    side, channels = sizes.get_lines()
    maps = [row.output_shape for row in description.rows if len(row.output_shape) == 3]
    assert side.get_ydata().tolist() == [max(shape[:2]) for shape in maps]
    assert channels.get_ydata().tolist() == [shape[2] for shape in maps]

    local, whole, image = growth.get_lines()
    known = [row.receptive_field[0] for row in description.rows]
    assert local.get_ydata().tolist() == [field.size for field in known if field.stride]
    assert whole.get_ydata().tolist() == [field.size for field in known if not field.stride]
    assert set(image.get_ydata()) == {32}

    assert len(panels) == 2 * len(description.features)
    columns = len(description.features)
    for axes, feature in zip(panels, (*description.features, *description.features), strict=True):
        _, box = axes.patches
        (top, _), (left, _) = places = [
            field.of(size // 2)
            for field, size in zip(feature.receptive_field, feature.output_shape[:2], strict=True)
        ]
        assert box.get_xy() == (left - 0.5, top - 0.5)
        assert (box.get_height(), box.get_width()) == tuple(end - start for start, end in places)
    for axes, feature in zip(panels[columns:], description.features, strict=True):
        strength = np.asarray(axes.get_images()[0].get_array())
        assert strength.shape == SHAPE[:2]
        rows = np.flatnonzero(strength.any(1))
        first_row, end = feature.receptive_field[0].of(feature.output_shape[0] // 2)
        assert first_row <= rows[0]
        assert rows[-1] < end


def test_the_example_is_an_image_of_the_right_size():
    image = fields.example_image((40, 24))
    assert image.shape == (40, 24)
    assert image.min() >= 0
    assert image.max() == 1
    assert image.std() > 0.1


def test_what_cannot_be_drawn_is_said(network, tmp_path):
    module, description = network
    for path, features, message in (
        ("a.png", ("stage9",), "no feature 'stage9' .did you mean"),
        ("a.png", ("stage1",) * 5, "at most 4 features, got 5"),
        ("a.jpeg", (), r"\.png, \.svg or \.pdf"),
    ):
        with pytest.raises(CnnlabError, match=message):
            fields.draw(module, description, tmp_path / path, features=features)
