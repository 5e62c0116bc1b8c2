"""Steps and epochs. The one place that converts between them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from wkd_jax.types import Progress


@dataclasses.dataclass(frozen=True)
class Clock:
    """Time of a run whose batches are cut from an endless stream of shuffled epochs, so that nothing is dropped.

    Attributes:
      num_examples: Examples of one epoch.
      global_batch_size: Examples a step.
      epochs: Of the whole run, begun ones included.
      length: Steps of the whole run; None: as many as `epochs` whole epochs take.
    """

    num_examples: int
    global_batch_size: int
    epochs: int
    length: int | None = None

    @classmethod
    def of_steps(cls, num_examples: int, global_batch_size: int, steps: int) -> Clock:
        """The time of a run whose length is given in steps.

        Example:
          >>> Clock.of_steps(num_examples=100, global_batch_size=64, steps=4).epochs
          3
        """
        return cls(num_examples, global_batch_size, -(-steps * global_batch_size // num_examples), steps)

    @property
    def total_steps(self) -> int:
        """Steps that use every example at least `epochs` times, or `length`.

        Example:
          >>> Clock(num_examples=100, global_batch_size=64, epochs=2).total_steps
          4
        """
        return self.length or math.ceil(self.epochs * self.num_examples / self.global_batch_size)

    def steps(self, epochs: float) -> int:
        """The step at which that many epochs are over, rounded up.

        Example:
          >>> Clock(num_examples=100, global_batch_size=64, epochs=2).steps(1)
          2
        """
        return min(math.ceil(epochs * self.num_examples / self.global_batch_size), self.total_steps)

    def epochs_done(self, step: int) -> float:
        """Epochs that are over after `step` steps, for logs.

        Example:
          >>> Clock(num_examples=100, global_batch_size=64, epochs=2).epochs_done(1)
          0.64
        """
        return step * self.global_batch_size / self.num_examples

    def progress(self, step: jax.Array) -> Progress:
        """Progress at a traced int32 `step`."""
        # Counted, not computed: step * batch overflows int32 on long runs. (`searchsorted` would be a loop of kernels.)
        starts = [-(-epoch * self.num_examples // self.global_batch_size) for epoch in range(1, self.epochs)]
        epoch = 1 + jnp.sum(step >= jnp.asarray(starts, jnp.int32), dtype=jnp.int32)
        return Progress(step=step, epoch=epoch, epochs=jnp.asarray(self.epochs, jnp.int32))
