"""The page of several runs: what they reached, their curves on top of each other, and where their configs differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from wkd_jax import config as config_lib
from wkd_jax.report import classes, compare, metric, page, plots, text
from wkd_jax.report.compare import FINISHED, UNFINISHED, Entry
from wkd_jax.report.curves import longest
from wkd_jax.report.elements import Card, Figure, Table, template
from wkd_jax.report.metric import Metric
from wkd_jax.report.read import Curve, Run, number

_WRITTEN_OUT = 20  # settings of a section that only some runs have, up to which they are all shown
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run, and how the page tells it from others.

    Attributes:
      run: As read.
      link: Of its own report, relative to the page; None where it has none.
      label: Its name, distinct on the page.
      group: Label of the runs that differ from it in seeds alone; its own where there are none.
      style: Of its lines and dots.
      swatch: The style, drawn.
    """

    run: Run
    link: str | None
    label: str
    group: str
    style: plots.Style
    swatch: Markup

    def latest(self, key: str) -> float | None:
        """A number of the result or, while there is none, of the last evaluation; None where it is not known."""
        value = page.latest(self.run, key)
        return None if value is None or math.isnan(value) else value


def render(runs: Sequence[Run], links: Sequence[str | None]) -> str:
    """The page of several runs, as the text of one HTML file that loads nothing.

    Runs of different metrics, as of classification and of detection, are apart from each other. The page does not
    depend on the order in which the runs are given.

    Args:
      runs: At least one; each once.
      links: Of each, its own report, relative to the page; None where it has none.

    Raises:
      ValueError: If a config is not of a run of this version, or what should be a number in a result is none; names
        the file.
    """
    order = sorted(range(len(runs)), key=lambda i: _rank(runs[i]))
    shown = _shown([runs[i] for i in order], [links[i] for i in order])
    done = sum(run.result is not None for run in runs)
    parts = [(of, [each for each in shown if _metric(each.run) is of]) for of in (metric.TOP1, metric.AP)]
    return template("several.html").render(
        title=f"Comparison of {len(runs)} run{'s' * (len(runs) > 1)}",
        methods=list(dict.fromkeys(_methods(each.run) for each in shown)),
        status=f"{done} finished" + (f", {len(runs) - done} unfinished" if done < len(runs) else ""),
        all_finished=done == len(runs),
        truncated=[each.label for each in shown if each.run.truncated],
        longest=max(longest(run.curves) for run in runs),
        buckets=plots.BUCKETS,
        parts=[_part(of, some) for of, some in parts if some],
    )


def _metric(run: Run) -> Metric:
    """What a run is measured by. While it was not evaluated, nothing but its task tells."""
    task = run.config.get("task")
    return metric.AP if isinstance(task, Mapping) and task.get("name") == "detection" else run.metric


def _rank(run: Run) -> tuple[Any, ...]:
    """Sorts runs: by metric; of one, the finished by their last number, then the unfinished, then those without any."""
    of = _metric(run)
    value = page.latest(run, of.student)
    reached = -math.inf if value is None or math.isnan(value) else value
    return of is metric.AP, reached == -math.inf, run.result is None, -reached, str(run.workdir.resolve())


def _shown(runs: Sequence[Run], links: Sequence[str | None]) -> list[Shown]:
    """The runs with labels, groups and styles."""
    labels = _labels(runs)
    kinds = [_without_seeds(run) for run in runs]
    first = {kind: i for i, kind in reversed([*enumerate(kinds)])}
    leaders = sorted(first.values())  # the first run of each group
    names = [page.headline(runs[i])["name"] for i in leaders]
    groups = {
        kinds[i]: name if kinds.count(kinds[i]) > 1 and names.count(name) == 1 else labels[i]
        for i, name in zip(leaders, names, strict=True)
    }
    styles = plots.styles([leaders.index(first[kind]) for kind in kinds])
    return [
        Shown(run, link, label, groups[kind], style, plots.swatch(label, style))
        for run, link, label, kind, style in zip(runs, links, labels, kinds, styles, strict=True)
    ]


