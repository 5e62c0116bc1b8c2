"""Command line: runs, or collects, several methods and seeds of one config, and makes one table of them.

    python -m wkd_jax.compare --config CONFIG[:key=value,...] --methods NAME ... --seeds N [--config.KEY=VALUE ...]
    python -m wkd_jax.compare --table NAME[:key=value,...]

CONFIG and overrides are those of `python -m wkd_jax.main`. The config is given `method=NAME,seed=S` besides its other
arguments. Every run lives where that command has it: one that is finished is collected, one that was stopped goes on,
teachers are shared, and the same command again goes on where it ended. Overrides of a method's or the teacher's
settings go to the rows that have it. Runs are made one after the other in this process; those of several hosts are made
with `python -m wkd_jax.main` and then collected.

Curves, classes and config differences of any runs, on one page: `python -m wkd_jax.report RUN RUN ...`.

A table of the paper is printed beside the runs that are there for its rows, with any seed; it runs nothing.

    python -m wkd_jax.compare --config digits_wkd --methods none kd wkd_l+wkd_f --seeds 5
    python -m wkd_jax.compare --table imagenet_r34_r18

The table is printed, and written to --out as table.md, table.csv (every number of every run) and plot.svg.

Exit codes: 0 done; 1 an error, or some runs failed (the table says which and why; the same command tries them again);
2 the command line is wrong; 75 preempted, 130 interrupted: the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from wkd_jax import config as config_lib
from wkd_jax import main as main_lib
from wkd_jax import registry
from wkd_jax.command import Parser, names, overrides_of
from wkd_jax.config_file import builtin, load_config, read_config
from wkd_jax.report import compare, dots, runs
from wkd_jax.report.compare import FAILED, FINISHED, MISSING, UNFINISHED, Entry
from wkd_jax.report.published import TABLES
from wkd_jax.training import loop, progress, workdir

RUNS = "runs"  # where runs live that were given no other directory


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A run that a comparison needs."""

    method: str
    seed: int
    config: Mapping[str, Any]

    @property
    def directory(self) -> pathlib.Path:
        """Where it lives unless somebody gave it another directory."""
        return config_lib.default_workdir(self.config, RUNS)

    def entry(self, found: runs.Found | None) -> Entry:
        """Its line in the table."""
        place = str(found.workdir if found else self.directory)
        if not found or not found.result:
            return Entry(self.method, self.seed, place, UNFINISHED if found else MISSING)
        times = runs.step_milliseconds(found.workdir)
        return Entry(self.method, self.seed, place, FINISHED, result=found.result, step_ms=times)


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.compare") -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    epilog = f"{names('Published tables', TABLES)}\n{names('Built-in configs', builtin())}"
    parser = Parser(prog=prog, description=__doc__, epilog=epilog)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", help="a file or a built-in config's name, with arguments after a colon; it takes method and seed"
    )
    what.add_argument(
        "--table", help="a table of the paper, beside the runs found for it; arguments go to the rows' configs"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table, such as kd or wkd_l+wkd_f")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each method: seeds 0 to N - 1")
    parser.add_argument("--baseline", metavar="NAME", help="row that the others are compared with; default: none")
    parser.add_argument("--collect", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help=f"directories of runs to search besides {RUNS}/"
    )
    parser.add_argument("--out", metavar="DIR", help="where the table goes; default: compare/ and a name derived")
    args, rest = parser.parse_known_args(argv)
    overrides = overrides_of(parser, rest)
    if args.table:
        if args.methods or args.seeds is not None or args.baseline or args.collect or overrides:
            parser.error("--table takes --runs and --out alone: its rows are those of the paper, and it runs nothing")
    elif not args.methods or args.seeds is None:
        parser.error("--config needs --methods and --seeds")
    elif args.seeds < 1 or len({*args.methods}) < len(args.methods):
        parser.error("--seeds must be 1 or more, and each of --methods given once")
    elif args.baseline and args.baseline not in args.methods:
        parser.error(f"--baseline {args.baseline}: not one of --methods {' '.join(args.methods)}")
    command = shlex.join([*prog.split(), *argv])
    work = (lambda: _published(args, command)) if args.table else (lambda: _compare(args, overrides, command))
    return main_lib.guarded(work, show_traceback=False)


