"""Fine-grained feature imitation: squared differences of maps where objects are near."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import widened

Array = jax.Array


def fgfi(students: Sequence[Array], teachers: Sequence[Array], near: Sequence[Array]) -> Array:
    """Sum of the squared differences at positions near objects, over twice the number of those positions.

    Positions are counted over the whole batch and all levels, channels are not. The teacher's maps are constants. 0
    where no position is near an object (the original divides by 0 there).

    Args:
      students: [B, H, W, D] of each level, any float dtype; computed in float32, or float64 where an input is.
      teachers: Same shapes.
      near: [B, H, W] bool of each level: which positions count, such as those that
        `wkd_jax.models.detection.near_objects` finds.

    Returns:
      A scalar of the whole batch, feature units squared.

    Raises:
      ValueError: If the levels differ in number or a shape does not fit.

    Example:
      >>> student, teacher = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))
      >>> near = jnp.array([[[True, False], [True, False]]])
      >>> print(fgfi([student], [teacher], [near]))  # 2 positions of 3 channels / (2 * 2)
      1.5

    References:
      Wang, Yuan, Zhang, Feng, "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv
      1906.03609.
    """
    if not len(students) == len(teachers) == len(near) > 0:
        raise ValueError(f"needs as many levels of each, got {len(students)}, {len(teachers)} and {len(near)}")
    total, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    for student, teacher, mask in zip(students, teachers, near, strict=True):
        if jnp.shape(student) != jnp.shape(teacher) or jnp.shape(mask) != jnp.shape(student)[:-1]:
            raise ValueError(
                f"student and teacher must be of one shape [B, H, W, D] and near of [B, H, W], got "
                f"{jnp.shape(student)}, {jnp.shape(teacher)} and {jnp.shape(mask)}"
            )
        student, teacher = widened(student, jax.lax.stop_gradient(teacher))
        difference = jnp.where(mask[..., None], student - teacher, 0)
        total, count = total + jnp.sum(jnp.square(difference)), count + jnp.sum(mask)
    return total / jnp.maximum(2 * count, 1)