def _labels(runs: Sequence[Run]) -> list[str]:
    """A distinct name of each run: the shortest of its name, that with its seed, its directory, and its path."""
    choices = [
        (name := page.headline(run)["name"], f"{name}, seed {run.config.get('seed')}", run.workdir.resolve().name)
        + (str(run.workdir),)
        for run in runs
    ]
    chosen = [0] * len(runs)
    while True:
        labels = [names[i] for names, i in zip(choices, chosen, strict=True)]
        again = [k for k, label in enumerate(labels) if labels.count(label) > 1 and chosen[k] < 3]
        if not again:
            return labels
        for k in again:
            chosen[k] += 1


def _without_seeds(run: Run) -> str:
    """What a run computes but for its seed and those of the runs that make its teacher."""
    try:
        leaves = text.flat(config_lib.identity(run.config))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.workdir / 'config.json'}: not of a run of this version ({error!r})") from error
    return str([leaf for leaf in leaves if leaf[0].replace("teacher.train.", "") != "seed"])


def _part(of: Metric, shown: Sequence[Shown]) -> dict[str, Any]:
    """All that is said of the runs of one metric."""
    entries = [
        Entry(
            method=each.group,
            seed=each.run.config["seed"],
            workdir=each.label,
            status=UNFINISHED if each.run.result is None else FINISHED,
            result=each.run.result,
        )
        for each in shown
    ]
    return {
        "metric": of,
        "runs": shown,
        "cards": _cards(of, shown),
        "table": [_row(of, each) for each in shown],
        "seeds": _seeds(of, entries),
        "notes": [line.replace("`", "") for line in compare.made_with(entries)],
        "alike": len({each.style for each in shown}) < len(shown),
        "groups": _curves(of, shown),
        "classes": _classes(of, shown),
        "differences": _differences([each.run.config for each in shown]),
    }


def _cards(of: Metric, shown: Sequence[Shown]) -> list[Card]:
    """The numbers at the top."""
    known = [(value, each) for each in shown if each.run.result and (value := each.latest(of.student)) is not None]
    if not known:
        return []
    best, worst = known[0], known[-1]
    cards = [Card(f"Best {of.name}", f"{text.fixed(best[0])}\u00a0%", best[1].label)]
    if len(known) > 1:
        cards.append(Card(f"Worst {of.name}", f"{text.fixed(worst[0])}\u00a0%", worst[1].label))
        cards.append(Card("Range", text.fixed(best[0] - worst[0]), f"points, {len(known)} finished runs"))
    return cards


def _row(of: Metric, each: Shown) -> dict[str, Any]:
    """A run's line of the table."""
    run, headline = each.run, page.headline(each.run)
    best, step = _best(of, run)
    seconds = number((run.result or {}).get("seconds"))
    return {
        "shown": each,
        "directory": run.workdir.resolve().name,
        "methods": _methods(run),
        "seed": str(run.config["seed"]),
        "student": headline["student"] or "–",
        "teacher": headline["teacher"] or "–",
        "last": text.fixed(each.latest(of.student)),
        "best": text.fixed(best),
        "best_step": "" if step is None else f"at step {step:,}",
        "teacher_last": "" if (value := each.latest(of.teacher)) is None else text.fixed(value),
        "beside": [text.fixed(each.latest(key)) for key in of.beside],
        "steps": f"{run.step:,}",
        "time": "–" if seconds is None else text.duration(seconds),
        "state": _state(run),
        "finished": run.result is not None,
    }


def _methods(run: Run) -> str:
    return " + ".join(page.headline(run)["methods"]) or "none"


def _best(of: Metric, run: Run) -> tuple[float | None, int | None]:
    """The best evaluation and its step: as the result has it or, while there is none, of those so far."""
    if run.result is not None:
        best = run.result.get("best") or {}
        return number(best.get(of.student)), best.get("step")
    curve = run.curves.get("eval", {}).get(of.student)
    if curve is None or not np.isfinite(curve.values).any():
        return None, None
    place = int(np.nanargmax(np.where(np.isfinite(curve.values), curve.values, np.nan)))
    return float(curve.values[place]), int(curve.steps[place])


def _state(run: Run) -> str:
    """Whether a run is finished, or how far it is."""
    if run.result is not None:
        return "finished"
    if steps := run.config.get("steps"):
        return f"unfinished, {run.step:,} of {steps:,} steps"
    return f"unfinished, {run.epoch or 0:.3g} of {run.config['epochs']} epochs"


