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
from wkd_jax.data.detection import DetectionDataSet
from wkd_jax.evaluation import coco, pictures
from wkd_jax.models.detection.boxes import own_deltas, pairwise_iou
from wkd_jax.types import Array, Batch, Context, Model, Normalisation, Outputs, Samples, Term, Terms

BACKGROUND_IOU = 0.3  # with every object: below it, a region is an example of the background


@dataclasses.dataclass(frozen=True)
class Detection:
    """Boxes and their classes; the background is the class after the last."""

    config: Mapping[str, Any]
    data: DetectionDataSet

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "label_weight": 1.0,  # of the four losses with the ground truth
        "smooth_l1_beta": 0.0,  # of both box losses, in units of the deltas; 0: L1, detectron2's; torchvision's: 1 / 9
        "sampled_mean": False,  # proposal losses: mean over the sampled anchors, as in torchvision, not over all slots
        "background": True,  # whether methods see the regions of the background too, as a class like the others
    }
    METRIC: ClassVar[str] = "student_AP"

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range, and, before anything is trained, if nothing can compute AP."""
        coco.load_backend()
        for key in ("label_weight", "smooth_l1_beta"):
            if self.config[key] < 0:
                raise ValueError(f"task.{key}={self.config[key]}: must be 0 or more")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the data set, and the background."""
        return (*self.data.class_names, "background")

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
            where = anchors.valid & context.batch.valid[:, None]
            terms = {name: Term(value, weight, where) for name, value in of.items()}
        else:
            slots = anchors.valid.shape[1]
            of = {"rpn_objectness": jnp.where(anchors.valid, binary, 0), "rpn_box": offset}
            terms = {name: Term(jnp.sum(value, axis=1) / slots, weight) for name, value in of.items()}
        targets = student.extra["targets"]
        deltas = own_deltas(student.extra["deltas"], context.labels)
        offset = jnp.where(targets.positive, _smooth_l1(deltas - targets.deltas, self.config["smooth_l1_beta"]), 0)
        terms["roi_class"] = Term(losses.cross_entropy(student.logits, context.labels), weight, student.valid)
        terms["roi_box"] = Term(offset, weight, student.valid)
        return terms

    def distilled(self, context: Context) -> Context:
        """All sampled regions, or those of objects alone (`background`)."""
        if self.config["background"]:
            return context
        objects = context.labels < len(self.data.class_names)
        return dataclasses.replace(
            context, student=dataclasses.replace(context.student, valid=context.student.valid & objects)
        )

    def samples(self) -> Samples:
        """Every usable object of the training images; of the background, one region an image, the row after them."""
        objects, images = self.data.train.objects, np.arange(len(self.data.train))
        return Samples(
            np.concatenate([objects.label, np.full(len(images), len(self.data.class_names), np.int32)]),
            np.concatenate([objects.example, images]),
            np.concatenate([objects.row, np.full(len(images), self.data.options.max_boxes)]),
        )

    def sample_outputs(self, model: Model, batch: Batch) -> Outputs:
        """Rows [B, M + 1]: the ground truth's boxes, and the best proposal that overlaps none by an IoU of 0.3.

        The proposals are the network's own. Where there is no such one, that row is not `valid`.
        """
        extra = batch.extra
        proposed = model(batch.image, train=False, size=extra["size"])

        def background(regions: Array, valid: Array, boxes: Array, box_valid: Array) -> tuple[Array, Array]:
            overlap = jnp.max(jnp.where(box_valid[:, None], pairwise_iou(boxes, regions), 0), axis=0)
            apart = valid & (overlap < BACKGROUND_IOU)
            return regions[jnp.argmax(apart)], jnp.any(apart)  # they are sorted by their scores

        box, found = jax.vmap(background)(proposed.extra["regions"], proposed.valid, extra["boxes"], extra["box_valid"])
        regions = jnp.concatenate([extra["boxes"], box[:, None]], axis=1)
        valid = jnp.concatenate([extra["box_valid"], found[:, None]], axis=1)
        return model(batch.image, train=False, regions=regions, region_valid=valid)

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
        truth = self.data.ground_truth
        for side in ("student", "teacher"):
            if f"{side}/boxes" not in batches[0]:
                continue
            names = {key: f"{side}/{key}" for key in ("boxes", "scores", "classes", "valid")}
            names |= {key: key for key in ("image_id", "image_valid")}
            found = coco.results([{key: part[name] for key, name in names.items()} for part in batches], truth)
            metrics |= {f"{side}_{name}": value for name, value in coco.evaluate(found, truth).items()}
            metrics[f"{side}_detections"] = found
            overflows = [part[f"{side}/overflow"][part["image_valid"]].sum() for part in batches]
            metrics[f"{side}_overflows"] = int(sum(overflows))
        return metrics

    def files(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """What reports and later evaluations are made of.

        `evaluation.json`: average precision by class. `SIDE_detections.json`: all detections, in COCO's form.
        `pictures.json`: a few images with their boxes, see `evaluation.pictures`.
        """
        by_class = {name: value.tolist() for name, value in evaluation.items() if name.endswith("_AP_by_class")}
        found = {
            name.removesuffix("_detections"): results
            for name, results in evaluation.items()
            if name.endswith("_detections")
        }
        truth = self.data.ground_truth
        rows = pictures.spread(truth)
        return {
            "evaluation.json": {"class_names": self.data.class_names, **by_class},
            **{f"{side}_detections.json": results for side, results in found.items()},
            "pictures.json": pictures.content(truth, rows, self.data.test.pixels(rows), found),
        }


def _smooth_l1(difference: Array, beta: float) -> Array:
    """Sum over the last axis of the smooth L1 norm (Girshick, arXiv 1504.08083); beta 0 is L1."""
    size = jnp.abs(difference)
    value = jnp.where(size < beta, 0.5 * jnp.square(size) / beta, size - 0.5 * beta) if beta else size
    return jnp.sum(value, axis=-1)


REGISTER = {"detection": Detection}
