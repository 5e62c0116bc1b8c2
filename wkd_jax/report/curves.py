"""The curves of a report: which quantities are drawn, in which groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wkd_jax.report import plots
from wkd_jax.report.elements import Figure
from wkd_jax.report.read import Curve

Curves = Mapping[str, Curve]

# Of evaluations, what the overview shows: the student's curve -> its caption.
_HEADLINES = {
    "student_top1": "top-1 accuracy in evaluation, %",
    "student_AP": "AP in evaluation, %",
    "student_AP50": "AP50 in evaluation, %",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Figures under one title."""

    title: str
    figures: Sequence[Figure]
    remark: str = ""


def groups(curves: Mapping[str, Curves], teacher: Mapping[str, float | None]) -> list[Group]:
    """All logged quantities as figures; nothing that was logged is left out.

    A quantity "method/term" of the training log is a loss term if "method/term/weight" is logged too, and otherwise one
    that is watched and not trained on.

    Args:
      curves: Kind of record -> quantity -> curve.
      teacher: The student's curve -> the teacher's value, percent, drawn as a level beside it; None or absent where it
        is not known.
    """
    train = dict(curves.get("train", {}))
    weighted = {key: _product(train[key], train[f"{key}/weight"]) for key in train if f"{key}/weight" in train}
    terms = [key for key, curve in weighted.items() if curve.steps.size]
    evaluated = {
        (key if kind == "eval" else f"{kind}: {key}"): curve
        for kind, named in curves.items()
        for key, curve in named.items()
        if kind != "train"
    }

    overview = []
    if total := train.pop("total", None):
        overview.append(_figure("total loss", {"total": total}, scale="log"))
    if len(terms) > 1:
        overview.append(_figure("weight × term, all terms", {key: weighted[key] for key in terms}))
    for key, caption in _HEADLINES.items():
        if curve := evaluated.pop(key, None):
            value = teacher.get(key)
            level = None if value is None else ("teacher", value)
            overview.append(_figure(caption, {"student": curve}, level=level))
    rows = []
    for key in terms:
        rows.append(_figure(key, {key: train.pop(key)}, scale="log"))
        rows.append(_figure(f"{key}: its weight", {key: train.pop(f"{key}/weight")}))
        rows.append(_figure(f"{key}: weight × term", {key: weighted[key]}))
    watched = {key: train.pop(key) for key in list(train) if "/" in key}
    constants = {key: curve for key, curve in evaluated.items() if (curve.values == curve.values[0]).all()}
    found = [
        Group("Overview", overview),
        Group("Loss terms", rows, "A row each: the term, its weight, and what it adds to the total loss."),
        Group("Watched, not trained on", _singles(watched, scale="log")),
        Group("Optimisation", _singles(train, scale="log")),
        Group(
            "Evaluation",
            _singles({key: curve for key, curve in evaluated.items() if key not in constants}),
            _remark(constants),
        ),
    ]
    return [group for group in found if group.figures or group.title == "Evaluation" and group.remark]


def _remark(constants: Curves) -> str:
    """What is said of quantities that do not change, and are not drawn."""
    said = []
    for words, several in (("At the only evaluation", False), ("The same in every evaluation", True)):
        named = [
            f"{key} {curve.values[0]:.6g}" for key, curve in constants.items() if (curve.values.size > 1) == several
        ]
        if named:
            said.append(f"{words}: {', '.join(named)}.")
    return " ".join(said)


def longest(curves: Mapping[str, Curves]) -> int:
    """Points of the longest curve."""
    return max((curve.values.size for kind in curves.values() for curve in kind.values()), default=0)


def _singles(curves: Curves, **how: Any) -> list[Figure]:
    return [_figure(key, {key: curve}, **({} if key == "learning_rate" else how)) for key, curve in curves.items()]


def _figure(caption: str, lines: Curves, **how: Any) -> Figure:
    """A figure; its caption says how many points of it are not finite."""
    drawing = plots.curves(caption, lines, **how)
    broken = sum(int((~np.isfinite(curve.values)).sum()) for curve in lines.values())
    points = f"{broken:,} point{'s' * (broken > 1)} not finite, marked in red"
    return Figure(f"{caption} ({points})" if broken else caption, drawing)


def _product(values: Curve, weights: Curve) -> Curve:
    """Weight times value, at the steps that have both."""
    steps, first, second = np.intersect1d(values.steps, weights.steps, assume_unique=True, return_indices=True)
    with np.errstate(invalid="ignore", over="ignore"):
        return Curve(steps, values.values[first] * weights.values[second])
