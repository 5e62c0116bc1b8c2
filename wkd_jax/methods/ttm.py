"""TTM and WTTM: KD without the student's temperature (Zheng and Yang, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import schedule
from wkd_jax.types import Array, Context, Setup, Term, Terms


class WTTM(nnx.Module):
    """weight * sum_k p_k^power * KL(p^power, normalised || student). The paper's label weight is 1.

    Defaults are those of the paper for ImageNet, ResNet-34 -> ResNet-18.
    """

    NAME: ClassVar[str] = "wttm"
    LOSS: ClassVar[Callable[..., Array]] = staticmethod(losses.wttm)
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.6,
        "power": 0.8,  # of the teacher's probabilities: 1 / its temperature
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        if not 0 < config["power"] <= 1:
            raise ValueError(
                f"methods.{self.NAME}.power={config['power']}: must be above 0 and at most 1; it is 1 / temperature"
            )
        schedule.check(self.NAME, config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """The term `kl`."""
        value = self.LOSS(context.student.logits, context.teacher.logits, power=self.config["power"])
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"kl": Term(value, weight, where=context.student.valid)}


class TTM(WTTM):
    """weight * KL(p^power, normalised || student). The paper's label weight is 1.

    Defaults are those of the paper for CIFAR-100, ResNet-32x4 -> ResNet-8x4; it has no ImageNet row. The weight is 15
    to 40 times that of WTTM at the same power.
    """

    NAME = "ttm"
    LOSS = staticmethod(losses.ttm)
    DEFAULTS: ClassVar[dict[str, Any]] = {**WTTM.DEFAULTS, "weight": 100.0, "power": 0.1}


REGISTER = {"ttm": TTM, "wttm": WTTM}
