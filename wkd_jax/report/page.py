"""The page of one run: its headline, numbers and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wkd_jax.report import classes, curves, metric, pictures, plots, text
from wkd_jax.report.elements import Card, Table, template
from wkd_jax.report.read import Run, number

# Entries of result.json that have their place on the page; any other number gets a card of its own.
_PLACED = {
    "student_top1", "student_top5", "teacher_top1", "agreement", "loss", "examples", "steps", "seconds",
    "num_classes", "processes",
    "student_parameters", "teacher_parameters", "method_parameters", "student_overflows", "teacher_overflows",
    *(f"{side}_{key}" for side in ("student", "teacher") for key in metric.COCO),
}  # fmt: skip


def render(run: Run) -> str:
    """The report of a run, as the text of one HTML file that loads nothing.

    Raises:
      ValueError: If what should be a number in the result is none; names the file and the key.
    """
    result = run.result or {}
    return template("page.html").render(
        headline=headline(run),
        finished=run.result is not None,
        step=run.step,
        truncated=run.truncated,
        cards=_cards(run),
        groups=curves.groups(run.curves, _teacher_levels(run)),
        longest=curves.longest(run.curves),
        buckets=plots.BUCKETS,
        coco=_coco(run),
        precision=classes.precision(run.precision) if run.precision else None,
        pictures=pictures.section(run.pictures) if run.pictures and run.pictures.images else None,
        classes=classes.section(run.evaluation) if run.evaluation else None,
        interrelation=_interrelation(run) if run.interrelation else None,
        config=_sections(run.config),
        machine=text.flat(
            {key: result[key] for key in ("devices", "processes", "unreadable_images", "versions") if key in result}
        ),
    )


def _interrelation(run: Run) -> dict[str, Any]:
    settings = run.config.get("interrelation")
    return classes.interrelation(run.interrelation, settings if isinstance(settings, Mapping) else {})


def headline(run: Run) -> dict[str, Any]:
    """Names of the run, its models and methods: from the result or, while there is none, from the config."""
    source = run.result or run.config

    def model(section: Any) -> str | None:
        if not isinstance(section, Mapping):
            return None if section is None else str(section)
        if section.get("train"):  # of a config: a teacher that is trained first
            return model(section["train"].get("student"))
        if section.get("weights"):  # of a config: a teacher that somebody else trained
            return model(section["model"] or section["weights"])
        return str(section.get("name") or section.get("run"))

    methods = source.get("methods") or []
    return {
        "name": str(source.get("name") or run.workdir.resolve().name),
        "student": model(source.get("student")),
        "teacher": model(source.get("teacher")),
        "methods": [str(method) for method in (methods if isinstance(methods, list | Mapping) else [methods])],
    }


def _result(run: Run, key: str) -> float | None:
    """A number of the result; None where it is null or there is no result yet."""
    value = (run.result or {}).get(key)
    if value is not None and number(value) is None:
        raise ValueError(f"{run.workdir / 'result.json'}: {key!r} must be a number, found {value!r}")
    return number(value)


def latest(run: Run, key: str) -> float | None:
    """From the result or, while there is none, the last evaluation; NaN for COCO's -1, where nothing was to find."""
    if run.result is None and (curve := run.curves.get("eval", {}).get(key)):
        value: float | None = float(curve.values[-1])
    else:
        value = _result(run, key)
    return math.nan if value == -1 else value


def _teacher_levels(run: Run) -> dict[str, float | None]:
    """Curve of the student -> the same number of the teacher."""
    keys = (run.metric.key, *run.metric.more)
    return {f"student_{key}": latest(run, f"teacher_{key}") for key in keys}


def _cards(run: Run) -> list[Card]:
    """The numbers at the top."""
    of = run.metric
    student, teacher, agreement = (latest(run, key) for key in (of.student, of.teacher, "agreement"))
    remarks = []
    evaluated = run.curves.get("eval", {})
    if run.result is None and of.student in evaluated:
        remarks.append(f"at step {evaluated[of.student].steps[-1]:,}")
    for key, name in of.more.items():
        if (value := _result(run, f"student_{key}")) is not None:
            remarks.append(f"{name} {text.fixed(value)}\u00a0%")
    best = (run.result or {}).get("best") or {}
    if of.student in best:
        remarks.append(f"best {text.fixed(best[of.student])}\u00a0% at step {best['step']:,}")
    cards = []
    if student is not None:
        cards.append(Card(f"Student {of.name}", f"{text.fixed(student)}\u00a0%", " · ".join(remarks)))
    if teacher is not None:
        cards.append(Card(f"Teacher {of.name}", f"{text.fixed(teacher)}\u00a0%"))
    if student is not None and teacher is not None:
        cards.append(Card("Gap", text.signed(student - teacher), "points, student − teacher"))
    if agreement is not None:
        cards.append(Card("Agreement", f"{text.fixed(agreement)}\u00a0%", "same prediction as the teacher"))
    return cards + _effort(run)


def _coco(run: Run) -> dict[str, Any] | None:
    """COCO's twelve numbers, and the images of which detections may be missing; None for another kind of run."""
    if run.metric is not metric.AP:
        return None
    head, rows = ["number", "what", "student %"], []
    with_teacher = latest(run, metric.AP.teacher) is not None
    head += ["teacher %", "difference"] if with_teacher else []
    for key, what in metric.COCO.items():
        student, teacher = (latest(run, f"{side}_{key}") for side in ("student", "teacher"))
        row = [key, what, text.fixed(student)]
        if with_teacher:
            known = student is not None and teacher is not None
            row += [text.fixed(teacher), text.signed(student - teacher) if known else "–"]
        rows.append(row)
    overflows = {side: latest(run, f"{side}_overflows") for side in ("student", "teacher")}
    return {
        "table": Table("COCO's twelve numbers", head, rows, 2),
        "overflows": ", ".join(f"{side} {count:,.0f}" for side, count in overflows.items() if count),
    }


def _effort(run: Run) -> list[Card]:
    """What the run took, and numbers of the result that have no place of their own."""
    steps, seconds = _result(run, "steps"), _result(run, "seconds")
    epochs = "" if run.epoch is None else f"{run.epoch:.4g} epochs"
    if run.result is None and run.config.get("steps"):
        epochs = f"of {run.config['steps']:,} · {run.epoch or 0:.4g} epochs"
    elif run.result is None and "epochs" in run.config:
        epochs = f"{run.epoch or 0:.4g} of {run.config['epochs']} epochs"
    cards = [Card("Steps", f"{run.step if steps is None else steps:,.0f}", epochs)]
    if seconds is not None:
        cards.append(Card("Time", text.duration(seconds)))
    if (size := _result(run, "student_parameters")) is not None:
        others = {"teacher": _result(run, "teacher_parameters"), "methods": _result(run, "method_parameters")}
        remark = " · ".join(f"{owner} {text.compact(count)}" for owner, count in others.items() if count)
        cards.append(Card("Student parameters", text.compact(size), remark))
    for key, value in (run.result or {}).items():
        if key not in _PLACED and number(value) is not None:
            cards.append(Card(key.replace("_", " "), f"{number(value):.6g}"))
    return cards


def _sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The config by top-level section, single settings first."""
    single = {key: value for key, value in config.items() if not (isinstance(value, Mapping) and value)}
    return [("run", text.flat(single))] + [(key, text.flat(config[key])) for key in config if key not in single]