def _seeds(of: Metric, entries: Sequence[Entry]) -> Table | None:
    """Mean and spread of the runs that differ in seeds alone; None where no two do."""
    groups = {group: row for group, row in compare.by_method(entries).items() if len(row) > 1}
    if not groups:
        return None
    rows = []
    for group, row in groups.items():
        columns = []
        for path in ((of.student,), ("best", of.student), *((key,) for key in of.beside)):
            found = [number(compare.look_up(run, *path)) for run in compare.finished(row)]
            columns.append(compare.mean_spread([value for value in found if value is not None]))
        (mean, spread), (best, _), *beside = columns
        seeds = ", ".join(str(run.seed) for run in sorted(row, key=lambda run: run.seed))
        finished = f"{len(compare.finished(row))} of {len(row)}"
        numbers = (mean, spread, best, *(value for value, _ in beside))
        rows.append([group, seeds, finished, *map(text.fixed, numbers)])
    head = ["runs", "seeds", "finished", f"mean {of.name}, last, %", "spread", f"mean {of.name}, best, %"]
    head += [f"mean {column}" for column in of.beside.values()]
    return Table("Runs that differ in their seeds alone", head, rows, 2)


def _curves(of: Metric, shown: Sequence[Shown]) -> list[tuple[str, list[Figure], str]]:
    """Figures that several runs share, as (title, figures, remark)."""
    names = (of.student, *(f"student_{key}" for key in of.more), "agreement", "loss")
    evaluated = {key: lines for key in names if (lines := _lines(shown, "eval", key))}
    headline = evaluated.pop(of.student, {})
    captions = {f"student_{key}": f"{name} in evaluation, %" for key, name in {of.key: of.name, **of.more}.items()}
    captions |= {"agreement": "agreement in evaluation, %", "loss": "loss in evaluation"}
    found = {of.student: headline} if headline else {}
    found |= {key: lines for key, lines in evaluated.items() if len(lines) > 1}
    evaluation = [_figure(captions[key], lines, shown) for key, lines in found.items()]

    logged = dict.fromkeys(key for each in shown for key in each.run.curves.get("train", {}))
    losses = [key for key in logged if key == "total" or f"{key}/weight" in logged]
    losses.sort(key=lambda key: key != "total")
    training = [
        _figure("total loss" if key == "total" else key, lines, shown, scale="log")
        for key in losses
        if len(lines := _lines(shown, "train", key)) > 1
    ]
    rates = _lines(shown, "train", "learning_rate")
    differ = len({(curve.steps.tobytes(), curve.values.tobytes()) for curve in rates.values()}) > 1
    return [
        group
        for group in (
            ("Evaluation", evaluation, ""),
            (
                "Training losses",
                training,
                "Those that at least two runs have. A total is the sum of a run's own weighted terms: totals of "
                "different methods or weights do not compare.",
            ),
            ("Learning rate", [_figure("learning rate", rates, shown)] if differ else [], ""),
        )
        if group[1]
    ]


def _lines(shown: Sequence[Shown], kind: str, key: str) -> dict[str, Curve]:
    """Label -> curve of the runs that have it."""
    return {each.label: each.run.curves[kind][key] for each in shown if key in each.run.curves.get(kind, {})}


def _figure(caption: str, lines: Mapping[str, Curve], shown: Sequence[Shown], **how: Any) -> Figure:
    """A figure without a legend; its caption says which runs have points that are not finite."""
    look = {each.label: each.style for each in shown}
    broken = {label: int((~np.isfinite(curve.values)).sum()) for label, curve in lines.items()}
    marked = "; ".join(f"{count:,} of {label}" for label, count in broken.items() if count)
    drawing = plots.curves(caption, lines, look=look, **how)
    return Figure(f"{caption} (points not finite, marked in red: {marked})" if marked else caption, drawing)


