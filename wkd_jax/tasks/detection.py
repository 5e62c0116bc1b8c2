"""Object detection: the four losses of Faster R-CNN, what the teacher is given, COCO metrics.

A batch holds canvases with images in their upper left corners; `wkd_jax.data.coco` makes them. The student proposes
regions and samples some, the teacher classifies the same ones, so that the rows of both outputs line up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax import losses
from wkd_jax.data import augment
from wkd_jax.data.base import DataSet
from wkd_jax.evaluation import coco
from wkd_jax.types import Array, Batch, Context, Normalisation, Outputs, Term, Terms


@dataclasses.dataclass(frozen=True)
class Detection:
    """Boxes and their classes; the background is the class after the last."""

    config: Mapping[str, Any]
    data: DataSet

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "label_weight": 1.0,  # of the four losses with the ground truth
        "smooth_l1_beta": 0.0,  # of both box losses, in units of the deltas; 0: L1, detectron2's; torchvision's: 1 / 9
        "sampled_mean": False,  # proposal losses: mean over the sampled anchors, as in torchvision, not over all slots
    }
    METRIC: ClassVar[str] = "student_AP"

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        if self.config["label_weight"] < 0:
            raise ValueError(f"task.label_weight={self.config['label_weight']}: must be 0 or more")

    @property
    def num_classes(self) -> int:
        """One a class name of the data set, and the background."""
        return len(self.data.class_names) + 1

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Nothing: images are resized and flipped where they are decoded, with their boxes."""
        del key
        return batch

    def normalise(self, batch: Batch, normalisation: Normalisation) -> Batch:
        """uint8 to normalised float32, 0 beyond the image."""
        image = augment.normalise(batch.image, normalisation.mean, normalisation.std)
        size = batch.extra["size"]
        rows, columns = (jnp.arange(side) < size[:, axis, None] for axis, side in enumerate(image.shape[1:3]))
        return dataclasses.replace(batch, image=jnp.where((rows[:, :, None] & columns[:, None])[..., None], image, 0))

    def student_inputs(self, batch: Batch, *, train: bool) -> dict[str, Any]:
        """The images' sizes; in training the ground truth."""
        extra = batch.extra
        truth = {"boxes": extra["boxes"], "labels": batch.label, "box_valid": extra["box_valid"]} if train else {}
        return {"size": extra["size"], **truth}

    def teacher_inputs(self, batch: Batch, student: Outputs) -> dict[str, Any]:
        """The regions that the student sampled; in evaluation the sizes alone, since the teacher detects by itself."""
        if "detections" in student.extra:
            return {"size": batch.extra["size"]}
        return {"regions": student.extra["regions"], "region_valid": student.valid}

    def labels(self, batch: Batch, student: Outputs) -> Array:
        """[B, R] int32, the class of each sampled region."""
        del batch
        return student.extra["labels"]

    def terms(self, context: Context) -> Terms:
        """`rpn_objectness` and `rpn_box` of the sampled anchors, `roi_class` and `roi_box` of the sampled regions."""
        student, weight = context.student, self.config["label_weight"]
        anchors, objectness = student.extra["anchors"], student.extra["objectness"]
        target = anchors.positive.astype(objectness.dtype)
        binary = jax.nn.softplus(objectness) - target * objectness
        offset = _smooth_l1(student.extra["anchor_deltas"] - anchors.deltas, self.config["smooth_l1_beta"])
        offset = jnp.where(anchors.positive, offset, 0)
        if self.config["sampled_mean"]:
            of = {"rpn_objectness": binary, "rpn_box": offset}
            terms = {name: Term(value, weight, anchors.valid) for name, value in of.items()}
        else:
            slots = anchors.valid.shape[1]
            of = {"rpn_objectness": jnp.where(anchors.valid, binary, 0), "rpn_box": offset}
            terms = {name: Term(jnp.sum(value, axis=1) / slots, weight) for name, value in of.items()}
        targets = student.extra["targets"]
        own = jnp.minimum(context.labels, self.num_classes - 2)[..., None, None]  # the background has no box
        deltas = jnp.take_along_axis(student.extra["deltas"], own, axis=2)[:, :, 0]
        offset = jnp.where(targets.positive, _smooth_l1(deltas - targets.deltas, self.config["smooth_l1_beta"]), 0)
        terms["roi_class"] = Term(losses.cross_entropy(student.logits, context.labels), weight, student.valid)
        terms["roi_box"] = Term(offset, weight, student.valid)
        return terms

    def evaluate(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> dict[str, Array]:
        """The detections of one batch in pixels of the original images, of the student and of the teacher."""
        ratio = batch.extra["original_size"] / batch.extra["size"]
        scale = jnp.tile(ratio[:, ::-1], 2)[:, None]
        found = {"image_id": batch.extra["image_id"], "image_valid": batch.valid}
        for name, outputs in (("student", student), ("teacher", teacher)):
            if outputs:
                detections = outputs.extra["detections"]
                found |= {f"{name}/{key}": value for key, value in detections._asdict().items()}
                found[f"{name}/boxes"] = detections.boxes * scale
        return found

    def summarise(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """The twelve COCO numbers of the student, and of the teacher where there is one, see `evaluation.coco`.

        `overflows` counts images of which detections may be missing, see `nms.final_detections`.
        """
        metrics: dict[str, Any] = {}
        truth = self.data.ground_truth  # type: ignore[attr-defined]
        for side in ("student", "teacher"):
            if f"{side}/boxes" not in batches[0]:
                continue
            names = {key: f"{side}/{key}" for key in ("boxes", "scores", "classes", "valid")}
            names |= {key: key for key in ("image_id", "image_valid")}
            found = coco.results([{key: part[name] for key, name in names.items()} for part in batches], truth)
            metrics |= {f"{side}_{name}": value for name, value in coco.evaluate(found, truth).items()}
            overflows = [part[f"{side}/overflow"][part["image_valid"]].sum() for part in batches]
            metrics[f"{side}_overflows"] = int(sum(overflows))
        return metrics


def _smooth_l1(difference: Array, beta: float) -> Array:
    """Sum over the last axis of the smooth L1 norm (Girshick, arXiv 1504.08083); beta 0 is L1."""
    size = jnp.abs(difference)
    value = jnp.where(size < beta, 0.5 * jnp.square(size) / beta, size - 0.5 * beta) if beta else size
    return jnp.sum(value, axis=-1)


REGISTER = {"detection": Detection}
