"""Data sets too large for memory: records read, decoded and augmented in worker processes, a batch at a time.

What the workers do is in `batches.py`; this is the data set that training and evaluation see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from wkd_jax.data import batches as batches_lib
from wkd_jax.data.base import OneSize
from wkd_jax.data.batches import Batches, Options, Records
from wkd_jax.data.order import Position, process_share, training_subset
from wkd_jax.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Some or all of a data set's records.

    Attributes:
      records: Where they are.
      record_labels: Call it for their labels, [len(records)] int32.
      kept: [N] int64, which records, in which order; None: all.
    """

    records: Records
    record_labels: Callable[[], np.ndarray]
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records) if self.kept is None else len(self.kept)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        labels = self.record_labels()
        return labels if self.kept is None else labels[self.kept]

    def subset(self, num_images: int) -> Split:
        """The balanced subset of so many images (`order.training_subset`); 0: the split itself."""
        if not num_images:
            return self
        labels = self.record_labels()
        return Split(self.records, lambda: labels, training_subset(labels, num_images))


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataSet(OneSize):
    """A classification data set whose images are read when they are needed. A `wkd_jax.data.base.DataSet`.

    Attributes:
      name: For people: reports and messages.
      class_names: One a class; labels are positions in it.
      train: Training split.
      test: The split that is evaluated.
      options: What becomes of an image.
      unreadable: Name and reason of every image that could not be read so far, by this process or as `note` was told.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    options: Options
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, 1 is the full range."""
        return self.options.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, 1 is the full range."""
        return self.options.std

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the batches' images, pixels."""
        return self.options.image_size, self.options.image_size

    @property
    def num_examples(self) -> int:
        """Of the training split."""
        return len(self.train)

    @property
    def labels(self) -> np.ndarray:
        """[num_examples] int32, of the training split. The first call may take a pass over the records."""
        return self.train.labels

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what evaluation sees: both splits' content, class names, resizing, mean and std.

        Files are known by their names, sizes and labels; pixels are not read.
        """
        options = {key: getattr(self.options, key) for key in ("image_size", "resize", "interpolation", "mean", "std")}
        splits = [
            [split.records.fingerprint, None if split.kept is None else hashlib.sha256(split.kept).hexdigest()]
            for split in (self.train, self.test)
        ]
        header = {"class_names": self.class_names, "options": options, "splits": splits}
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()

    def training(
        self, *, global_batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> StreamedInput:
        """The endless training stream, see `StreamedInput`."""
        return StreamedInput(
            self,
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
        """One pass over a split, resized and cropped at the centre, each example exactly once.

        Every process gets ceil(N / global_batch_size) batches; what is missing in the last one is padded with
        `valid=False`, black images, label 0 and index 0. An image that cannot be read is masked too.

        Args:
          split: Which.
          global_batch_size: Over all processes.
          process_index: Which equal, contiguous part of each global batch to give.
          process_count: Into how many parts it is divided.
          rows: [M] int64, which examples, in the order wanted; None: all, in the split's own order.

        Raises:
          ValueError: If the batch cannot be divided, or, while iterating, if too many images cannot be read.
        """
        share = process_share(global_batch_size, process_index, process_count)
        chosen = {"train": self.train, "test": self.test}[split]
        rows = np.arange(len(chosen)) if rows is None else np.asarray(rows)
        batches = Batches(
            chosen.records,
            chosen.kept,
            batches_lib.InOrder(rows, global_batch_size, share),
            functools.partial(batches_lib.evaluation_pixels, self.options),
            self.options,
            -(-len(rows) // global_batch_size),
        )
        return self._read(batches, 0)

    def _read(self, batches: Batches, start: int) -> Iterator[Batch]:
        """Batches from number `start` on, made in the workers."""
        iterator = batches_lib.read(batches, start)
        try:
            for made in iterator:
                self.note(dict(made.pop("problems")))
                yield Batch(**made)
        except RuntimeError as error:  # Grain's word for a worker that was killed
            raise OSError(
                f"{self.name}: a process that decodes images died ({error}). The system kills one when memory runs "
                "out: lower data.workers or global_batch_size, or give a container more shared memory"
            ) from error
        finally:
            with contextlib.suppress(AttributeError):  # what does not work in the background has nothing to close
                iterator.close()

    def note(self, unreadable: Mapping[str, str]) -> None:
        """Takes note of images that could not be read, by name, with the reason.

        Raises:
          ValueError: If there are now more than the config allows; names the last ones.
        """
        new = {name: reason for name, reason in unreadable.items() if name not in self.unreadable}
        self.unreadable.update(new)
        count, allowed = len(self.unreadable), self.options.max_bad_images
        if count > allowed:
            listed = "; ".join(f"{name}: {why}" for name, why in list(self.unreadable.items())[-5:])
            raise ValueError(
                f"{self.name}: {count} image(s) cannot be read, data.max_bad_images={allowed} allowed: {listed}. "
                "Restore the files, or allow more; what cannot be read is masked"
            )
        for name, reason in new.items():
            sys.stderr.write(f"{name} cannot be read ({reason}) and is left out: {count} of at most {allowed}\n")


class StreamedInput(Position):
    """The training stream of a streamed data set, an `Input`. Workers start with the first batch that is asked for.

    Args:
      data: Where examples come from.
      global_batch_size: B, over all processes.
      seed: Of order and augmentation, >= 0.
      process_index: Which equal, contiguous part of each global batch to give.
      process_count: Into how many parts it is divided.

    Raises:
      ValueError: If `seed` is negative or `global_batch_size` is not a positive multiple of `process_count`.
    """

    def __init__(
        self,
        data: StreamedDataSet,
        *,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        super().__init__(size=len(data.train), seed=seed, global_batch_size=global_batch_size)
        share = process_share(global_batch_size, process_index, process_count)
        self._data = data
        self._batches = self._made(data, global_batch_size, share, seed)
        self._iterator: Iterator[Batch] | None = None

    def _made(self, data: Any, global_batch_size: int, share: slice, seed: int) -> Any:
        """The batches by number. What they depend on besides seed and sizes is added to `_stream`."""
        return Batches(
            data.train.records,
            data.train.kept,
            batches_lib.Shuffled(len(data.train), seed, global_batch_size, share),
            functools.partial(batches_lib.training_pixels, data.options, seed),
            data.options,
            batches_lib.ENDLESS,
        )

    def __next__(self) -> Batch:
        """This process's part of the next global batch.

        Raises:
          ValueError: If too many images cannot be read.
        """
        if self._iterator is None:
            self._iterator = self._data._read(self._batches, self.next_batch)
        batch = next(self._iterator)
        self.next_batch += 1
        return batch

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `Position.set_state`. Workers that ran ahead elsewhere are stopped."""
        super().set_state(state)
        self.close()

    def close(self) -> None:
        """Stops the workers. The next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()  # type: ignore[attr-defined]
            self._iterator = None
