"""Which images and objects of a detection split are used, on which canvas, and what is counted on the way."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np

from wkd_jax.data import canvas as canvas_lib
from wkd_jax.data import image as image_lib
from wkd_jax.data.batches import Records
from wkd_jax.data.coco_json import Instances
from wkd_jax.types import Samples

CANVASES = ((800, 1088), (800, 1344), (1088, 800), (1344, 800))
TRAIN_SHORT = (640, 672, 704, 736, 768, 800)
_STRIDE = 32  # of the coarsest level that a pyramid halves without a rest
_TOLERANCE = 1e-3  # pixels by which a box may leave its image without being counted: sums of decimal fractions round


@dataclasses.dataclass(frozen=True)
class Options:
    """How images and boxes become a batch, and who does it; the arguments of the data sets.

    Attributes:
      canvases: (height, width) of the batches' images, pixels. Each image has the smallest that holds it (see
        `DetectionSplit.buckets`), and each batch has images of one canvas.
      train_short: Training: the short side is resized to one of these, drawn for each image and epoch, pixels.
      test_short: Evaluation: likewise, to this.
      max_side: Limit of the long side, pixels; the short side is then shorter.
      flip: Training: mirror half of the images.
      max_boxes: Rows for boxes in a batch, M; an image with more is refused.
      mean: Of the channels, 1 is the full range.
      std: Likewise.
      workers: Processes that decode; -1: one a CPU core that this process may use; 0: this process itself.
      max_bad_images: So many training images may be unreadable: they are named, masked in their batch (`Batch.valid`),
        and of the mean colour. One more stops the run, and so does any that evaluation needs.

    Raises:
      ValueError: If a value is out of range; names it.
    """

    canvases: tuple[tuple[int, int], ...]
    train_short: tuple[int, ...]
    test_short: int
    max_side: int
    flip: bool
    max_boxes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int
    max_bad_images: int

    def __post_init__(self) -> None:
        def pixels(value: Any) -> bool:
            return isinstance(value, int) and value > 0

        canvases = [tuple(canvas) if isinstance(canvas, tuple | list) else () for canvas in self.canvases]
        valid: dict[str, tuple[bool, str]] = {
            "canvases": (
                bool(canvases)
                and len(set(canvases)) == len(canvases)
                and all(len(each) == 2 and all(pixels(x) and x % _STRIDE == 0 for x in each) for each in canvases),
                f"different pairs (height, width) of multiples of {_STRIDE} pixels",
            ),
            "train_short": (
                bool(self.train_short)
                and len(set(self.train_short)) == len(self.train_short)
                and all(map(pixels, self.train_short)),
                "different numbers of pixels",
            ),
            "test_short": (pixels(self.test_short), "above 0 pixels"),
            "max_side": (
                pixels(self.max_side) and self.max_side >= max((self.test_short, *self.train_short)),
                "at least the largest of train_short and test_short",
            ),
            "max_boxes": (self.max_boxes > 0, "above 0"),
            "mean": (len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "three finite numbers"),
            "std": (len(self.std) == 3 and all(x > 0 for x in self.std), "three numbers above 0"),
            "workers": (self.workers >= -1, "-1 (one a core), 0 (no processes) or a number of processes"),
            "max_bad_images": (self.max_bad_images >= 0, "0 or more"),
        }
        for key, (good, words) in valid.items():
            if not good:
                raise ValueError(f"data.{key}={getattr(self, key)!r}: must be {words}")


@dataclasses.dataclass(frozen=True, eq=False)
class DetectionSplit:
    """The images of one split that are used, with their objects. A position in it is what `Batch.index` holds.

    Made by `training_split` and `evaluation_split`.

    Attributes:
      records: Where the encoded images are, in the order of `instances`; an image's id in place of a label.
      instances: All images and annotations.
      usable: [A] bool, the objects that a batch shows: no crowds, and an extent within the image at every size.
      kept: [N] int64, the images, as positions in `instances`.
      notes: Sentences on what is left out or changed, with counts.
    """

    records: Records
    instances: Instances
    usable: np.ndarray
    kept: np.ndarray
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kept)

    @functools.cached_property
    def objects(self) -> Samples:
        """The usable objects of its images, image by image; `row` is their row among the boxes of a batch."""
        images = self.instances.images[self.usable]
        first = np.searchsorted(images, images)
        kept = np.isin(images, self.kept)
        label, row = self.instances.labels[self.usable], np.arange(len(images)) - first
        return Samples(label[kept].astype(np.int32), np.searchsorted(self.kept, images[kept]), row[kept])

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of images, annotations, and which are used."""
        parts = (self.records.fingerprint, self.instances.fingerprint, _sha256(self.usable), _sha256(self.kept))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def pixels(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some images as they are stored, each [H, W, 3] uint8, RGB.

        Args:
          rows: [M] integers, positions in `instances`.

        Raises:
          ValueError: If an image cannot be read, or is not what its annotations say; names it.
        """
        images = []
        for row, found in zip(rows.tolist(), self.records.fetch(rows.tolist()), strict=True):
            try:
                images.append(decoded(found, self.instances.image_ids[row], self.instances.sizes[row]))
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.records.name(row)} cannot be read ({error}): restore the file") from error
        return images

    def buckets(self, short: int, options: Options) -> np.ndarray:
        """[N] int64: the canvas of each image, by its size when resized to `short`.

        It depends on proportions alone, so an image keeps its canvas in every epoch and however it is flipped: training
        gives its largest short side.

        Raises:
          ValueError: If an image fits in none; names it.
        """
        sizes = canvas_lib.resized_sizes(self.instances.sizes[self.kept], short, options.max_side)
        buckets = canvas_lib.smallest_canvases(sizes, options.canvases)
        if len(outside := np.flatnonzero(buckets < 0)):
            height, width = sizes[outside[0]]
            needed = tuple(-(-side // _STRIDE) * _STRIDE for side in (int(height), int(width)))
            raise ValueError(
                f"{self.records.name(int(self.kept[outside[0]]))} has {height} x {width} pixels when its short side is "
                f"resized to {short}, more than any of data.canvases={options.canvases} holds ({len(outside)} images "
                f"of the split are so): add a canvas, here {needed}, or lower data.max_side={options.max_side}"
            )
        return buckets


def decoded(found: tuple[bytes, int] | Exception, image_id: int, size: np.ndarray) -> np.ndarray:
    """The pixels of an image, compared with its annotations.

    Args:
      found: What `Records.fetch` gave for it.
      image_id: What its annotations say.
      size: [2], (height, width), likewise, pixels.

    Returns:
      [H, W, 3] uint8, RGB.

    Raises:
      OSError: If it could not be read.
      ValueError: If it is no image, or another one.
    """
    if isinstance(found, Exception):
        raise found
    encoded, found_id = found
    if found_id != image_id:
        raise ValueError(f"it is image {found_id}, its annotations are of image {image_id}")
    pixels = image_lib.decode(encoded)
    if (found_size := list(pixels.shape[:2])) != (size_said := size.tolist()):
        raise ValueError(f"(height, width) is {found_size} pixels, its annotations say {size_said}")
    return pixels


def training_split(records: Records, instances: Instances, options: Options) -> DetectionSplit:
    """What of a split's images and annotations training uses: images without a usable object are left out.

    Raises:
      ValueError: If nothing is left, an image has more than `max_boxes` objects, or an image fits in no canvas.
    """
    split = _split(records, instances, options)
    counts = np.bincount(instances.images[split.usable], minlength=len(instances))
    kept = np.flatnonzero(counts)
    if not len(kept):
        raise ValueError(f"{instances.source}: none of its {len(instances)} images has a usable object to train on")
    notes = _counted(instances, {"images without a usable object are left out of training": len(counts) - len(kept)})
    split = dataclasses.replace(split, kept=kept, notes=(*split.notes, *notes))
    split.buckets(max(options.train_short), options)
    return split


def evaluation_split(records: Records, instances: Instances, options: Options) -> DetectionSplit:
    """A split as evaluation uses it: all images. Its batches' boxes leave out what those of training do.

    Raises:
      ValueError: If an image has more than `max_boxes` objects or fits in no canvas.
    """
    split = _split(records, instances, options)
    split.buckets(options.test_short, options)
    return split


def _split(records: Records, instances: Instances, options: Options) -> DetectionSplit:
    """All images, and the usable objects."""
    boxes, sizes = instances.boxes, instances.sizes[instances.images]
    extent = np.ones(len(boxes), bool)
    for short in {*options.train_short, options.test_short}:
        resized = canvas_lib.resized_sizes(sizes, short, options.max_side)
        for flip in (False, True):  # their corners round differently
            placed = canvas_lib.place_boxes(boxes, sizes, resized, flip)
            extent &= (placed[:, 2:] - placed[:, :2] > canvas_lib.MIN_SIDE).all(axis=1)
    usable = extent & ~instances.crowd
    outside = (boxes[:, :2] < -_TOLERANCE) | (boxes[:, :2] + boxes[:, 2:] > sizes[:, ::-1] + _TOLERANCE)

    counts = np.bincount(instances.images[usable], minlength=len(instances))
    if counts.max() > options.max_boxes:
        crowded = np.flatnonzero(counts > options.max_boxes)
        raise ValueError(
            f"{records.name(int(crowded[0]))} has {counts[crowded[0]]} objects, more than "
            f"data.max_boxes={options.max_boxes} ({len(crowded)} images of {instances.source} have): set "
            f"data.max_boxes={counts.max()}"
        )
    notes = {
        "crowd regions are left out of the batches": int(instances.crowd.sum()),
        "boxes without extent within their image are left out of the batches": int((~extent & ~instances.crowd).sum()),
        "boxes that leave their image are clipped to it": int((outside.any(axis=1) & usable).sum()),
    }
    return DetectionSplit(
        records, instances, usable, np.arange(len(instances)), (*instances.notes, *_counted(instances, notes))
    )


def _counted(instances: Instances, counts: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"{instances.source}: {count:,} {words}" for words, count in counts.items() if count)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
