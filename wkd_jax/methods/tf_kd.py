"""Tf-KD: a network taught by its own earlier self, or by a virtual teacher (Yuan et al., CVPR 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class TfKDSelf(nnx.Module):
    """weight * T^2 * KL(teacher || student) / C, the teacher being the same network trained before with labels alone.

    The published weight is alpha * multiplier, with `task.label_weight` 1 - alpha. Defaults are the CIFAR-100 row of
    ResNet-18: alpha 0.95, so label weight 0.05, and multiplier 50. Others there (T, alpha, multiplier): MobileNetV2 and
    ShuffleNetV2 20, 0.95, 1; GoogLeNet 20, 0.4, 50; ResNeXt29-8x64d 20, 0.9, 100. On ImageNet the published script has
    T = 20, alpha = 0.1, and the loss itself is not published.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 47.5,  # alpha * multiplier
        "temperature": 6.0,
        "reduction": "mean",  # over the classes, as published, which divides by C; or sum, which is KD
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("tf_kd_self", config, "temperature")
        checks.one_of("tf_kd_self", config, "reduction", ("mean", "sum"))
        schedule.check("tf_kd_self", config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """The term `kl`."""
        value = losses.tf_kd_self(
            context.student.logits,
            context.teacher.logits,
            temperature=self.config["temperature"],
            reduction=self.config["reduction"],
        )
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"kl": Term(value, weight, where=context.student.valid)}


class TfKDReg(nnx.Module):
    """weight * KL(virtual teacher || student) / C, where the virtual teacher knows the label and nothing else.

    The published weight is alpha * multiplier, with `task.label_weight` 1 - alpha. Defaults are the CIFAR-100 row of
    ResNet-18: alpha 0.1, so label weight 0.9, and multiplier 100, which undoes the division by C. Others there (T,
    alpha, multiplier): MobileNetV2 40, 0.95, 1; ShuffleNetV2 10, 0.95, 1; GoogLeNet 40, 0.1, 50. The loss of the
    ImageNet runs is not published; there the student is softened too. Mixed labels count as their largest entry.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 10.0,  # alpha * multiplier
        "temperature": 20.0,  # of the virtual teacher
        "correct_probability": 0.99,  # of the label, before the teacher is softened
        "soften_student": False,  # True as in the paper, False as in its code for CIFAR
        "reduction": "mean",  # over the classes, as published, which divides by C; or sum
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = False

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("tf_kd_reg", config, "temperature")
        checks.one_of("tf_kd_reg", config, "reduction", ("mean", "sum"))
        if not 0 <= config["correct_probability"] <= 1:
            raise ValueError(f"methods.tf_kd_reg.correct_probability={config['correct_probability']}: must be 0 to 1")
        schedule.check("tf_kd_reg", config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """The term `kl`."""
        settings = {k: self.config[k] for k in ("temperature", "correct_probability", "soften_student", "reduction")}
        value = losses.tf_kd_reg(context.student.logits, context.labels, **settings)
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"kl": Term(value, weight, where=context.student.valid)}


REGISTER = {"tf_kd_self": TfKDSelf, "tf_kd_reg": TfKDReg}
