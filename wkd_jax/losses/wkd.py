"""The losses of "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation".

WKD-L, on logits: entropic optimal transport between the class distributions of student and teacher, under a ground
cost made from category interrelations. WKD-F, on features: the 2-Wasserstein distance between diagonal Gaussians
fitted to feature maps. Lv, Yang, Li, NeurIPS 2024, arXiv 2412.08139; values and gradients follow the authors' code.

The teacher is a constant here: every function stops its gradient, so that a caller cannot forget to.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wkd_jax.losses.kl import softened
from wkd_jax.losses.sinkhorn import SinkhornOutput, sinkhorn

Array = jax.Array


def wkd_logit(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    ground_cost: Array,
    *,
    temperature: float | Array = 2.0,
    epsilon: float | Array = 0.05,
    num_iters: int = 10,
    gradient: str = "unrolled",
    stabilizer: float = 1e-8,
    exact_marginal: str = "student",
    threshold: float | None = None,
    return_error: bool = False,
) -> tuple[Array, ...]:
    r"""WKD-L with the target class separated; the paper's total is `target_term + weight * wasserstein_term`.

    The target term is the cross-entropy of the target class alone, -p_y log q_y with p = softmax(teacher) and
    q = softmax(student), both at temperature 1. The Wasserstein term is the cost of transporting the student's
    distribution over the other classes to the teacher's, both softmax(logits / temperature) without class y. There is
    no factor temperature^2.

    The authors' code deletes class y from every matrix of the batch, [B, C-1, C-1]. Here y is masked, keeps no mass and
    starts with scaling zero, which gives the same numbers from one [C, C] kernel. That code also adds 1e-8 to the cost,
    below float32 resolution of the result, and is left out.

    Args:
      student_logits: [..., C], any float dtype; computed in float32 (float64 stays). C >= 2.
      teacher_logits: [..., C]. No gradient.
      labels: [...], integers, the classes y. A label outside [0, C) (padding) leaves no class out and has target term
        0: mask such rows in the result.
      ground_cost: [C, C], student's class on the rows, non-negative with a zero diagonal, as from `ground_cost`.
      temperature: Of the Wasserstein term, positive: a number, or one for each example [...]; may be traced.
      epsilon: Regularizer in units of the cost, may be traced.
      num_iters: Sinkhorn iterations. Ten do not converge, and more are a different loss: pairs that are already close
        are penalised less at ten.
      gradient: "unrolled", "implicit" or "envelope", see `sinkhorn`; the last returns the entropic cost.
      stabilizer: Added to the denominators of the updates.
      exact_marginal: "student" or "teacher": whose distribution the last update meets, the other being approached. The
        authors' code updates the student's last; the paper has the teacher on the rows of its solver.
      threshold: Stops converged examples early, see `sinkhorn`.
      return_error: Whether to append the solver's `error`.

    Returns:
      (target_term, wasserstein_term), each [...], and the L1 marginal error [...] where `return_error` is set. Not
      averaged over the batch.

    Raises:
      ValueError: If shapes do not match, labels are not integers, there is one class only, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[2.0, -3.0, 3.0]]), jnp.array([[4.0, 3.0, -3.0]])
      >>> cost = 1.0 - jnp.eye(3)  # all classes equally far apart
      >>> target_term, wasserstein_term = wkd_logit(student, teacher, jnp.array([0]), cost)
      >>> print(target_term.round(2), wasserstein_term.round(2))
      [0.96] [0.9]

    References:
      Lv et al., arXiv 2412.08139, section 3.1.
    """
    student, teacher = _logits(student_logits, teacher_logits, ground_cost)
    labels = jnp.asarray(labels)
    if labels.shape != student.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {student.shape[:-1]}, got {labels.dtype} {labels.shape}; "
            "of mixed labels, take the argmax"
        )
    if student.shape[-1] < 2:
        raise ValueError("wkd_logit needs at least two classes: without the target none would be left")
    target = labels[..., None] == jnp.arange(student.shape[-1])
    target_log_q = jnp.where(target, jax.nn.softmax(teacher) * jax.nn.log_softmax(student), 0)
    out = _class_transport(
        jnp.where(target, -jnp.inf, student),
        jnp.where(target, -jnp.inf, teacher),
        ground_cost,
        temperature=temperature,
        epsilon=epsilon,
        num_iters=num_iters,
        gradient=gradient,
        stabilizer=stabilizer,
        exact_marginal=exact_marginal,
        threshold=threshold,
        where=~target,
    )
    terms = (-target_log_q.sum(-1), out.cost)
    return (*terms, out.error) if return_error else terms


def wkd_logit_unseparated(
    student_logits: Array,
    teacher_logits: Array,
    ground_cost: Array,
    *,
    temperature: float | Array = 2.0,
    epsilon: float | Array = 0.05,
    num_iters: int = 10,
    gradient: str = "unrolled",
    stabilizer: float = 1e-8,
    exact_marginal: str = "student",
    threshold: float | None = None,
    return_error: bool = False,
) -> Array | tuple[Array, Array]:
    """WKD-L without target separation: transport between the distributions over all classes.

    Args:
      student_logits: [..., C], any float dtype; computed in float32 (float64 stays).
      teacher_logits: [..., C]. No gradient.
      ground_cost: [C, C], student's class on the rows.
      temperature: Of both softmaxes, positive: a number, or one for each example [...]; may be traced. There is no
        factor temperature^2.
      epsilon: Regularizer in units of the cost, may be traced.
      num_iters: Sinkhorn iterations.
      gradient: "unrolled", "implicit" or "envelope", see `sinkhorn`.
      stabilizer: Added to the denominators of the updates.
      exact_marginal: "student" or "teacher": whose distribution the last update meets, the other being approached. The
        authors' code updates the student's last; the paper has the teacher on the rows of its solver.
      threshold: Stops converged examples early, see `sinkhorn`.
      return_error: Whether to return the solver's `error` too.

    Returns:
      Transport cost [...], not averaged over the batch; (cost, error) where `return_error` is set.

    Raises:
      ValueError: If shapes do not match or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[2.0, -3.0, 3.0]]), jnp.array([[4.0, 3.0, -3.0]])
      >>> print(wkd_logit_unseparated(student, teacher, 1.0 - jnp.eye(3)).round(2))
      [0.57]

    References:
      Lv et al., arXiv 2412.08139, section 3.1 and its ablation.
    """
    student, teacher = _logits(student_logits, teacher_logits, ground_cost)
    out = _class_transport(
        student,
        teacher,
        ground_cost,
        temperature=temperature,
        epsilon=epsilon,
        num_iters=num_iters,
        gradient=gradient,
        stabilizer=stabilizer,
        exact_marginal=exact_marginal,
        threshold=threshold,
    )
    return (out.cost, out.error) if return_error else out.cost


def _logits(student: Array, teacher: Array, ground_cost: Array) -> tuple[Array, Array]:
    """Checks shapes; logits in float32 or wider, the teacher's without gradient."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    classes = student.shape[-1] if student.ndim else 0
    if student.shape != teacher.shape or np.shape(ground_cost) != (classes, classes):
        raise ValueError(
            "student_logits and teacher_logits must be [..., C] of one shape and ground_cost [C, C], got "
            f"{student.shape}, {teacher.shape} and {np.shape(ground_cost)}"
        )
    dtype = jnp.promote_types(jnp.result_type(student, teacher), jnp.float32)
    return student.astype(dtype), lax.stop_gradient(teacher.astype(dtype))


