"""Detection data sets, and their training stream: the counterpart of `stream.py`.

Worker processes, unreadable images and the saved position are those of classification. Which images and objects are
used: `detection_split.py`. What batches hold: `detection_batches.py`. In which order: `buckets.py`. Where it all comes
from: `coco.py`, `coco_tfds.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from wkd_jax.data import batches as batches_lib
from wkd_jax.data import buckets as buckets_lib
from wkd_jax.data.coco_json import Instances
from wkd_jax.data.detection_batches import Batches, Evaluation, Training
from wkd_jax.data.detection_split import DetectionSplit, Options
from wkd_jax.data.order import process_share
from wkd_jax.data.stream import StreamedDataSet, StreamedInput
from wkd_jax.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class DetectionDataSet(StreamedDataSet):
    """A detection data set whose images are read when they are needed. A `wkd_jax.data.base.DataSet`.

    Attributes:
      name: For people: reports and messages.
      class_names: One a class, in ascending order of COCO's category ids; labels are positions in it.
      train: Training split.
      test: The split that is evaluated.
      options: What becomes of an image and its boxes.
      unreadable: Name and reason of every image that could not be read so far, by this process or as `note` was told.

    Raises:
      ValueError: If the splits have different categories.
    """

    task: ClassVar[str] = "detection"

    train: DetectionSplit  # type: ignore[assignment]
    test: DetectionSplit  # type: ignore[assignment]
    options: Options  # type: ignore[assignment]

    def __post_init__(self) -> None:
        ours, theirs = (split.instances for split in (self.train, self.test))
        if differing := sorted(set(ours.categories) ^ set(theirs.categories)):
            raise ValueError(
                f"{ours.source} and {theirs.source} have different categories: {differing[:5]} are in one of them "
                "alone; take two files of one data set"
            )

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every shape that a batch's images can have, pixels."""
        return self.options.canvases

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the canvas of the largest area, pixels."""
        return max(self.canvases, key=math.prod)

    @property
    def example(self) -> Batch:
        """An image on the largest canvas, with rows for boxes, see `detection_batches`."""

        def array(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        slots, scalar = self.options.max_boxes, array(np.int32)
        extra = {
            "boxes": array(np.float32, slots, 4),
            "box_valid": array(np.bool_, slots),
            "size": array(np.int32, 2),
            "original_size": array(np.int32, 2),
            "image_id": scalar,
        }
        return Batch(array(np.uint8, *self.image_size, 3), array(np.int32, slots), scalar, array(np.bool_), extra)

    @property
    def ground_truth(self) -> Instances:
        """What evaluation compares detections of the test split with: all of its images and annotations."""
        return self.test.instances

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for people on what of the annotations is left out or changed, with counts."""
        return (*self.train.notes, *self.test.notes)

    @property
    def labels(self) -> np.ndarray:
        """There are none: an image has as many classes as objects.

        Raises:
          ValueError: Always.
        """
        raise ValueError(
            f"{self.name}: a detection data set has no label an image, so methods and class similarities that are made "
            "of images by class do not work with it; choose another method, or interrelation.kind='classifier'"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what evaluation sees: both splits, categories, canvases, sizes, mean and std.

        Files are known by their names and sizes; pixels are not read.
        """
        keys = ("canvases", "test_short", "max_side", "max_boxes", "mean", "std")
        options = {key: getattr(self.options, key) for key in keys}
        header = {"options": options, "splits": [self.train.fingerprint, self.test.fingerprint]}
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()

    def training(
        self, *, global_batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> DetectionInput:
        """The endless training stream, see `DetectionInput`."""
        return DetectionInput(
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
        """One pass over a split, canvas by canvas, each image exactly once, with those that have no objects.

        Every process gets the same number of batches, of the same canvases. What is missing in the last batch of a
        canvas is padded with `valid=False`, black images, image id -1, index 0, no boxes, and the canvas's own size.

        Args:
          split: Which; of "train", the images that training uses.
          global_batch_size: Over all processes.
          process_index: Which equal, contiguous part of each global batch to give.
          process_count: Into how many parts it is divided.
          rows: [M] int64, which examples; those of one canvas come in this order. None: all, in the split's own order.

        Raises:
          ValueError: If the batch cannot be divided, or, while iterating, if an image cannot be read: average precision
            is over all images, so `max_bad_images` is for training alone.
        """
        share = process_share(global_batch_size, process_index, process_count)
        chosen = {"train": self.train, "test": self.test}[split]
        rows = np.arange(len(chosen)) if rows is None else np.asarray(rows)
        places = buckets_lib.InOrder(
            chosen.buckets(self.options.test_short, self.options), rows, global_batch_size, share
        )
        batches = Batches(chosen, places, Evaluation(self.options), self.options, len(places))
        for number, batch in enumerate(self._read(batches, 0)):  # type: ignore[arg-type]
            _, expected = places(number)
            if len(lost := expected.index[expected.valid & ~batch.valid]):
                name = chosen.records.name(int(chosen.kept[lost[0]]))
                raise ValueError(
                    f"{self.name}: {name} cannot be read ({self.unreadable[name]}), and evaluation is over all images: "
                    "restore the file. data.max_bad_images is for training alone"
                )
            yield batch


class DetectionInput(StreamedInput):
    """The training stream of a detection data set, an `Input`. All images of a batch are on one canvas.

    Which images batch i holds, and on which canvas, is said in `buckets.py`, not in `order.stream`. The saved position
    is the number of the next batch, as always. Arguments are those of `StreamedInput`.
    """

    def _made(self, data: DetectionDataSet, global_batch_size: int, share: slice, seed: int) -> Batches:
        buckets = data.train.buckets(max(data.options.train_short), data.options)
        places = buckets_lib.Shuffled(buckets, seed, global_batch_size, share)
        self._stream["images_by_canvas"] = places.sizes.tolist()
        return Batches(data.train, places, Training(data.options, seed), data.options, batches_lib.ENDLESS)