def _compare(args: argparse.Namespace, overrides: Sequence[str], command: str) -> int:
    wanted = plan(args.config, args.methods, args.seeds, overrides)
    found = _by_key(_search(args.runs))
    entries = [run.entry(found.get(runs.key(run.config))) for run in wanted]
    name = hashlib.sha256("".join(sorted(runs.key(run.config) for run in wanted)).encode()).hexdigest()[:8]
    out = pathlib.Path(args.out or f"compare/{pathlib.Path(args.config.partition(':')[0]).stem}-{name}")
    try:
        if not args.collect:
            _make_all(wanted, entries)
    finally:  # told to stop, it still leaves the table of what is there
        baseline = args.baseline or ("none" if "none" in args.methods else None)
        text = compare.markdown(f"Comparison on {args.config}", command, entries, baseline)
        metric = compare.metric_of(entries)
        values = {
            method: [compare.look_up(run, metric.student) for run in compare.finished(row)]
            for method, row in compare.by_method(entries).items()
            if compare.finished(row)
        }
        title = f"student {metric.name} of the last {metric.time}, %"
        figure = dots.draw(title, values, baseline) if values else None
        _write(out, text, entries, figure)
    return int(any(entry.status == FAILED for entry in entries))


def plan(argument: str, methods: Sequence[str], seeds: int, overrides: Sequence[str]) -> list[Wanted]:
    """The runs of a comparison, method by method.

    Args:
      argument: Of --config.
      methods: Names that the config file knows.
      seeds: How many of each.
      overrides: "key=value". One of a method's settings, or of the teacher's, goes to the rows that have it.

    Raises:
      ValueError: If a config is not valid, no row has what an override sets, or two rows are the same run.
    """
    if odd := [method for method in methods if "," in method or "=" in method]:
        raise ValueError(f"--methods {odd[0]}: names of methods, separated by spaces")
    keys = [item.partition("=")[0] for item in (*argument.partition(":")[2].split(","), *overrides)]
    if taken := {"method", "seed"} & {*keys}:
        raise ValueError(f"{min(taken)}: comes from --methods and --seeds, so it cannot be set otherwise")
    wanted, used, names = [], set(), {}
    for method in methods:
        raw = read_config(_with(argument, f"method={method},seed=0"))
        chosen = [override for override in overrides if _concerns(override, raw)]
        used.update(chosen)
        for seed in range(seeds):
            own = f"method={method},seed={seed}"
            config = load_config(_with(argument, own), chosen)
            if other := names.get(runs.key(config)):
                raise ValueError(
                    f"--config {argument}: {other} and {own} give the same run; its get_config has to make something "
                    "of both arguments"
                )
            names[runs.key(config)] = own
            wanted.append(Wanted(method, seed, config))
    if unused := [override for override in overrides if override not in used]:
        raise ValueError(f"--config.{unused[0]}: no method of this comparison has that setting")
    return wanted


def _with(argument: str, more: str) -> str:
    """The argument of --config with further arguments for the config."""
    path, _, given = argument.partition(":")
    return f"{path}:{','.join(filter(None, (given, more)))}"


def _concerns(override: str, config: Mapping[str, Any]) -> bool:
    """Whether a run of this config, as its file returned it, has the section that an override sets."""
    section, *rest = override.partition("=")[0].split(".")
    methods = config.get("methods") or {}
    if section == "methods" and rest:
        return rest[0] in methods
    if section == "teacher":
        return bool(config.get("teacher")) or any(registry.get("methods", name).NEEDS_TEACHER for name in methods)
    return True


def _make_all(wanted: Sequence[Wanted], entries: list[Entry]) -> None:
    """Makes what is not finished, one after the other; `entries` follows."""
    took: list[float] = []
    for i, run in enumerate(wanted):
        left = sum(entry.status in (MISSING, UNFINISHED) for entry in entries[i:])
        line = f"run {i + 1} of {len(wanted)}: {run.method}, seed {run.seed}"
        if entries[i].status == FINISHED:
            _say(f"{line}: collected from {entries[i].workdir}")
            continue
        known = took or [compare.look_up(entry, "seconds") for entry in compare.finished(entries)]
        eta = f", about {progress.duration(left * sum(known) / len(known))} left" if known else ""
        _say(f"{line}: in {run.directory}, {left} to do{eta}")
        started = time.monotonic()
        try:
            entries[i] = _make(run)
            took.append(time.monotonic() - started)
        except (ValueError, OSError, loop.TrainingError) as error:
            entries[i] = dataclasses.replace(run.entry(None), status=FAILED, reason=str(error))
            _say(f"failed: {error}")


