"""A few test images with their ground truth and what was detected in them: what a report draws of a detection run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from wkd_jax.data.coco_json import Instances

COUNT = 8  # images
SCORE = 0.5  # a detection with less is left out: a detector makes up to a hundred an image, most of them unlikely
LONG_SIDE = 480  # pixels of the copy of an image; smaller images are not enlarged
_QUALITY = 85  # of the JPEG


def spread(truth: Instances, count: int = COUNT) -> np.ndarray:
    """Images evenly spread over those of a split that have objects, crowds aside, in the annotations' order.

    They depend on the annotations alone: runs on the same data show the same images.

    Args:
      truth: Of the split.
      count: Images wanted, at least 1.

    Returns:
      [min(count, images with objects)] int64, positions in `truth`, ascending: the first and the last such image, and
      between them equal steps, rounded down.

    Example:
      >>> truth = Instances("drawn", ((7, "cat"),), np.arange(5), np.array([b"x"] * 5), np.full((5, 2), 9),
      ...     np.array([0, 1, 2, 4]), np.zeros(4, int), np.ones((4, 4)), np.ones(4), np.array([0, 1, 0, 0], bool))
      >>> spread(truth, 2), spread(truth)
      (array([0, 4]), array([0, 2, 4]))
    """
    images = np.unique(truth.images[~truth.crowd])
    count = min(count, len(images))
    return images[np.arange(count) * (len(images) - 1) // max(count - 1, 1)]


def content(
    truth: Instances,
    rows: np.ndarray,
    images: Sequence[np.ndarray],
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    score: float = SCORE,
    long_side: int = LONG_SIDE,
) -> dict[str, Any]:
    """Images and boxes as a report takes them, for JSON.

    Args:
      truth: Annotations of all images.
      rows: [M] integers, which images, as positions in `truth`.
      images: Their pixels, each [H, W, 3] uint8.
      detections: "student" and perhaps "teacher" -> detections of all images in COCO's results form, see
        `coco.results`.
      score: Least score of a detection that is kept.
      long_side: Of the copies of the images, pixels; smaller images stay as they are.

    Returns:
      `score`, and `images`: of each its `image_id`, `height` and `width` in pixels of the original, `jpeg`, a smaller
      copy in base64, and under `truth` and the keys of `detections` its boxes, each with its `class`, its `box` (x, y,
      width, height; pixels of the original) and `crowd` (ground truth) or `score` (detections, largest first).
    """
    names = dict(truth.categories)
    found: dict[str, dict[int, list[dict[str, Any]]]] = {side: {} for side in detections}
    shown = set(truth.image_ids[rows].tolist())
    for side, results in detections.items():
        for result in results:
            if result["image_id"] in shown and result["score"] >= score:
                box = {"class": names[result["category_id"]], "box": result["bbox"], "score": result["score"]}
                found[side].setdefault(result["image_id"], []).append(box)
    entries = []
    for row, pixels in zip(rows.tolist(), images, strict=True):
        image_id = int(truth.image_ids[row])
        height, width = truth.sizes[row].tolist()
        objects = np.flatnonzero(truth.images == row)
        entries.append(
            {
                "image_id": image_id,
                "height": height,
                "width": width,
                "jpeg": base64.b64encode(_jpeg(pixels, long_side)).decode(),
                "truth": [
                    {
                        "class": truth.categories[truth.labels[i]][1],
                        "box": truth.boxes[i].tolist(),
                        "crowd": bool(truth.crowd[i]),
                    }
                    for i in objects
                ],
                **{
                    side: sorted(boxes.get(image_id, []), key=lambda box: -box["score"])
                    for side, boxes in found.items()
                },
            }
        )
    return {"score": score, "images": entries}


def _jpeg(pixels: np.ndarray, long_side: int) -> bytes:
    """An image as a JPEG whose long side is at most so many pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)  # keeps the proportions
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
