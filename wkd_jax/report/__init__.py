"""The report of a run: one HTML file, made of the files in the run's work directory, readable offline.

Knows nothing of JAX. `python -m wkd_jax.report WORKDIR` makes the report of any run again, finished or not.
"""

from __future__ import annotations

import os
import pathlib

from wkd_jax.report.page import render
from wkd_jax.report.read import read

__all__ = ["write"]


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into a work directory, in place of the one that may be there.

    The file is whole at any moment, and equal inputs give equal bytes.

    Args:
      workdir: Of a run. It must hold `config.json` and `metrics.jsonl`; what else is there of `result.json`,
        `evaluation.json`, `pictures.json` and `interrelation.npz` is shown too.

    Returns:
      The report's path.

    Raises:
      FileNotFoundError: If the directory or one of the two files is missing.
      ValueError: If a file is not what it should be; the message names the file and what is wrong with it.
      OSError: If the report cannot be written.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "report.html"
    partial = workdir / f".{path.name}.{os.getpid()}"
    # Class names and settings may hold half a surrogate pair, which has no encoding.
    content = render(read(workdir)).encode("utf-8", "replace")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return path
