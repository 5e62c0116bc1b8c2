"""A profiler's trace of some steps, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from types import TracebackType
from typing import Any

import jax

WARM_UP = 10  # steps of a session before the trace: compilation, caches and first transfers are not what one asks about


class Trace(contextlib.AbstractContextManager["Trace"]):
    """Traces `steps` steps of this process, from the eleventh of a session on. Python's own calls are left out.

    Args:
      directory: Where the trace goes.
      first_step: The first step of this session.
      steps: How many to trace; 0: none.
    """

    def __init__(self, directory: pathlib.Path, *, first_step: int, steps: int) -> None:
        self.directory = directory
        self.begin = first_step + WARM_UP
        self.end = self.begin + steps
        self.running = False

    def start(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """To be called before a step; the step is dispatched in the context that it returns, which names it."""
        if step == self.begin < self.end:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.directory, profiler_options=options)
            self.running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stop(self, step: int, result: Any) -> None:
        """To be called after a step: waits for the last of those to be traced, and so for all of them."""
        if self.running and step == self.end - 1:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self.running = False
        jax.profiler.stop_trace()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Ends a trace that the run did not live to see the end of."""
        if self.running:
            self._stop()
