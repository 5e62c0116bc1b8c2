"""The table of a comparison: several methods, several seeds of each, as Markdown and as CSV.

Knows nothing of JAX. Equal runs give equal bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wkd_jax.report import text
from wkd_jax.report.published import Table

FINISHED, FAILED, UNFINISHED, MISSING = "finished", "failed", "unfinished", "missing"
_REASON = 200  # characters of a reason in the table; the CSV file has all of it


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a comparison, made or not.

    Attributes:
      method: The row it belongs to.
      seed: Of the run.
      workdir: Where it is, or would be.
      status: "finished", "failed", "unfinished" or "missing".
      reason: Why it failed.
      result: What `result.json` holds; None if the run is not finished.
      step_ms: Milliseconds a training step; None if not known.
    """

    method: str
    seed: int
    workdir: str
    status: str
    reason: str = ""
    result: Mapping[str, Any] | None = None
    step_ms: float | None = None


# Column of the CSV file -> where the result has it.
_COLUMNS = {
    "student_top1": ("student_top1",),
    "student_top5": ("student_top5",),
    "best_top1": ("best", "student_top1"),
    "best_step": ("best", "step"),
    "agreement": ("agreement",),
    "teacher_top1": ("teacher_top1",),
    "method_parameters": ("method_parameters",),
    "student_parameters": ("student_parameters",),
    "teacher_parameters": ("teacher_parameters",),
    "steps": ("steps",),
    "seconds": ("seconds",),
    "devices": ("devices",),
    "wkd_jax": ("versions", "wkd_jax"),
    "jax": ("versions", "jax"),
}


def look_up(entry: Entry, column: str) -> Any:
    """What the result of a run has in a column of the CSV file; None where it has nothing."""
    value: Any = entry.result
    for part in _COLUMNS[column]:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def finished(entries: Iterable[Entry]) -> list[Entry]:
    """Those that have a result."""
    return [entry for entry in entries if entry.result is not None]


