"""ICKD-C: correlations between the channels of the last feature map (Liu et al., ICCV 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import find_tap, map_of
from wkd_jax.models.layers import BatchNorm, Conv
from wkd_jax.types import Context, Setup, Term, Terms


class ICKDC(nnx.Module):
    """weight * `losses.ickd` between one tap of each side, the student's after a convolution and BatchNorm.

    `form` "imagenet": a 3 x 3 convolution, and a loss that shrinks with the examples of a (micro)batch, since the
    published code divides by their number twice; "cifar": a 1 x 1 convolution; "paper": the same, and rows as they are.
    No convolution has a bias and no ReLU follows. Sizes may differ, and tokens are taken as maps.

    Defaults are those of the ImageNet code, ResNet-34 -> ResNet-18 (that result starts from a pretrained student, with
    AdamW, label weight 0.5 and `kd` at weight 0.5 and temperature 1). CIFAR-100 has weight 2.5, with or without `kd`.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 500.0,  # 500 / 256 = 1.95 in the "cifar" form for batches of 256
        "form": "imagenet",  # imagenet, cifar or paper
        "student_tap": "last",
        "teacher_tap": "last",
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("ickd_c", config["weight"], config["schedule"], setup.epochs)
        checks.one_of("ickd_c", config, "form", ("imagenet", "cifar", "paper"))
        self.config = config
        self.image_size = setup.image_size
        self.student = find_tap(setup.student, config["student_tap"], "methods.ickd_c.student_tap")
        self.teacher = find_tap(setup.teacher, config["teacher_tap"], "methods.ickd_c.teacher_tap")
        channels = self.student[1].channels, self.teacher[1].channels
        kernel, padding = (3, 1) if config["form"] == "imagenet" else (1, 0)
        self.conv = Conv(*channels, kernel, padding=padding, use_bias=False, dtype=None, rngs=rngs)
        self.bn = BatchNorm(channels[1])

    def terms(self, context: Context) -> Terms:
        """The term `correlation`."""
        student, teacher = (
            map_of(outputs.taps[name], tap, self.image_size)
            for outputs, (name, tap) in ((context.student, self.student), (context.teacher, self.teacher))
        )
        value = losses.ickd(self.bn(self.conv(student), train=True), teacher, form=self.config["form"])
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"correlation": Term(value, weight)}


REGISTER = {"ickd_c": ICKDC}
