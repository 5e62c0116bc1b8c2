"""Distances between distributions fitted to feature maps: what WKD-F, `wkd_feature`, is compared with.

The positions of one map are the samples, m of them, and moments are divided by m. Of each pair the teacher's
distribution comes first: KL is KL(teacher || student). Separable forms take channels as independent. Lv et al.,
NeurIPS 2024, arXiv 2412.08139, whose text names the forms; their code has none of them but `wkd_feature`.

Inputs are maps [B, H, W, D] or tokens [B, N, D] of any float dtype, computed in float32 (float64 stays); the student's
D has been brought to the teacher's by a connector. The teacher is a constant. Nothing here is averaged over the batch.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wkd_jax.losses.feature import widened
from wkd_jax.losses.sinkhorn import sinkhorn

Array = jax.Array

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def feature_gaussian_w2_full(student: Array, teacher: Array) -> tuple[Array, Array]:
    r"""Squared 2-Wasserstein distance between Gaussians with full covariances, in its two parts.

    W2^2 = |mean_s - mean_t|^2 + tr S + tr T - 2 tr (T^1/2 S T^1/2)^1/2. With the covariances as S = A^T A and
    T = B^T B, where A and B are the centred maps over sqrt(m), the last trace is the nuclear norm of A B^T, which is
    m x m: no D x D matrix is made, and no root of one. From its singular vectors U, V the three traces are summed as
    |U^T A - V^T B|_F^2, in which nothing cancels where the two maps are alike. The same distance with diagonal
    covariances is `wkd_feature`; that of moments that are already at hand is `gaussian_w2`.

    Null space: directions without overlap (singular values of at most 4 units of the largest one's precision) are not
    transported onto each other, so that rank-deficient and equal maps have finite gradients. Only first-order reverse
    derivatives are defined.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: [B, H', W', D] or [B, N', D]; positions need not match. No gradient.

    Returns:
      (mean_term, cov_term), each [B], feature units squared, not divided by D. Memory: two m x m arrays an example, so
      late layers (49 positions) are cheap and early ones are not.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [2.0, 2.0]])[None]  # two positions, two channels that move together
      >>> mean_term, cov_term = feature_gaussian_w2_full(3 * x + 1, x)
      >>> print(mean_term.round(4), cov_term.round(4))
      [18.] [8.]

    References:
      Lv et al., arXiv 2412.08139, section 3.2 and its ablation.
    """
    student, teacher = _positions(student, teacher)
    mean_s, A = _moments(student)
    mean_t, B = _moments(teacher)
    m = max(A.shape[1], B.shape[1])
    A, B = (jnp.pad(x, ((0, 0), (0, m - x.shape[1]), (0, 0))) for x in (A, B))  # rows of zeros add nothing to A^T A
    U, sigma, Vt = lax.stop_gradient(jnp.linalg.svd(_matmul(A, jnp.swapaxes(B, 1, 2))))
    UA, VB = _matmul(jnp.swapaxes(U, 1, 2), A), _matmul(Vt, B)
    # U V^T is the best rotation of B's rows onto A's, so that the derivative through it vanishes.
    overlap = sigma > 4 * np.finfo(sigma.dtype).eps * sigma[:, :1]
    distance = jnp.where(overlap[..., None], jnp.square(UA - VB), jnp.square(UA) + jnp.square(VB))
    return jnp.square(mean_s - mean_t).sum(-1), distance.sum((1, 2))


def feature_gaussian_kl(student: Array, teacher: Array, *, eps: float = 1e-5, symmetric: bool = False) -> Array:
    """KL between Gaussians with diagonal covariances: 1/2 sum_d [log(v_s / v_t) + (v_t + d^2) / v_s - 1].

    Here d is the difference of the means and v = variance + eps.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: [B, H', W', D] or [B, N', D]; positions need not match. No gradient.
      eps: Added to both variances, positive, in feature units squared. Where the student's channel is dead, a
        difference of the means costs d^2 / (2 eps).
      symmetric: Whether to add KL(student || teacher). The sum, not its half.

    Returns:
      [B], nats, summed over channels.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or eps is not positive.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]]])  # mean 1, variance 1
      >>> print(feature_gaussian_kl(x + 2, x).round(3), feature_gaussian_kl(x + 2, x, symmetric=True).round(3))
      [2.] [4.]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F.
    """
    student, teacher = _positions(student, teacher, eps=eps)
    (mean_s, var_s), (mean_t, var_t) = ((x.mean(1), x.var(1) + eps) for x in (student, teacher))
    log_ratio, shift = jnp.log(var_t / var_s), jnp.square(mean_s - mean_t)
    divergence = jnp.expm1(log_ratio) - log_ratio + shift / var_s
    if symmetric:
        divergence += jnp.expm1(-log_ratio) + log_ratio + shift / var_t
    return divergence.sum(-1) / 2


def feature_gaussian_kl_full(student: Array, teacher: Array, *, ridge: float = 1e-2, symmetric: bool = False) -> Array:
    """KL between Gaussians with full covariances: 1/2 [tr(S^-1 T) + d^T S^-1 d - D + log det S - log det T].

    Here d is the difference of the means, and S and T are the covariances plus ridge * I, without which they have no
    inverse: m positions span at most m - 1 of the D directions. That structure is used: everything is worked out in
    m x m matrices (Woodbury's identity and its determinant), and the quadratic forms as residuals of ridge regression,
    in which nothing cancels. No D x D matrix is made.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: [B, H', W', D] or [B, N', D]; positions need not match. No gradient.
      ridge: Positive, in feature units squared. Directions that the student does not span cost 1 / (2 ridge) times what
        the teacher has there, which dominates the value. In float32 it must stay above 1e-6 of the largest eigenvalue
        of either covariance, or the result is NaN.
      symmetric: Whether to add KL(student || teacher). The sum, not its half.

    Returns:
      [B], nats. Memory: a few m x m arrays and one of the map's size an example.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or ridge is not positive.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [2.0, 2.0]])[None]
      >>> print(feature_gaussian_kl_full(x + 1, x, ridge=1.0).round(4))  # |d|^2 = 2 along a variance of 2 + 1
      [0.3333]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F.
    """
    student, teacher = _positions(student, teacher, ridge=ridge)
    p, q = _moments(teacher), _moments(student)
    divergence = _gaussian_kl(p, q, ridge)
    return divergence + _gaussian_kl(q, p, ridge) if symmetric else divergence


def feature_laplace_kl(student: Array, teacher: Array, *, eps: float = 1e-5) -> Array:
    """KL between separable Laplace distributions: sum_d [log(b_s / b_t) + (b_t exp(-|d| / b_t) + |d|) / b_s - 1].

    The location is the mean and d the difference of the two; the scale b is the mean absolute deviation + eps.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: [B, H', W', D] or [B, N', D]; positions need not match. No gradient.
      eps: Added to both scales, positive, in feature units.

    Returns:
      [B], nats, summed over channels.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or eps is not positive.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]]])  # mean 1, scale 1
      >>> print(feature_laplace_kl(x + 2, x).round(2))  # exp(-2) + 2 - 1
      [1.14]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F.
    """
    student, teacher = _positions(student, teacher, eps=eps)
    (mean_s, scale_s), (mean_t, scale_t) = (
        (mean[:, 0], _abs(x - mean).mean(1) + eps)
        for x, mean in ((x, x.mean(1, keepdims=True)) for x in (student, teacher))
    )
    log_ratio, shift = jnp.log(scale_t / scale_s), _abs(mean_s - mean_t)
    overshoot = (scale_t * jnp.expm1(-shift / scale_t) + shift) / scale_s
    return (jnp.expm1(log_ratio) - log_ratio + overshoot).sum(-1)


def feature_exponential_kl(student: Array, teacher: Array, *, eps: float = 1e-5) -> Array:
    """KL between separable exponential distributions: sum_d [log(mu_s / mu_t) + mu_t / mu_s - 1].

    mu is the mean + eps, the inverse of the rate. Features must not be negative, as after a ReLU: a channel whose mean
    is below -eps gives NaN.

    Args:
      student: [B, H, W, D] or [B, N, D], non-negative.
      teacher: [B, H', W', D] or [B, N', D], non-negative; positions need not match. No gradient.
      eps: Added to both means, positive, in feature units.

    Returns:
      [B], nats, summed over channels.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or eps is not positive.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]]])  # mean 1
      >>> print(feature_exponential_kl(2 * x, x).round(3))  # log 2 + 1/2 - 1
      [0.193]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F.
    """
    student, teacher = _positions(student, teacher, eps=eps)
    log_ratio = jnp.log((teacher.mean(1) + eps) / (student.mean(1) + eps))
    return (jnp.expm1(log_ratio) - log_ratio).sum(-1)


def feature_sinkhorn(
    student: Array,
    teacher: Array,
    *,
    epsilon: float | Array = 0.05,
    num_iters: int = 50,
    stabilizer: float = 1e-8,
) -> Array:
    """Entropic optimal transport between the positions of two maps: probability mass functions of joint features.

    Every position is an atom of mass 1 / m. The cost of a pair is its squared distance over channels, divided by the
    largest of the example, a constant, so that `epsilon` means the same for every map.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: [B, H', W', D] or [B, N', D]; positions need not match. No gradient.
      epsilon: Regularizer, in units of the largest cost.
      num_iters: Sinkhorn iterations; the gradient is that of exactly so many.
      stabilizer: Added to the denominators of the updates, see `sinkhorn`.

    Returns:
      [B], transport cost in units of the largest cost, from 0 to 1; above 0 for equal maps too, since entropy spreads
      the plan. Memory: m x m' arrays, a few an example.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or an option is out of `sinkhorn`'s range.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]]])
      >>> print(feature_sinkhorn(x + 1, x).round(4))  # costs 1, 1 and 9 over 9; one from each to its own
      [0.1111]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F (which names probability mass functions, not their form).
    """
    student, teacher = _positions(student, teacher)
    origin = teacher.mean(1, keepdims=True)
    student, teacher = student - origin, teacher - origin  # or the squares below would cancel at a large offset
    norms = jnp.square(student).sum(-1)[:, :, None] + jnp.square(teacher).sum(-1)[:, None]
    cost = norms - 2 * _matmul(student, jnp.swapaxes(teacher, 1, 2))
    largest = lax.stop_gradient(cost.max((1, 2), keepdims=True))
    a, b = (jnp.full(m, 1 / m, cost.dtype) for m in cost.shape[1:])
    solve = functools.partial(sinkhorn, a, b, epsilon=epsilon, num_iters=num_iters, stabilizer=stabilizer)
    return jax.vmap(lambda cost: solve(cost).cost)(cost / jnp.where(largest > 0, largest, 1))


def feature_histogram_w1(
    student: Array, teacher: Array, *, bins: int = 16, limits: tuple[float, float] | None = None
) -> Array:
    """1-Wasserstein distance between the histograms of each channel: bin width times sum |CDF_s - CDF_t|.

    Bins are triangular, which gives a gradient: a value between the centres of two bins is shared between them in
    proportion to its nearness; one beyond the outermost centres belongs to the outermost bin, without gradient.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: [B, H', W', D] or [B, N', D]; positions need not match. No gradient.
      bins: At least 2.
      limits: Outer edges of the outermost bins, shared by all channels. None: for each example and channel the centres
        run from the smallest to the largest value of both maps, constants.

    Returns:
      [B], feature units (not squared), summed over channels. Memory: `bins` values a channel, beside the maps.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B and D, or bins or limits are out of range.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]]])
      >>> print(feature_histogram_w1(x + 1, x))  # every value moves by 1
      [1.]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F (which names probability mass functions, not their form).
    """
    student, teacher = _positions(student, teacher)
    if bins < 2:
        raise ValueError(f"bins={bins}: must be at least 2")
    if limits is None:
        lowest = lax.stop_gradient(jnp.minimum(student.min(1, keepdims=True), teacher.min(1, keepdims=True)))
        highest = lax.stop_gradient(jnp.maximum(student.max(1, keepdims=True), teacher.max(1, keepdims=True)))
        width = (highest - lowest) / (bins - 1)
    else:
        low, high = limits
        if not low < high:
            raise ValueError(f"limits={limits}: the first must be below the second")
        width = jnp.asarray((high - low) / bins, student.dtype)
        lowest = low + width / 2
    step = jnp.where(width > 0, width, 1)

    @jax.checkpoint  # or every bin would keep flags of the map's size for the derivative
    def gap(k: Array) -> Array:
        """|CDF_s - CDF_t| [B, 1, D] after k bins, which hold clip(k - z, 0, 1) of a value z steps from the first."""
        cdf_s, cdf_t = (jnp.clip(k - (x - lowest) / step, 0, 1).mean(1, keepdims=True) for x in (student, teacher))
        return _abs(cdf_s - cdf_t)

    gaps = lax.map(gap, jnp.arange(1, bins, dtype=student.dtype))
    total: Array = (width * gaps.sum(0)).sum((1, 2))
    return total


def feature_sorted_w2(student: Array, teacher: Array) -> Array:
    """Squared 2-Wasserstein distance between the values of each channel: in one dimension, the sorted ones are paired.

    Exact, without bins or a regularizer. Equal values are in the order of their positions.

    Args:
      student: [B, H, W, D] or [B, N, D].
      teacher: The same number of positions, in any layout. No gradient.

    Returns:
      [B], feature units squared: averaged over positions, summed over channels.

    Raises:
      ValueError: If the arrays are not maps or tokens of one B, D and number of positions.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]]])
      >>> print(feature_sorted_w2(x[:, ::-1] + 1, x))  # every value moves by 1, wherever it is
      [1.]

    References:
      Lv et al., arXiv 2412.08139, the ablation of WKD-F (which names probability mass functions, not their form).
    """
    student, teacher = _positions(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have as many positions, got {student.shape[1]} and {teacher.shape[1]}; a "
            "connector that resizes makes them equal, or take feature_histogram_w1"
        )
    return jnp.square(jnp.sort(student, axis=1) - jnp.sort(teacher, axis=1)).mean(1).sum(-1)


def _positions(student: Array, teacher: Array, **positive: float) -> list[Array]:
    """Checks shapes and options; both sides as [B, m, D] in float32 or wider, the teacher's without gradient."""
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: must be above 0")
    shapes = {"student": jnp.shape(student), "teacher": jnp.shape(teacher)}
    for name, shape in shapes.items():
        if len(shape) not in (3, 4) or 0 in shape:
            raise ValueError(f"{name} must be a map [B, H, W, D] or tokens [B, N, D], got {shape}")
    (batch, *_, channels), other = shapes["student"], shapes["teacher"]
    if (batch, channels) != (other[0], other[-1]):
        raise ValueError(
            f"student {shapes['student']} and teacher {other} must agree in B and D; a connector maps the channels"
        )
    flat = (jnp.reshape(x, (batch, math.prod(jnp.shape(x)[1:-1]), channels)) for x in (student, teacher))
    student, teacher = widened(*flat)
    return [student, lax.stop_gradient(teacher)]


