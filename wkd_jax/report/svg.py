"""Turns a Matplotlib figure into a small inline SVG that takes its font, ink and grid colours from the page.

Text stays text, identifiers are distinct from figure to figure, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure

# Colours that stand for the page's own, which differ between a light and a dark screen.
INK, GRID = "#010203", "#040506"
_PAGE_COLOURS = {INK: "currentColor", GRID: "var(--grid)"}

# Mid-tones, readable on white and on near-black.
STUDENT, TEACHER, NEUTRAL, ALARM = "#3b82c4", "#e0812f", "#8a8f98", "#d83a3a"
SERIES = (STUDENT, "#2a9d6f", "#b565c9", TEACHER, "#c9a227", "#5aa9a3", "#c9607f", "#7b7fd4")

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib; measures the layout, the page's font is drawn
    "font.size": 10,
    "text.parse_math": False,  # a class may be called "$"
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
}
_RASTER_DPI = 180  # of the dense parts, at 72 units an inch


def draw(name: str, width: float, height: float, paint: Callable[[Figure], None], *, label: str) -> Markup:
    """Draws a figure.

    Args:
      name: Distinct within a page; makes the identifiers inside the figure distinct.
      width: In CSS pixels at natural size; the page may scale the figure.
      height: In CSS pixels.
      paint: Draws into an empty figure.
      label: What the figure shows, for screen readers.

    Returns:
      An `<svg>` element, safe to insert into HTML.
    """
    style = {**_STYLE, "svg.hashsalt": ascii(name)}
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the page's font draws the text
        figure = Figure(figsize=(width / 72, height / 72))
        paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, dpi=_RASTER_DPI, metadata={"Date": None})
    return Markup(_inline(buffer.getvalue(), label))


def plain(text: str, limit: int = 28) -> str:
    r"""`text` fit for a figure: one line of at most `limit` characters, without those that XML forbids.

    Example:
      >>> plain("a\nb"), plain("great white shark", 8)
      ('a b', 'great w…')
    """
    text = " ".join(text.split())
    text = "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cs", "Cn") else char for char in text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def ems(text: str) -> float:
    """The width of a text in font sizes, about: the page's font is not known here."""
    return sum(1.05 if unicodedata.east_asian_width(char) in "WF" else 0.58 for char in text)


def _inline(source: bytes, label: str) -> str:
    """Matplotlib's SVG document as an element of an HTML page: no namespaces, metadata, fixed size or style sheet."""
    root = ET.fromstring(source)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            if key == "style":
                value = _style(value)
            elif key in ("d", "x", "y"):
                value = _rounded(value)
            if key != "id" or not re.fullmatch(r"[\w.]+_\d+", value):  # figure_1 and such: unreferenced
                element.attrib[key.rpartition("}")[2]] = value
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key)
    root.attrib |= {"class": "plot", "role": "img", "aria-label": plain(label, 200)}
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _style(value: str) -> str:
    for colour, replacement in _PAGE_COLOURS.items():
        value = value.replace(colour, replacement)
    return value


def _rounded(numbers: str) -> str:
    """Coordinates to a hundredth of a pixel."""
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), numbers)
