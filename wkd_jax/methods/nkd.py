"""NKD: cross-entropies of the target class and of the normalised others with the teacher (Yang et al., ICCV 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class NKD(nnx.Module):
    """Target term + gamma * T^2 * non-target cross-entropy. The paper's label weight is 1.

    Defaults are those of the released code for ImageNet (ResNet-34 -> ResNet-18, and ResNet-50 -> MobileNetV1, where
    gradients are clipped to a norm of 5). Its one CIFAR-100 setting has temperature 3 and gamma 3.5.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "gamma": 1.5,  # of the non-target term
        "temperature": 1.0,  # of the non-target term
        "schedule": schedule.DEFAULTS,  # of both terms
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("nkd", config, "temperature")
        checks.not_negative("nkd", config, "gamma")
        schedule.check("nkd", config["gamma"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """Terms `target` and `nontarget`."""
        config, where = self.config, context.student.valid
        target, nontarget = losses.nkd(
            context.student.logits, context.teacher.logits, context.labels, temperature=config["temperature"]
        )
        one, gamma = (schedule.weight(x, config["schedule"], context.progress) for x in (1.0, config["gamma"]))
        return {"target": Term(target, one, where), "nontarget": Term(nontarget, gamma, where)}


REGISTER = {"nkd": NKD}
