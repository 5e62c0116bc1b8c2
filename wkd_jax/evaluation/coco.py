"""COCO's average precision and recall of boxes, from padded detections. Host-side NumPy.

The numbers are those of the public evaluators, on the annotations of COCO's own file: faster-coco-eval, or pycocotools,
the reference, which is many times slower. Both are imported when they are first used.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from wkd_jax import extras
from wkd_jax.data.coco_json import Instances
from wkd_jax.registry import unknown

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
BACKENDS = ("faster_coco_eval", "pycocotools")


def results(batches: Iterable[Mapping[str, np.ndarray]], truth: Instances) -> list[dict[str, Any]]:
    """Detections in COCO's results form, which `json.dump` writes and `evaluate` takes.

    The order of batches and rows, and how they are spread over processes, do not matter: the list is sorted by image,
    and then as the detections of an image were.

    Args:
      batches: Each with rows of images b and of detections K:
        `boxes` [b, K, 4], xyxy in pixels of the original image; `scores` [b, K]; `classes` [b, K] integers in
        0..C-1; `valid` [b, K] bool; `image_id` [b] integers; `image_valid` [b] bool, False for padding.
      truth: The images, of which each must occur exactly once, and the classes.

    Returns:
      One dict a valid detection: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.

    Raises:
      ValueError: If an image occurs twice, is missing or unknown; if a valid detection has a class that does not exist,
        a score or box that is not finite, or a box whose sides are negative.

    Example:
      >>> truth = Instances("drawn", ((7, "cat"),), np.array([42]), np.array([b"42.png"]), np.array([[9, 9]]),
      ...     np.array([0]), np.array([0]), np.array([[1.0, 1.0, 4.0, 5.0]]), np.array([20.0]), np.array([False]))
      >>> batch = dict(boxes=np.array([[[1, 1, 5, 6]]]), scores=np.array([[0.5]]), classes=np.array([[0]]),
      ...     valid=np.array([[True]]), image_id=np.array([42]), image_valid=np.array([True]))
      >>> found = results([batch], truth)
      >>> found
      [{'image_id': 42, 'category_id': 7, 'bbox': [1.0, 1.0, 4.0, 5.0], 'score': 0.5}]
      >>> evaluate(found, truth)["AP"]
      100.0
    """
    parts: dict[str, list[np.ndarray]] = {"image_id": [], "boxes": [], "scores": [], "classes": []}
    visited = [np.zeros(0, np.int64)]
    for batch in batches:
        rows = np.asarray(batch["image_valid"], bool)
        ids = np.asarray(batch["image_id"])[rows]
        valid = np.asarray(batch["valid"], bool)[rows]
        visited.append(ids)
        parts["image_id"].append(np.broadcast_to(ids[:, None], valid.shape)[valid])
        for name in ("boxes", "scores", "classes"):
            parts[name].append(np.asarray(batch[name])[rows][valid])
    _check_images(np.concatenate(visited), truth)
    image_id, boxes, scores, classes = (np.concatenate(part) if part else np.zeros(0) for part in parts.values())
    order = np.argsort(image_id, kind="stable")
    image_id, classes, scores = image_id[order], classes[order], scores[order].astype(np.float64)
    boxes = boxes[order].astype(np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    for wrong, words in (
        (~np.isfinite(scores), "a score that is not finite"),
        (~np.isfinite(boxes).all(axis=1), "a box that is not finite"),
        ((sides < 0).any(axis=1), "a box whose right or lower side comes before the other"),
        ((classes < 0) | (classes >= len(truth.categories)), f"a class that is not in 0..{len(truth.categories) - 1}"),
    ):
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"image {image_id[first]} has {words} among its detections ({wrong.sum()} in all): box "
                f"{boxes[first].tolist()}, score {scores[first]}, class {classes[first]}; has training diverged?"
            )
    categories = np.array([key for key, _ in truth.categories])[classes.astype(np.int64)]
    columns = image_id, categories, np.concatenate([boxes[:, :2], sides], axis=1), scores
    names = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(names, row, strict=True)) for row in zip(*(x.tolist() for x in columns), strict=True)]


def evaluate(
    results: Sequence[Mapping[str, Any]],
    truth: Instances,
    *,
    backend: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval",
) -> dict[str, Any]:
    """COCO's twelve numbers, and the average precision of each class.

    Over IoU thresholds 0.50 to 0.95 in steps of 0.05 and 101 recalls, with at most 100 detections an image and class;
    small, medium and large are areas of masks, split at 32^2 and 96^2 pixels. Images without detections count.

    Args:
      results: As the function `results` makes them, or read again from its file.
      truth: Images and annotations.
      backend: Who computes.

    Returns:
      The names of `METRICS`, floats in percent, -1 where there is no such object in `truth`; and `AP_by_class`, [C]
      float64 likewise.

    Raises:
      ValueError: If a result is of an unknown image or category, or there is no such backend, or it is not installed.

    References:
      Lin et al., Microsoft COCO: Common Objects in Context, arXiv 1405.0312; its detection evaluation page.
    """
    coco, evaluator = load_backend(backend)
    known_images, known_categories = set(truth.image_ids.tolist()), {key for key, _ in truth.categories}
    for result in results:
        if result["image_id"] not in known_images or result["category_id"] not in known_categories:
            raise ValueError(f"{truth.source} has not the image or not the category of the result {dict(result)}")
    objects = zip(
        truth.image_ids[truth.images].tolist(),
        (truth.categories[label][0] for label in truth.labels.tolist()),
        truth.boxes.tolist(),
        truth.areas.tolist(),
        truth.crowd.astype(int).tolist(),
        strict=True,
    )
    names = ("image_id", "category_id", "bbox", "area", "iscrowd")
    sides = zip(truth.image_ids.tolist(), *truth.sizes.T.tolist(), strict=True)
    images = [{"id": image, "height": height, "width": width} for image, height, width in sides]
    categories = [{"id": key, "name": name} for key, name in truth.categories]

    def indexed(annotations: list[dict[str, Any]]) -> Any:
        """The evaluator's view of a list of boxes. Ids are new, from 1: they take 0 for "not matched"."""
        made = coco()
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        made.dataset = {"images": images, "categories": categories, "annotations": annotations}
        made.createIndex()
        return made

    expected = [dict(zip(names, values, strict=True)) for values in objects]
    found = [
        {key: result[key] for key in ("image_id", "category_id", "bbox", "score")}
        | {"area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for result in results
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # they print
        evaluation = evaluator(indexed(expected), indexed(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = [_percent(value) for value in evaluation.stats[: len(METRICS)]]
    # [thresholds, recalls, classes, areas, detections]; a class without objects has -1 everywhere
    by_class = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    return {**dict(zip(METRICS, numbers, strict=True)), "AP_by_class": np.array([_percent(x) for x in by_class])}


def _percent(value: float) -> float:
    return 100.0 * float(value) if value >= 0 else -1.0


def load_backend(name: str = "faster_coco_eval") -> tuple[Any, Any]:
    """(index of annotations, evaluator), classes of a backend. Neither logs.

    Raises:
      ValueError: If there is no such backend, or it is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(unknown("backend", name, BACKENDS))
    try:
        if name == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            return COCO, COCOeval
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        remedy = extras.install("detection") if name == "faster_coco_eval" else f"pip install {name}"
        raise ValueError(f"COCO evaluation needs {name}, which is not installed ({error}): {remedy}") from error

    def silent(*_: object) -> None:
        """In place of its logging."""

    return functools.partial(COCO, print_function=silent), functools.partial(COCOeval_faster, print_function=silent)


def _check_images(visited: np.ndarray, truth: Instances) -> None:
    """Raises unless each image was visited exactly once."""
    ids, counts = np.unique(visited, return_counts=True)
    advice = "each image must be evaluated exactly once, and padding be marked in image_valid"
    for wrong, words in (
        (ids[counts > 1], "occur more than once"),
        (np.setdiff1d(ids, truth.image_ids), f"are not in {truth.source}"),
        (np.setdiff1d(truth.image_ids, ids), f"of {truth.source} are missing"),
    ):
        if len(wrong):
            raise ValueError(f"{len(wrong)} image ids {words}, such as {wrong[0]}: {advice}")
