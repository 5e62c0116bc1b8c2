"""DKD: the target class and the others distilled apart, each with its own weight (Zhao et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class DKD(nnx.Module):
    """alpha * T^2 KL(target or not) + beta * T^2 KL(non-target classes). The paper's label weight is 1.

    Defaults are those of the released code for ImageNet, ResNet-34 -> ResNet-18; the paper has alpha = 0.5 there. On
    CIFAR-100: temperature 4, beta 8 (2 or 6 for some pairs) and a warm-up of 20 epochs.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "alpha": 1.0,  # of the target class's divergence; follows `schedule`
        "beta": 0.5,  # of the non-target classes'; follows `schedule`
        "temperature": 1.0,
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("dkd", config, "temperature")
        checks.not_negative("dkd", config, "alpha", "beta")
        schedule.check("dkd", config["alpha"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """Terms `target` and `nontarget`."""
        config, where = self.config, context.student.valid
        target, nontarget = losses.dkd(
            context.student.logits, context.teacher.logits, context.labels, temperature=config["temperature"]
        )
        alpha, beta = (schedule.weight(config[key], config["schedule"], context.progress) for key in ("alpha", "beta"))
        return {"target": Term(target, alpha, where), "nontarget": Term(nontarget, beta, where)}


REGISTER = {"dkd": DKD}
