"""ReviewKD: what the student knows at deeper levels is fused into each level (Chen, Liu, Zhao, Jia, CVPR 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import find_tap, map_of, nearest
from wkd_jax.models.layers import BatchNorm, Conv
from wkd_jax.types import Array, Context, ModelInfo, Outputs, Setup, Tap, Term, Terms

# U(-sqrt(3 / fan_in), sqrt(3 / fan_in)): He's uniform form for a linear activation.
uniform_linear = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


Levels = dict[str, tuple[str, Tap]]  # tap's name -> (field of `Outputs` that holds it, what it is)


class Fusion(nnx.Module):
    """Attention-based fusion of one level with what came from the level above (the paper's ABF). No ReLU in it.

    Args:
      in_features: Channels of the student's level.
      width: Channels in which levels are fused.
      features: Channels of the teacher's level.
      top: Whether there is no level above.
      rngs: Source of the initial values.
    """

    def __init__(self, in_features: int, width: int, features: int, *, top: bool, rngs: nnx.Rngs) -> None:
        settings = {"use_bias": False, "kernel_init": uniform_linear, "dtype": None, "rngs": rngs}
        self.conv1 = Conv(in_features, width, 1, **settings)
        self.bn1 = BatchNorm(width)
        self.attention = None if top else Conv(2 * width, 2, 1, dtype=None, rngs=rngs)
        self.conv2 = Conv(width, features, 3, padding=1, **settings)
        self.bn2 = BatchNorm(features)

    def __call__(self, x: Array, above: Array | None, size: tuple[int, int], *, train: bool) -> tuple[Array, Array]:
        """(the level in the teacher's shape [B, *size, features], the same before its last convolution, for below)."""
        x = self.bn1(self.conv1(x), train=train)
        if self.attention is not None:
            above = nearest(above, x.shape[1:3])
            gates = nnx.sigmoid(self.attention(jnp.concatenate([x, above], axis=-1)))
            x = x * gates[..., :1] + above * gates[..., 1:]
        x = nearest(x, size)
        return self.bn2(self.conv2(x), train=train), x


class ReviewKD(nnx.Module):
    """weight * sum over levels of `losses.hcl`, between fused levels of the student and the teacher's.

    Levels are the taps but the stem and, on top, the pooled feature as a 1 x 1 map. Defaults are those of the original
    code for ImageNet, ResNet-34 -> ResNet-18; ResNet-50 -> MobileNetV1 has weight 8 and mid_channels 256 there; CIFAR
    has preactivation "teacher", a warmup of 20 epochs, and weights from 0.6 to 8. The label weight is 1.

    Detectors are distilled at the levels of their pyramids, without a pooled one; the original code has the weights 1.2
    (ResNet-101 -> ResNet-18), 2 (ResNet-50 -> MobileNetV2) and 1 (ResNet-101 -> ResNet-50) there.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,
        "mid_channels": 0,  # in which levels are fused; 0: the channels of the student's top level, at most 512
        "pooled_level": True,  # whether the top level is the pooled feature
        "student_taps": (),  # from the shallowest on, one a level; (): all of the image but the stem
        "teacher_taps": (),  # likewise
        "preactivation": "both",  # whose taps are taken before their last ReLU: both, teacher or none
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("reviewkd", config["weight"], config["schedule"], setup.epochs)
        checks.not_negative("reviewkd", config, "mid_channels")
        checks.one_of("reviewkd", config, "preactivation", ("both", "teacher", "none"))
        self.config = config
        self.image_size = setup.image_size
        self.student = _levels(setup.student, "student", config, config["preactivation"] == "both")
        self.teacher = _levels(setup.teacher, "teacher", config, config["preactivation"] != "none")
        if len(self.student) != len(self.teacher):
            raise ValueError(
                f"methods.reviewkd.student_taps: {setup.student.name} has the levels {', '.join(self.student)}, and "
                f"{setup.teacher.name} {', '.join(self.teacher)}; name as many of each in student_taps and teacher_taps"
            )
        channels = [
            [tap.channels for _, tap in levels.values()] + [info.pooled] * config["pooled_level"]
            for levels, info in ((self.student, setup.student), (self.teacher, setup.teacher))
        ]
        width = config["mid_channels"] or min(512, channels[0][-1])
        top = len(channels[0]) - 1
        self.fusions = nnx.List(
            Fusion(student, width, teacher, top=level == top, rngs=rngs)
            for level, (student, teacher) in enumerate(zip(*channels, strict=True))
        )

    def terms(self, context: Context) -> Terms:
        """The term `hcl`."""
        student, teacher = self._maps(context.student, self.student), self._maps(context.teacher, self.teacher)
        value, above = jnp.zeros(()), None
        for fusion, x, target in reversed(list(zip(self.fusions, student, teacher, strict=True))):
            level, above = fusion(x, above, target.shape[1:3], train=True)
            value = value + losses.hcl(level, target)
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"hcl": Term(value, weight)}

    def _maps(self, outputs: Outputs, levels: Levels) -> list[Array]:
        """The levels as maps, from the shallowest on; the pooled feature, if it is one of them, is the last.

        Raises:
          ValueError: If it is asked for, and is not one of an image.
        """
        maps = [map_of(getattr(outputs, field)[name], tap, self.image_size) for name, (field, tap) in levels.items()]
        if not self.config["pooled_level"]:
            return maps
        if outputs.pooled.ndim != 2:
            raise ValueError(
                f"methods.reviewkd.pooled_level=True: the pooled feature {outputs.pooled.shape} is one of each region, "
                "not of the image; set it to False"
            )
        return [*maps, outputs.pooled[:, None, None].astype(maps[-1].dtype)]


def _levels(info: ModelInfo, side: str, config: Any, preactivation: bool) -> Levels:
    """The taps of one side, before their last ReLU where asked for.

    Raises:
      ValueError: If a tap does not exist, is named twice, or is not there before its ReLU.
    """
    key = f"methods.reviewkd.{side}_taps"
    of_image = [name for name, tap in info.taps.items() if name != "stem" and tap.size is None]
    names = config[f"{side}_taps"] or of_image
    found = dict(find_tap(info, name, key) for name in names)
    if len(found) < len(names):
        raise ValueError(f"{key}={tuple(names)}: names a tap twice")
    levels = {}
    for name, tap in found.items():
        before = preactivation and not tap.signed
        if before and not tap.preactivation:
            remedy = "'none'" if side == "teacher" else "'teacher' or 'none'"
            raise ValueError(
                f"methods.reviewkd.preactivation={config['preactivation']!r}: {info.name} does not give {name} before "
                f"its last ReLU; choose {remedy}"
            )
        levels[name] = ("preactivations" if before else "taps", tap)
    return levels


REGISTER = {"reviewkd": ReviewKD}
