"""Command line: runs a config file, from data to report.

    python -m wkd_jax.main --config FILE[:key=value,...] [--config.KEY=VALUE ...] [--workdir DIR]
                           [--check] [--distributed]

The same command continues a run that was stopped, and shows the report of one that is done. Exit codes: 0 done; 1 an
error that starting again does not mend; 75 preempted, or another process was lost: start again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from wkd_jax import config as config_lib
from wkd_jax import report
from wkd_jax.training import build, loop, preemption, preflight, processes, workdir


def load_config(argument: str, overrides: Sequence[str] = ()) -> Mapping[str, Any]:
    """Loads and resolves a config file.

    Args:
      argument: "path/to/file.py" or "path/to/file.py:arguments"; the arguments go to the file's `get_config`.
      overrides: "optimizer.learning_rate=0.1" and the like, applied to what the file returned. Values are Python
        literals; what is not a literal is a string.

    Raises:
      ValueError: If there is no such file, or anything in it or in an override is not valid.
    """
    config = read_config(argument)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--config.{override}: write --config.{key}=VALUE")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *sections, leaf = key.split(".")
        node = config
        if sections[:1] == ["methods"] and len(sections) > 1 and sections[1] not in config.get("methods", {}):
            raise ValueError(f"--config.{override}: this run does not use {sections[1]}; choose it as a method first")
        for section in sections:
            if not isinstance(node.setdefault(section, {}), dict):
                raise ValueError(f"--config.{override}: {section} is {node[section]!r}, not a section")
            node = node[section]
        node[leaf] = value
    return config_lib.resolve(config)


def read_config(argument: str) -> dict[str, Any]:
    """What a config file's `get_config` returns, as plain dicts: before overrides and defaults.

    Args:
      argument: As of `load_config`.

    Raises:
      ValueError: If there is no such file, it cannot be loaded, or it refuses the arguments.
    """
    name, _, arguments = argument.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    # Config files import what they share from beside them.
    sys.path.insert(0, str(path.absolute().parent.parent))
    try:
        spec = importlib.util.spec_from_file_location("wkd_jax_config", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (ImportError, SyntaxError, NameError) as error:
        raise ValueError(f"--config {path}: cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {path}: has no get_config(argument) that returns the config")
    config = module.get_config(arguments)
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def chain(
    config: Mapping[str, Any], directory: pathlib.Path, teacher_directory: pathlib.Path | None
) -> list[tuple[Mapping[str, Any], pathlib.Path, pathlib.Path | None]]:
    """The runs that a resolved config asks for, those that make its teacher first.

    Args:
      config: Resolved.
      directory: The run's work directory.
      teacher_directory: Where a teacher that has to be trained first lives; None: derived from its config.

    Returns:
      (config, work directory, the teacher's run or None) of each.
    """
    earlier, source, teacher = [], None, config["teacher"]
    if teacher and teacher["train"]:
        source = teacher_directory or config_lib.default_workdir(teacher["train"], str(directory.parent))
        earlier = chain(teacher["train"], source, source / "teacher" if teacher_directory else None)
    elif teacher and teacher["run"]:
        source = pathlib.Path(teacher["run"])
    return [*earlier, (config, directory, source)]


def make(config: Mapping[str, Any], directory: pathlib.Path, teacher_directory: pathlib.Path | None = None) -> str:
    """Makes the runs that a resolved config asks for, its teacher's first, and their reports; goes on where they are.

    Args:
      config: Resolved.
      directory: The run's work directory.
      teacher_directory: See `chain`.

    Returns:
      The path of the run's report.

    Raises:
      ValueError: For anything in the config that cannot work.
      OSError: If a file cannot be read or written.
      TrainingError: If a run cannot go on.
      Preempted: If it was told to stop.
    """
    with _explained(config):
        processes.everywhere(lambda: build.check(config))
        for run in chain(config, directory, teacher_directory):
            loop.run(*run)
            path = processes.first(lambda run=run: str(report.write(run[1])))
    return path


def overrides_of(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[str]:
    """The "key=value" of each --config.key=value, which is all that may be left of a command line."""
    if unknown := [item for item in rest if not item.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    return [item.removeprefix("--config.") for item in rest]


def guarded(work: Callable[[], int], *, show_traceback: bool) -> int:
    """The exit code of a command's work, see the file's head; what it raises becomes a line on standard error."""
    try:
        return _exit(work())
    except preemption.Preempted as stopped:
        return _exit(preemption.EXIT_CODE, f"preempted: {stopped}; the same command goes on")
    except KeyboardInterrupt:
        return _exit(130, "interrupted: the same command continues from the last checkpoint")
    except Exception as error:
        known = isinstance(error, ValueError | OSError | loop.TrainingError)
        if show_traceback or not known:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
        code = preemption.EXIT_CODE if isinstance(error, loop.ProcessLostError) else 1
        return _exit(code, f"error: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wkd_jax.main", description="Distil a teacher into a student.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="config file, with its arguments after a colon")
    parser.add_argument("--workdir", help="where the run lives; default: runs/ and a name derived from the config")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    parser.add_argument(
        "--check", action="store_true", help="everything but the training: data, weights, shapes, memory, time"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes, one a host; launch/ starts them"
    )
    args, rest = parser.parse_known_args(argv)
    overrides = overrides_of(parser, rest)

    def work() -> int:
        if args.distributed:
            processes.initialize()
        return _run(args, overrides)

    return guarded(work, show_traceback=args.traceback)


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = load_config(args.config, overrides)
    directory = pathlib.Path(args.workdir) if args.workdir else config_lib.default_workdir(config)
    teacher_directory = directory / "teacher" if args.workdir else None
    if args.check:
        with _explained(config):
            for run in chain(config, directory, teacher_directory):
                text = preflight.report(*run)
                sys.stdout.write(text if jax.process_index() == 0 else "")
        return 0
    path = make(config, directory, teacher_directory)
    if jax.process_index() == 0:
        result = workdir.read_json(directory / workdir.RESULT)
        numbers = [
            f"{key} {result[key]:.2f}"
            for key in dict.fromkeys(["teacher_top1", "teacher_AP", *result["best"]])
            if result.get(key) is not None
        ]
        sys.stdout.write(f"{', '.join(numbers)} after {result['steps']} steps\n")
        sys.stdout.write(f"report: {path}\n")
    return 0


@contextlib.contextmanager
def _explained(config: Mapping[str, Any]) -> Iterator[None]:
    """Says what a failure of the devices means for the person who started the run."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise loop.explained(error, config) from error


def _exit(code: int, message: str = "") -> int:
    """Says why the run ends. One of several processes that fails ends at once, since it would wait for the others."""
    if message:
        sys.stderr.write(f"{message}\n")
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