def _abs(x: Array) -> Array:
    """|x| with derivative 0 at 0, where JAX takes 1: equal maps are a minimum."""
    return x * lax.stop_gradient(jnp.sign(x))


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean [B, D], and A [B, m, D] with A^T A the covariance: the centred positions over sqrt(m)."""
    mean = x.mean(1, keepdims=True)
    return mean[:, 0], (x - mean) / math.sqrt(x.shape[1])


def _gaussian_kl(p: tuple[Array, Array], q: tuple[Array, Array], ridge: float) -> Array:
    """KL(p || q), [B], of Gaussians given as (mean, A) with covariances A^T A + ridge * I."""
    (mean_p, B), (mean_q, A) = p, q
    (root_q, log_det_q), (_, log_det_p) = _cholesky(A, ridge), _cholesky(B, ridge)
    B = jnp.concatenate([B, (mean_p - mean_q)[:, None]], axis=1)  # the difference of means is one more direction
    solve = functools.partial(lax.linalg.triangular_solve, root_q, left_side=True, lower=True)
    Z = solve(solve(_matmul(A, jnp.swapaxes(B, 1, 2))), transpose_a=True)  # ridge regression of B's rows on A's
    residual = B - _matmul(jnp.swapaxes(Z, 1, 2), A)
    quadratic = jnp.square(residual).sum((1, 2)) / ridge + jnp.square(Z).sum((1, 2))
    # tr (A^T A + ridge I)^-1 ridge = D - m + ridge tr (A A^T + ridge I)^-1, and log det differs likewise.
    m = A.shape[1]
    inverse = solve(jnp.broadcast_to(jnp.eye(m, dtype=A.dtype), (A.shape[0], m, m)))
    return (quadratic - m + ridge * jnp.square(inverse).sum((1, 2)) + log_det_q - log_det_p) / 2


def _cholesky(A: Array, ridge: float) -> tuple[Array, Array]:
    """L with L L^T = A A^T + ridge * I, and log det (I + A^T A / ridge)."""
    m = A.shape[1]
    root = jnp.linalg.cholesky(_matmul(A, jnp.swapaxes(A, 1, 2)) + ridge * jnp.eye(m, dtype=A.dtype))
    return root, 2 * jnp.log(jnp.diagonal(root, axis1=1, axis2=2)).sum(-1) - m * math.log(ridge)
