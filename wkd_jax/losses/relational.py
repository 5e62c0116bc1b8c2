"""Losses on the relations between the examples of a batch: correlation congruence (CC) and relational KD (RKD).

Each is a quantity of the whole batch, a scalar. `where` leaves examples out, exactly as if they were not in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted, group_length
from wkd_jax.losses.feature import widened

Array = jax.Array
_HIGHEST = jax.lax.Precision.HIGHEST


def cc_neighbours(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """Correlation congruence as published tables of results compute it: products of neighbouring differences.

    With d_i = |student_i - teacher_i|, entry by entry, it is sum_i <d_i, d_(i+1)> / (B - 1): the value depends on the
    order of the batch. It is not the loss of the paper (`cc_kernel`). Both sides are trained embeddings, so gradients
    flow into both; stop the features below the teacher's.

    Args:
      student: [B, D] embeddings, any float dtype; computed in float32, or float64 where an input is.
      teacher: Same shape.
      where: [B] bool, the examples that count; those on both sides of a gap are neighbours. None: all.

    Returns:
      Scalar; 0 where fewer than two examples count.

    Raises:
      ValueError: If the shapes differ or are not [B, D].

    Example:
      >>> student, teacher = jnp.array([[1.0, 0.0], [2.0, 0.0], [5.0, 1.0]]), jnp.zeros((3, 2))
      >>> float(cc_neighbours(student, teacher))  # (1 * 2 + 2 * 5) / 2
      6.0

    References:
      Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv 1904.01802; this form is that
      of the benchmark of Tian, Krishnan, Isola, arXiv 1910.10699.
    """
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            f"student and teacher embeddings must be of one shape [B, D], got {jnp.shape(student)} and "
            f"{jnp.shape(teacher)}"
        )
    student, teacher, where = _prepared(student, teacher, where)
    difference = jnp.abs(student - teacher)[jnp.argsort(~where, stable=True)]  # what counts goes first, in its order
    count = jnp.sum(where)
    products = jnp.sum(difference[:-1] * difference[1:], axis=-1)
    products = jnp.where(jnp.arange(1, len(where)) < count, products, 0)
    return jnp.sum(products) / jnp.maximum(count - 1, 1)


def cc_kernel(
    student: Array,
    teacher: Array,
    *,
    gamma: float = 0.4,
    degree: int = 2,
    form: Literal["paper", "root"] = "paper",
    where: Array | None = None,
) -> Array:
    """Correlation congruence as the paper defines it: the two sides' kernel matrices over the batch agree.

    The kernel is the Taylor expansion of a Gaussian one between unit vectors, K(x, y) = exp(-2 gamma) sum_(p <= degree)
    (2 gamma)^p / p! <x, y>^p. Both sides are trained embeddings, so gradients flow into both; stop the features below
    the teacher's.

    Args:
      student: [B, D] embeddings, any float dtype; computed in float32, or float64 where an input is. The paper's are of
        unit norm (`unit_norm`); it is the caller's choice.
      teacher: [B, D'].
      gamma: Inverse width of the kernel, above 0.
      degree: Of the expansion, at least 1.
      form: "paper": |K_s - K_t|_F^2 / B^2. "root": |K_s - K_t|_F / B^2, as in torchdistill.
      where: [B] bool, the examples that count. None: all.

    Returns:
      Scalar.

    Raises:
      ValueError: If the shapes do not fit, or a setting is out of range.

    Example:
      >>> vectors, other = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> float(cc_kernel(vectors, vectors)), round(float(cc_kernel(vectors, other)), 4)
      (0.0, 0.1266)

    References:
      Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv 1904.01802, section 3.3.
    """
    if form not in ("paper", "root"):
        raise ValueError(f"form={form!r}: must be 'paper' or 'root'")
    if not gamma > 0 or degree < 1:
        raise ValueError(f"gamma={gamma}, degree={degree}: gamma must be above 0 and degree at least 1")
    student, teacher, where = _prepared(student, teacher, where)

    def kernel(x: Array) -> Array:
        products = jnp.matmul(x, x.T, precision=_HIGHEST)
        total = jnp.ones_like(products)
        for p in range(1, degree + 1):
            total += (2 * gamma) ** p / math.factorial(p) * products**p
        return math.exp(-2 * gamma) * total

    gap = jnp.where(where[:, None] & where, kernel(student) - kernel(teacher), 0)
    distance, pairs = jnp.sum(jnp.square(gap)), jnp.square(jnp.maximum(jnp.sum(where), 1))
    if form == "root":
        apart = distance > 0
        distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, distance, 1)), 0)
    return distance / pairs


def rkd_distance(student: Array, teacher: Array, *, group_size: int | None = None, where: Array | None = None) -> Array:
    """Relational KD by distances: the examples' distances, relative to their mean, agree between the two sides.

    D_ij = sqrt(max(|x_i - x_j|^2, 1e-12)), 0 on the diagonal, divided by the mean off the diagonal (which is
    differentiated on the student's side); then the smooth L1 difference of both sides, averaged over all B^2 entries.
    The teacher is a constant. One chunk of examples meets all others at a time, so that no more than B^3 numbers exist.

    Args:
      student: [B, D], any float dtype; computed in float32, or float64 where an input is.
      teacher: [B, D'].
      group_size: Relations are taken within consecutive groups of that many examples, and the value is the mean over
        groups in which any example counts: what devices that do not communicate compute. None: the whole batch.
      where: [B] bool, the examples that count. None: all.

    Returns:
      Scalar.

    Raises:
      ValueError: If the shapes do not fit, or the groups do not divide the batch.

    Example:
      >>> x = jnp.array([[0.0], [1.0], [3.0]])
      >>> float(rkd_distance(x, 5 * x))  # scale does not matter
      0.0

    References:
      Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068, section 3.2.1.
    """
    return _mean_over_groups(_distance_loss, student, teacher, group_size, where)


def rkd_angle(student: Array, teacher: Array, *, group_size: int | None = None, where: Array | None = None) -> Array:
    """Relational KD by angles: the angles that any two examples make at a third agree between the two sides.

    A_ijk = <u_ij, u_ik> with u_ij the unit vector from example i to example j (0 where they coincide); then the smooth
    L1 difference of both sides, averaged over all B^3 entries, those with equal indices included. The teacher is a
    constant. The array of all angles never exists: a chunk of examples i is summed up at a time, in no more than B^3
    numbers, and computed again for the gradient.

    Args:
      student: [B, D], any float dtype; computed in float32, or float64 where an input is.
      teacher: [B, D'].
      group_size: As in `rkd_distance`.
      where: [B] bool, the examples that count. None: all.

    Returns:
      Scalar.

    Raises:
      ValueError: If the shapes do not fit, or the groups do not divide the batch.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> float(rkd_angle(x, 2 * x + 1))  # neither scale nor place matters
      0.0

    References:
      Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068, section 3.2.2.
    """
    return _mean_over_groups(_angle_loss, student, teacher, group_size, where)


def unit_norm(x: Array, *, axis: int | tuple[int, ...] = -1) -> Array:
    """`x` divided by its Euclidean norm along `axis`; 0, with gradient 0, where the norm is at most 1e-12.

    Args:
      x: Any shape, any float dtype; computed in float32, or float64 where it is.
      axis: One axis, or several that are one vector together.

    Returns:
      Shape of `x`.

    Example:
      >>> print(unit_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [[0.6 0.8]
       [0.  0. ]]
    """
    (x,) = widened(x)
    squared = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    long = squared > 1e-24
    return x * jnp.where(long, jax.lax.rsqrt(jnp.where(long, squared, 1)), 0)


def _prepared(student: Array, teacher: Array, where: Array | None) -> tuple[Array, Array, Array]:
    """Both sides widened, zero where they do not count (so that nothing there reaches a gradient), and the mask."""
    if jnp.ndim(student) != 2 or jnp.ndim(teacher) != 2 or len(student) != len(teacher):
        raise ValueError(f"student and teacher must be [B, D], got {jnp.shape(student)} and {jnp.shape(teacher)}")
    where = counted(where, (len(student),))
    student, teacher = widened(student, teacher)
    return jnp.where(where[:, None], student, 0), jnp.where(where[:, None], teacher, 0), where


def _mean_over_groups(
    loss: Callable[[Array, Array, Array], Array],
    student: Array,
    teacher: Array,
    group_size: int | None,
    where: Array | None,
) -> Array:
    student, teacher, where = _prepared(student, jax.lax.stop_gradient(teacher), where)
    size = group_length(group_size, len(where))
    student, teacher, where = (x.reshape(-1, size, *x.shape[1:]) for x in (student, teacher, where))
    counts = jnp.any(where, axis=1)
    values = jnp.where(counts, jax.vmap(loss)(student, teacher, where), 0)
    return jnp.sum(values) / jnp.maximum(jnp.sum(counts), 1)


def _distance_loss(student: Array, teacher: Array, where: Array) -> Array:
    difference = _smooth_l1(_relative_distances(student, where) - _relative_distances(teacher, where))
    return jnp.sum(difference) / jnp.square(jnp.maximum(jnp.sum(where), 1))


def _relative_distances(x: Array, where: Array) -> Array:
    """[B, B], 0 where i = j and where an example does not count."""

    def to_all(anchor: Array) -> Array:
        return jnp.sum(jnp.square(x - anchor), axis=-1)

    squared = jax.lax.map(jax.checkpoint(to_all), x, batch_size=_chunk(x))
    pairs = where[:, None] & where & ~jnp.eye(len(x), dtype=bool)
    distances = jnp.where(pairs, jnp.sqrt(jnp.where(pairs, jnp.maximum(squared, 1e-12), 1)), 0)
    mean = jnp.sum(distances) / jnp.maximum(jnp.sum(pairs), 1)
    return distances / jnp.where(mean > 0, mean, 1)


def _angle_loss(student: Array, teacher: Array, where: Array) -> Array:
    def cosines(x: Array, anchor: Array) -> Array:
        directions = unit_norm(x - anchor)
        return jnp.matmul(directions, directions.T, precision=_HIGHEST)

    def at(anchors: tuple[Array, Array, Array]) -> Array:
        difference = _smooth_l1(cosines(student, anchors[0]) - cosines(teacher, anchors[1]))
        return jnp.sum(jnp.where(where[:, None] & where & anchors[2], difference, 0))

    chunk = min(_chunk(student), _chunk(teacher))
    sums = jax.lax.map(jax.checkpoint(at), (student, teacher, where), batch_size=chunk)
    return jnp.sum(sums) / jnp.maximum(jnp.sum(where), 1).astype(student.dtype) ** 3


def _chunk(x: Array) -> int:
    """Examples that can meet all others at a time: chunk * B * (B + D) <= B^3, unless that is below one."""
    size, features = x.shape
    return max(1, min(size, size**2 // (size + features)))


def _smooth_l1(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(size), size - 0.5)
