"""Batches by number: what the worker processes of a streamed data set do, and how they are started.

What a batch holds is a function of its number alone, so order and pixels do not depend on how many processes, workers
or restarts there are; Grain supplies the processes, the buffers between them and the shared memory. Where the encoded
images come from is a `Records`: `image_folder.py`, `tfds_stream.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from wkd_jax.data import image as image_lib
from wkd_jax.data.base import cores
from wkd_jax.data.order import stream
from wkd_jax.data.randomness import Random

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDLESS = 1 << 40  # batches: Grain wants a length
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


class Places(NamedTuple):
    """What the rows of one process's part of a batch are: positions in the split, epochs, whether they count."""

    index: np.ndarray
    epoch: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Which examples training batch i holds."""

    size: int
    seed: int
    global_batch_size: int
    share: slice

    def __call__(self, batch: int) -> Places:
        """The stream's next examples (`order.stream`)."""
        start = batch * self.global_batch_size
        places = np.arange(start + self.share.start, start + self.share.stop)
        index = stream(int(places[0]), int(places[-1]) + 1, size=self.size, seed=self.seed)
        return Places(index, places // self.size, np.ones(len(places), bool))


@dataclasses.dataclass(frozen=True, eq=False)
class InOrder:
    """Which examples evaluation batch i holds."""

    rows: np.ndarray
    global_batch_size: int
    share: slice

    def __call__(self, batch: int) -> Places:
        """The next rows; what is missing in the last batch does not count."""
        start = batch * self.global_batch_size
        places = np.arange(start + self.share.start, start + self.share.stop)
        valid = places < len(self.rows)
        index = np.where(valid, self.rows[np.minimum(places, len(self.rows) - 1)], 0)
        return Places(index, np.zeros(len(places), np.int64), valid)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by number: what a worker process does. A random-access source in Grain's sense."""

    records: Records
    kept: np.ndarray | None
    places: Callable[[int], Places]
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


def training_pixels(options: Options, seed: int, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
    """A decoded image as training sees it in this epoch."""
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


def evaluation_pixels(options: Options, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
    """A decoded image as evaluation sees it."""
    del epoch, index
    return image_lib.evaluation_image(
        image, image_size=options.image_size, resize=options.resize, interpolation=options.interpolation
    )


def read(batches: Batches, start: int) -> Iterator[dict[str, Any]]:
    """Batches from number `start` on, in order, made one ahead in each worker; without workers, by a thread of its own.

    Returns:
      Grain's iterator; with workers it has a `close`.
    """
    workers = cores() if batches.options.workers == -1 else batches.options.workers
    data = grain.MapDataset.source(batches)[start:]
    threads = grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=0 if workers else 2)
    ordered = data.to_iter_dataset(threads)
    if not workers:
        return iter(ordered)
    if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which a program without them never parses
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return iter(ordered.mp_prefetch(options, worker_init_fn=functools.partial(_start_worker, os.getpid())))


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
