"""Figures: what is drawn, checked on matplotlib's own objects, and that files are repeatable."""

from __future__ import annotations

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import imread

from cnnlab.encoding import decode_labels
from cnnlab.reporting import figures
from cnnlab.reporting.tables import TableSpec
from cnnlab.types import ArraySource, CnnlabError, DatasetInfo

SPEC = TableSpec("demo", "Two rows", ("plain", "better"), (0, 1, 2), varied=("model.name",))


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels: the drawing is the same, the tests are quicker."""
    monkeypatch.setattr(figures, "DPI", 60)


@pytest.fixture
def records(run):
    return [run(row, s, a) for row, a in (("plain", 0.85), ("better", 0.91)) for s in (0, 1, 2)]


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def split(images):
    names = tuple(map(str, range(10)))
    info = DatasetInfo("random", (8, 8, 1), names, (0.5,), (0.3,), "none", "none")
    return ArraySource(info, images, np.zeros(600, np.int32))


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


def _top1(records, row):
    return [100 * r["scores"]["test"]["top1"] for r in records if r["row"] == row]


def test_score_cost_draws_means_and_stds(records, tmp_path, drawn):
    figures.score_cost(SPEC, records, tmp_path / "a.png", cost="seconds")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    for container, row in zip(axes.containers, SPEC.rows, strict=True):
        line, _, bars = container
        top1 = _top1(records, row)
        seconds = [r["cost"]["seconds"] for r in records if r["row"] == row]
        assert line.get_xydata()[0] == pytest.approx((np.mean(seconds), np.mean(top1)))
        horizontal, vertical = (bar.get_segments()[0] for bar in bars)
        assert np.ptp(vertical[:, 1]) / 2 == pytest.approx(np.std(top1, ddof=1))
        assert np.ptp(horizontal[:, 0]) / 2 == pytest.approx(np.std(seconds, ddof=1))
    assert {text.get_text() for text in axes.texts} == set(SPEC.rows)


def test_labels_never_overlap(run, tmp_path, drawn):
    rows = tuple(f"VGG, head {i}" for i in range(9))
    long = tuple(f"VGG with auxiliary head {i}" for i in range(40))
    spec, crowd = (TableSpec("x", "Many", r, (0,), varied=("model",)) for r in (rows, long))
    spread = [run(r, 0, 0.7 + 0.03 * i, cost__parameters=1000 * 2**i) for i, r in enumerate(rows)]
    heap = [run(r, 0, 0.9, cost__parameters=1000) for r in long]
    figures.score_cost(spec, spread, tmp_path / "a.png")
    figures.score_cost(crowd, heap, tmp_path / "b.png")
    boxes = [t.get_window_extent() for t in drawn[0].axes[0].texts if t.get_text()]
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not drawn[1].axes[0].texts  # no room: a legend instead
    assert [t.get_text() for t in drawn[1].legends[0].get_texts()] == list(long)


def test_learning_curves_are_means_with_bands(records, tmp_path, drawn, diverged):
    records[0]["curves"] = records[0]["curves"][:4]  # stopped early
    records[-1] = diverged("better", 2, 100)
    figures.learning_curves(SPEC, records, tmp_path / "a.png")
    axes = drawn[0].axes[1]
    plain, better = axes.lines
    values = [
        [100 * p["validation/top1"] for p in r["curves"][:4]]
        for r in records
        if r["row"] == "plain"
    ]
    np.testing.assert_allclose(plain.get_ydata(), np.mean(values, axis=0))
    np.testing.assert_allclose(plain.get_xdata(), [1, 2, 3, 4])
    assert len(better.get_xdata()) == 6
    band = axes.collections[0].get_paths()[0].vertices
    std = np.std(values, axis=0, ddof=1)
    assert band[:, 1].max() == pytest.approx(np.max(np.mean(values, axis=0) + std))
    assert better.get_label() == "better (2 of 3 runs)"
    with pytest.raises(CnnlabError, match=r"no run logged 'train/lost'.*did you mean 'train/loss'"):
        figures.learning_curves(SPEC, records, tmp_path / "b.png", metrics=("train/lost",))


def test_confusion_matrix_sums_seeds_and_normalises_rows(records, tmp_path, drawn):
    figures.confusion_matrix(SPEC, records, tmp_path / "a.png", row="plain")
    shown = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown.sum(axis=1), 100)
    counts = sum(np.array(r["scores"]["test"]["confusion"]) for r in records[:3])
    assert shown[3, 4] == pytest.approx(100 * counts[3, 4] / counts[3].sum())
    names = [t.get_text() for t in drawn[0].axes[0].get_yticklabels()]
    assert names == records[0]["class_names"]
    with pytest.raises(CnnlabError, match=r"no finished run of row 'plian'.*did you mean 'plain'"):
        figures.confusion_matrix(SPEC, records, tmp_path / "b.png", row="plian")


def test_mistakes_are_real_and_ordered(records, images, split, tmp_path, drawn):
    figures.mistakes(SPEC, records, tmp_path / "a.png", row="plain", test=split, count=18)
    labels = decode_labels(records[0]["predictions"]["labels"])
    wrong = [decode_labels(r["predictions"]["test"]) != labels for r in records[:3]]
    errors = np.sum(wrong, axis=0)
    shown = []
    for axes in drawn[0].axes:
        image = np.asarray(axes.images[0].get_array())
        (index,) = np.flatnonzero((images[..., 0] == image).all(axis=(1, 2)))
        name, _, seeds = axes.get_title().split("\n")
        assert name == records[0]["class_names"][labels[index]]
        assert seeds == f"{errors[index]} of 3 seeds"
        shown.append(errors[index])
    assert len(shown) == 18
    assert shown == sorted(errors, reverse=True)[:18]
    fewer = ArraySource(split.info, images[1:], np.zeros(599, np.int32))
    with pytest.raises(CnnlabError, match=r"expected the 600 images of .*, got 599"):
        figures.mistakes(SPEC, records, tmp_path / "b.png", row="plain", test=fewer)


def test_write_all_is_repeatable(records, split, tmp_path):
    first = figures.write_all(SPEC, records, tmp_path / "a", split)
    assert sorted(p.name for p in first) == sorted(p.name for p in (tmp_path / "a").iterdir())
    assert [p.name for p in first] == [
        "score_parameters.png", "score_macs.png", "score_seconds.png", "curves.png",
        "confusion.png", "mistakes.png",
    ]  # fmt: skip
    assert all(min(imread(path).shape[:2]) > 150 for path in first)
    subset = ("score_cost", "confusion")
    again = figures.write_all(SPEC, records[::-1], tmp_path / "b", which=subset)
    for path in again:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_vector_files_hold_no_date(records, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    first = figures.confusion_matrix(SPEC, records, path, row="better").read_bytes()
    assert figures.confusion_matrix(SPEC, records, path, row="better").read_bytes() == first
    assert b"date>" not in first.lower()
    assert b"CreationDate" not in first


def test_figures_choose_by_validation_only(records):
    runs = {row: {r["seed"]: r for r in records if r["row"] == row} for row in SPEC.rows}
    assert figures._best(runs) == "better"
    for record in runs["plain"].values():
        record["scores"]["validation"]["top1"] = 0.99
    assert figures._best(runs) == "plain"


def test_nothing_finished_and_wrong_names(records, split, diverged, tmp_path):
    gone = [diverged("plain", 0, 5)]
    assert figures.write_all(SPEC, gone, tmp_path, split) == []
    with pytest.raises(CnnlabError, match="no run has finished"):
        figures.score_cost(SPEC, gone, tmp_path / "a.png")
    with pytest.raises(CnnlabError, match=r"unknown figure 'curve'.*did you mean 'curves'"):
        figures.write_all(SPEC, records, tmp_path, split, which=("curve",))
    with pytest.raises(CnnlabError, match="needs the test images"):
        figures.write_all(SPEC, records, tmp_path)
    with pytest.raises(CnnlabError, match=r"ends in .png, .svg or .pdf"):
        figures.score_cost(SPEC, records, tmp_path / "a.jpg")
