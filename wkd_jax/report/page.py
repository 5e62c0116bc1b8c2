"""The page of a report: its headline, numbers and settings, and the template that holds it all."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from wkd_jax.report import classes, curves, plots, text
from wkd_jax.report.elements import Card
from wkd_jax.report.read import Run, number

# Entries of result.json that have their place on the page; any other number gets a card of its own.
_PLACED = {
    "student_top1", "student_top5", "teacher_top1", "agreement", "loss", "examples", "steps", "seconds", "num_classes",
    "student_parameters", "teacher_parameters", "method_parameters",
}  # fmt: skip


def render(run: Run) -> str:
    """The report of a run, as the text of one HTML file that loads nothing.

    Raises:
      ValueError: If what should be a number in the result is none; names the file and the key.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result = run.result or {}
    return environment.get_template("template.html").render(
        headline=_headline(run),
        finished=run.result is not None,
        step=run.step,
        truncated=run.truncated,
        cards=_cards(run),
        groups=curves.groups(run.curves, _teacher_top1(run)),
        longest=curves.longest(run.curves),
        buckets=plots.BUCKETS,
        classes=classes.section(run.evaluation) if run.evaluation else None,
        interrelation=classes.interrelation(run.interrelation) if run.interrelation else None,
        config=_sections(run.config),
        machine=text.flat(
            {key: result[key] for key in ("devices", "processes", "unreadable_images", "versions") if key in result}
        ),
    )


def _headline(run: Run) -> dict[str, Any]:
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


def _teacher_top1(run: Run) -> float | None:
    """Percent, from the result or, while there is none, from the last evaluation."""
    if run.result is None and (curve := run.curves.get("eval", {}).get("teacher_top1")):
        return float(curve.values[-1])
    return _result(run, "teacher_top1")


def _cards(run: Run) -> list[Card]:
    """The numbers at the top."""
    student, teacher, agreement = _result(run, "student_top1"), _teacher_top1(run), _result(run, "agreement")
    remarks = []
    evaluated = run.curves.get("eval", {})
    if run.result is None and "student_top1" in evaluated:
        student = float(evaluated["student_top1"].values[-1])
        agreement = float(evaluated["agreement"].values[-1]) if "agreement" in evaluated else None
        remarks.append(f"at step {evaluated['student_top1'].steps[-1]:,}")
    if (top5 := _result(run, "student_top5")) is not None:
        remarks.append(f"top-5 {text.fixed(top5)}\u00a0%")
    best = (run.result or {}).get("best") or {}
    if "student_top1" in best:
        remarks.append(f"best {text.fixed(best['student_top1'])}\u00a0% at step {best['step']:,}")
    cards = []
    if student is not None:
        cards.append(Card("Student top-1", f"{text.fixed(student)}\u00a0%", " · ".join(remarks)))
    if teacher is not None:
        cards.append(Card("Teacher top-1", f"{text.fixed(teacher)}\u00a0%"))
    if student is not None and teacher is not None:
        cards.append(Card("Gap", text.signed(student - teacher), "points, student − teacher"))
    if agreement is not None:
        cards.append(Card("Agreement", f"{text.fixed(agreement)}\u00a0%", "same prediction as the teacher"))
    return cards + _effort(run)


def _effort(run: Run) -> list[Card]:
    """What the run took, and numbers of the result that have no place of their own."""
    steps, seconds = _result(run, "steps"), _result(run, "seconds")
    epochs = "" if run.epoch is None else f"{run.epoch:.4g} epochs"
    if run.result is None and "epochs" in run.config:
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
