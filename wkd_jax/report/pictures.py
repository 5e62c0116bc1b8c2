"""Drawn detections: ground truth, teacher and student side by side, boxes over an image that the page holds once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from wkd_jax.report import svg
from wkd_jax.report.elements import Figure
from wkd_jax.report.read import Box, Picture, Pictures

SIDE = 360  # CSS pixels of the longer side of a drawing
_FONT = 11  # of the labels, CSS pixels
_SIDES = {
    "truth": ("Ground truth", "Ground truth of image {}"),
    "teacher": ("Teacher", "The teacher's detections in image {}"),
    "student": ("Student", "The student's detections in image {}"),
}  # caption, and what a screen reader says


def section(pictures: Pictures) -> dict[str, Any]:
    """All pictures.

    Returns:
      `score`, the least score of the drawn detections; `crowds`, whether there are any; `rows`, one an image: its
      `name`, its `panels`, and its `legend`: (colour, class, how many boxes of it each panel has).
    """
    boxes = [box for picture in pictures.images for side in picture.boxes.values() for box in side]
    return {
        "score": f"{pictures.score:g}",
        "crowds": any(box.crowd for box in boxes),
        "rows": [_row(number, picture) for number, picture in enumerate(pictures.images)],
    }


def _row(number: int, picture: Picture) -> dict[str, Any]:
    sides = {side: picture.boxes[side] for side in _SIDES if side in picture.boxes}
    counts = {side: Counter(box.name for box in boxes) for side, boxes in sides.items()}
    names = list(dict.fromkeys(box.name for boxes in sides.values() for box in boxes))
    colours = {name: svg.SERIES[i % len(svg.SERIES)] for i, name in enumerate(names)}
    panels = []
    for i, (side, boxes) in enumerate(sides.items()):
        caption, spoken = _SIDES[side]
        said = ", ".join(f"{count} {name}" for name, count in counts[side].items()) or "none"
        label = f"{spoken.format(picture.image_id)}: {said}"
        drawing = draw(f"picture-{number}", picture, boxes, colours, label=label, again=i > 0)
        panels.append(Figure(f"{caption} ({len(boxes)})", drawing))
    legend = [
        (colours[name], name, ", ".join(f"{side} {counts[side][name]}" for side in sides if counts[side][name]))
        for name in names
    ]
    return {"name": f"Image {picture.image_id}", "panels": panels, "legend": legend}


def draw(
    name: str, picture: Picture, boxes: Sequence[Box], colours: Mapping[str, str], *, label: str, again: bool = False
) -> Markup:
    """Draws an image with boxes, each with its class and score; the likely ones above the others.

    Args:
      name: Identifier of the image within the page.
      picture: The image.
      boxes: What to draw in it.
      colours: Class -> colour.
      label: What the drawing shows, for screen readers.
      again: Whether an earlier drawing of the page holds the image under this name; this one then refers to it.

    Returns:
      An `<svg>` element, safe to insert into HTML. Its longer side has `SIDE` units.
    """
    scale = SIDE / max(picture.size)
    width, height = (round(side * scale, 1) for side in picture.size)
    if again:
        image = Markup('<use href="#{}"/>').format(name)
    else:
        image = Markup(
            '<image id="{}" width="{}" height="{}" preserveAspectRatio="none" href="data:image/jpeg;base64,{}"/>'
        ).format(name, width, height, picture.jpeg)
    order = sorted(boxes, key=lambda box: box.score or 0.0)
    outlines = [_outline(box, scale, colours[box.name]) for box in order]
    labels = [_label(box, scale, width) for box in order]
    return Markup(
        '<svg class="picture" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">'
    ).format(width, height, svg.plain(label, 300)) + Markup("").join([image, *outlines, *labels, Markup("</svg>")])


def _outline(box: Box, scale: float, colour: str) -> Markup:
    """The box's edge on a dark rim, so that it is seen on any image. Crowds are dashed."""
    x, y, width, height = (f"{scale * value:.1f}" for value in box.place)
    rectangle = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"{}/>')
    dashes = Markup(' stroke-dasharray="7 5"') if box.crowd else ""
    rim = rectangle.format("rim", x, y, width, height, dashes)
    edge = rectangle.format("edge", x, y, width, height, dashes + Markup(' stroke="{}"').format(colour))
    return Markup("<g><title>{}</title>{}{}</g>").format(_words(box, 100), rim, edge)


def _label(box: Box, scale: float, width: float) -> Markup:
    """The class and the score, above the box where there is room, and within the image's sides."""
    words = _words(box, 24)
    left, top = (scale * value for value in box.place[:2])
    anchor = "start"
    if left + _FONT * svg.ems(words) > width:
        anchor, left = "end", min(scale * (box.place[0] + box.place[2]), width - 2)
    baseline = top - 4 if top > _FONT + 4 else top + _FONT + 2
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        max(left, 2), baseline, anchor, words
    )


def _words(box: Box, limit: int) -> str:
    name = svg.plain(box.name, limit)
    return f"{name} (crowd)" if box.crowd else name if box.score is None else f"{name} {box.score:.2f}"