def _class_transport(
    student: Array,
    teacher: Array,
    ground_cost: Array,
    *,
    temperature: float | Array,
    exact_marginal: str,
    **options: Any,
) -> SinkhornOutput:
    if exact_marginal not in ("student", "teacher"):
        raise ValueError(f'exact_marginal={exact_marginal!r}: must be "student" or "teacher"')
    student, teacher, _ = softened(student, teacher, temperature)
    student, teacher = jax.nn.softmax(student), jax.nn.softmax(teacher)
    if exact_marginal == "teacher":
        return sinkhorn(teacher, student, jnp.swapaxes(ground_cost, -1, -2), **options)
    return sinkhorn(student, teacher, ground_cost, **options)


def wkd_feature(
    student: Array, teacher: Array, *, grid: int = 1, ddof: int = 1, eps: float = 1e-5
) -> tuple[Array, Array]:
    """WKD-F: squared 2-Wasserstein distance between diagonal Gaussians fitted to features, in its two parts.

    Positions are samples and channels are independent, so W2^2 = sum_d (mean difference)^2 + sum_d (std difference)^2
    with std = sqrt(variance + eps). The paper's total is `mean_cov_ratio * mean_term + cov_term`. A `grid` above 1 fits
    one Gaussian to each cell of a grid x grid adaptive pooling (cell i of H covers rows floor(i H / grid) to
    ceil((i + 1) H / grid) - 1; cells overlap where grid does not divide H) and averages over the cells. Derivatives are
    reverse-mode.

    Args:
      student: [B, H, W, D] map, or [B, N, D] tokens (grid 1 only), any float dtype; computed in float32 (float64
        stays). Already brought to the teacher's D by a connector.
      teacher: [B, H', W', D] or [B, N', D]; its positions need not match the student's. No gradient.
      grid: Cells along each side.
      ddof: Variance is sum / (n - ddof). 1 as in the authors' code, 0 as in the paper. A cell of n <= ddof positions
        has variance 0.
      eps: Added to the variance, in feature units squared. 0 makes the gradient infinite where a variance is 0.

    Returns:
      (mean_term, cov_term), each [B], in feature units squared: summed over channels, averaged over cells, not over
      the batch.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or tokens meet a grid above 1.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1)  # mean 1, std 1
      >>> wkd_feature(3.0 * x + 1.0, x, ddof=0, eps=0.0)  # mean 4, std 3
      (Array([9.], dtype=float32), Array([4.], dtype=float32))

    References:
      Lv et al., arXiv 2412.08139, section 3.2.
    """
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    for name, feature in (("student", student), ("teacher", teacher)):
        if feature.ndim not in (3, 4) or 0 in feature.shape:
            raise ValueError(f"{name} must be a map [B, H, W, D] or tokens [B, N, D], got {feature.shape}")
        if feature.ndim == 3 and grid != 1:
            raise ValueError(f"{name} {feature.shape} is tokens, which have no {grid} x {grid} grid: use grid=1")
    if (student.shape[0], student.shape[-1]) != (teacher.shape[0], teacher.shape[-1]):
        raise ValueError(
            f"student {student.shape} and teacher {teacher.shape} must agree in B and D; a connector maps the channels"
        )
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    student, teacher = (x[:, :, None] if x.ndim == 3 else x for x in (student, teacher))
    student_mean, student_var = _cell_statistics(grid, ddof, student)
    teacher_mean, teacher_var = _cell_statistics(grid, ddof, lax.stop_gradient(teacher))
    mean_difference = student_mean - teacher_mean
    std_difference = jnp.sqrt(student_var + eps) - jnp.sqrt(teacher_var + eps)
    mean_term, cov_term = (jnp.square(d).sum((1, 2, 3)) / grid**2 for d in (mean_difference, std_difference))
    return mean_term, cov_term


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cell_statistics(grid: int, ddof: int, x: Array) -> tuple[Array, Array]:
    """Mean and variance [B, grid, grid, D], at least float32, of each adaptive-pooling cell of a map.

    The derivative is written out: it reads the map once, as it came, and the cells. JAX's own goes back through the
    merges, with a map in float32 for each of them.
    """
    return _cell_forward(grid, ddof, x)[0]


