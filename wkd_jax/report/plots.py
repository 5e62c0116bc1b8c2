"""The figures of a report, as inline SVG: curves over the steps of runs, and what is known of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from wkd_jax.report import svg, text
from wkd_jax.report.read import Curve

BUCKETS = 500  # points of a drawn line; a longer curve is drawn as the mean and the range of as many buckets
ALL_NAMES = 30  # classes up to which every one is named on the axes of a matrix
BARS = 40  # classes up to which each has a bar
PIXELS = 500  # side of a drawn matrix; of a larger one, the mean of blocks is drawn
COARSE = 250  # the same of one that is drawn beside it
_CELL = (340, 200)  # size of a curve's figure
_SWATCH = (40, 12)
_FONT = 10  # size of all text
_WIDTH = 540  # of the figure of a matrix, or of all classes
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
_LEVELS = 64  # colours of a heat map: as smooth to the eye as more, and a far smaller file
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = "os^Dv"  # a dot of a run, by its dashes
_SHARES = LinearSegmentedColormap.from_list("shares", [(*to_rgb(svg.STUDENT), 0.06), (*to_rgb(svg.STUDENT), 1.0)])


@dataclasses.dataclass(frozen=True)
class Thinned:
    """A curve as it is drawn.

    Attributes:
      steps: [K] float64, mean step of each bucket.
      mean: [K] float64, mean of its finite values; NaN where it has none.
      low: [K] float64, the smallest finite value.
      high: [K] float64, the largest finite value.
      broken: [K] bool, whether the bucket has a value that is not finite.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    broken: np.ndarray


def thin(curve: Curve, buckets: int = BUCKETS) -> Thinned:
    """Groups the points of a curve into at most `buckets` of equal count, extremes kept.

    Example:
      >>> thinned = thin(Curve(np.arange(6), np.array([0.0, 4.0, 1.0, 1.0, np.nan, 3.0])), buckets=3)
      >>> thinned.mean, thinned.high, thinned.broken
      (array([2., 1., 3.]), array([4., 1., 3.]), array([False, False,  True]))
    """
    count = curve.values.size
    starts = np.arange(count) if count <= buckets else np.arange(buckets) * count // buckets
    finite = np.isfinite(curve.values)
    points = np.diff(starts, append=count)
    good = np.add.reduceat(finite.astype(np.int64), starts)
    return Thinned(
        steps=np.add.reduceat(curve.steps.astype(np.float64), starts) / points,
        mean=np.add.reduceat(np.where(finite, curve.values, 0), starts) / np.where(good > 0, good, np.nan),
        low=np.where(good > 0, np.minimum.reduceat(np.where(finite, curve.values, np.inf), starts), np.nan),
        high=np.where(good > 0, np.maximum.reduceat(np.where(finite, curve.values, -np.inf), starts), np.nan),
        broken=good < points,
    )


@dataclasses.dataclass(frozen=True)
class Style:
    """How a run is told from others.

    Attributes:
      colour: Of its line and dots.
      dashes: Of its line: a line style of Matplotlib.
      marker: Of its dots: a marker of Matplotlib.
    """

    colour: str
    dashes: Any = "solid"
    marker: str = "o"


def styles(groups: Sequence[int]) -> list[Style]:
    """A style for each run: those of a group share a colour, as far as there are colours, and differ in dashes.

    Args:
      groups: Number of each run's group, from 0. Without repetition, 40 styles are distinct.

    Example:
      >>> [(style.colour, style.marker) for style in styles([0, 1, 0])]
      [('#3b82c4', 'o'), ('#2a9d6f', 'o'), ('#3b82c4', 's')]
    """
    count, half = len(_DASHES), len(svg.SERIES) // 2
    taken: set[tuple[int, int]] = set()
    found = []
    for group in groups:
        colour, first = group % len(svg.SERIES), group // half  # colours that are alike differ in dashes too
        free = [i % count for i in range(first, first + count) if (colour, i % count) not in taken]
        dashes = next(iter(free), first % count)
        taken.add((colour, dashes))
        found.append(Style(svg.SERIES[colour], _DASHES[dashes], _MARKERS[dashes]))
    return found


def swatch(name: str, style: Style) -> Markup:
    """Draws what a run's line and dots look like, for a legend outside of the figures."""

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.plot((0, 1), (0, 0), color=style.colour, linestyle=style.dashes, linewidth=2)
        axes.plot(0.5, 0, color=style.colour, marker=style.marker, markersize=6, markeredgewidth=0)
        axes.set_xlim(0, 1)

    return svg.draw(name, *_SWATCH, paint, label=name)


