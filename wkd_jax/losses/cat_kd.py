"""CAT-KD: the student's class activation maps follow the teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import adaptive_average_pool, mse, widened
from wkd_jax.losses.relational import unit_norm

Array = jax.Array


def cat_kd(student_maps: Array, teacher_maps: Array, *, size: int, normalise: bool = False) -> Array:
    """Mean squared difference of the two sides' class activation maps, averaged over size x size cells.

    A class map is the last feature map times the classifier's kernel, without the bias: its mean over positions is the
    class's logit. The teacher is a constant.

    Args:
      student_maps: [B, H, W, C], any float dtype; computed in float32, or float64 where an input is.
      teacher_maps: [B, H', W', C].
      size: Cells along each side, at least 1; see `adaptive_average_pool`.
      normalise: Divide the cells of each example and class by their Euclidean norm (0 where that is at most 1e-12).

    Returns:
      [B], mean over size^2 C entries.

    Raises:
      ValueError: If the shapes do not fit.

    Example:
      >>> maps = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
      >>> print(cat_kd(maps, jnp.zeros((1, 2, 2, 1)), size=1), cat_kd(maps, 4 * maps, size=2, normalise=True))
      [6.25] [0.]

    References:
      Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, arXiv 2304.12777.
    """
    shapes = jnp.shape(student_maps), jnp.shape(teacher_maps)
    if any(len(shape) != 4 for shape in shapes) or any(shapes[0][axis] != shapes[1][axis] for axis in (0, 3)):
        raise ValueError(f"class maps must be [B, H, W, C] with the same B and C, got {shapes[0]} and {shapes[1]}")
    student, teacher = (adaptive_average_pool(x, size) for x in widened(student_maps, teacher_maps))
    if normalise:
        student, teacher = (unit_norm(x, axis=(1, 2)) for x in (student, teacher))
    return mse(student, teacher)