def by_method(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The rows of the table, in order of appearance."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.method, []).append(entry)
    return rows


def mean_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values.

    Example:
      >>> mean_spread([1.0, 3.0]), mean_spread([2.0]), mean_spread([])
      ((2.0, 1.4142135623730951), (2.0, None), (None, None))
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def difference(row: Iterable[Entry], baseline: Iterable[Entry]) -> tuple[float | None, float | None, int]:
    """Mean difference of final top-1 over the seeds that both have, its standard error, and how many these are."""
    left, right = ({run.seed: look_up(run, "student_top1") for run in finished(side)} for side in (row, baseline))
    paired = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    mean, spread = mean_spread(paired)
    return mean, None if spread is None else spread / math.sqrt(len(paired)), len(paired)


def markdown(title: str, command: str, entries: Sequence[Entry], baseline: str | None) -> str:
    """The table of a comparison and what has to be known to read it.

    Args:
      title: What was compared.
      command: That made it.
      entries: All runs that were asked for.
      baseline: The method that the others are compared with; None for no such column.
    """
    rows = by_method(entries)
    head = ["method", "top-1, last epoch, %", "spread", "seeds", "top-1, best epoch, %"]
    head += [f"difference to {baseline}"] if baseline else []
    head += ["agreement, %", "ms a step", "parameters added", "teacher top-1, %", "remarks"]
    body = []
    for method, row in rows.items():
        top1, spread = mean_spread(_values(row, "student_top1"))
        cells = [f"`{method}`", text.fixed(top1), text.fixed(spread), f"{len(finished(row))} of {len(row)}"]
        cells.append(_mean(row, "best_top1"))
        if baseline:
            cells.append("baseline" if method == baseline else _difference(row, rows[baseline]))
        times = [run.step_ms for run in finished(row) if run.step_ms is not None]
        added = sorted({f"{value:,}" for value in _values(row, "method_parameters")})
        cells += [_mean(row, "agreement"), text.fixed(statistics.median(times) if times else None, 1)]
        cells += [" / ".join(added) or "–", _mean(row, "teacher_top1"), _remarks(row)]
        body.append(cells)
    seeds = sorted({entry.seed for entry in entries})
    notes = [
        "Top-1 of the student on the test split: the last evaluation, mean over seeds; spread: their sample standard "
        "deviation. Best epoch: the mean of each run's best evaluation, picked on the same split, so too favourable.",
        *(
            [
                f"Difference to {baseline}: of the last epoch, paired by seed, ± its standard error; in brackets, the "
                "number of pairs."
            ]
            if baseline
            else []
        ),
        "Agreement: images on which student and teacher predict the same class. Parameters added: trained with the "
        "student, dropped after training.",
        "Milliseconds: median over seeds of each run's median training step, without compilation and evaluation, on "
        "the devices below; other machines give others.",
        f"Seeds: {', '.join(map(str, seeds))}.",
        "Besides this page: `table.csv`, every run; `plot.svg`, every run a dot, each method's mean ± spread and the "
        "baseline's mean as a line.",
        *_made_with(entries),
    ]
    return _page(title, command, _grid(head, body, left=("method", "remarks")), notes)


def published(
    table: Table, command: str, found: Mapping[str, Sequence[Entry]], commands: Mapping[str, str], notes: Sequence[str]
) -> str:
    """A published table with the runs found for each row beside it.

    Args:
      table: As published.
      command: That made this page.
      found: Name of a row -> its runs.
      commands: Name of a row -> the command that makes it.
      notes: Further sentences.
    """
    teachers = {
        run.result["identity"]["teacher"]: look_up(run, "teacher_top1")
        for runs in found.values()
        for run in finished(runs)
        if run.result and look_up(run, "teacher_top1") is not None
    }
    body = []
    for row in table.rows:
        runs = found.get(row.name, ())
        top1 = [*teachers.values()] if row.teacher else _values(runs, "student_top1")
        waiting = sum(run.status == UNFINISHED for run in runs)
        body.append(
            [
                row.name,
                f"{text.fixed(row.top1)}{f' ± {text.fixed(row.spread)}' if row.spread is not None else ''}",
                text.fixed(row.top5),
                _counted_mean(top1),
                _mean(runs, "student_top5"),
                _counted_mean(_values(runs, "best_top1")),
                f"{len(finished(runs))}{f', {waiting} unfinished' if waiting else ''}" if row.config else "–",
                f"`{commands[row.name]}`" if row.name in commands else "–",
            ]
        )
    head = ["row", "paper top-1, %", "paper top-5, %", "ours top-1, last epoch, %", "ours top-5, %"]
    head += ["ours top-1, best epoch, %", "runs", "command"]
    notes = [
        f"Paper: {table.source}",
        "Ours: mean ± sample standard deviation over the finished runs, whatever their seeds; in brackets, how many. "
        "–: nobody has run it here. A teacher's value is that of the teachers in the runs found.",
        *notes,
        *_made_with([run for runs in found.values() for run in runs]),
    ]
    return _page(table.title, command, _grid(head, body, left=("row", "command")), notes)


def raw(entries: Iterable[Entry]) -> str:
    """One line a run, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "seed", "status", "step_ms", *_COLUMNS, "workdir", "reason"])
    for run in entries:
        measured = [look_up(run, column) for column in _COLUMNS]
        writer.writerow([run.method, run.seed, run.status, run.step_ms, *measured, run.workdir, run.reason])
    return stream.getvalue()


def _values(row: Iterable[Entry], column: str) -> list[Any]:
    """What the finished runs have in a column, without those that have nothing there."""
    return [value for run in finished(row) if (value := look_up(run, column)) is not None]


def _mean(row: Iterable[Entry], column: str) -> str:
    return text.fixed(mean_spread(_values(row, column))[0])


def _counted_mean(values: Sequence[float]) -> str:
    mean, spread = mean_spread(values)
    if mean is None:
        return "–"
    return f"{text.fixed(mean)}{'' if spread is None else f' ± {text.fixed(spread)}'} ({len(values)})"


def _difference(row: Iterable[Entry], baseline: Iterable[Entry]) -> str:
    mean, error, pairs = difference(row, baseline)
    return "–" if mean is None else f"{text.signed(mean)} ± {text.fixed(error)} ({pairs})"


def _remarks(row: Iterable[Entry]) -> str:
    """What kept runs from finishing, with their seeds."""
    seeds: dict[str, list[int]] = {}
    for run in row:
        if run.status != FINISHED:
            reason = " ".join(run.reason.split())
            shown = reason if len(reason) <= _REASON else reason[: _REASON - 1].rstrip() + "…"
            seeds.setdefault(f"{run.status}: {shown}" if reason else run.status, []).append(run.seed)
    return "; ".join(
        f"{what} (seed{'s' * (len(which) > 1)} {', '.join(map(str, which))})" for what, which in seeds.items()
    )


def _made_with(entries: Iterable[Entry]) -> list[str]:
    """Devices, versions, and warnings where the runs are not alike in what no config says."""
    results = [run.result for run in finished(entries) if run.result is not None]
    if not results:
        return []
    named = [{name: result["versions"].get(name) for name in ("wkd_jax", "jax", "python")} for result in results]
    lines = [
        f"Devices: {_tally(result['devices'] for result in results)}.",
        f"Versions: {_tally(', '.join(f'{name} {version}' for name, version in each.items()) for each in named)}.",
    ]
    for what, consequence in (
        ("data", "the images were not the same ones"),
        ("teacher", "part of a difference may be the teacher's"),
    ):
        contents = {result["identity"][what] for result in results} - {None}
        if len(contents) > 1:
            lines.append(f"Careful: the runs had {len(contents)} different contents of `{what}`: {consequence}.")
    return lines


def _tally(names: Iterable[str]) -> str:
    """The different names, with their numbers where there is more than one."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{name} ({count} run{'s' * (count > 1)})" for name, count in sorted(counts.items()))


def _page(title: str, command: str, grid: str, notes: Iterable[str]) -> str:
    listed = "\n".join(f"- {note}" for note in notes)
    return f"# {title}\n\n    {command}\n\n{grid}\n\n{listed}\n"


def _grid(head: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A Markdown table, its columns as wide as their longest cell. A last column that is empty is left out."""
    if not any(row[-1] for row in body):
        head, body = head[:-1], [row[:-1] for row in body]
    rows = [head, *([cell.replace("|", "\\|") for cell in row] for row in body)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "| "
        + " | ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        )
        + " |"
        for row in rows
    ]
    rule = "|".join(
        "-" * (width + 2) if name in left else "-" * (width + 1) + ":" for width, name in zip(widths, head, strict=True)
    )
    return "\n".join([aligned[0], f"|{rule}|", *aligned[1:]])