def curves(
    name: str,
    lines: Mapping[str, Curve],
    *,
    level: tuple[str, float] | None = None,
    scale: str = "linear",
    look: Mapping[str, Style] | None = None,
) -> Markup:
    """Draws curves over the steps, in one pair of axes.

    Args:
      name: The figure's, distinct within the page.
      lines: Label -> curve. Labels are drawn where there is more than one line, or a level.
      level: (label, value) of a horizontal line to compare with.
      scale: "linear", or "log" to use a logarithmic axis where all values are positive and span two decades.
      look: Label -> style, of lines whose legend is outside of the figure; None: colours in turn, and labels drawn.
    """
    drawn = look or {label: Style(svg.SERIES[i % len(svg.SERIES)]) for i, label in enumerate(lines)}

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.16, 0.18, 0.81, 0.78))
        for label, curve in lines.items():
            _line(axes, thin(curve), style=drawn[label], label=svg.plain(label))
        if level:
            axes.axhline(level[1], color=svg.TEACHER, linestyle=(0, (5, 3)), label=level[0])
        values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in lines.values()])
        if scale == "log" and values.size and values.min() > 0 and values.max() / values.min() > 100:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            if values.size and values.min() == values.max() > 0:  # a constant: show how far it is from 0
                axes.set_ylim(0, 1.25 * max([values.max(), *([level[1]] if level else [])]))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.compact(value)))
        axes.set_xlim(0, 1.02 * max([1, *(curve.steps[-1] for curve in lines.values())]))
        axes.tick_params(length=3)
        axes.set_xlabel("step", labelpad=2)
        axes.grid(axis="y")
        if not look and (len(lines) > 1 or level):
            axes.legend(loc="best" if values.size else "center", handlelength=1.4, borderaxespad=0.2, labelspacing=0.25)

    return svg.draw(name, *_CELL, paint, label=f"Curves over the steps: {', '.join(lines)}")


def similarity(name: str, names: Sequence[str], matrix: np.ndarray) -> Markup:
    """Draws class similarities as a heat map. The colours span the 1st to 99th percentile off the diagonal.

    Args:
      name: The figure's.
      names: C class names, in the order of the matrix.
      matrix: [C, C]. The diagonal is left blank: it is 1 by definition.
    """
    diagonal = np.eye(len(names), dtype=bool)
    low, high = np.percentile(matrix[~diagonal], (1, 99)) if len(names) > 1 else (0.0, 1.0)
    if high - low < 1e-6:  # all alike, as with two classes
        low, high = low - 0.05, high + 0.05
    colours = matplotlib.colormaps["viridis"].resampled(_LEVELS)
    scale = _Scale(colours, low, high, "similarity", extend="both")
    return _matrix(name, names, np.where(diagonal, np.nan, matrix), scale, label="Heat map of class similarity")


def remainder(name: str, names: Sequence[str], matrix: np.ndarray, groups: Sequence[str] | None) -> Markup:
    """Draws what a simpler model leaves of class similarities. The colours end at the 99th percentile of the sizes.

    Args:
      name: The figure's.
      names: C class names, in the order of the matrix.
      matrix: [C, C]. The diagonal is left blank.
      groups: C names: a dot marks two classes of one group. None: no marks.
    """
    count = len(names)
    diagonal = np.eye(count, dtype=bool)
    end = max(np.percentile(np.abs(matrix[~diagonal]), 99), 1e-9)

    def annotate(axes: Axes) -> None:
        if groups:
            same = np.asarray(groups)[:, None] == np.asarray(groups)
            row, column = np.nonzero(same & ~diagonal)
            size = min(5.0, max(0.6, 0.3 * _WIDTH / count))
            axes.scatter(column, row, s=size**2, color="#000000", linewidths=0, rasterized=True)

    colours = matplotlib.colormaps["RdBu_r"].resampled(_LEVELS // 2 + 1)
    scale = _Scale(colours, -end, end, "left of the similarity", extend="both")
    label = "Heat map of what one number a class leaves of the similarity"
    return _matrix(name, names, np.where(diagonal, np.nan, matrix), scale, annotate, label=label, pixels=COARSE)


def confusion(name: str, names: Sequence[str], counts: np.ndarray) -> Markup:
    """Draws a confusion matrix, each row as a share of its class, with the counts where there is room for them.

    Args:
      name: The figure's.
      names: C class names.
      counts: [C, C], true class by row. Zeros are left blank.
    """
    share = np.where(counts > 0, 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), np.nan)

    def annotate(axes: Axes) -> None:
        axes.set_xlabel("predicted by the student")
        axes.set_ylabel("true class")
        written = {(row, column): f"{counts[row, column]:.0f}" for row, column in np.argwhere(counts > 0)}
        cell = axes.get_window_extent().width / len(names)
        if cell > 4 + _FONT * max(map(svg.ems, written.values()), default=0):
            for (row, column), number in written.items():
                colour = "#ffffff" if share[row, column] > 60 else svg.INK
                axes.text(column, row, number, ha="center", va="center", color=colour)

    scale = _Scale(_SHARES, 0, 100, "% of the true class")
    return _matrix(name, names, share, scale, annotate, label="Confusion matrix of the student")


