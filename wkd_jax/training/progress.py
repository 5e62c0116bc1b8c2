"""Shows how far a run is: a live bar with an ETA on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

import jax
from rich import progress as bars
from rich.console import Console
from rich.table import Column

_EVERY = 5.0  # seconds between plain lines
_WINDOW = 60.0  # seconds that the speed is measured over: long enough to be steady, short enough to follow a change


class Progress:
    """Progress of a run. Of several processes the first shows it.

    Args:
      total_steps: Of the whole run.
      description: Shown in front, such as the config's name.
      start_step: Step that a resumed run goes on from.
      stream: Where to; None is standard error, so that standard output stays free for results.
      clock: Seconds, monotonic.

    Raises:
      ValueError: If the steps are not 0 <= start_step <= total_steps with at least one in total.

    Example:
      >>> clock = iter([0.0, 4.0, 10.0]).__next__
      >>> with Progress(200, description="kd", stream=sys.stdout, clock=clock) as progress:
      ...     progress.update(20, {"loss": 1.23456})
      ...     progress.note("step 20: top1 71.25")
      ...     progress.update(50, {"loss": 0.5})
      kd: step 20/200 (10%), 0:00:36 left, 5.000 steps/s, loss 1.235
      step 20: top1 71.25
      kd: step 50/200 (25%), 0:00:30 left, 5.000 steps/s, loss 0.5000
    """

    def __init__(
        self,
        total_steps: int,
        *,
        description: str,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= start_step <= total_steps or total_steps < 1:
            raise ValueError(f"start_step={start_step}, total_steps={total_steps}: 0 <= start_step <= total_steps >= 1")
        self._total, self._description, self._clock = total_steps, description, clock
        self._stream = stream or sys.stderr
        self._shown = -math.inf  # when the last plain line was
        self._points = collections.deque([(clock(), start_step)])
        self._active = jax.process_index() == 0
        self._bar: bars.Progress | None = None
        if self._active and self._stream.isatty():
            self._bar = _bar(self._stream)
            self._task = self._bar.add_task(description, total=total_steps, completed=start_step, status="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, and the latest metrics.

        On a stream that is no terminal, calls within five seconds of the last shown one are passed over, except the
        run's last step.
        """
        now = self._clock()
        if self._points[-1][1] < step:
            self._points.append((now, step))
        while len(self._points) > 2 and now - self._points[1][0] >= _WINDOW:
            self._points.popleft()
        words = [*self._speed(step), *(f"{name} {number(value)}" for name, value in metrics.items())]
        if self._bar:
            self._bar.update(self._task, completed=step, status=", ".join(words))
        elif now - self._shown >= _EVERY or step == self._total:
            self._shown = now
            done = f"step {step}/{self._total} ({100 * step // self._total}%)"
            self._print(f"{self._description}: {', '.join([done, *words])}")

    def note(self, message: str) -> None:
        """Prints a line that stays: above the bar, or among the plain lines."""
        if self._bar:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(message)

    def _speed(self, step: int) -> list[str]:
        (before, first), (now, last) = self._points[0], self._points[-1]
        if now <= before:
            return []
        rate = (last - first) / (now - before)
        return [f"{duration((self._total - step) / rate)} left", f"{number(rate)} steps/s"]

    def _print(self, line: str) -> None:
        if self._active:
            self._stream.write(line + "\n")
            self._stream.flush()


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable.

    Example:
      >>> [number(x) for x in (3, 0.5, 71.254, 1234.5, 123456.7, 1.5e9, 0.00012345, 1e-9, math.nan)]
      ['3', '0.5000', '71.25', '1234', '123457', '1.500e+09', '0.0001234', '1.000e-09', 'nan']
    """
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if 1000 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:#.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
      >>> duration(59.6), duration(3725), duration(100 * 3600)
      ('0:01:00', '1:02:05', '100:00:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _bar(stream: TextIO) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        bars.BarColumn(bar_width=10),
        bars.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        bars.TaskProgressColumn(table_column=Column(no_wrap=True)),
        # Takes what the others leave of the line.
        bars.TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        console=Console(file=stream),
        expand=True,
    )