def _classes(of: Metric, shown: Sequence[Shown]) -> dict[str, Any] | None:
    """The students by class; None unless at least two runs have that.

    Returns:
      `measure`; `differ`: whether the runs are of different classes, and then nothing else. `absent`: labels of the
      runs without numbers by class. `figure` (None where the classes are too many), `runs`, `rows` of the table and
      `everything`, those of all classes (None where `rows` has them).
    """
    found = {each.label: known for each in shown if (known := _by_class(each.run))}
    if len(found) < 2:
        return None
    measure = "AP" if of is metric.AP else "accuracy"
    names = next(iter(found.values()))[0]
    if any(list(other) != list(names) for other, _ in found.values()):
        return {"measure": measure, "differ": True}
    numbers = {label: values for label, (_, values) in found.items()}
    matrix = np.stack([*numbers.values()])  # [runs, C]
    known = np.isfinite(matrix)
    mean = np.where(known, matrix, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    spans = np.where(known, matrix, -np.inf).max(axis=0) - np.where(known, matrix, np.inf).min(axis=0)

    def table(order: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "name": names[i],
                "cells": [
                    (text.fixed(value, 1), spans[i] > 0 and value == np.nanmax(matrix[:, i])) for value in matrix[:, i]
                ],
                "range": text.fixed(spans[i], 1) if known[:, i].any() else "–",
            }
            for i in order
        ]

    hardest = [int(i) for i in np.argsort(mean, kind="stable")]  # NaN last
    long = len(names) > plots.BARS
    figure = None
    if not long:
        look = {each.label: each.style for each in shown}
        ordered = {label: values[hardest] for label, values in numbers.items()}
        drawing = plots.by_class_and_run("classes", [names[i] for i in hardest], ordered, look, measure=measure)
        figure = Figure(f"The students' {measure} by class, hardest first", drawing)
    apart = [int(i) for i in np.argsort(-spans, kind="stable") if known[:, i].any()][: classes.EXTREMES]
    return {
        "measure": measure,
        "differ": False,
        "absent": [each.label for each in shown if each.label not in found],
        "figure": figure,
        "runs": [each for each in shown if each.label in found],
        "rows": table(apart if long else hardest),
        "everything": table(hardest) if long else None,
        "extremes": classes.EXTREMES,
    }


def _by_class(run: Run) -> tuple[Sequence[str], np.ndarray] | None:
    """Class names and the student's percentage of each, NaN where it has no examples; None where it is not known."""
    if run.precision:
        return run.precision.class_names, run.precision.student
    if run.evaluation:
        return run.evaluation.class_names, classes.percent(run.evaluation.student_correct, run.evaluation.count)
    return None


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys on which configs differ, each with its value in every config.

    A section that only some have is one row: its settings or, of a long one, how many, and then those of its keys on
    which the configs that have it differ.

    Example:
      >>> _differences([{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, {"a": 1, "b": None}])
      [('b', ['c 2', 'c 3', 'null'])]
    """
    return [(path, [cells.get(i, "–") for i in range(len(configs))]) for path, cells in _rows(dict(enumerate(configs)))]


def _rows(values: Mapping[int, Any], path: str = "") -> list[tuple[str, dict[int, str]]]:
    """The rows of a key and below it; `values` has those of the configs that may have it, by their places."""
    first, *others = values.values()
    if all(value == first for value in others):
        return []
    if all(isinstance(value, Mapping) for value in values.values()):
        keys = dict.fromkeys(key for value in values.values() for key in value)
        return [
            row
            for key in keys
            for row in _rows({i: value.get(key, _ABSENT) for i, value in values.items()}, f"{path}.{key}".lstrip("."))
        ]
    long = {i: value for i, value in values.items() if _size(value) > _WRITTEN_OUT}
    return [(path, {i: _written(value) for i, value in values.items()}), *(_rows(long, path) if long else [])]


def _size(value: Any) -> int:
    """Settings in a section; 0 for anything else."""
    return len(text.flat(value)) if isinstance(value, Mapping) else 0


def _written(value: Any) -> str:
    """A setting, or a section of settings, in a cell."""
    if value is _ABSENT:
        return "–"
    if not _size(value):
        return text.leaf(value)
    if _size(value) > _WRITTEN_OUT:
        return f"({_size(value)} settings)"
    return "\n".join(f"{key} {setting}" for key, setting in text.flat(value))
