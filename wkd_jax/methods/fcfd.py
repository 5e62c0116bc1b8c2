"""FCFD: features are alike if the other network's later stages make the same of them.

Liu, Kan, Shan, Chen, "Function-Consistent Feature Distillation", ICLR 2023, arXiv 2304.11832.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.connectors import spatial_size
from wkd_jax.models.layers import BatchNorm, Conv, ConvTranspose, he_fan_out, mean_over_positions
from wkd_jax.types import Array, Context, ModelInfo, Setup, Tap, Term, Terms

DRAWN = 2  # mixed paths a step


class Bridge(nnx.Module):
    """From a map of one network to the map at the same stage of the other: a convolution, BatchNorm, LeakyReLU.

    3 x 3 without a bias where sizes are equal; 3 x 3 of stride 2 where the other map is half as large; transposed 4 x 4
    of stride 2 where it is twice as large. A map that may be negative is met without the LeakyReLU.

    Args:
      source: The map to be taken across.
      target: The other network's.
      sizes: (height, width) of both.
      rngs: Source of the initial values: He fan-out, and torch's default for biases and the transposed convolution.

    Raises:
      ValueError: If the sizes are in no such relation.
    """

    def __init__(
        self, source: Tap, target: Tap, sizes: tuple[tuple[int, int], tuple[int, int]], *, rngs: nnx.Rngs
    ) -> None:
        here, there = sizes
        settings = {"padding": 1, "kernel_init": he_fan_out, "dtype": None, "rngs": rngs}
        self.conv: nnx.Module
        if here == there:
            self.conv = Conv(source.channels, target.channels, 3, use_bias=False, **settings)
        elif here == (2 * there[0], 2 * there[1]):
            self.conv = Conv(source.channels, target.channels, 3, stride=2, **settings)
        elif there == (2 * here[0], 2 * here[1]):
            self.conv = ConvTranspose(source.channels, target.channels, 4, stride=2, padding=1, dtype=None, rngs=rngs)
        else:
            raise ValueError(f"maps of {here} and {there} positions: must be equal, or one half of the other")
        self.bn = BatchNorm(target.channels)
        self.relu = not target.signed

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, D] to [B, H', W', D']."""
        x = self.bn(self.conv(x), train=train)
        return nnx.leaky_relu(x, 0.1) if self.relu else x