def by_class(
    name: str,
    names: Sequence[str],
    student: np.ndarray,
    teacher: np.ndarray | None,
    *,
    measure: str = "accuracy",
    bars: int = BARS,
) -> Markup:
    """Draws a percentage of each class: as named bars, or by rank where there are too many.

    Args:
      name: The figure's.
      names: C class names, in the order to draw.
      student: [C], percent; NaN where a class has no examples.
      teacher: The same; None in a run without a teacher.
      measure: What the percentages are.
      bars: Classes up to which each has a bar.
    """
    named = len(names) <= bars
    height = 70 + 18 * len(names) if named else 300
    left = _room(names) if named else 45

    def paint(figure: Figure) -> None:
        axes = figure.add_axes(_box(left, 24, _WIDTH - left - 15, height - 64, height))
        (_bars if named else _ranks)(axes, names, student, teacher, measure)

    return svg.draw(name, _WIDTH, height, paint, label=f"{measure[0].upper()}{measure[1:]} by class")


def by_class_and_run(
    name: str, names: Sequence[str], runs: Mapping[str, np.ndarray], look: Mapping[str, Style], *, measure: str
) -> Markup:
    """Draws a percentage of each class for several runs: a row a class, a dot a run.

    Args:
      name: The figure's.
      names: C class names, in the order to draw.
      runs: Label -> [C], percent; NaN where a class has no examples.
      look: Label -> style. The legend is outside of the figure.
      measure: What the percentages are.
    """
    height = 46 + 22 * len(names)
    left = _room(names)

    def paint(figure: Figure) -> None:
        axes = figure.add_axes(_box(left, 6, _WIDTH - left - 15, height - 46, height))
        rows = np.arange(len(names))
        # Rows of runs that agree would hide each other: each run has its own height within the row.
        apart = np.linspace(-0.28, 0.28, len(runs)) if len(runs) > 1 else [0.0]
        for (label, values), shift in zip(runs.items(), apart, strict=True):
            style = look[label]
            marks: dict[str, Any] = {"linestyle": "none", "markersize": 6, "markeredgewidth": 0, "clip_on": False}
            axes.plot(values, rows + shift, color=style.colour, marker=style.marker, **marks)
        _class_rows(axes, names)
        values = np.concatenate(list(runs.values()))
        low = np.nanmin(values) if np.isfinite(values).any() else 0.0
        axes.set_xlim(max(0.0, np.floor((low - 2) / 10) * 10), 100)
        axes.set_xlabel(f"{measure}, %")
        axes.grid(axis="both")

    return svg.draw(name, _WIDTH, height, paint, label=f"{measure[0].upper()}{measure[1:]} by class and run")


