"""FGFI: the teacher's maps are imitated near objects alone.

Wang, Yuan, Zhang, Feng, "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.detection import near_objects
from wkd_jax.models.detection.faster_rcnn import LEVELS
from wkd_jax.models.layers import Conv
from wkd_jax.types import Array, Context, Setup, Term, Terms


def near_zero(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    """1e-4 times the remainder of N(0, 1) by 2, the original's initial kernel."""
    return 1e-4 * jnp.fmod(jax.random.normal(key, shape, dtype), 2)


class FGFI(nnx.Module):
    """weight * `losses.fgfi` on the pyramid's levels, the student's after a 3 x 3 convolution each.

    A position counts where the IoU of one of its anchors with a box is above half the largest of any anchor. The
    original code does so for one level of VGG; for pyramids there is none, and these are choices: the largest IoU is
    over the anchors of all levels, so that a box counts at the levels that fit it; no ReLU behind the convolutions,
    since pyramid levels are signed; one convolution a level. Boxes have plain widths (the original adds a pixel).
    Anchors are the student's, those beyond the image's border too. The weight, the factor 1/2 in the loss, the initial
    kernels and the 400 steps without the term are the original's. The label weight is 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.01,
        "share": 0.5,  # of a box's largest IoU, which an anchor's must be above
        "delay": 400,  # steps at the beginning of the run without the term
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True
    TASK = "detection"

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("fgfi", config["weight"], config["schedule"], setup.epochs)
        checks.not_negative("fgfi", config, "delay", "share")
        if config["share"] >= 1:
            raise ValueError(f"methods.fgfi.share={config['share']}: must be below 1")
        self.config = config
        channels = [[info.taps[level].channels for level in LEVELS] for info in (setup.student, setup.teacher)]
        self.adaptors = nnx.List(
            Conv(student, teacher, 3, padding=1, kernel_init=near_zero, dtype=None, rngs=rngs)
            for student, teacher in zip(*channels, strict=True)
        )

    def terms(self, context: Context) -> Terms:
        """The term `imitation`."""
        config, batch = self.config, context.batch
        anchors = context.student_model().anchors(batch.image.shape[1:3])  # type: ignore[attr-defined]
        every = jnp.asarray(np.concatenate(anchors))
        near = jax.vmap(lambda boxes, valid: near_objects(every, boxes, valid, share=config["share"]))(
            batch.extra["boxes"], batch.extra["box_valid"]
        )
        ends = np.cumsum([len(level) for level in anchors])[:-1]
        students = [adapt(context.student.taps[level]) for level, adapt in zip(LEVELS, self.adaptors, strict=True)]
        positions = [
            jnp.any(of_anchors.reshape(*student.shape[:3], -1), axis=-1)
            for of_anchors, student in zip(jnp.split(near, ends, axis=1), students, strict=True)
        ]
        value = losses.fgfi(students, [context.teacher.taps[level] for level in LEVELS], positions)
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        return {"imitation": Term(value, jnp.where(context.progress.step < config["delay"], 0.0, weight))}


REGISTER = {"fgfi": FGFI}
