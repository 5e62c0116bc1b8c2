"""FCFD for detectors: pyramids are alike if the other detector's box head makes the same of them.

Liu, Kan, Shan, Chen, "Function-Consistent Feature Distillation", ICLR 2023, arXiv 2304.11832, and the authors' code for
Faster R-CNN.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.fcfd import Bridge
from wkd_jax.methods.taps import find_tap
from wkd_jax.models.connectors import spatial_size
from wkd_jax.models.detection.faster_rcnn import LEVELS, POOLED
from wkd_jax.types import Array, Context, ModelInfo, Outputs, Setup, Tap, Term, Terms


class FCFDDetection(nnx.Module):
    """Consistency of the pyramids, and of what both box heads make of them on the regions that the student sampled.

    Each level is bridged to the other detector by a convolution and BatchNorm. Two mixed passes go on behind the
    bridges in every step: the student's levels in the teacher's box head, whose parameters are constants, and the
    teacher's levels in the student's. Regions are pooled alike in all passes.

    Term `feature`: mean squared errors of the student's bridged levels, summed over the levels. `kd`: KD of the
    student's logits. `box`: mean squared error of its deltas, of all classes, the background's regions included.
    `mixed`: both for the mixed passes, summed over the two. Defaults are those of the released code.

    The bridge from teacher to student at "p6", which no region is pooled from, is not built: nothing would train it.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "feature_weight": 1.0,  # follows `schedule`
        "kd_weight": 1.0,
        "box_weight": 1.0,
        "mixed_weight": 1.0,  # of logits and deltas of each mixed pass
        "temperature": 1.0,
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True
    TASK = "detection"

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.not_negative("fcfd_detection", config, "feature_weight", "kd_weight", "box_weight", "mixed_weight")
        checks.positive("fcfd_detection", config, "temperature")
        schedule.check("fcfd_detection", config["feature_weight"], config["schedule"], setup.epochs)
        self.config = config

        def bridge(source: ModelInfo, target: ModelInfo, level: str) -> Bridge:
            taps: list[Tap] = [find_tap(info, level, "methods.fcfd_detection")[1] for info in (source, target)]
            here, there = (spatial_size(tap, setup.image_size) for tap in taps)
            return Bridge(*taps, (here, there), rngs=rngs)

        self.to_teacher = nnx.Dict({level: bridge(setup.student, setup.teacher, level) for level in LEVELS})
        self.to_student = nnx.Dict({level: bridge(setup.teacher, setup.student, level) for level in POOLED})

    def terms(self, context: Context) -> Terms:
        """Terms `feature` of the images; `kd`, `box` and `mixed` of the regions."""
        config, student, teacher = self.config, context.student, context.teacher
        in_teacher = {level: bridge(student.taps[level], train=True) for level, bridge in self.to_teacher.items()}
        in_student = {level: bridge(teacher.taps[level], train=True) for level, bridge in self.to_student.items()}
        given = {"train": True, "regions": student.extra["regions"], "region_valid": student.valid}
        mixed = [
            context.teacher_model().forward_from("pyramid", in_teacher, **given),
            context.student_model().forward_from("pyramid", in_student, **given),
        ]

        def differences(outputs: Outputs) -> tuple[Array, Array]:
            """Of logits and deltas, [B, R] each."""
            kd = losses.kd(outputs.logits, teacher.logits, temperature=config["temperature"])
            return kd, jax.vmap(losses.mse)(outputs.extra["deltas"], teacher.extra["deltas"])

        kd, box = differences(student)
        feature = sum(losses.mse(in_teacher[level], teacher.taps[level]) for level in in_teacher)
        weight = schedule.weight(config["feature_weight"], config["schedule"], context.progress)
        return {
            "feature": Term(feature, weight),
            "kd": Term(kd, config["kd_weight"], student.valid),
            "box": Term(box, config["box_weight"], student.valid),
            "mixed": Term(sum(sum(differences(outputs)) for outputs in mixed), config["mixed_weight"], student.valid),
        }


REGISTER = {"fcfd_detection": FCFDDetection}
