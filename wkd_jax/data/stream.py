"""Data sets too large for memory: records read, decoded and augmented in worker processes, a batch at a time.

What a batch holds is a function of its number alone, so order and pixels do not depend on how many processes, workers
or restarts there are; Grain supplies the worker processes, the buffers between them and the shared memory. Where the
encoded images come from is a `Records`: `image_folder.py`, `tfds_stream.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from wkd_jax.data import image as image_lib
from wkd_jax.data.base import cores
from wkd_jax.data.order import Position, process_share, stream, training_subset
from wkd_jax.data.randomness import Random
from wkd_jax.types import Batch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ENDLESS = 1 << 40  # batches: Grain wants a length
_INTERPOLATIONS = ("bilinear", "bicubic")


class Records(Protocol):
    """Encoded images with labels, by position. Sent to every worker process, so small when pickled."""

    @property
    def fingerprint(self) -> str:
        """Names the content: the same on every machine, another for other images, labels or order."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What a person finds the image by."""

    def fetch(self, rows: Sequence[int]) -> list[tuple[bytes, int] | Exception]:
        """(encoded image, label) of each row, in order, or why it cannot be read. Reads them side by side."""


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


@dataclasses.dataclass(frozen=True)
class Options:
    """How images become the pixels of a batch, and who does it; the arguments of the data sets.

    Attributes:
      image_size: Side of the square images that networks see, pixels.
      resize: Evaluation: the short side is resized to so many pixels before the centre crop.
      interpolation: Evaluation: bilinear or bicubic, antialiased.
      train_interpolation: Training: bilinear, bicubic, or random: one of the two an image.
      crop_scale: Training: smallest and largest share of the image that a random crop covers.
      flip: Training: mirror half of the images.
      rand_augment: Training: magnitude of RandAugment; 0: off.
      mean: Of the channels, 1 is the full range.
      std: Likewise.
      workers: Processes that decode; -1: one a CPU core that this process may use; 0: this process itself.
      max_bad_images: So many images may be unreadable: they are named, masked in their batch (`Batch.valid`), and of
        the mean colour, so that BatchNorm sees zeros. One more stops the run.

    Raises:
      ValueError: If a value is out of range; names it.
    """

    image_size: int
    resize: int
    interpolation: str
    train_interpolation: str
    crop_scale: tuple[float, float]
    flip: bool
    rand_augment: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int
    max_bad_images: int

    def __post_init__(self) -> None:
        valid: dict[str, tuple[bool, str]] = {
            "image_size": (self.image_size > 0, "above 0 pixels"),
            "resize": (self.resize >= self.image_size, f"at least image_size={self.image_size}"),
            "interpolation": (self.interpolation in _INTERPOLATIONS, "bilinear or bicubic"),
            "train_interpolation": (
                self.train_interpolation in (*_INTERPOLATIONS, "random"),
                "bilinear, bicubic or random",
            ),
            "crop_scale": (
                len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
                "two increasing shares of the image, above 0, at most 1",
            ),
            "rand_augment": (0 <= self.rand_augment <= 10, "from 0 (off) to 10"),
            "mean": (len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "three finite numbers"),
            "std": (len(self.std) == 3 and all(x > 0 for x in self.std), "three numbers above 0"),
            "workers": (self.workers >= -1, "-1 (one a core), 0 (no processes) or a number of processes"),
            "max_bad_images": (self.max_bad_images >= 0, "0 or more"),
        }
        for key, (good, words) in valid.items():
            if not good:
                raise ValueError(f"data.{key}={getattr(self, key)!r}: must be {words}")


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataSet:
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
        batches = _Batches(
            chosen.records,
            chosen.kept,
            _InOrder(rows, global_batch_size, share),
            functools.partial(_evaluation_pixels, self.options),
            self.options,
            -(-len(rows) // global_batch_size),
        )
        return self._read(batches, 0)

    def _read(self, batches: _Batches, start: int) -> Iterator[Batch]:
        """Batches from number `start` on, made in the workers."""
        data = grain.MapDataset.source(batches)[start:]
        workers = cores() if self.options.workers == -1 else self.options.workers
        iterator = iter(_prefetched(data, workers))
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
        self._batches = _Batches(
            data.train.records,
            data.train.kept,
            _Shuffled(len(data.train), seed, global_batch_size, share),
            functools.partial(_training_pixels, data.options, seed),
            data.options,
            _ENDLESS,
        )
        self._iterator: Iterator[Batch] | None = None

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


class _Places(NamedTuple):
    """What the rows of one process's part of a batch are: positions in the split, epochs, whether they count."""

    index: np.ndarray
    epoch: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """Which examples training batch i holds."""

    size: int
    seed: int
    global_batch_size: int
    share: slice

    def __call__(self, batch: int) -> _Places:
        start = batch * self.global_batch_size
        places = np.arange(start + self.share.start, start + self.share.stop)
        index = stream(int(places[0]), int(places[-1]) + 1, size=self.size, seed=self.seed)
        return _Places(index, places // self.size, np.ones(len(places), bool))


@dataclasses.dataclass(frozen=True, eq=False)
class _InOrder:
    """Which examples evaluation batch i holds."""

    rows: np.ndarray
    global_batch_size: int
    share: slice

    def __call__(self, batch: int) -> _Places:
        start = batch * self.global_batch_size
        places = np.arange(start + self.share.start, start + self.share.stop)
        valid = places < len(self.rows)
        index = np.where(valid, self.rows[np.minimum(places, len(self.rows) - 1)], 0)
        return _Places(index, np.zeros(len(places), np.int64), valid)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """Batches by number: what a worker process does. A random-access source in Grain's sense."""

    records: Records
    kept: np.ndarray | None
    places: Callable[[int], _Places]
    pixels: Callable[[np.ndarray, int, int], np.ndarray]
    options: Options
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> dict[str, Any]:
        index, epoch, valid = self.places(int(number))
        size = self.options.image_size
        image = np.zeros((len(index), size, size, 3), np.uint8)
        label = np.zeros(len(index), np.int32)
        wanted = np.flatnonzero(valid)
        rows = (index if self.kept is None else self.kept[index])[wanted].tolist()
        problems = []
        for place, row, found in zip(wanted, rows, self.records.fetch(rows), strict=True):
            try:
                if isinstance(found, Exception):
                    raise found
                encoded, label[place] = found
                image[place] = self.pixels(image_lib.decode(encoded), int(epoch[place]), int(index[place]))
            except (OSError, ValueError) as error:
                valid[place], label[place], image[place] = False, 0, mean_colour(self.options)
                problems.append((self.records.name(row), str(error)))
        return {"image": image, "label": label, "index": index.astype(np.int32), "valid": valid, "problems": problems}


def mean_colour(options: Options) -> tuple[int, int, int]:
    """What normalises to zero, to the nearest grey level."""
    red, green, blue = (round(255 * x) for x in options.mean)
    return red, green, blue


def _training_pixels(options: Options, seed: int, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
    return image_lib.training_image(
        image,
        Random(seed, epoch, index),
        image_size=options.image_size,
        scale=options.crop_scale,
        interpolation=options.train_interpolation,
        flip=options.flip,
        rand_augment=options.rand_augment,
        fill=mean_colour(options),
    )


def _evaluation_pixels(options: Options, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
    del epoch, index
    return image_lib.evaluation_image(
        image, image_size=options.image_size, resize=options.resize, interpolation=options.interpolation
    )


def _prefetched(data: grain.MapDataset, workers: int) -> grain.IterDataset:
    """In order, one batch ahead in each worker. Without workers one thread of this process works ahead."""
    threads = grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=0 if workers else 2)
    batches = data.to_iter_dataset(threads)
    if not workers:
        return batches
    if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which a program without them never parses
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return batches.mp_prefetch(options, worker_init_fn=functools.partial(_start_worker, os.getpid()))


def _start_worker(parent: int, index: int, count: int) -> None:
    """Signals that stop a run are for its main process, which ends the workers; they also end when it is killed."""
    del index, count
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
