"""What is drawn of a curve or a matrix, and the SVG that comes out."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes

from wkd_jax.report import plots, svg
from wkd_jax.report.read import Curve


def curve(values):
    return Curve(np.arange(1, len(values) + 1), np.asarray(values, np.float64))


def test_short_curves_are_drawn_point_by_point():
    values = np.array([3.0, np.nan, 1.0, np.inf])
    thinned = plots.thin(curve(values))
    np.testing.assert_array_equal(thinned.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(thinned.mean, [3, np.nan, 1, np.nan])
    np.testing.assert_array_equal(thinned.broken, [False, True, False, True])


@pytest.mark.parametrize("count", [501, 997, 12_345])
def test_thinning_keeps_extremes_means_and_broken_points(count):
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    values[rng.integers(count)] = 50.0
    values[rng.integers(count)] = -50.0
    broken = rng.integers(count)
    values[broken] = np.nan
    thinned = plots.thin(curve(values))
    groups = np.split(values, (np.arange(1, 500) * count) // 500)
    assert thinned.mean.size == 500
    assert (np.nanmax(thinned.high), np.nanmin(thinned.low)) == (np.nanmax(values), np.nanmin(values))
    with np.errstate(invalid="ignore"):
        expected = [group[np.isfinite(group)].mean() if np.isfinite(group).any() else np.nan for group in groups]
    np.testing.assert_allclose(thinned.mean, expected, rtol=1e-12, atol=1e-12)
    assert thinned.broken.sum() == 1
    assert np.isnan(groups[np.flatnonzero(thinned.broken)[0]]).any()


def test_an_isolated_point_is_visible():
    drawn = [plots.curves("x", {"a": curve(np.where(np.arange(100) == 50, 1.0, keep))}) for keep in (np.nan, 1.0)]
    marks = [len(re.findall("<use ", figure)) for figure in drawn]
    assert marks[0] > marks[1]  # besides the ticks: the point, and both ends of what is broken around it


@pytest.mark.parametrize("level", [20.0, 90.0])
def test_the_level_beside_a_single_point_is_within_the_axes(level, monkeypatch):
    limits, line = [], []
    axhline, legend = Axes.axhline, Axes.legend
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **how: line.append(y) or axhline(axes, y, **how))
    monkeypatch.setattr(Axes, "legend", lambda axes, **how: limits.append(axes.get_ylim()) or legend(axes, **how))
    plots.curves("x", {"a": curve([50.0])}, level=("teacher", level))
    ((low, high),) = limits
    assert line == [level] and low == 0 and high == 1.25 * max(level, 50)


def test_a_figure_is_clean_well_formed_and_deterministic():
    def draw(name):
        return plots.curves(name, {"a & b <c>": curve([1, 2, 3])}, level=("teacher", 2.5))

    figure = draw("first")
    root = ET.fromstring(figure)
    assert root.tag == "svg"
    assert not {"style", "metadata", "script"} & {element.tag for element in root.iter()}
    assert "a & b <c>" in [element.text for element in root.iter("text")]
    assert figure == draw("first")
    assert "currentColor" in figure
    assert svg.INK not in figure

    def ids(source):
        return {element.get("id") for element in ET.fromstring(source).iter() if element.get("id")}

    referenced = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', figure))
    assert referenced <= ids(figure)
    assert not ids(figure) & ids(draw("second"))  # two figures of one page do not share definitions


def test_what_is_left_is_drawn_around_zero_with_groups_marked(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "_matrix", lambda name, names, matrix, scale, annotate, label, pixels: drawn.update(locals())
    )
    matrix = np.diag(np.full(6, 9.0)) + 0.1 * (np.arange(6)[:, None] - np.arange(6))
    plots.remainder("x", list("abcdef"), matrix, ["p", "q", "p", "q", "r", "p"])
    assert np.isnan(np.diag(drawn["matrix"])).all() and drawn["scale"].high == -drawn["scale"].low
    assert 0.4 < drawn["scale"].high <= 0.5
    figure = plots.Figure()
    drawn["annotate"](figure.add_axes((0, 0, 1, 1)))
    places = {tuple(place) for place in figure.axes[0].collections[0].get_offsets().astype(int).tolist()}
    assert places == {(0, 2), (2, 0), (0, 5), (5, 0), (2, 5), (5, 2), (1, 3), (3, 1)}
    plots.remainder("x", list("abcdef"), np.zeros((6, 6)), None)
    assert drawn["scale"].high > 0


def test_similarity_colours_are_scaled_off_the_diagonal():
    matrix = np.full((40, 40), 0.5)
    matrix[::2, 1::2] = 0.52
    np.fill_diagonal(matrix, 1.0)
    figure = plots.similarity("x", [str(i) for i in range(40)], matrix)
    labels = [float(text) for text in re.findall(r">(0\.\d+)<", figure)]
    assert 0.49 < min(labels) < max(labels) < 0.53


def test_matrices_name_every_class_or_few():
    for count, named in ((30, 30), (100, 25), (1000, 25)):
        figure = plots.similarity(
            "x", [f"name{i}" for i in range(count)], np.random.default_rng(0).random((count,) * 2)
        )
        assert len(re.findall(">name", figure)) == 2 * named


def test_a_large_matrix_is_drawn_as_means_of_blocks():
    matrix = np.arange(1001.0**2).reshape(1001, 1001)
    np.fill_diagonal(matrix, np.nan)
    small = plots._shrunk(matrix, 500)
    assert small.shape == (334, 334)
    np.testing.assert_allclose(small[1, 2], matrix[3:6, 6:9].mean())
    np.testing.assert_allclose(small[0, 0], np.nanmean(matrix[:3, :3]))
    np.testing.assert_allclose(small[333, 0], matrix[999:, :3].mean())


def test_long_names_are_cut_on_axes():
    figure = plots.confusion("x", ["n" * 100, "b"], np.eye(2))
    assert f">{'n' * 19}…<" in figure
    assert "n" * 21 not in figure
