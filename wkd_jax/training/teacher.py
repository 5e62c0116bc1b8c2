"""The frozen teacher of a run, and what is computed from it before training: class similarities."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from wkd_jax.training import build, checkpoint, workdir
from wkd_jax.training.build import Network


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network and where it comes from."""

    network: Network
    directory: pathlib.Path


def load(config: Mapping[str, Any], directory: pathlib.Path, dtype: str) -> Teacher:
    """The student of an earlier run, as a teacher.

    Args:
      config: The `teacher` section.
      directory: The earlier run's work directory.
      dtype: Of activations.

    Raises:
      ValueError: If the directory holds no run, or an unfinished one.
    """
    if not (directory / workdir.CONFIG).exists():
        raise ValueError(f"teacher.run={directory}: holds no run (no {workdir.CONFIG}). Train one there first")
    if not workdir.finished(directory):
        raise ValueError(f"teacher.run={directory}: its training is not finished; run its config again to continue it")
    return directory
