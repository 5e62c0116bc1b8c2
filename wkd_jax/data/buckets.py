"""Which examples a batch holds where all examples of a batch must belong to one bucket (have one image shape).

As in `order.py`, everything is a pure function of seed and batch number, and the same for any number of processes.

Training: an epoch's order of all examples is `order.epoch_permutation`; each bucket takes its own out of it. A bucket's
epochs, end to end, are cut into batches, so that what does not fill a batch is carried into its next epoch: none is
dropped, and within a bucket every example is used once before any is used again. Epoch e of the whole has the batches
that became full with the examples of epoch e, in random order. So after e epochs each bucket is less than one batch
behind e passes over its examples, however long the run.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from wkd_jax.data.batches import Places
from wkd_jax.data.order import epoch_permutation

_BATCH_ORDER = 2**64  # added to the seed of the order of batches: beyond any seed of a run


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """Which bucket and which examples training batch i is of.

    Attributes:
      buckets: [N] integers, the bucket of each example.
      seed: Of the run, >= 0.
      global_batch_size: B, over all processes. May exceed a bucket's examples, which then recur within a batch.
      share: The rows of each global batch that this process holds.

    Example:
      >>> batches = Shuffled(np.array([0, 0, 1, 0, 1, 0]), seed=0, global_batch_size=2, share=slice(0, 2))
      >>> [(bucket, places.index.tolist()) for bucket, places in map(batches, range(3))]
      [(0, [1, 5]), (0, [0, 3]), (1, [4, 2])]
    """

    buckets: np.ndarray
    seed: int
    global_batch_size: int
    share: slice

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """[K] int64, examples of each bucket."""
        return np.bincount(self.buckets)

    def full(self, epochs: int) -> np.ndarray:
        """[K] int64: batches of each bucket that the examples of so many epochs fill."""
        return epochs * self.sizes // self.global_batch_size

    def __call__(self, batch: int) -> tuple[int, Places]:
        """(bucket, this process's rows)."""
        epoch = max(0, -(-(batch + 1) * self.global_batch_size // len(self.buckets)) - 1)  # not before this one
        while self.full(epoch + 1).sum() <= batch:
            epoch += 1
        before, order = self.full(epoch), _batch_order(self, epoch)
        place = batch - int(before.sum())
        bucket = int(order[place])
        number = int(before[bucket] + np.count_nonzero(order[:place] == bucket))
        start = number * self.global_batch_size
        epochs, offsets = np.divmod(np.arange(start + self.share.start, start + self.share.stop), self.sizes[bucket])
        index = np.empty(len(epochs), np.int64)
        for each in np.unique(epochs):
            rows = epochs == each
            index[rows] = _members(self, int(each))[bucket][offsets[rows]]
        return bucket, Places(index, epochs, np.ones(len(index), bool))


@functools.lru_cache(maxsize=4)
def _members(order: Shuffled, epoch: int) -> list[np.ndarray]:
    """Each bucket's examples in the order of an epoch."""
    permutation = epoch_permutation(order.seed, epoch, len(order.buckets))
    buckets = order.buckets[permutation]
    return [permutation[buckets == bucket] for bucket in range(len(order.sizes))]


@functools.lru_cache(maxsize=4)
def _batch_order(order: Shuffled, epoch: int) -> np.ndarray:
    """The buckets of an epoch's batches."""
    buckets = np.repeat(np.arange(len(order.sizes)), order.full(epoch + 1) - order.full(epoch))
    return buckets[epoch_permutation(order.seed + _BATCH_ORDER, epoch, len(buckets))]


@dataclasses.dataclass(frozen=True, eq=False)
class InOrder:
    """Which bucket and which examples evaluation batch i is of: bucket by bucket, each row once.

    Attributes:
      buckets: [N] integers, the bucket of each example.
      rows: [M] integers, the examples to visit; within a bucket, in this order.
      global_batch_size: B, over all processes. A bucket's last batch is filled up with rows that do not count.
      share: The rows of each global batch that this process holds.

    Example:
      >>> batches = InOrder(np.array([0, 1, 0]), np.arange(3), global_batch_size=2, share=slice(0, 2))
      >>> [(bucket, places.index.tolist(), places.valid.tolist()) for bucket, places in map(batches, range(2))]
      [(0, [0, 2], [True, True]), (1, [1, 0], [True, False])]
    """

    buckets: np.ndarray
    rows: np.ndarray
    global_batch_size: int
    share: slice

    @functools.cached_property
    def _batches(self) -> list[tuple[int, np.ndarray]]:
        batches = []
        for bucket in np.unique(self.buckets[self.rows]).tolist():
            rows = self.rows[self.buckets[self.rows] == bucket]
            starts = range(0, len(rows), self.global_batch_size)
            batches += [(bucket, rows[start : start + self.global_batch_size]) for start in starts]
        return batches

    def __len__(self) -> int:
        return len(self._batches)

    def __call__(self, batch: int) -> tuple[int, Places]:
        """(bucket, this process's rows); rows that do not count have index 0."""
        bucket, rows = self._batches[batch]
        index = np.zeros(self.global_batch_size, np.int64)
        index[: len(rows)] = rows
        valid = np.arange(self.global_batch_size) < len(rows)
        return bucket, Places(index[self.share], np.zeros_like(index[self.share]), valid[self.share])
