"""Distillation of box regression: the teacher's deltas of the same regions, and the boxes that they make.

The term that the paper adds in the rows of its COCO table marked with a dagger, beside WKD: the squared L2 distance of
the deltas and 20 times the distance-IoU loss.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks
from wkd_jax.models.detection import decode_boxes, distance_iou_loss, own_deltas
from wkd_jax.models.detection.faster_rcnn import ROI_WEIGHTS
from wkd_jax.types import Context, Setup, Term, Terms


class BoxRegression(nnx.Module):
    """offset_weight * mean squared difference of the deltas + distance_iou_weight * mean distance-IoU loss.

    The paper gives the two losses and the 20. Which regions and classes they are over is not public, and chosen here:
    the deltas of all sampled regions and all classes, background regions included, as FCFD has it (Liu et al., ICLR
    2023); of the boxes those of each foreground region's own class, which are the only ones that detection would use.
    Deltas are as the networks give them, scaled by 10, 10, 5, 5. The label weight is 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "offset_weight": 1.0,
        "distance_iou_weight": 20.0,
    }
    NEEDS_TEACHER = True
    TASK = "detection"

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.not_negative("box_regression", config, "offset_weight", "distance_iou_weight")
        self.config = config

    def terms(self, context: Context) -> Terms:
        """Terms `offset`, over all regions, and `distance_iou`, over those that are on an object."""
        config, student = self.config, context.student
        deltas = student.extra["deltas"], jax.lax.stop_gradient(context.teacher.extra["deltas"])
        background = student.logits.shape[-1] - 1
        boxes = (
            decode_boxes(own_deltas(of, context.labels), student.extra["regions"], weights=ROI_WEIGHTS) for of in deltas
        )
        on_object = student.valid & (context.labels != background)
        return {
            "offset": Term(jax.vmap(losses.mse)(*deltas), config["offset_weight"], student.valid),
            "distance_iou": Term(distance_iou_loss(*boxes), config["distance_iou_weight"], on_object),
        }


REGISTER = {"box_regression": BoxRegression}
