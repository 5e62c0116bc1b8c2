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

from wkd_jax.report import metric as metric_lib
from wkd_jax.report import text
from wkd_jax.report.metric import Metric
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


def metric_of(entries: Iterable[Entry]) -> Metric:
    """What these runs are measured by."""
    return metric_lib.of(key for run in finished(entries) if run.result is not None for key in run.result)


def look_up(entry: Entry, *path: str) -> Any:
    """What the result of a run has at nested keys; None where it has nothing."""
    value: Any = entry.result
    for part in path:
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


def difference(
    row: Iterable[Entry], baseline: Iterable[Entry], metric: Metric
) -> tuple[float | None, float | None, int]:
    """Mean difference of the final metric over the seeds that both have, its standard error, and how many these are."""
    left, right = ({run.seed: look_up(run, metric.student) for run in finished(side)} for side in (row, baseline))
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
    rows, metric = by_method(entries), metric_of(entries)
    name, time = metric.name, metric.time
    head = ["method", f"{name}, last {time}, %", "spread", "seeds", f"{name}, best {time}, %"]
    head += [f"difference to {baseline}"] if baseline else []
    head += [*metric.beside.values(), "ms a step", "parameters added", f"teacher {name}, %", "remarks"]
    body = []
    for method, row in rows.items():
        mean, spread = mean_spread(_values(row, metric.student))
        cells = [f"`{method}`", text.fixed(mean), text.fixed(spread), f"{len(finished(row))} of {len(row)}"]
        cells.append(_mean(row, "best", metric.student))
        if baseline:
            cells.append("baseline" if method == baseline else _difference(row, rows[baseline], metric))
        times = [run.step_ms for run in finished(row) if run.step_ms is not None]
        added = sorted({f"{value:,}" for value in _values(row, "method_parameters")})
        cells += [*(_mean(row, key) for key in metric.beside)]
        cells += [text.fixed(statistics.median(times) if times else None, 1), " / ".join(added) or "–"]
        cells += [_mean(row, metric.teacher), _remarks(row)]
        body.append(cells)
    seeds = sorted({entry.seed for entry in entries})
    notes = [
        f"{name[0].upper()}{name[1:]} of the student on the test split: the last evaluation, mean over seeds; spread: "
        f"their sample standard deviation. Best {time}: the mean of each run's best evaluation, picked on the same "
        "split, so too favourable.",
        *(
            [
                f"Difference to {baseline}: of the last {time}, paired by seed, ± its standard error; in brackets, the "
                "number of pairs."
            ]
            if baseline
            else []
        ),
        f"{metric.explained} Parameters added: trained with the student, dropped after training.",
        "Milliseconds: median over seeds of each run's median training step, without compilation and evaluation, on "
        "the devices below; other machines give others.",
        f"Seeds: {', '.join(map(str, seeds))}.",
        "Besides this page: `table.csv`, every run; `plot.svg`, every run a dot, each method's mean ± spread and the "
        "baseline's mean as a line.",
        *made_with(entries),
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
    metric = table.metric
    teachers = {
        run.result["identity"]["teacher"]: look_up(run, metric.teacher)
        for runs in found.values()
        for run in finished(runs)
        if run.result and look_up(run, metric.teacher) is not None
    }
    body = []
    for row in table.rows:
        runs = found.get(row.name, ())
        ours = [*teachers.values()] if row.teacher else _values(runs, metric.student)
        further = [*row.more, *[None] * len(metric.more)][: len(metric.more)]
        waiting = sum(run.status == UNFINISHED for run in runs)
        body.append(
            [
                row.name,
                f"{text.fixed(row.value)}{f' ± {text.fixed(row.spread)}' if row.spread is not None else ''}",
                *map(text.fixed, further),
                _counted_mean(ours),
                *(_mean(runs, f"student_{key}") for key in metric.more),
                _counted_mean(_values(runs, "best", metric.student)),
                f"{len(finished(runs))}{f', {waiting} unfinished' if waiting else ''}" if row.config else "–",
                f"`{commands[row.name]}`" if row.name in commands else "–",
            ]
        )
    name, more = metric.name, metric.more.values()
    head = ["row", f"paper {name}, %", *(f"paper {each}, %" for each in more), f"ours {name}, last {metric.time}, %"]
    head += [*(f"ours {each}, %" for each in more), f"ours {name}, best {metric.time}, %", "runs", "command"]
    notes = [
        f"Paper: {table.source}",
        "Ours: mean ± sample standard deviation over the finished runs, whatever their seeds; in brackets, how many. "
        "–: nobody has run it here. A teacher's value is that of the teachers in the runs found.",
        *notes,
        *made_with([run for runs in found.values() for run in runs]),
    ]
    return _page(table.title, command, _grid(head, body, left=("row", "command")), notes)


def raw(entries: Iterable[Entry]) -> str:
    """One line a run, as CSV."""
    entries = list(entries)
    columns = _columns(metric_of(entries))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "seed", "status", "step_ms", *columns, "workdir", "reason"])
    for run in entries:
        measured = [look_up(run, *path) for path in columns.values()]
        writer.writerow([run.method, run.seed, run.status, run.step_ms, *measured, run.workdir, run.reason])
    return stream.getvalue()


def _columns(metric: Metric) -> dict[str, tuple[str, ...]]:
    """Column of the CSV file -> where the result has it."""
    single = [metric.student, *(f"student_{key}" for key in metric.more)]
    after = [key for key in metric.beside if key not in single] + [metric.teacher]
    after += ["method_parameters", "student_parameters", "teacher_parameters", "steps", "seconds", "devices"]
    return {
        **{key: (key,) for key in single},
        f"best_{metric.key}": ("best", metric.student),
        "best_step": ("best", "step"),
        **{key: (key,) for key in after},
        "wkd_jax": ("versions", "wkd_jax"),
        "jax": ("versions", "jax"),
    }


def _values(row: Iterable[Entry], *path: str) -> list[Any]:
    """What the finished runs have at nested keys of their results, without those that have nothing there."""
    return [value for run in finished(row) if (value := look_up(run, *path)) is not None]


def _mean(row: Iterable[Entry], *path: str) -> str:
    return text.fixed(mean_spread(_values(row, *path))[0])


def _counted_mean(values: Sequence[float]) -> str:
    mean, spread = mean_spread(values)
    if mean is None:
        return "–"
    return f"{text.fixed(mean)}{'' if spread is None else f' ± {text.fixed(spread)}'} ({len(values)})"


def _difference(row: Iterable[Entry], baseline: Iterable[Entry], metric: Metric) -> str:
    mean, error, pairs = difference(row, baseline, metric)
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


def made_with(entries: Iterable[Entry]) -> list[str]:
    """Devices, versions, and warnings where the runs are not alike in what no config says."""
    runs = finished(entries)
    if not runs:
        return []
    named = [{name: look_up(run, "versions", name) for name in ("wkd_jax", "jax", "python")} for run in runs]
    lines = [
        f"Devices: {_tally(look_up(run, 'devices') or 'not recorded' for run in runs)}.",
        f"Versions: {_tally(', '.join(f'{name} {version}' for name, version in each.items()) for each in named)}.",
    ]
    for what, consequence in (
        ("data", "the images were not the same ones"),
        ("teacher", "part of a difference may be the teacher's"),
    ):
        contents = {look_up(run, "identity", what) for run in runs} - {None}
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