class FCFD(nnx.Module):
    """Consistency of appearance (maps look alike) and of function (so does what the other network makes of them).

    Stages are all taps but the stem. Every map of the student is bridged into the teacher's space. A mixed path runs
    one network up to a stage that is not the last, crosses a bridge, and goes on in the other, in training mode; two
    are drawn each step, without replacement.

    Term `feature`: mean squared errors to the teacher's maps of all other maps in its space (bridged ones, and those
    behind a bridge), and of the means over positions of their positive parts at the last stage. `kd`: KD of the
    student's logits. `mixed`: KD of the mixed paths' logits, summed over the two.

    Defaults are those of the released code for ImageNet, ResNet-34 -> ResNet-18; ResNet-50 -> MobileNetV1 has
    feature_weight 5; CIFAR has feature_weight 5, temperature 4 and a warmup of 20. The label weight is 1.

    The teacher's own maps and logits are those of evaluation. The released code leaves it in training mode, so that
    they have the batch's statistics; `teacher_batch_statistics` does so too, for another pass through the teacher.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "feature_weight": 0.02,  # follows `schedule`
        "kd_weight": 1.0,
        "mixed_weight": 1.0,  # of each mixed path
        "temperature": 1.0,
        "teacher_batch_statistics": False,
        "schedule": {**schedule.DEFAULTS, "warmup": 5},
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.not_negative("fcfd", config, "feature_weight", "kd_weight", "mixed_weight")
        checks.positive("fcfd", config, "temperature")
        schedule.check("fcfd", config["feature_weight"], config["schedule"], setup.epochs)
        self.config = config
        self.student, self.teacher = _stages(setup.student), _stages(setup.teacher)
        if not 2 <= len(self.student) == len(self.teacher):
            raise ValueError(
                f"methods.fcfd: {setup.student.name} has the stages {', '.join(self.student)}, and "
                f"{setup.teacher.name} {', '.join(self.teacher)}; choose networks of as many stages, at least two"
            )
        pairs = [
            tuple((tap, spatial_size(tap, setup.image_size)) for tap in taps)
            for taps in zip(self.student.values(), self.teacher.values(), strict=True)
        ]
        try:
            self.to_teacher = nnx.List(Bridge(s, t, (a, b), rngs=rngs) for (s, a), (t, b) in pairs)
            self.to_student = nnx.List(Bridge(t, s, (b, a), rngs=rngs) for (s, a), (t, b) in pairs[:-1])
        except ValueError as error:
            raise ValueError(
                f"methods.fcfd: {setup.student.name} and {setup.teacher.name} at images of {setup.image_size} have "
                f"{error}; choose networks whose stages pair up"
            ) from error

    def terms(self, context: Context) -> Terms:
        """Terms `feature`, `kd` and `mixed`."""
        config, temperature = self.config, self.config["temperature"]
        draw, own, passes = jax.random.split(context.key, 3)
        teacher = context.teacher
        if config["teacher_batch_statistics"]:
            teacher = context.teacher_model()(context.teacher_batch.image, train=True, rngs=nnx.Rngs(own))
            teacher = jax.lax.stop_gradient(teacher)
        targets = {name: teacher.taps[name] for name in self.teacher}
        last = list(targets)[-1]
        # All bridges run, whichever paths are drawn: inside of a branch they could not keep their running statistics.
        in_teacher, in_student = {}, {}
        for name, target, bridge in zip(self.student, targets, self.to_teacher, strict=True):
            in_teacher[target] = bridge(context.student.taps[name], train=True)
        for name, target, bridge in zip(targets, self.student, self.to_student, strict=False):
            in_student[target] = bridge(targets[name], train=True)

        def appearance(maps: dict[str, Array]) -> Array:
            """How far maps in the teacher's space, among them one of the last stage, are from the teacher's own."""
            pooled = (mean_over_positions(nnx.relu(x[last])) for x in (maps, targets))
            return sum(losses.mse(maps[name], targets[name]) for name in maps) + losses.mse(*pooled)

        def through_teacher(tap: str, key: Array) -> tuple[Array, Array]:
            rest = context.teacher_model().forward_from(tap, in_teacher[tap], train=True, rngs=nnx.Rngs(key))
            return losses.kd(rest.logits, teacher.logits, temperature=temperature), appearance(rest.taps)

        def through_student(tap: str, key: Array) -> tuple[Array, Array]:
            rest = context.student_model().forward_from(tap, in_student[tap], train=True, rngs=nnx.Rngs(key))
            value = losses.kd(rest.logits, teacher.logits, temperature=temperature)
            return value, jnp.zeros_like(value)

        paths = [functools.partial(through_teacher, tap) for tap in in_teacher if tap != last]
        paths += [functools.partial(through_student, tap) for tap in in_student]
        # A gradient that keeps activations would keep room for those of every path, for each of the two.
        paths = [jax.checkpoint(path) for path in paths]
        drawn = jax.random.permutation(draw, len(paths))[:DRAWN], jax.random.split(passes, DRAWN)
        mixed, behind = jax.lax.map(lambda one: jax.lax.switch(one[0], paths, one[1]), drawn)
        weight = schedule.weight(config["feature_weight"], config["schedule"], context.progress)
        kd = losses.kd(context.student.logits, teacher.logits, temperature=temperature)
        return {
            "feature": Term(appearance(in_teacher) + jnp.sum(behind, axis=0), weight),
            "kd": Term(kd, config["kd_weight"]),
            "mixed": Term(jnp.sum(mixed, axis=0), config["mixed_weight"]),
        }


def _stages(info: ModelInfo) -> dict[str, Tap]:
    """The taps but the stem.

    Raises:
      ValueError: If they are not maps.
    """
    stages = {name: tap for name, tap in info.taps.items() if name != "stem"}
    for name, tap in stages.items():
        if tap.layout != "NHWC":
            raise ValueError(
                f"methods.fcfd: {name} of {info.name} is {tap.layout}, and what follows needs the class token, which "
                "no bridge from a map can make; choose a network with maps at every stage"
            )
    return stages


REGISTER = {"fcfd": FCFD}
