"""In which order examples are taken: pure functions of seed and position, shared by everything that feeds training.

Nothing here depends on how many processes or workers read, so a run can go on with another number of them. NumPy
guarantees the bits of `Philox` and `SeedSequence` from version to version (not those of `Generator.permutation`),
hence sorting raw bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np


@functools.lru_cache(maxsize=2)  # a batch that crosses into the next epoch needs two
def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of all examples in one epoch: uniformly random, a pure function of the arguments.

    `size` 64-bit words are drawn from Philox, seeded by `SeedSequence(seed, spawn_key=(epoch,))`; the order is that of
    their stable sort.

    Args:
      seed: Of the run, >= 0.
      epoch: 0-based.
      size: Number of examples, N.

    Returns:
      [N] int64, read-only.

    Raises:
      ValueError: If `seed` is negative.

    Example:
      >>> epoch_permutation(0, 0, 5), epoch_permutation(0, 1, 5)
      (array([1, 4, 2, 0, 3]), array([2, 3, 1, 0, 4]))
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: must be 0 or more")
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # it is cached
    return order


def stream(start: int, stop: int, *, size: int, seed: int) -> np.ndarray:
    """Examples at positions [start, stop) of the endless training stream: the epochs' permutations, end to end.

    Args:
      start: First position, >= 0.
      stop: One past the last.
      size: Number of examples, N.
      seed: Of the run, >= 0.

    Returns:
      [stop - start] int64, positions in the split.

    Example:
      >>> stream(3, 7, size=5, seed=0)  # the last two of epoch 0, the first two of epoch 1
      array([0, 3, 2, 3])
    """
    parts = []
    while start < stop:
        epoch, offset = divmod(start, size)
        end = min(size, offset + stop - start)
        parts.append(epoch_permutation(seed, epoch, size)[offset:end])
        start += end - offset
    return np.concatenate(parts)


def process_share(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of every global batch that one process holds: the processes' equal parts, in order.

    Raises:
      ValueError: If the batch cannot be divided, or there is no such process.

    Example:
      >>> process_share(12, 1, 3)
      slice(4, 8, None)
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must be in 0..{process_count - 1} (process_count - 1)")
    if global_batch_size < 1 or global_batch_size % process_count:
        raise ValueError(
            f"global_batch_size={global_batch_size}: must be a positive multiple of process_count={process_count}"
        )
    rows = global_batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


class Position:
    """Where a training stream stands: the part of an `Input` that is saved, the same whatever reads the examples.

    Attributes:
      next_batch: Number of the batch that `next` will give.

    Args:
      size: Number of examples, N.
      seed: Of the run, >= 0.
      global_batch_size: Examples a batch, over all processes.

    Raises:
      ValueError: If `seed` is negative.

    Example:
      >>> position = Position(size=5, seed=0, global_batch_size=4)
      >>> position.next_batch = 3
      >>> position.get_state()
      {'next_batch': 3, 'seed': 0, 'num_examples': 5, 'global_batch_size': 4}
    """

    def __init__(self, *, size: int, seed: int, global_batch_size: int) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        self._stream = {"seed": seed, "num_examples": size, "global_batch_size": global_batch_size}
        self.next_batch = 0

    def get_state(self) -> dict[str, int]:
        """The number of the next batch, and what the stream is made from."""
        return {"next_batch": self.next_batch, **self._stream}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to the batch that was next when `get_state` was called.

        Raises:
          ValueError: If the state is of another stream.
        """
        saved = {key: value for key, value in state.items() if key != "next_batch"}
        if saved != self._stream or "next_batch" not in state:
            raise ValueError(
                f"the saved input position {dict(state)} is of another training stream than this run's {self._stream}; "
                "go on with the settings it was saved with, or start a new run"
            )
        self.next_batch = state["next_batch"]


def training_subset(labels: np.ndarray, train_images: int) -> np.ndarray:
    """Positions of the training examples that `train_images` keeps.

    The order is the first example of every class, then the second of every class, and so on, classes ascending and
    each class in the order of the data set. So any n of them are balanced to within one a class, as long as no class
    has run out, and a smaller subset is the beginning of a larger one.

    Args:
      labels: [N] integers.
      train_images: How many to keep, or 0 for all, in the data set's own order.

    Returns:
      [train_images or N] int64.

    Raises:
      ValueError: If `train_images` is out of range.

    Example:
      >>> training_subset(np.array([0, 0, 0, 1, 1, 2]), 5)
      array([0, 3, 5, 1, 4])
    """
    if not 0 <= train_images <= len(labels):
        raise ValueError(f"train_images={train_images}: must be 0 (all of them) or 1..{len(labels)}")
    if train_images == 0:
        return np.arange(len(labels))
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)  # how many examples of the same class come earlier
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.lexsort((labels, rank))[:train_images]
