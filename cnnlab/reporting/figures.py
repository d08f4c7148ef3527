"""Figures of a table's runs: score against cost, learning curves, confusion matrix, mistakes.

Every function draws one figure into one file (PNG, SVG or PDF by its ending) and returns the path.
Equal records give equal files: nothing is random and no date is written. Colours are those of
Okabe and Ito 2008, "Color universal design", which readers with any kind of colour vision can tell
apart; markers and line styles say the same a second time.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnlab.encoding import decode_labels
from cnnlab.record import write_atomic
from cnnlab.registry import did_you_mean
from cnnlab.reporting import tables
from cnnlab.reporting.statistics import summarise
from cnnlab.reporting.tables import TableSpec
from cnnlab.types import CnnlabError, Record, Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

FIGURES = ("score_cost", "curves", "confusion", "mistakes")
DPI = 200
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "cnnlab",
    "pdf.fonttype": 42,
}
_CURVE_LABELS = {
    "train/loss": "Training loss (nats)",
    "train/nll": "Training NLL (nats)",
    "train/top1": "Training top-1 (%)",
    "validation/top1": "Validation top-1 (%)",
    "validation/nll": "Validation NLL (nats)",
    "learning_rate": "Learning rate",
}


def score_cost(
    spec: TableSpec,
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    cost: str = "parameters",
    score: str = "top1",
) -> Path:
    """Mean score of each row against what it costs, with the standard deviation over seeds.

    Args:
        spec: the table.
        records: its runs.
        path: where to; `.png`, `.svg` or `.pdf`.
        cost: column on the logarithmic horizontal axis.
        score: column on the vertical axis.

    Raises:
        CnnlabError: as `tables.build`; no run finished; a cost that is not positive.
    """
    runs = _finished(spec, records)
    points = []
    for row, of_row in runs.items():
        x = summarise(tables.values_of(cost, of_row.values()))
        y = summarise(tables.values_of(score, of_row.values()))
        if x.mean <= 0:
            raise CnnlabError(f"{row!r}: {cost} is {x.mean}; a logarithmic axis needs more than 0")
        points.append((row, x, y))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, x, y in points:
            colour, marker, _ = _look(spec, row)
            axes.errorbar(
                x.mean, y.mean, xerr=x.std, yerr=y.std, color=colour, marker=marker,
                linestyle="none", markersize=6, capsize=2.5, elinewidth=1, markeredgecolor="white",
                markeredgewidth=0.6, zorder=3, label=row,
            )  # fmt: skip
        axes.set_xscale("log")
        _compact_ticks(axes)
        axes.margins(x=0.18, y=0.16)
        axes.set_xlabel(f"{tables.column(cost).header}, logarithmic")
        axes.set_ylabel(tables.column(score).header)
        axes.set_title(_spread_title(runs), loc="left", color="#555555")
        figure.canvas.draw()
        if not _label_points(axes, points, spec):
            longest = max(len(row) for row, _, _ in points)
            figure.set_size_inches(5.6 + 0.066 * longest, max(3.6, 0.17 * len(points) + 0.4))
            figure.legend(loc="outside right upper", fontsize=8)

    return save(draw, path, (5.2, 3.6))


def learning_curves(
    spec: TableSpec,
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    metrics: Sequence[str] = ("train/loss", "validation/top1"),
) -> Path:
    """Mean over seeds, and a band of one standard deviation, for each row and metric.

    A line ends where the first of its seeds ended, so that it is always a mean over the same runs;
    diverged runs are left out and counted in the legend.

    Args:
        spec: the table.
        records: its runs.
        path: where to.
        metrics: names in the records' curves, one panel each.

    Raises:
        CnnlabError: as `tables.build`; no run finished; a metric that no run logged.
    """
    checked = tables.by_row(spec, records)
    runs = _finished(spec, [r for of_row in checked.values() for r in of_row.values()])
    logged = _logged(runs)
    for metric in metrics:
        if metric not in logged:
            raise CnnlabError(
                f"no run logged {metric!r}{did_you_mean(metric, logged)}. "
                f"Logged: {', '.join(sorted(logged))}"
            )

    labels = {
        row: f"{row} ({len(of_row)} of {len(checked[row])} runs)"
        if len(of_row) < len(checked[row])
        else row
        for row, of_row in runs.items()
    }
    width = 3.6 * len(metrics)
    # In points: 5.2 is a wide mean of a letter, 45 the line and the gaps beside it.
    columns = int(72 * width / (5.2 * max(map(len, labels.values())) + 45))
    columns = min(max(columns, 1), len(labels))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            factor = 100.0 if metric.endswith(("top1", "top5")) else 1.0
            for row, of_row in runs.items():
                epochs, values = _aligned(of_row.values(), metric)
                if not len(epochs):
                    continue
                colour, marker, line = _look(spec, row)
                mean = factor * values.mean(axis=0)
                axes.plot(
                    epochs, mean, color=colour, linestyle=line, linewidth=1.4, label=labels[row],
                    marker=marker if len(epochs) == 1 else None,
                )  # fmt: skip
                if len(values) > 1:
                    std = factor * values.std(axis=0, ddof=1)
                    axes.fill_between(
                        epochs, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0
                    )
            axes.set_xlabel("Epoch")
            axes.set_ylabel(_CURVE_LABELS.get(metric, metric))
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_title(_spread_title(runs), loc="left", color="#555555")
        drawn: dict[str, Any] = {}
        for axes in panels:
            lines, texts = axes.get_legend_handles_labels()
            drawn |= dict(zip(texts, lines, strict=True))
        figure.legend(
            list(drawn.values()), list(drawn), loc="outside lower center", ncols=columns,
            handlelength=2.6, fontsize=8.5,
        )  # fmt: skip

    return save(draw, path, (width, 2.9 + 0.19 * -(-len(labels) // columns)))


def confusion_matrix(
    spec: TableSpec, records: Iterable[Record], path: str | os.PathLike[str], *, row: str
) -> Path:
    """Which classes a row takes for which: counts summed over seeds, each true class to 100 %.

    Args:
        spec: the table.
        records: its runs.
        path: where to.
        row: whose predictions.

    Raises:
        CnnlabError: as `tables.build`; unknown row; none of its runs finished.
    """
    of_row = _runs_of(spec, records, row)
    first = next(iter(of_row.values()))
    names = first["class_names"]
    counts = np.sum([r["scores"]["test"]["confusion"] for r in of_row.values()], axis=0)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(names)

    def draw(figure: Figure) -> None:
        from matplotlib.colors import PowerNorm

        axes = figure.add_subplot()
        # A square-root scale, or a confusion of 5 % would look like none beside 90 %.
        norm = PowerNorm(0.5, vmin=0, vmax=100)
        image = axes.imshow(share, cmap="Blues", norm=norm)
        if size <= 20:
            for i, j in np.ndindex(share.shape):
                if counts[i, j]:
                    text = "<1" if share[i, j] < 1 else f"{share[i, j]:.0f}"
                    tone = "white" if norm(share[i, j]) > 0.6 else "#222222"
                    axes.text(j, i, text, ha="center", va="center", color=tone, fontsize=7.5)
        every = range(size) if size <= 40 else range(0, size, size // 20)
        shown = [textwrap.shorten(names[i], 20, placeholder="…") for i in every]
        axes.set_xticks(every, shown, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(every, shown)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("Predicted")
        axes.set_ylabel("True")
        axes.set_title(f"{row}, {_over(of_row)}", loc="left")
        bar = figure.colorbar(
            image, ax=axes, fraction=0.045, pad=0.02, label="Share of the true class (%)",
            ticks=[0, 1, 5, 10, 20, 40, 60, 80, 100],
        )  # fmt: skip
        bar.outline.set_visible(False)

    side = min(max(3.2, 0.42 * size + 1.4), 10.0)
    return save(draw, path, (side + 0.8, side))


def mistakes(
    spec: TableSpec,
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    row: str,
    test: Source,
    count: int = 24,
) -> Path:
    """Test images that most of a row's seeds get wrong, with what they were taken for.

    Ordered by the number of seeds that err, then by position in the test split. The prediction
    shown is the most frequent wrong one.

    Args:
        spec: the table.
        records: its runs.
        path: where to.
        row: whose mistakes.
        test: the test split; its images have 1 or 3 channels.
        count: how many at most.

    Raises:
        CnnlabError: as `tables.build`; unknown row; none of its runs finished; a split of another
            size than was scored; no mistake at all.
    """
    of_row = _runs_of(spec, records, row)
    first = next(iter(of_row.values()))
    names, expected = first["class_names"], first["test_set"]["examples"]
    if len(test) != expected:
        raise CnnlabError(
            f"mistakes of {row!r}: expected the {expected} images of the "
            f"{first['test_set']['name']} {first['test_set']['split']} split, got {len(test)}"
        )
    labels = decode_labels(first["predictions"]["labels"])
    predicted = np.stack([decode_labels(r["predictions"]["test"]) for r in of_row.values()])
    wrong = predicted != labels
    errors = wrong.sum(axis=0)
    chosen = [i for i in np.argsort(-errors, kind="stable")[:count] if errors[i]]
    if not chosen:
        raise CnnlabError(f"{row!r} makes no mistake on {expected} test images; nothing to show")
    columns = min(6, len(chosen))
    lines = -(-len(chosen) // columns)
    images = test.get(np.array(chosen)).images

    def draw(figure: Figure) -> None:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, i, image in zip(panels, chosen, images, strict=False):
            shown = image[..., 0] if image.shape[-1] == 1 else image
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            taken = int(np.argmax(np.bincount(predicted[wrong[:, i], i])))
            text = "\n".join(
                [
                    textwrap.shorten(names[labels[i]], 16, placeholder="…"),
                    "→ " + textwrap.shorten(names[taken], 14, placeholder="…"),
                    f"{errors[i]} of {len(of_row)} seeds",
                ]
            )
            axes.set_title(text, fontsize=7.5, linespacing=1.15, pad=3)
        figure.suptitle(
            f"{row}: true class → taken for; {len(chosen)} of the {np.count_nonzero(errors)} test "
            f"images that {'it' if len(of_row) == 1 else 'any seed'} gets wrong",
            x=0.01, ha="left", fontsize=9,
        )  # fmt: skip

    return save(draw, path, (1.2 * columns, 1.62 * lines + 0.35))


def certified_accuracy(
    certified: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike[str]
) -> Path:
    """Certified accuracy against the L2 radius, exactly: a step at the radius of each example.

    Args:
        certified: what to call a classifier -> the certified radius of each example, [N], and
            whether it is certified as its true class, [N].
        path: where to.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (name, (radii, right)) in enumerate(certified.items()):
            reach = np.sort(np.asarray(radii, np.float64)[np.asarray(right, bool)])
            ends = np.array([0, *reach, *reach[-1:]])
            standing = np.array([len(reach), *range(len(reach), -1, -1)])[: len(ends)]
            axes.step(
                ends, 100 * standing / len(right), where="pre", color=COLOURS[i % len(COLOURS)],
                linestyle=LINES[i % len(LINES)], linewidth=1.4, label=name,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100)
        axes.set_xlabel("L2 radius, of pixels in [0, 1]")
        axes.set_ylabel("Certified accuracy (%)")
        axes.legend()

    return save(draw, path, (5.2, 3.6))