def _make(run: Wanted) -> Entry:
    """Makes a run, or goes on with it."""

    def own() -> runs.Found | None:
        found = runs.read(run.directory)
        if found and found.result and runs.key(found.config) != runs.key(run.config):
            changed = config_lib.differences(runs.identity(found.config), runs.identity(run.config))
            raise ValueError(f"{run.directory} holds a run of another config ({'; '.join(changed[:3])}): move it away")
        return found

    own()
    main_lib.make(run.config, run.directory)
    return run.entry(own())


def _published(args: argparse.Namespace, command: str) -> int:
    name, _, arguments = args.table.partition(":")
    if name not in TABLES:
        raise ValueError(f"--table: {registry.unknown('table', name, TABLES)}")
    own = _keys(",".join(row.config.partition(":")[2] for row in TABLES[name].rows if row.config))
    if taken := own & _keys(arguments):
        raise ValueError(f"--table {args.table}: {min(taken)} belongs to the rows of the table: leave it out")
    everything, found, commands, notes = _search(args.runs), {}, {}, []
    for row in TABLES[name].rows:
        if not row.config:
            continue
        argument = _with(row.config, arguments)
        commands[row.name] = f"python -m wkd_jax.main --config {argument}"
        try:
            config = load_config(argument)
        except ValueError as error:
            notes.append(f"{row.name}: no config, so no runs: {error}")
            continue
        same = _by_key([run for run in everything if not _changes(config, run)])
        found[row.name] = [Wanted(row.name, run.config["seed"], run.config).entry(run) for run in same.values()]
        notes += [
            f"Not in the table: {run.workdir}, a {config['name']} like the row {row.name}, differs in "
            f"{'; '.join(changed[:3])}."
            for run in everything
            if run.config["name"] == config["name"] and (changed := _changes(config, run))
        ]
    text = compare.published(TABLES[name], command, found, commands, notes)
    _write(pathlib.Path(args.out or f"compare/{name}"), text, [run for row in found.values() for run in row], None)
    return 0


def _keys(argument: str) -> set[str]:
    """Of a config's arguments, "key=value,key=value"."""
    return {item.partition("=")[0] for item in argument.split(",") if item}


def _changes(config: Mapping[str, Any], run: runs.Found) -> list[str]:
    """How a run differs from what a config computes, seeds aside."""
    return config_lib.differences(runs.identity(config, seeds=False), runs.identity(run.config, seeds=False))


def _by_key(found: Sequence[runs.Found]) -> dict[str, runs.Found]:
    """Each different run once: the first that is finished, or else the first."""
    best: dict[str, runs.Found] = {}
    for run in sorted(found, key=lambda run: run.result is None):
        best.setdefault(runs.key(run.config), run)
    return best


def _search(more: Sequence[str]) -> list[runs.Found]:
    """All runs in the directories to search."""
    for directory in more:
        if not pathlib.Path(directory).is_dir():
            raise ValueError(f"--runs {directory}: there is no such directory")
    return runs.search([pathlib.Path(RUNS), *map(pathlib.Path, more)], _say)


def _write(out: pathlib.Path, markdown: str, entries: Sequence[Entry], figure: str | None) -> None:
    """Prints the table and writes it down with all that belongs to it."""
    sys.stdout.write(markdown)
    out.mkdir(parents=True, exist_ok=True)
    files = {"table.md": markdown, "table.csv": compare.raw(entries), "plot.svg": figure}
    for name, content in files.items():
        if content is None:
            (out / name).unlink(missing_ok=True)  # an earlier one is of other runs
        else:
            workdir.write_atomically(out / name, content)
    _say(f"written: {', '.join(str(out / name) for name, content in files.items() if content is not None)}")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
