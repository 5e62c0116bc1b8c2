"""Image classification: hard-label loss, on-device augmentation, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from wkd_jax import losses
from wkd_jax.data import augment
from wkd_jax.data.base import DataSet
from wkd_jax.evaluation import topk
from wkd_jax.types import Array, Batch, Context, Normalisation, Outputs, Term, Terms


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an image."""

    config: Mapping[str, Any]
    data: DataSet

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "label_weight": 1.0,  # of the cross-entropy with the labels
        "label_smoothing": 0.0,
        "pad": 0,  # pixels of black border before the random crop; 0: no crop
        "flip": False,  # mirror half of the images
    }
    METRIC: ClassVar[str] = "student_top1"

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        config = self.config
        if config["label_weight"] < 0:
            raise ValueError(f"task.label_weight={config['label_weight']}: must be 0 or more")
        if not 0 <= config["label_smoothing"] < 1:
            raise ValueError(f"task.label_smoothing={config['label_smoothing']}: must be from 0 to below 1")
        if not 0 <= config["pad"] < min(self.data.image_size):
            raise ValueError(
                f"task.pad={config['pad']}: must be from 0 to below the images' side, {min(self.data.image_size)}"
            )

    @property
    def num_classes(self) -> int:
        """One a class name of the data set."""
        return len(self.data.class_names)

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Random crop of the padded image and random flip, uint8."""
        image = augment.augment(batch.image, batch.index, key, pad=self.config["pad"], flip=self.config["flip"])
        return dataclasses.replace(batch, image=image)

    def normalise(self, batch: Batch, normalisation: Normalisation) -> Batch:
        """uint8 to normalised float32."""
        image = augment.normalise(batch.image, normalisation.mean, normalisation.std)
        return dataclasses.replace(batch, image=image)

    def student_inputs(self, batch: Batch) -> dict[str, Any]:
        """A classifier needs the image alone."""
        del batch
        return {}

    def teacher_inputs(self, batch: Batch, student: Outputs) -> dict[str, Any]:
        """A classifier needs the image alone."""
        del batch, student
        return {}

    def labels(self, batch: Batch, student: Outputs) -> Array:
        """[B] int32; the largest entry of mixed labels."""
        del student
        return batch.label if batch.label.ndim == 1 else jnp.argmax(batch.label, axis=-1)

    def terms(self, context: Context) -> Terms:
        """The term `cross_entropy`."""
        value = losses.cross_entropy(
            context.student.logits, context.batch.label, label_smoothing=self.config["label_smoothing"]
        )
        return {"cross_entropy": Term(value, self.config["label_weight"])}

    def evaluate(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> dict[str, Array]:
        """Sums of one batch, see `evaluation.topk.sums`."""
        return topk.sums(student.logits, teacher.logits if teacher else None, batch.label, batch.valid)

    def summarise(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Metrics of the data set, see `evaluation.topk.summarise`."""
        return topk.summarise(batches)


REGISTER = {"classification": Classification}
