"""The hierarchical context loss of ReviewKD: two maps compared whole and pooled to 4 x 4, 2 x 2 and 1 x 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import adaptive_average_pool, mse, widened

Array = jax.Array

POOLS = (4, 2, 1)


def hcl(student: Array, teacher: Array) -> Array:
    """Weighted mean of the mean squared differences of one level's maps, as they are and pooled.

    The maps as they are have weight 1, the first pooled size 1/2, the next 1/4, the last 1/8; sizes that are not below
    the maps' height are left out, and the weights divided by their sum. The teacher's map is a constant.

    Args:
      student: [B, H, W, D], any float dtype; computed in float32, or float64 where an input is.
      teacher: Same shape.

    Returns:
      [B], feature units squared. ReviewKD sums it over the levels.

    Raises:
      ValueError: If the shapes differ, or are not maps.

    Example:
      >>> student, teacher = jnp.zeros((1, 8, 8, 3)), jnp.ones((1, 8, 8, 3))
      >>> teacher = teacher.at[:, ::2].set(-1.0)  # pooled, the rows cancel
      >>> print(hcl(student, teacher))  # 1 / (1 + 1/2 + 1/4 + 1/8)
      [0.53333336]

    References:
      Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.
    """
    if jnp.ndim(student) != 4:
        raise ValueError(f"needs maps [B, H, W, D], got {jnp.shape(student)}")
    student, teacher = widened(student, jax.lax.stop_gradient(teacher))
    value, weight, total = mse(student, teacher), 1.0, 1.0
    for size in POOLS:
        if size < student.shape[1]:
            weight /= 2
            pooled = (adaptive_average_pool(x, size) for x in (student, teacher))
            value, total = value + weight * mse(*pooled), total + weight
    return value / total
