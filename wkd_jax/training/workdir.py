"""The files of a run's directory: who owns it, what was run, what came out."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from wkd_jax import config as config_lib

CONFIG, RESULT, EVALUATION, INTERRELATION = "config.json", "result.json", "evaluation.json", "interrelation.npz"
CHECKPOINTS = "checkpoints"


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Makes the directory this run's own.

    Raises:
      ValueError: If it already holds the run of another config; names the keys that differ.
      OSError: If it cannot be written; names the directory.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise OSError(
            f"the work directory {workdir} cannot be written: {error.strerror}. Choose another with --workdir"
        ) from error
    if (workdir / CONFIG).exists():
        changed = config_lib.differences(read_json(workdir / CONFIG), config)
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or "
                "leave it out and one is derived from the config"
            )
    else:
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
    write_atomically(path, json.dumps(value, indent=2) + "\n")


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
