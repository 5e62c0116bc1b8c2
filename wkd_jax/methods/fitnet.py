"""FitNet: a hint from the teacher's middle, regressed from the student's (Romero et al., ICLR 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import schedule
from wkd_jax.methods.taps import as_map, find_tap, map_of
from wkd_jax.models import connectors
from wkd_jax.types import Context, Setup, Term, Terms


class FitNet(nnx.Module):
    """weight * mean squared difference of one tap of each side, the student's after a convolution, BatchNorm and ReLU.

    Trained in one stage together with the label loss (of weight 1), as the CRD benchmark and mdistiller do, from which
    the defaults are; the paper trains the hint first. The convolution fits the size by its kernel and stride
    (`connectors.build`, "conv1x1"). Tokens are taken as maps. The ReLU cannot follow a teacher's tap below 0 (Wide
    ResNets, transformers). mdistiller numbers the taps of its MobileNetV1 without a stem: its hint of ResNet-50 ->
    MobileNetV1 is the student_tap "stage3" here.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 100.0,
        "student_tap": "stage2",
        "teacher_tap": "stage2",
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("fitnet", config["weight"], config["schedule"], setup.epochs)
        self.config = config
        self.image_size = setup.image_size
        self.student = find_tap(setup.student, config["student_tap"], "methods.fitnet.student_tap")
        self.teacher = find_tap(setup.teacher, config["teacher_tap"], "methods.fitnet.teacher_tap")
        student, teacher = self.student[1], self.teacher[1]
        try:
            self.connector = connectors.build(
                "conv1x1",
                as_map(student),
                as_map(teacher),
                student_size=connectors.spatial_size(student, setup.image_size),
                teacher_size=connectors.spatial_size(teacher, setup.image_size),
                rngs=rngs,
            )
        except ValueError as error:
            raise ValueError(
                f"methods.fitnet.student_tap={config['student_tap']}, teacher_tap={config['teacher_tap']}: {error}"
            ) from error

    def terms(self, context: Context) -> Terms:
        """The term `hint`."""
        student, teacher = (
            map_of(outputs.taps[name], tap, self.image_size)
            for outputs, (name, tap) in ((context.student, self.student), (context.teacher, self.teacher))
        )
        value = losses.mse(self.connector(student, train=True), teacher)
        return {"hint": Term(value, schedule.weight(self.config["weight"], self.config["schedule"], context.progress))}


REGISTER = {"fitnet": FitNet}
