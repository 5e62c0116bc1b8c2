"""One tap of each network, the student's through a learned projector: what WKD-F and its alternatives compare."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax.methods import schedule
from wkd_jax.methods.taps import find_tap
from wkd_jax.models import connectors
from wkd_jax.types import Array, Context, Setup, Term


class ProjectedPair(nnx.Module):
    """Base of methods that compare one tap of each side by a distance that may take them at different sizes.

    Maps and tokens (their leading ones dropped) of images, and pooled regions [B, R, H, W, D], which are masked by the
    student's `valid`; those that do not count are 0 to the projector.

    Attributes:
      config: The method's settings, which have the keys of `PROJECTED`, `weight` and `schedule`.
      taps: The `Tap` of the student, and that of the teacher.
      projector: A projector of `connectors.build`.
      sizes: (height, width) in positions of the projected student's map, and of the teacher's.
    """

    PROJECTED: ClassVar[dict[str, Any]] = {
        "student_tap": "last",
        "teacher_tap": "last",
        "projector": "bottleneck",  # conv1x1, bottleneck, conv3x3, linear or none
    }
    NEEDS_TEACHER = True

    def __init__(self, method: str, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check(method, config["weight"], config["schedule"], setup.epochs)
        self.config = config
        self.student_tap, student = find_tap(setup.student, config["student_tap"], f"methods.{method}.student_tap")
        self.teacher_tap, teacher = find_tap(setup.teacher, config["teacher_tap"], f"methods.{method}.teacher_tap")
        self.taps = student, teacher
        sizes = [connectors.spatial_size(tap, setup.image_size) for tap in self.taps]
        try:
            self.projector = connectors.build(
                config["projector"], student, teacher, student_size=sizes[0], teacher_size=sizes[1], rngs=rngs
            )
        except ValueError as error:
            raise ValueError(f"methods.{method}.projector: {error}") from error
        if config["projector"] in ("conv1x1", "bottleneck"):
            sizes[0] = sizes[1]  # their output has the teacher's size
        self.sizes = tuple(sizes)

    def features(self, context: Context) -> tuple[Array, Array]:
        """The student's projected feature and the teacher's: maps [N, H, W, D] or tokens, N images or regions."""
        lead = self._lead(context)
        names = self.student_tap, self.teacher_tap
        pair = [out.taps[name] for out, name in zip((context.student, context.teacher), names, strict=True)]
        pair = [x[:, tap.prefix_tokens :] if x.ndim == 3 else x for x, tap in zip(pair, self.taps, strict=True)]
        student, teacher = (x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in pair)
        if len(lead) == 2 and context.teacher.valid is not None:
            # What empty slots hold must not enter the projector's batch statistics. (The student's `valid` also hides
            # regions that are there.)
            student = jnp.where(context.teacher.valid.reshape(-1, 1, 1, 1), student, 0)
        return self.projector(student, train=True), teacher

    def weight(self, context: Context) -> Array:
        """The method's weight at this point of the run."""
        return schedule.weight(self.config["weight"], self.config["schedule"], context.progress)

    def term(self, context: Context, value: Array, weight: Array) -> Term:
        """A term of values [N], as [B] or as [B, R]."""
        lead = self._lead(context)
        return Term(value.reshape(lead), weight, context.student.valid if len(lead) == 2 else None)

    def _lead(self, context: Context) -> tuple[int, ...]:
        """(B,), or (B, R) of pooled regions."""
        shape = context.student.taps[self.student_tap].shape
        return shape[:-3] if len(shape) > 3 else shape[:1]
