"""DIST: the student's class probabilities correlate with the teacher's, within examples and within classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted, group_length
from wkd_jax.losses.kl import softened

Array = jax.Array


def dist(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: float = 1.0,
    group_size: int | None = None,
    where: Array | None = None,
) -> tuple[Array, Array]:
    """Distillation from a stronger teacher; the published total is `beta * inter.mean() + gamma * intra`.

    With p = softmax(teacher / T), q = softmax(student / T) and r Pearson's correlation:

        inter[n] = T^2 (1 - r(p[n, :], q[n, :]))            relations between the classes of one example
        intra    = T^2 (1 - mean_k r(p[:, k], q[:, k]))     relations between the examples of one class

    T^2 is in the authors' code and not in the paper. Correlations have 1e-8 added to the denominator, as in the code:
    where either side is constant, the correlation is 0.

    Args:
      student_logits: [B, ..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants.
      temperature: T > 0.
      group_size: Examples (entries of B) among which `intra` correlates: consecutive groups of that many, the mean over
        the groups, as if each were a device's share. The authors' results are for groups of 32 on ImageNet. None: all.
      where: [B, ...] bool, the rows that count in `intra`; it is the same as without the others. Groups without any do
        not count. None: all rows.

    Returns:
      (inter [B, ...], intra scalar). `inter` is not masked. `intra` is 0 where no row counts.

    Raises:
      ValueError: If shapes do not match, the temperature is not one positive number, or groups do not divide B.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 1.0, -1.0]])
      >>> inter, intra = dist(2.0 * teacher, teacher)
      >>> print(inter.round(3), round(float(intra), 3))
      [0.012 0.002 0.   ] 0.009

    References:
      Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536, section 3.
    """
    if jnp.ndim(temperature):
        raise ValueError(f"temperature must be one number, since classes are compared over examples, got {temperature}")
    if jnp.ndim(student_logits) < 2:
        raise ValueError(f"dist relates the examples of a batch: needs [B, ..., C], got {jnp.shape(student_logits)}")
    student, teacher, squared = softened(student_logits, teacher_logits, temperature)
    p, q = jax.nn.softmax(teacher, axis=-1), jax.nn.softmax(student, axis=-1)
    inter = 1 - correlation(p, q, jnp.ones_like(p, bool), axis=-1)

    groups, classes = len(p) // group_length(group_size, len(p)), p.shape[-1]
    counts = counted(where, p.shape[:-1]).reshape(groups, -1, 1)
    p, q = (x.reshape(groups, -1, classes) for x in (p, q))
    each = 1 - correlation(p, q, counts, axis=1).mean(-1)
    filled = counts.any((1, 2))
    intra = jnp.sum(jnp.where(filled, each, 0)) / jnp.maximum(filled.sum(), 1)
    return squared * inter, squared * intra


def correlation(a: Array, b: Array, where: Array, axis: int) -> Array:
    """Pearson's correlation along an axis over the entries in `where`, with the authors' 1e-8 in the denominator.

    Args:
      a: Floats, of any shape.
      b: Same shape.
      where: Bool, of that shape or one that broadcasts to it.
      axis: The one that goes.

    Returns:
      Of the shape without the axis; 0, with gradient 0, where a side does not vary.

    Example:
      >>> x = jnp.array([1.0, 2.0, 4.0, 0.0])
      >>> print(correlation(x, 3 - x * x, jnp.array([True, True, False, False]), axis=0).round(3))
      -1.0
    """
    count = jnp.maximum(where.sum(axis, keepdims=True), 1)
    a, b = (jnp.where(where, x, 0) for x in (a, b))
    a, b = (jnp.where(where, x - x.sum(axis, keepdims=True) / count, 0) for x in (a, b))
    return cosine(a, b, axis)


def cosine(a: Array, b: Array, axis: int) -> Array:
    """Cosine along an axis, with 1e-8 added to the denominator; 0, with gradient 0, where a side is 0.

    Args:
      a: Floats, of any shape.
      b: Same shape.
      axis: The one that goes.

    Returns:
      Of the shape without the axis.

    Example:
      >>> print(cosine(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.ones((2, 2)), axis=1).round(4))
      [0.9899 0.    ]
    """
    return jnp.sum(a * b, axis) / (safe_sqrt(jnp.sum(a * a, axis)) * safe_sqrt(jnp.sum(b * b, axis)) + 1e-8)


def safe_sqrt(x: Array) -> Array:
    """Square root, with gradient 0 at 0 instead of infinity.

    Args:
      x: Floats of any shape, not negative.

    Returns:
      Of the same shape and dtype.

    Example:
      >>> float(jax.grad(safe_sqrt)(0.0)), float(safe_sqrt(4.0))
      (0.0, 2.0)
    """
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
