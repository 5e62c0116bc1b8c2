"""Command line: runs a config file, from data to report: trains the teacher if need be, distils the student, evaluates.

    python -m wkd_jax.main --config CONFIG[:key=value,...] [--config.KEY=VALUE ...] [--workdir DIR] [--check]

CONFIG is a Python file or the name of a built-in config: `python -m wkd_jax.configs` lists those, and with a name shows
what arguments go after the colon. --config.KEY=VALUE changes any key of it, VALUE a Python literal or else a string;
`python -m wkd_jax.configs CONFIG --keys` prints every key with its value and meaning.

    python -m wkd_jax.main --config digits_wkd                                      minutes on two CPU cores
    python -m wkd_jax.main --config digits_wkd:method=kd --config.optimizer.learning_rate=0.02 --config.epochs=5
    python -m wkd_jax.main --config imagenet_wkd:data_dir=/data/tfds --check        look before you leap
    python -m wkd_jax.main --config my/config.py --workdir runs/mine

The same command continues a run that was stopped, and shows the report of one that is done. The work directory gets the
resolved config.json, metrics.jsonl, TensorBoard files, checkpoints/, result.json and report.html; a teacher that is
trained first has a directory of its own, beside it or, with --workdir, in it.

Exit codes: 0 done; 1 an error that starting again does not mend; 2 the command line is wrong; 75 preempted, or another
process was lost: start again; 130 interrupted.

Environment: WKD_JAX_CACHE, class similarities and downloads (~/.cache/wkd_jax); TFDS_DATA_DIR, data sets of TensorFlow
Datasets (~/tensorflow_datasets); JAX_COMPILATION_CACHE_DIR, where JAX keeps compiled programs for the next start
(nowhere); JAX_PLATFORMS, cpu, cuda or tpu (the best there is).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from wkd_jax import config as config_lib
from wkd_jax import report
from wkd_jax.command import Parser, names, overrides_of
from wkd_jax.config_file import builtin, load_config
from wkd_jax.training import build, loop, preemption, preflight, processes, workdir


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
    with _explained(config), build.shared_data_sets():
        processes.everywhere(lambda: build.check(config))
        for run in chain(config, directory, teacher_directory):
            loop.run(*run)
            path = processes.first(lambda run=run: str(report.write(run[1])))
    return path


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


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.main") -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog=prog, description=__doc__, epilog=names("Built-in configs", builtin()))
    parser.add_argument(
        "--config", required=True, help="a file or a built-in config's name, with arguments for it after a colon"
    )
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
        with _explained(config), build.shared_data_sets():
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