def _class_rows(axes: Axes, names: Sequence[str]) -> None:
    """A row a class, the first on top, with its name."""
    axes.set_yticks(np.arange(len(names)), [svg.plain(each) for each in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _bars(axes: Axes, names: Sequence[str], student: np.ndarray, teacher: np.ndarray | None, measure: str) -> None:
    """A bar a class for the student, a tick on it for the teacher."""
    y = np.arange(len(names))
    axes.barh(y, np.nan_to_num(student), height=0.62, color=svg.STUDENT, label="student")
    if teacher is not None:
        axes.plot(
            teacher, y, linestyle="none", marker="|", markersize=13, markeredgewidth=2.5, color=svg.TEACHER,
            label="teacher",
        )  # fmt: skip
    _class_rows(axes, names)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{measure}, %")
    axes.grid(axis="x")
    if teacher is not None:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)


def _ranks(axes: Axes, names: Sequence[str], student: np.ndarray, teacher: np.ndarray | None, measure: str) -> None:
    """A line through the student's classes, a dot a class for the teacher."""
    rank = np.arange(1, len(names) + 1)
    if teacher is not None:
        axes.scatter(rank, teacher, s=7, color=svg.TEACHER, linewidths=0, label="teacher", rasterized=True)
    axes.plot(rank, student, color=svg.STUDENT, linewidth=2, label="student")
    axes.set_xlim(0, len(names) + 1)
    axes.set_xlabel(f"classes, in the order of the student's {measure}")
    axes.set_ylabel(f"{measure}, %")
    axes.grid(axis="y")
    if teacher is not None:
        axes.legend(loc="lower left")


def _line(axes: Axes, thinned: Thinned, *, style: Style, label: str) -> None:
    """A line with its range shaded, gaps where values are not finite, and those marked along the bottom."""
    axes.fill_between(thinned.steps, thinned.low, thinned.high, color=style.colour, alpha=0.3, linewidth=0)
    _path(axes, thinned.steps, thinned.mean, color=style.colour, linestyle=style.dashes, label=label)
    if thinned.broken.any():
        bottom = np.where(thinned.broken, 0.0, np.nan)
        transform = axes.get_xaxis_transform()
        _path(axes, thinned.steps, bottom, color=svg.ALARM, linewidth=4, transform=transform, clip_on=False)


def _path(axes: Axes, x: np.ndarray, y: np.ndarray, **properties: Any) -> None:
    """A line whose points are marked where they are few, or have no neighbour to be joined to."""
    finite = np.isfinite(y)
    before, after = np.roll(finite, 1), np.roll(finite, -1)
    before[0] = after[-1] = False
    alone = np.flatnonzero(finite if y.size <= 30 else finite & ~before & ~after)
    (line,) = axes.plot(x, y, **properties)
    marks = {"marker": "o", "markersize": 2.5 * line.get_linewidth() ** 0.5, "linestyle": "none", "label": None}
    axes.plot(x[alone], y[alone], **(properties | marks))


@dataclasses.dataclass(frozen=True)
class _Scale:
    """The colours of a matrix and what they mean."""

    colours: Colormap
    low: float
    high: float
    label: str
    extend: str = "neither"


def _matrix(
    name: str,
    names: Sequence[str],
    matrix: np.ndarray,
    scale: _Scale,
    annotate: Callable[[Axes], None] = lambda axes: None,
    *,
    label: str,
    pixels: int = PIXELS,
) -> Markup:
    """Draws a square matrix with class names on both axes: all of them, or a few where there are many."""
    count = len(names)
    ticks = np.arange(0, count, 1 if count <= ALL_NAMES else -(-count // 25))
    labels = [svg.plain(names[i], 20) for i in ticks]
    margin = 20 + _room(labels)
    side = _WIDTH - margin - 80
    height = 10 + side + margin

    def paint(figure: Figure) -> None:
        axes = figure.add_axes(_box(margin, 10, side, side, height))
        edges = (-0.5, count - 0.5, count - 0.5, -0.5)
        image = axes.imshow(
            _shrunk(matrix, pixels),
            cmap=scale.colours,
            vmin=scale.low,
            vmax=scale.high,
            interpolation="none",
            extent=edges,
        )
        axes.set_xticks(ticks, labels, rotation=90)
        axes.set_yticks(ticks, labels)
        axes.tick_params(length=0 if count <= ALL_NAMES else 2)
        axes.spines[:].set_visible(False)
        annotate(axes)
        beside = figure.add_axes(_box(margin + side + 14, 30, 16, side - 40, height))
        bar = figure.colorbar(image, cax=beside, extend=scale.extend, label=scale.label)
        bar.solids.set_rasterized(True)
        bar.outline.set_visible(False)

    return svg.draw(name, _WIDTH, height, paint, label=label)


def _room(names: Sequence[str]) -> float:
    """Pixels that the longest of these tick labels needs, about: the page's font is not known here."""
    return 12 + _FONT * max(svg.ems(svg.plain(name)) for name in names)


def _box(left: float, top: float, width: float, height: float, total: float) -> tuple[float, float, float, float]:
    """Axes of this size in pixels, so far from the left and the top of a figure `total` high, as its fractions."""
    return left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total


def _shrunk(matrix: np.ndarray, pixels: int) -> np.ndarray:
    """Means of square blocks, NaN left out, so that no side is longer than `pixels`."""
    factor = -(-len(matrix) // pixels)
    if factor == 1:
        return matrix
    side = -(-len(matrix) // factor)
    padded = np.full((side * factor,) * 2, np.nan)
    padded[: len(matrix), : len(matrix)] = matrix
    blocks = padded.reshape(side, factor, side, factor).swapaxes(1, 2).reshape(side, side, -1)
    count = np.isfinite(blocks).sum(axis=-1)
    return np.nansum(blocks, axis=-1) / np.where(count, count, np.nan)
