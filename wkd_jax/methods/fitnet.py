"""FitNet: hints from the teacher's middle, regressed from the student's (Romero et al., ICLR 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import schedule
from wkd_jax.methods.taps import as_map, find_tap, map_of
from wkd_jax.models import connectors
from wkd_jax.types import Context, Setup, Tap, Term, Terms


class FitNet(nnx.Module):
    """weight * sum over pairs of taps of their mean squared difference, the student's after a projector of its own.

    Trained in one stage together with the label loss (of weight 1), as the CRD benchmark and mdistiller do, from which
    the defaults are, one pair and "conv1x1"; the paper trains the hint first. That convolution fits the size by its
    kernel and stride (`connectors.build`), and the ReLU behind it cannot follow a teacher's tap below 0 (Wide ResNets,
    transformers). Tokens are taken as maps. mdistiller numbers the taps of its MobileNetV1 without a stem: its hint of
    ResNet-50 -> MobileNetV1 is the student's "stage3" here.

    Detectors are distilled at the levels of their pyramids, which have either sign: taps "p2" to "p6" on both sides and
    the projector "linear", a 1 x 1 convolution with nothing behind it.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 100.0,
        "student_taps": ("stage2",),
        "teacher_taps": ("stage2",),  # as many, in the same order
        "projector": "conv1x1",  # conv1x1, bottleneck, conv3x3, linear or none
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("fitnet", config["weight"], config["schedule"], setup.epochs)
        self.config = config
        self.image_size = setup.image_size
        names = config["student_taps"], config["teacher_taps"]
        if not len(names[0]) == len(names[1]) > 0:
            raise ValueError(
                f"methods.fitnet.student_taps={tuple(names[0])}, teacher_taps={tuple(names[1])}: name as many of each, "
                "at least one"
            )
        self.pairs = tuple(
            (
                find_tap(setup.student, student, "methods.fitnet.student_taps"),
                find_tap(setup.teacher, teacher, "methods.fitnet.teacher_taps"),
            )
            for student, teacher in zip(*names, strict=True)
        )
        self.projectors = nnx.List(self._projector(*pair, rngs) for pair in self.pairs)

    def _projector(self, student: tuple[str, Tap], teacher: tuple[str, Tap], rngs: nnx.Rngs) -> nnx.Module:
        taps = as_map(student[1]), as_map(teacher[1])
        sizes = [connectors.spatial_size(tap, self.image_size) for tap in taps]
        shapes = [(1, *size, tap.channels) for size, tap in zip(sizes, taps, strict=True)]
        maps = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        try:
            projector = connectors.build(
                self.config["projector"], *taps, student_size=sizes[0], teacher_size=sizes[1], rngs=rngs
            )
            jax.eval_shape(lambda s, t: losses.mse(projector(s, train=False), t), *maps)  # refuses unequal sizes
        except ValueError as error:
            raise ValueError(
                f"methods.fitnet.projector={self.config['projector']}, from {student[0]} of the student to "
                f"{teacher[0]} of the teacher: {error}"
            ) from error
        return projector

    def terms(self, context: Context) -> Terms:
        """The term `hint`."""
        value = jnp.zeros(())
        for projector, pair in zip(self.projectors, self.pairs, strict=True):
            student, teacher = (
                map_of(outputs.taps[name], tap, self.image_size)
                for outputs, (name, tap) in zip((context.student, context.teacher), pair, strict=True)
            )
            value = value + losses.mse(projector(student, train=True), teacher)
        return {"hint": Term(value, schedule.weight(self.config["weight"], self.config["schedule"], context.progress))}


REGISTER = {"fitnet": FitNet}
