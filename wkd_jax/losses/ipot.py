"""Exact optimal transport between two sets by proximal points (IPOT), and distillation by it: EMD+IPOT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from wkd_jax.losses.batch import counted, group_length
from wkd_jax.losses.feature import widened

Array = jax.Array


def ipot(cost: Array, *, beta: float, num_iters: int, inner_iters: int = 1) -> Array:
    """The plan of least cost between the rows and the columns of `cost`, all rows and all columns of equal mass.

    Each of `num_iters` steps starts from the last plan P and does `inner_iters` times

        a = 1 / (N Q b),   b = 1 / (M Q^T a),   with   Q = exp(-cost / beta) * P   at its start,

    then P = diag(a) Q diag(b). The b of one step starts the next; at first P and b are constant. Unlike Sinkhorn's,
    whose regularizer stays, the plan tends to the unregularized one for any `beta`. One of the size of the costs'
    differences is a good choice: a large one makes small steps, and after a far smaller one the few updates of a step
    are not enough. The plan's sums over rows i are 1 / M after every step, those over columns j are 1 / N in the limit.

    It runs on logarithms: exp(-cost / beta), which is 0 in float32 from cost = 104 beta on, is never formed. Since the
    plan after l steps is exp(f_i + g_j - l cost_ij / beta), only the vectors f and g are carried.

    The plan is a constant: no gradient reaches the cost. That of sum(plan * cost), for a plan of least cost, needs none
    (envelope theorem).

    Args:
      cost: [..., N, M], any float dtype; computed in float32, or float64 where it is.
      beta: Proximal step in units of the cost, above 0.
      num_iters: Steps, at least 1.
      inner_iters: Updates of a and b a step, at least 1.

    Returns:
      [..., N, M], of sum 1.

    Raises:
      ValueError: If the cost is no matrix, or a number is out of range.

    Example:
      >>> print(ipot(jnp.array([[0.0, 1.0], [1.0, 0.0]]), beta=0.1, num_iters=5).round(6))
      [[0.5 0. ]
       [0.  0.5]]

    References:
      Xie et al., "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", UAI 2019, arXiv 1802.04307.
    """
    if jnp.ndim(cost) < 2 or 0 in jnp.shape(cost)[-2:]:
        raise ValueError(f"cost must be [..., N, M], neither of them 0; got {jnp.shape(cost)}")
    cost = jnp.asarray(cost)
    rows, columns = (jnp.ones((*cost.shape[:-2], side), bool) for side in cost.shape[-2:])
    return _plan(cost, rows, columns, beta=beta, num_iters=num_iters, inner_iters=inner_iters)


def emd_ipot(
    student: Array,
    teacher: Array,
    *,
    cost: str = "cosine",
    beta: float = 1.0,
    num_iters: int = 50,
    group_size: int | None = None,
    where: Array | None = None,
) -> Array:
    """Earth mover's distance between the features of a batch by the student and those by the teacher.

    sum_ij plan_ij cost_ij, where cost_ij is the distance of the student's feature of example i from the teacher's of
    example j, and the plan is `ipot`'s. All examples have equal mass. Both the teacher and the plan are constants; the
    gradient goes through the cost alone.

    Neither the distance nor the solver's settings of the published method are public: the defaults are ours.

    Args:
      student: [B, D], any float dtype; computed in float32, or float64 where an input is.
      teacher: [B, D].
      cost: "cosine" (1 - cosine; 1 for a zero feature), "euclidean" or "squared_euclidean".
      beta: See `ipot`.
      num_iters: See `ipot`.
      group_size: Transport within groups of that many consecutive examples; None: within the whole batch.
      where: [B] bool, examples that count: the others have no mass on either side, as if they were dropped. None: all.

    Returns:
      Scalar, in units of the cost: the mean over groups, of those that have an example that counts; 0 if none has.

    Raises:
      ValueError: If the shapes do not fit, there is no such cost, or a number is out of range.

    Example:
      >>> student = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
      >>> teacher = jnp.array([[1.0, 1.0, 2.0], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
      >>> print(emd_ipot(student, teacher).round(4))
      0.0813
      >>> print(emd_ipot(student, teacher[::-1]).round(4))  # sets have no order
      0.0813

    References:
      Lohit and Jones, "Model Compression Using Optimal Transport", WACV 2022.
    """
    shape = jnp.shape(student)
    if shape != jnp.shape(teacher) or len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"student and teacher must be of one shape [B, D], got {shape} and {jnp.shape(teacher)}; a linear layer "
            "maps the one to the other"
        )
    if cost not in COSTS:
        raise ValueError(f"cost={cost!r}: valid are {', '.join(COSTS)}")
    size = group_length(group_size, shape[0])
    student, teacher = widened(student, lax.stop_gradient(teacher))
    where = counted(where, shape[:1]).reshape(-1, size)
    # Whatever a masked example holds, be it NaN, stays out of values and gradients.
    student, teacher = (jnp.where(where[..., None], x.reshape(-1, size, shape[1]), 0) for x in (student, teacher))
    costs = COSTS[cost](student, teacher)
    plan = _plan(costs, where, where, beta=beta, num_iters=num_iters, inner_iters=1)
    value = jnp.sum(plan * costs, axis=(1, 2))
    return jnp.sum(value) / jnp.maximum(jnp.sum(where.any(axis=1)), 1)


def _plan(cost: Array, rows: Array, columns: Array, *, beta: float, num_iters: int, inner_iters: int) -> Array:
    """`ipot` between the rows and columns that are True in `rows` [..., N] and `columns` [..., M].

    f and g are the logarithms of what all steps so far have multiplied the rows and columns by. Of the start of a step,
    Q b is then exp(f_i) sum_j exp(g_j + log b_j - l cost_ij / beta), and f cancels in the new f.
    """
    for name, value, lowest in (("num_iters", num_iters, 1), ("inner_iters", inner_iters, 1)):
        if value < lowest:
            raise ValueError(f"{name}={value}: must be at least {lowest}")
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0")
    (cost,) = widened(lax.stop_gradient(cost))
    # What a row has in common goes into its f and changes nothing; without it more digits are left.
    scaled = (jnp.min(cost, axis=-1, keepdims=True) - cost) / beta
    log_rows, log_columns = (
        -jnp.log(jnp.maximum(jnp.sum(x, axis=-1, keepdims=True), 1).astype(cost.dtype)) for x in (rows, columns)
    )

    def step(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, before, g = state  # `before`: g of the last step; `g`: with log b on top
        kernel = number.astype(cost.dtype) * scaled
        for _ in range(inner_iters):
            f = log_rows - _log_sum(kernel + g[..., None, :], columns[..., None, :], axis=-1)
            g = log_columns - _log_sum(kernel + f[..., :, None], rows[..., :, None], axis=-2)
        return f, g, 2 * g - before

    zeros = jnp.zeros_like(cost[..., 0]), jnp.zeros_like(cost[..., 0, :]), jnp.zeros_like(cost[..., 0, :])
    f, g, _ = lax.fori_loop(1, num_iters + 1, step, zeros)
    plan = jnp.exp(f[..., :, None] + g[..., None, :] + num_iters * scaled)
    return jnp.where(rows[..., :, None] & columns[..., None, :], plan, 0)


def _log_sum(x: Array, where: Array, *, axis: int) -> Array:
    """log(sum(exp(x))) of the entries in `where`; 0 if there is none."""
    return jnp.where(where.any(axis), jax.nn.logsumexp(x, axis=axis, where=where), 0)


def _cosine(student: Array, teacher: Array) -> Array:
    return 1 - _products(*(_unit(x) for x in (student, teacher)))


def _unit(x: Array) -> Array:
    """Vectors of length 1; zero stays zero, with a derivative of zero."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    nonzero = squared > 0
    return jnp.where(nonzero, x * lax.rsqrt(jnp.where(nonzero, squared, 1)), 0)


def _squared_euclidean(student: Array, teacher: Array) -> Array:
    """Of rounding's size, rather than 0, between equal vectors."""
    left, right = (jnp.sum(jnp.square(x), axis=-1) for x in (student, teacher))
    return jnp.maximum(left[..., :, None] + right[..., None, :] - 2 * _products(student, teacher), 0)


def _euclidean(student: Array, teacher: Array) -> Array:
    squared = _squared_euclidean(student, teacher)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def _products(student: Array, teacher: Array) -> Array:
    return jnp.einsum("...id,...jd->...ij", student, teacher, precision=lax.Precision.HIGHEST)


COSTS = {"cosine": _cosine, "euclidean": _euclidean, "squared_euclidean": _squared_euclidean}
