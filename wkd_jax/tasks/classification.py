"""Image classification: hard-label loss, on-device augmentation, metrics.

A training batch is cropped and flipped, mixed (uint8), normalised for each network, and erased; the first two and all
draws of the third are done once, so that student and teacher see the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax import losses
from wkd_jax.data import augment, mix
from wkd_jax.data.base import DataSet
from wkd_jax.evaluation import topk
from wkd_jax.types import Array, Batch, Context, Model, Normalisation, Outputs, Samples, Term, Terms

# Folded into the step's key; beyond any example's position, which `augment.augment` folds in.
_MIX, _ERASE = 2**31, 2**31 + 1


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
        "mixup": 0.0,  # alpha of its Beta distribution; 0: off
        "cutmix": 0.0,  # likewise
        "mix_probability": 1.0,  # of mixing a group of images, by mixup or cutmix
        "cutmix_share": 0.5,  # of cutmix among the mixed groups, where both are on
        "mix_group_size": 0,  # consecutive images mixed alike, each with another; 0: the whole (micro)batch
        "erase": 0.0,  # probability of filling a box of an image with noise
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
        for name in ("mixup", "cutmix"):
            if not 0 <= config[name] < math.inf:
                raise ValueError(f"task.{name}={config[name]}: must be 0 (off) or a finite number above it")
        for name in ("mix_probability", "cutmix_share", "erase"):
            if not 0 <= config[name] <= 1:
                raise ValueError(f"task.{name}={config[name]}: must be from 0 to 1")
        size = config["mix_group_size"]
        if size < 0 or size % 2:
            raise ValueError(f"task.mix_group_size={size}: must be 0 (the whole batch) or an even number of images")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the data set."""
        return self.data.class_names

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Random crop of the padded image, random flip, then mixup or cutmix, uint8; draws what is to be erased.

        Mixed labels are [B, C] float32. What `normalise` needs to erase is put in `Batch.extra`.
        """
        config = self.config
        image = augment.augment(batch.image, batch.index, key, pad=config["pad"], flip=config["flip"])
        batch = dataclasses.replace(batch, image=image)
        if config["mixup"] or config["cutmix"]:
            batch = mix.mix(
                batch,
                jax.random.fold_in(key, _MIX),
                num_classes=len(self.class_names),
                mixup=config["mixup"],
                cutmix=config["cutmix"],
                probability=config["mix_probability"],
                cutmix_share=config["cutmix_share"],
                group_size=config["mix_group_size"],
            )
        if config["erase"]:
            box, noise = mix.draw_erase(
                batch.index, jax.random.fold_in(key, _ERASE), image.shape[1:3], probability=config["erase"]
            )
            batch = dataclasses.replace(batch, extra={**batch.extra, "erase_box": box, "erase_key": noise})
        return batch

    def normalise(self, batch: Batch, normalisation: Normalisation) -> Batch:
        """uint8 to normalised float32; then erases what `augment` drew, for every network the same box and noise."""
        image = augment.normalise(batch.image, normalisation.mean, normalisation.std)
        if "erase_box" in batch.extra:
            image = mix.erase(image, batch.extra["erase_box"], batch.extra["erase_key"])
        return dataclasses.replace(batch, image=image)

    def student_inputs(self, batch: Batch, *, train: bool) -> dict[str, Any]:
        """A classifier needs the image alone."""
        del batch, train
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

    def distilled(self, context: Context) -> Context:
        """All of it."""
        return context

    def samples(self) -> Samples:
        """Every training image is one."""
        labels = self.data.labels
        return Samples(labels, np.arange(len(labels)))

    def sample_outputs(self, model: Model, batch: Batch) -> Outputs:
        """One row an image."""
        return model(batch.image, train=False)

    def evaluate(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> dict[str, Array]:
        """Sums of one batch, see `evaluation.topk.sums`."""
        return topk.sums(student.logits, teacher.logits if teacher else None, batch.label, batch.valid)

    def summarise(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Metrics of the data set, see `evaluation.topk.summarise`."""
        return topk.summarise(batches)

    def files(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """`evaluation.json`: the arrays by class."""
        arrays = {name: value.tolist() for name, value in evaluation.items() if np.ndim(value)}
        return {"evaluation.json": {"class_names": self.class_names, **arrays}}


REGISTER = {"classification": Classification}
