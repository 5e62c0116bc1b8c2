"""Writes a run's metrics: JSON lines, which every later table and plot reads, and TensorBoard scalars.

Each line of `metrics.jsonl` is one object, `{"step": 20, "kind": "train", "time": ..., "loss": 1.25, ...}`. JSON has no
infinities and no NaN, so these are the strings "Infinity", "-Infinity" and "NaN"; `read` turns them back.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from wkd_jax.training.workdir import write_atomically

# tensorboardX takes PyTorch along wherever it is installed: seconds of every start, and its libraries on the devices.
_loaded = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _loaded is None:
        del sys.modules["torch"]

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# Fields that depend on the clock. All others are the same in an interrupted and resumed run as in one that was not.
TIME_KEYS = frozenset({"time", "seconds", "steps_per_second", "examples_per_second"})
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricWriter:
    """Appends metrics to a run's files. Of several processes the first writes; on the others nothing happens.

    After a resume the files are those of a run that was never stopped: what was written after the checkpoint is
    removed first, in one atomic step, because the steps that follow write it again.

    Args:
      directory: The work directory; made if it does not exist.
      resume_step: Step of the checkpoint the run goes on from. 0 for a fresh start, which keeps nothing of an earlier
        try that never reached a checkpoint.
      now: Seconds since 1970, for the field "time".

    Raises:
      OSError: If a file cannot be written; names it.
      ValueError: If a line is damaged that others to keep follow; names file and line.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with MetricWriter(directory, resume_step=0, now=lambda: 1.0) as writer:
      ...         writer.write(20, "train", {"loss": 1.25, "grad_norm": math.inf})
      ...     file = pathlib.Path(directory, FILE)
      ...     print(file.read_text().strip(), read(file)[0]["grad_norm"])
      {"step": 20, "kind": "train", "time": 1.0, "loss": 1.25, "grad_norm": "Infinity"} inf
    """

    def __init__(
        self, directory: str | pathlib.Path, *, resume_step: int, now: Callable[[], float] = time.time
    ) -> None:
        self._directory = pathlib.Path(directory)
        self._now = now
        self._active = jax.process_index() == 0
        if self._active:
            with self._clear_errors():
                self._open(resume_step)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one line, and each number of it to TensorBoard as `kind/name`.

        Args:
          step: Steps done.
          kind: "train", "eval" or another kind of line.
          values: Numbers (Python's or NumPy's), strings, None, NumPy arrays, and lists and dicts of these. Arrays on a
            device are refused: when they are fetched is the caller's decision.

        Raises:
          TypeError: If a value is something else; names it.
          ValueError: If a value is named "step", "kind" or "time".
          OSError: If the disk is full; names the directory.
        """
        row: dict[str, Any] = {"step": step, "kind": kind, "time": self._now()}
        if taken := sorted(row.keys() & values.keys()):
            raise ValueError(f"{taken[0]!r} is a field of every line: name the value of this {kind!r} line otherwise")
        row |= {name: _plain(value, name) for name, value in values.items()}
        if not self._active:
            return
        with self._clear_errors():
            self._file.write(json.dumps(_encoded(row), allow_nan=False) + "\n")
            for name in values:
                if isinstance(row[name], (int, float)):
                    scalar = Summary(value=[Summary.Value(tag=f"{kind}/{name}", simple_value=row[name])])
                    self._events.write_event(Event(wall_time=row["time"], step=step, summary=scalar))

    def flush(self) -> None:
        """Puts all that was written on the disk itself. Call it before saving a checkpoint: a resume counts on it.

        Raises:
          OSError: If the disk is full; names the directory.
        """
        if self._active:
            with self._clear_errors():
                self._file.flush()
                os.fsync(self._file.fileno())
                self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files. Leaving the `with` block does the same.

        Raises:
          OSError: If the disk is full; names the directory.
        """
        if self._active:
            with self._clear_errors(), contextlib.closing(self._events), self._file:
                pass

    def _open(self, resume_step: int) -> None:
        events = self._directory / TENSORBOARD
        events.mkdir(parents=True, exist_ok=True)
        path = self._directory / FILE
        if path.exists():
            _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is in the file once it is written
        # tensorboardX's SummaryWriter writes in a thread that dies on a full disk, and training would then wait for
        # ever to hand it the next event. This part of it writes at once. Names hold the second of their start, so the
        # number keeps those of two sessions within one second apart.
        self._events = EventsWriter(str(events / "events"), f".{len(list(events.iterdir()))}")
        first = resume_step + 1 if resume_step else 0
        # From here on TensorBoard drops what earlier files have of this step and later ones.
        restart = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=self._now(), step=first, session_log=restart))
        self._events.flush()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"metrics cannot be written to {self._directory}: {error.strerror or error}. Free space on its disk or "
                "make it writable, then run the same command again"
            ) from error


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads a file of metrics.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If a line is damaged; names file and line. A run that is resumed repairs its last line by itself.
    """
    rows = []
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), 1):
        try:
            rows.append(_decoded(_parse(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}") from error
    return rows


def _keep_until(path: pathlib.Path, resume_step: int) -> None:
    """Removes the lines of later steps and a half-written end."""
    content = path.read_bytes()
    kept, damaged = [], None
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = _parse(line)
        except ValueError as error:
            damaged = damaged or f"line {number} is damaged: {error}"
            continue
        if resume_step and row["step"] <= resume_step:
            if damaged:
                raise ValueError(f"{path}, {damaged}. Lines after it are whole: repair or delete that line")
            kept.append(line + b"\n")
    if b"".join(kept) != content:
        write_atomically(path, b"".join(kept).decode())


def _parse(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not (isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str)):
        raise ValueError('not an object with "step" and "kind"')
    return row


def _plain(value: Any, name: str) -> Any:
    """Python's numbers, strings, lists and dicts."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}/{index}") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"metric {name!r} is {type(value).__name__}: give numbers on the host, as jax.device_get returns")


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
