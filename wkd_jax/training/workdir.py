"""The files of a run's directory: who owns it, what was run, what came out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from wkd_jax import config as config_lib
from wkd_jax.training import processes

CONFIG, RESULT, EVALUATION, INTERRELATION = "config.json", "result.json", "evaluation.json", "interrelation.npz"
CHECKPOINTS, PROFILE, LOCK = "checkpoints", "profile", ".lock"


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Makes the directory this run's own, for as long as the context lasts.

    A directory without a checkpoint holds nothing that another config could spoil, and is taken over. What
    `config.OPERATIONAL` lists may differ from when the run began.

    Raises:
      ValueError: If it holds the run of another config, or another process is at work in it.
      OSError: If it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        processes.first(lambda: _take(workdir, config, stack))
        yield


def _take(workdir: pathlib.Path, config: Mapping[str, Any], stack: contextlib.ExitStack) -> None:
    """Locks the directory, compares it with the config, and writes the config down. For one process of the run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((workdir / LOCK).open("a"))
    except OSError as error:
        raise OSError(
            f"the work directory {workdir} cannot be written: {error.strerror}. Choose another with --workdir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system however the process ends
    except BlockingIOError as error:
        raise ValueError(
            f"another process is at work in {workdir}: wait for it, or choose another --workdir. Several processes of "
            "one run need --distributed"
        ) from error
    if (workdir / CONFIG).exists() and any((workdir / CHECKPOINTS).glob("[0-9]*")):
        saved, now = (config_lib.identity(c) for c in (read_json(workdir / CONFIG), config))
        if changed := config_lib.differences(saved, now):
            lines = [line if len(line) < 200 else line[:200] + "..." for line in changed[:5]]
            raise ValueError(
                f"{workdir} holds a run of another config ({'; '.join(lines)}): choose another --workdir, or leave it "
                "out and one is derived from the config"
            )
    write_atomically(workdir / CONFIG, config_lib.to_json(config))


def finished(workdir: pathlib.Path) -> bool:
    """Whether the run in this directory came to its end."""
    return (workdir / RESULT).exists()


def read_json(path: pathlib.Path) -> Any:
    """A JSON file.

    Raises:
      ValueError: If it is not JSON; names the file.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it is damaged; remove it and run again") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file so that a reader, or a run killed meanwhile, sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}. Free some space and run again") from error
