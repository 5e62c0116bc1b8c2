"""The figure of a comparison: every run a dot, each method's mean and spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from wkd_jax.report import svg
from wkd_jax.report.compare import mean_spread

_WIDTH, _ROW = 540, 26
_INK, _GRID, _PAPER = "#1f2328", "#d0d7de", "#ffffff"  # the file stands alone: no page gives it its colours


def draw(title: str, values: Mapping[str, Sequence[float]], baseline: str | None) -> str:
    """Draws one row a method, the largest mean on top.

    Args:
      title: What the numbers are.
      values: Method -> the values of its runs, at least one of each.
      baseline: The method whose mean gets a line through the figure; None, or one without runs, for no line.

    Returns:
      An SVG file. Equal input gives equal bytes.
    """
    order = sorted(values, key=lambda method: (-(mean_spread(values[method])[0] or 0), method))
    height = 58 + _ROW * len(order)
    left = 16 + 6.6 * max(len(svg.plain(method)) for method in order)

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((left / _WIDTH, 44 / height, (_WIDTH - left - 16) / _WIDTH, (height - 58) / height))
        for y, method in enumerate(order):
            mean, spread = mean_spread(values[method])
            runs = values[method]
            dots = {"color": svg.STUDENT, "markersize": 5, "alpha": 0.6, "markeredgewidth": 0}
            axes.plot(runs, [y] * len(runs), "o", zorder=3, **dots)
            axes.errorbar(
                mean, y, xerr=spread or 0, fmt="D", color=svg.STUDENT, markersize=6, elinewidth=1.6, capsize=4
            )
        if baseline in values:
            mean = mean_spread(values[baseline])[0]
            axes.axvline(mean, color=svg.TEACHER, linestyle=(0, (5, 3)), linewidth=1.2, zorder=0)
        axes.set_yticks(range(len(order)), [svg.plain(method) for method in order])
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.margins(x=0.06)
        axes.set_xlabel(title)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    drawing = str(svg.draw(title, _WIDTH, height, paint, label=f"{title}: {', '.join(order)}"))
    paper = f'<rect width="100%" height="100%" fill="{_PAPER}"/>'
    opening, rest = drawing.split(">", 1)
    opening = opening.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"', 1)
    for page, alone in (("currentColor", _INK), ("var(--grid)", _GRID), ("'DejaVu Sans'", "'DejaVu Sans', sans-serif")):
        rest = rest.replace(page, alone)
    return f"{opening}>{paper}{rest}\n"