def _cell_forward(grid: int, ddof: int, x: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if grid == 1:
        mean = wide.mean((1, 2), keepdims=True)
        scatter = jnp.square(wide - mean).sum((1, 2), keepdims=True)
    else:
        mean, scatter = _merge(wide, jnp.zeros_like(wide), 1, 1, grid)
        mean, scatter = _merge(mean, scatter, _sizes(x.shape[1], grid)[:, None], 2, grid)
    return (mean, scatter * _per_sample(x, grid, ddof)), (x, mean)


def _cell_backward(grid: int, ddof: int, saved: tuple[Array, Array], bars: tuple[Array, Array]) -> tuple[Array]:
    """At a position: the sum of mean_bar / n + 2 var_bar (x - mean) / (n - ddof) over the cells that hold it."""
    x, mean = saved
    level, slope = bars[0] * _per_sample(x, grid, 0), 2 * bars[1] * _per_sample(x, grid, ddof)
    x_bar: Array | float = 0.0
    for rows, in_rows in _holders(x.shape[1], grid):
        for columns, in_columns in _holders(x.shape[2], grid):

            def at(cells: Array, rows: np.ndarray = rows, columns: np.ndarray = columns) -> Array:
                return cells[:, rows][:, :, columns]

            held = np.outer(in_rows, in_columns)[..., None]
            x_bar += jnp.where(held, at(level) + at(slope) * (x - at(mean)), 0)
    return (jnp.asarray(x_bar).astype(x.dtype),)


_cell_statistics.defvjp(_cell_forward, _cell_backward)


def _per_sample(x: Array, grid: int, ddof: int) -> np.ndarray:
    """[grid, grid, 1], 1 / (positions - ddof) of each cell; 0 where that is not positive."""
    counts = np.outer(_sizes(x.shape[1], grid), _sizes(x.shape[2], grid))[..., None] - ddof
    return np.where(counts > 0, 1 / np.maximum(counts, 1), 0).astype(jnp.promote_types(x.dtype, jnp.float32))


def _holders(size: int, grid: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The cells that hold each position of an axis: their first, their second, ...: (cell [size], whether there is)."""
    holding = [[k for k, cell in enumerate(_cells(size, grid)) if cell.start <= i < cell.stop] for i in range(size)]
    return [
        (
            np.array([cells[min(rank, len(cells) - 1)] for cells in holding]),
            np.array([rank < len(cells) for cells in holding]),
        )
        for rank in range(max(map(len, holding)))
    ]


def _cells(size: int, grid: int) -> list[slice]:
    return [slice(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]


def _sizes(size: int, grid: int) -> np.ndarray:
    return np.array([cell.stop - cell.start for cell in _cells(size, grid)])


def _merge(mean: Array, scatter: Array, count: np.ndarray | int, axis: int, grid: int) -> tuple[Array, Array]:
    """Pools groups of `count` samples, known by mean and sum of squared deviations, along one axis.

    Rows first and columns next, with the update of Chan et al.: deviations are from the mean of the group at hand, so
    nothing cancels, and the work is that of one pass in each direction. Windowed reductions of each cell are several
    times slower in XLA, above all their derivative.
    """
    means, scatters = jnp.unstack(mean, axis=axis), jnp.unstack(scatter, axis=axis)
    count = np.asarray(count, mean.dtype)
    out_means, out_scatters = [], []
    for cell in _cells(len(means), grid):
        center = sum(means[cell]) / len(means[cell])
        spread = sum(jnp.square(m - center) for m in means[cell])
        out_means.append(center)
        out_scatters.append(sum(scatters[cell]) + count * spread)
    return jnp.stack(out_means, axis), jnp.stack(out_scatters, axis)
