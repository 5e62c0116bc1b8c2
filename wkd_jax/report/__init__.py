"""The report of a run, or of several beside each other: one HTML file, made of what is in work directories, offline.

Knows nothing of JAX. `python -m wkd_jax.report RUN [RUN ...]` makes the report of any runs again, finished or not.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import urllib.parse
from collections.abc import Sequence

from wkd_jax.report import page, several
from wkd_jax.report.read import read

__all__ = ["write", "write_comparison"]

_REPORT = "report.html"  # of a run, in its work directory


def write(workdir: str | pathlib.Path, out: str | pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of a run, in place of the one that may be there.

    The file is whole at any moment, and equal inputs give equal bytes.

    Args:
      workdir: Of a run. It must hold `config.json` and `metrics.jsonl`; what else is there of `result.json`,
        `evaluation.json`, `pictures.json` and `interrelation.npz` is shown too.
      out: File to write; None: `report.html` in the work directory.

    Returns:
      The report's path.

    Raises:
      FileNotFoundError: If the directory or one of the two files is missing.
      ValueError: If a file is not what it should be; the message names the file and what is wrong with it.
      OSError: If the report cannot be written.
    """
    path = pathlib.Path(workdir) / _REPORT if out is None else _named(out)
    return _write(path, page.render(read(workdir)))


def write_comparison(workdirs: Sequence[str | pathlib.Path], out: str | pathlib.Path | None = None) -> pathlib.Path:
    """Writes one page that compares runs, in place of the one that may be there.

    The file is whole at any moment; equal inputs, in any order, give equal bytes. It leads to each run's own report by
    a relative link, where there is one.

    Args:
      workdirs: Of the runs, as for `write`.
      out: File to write; None: in `compare/`, under a name made of the directories' paths.

    Returns:
      The page's path.

    Raises:
      FileNotFoundError: If a directory or one of a run's files is missing.
      ValueError: If there is no run, one is given twice, or a file is not what it should be; names what is wrong.
      OSError: If the page cannot be written.
    """
    places: dict[pathlib.Path, pathlib.Path] = {}
    for workdir in map(pathlib.Path, workdirs):
        if (earlier := places.setdefault(workdir.resolve(), workdir)) is not workdir:
            raise ValueError(f"{earlier} and {workdir}: the same run, given twice; leave one out")
    if not places:
        raise ValueError("no runs to compare: give their work directories")
    runs = [read(workdir) for workdir in places.values()]
    name = hashlib.sha256("\n".join(sorted(map(str, places))).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    path = pathlib.Path(f"compare/{len(runs)}-runs-{name}.html") if out is None else _named(out)
    return _write(path, several.render(runs, [_link(path, workdir) for workdir in places.values()]))


def _named(out: str | pathlib.Path) -> pathlib.Path:
    """Where a page is to go."""
    path = pathlib.Path(out)
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise ValueError(f"{path}: not the name of a page; give a file that ends in .html")
    return path


def _link(path: pathlib.Path, workdir: pathlib.Path) -> str | None:
    """Leads from a page to a run's own report; None where there is none."""
    report = workdir / _REPORT
    if not report.is_file() or report.absolute() == path.absolute():
        return None
    return urllib.parse.quote(os.fsencode(os.path.relpath(report, path.parent)))


def _write(path: pathlib.Path, source: str) -> pathlib.Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Class names and settings may hold half a surrogate pair, which has no encoding.
    content = source.encode("utf-8", "replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return path
