"""Detection batches by number: images on a canvas with padded boxes. What a worker process does.

The counterpart of `batches.Batches`, and like it started by `batches.read`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from wkd_jax.data import batches as batches_lib
from wkd_jax.data import canvas as canvas_lib
from wkd_jax.data import detection_split
from wkd_jax.data import image as image_lib
from wkd_jax.data.batches import Places
from wkd_jax.data.detection_split import DetectionSplit, Options
from wkd_jax.data.randomness import Random


@dataclasses.dataclass(frozen=True)
class Training:
    """How training shows an image in an epoch."""

    options: Options
    seed: int

    def __call__(self, epoch: int, index: int) -> tuple[int, bool]:
        """(short side, whether to flip)."""
        random = Random(self.seed, epoch, index)
        short = self.options.train_short[random.integer(len(self.options.train_short))]
        return short, self.options.flip and random.coin()

    def resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """To (height, width), antialiased."""
        return image_lib.resize(image, size, "bilinear")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How evaluation shows an image."""

    options: Options

    def __call__(self, epoch: int, index: int) -> tuple[int, bool]:
        """(short side, whether to flip)."""
        del epoch, index
        return self.options.test_short, False

    def resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """To (height, width), by Pillow itself."""
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


class Batches:
    """Batches by number: what a worker process does. A random-access source in Grain's sense.

    Args:
      split: Where images and boxes come from.
      places: Which canvas and which examples batch i is of.
      view: How an example is shown.
      options: Canvases, and rows for boxes.
      length: Number of batches.
    """

    def __init__(
        self,
        split: DetectionSplit,
        places: Callable[[int], tuple[int, Places]],
        view: Training | Evaluation,
        options: Options,
        length: int,
    ) -> None:
        self.options = options
        self._records, self._places, self._view, self._length = split.records, places, view, length
        # What workers need, and no more: it is sent to each of them.
        instances, self._kept = split.instances, split.kept
        self._sizes, self._ids = instances.sizes, instances.image_ids
        self._boxes, self._labels = instances.boxes[split.usable], instances.labels[split.usable]
        self._first = np.searchsorted(instances.images[split.usable], np.arange(len(instances) + 1))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> dict[str, Any]:
        bucket, (index, epoch, valid) = self._places(int(number))
        canvas = self.options.canvases[bucket]
        batch, slots = len(index), self.options.max_boxes
        image = np.zeros((batch, *canvas, 3), np.uint8)
        label = np.full((batch, slots), -1, np.int32)
        boxes = np.zeros((batch, slots, 4), np.float32)
        size, original_size = (np.tile(np.array(canvas, np.int32), (batch, 1)) for _ in range(2))
        image_id = np.full(batch, -1, np.int32)
        wanted = np.flatnonzero(valid)
        rows = self._kept[index[wanted]].tolist()
        problems = []
        for place, row, found in zip(wanted, rows, self._records.fetch(rows), strict=True):
            try:
                pixels = detection_split.decoded(found, self._ids[row], self._sizes[row])
            except (OSError, ValueError) as error:
                valid[place], image[place] = False, batches_lib.mean_colour(self.options)  # type: ignore[arg-type]
                problems.append((self._records.name(row), str(error)))
                continue
            short, flip = self._view(int(epoch[place]), int(index[place]))
            height, width = canvas_lib.resized_sizes(self._sizes[row], short, self.options.max_side).tolist()
            pixels = self._view.resize(pixels, (height, width))
            image[place, :height, :width] = cv2.flip(pixels, 1) if flip else pixels
            size[place], original_size[place], image_id[place] = (height, width), self._sizes[row], self._ids[row]
            objects = slice(self._first[row], self._first[row + 1])
            count = objects.stop - objects.start
            label[place, :count] = self._labels[objects]
            boxes[place, :count] = canvas_lib.place_boxes(self._boxes[objects], self._sizes[row], size[place], flip)
        return {
            "image": image,
            "label": label,
            "index": index.astype(np.int32),
            "valid": valid,
            "extra": {
                "boxes": boxes,
                "box_valid": label >= 0,
                "size": size,
                "original_size": original_size,
                "image_id": image_id,
            },
            "problems": problems,
        }
