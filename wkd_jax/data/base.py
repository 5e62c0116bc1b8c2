"""What training needs of a data set, and of whatever feeds it.

A factory (`digits`, `tfds`) returns a `DataSet`; its `training` is an endless stream of batches, an `Input`. Both are
host-side NumPy: JAX sees nothing before a batch is put on the devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import numpy as np

from wkd_jax.types import Batch

_CHUNK = 1024  # images a pass over a split looks at together, so that no pass needs a second copy of the split


class DataSet(Protocol):
    """A data set with a training and a test split, wherever its pixels are.

    Attributes:
      name: For people: reports and messages.
      task: Registered name of the task that its labels are for.
      class_names: One a class; labels are positions in it.
      mean: Per channel, of `images / 255` over the training pixels (see `channel_statistics`).
      std: Likewise, the population standard deviation.
      canvases: (height, width) of every shape that a batch's images can have, pixels.
      image_size: The one of the largest area.
      example: A batch as `training` gives it, less its leading axis, of images of `image_size`: shapes and dtypes.
      notes: Sentences for people on what of the files is left out or changed, with counts.
      num_examples: Of the training split.
      labels: [num_examples] int32, of the training split in its own order. May be slow to get: ask when needed.
      fingerprint: Names the content: the same on every machine, another for other pixels, labels or order.
      unreadable: Name and reason of every image that could not be read so far and was masked.
    """

    name: str
    task: ClassVar[str]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: Mapping[str, str]

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]: ...  # noqa: D102

    @property
    def image_size(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def example(self) -> Batch: ...  # noqa: D102

    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def num_examples(self) -> int: ...  # noqa: D102

    @property
    def labels(self) -> np.ndarray: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def note(self, unreadable: Mapping[str, str]) -> None:
        """Adds what other processes, or the run before it was resumed, could not read.

        Raises:
          ValueError: If there are now more such images than the config allows.
        """

    def training(self, *, global_batch_size: int, seed: int, process_index: int = 0, process_count: int = 1) -> Input:
        """The endless training stream, this process's part of each global batch."""

    def evaluation(
        self,
        split: Literal["train", "test"],
        *,
        global_batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        rows: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """One pass over a split, unaugmented, each example once; padding has `valid=False`.

        `rows` [M] int64 are the positions to visit, in that order; None: all, in the split's own.
        """


class OneSize:
    """What data sets have in common whose images are of one size and have one label each."""

    task: ClassVar[str] = "classification"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image, pixels."""
        raise NotImplementedError

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """The images' size alone."""
        return (self.image_size,)

    @property
    def example(self) -> Batch:
        """An image, a label."""
        scalar = jax.ShapeDtypeStruct((), np.int32)
        image = jax.ShapeDtypeStruct((*self.image_size, 3), np.uint8)
        return Batch(image, scalar, scalar, jax.ShapeDtypeStruct((), np.bool_))  # type: ignore[arg-type]

    @property
    def notes(self) -> tuple[str, ...]:
        """None: every image is used as it is."""
        return ()


class Input(Protocol):
    """An endless stream of training batches that can be stopped and resumed at any batch.

    The order of examples is that of `wkd_jax.data.order.stream`, whatever reads them: batch i holds positions
    [i * global_batch_size, (i + 1) * global_batch_size) of it, and process p the p-th equal part of that. So the state
    is the same on every process and is good for another number of processes.
    """

    def __next__(self) -> Batch:
        """This process's part of the next global batch: NumPy arrays, images uint8.

        `valid` is True but for images that could not be read, where the data set allows some.
        """

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands: what JSON can hold, enough to go on with the batch that `next` would give."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
          ValueError: If the state is of another stream (seed, number of examples, global batch size).
        """

    def close(self) -> None:
        """Stops what works in the background. The input is of no further use."""


def cores() -> int:
    """CPU cores that this process may use: all, or those that it is pinned to where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of `images / 255`, per channel.

    Sums are exact integers, so the result is the same on every machine.

    Args:
      images: [N, H, W, 3] uint8.

    Returns:
      (mean, std), three floats each; 1 is the full range.

    Example:
      >>> channel_statistics(np.array([0, 255] * 3, np.uint8).reshape(1, 3, 2, 1).transpose(0, 2, 3, 1))
      ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    total = np.zeros(3, np.int64)
    squares = np.zeros(3, np.int64)
    for start in range(0, len(images), _CHUNK):
        pixels = images[start : start + _CHUNK].reshape(-1, 3).astype(np.int64)
        total += pixels.sum(axis=0)
        squares += (pixels * pixels).sum(axis=0)
    count = images.size // 3
    mean = tuple(int(t) / (255 * count) for t in total)
    # Python integers: count * squares - total^2 cancels, and may exceed 64 bits.
    variance = [(count * int(s) - int(t) ** 2) / (255 * count) ** 2 for s, t in zip(squares, total, strict=True)]
    return mean, tuple(map(math.sqrt, variance))
