"""Command line: runs a config file, from data to report.

    python -m wkd_jax.main --config FILE[:key=value,...] [--config.KEY=VALUE ...] [--workdir DIR]

The same command continues a run that was stopped, and shows the report of one that is done.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from wkd_jax import config as config_lib
from wkd_jax import report
from wkd_jax.training import loop, workdir


def load_config(argument: str, overrides: Sequence[str] = ()) -> Mapping[str, Any]:
    """Loads and resolves a config file.

    Args:
      argument: "path/to/file.py" or "path/to/file.py:arguments"; the arguments go to the file's `get_config`.
      overrides: "optimizer.learning_rate=0.1" and the like, applied to what the file returned. Values are Python
        literals; what is not a literal is a string.

    Raises:
      ValueError: If there is no such file, or anything in it or in an override is not valid.
    """
    path, _, arguments = argument.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("wkd_jax_config", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    config = module.get_config(arguments).to_dict()
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
        for section in sections:
            if not isinstance(node.setdefault(section, {}), dict):
                raise ValueError(f"--config.{override}: {section} is {node[section]!r}, not a section")
            node = node[section]
        node[leaf] = value
    return config_lib.resolve(config)


def execute(config: Mapping[str, Any], directory: pathlib.Path, teacher_directory: pathlib.Path | None) -> pathlib.Path:
    """Runs a resolved config, its teacher first, and writes the report.

    Args:
      config: Resolved.
      directory: The run's work directory.
      teacher_directory: Where a teacher that has to be trained first lives; None: derived from its config.

    Returns:
      The report's path.
    """
    if teacher := config["teacher"]:
        if teacher["train"]:
            source = teacher_directory or config_lib.default_workdir(teacher["train"], str(directory.parent))
            execute(teacher["train"], source, source / "teacher" if teacher_directory else None)
        else:
            source = pathlib.Path(teacher["run"])
        loop.run(config, directory, source)
    else:
        loop.run(config, directory, None)
    return report.write(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wkd_jax.main", description="Distil a teacher into a student.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="config file, with its arguments after a colon")
    parser.add_argument("--workdir", help="where the run lives; default: runs/ and a name derived from the config")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    args, rest = parser.parse_known_args(argv)
    overrides = [item.removeprefix("--config.") for item in rest if item.startswith("--config.")]
    if len(overrides) != len(rest):
        parser.error(f"unknown argument {next(item for item in rest if not item.startswith('--config.'))!r}")
    try:
        config = load_config(args.config, overrides)
        directory = pathlib.Path(args.workdir) if args.workdir else config_lib.default_workdir(config)
        path = execute(config, directory, directory / "teacher" if args.workdir else None)
    except (ValueError, OSError, loop.TrainingError) as error:
        if args.traceback:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command continues from the last checkpoint\n")
        return 130
    result = workdir.read_json(directory / workdir.RESULT)
    teacher = f"teacher {result['teacher_top1']:.2f} %, " if result["teacher_top1"] is not None else ""
    sys.stdout.write(f"{teacher}student {result['student_top1']:.2f} % top-1 after {result['steps']} steps\n")
    sys.stdout.write(f"report: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
