"""Data sets that are whole in host memory: their splits, an endless training stream, one pass for evaluation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from wkd_jax.data.base import OneSize
from wkd_jax.data.order import Position, process_share, stream
from wkd_jax.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Labelled images in host memory. A position in the split is what `Batch.index` holds.

    Attributes:
      images: [N, H, W, 3] uint8, RGB.
      labels: [N] int32.

    Raises:
      ValueError: If shapes or dtypes are others.

    Example:
      >>> split = Split(np.zeros((2, 8, 8, 3), np.uint8), np.array([1, 0], np.int32))
      >>> len(split), split.image_size
      (2, (8, 8))
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise ValueError(f"images: need [N, H, W, 3] uint8, got {self.images.shape} {self.images.dtype}")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels: need [{len(self.images)}] int32, got {list(self.labels.shape)} {self.labels.dtype}"
            )
        if not len(self.images):
            raise ValueError("images: a split needs at least one image")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image, pixels."""
        return self.images.shape[1], self.images.shape[2]


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryDataSet(OneSize):
    """A classification data set that is whole in host memory.

    Attributes:
      name: For people: reports and messages.
      class_names: One a class; labels are positions in it.
      train: Training split.
      test: The split that is evaluated.
      mean: Per channel, of `images / 255` over the training pixels (see `channel_statistics`).
      std: Likewise, the population standard deviation.
      unreadable: Nothing: every image was read when the set was loaded.

    Raises:
      ValueError: If a label has no class name, the splits' images differ in size, or a `std` is not positive.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train.image_size != self.test.image_size:
            raise ValueError(
                f"{self.name}: training images are {self.train.image_size} pixels, test images {self.test.image_size}"
            )
        for split_name, labels in (("train", self.train.labels), ("test", self.test.labels)):
            wrong = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
            if len(wrong):
                raise ValueError(
                    f"{self.name}: label {labels[wrong[0]]} of {split_name} example {wrong[0]} is not in "
                    f"0..{len(self.class_names) - 1}; use a split whose examples are labelled"
                )
        if not min(self.std) > 0:
            raise ValueError(
                f"{self.name}: std={self.std} must be positive: a channel of the training images is constant"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image, pixels."""
        return self.train.image_size

    @property
    def num_examples(self) -> int:
        """Of the training split."""
        return len(self.train)

    @property
    def labels(self) -> np.ndarray:
        """[num_examples] int32, of the training split."""
        return self.train.labels

    def note(self, unreadable: Mapping[str, str]) -> None:
        """There is nothing to add: every image was read when the set was loaded."""

    def training(
        self, *, global_batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> MemoryInput:
        """The endless training stream, see `MemoryInput`."""
        return MemoryInput(
            self.train,
            global_batch_size=global_batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluation(
        self,
        split: Literal["train", "test"],
        *,
        global_batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        rows: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """One pass over a split, see `evaluation_batches`."""
        return evaluation_batches(
            {"train": self.train, "test": self.test}[split],
            global_batch_size=global_batch_size,
            process_index=process_index,
            process_count=process_count,
            rows=rows,
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that training and evaluation see: pixels, labels, their order, class names, mean, std.

        The same on every machine. `name` is left out, so that what was computed from the same content elsewhere (class
        similarities of a teacher, say) is found again.
        """
        header = {
            "class_names": self.class_names,
            "mean": self.mean,
            "std": self.std,
            "shapes": [self.train.images.shape, self.test.images.shape],
        }
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for split in (self.train, self.test):
            digest.update(np.ascontiguousarray(split.images))
            digest.update(np.ascontiguousarray(split.labels, dtype="<i4"))
        return digest.hexdigest()


class MemoryInput(Position):
    """The training stream of a split, an `Input`.

    Batch i is positions [i * B, (i + 1) * B) of the concatenated epochs' permutations (`wkd_jax.data.order.stream`).
    Batches cross the border between epochs, so every example is used exactly once an epoch, none is dropped, and B may
    exceed the number of examples.

    Args:
      split: Where examples come from.
      global_batch_size: B, over all processes.
      seed: Of the order, >= 0.
      process_index: Which equal, contiguous part of each global batch to give.
      process_count: Into how many parts it is divided. The order of examples does not depend on it.

    Raises:
      ValueError: If `seed` is negative or `global_batch_size` is not a positive multiple of `process_count`.

    Example:
      >>> split = Split(np.zeros((5, 8, 8, 3), np.uint8), np.arange(5, dtype=np.int32))
      >>> batches = MemoryInput(split, global_batch_size=4, seed=0)
      >>> next(batches).index
      array([1, 4, 2, 0], dtype=int32)
      >>> state = batches.get_state()
      >>> next(batches).index
      array([3, 2, 3, 1], dtype=int32)
      >>> batches.set_state(state)
      >>> next(batches).index
      array([3, 2, 3, 1], dtype=int32)
    """

    def __init__(
        self, split: Split, *, global_batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        super().__init__(size=len(split), seed=seed, global_batch_size=global_batch_size)
        self._share = process_share(global_batch_size, process_index, process_count)
        self._split, self._seed, self._batch_size = split, seed, global_batch_size

    def __next__(self) -> Batch:
        """This process's part of the next global batch, as NumPy arrays of its own."""
        first = self.next_batch * self._batch_size
        rows = stream(first + self._share.start, first + self._share.stop, size=len(self._split), seed=self._seed)
        self.next_batch += 1
        return _batch(self._split, rows, np.ones(len(rows), bool))

    def close(self) -> None:
        """Nothing works in the background."""


def evaluation_batches(
    split: Split,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """One pass over a split, each example exactly once.

    Every process gets ceil(N / global_batch_size) batches of the N examples. What is missing in the last one is padded
    with `valid=False`; padded rows have black images, label 0 and index 0.

    Args:
      split: What to evaluate.
      global_batch_size: Over all processes.
      process_index: Which equal, contiguous part of each global batch to give.
      process_count: Into how many parts it is divided.
      rows: [M] int64, which examples, in the order wanted; None: all, in the split's own order.

    Returns:
      This process's parts, as NumPy arrays of their own.

    Raises:
      ValueError: If `global_batch_size` is not a positive multiple of `process_count`.

    Example:
      >>> split = Split(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3, dtype=np.int32))
      >>> [batch.valid.tolist() for batch in evaluation_batches(split, global_batch_size=2)]
      [[True, True], [True, False]]
    """
    share = process_share(global_batch_size, process_index, process_count)
    rows = np.arange(len(split)) if rows is None else rows
    starts = range(0, len(rows), global_batch_size)
    return (_padded(split, rows, np.arange(start + share.start, start + share.stop)) for start in starts)


def _padded(split: Split, rows: np.ndarray, places: np.ndarray) -> Batch:
    valid = places < len(rows)
    batch = _batch(split, np.where(valid, rows[np.minimum(places, len(rows) - 1)], 0), valid)
    batch.image[~valid] = 0
    batch.label[~valid] = 0
    return batch


def _batch(split: Split, rows: np.ndarray, valid: np.ndarray) -> Batch:
    """Copies rows out, so that whoever gets the batch may donate or change it."""
    return Batch(image=split.images[rows], label=split.labels[rows], index=rows.astype(np.int32), valid=valid)
