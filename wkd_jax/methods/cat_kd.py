"""CAT-KD: the student's class activation maps follow the teacher's (Guo et al., CVPR 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models import functional
from wkd_jax.types import Array, Context, Outputs, Setup, Term, Terms


class CATKD(nnx.Module):
    """weight * mean squared difference of class maps: each network's last map times its classifier, at every position.

    The published code replaces pooling and classifier by a 1 x 1 convolution without a bias, so that the teacher loses
    its bias and the student trains without one. Here both networks stay as they are: maps are made without the bias,
    logits with it. Defaults are those of ImageNet, ResNet-34 -> ResNet-18; ResNet-50 -> MobileNetV1 has weight 10, size
    2 and normalise True, CIFAR-100 has size 2 or 4 and weights from 0.7 to 600. The label weight is 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.5,
        "size": 4,  # cells along each side that maps are averaged over; a smaller map repeats positions
        "normalise": False,  # cells of one example and class to unit norm
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        schedule.check("cat_kd", config["weight"], config["schedule"], setup.epochs)
        checks.positive("cat_kd", config, "size")
        for side, info in (("student", setup.student), ("teacher", setup.teacher)):
            if not info.mean_pooled:
                raise ValueError(
                    f"methods.cat_kd: the {side} {info.name} has no class maps, because the input of its classifier is "
                    "not the mean of a map over its positions: choose a network with global average pooling"
                )
        self.config = config
        self.classifiers = setup.student.classifier, setup.teacher.classifier

    def terms(self, context: Context) -> Terms:
        """The term `maps`."""
        config, (student, teacher) = self.config, self.classifiers
        value = losses.cat_kd(
            _class_maps(context.student, context.student_model(), student, config["size"]),
            _class_maps(context.teacher, context.teacher_model(), teacher, config["size"]),
            size=config["size"],
            normalise=config["normalise"],
        )
        return {"maps": Term(value, schedule.weight(config["weight"], config["schedule"], context.progress))}


def _class_maps(outputs: Outputs, model: nnx.Module, classifier: str, size: int) -> Array:
    """[B, size, size, C]. Cells are averaged first: the same for a linear classifier, and far less to compute."""
    cells = losses.adaptive_average_pool(outputs.positions.astype(jnp.float32), size)
    return cells @ functional.value(model, classifier)


REGISTER = {"cat_kd": CATKD}