def write_all(
    spec: TableSpec,
    records: Iterable[Record],
    folder: str | os.PathLike[str],
    test: Source | None = None,
    which: Sequence[str] = FIGURES,
    *,
    row: str | None = None,
    ending: str = "png",
) -> list[Path]:
    """Draws the figures of a table into a folder.

    Args:
        spec: the table.
        records: its runs.
        folder: where to.
        test: the test split; needed for `"mistakes"`.
        which: names out of `FIGURES`. `"score_cost"` is drawn once against parameters, MACs and
            seconds each.
        row: whose confusion matrix and mistakes. `None` takes the row with the best mean
            validation top-1 (the test split selects nothing), or the last row where the runs have
            no validation split.
        ending: `"png"`, `"svg"` or `"pdf"`.

    Returns:
        The files; none where no run finished.

    Raises:
        CnnlabError: as the single figures; an unknown name; `"mistakes"` without the test split.
    """
    for name in which:
        if name not in FIGURES:
            raise CnnlabError(
                f"unknown figure {name!r}{did_you_mean(name, FIGURES)}. Known: {', '.join(FIGURES)}"
            )
    if "mistakes" in which and test is None:
        raise CnnlabError("the figure 'mistakes' needs the test images; give them or leave it out")
    records, folder = list(records), Path(folder)
    runs = {n: tables.finished(of_row) for n, of_row in tables.by_row(spec, records).items()}
    runs = {name: of_row for name, of_row in runs.items() if of_row}
    if not runs:
        return []
    shown = row if row is not None else shown_row(spec, records)
    written = []
    for name in which:
        if name == "score_cost":
            written += [
                score_cost(spec, records, folder / f"score_{cost}.{ending}", cost=cost)
                for cost in ("parameters", "macs", "seconds")
            ]
        elif name == "curves":
            # The loss that is minimised has auxiliary terms in some rows; the main head's has not.
            logged = _logged(runs)
            loss = "train/nll" if "train/nll" in logged else "train/loss"
            metrics = [m for m in (loss, "validation/top1") if m in logged]
            written.append(
                learning_curves(spec, records, folder / f"curves.{ending}", metrics=metrics)
            )
        elif name == "confusion":
            written.append(
                confusion_matrix(spec, records, folder / f"confusion.{ending}", row=shown)
            )
        elif test is not None and _errs(runs.get(shown, {})):
            written.append(
                mistakes(spec, records, folder / f"mistakes.{ending}", row=shown, test=test)
            )
    return written


