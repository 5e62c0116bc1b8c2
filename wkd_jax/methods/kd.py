"""KD: the student's softened class distribution follows the teacher's (Hinton, Vinyals, Dean, 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class KD(nnx.Module):
    """weight * T^2 * KL(teacher || student) at temperature T. The label weight is the task's: 0.1 in CIFAR recipes."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,
        "temperature": 4.0,
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("kd", config, "temperature")
        schedule.check("kd", config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """The term `kl`."""
        value = losses.kd(context.student.logits, context.teacher.logits, temperature=self.config["temperature"])
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"kl": Term(value, weight, where=context.student.valid)}


REGISTER = {"kd": KD}