def _logged(runs: Mapping[str, Mapping[int, Record]]) -> set[str]:
    return {k for of_row in runs.values() for r in of_row.values() for p in r["curves"] for k in p}


def _errs(of_row: Mapping[int, Record]) -> bool:
    return any(not tables.correct(record).all() for record in of_row.values()) or not of_row


def shown_row(spec: TableSpec, records: Iterable[Record]) -> str:
    """The row whose confusion matrix and mistakes `write_all` draws where none is named.

    It is the one with the best mean validation top-1 (the test split selects nothing), or the last
    one where some run has no validation split. At least one run must be done.
    """
    return _best(_finished(spec, records))


def _best(runs: Mapping[str, Mapping[int, Record]]) -> str:
    if any(not r["scores"].get("validation") for of_row in runs.values() for r in of_row.values()):
        return list(runs)[-1]
    means = {
        name: summarise(tables.values_of("validation_top1", of_row.values())).mean
        for name, of_row in runs.items()
    }
    return max(means, key=means.__getitem__)


def _finished(spec: TableSpec, records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    runs = {row: tables.finished(of_row) for row, of_row in tables.by_row(spec, records).items()}
    runs = {row: of_row for row, of_row in runs.items() if of_row}
    if not runs:
        raise CnnlabError(f"table {spec.name!r}: no run has finished, so there is nothing to draw")
    return runs


def _runs_of(spec: TableSpec, records: Iterable[Record], row: str) -> dict[int, Record]:
    runs = _finished(spec, records)
    if row not in runs:
        raise CnnlabError(
            f"table {spec.name!r}: no finished run of row {row!r}{did_you_mean(row, runs)}. "
            f"Finished: {', '.join(runs)}"
        )
    return runs[row]


def _over(of_row: Mapping[int, Record]) -> str:
    return "one seed" if len(of_row) == 1 else f"{len(of_row)} seeds"


def _spread_title(runs: Mapping[str, Mapping[int, Record]]) -> str:
    counts = sorted({len(of_row) for of_row in runs.values()})
    if counts == [1]:
        return "One seed"
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean ± standard deviation over {seeds} seeds"


def _look(spec: TableSpec, row: str) -> tuple[str, str, Any]:
    """Colour, marker and line style: a row looks the same in every figure of its table."""
    i = spec.rows.index(row)
    return (
        COLOURS[i % len(COLOURS)],
        MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        LINES[(i // len(COLOURS) + i) % len(LINES)],
    )


def _aligned(of_row: Iterable[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [T] and values [S, T] at the steps at which every run logged the metric."""
    curves = [
        {p["step"]: (p["epoch"], p[metric]) for p in r["curves"] if p.get(metric) is not None}
        for r in of_row
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    epochs = np.array([curves[0][step][0] for step in steps])
    return epochs, np.array([[curve[step][1] for step in steps] for curve in curves])


def _compact_ticks(axes: Axes) -> None:
    from matplotlib import ticker

    low, high = axes.get_xlim()
    subs: tuple[float, ...] = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    if high / low > 6:
        subs = (1, 2, 5) if high / low < 200 else (1,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _tick(value: float, _: int | None = None) -> str:
    return re.sub(r"\.0+(?=[kMGT]?$)", "", tables.compact(value))


def _label_points(axes: Axes, points: Sequence[tuple[str, Any, Any]], spec: TableSpec) -> bool:
    """Names each point where it hides the least: other names, points, error bars, the frame.

    Returns:
        Whether every name found room; where one did not, none is drawn.
    """
    from matplotlib import colors, patheffects

    def darker(colour: str) -> Any:
        return tuple(0.7 * np.asarray(colors.to_rgb(colour)))

    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    figure = axes.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    taken: list[tuple[float, float, float, float]] = []
    for _, x, y in points:
        (a, b), (c, d) = axes.transData.transform(
            [
                (max(x.mean - (x.std or 0), x.mean / 1e3), y.mean - (y.std or 0)),
                (x.mean + (x.std or 0), y.mean + (y.std or 0)),
            ]
        )
        px, py = axes.transData.transform((x.mean, y.mean))
        pad = 0.03 * figure.dpi
        taken += [
            (a - pad, py - pad, c + pad, py + pad),
            (px - pad, b - pad, px + pad, d + pad),
            (px - 2 * pad, py - 2 * pad, px + 2 * pad, py + 2 * pad),
        ]

    def overlap(box: tuple[float, ...], other: tuple[float, ...]) -> float:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        return max(width, 0.0) * max(height, 0.0)

    places = [
        (r * dx, r * dy)
        for r in (8, 14, 22, 32, 44)
        for dx, dy in ((1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1),
                       (-1, 0))
    ]  # fmt: skip
    drawn: list[Annotation] = []
    for row, x, y in points:
        text = axes.annotate(
            textwrap.shorten(row, 34, placeholder="…"), (x.mean, y.mean), xytext=(0, 0),
            textcoords="offset points", fontsize=8, zorder=4, path_effects=halo,
            color=darker(_look(spec, row)[0]),
        )  # fmt: skip
        costs = []
        for dx, dy in places:
            _offset(text, dx, dy)
            e = text.get_window_extent(renderer)
            box = (e.x0, e.y0, e.x1, e.y1)
            inside = overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
            hidden = sum(overlap(box, other) for other in taken)
            outside = e.width * e.height - inside
            # Far places only win when the near ones hide something.
            hides = hidden + 3 * outside
            costs.append((hides + 0.02 * e.width * np.hypot(dx, dy), box, hides))
        best = min(range(len(places)), key=lambda i: costs[i][0])
        dx, dy = places[best]
        _offset(text, dx, dy)
        taken.append(costs[best][1])
        drawn.append(text)
        if costs[best][2] > 0:
            for annotation in drawn:
                annotation.remove()
            return False
        if np.hypot(dx, dy) > 16:
            line = axes.annotate(
                "", (x.mean, y.mean), xytext=(dx, dy), textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6,
                            "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
            drawn.append(line)
    return True


def _offset(text: Annotation, dx: float, dy: float) -> None:
    text.set_position((dx, dy))
    text.set(
        horizontalalignment="left" if dx > 0 else "right" if dx < 0 else "center",
        verticalalignment="bottom" if dy > 0 else "top" if dy < 0 else "center",
    )


def save(
    draw: Callable[[Figure], None], path: str | os.PathLike[str], size: tuple[float, float]
) -> Path:
    """Draws a figure and writes it atomically, the same bytes for the same numbers.

    Args:
        draw: puts everything on the figure.
        path: its ending chooses the format.
        size: in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    metadata: dict[str, dict[str, Any]] = {
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    if path.suffix not in metadata:
        raise CnnlabError(f"cannot draw {path}: expected a name that ends in .png, .svg or .pdf")
    # The user's matplotlibrc must not change the figures; the backend is not a matter of style.
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    with matplotlib.rc_context({**defaults, **STYLE}):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # the labels are placed by their drawn sizes
        draw(figure)
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], dpi=DPI, metadata=metadata[path.suffix])
    write_atomic(path, content.getvalue())
    return path
