"""Entropic optimal transport between rows of histograms that share one ground cost.

The iteration is the kernel scaling of ott-jax (`Sinkhorn.kernel_step` on a `Geometry`). A whole batch shares the
kernel K = exp(-cost / epsilon), so that one update is one [B, C] x [C, C] product and no [B, C, C] array exists. The
derivatives are our own, because those of ott are not finite where a class has no mass and cost several times as much.

Importing this file does not import ott: it loads on the first call, and loads Flax, where Flax is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wkd_jax import registry

Array = jax.Array


class SinkhornOutput(NamedTuple):
    """What `sinkhorn` returns.

    Attributes:
      cost: [...], transport cost of the plan; the entropic cost where `gradient="envelope"`.
      error: [...], L1 distance between the plan's column marginal and b: how far from converged. No gradient.
      plan: [..., C, C'], or None where it was not asked for. No gradient.
    """

    cost: Array
    error: Array
    plan: Array | None


class _Spec(NamedTuple):
    """What does not change within one compilation."""

    gradient: str
    num_iters: int
    threshold: float | None
    stabilizer: float


class _Scaling(NamedTuple):
    """Scalings of the last update: plan = u K v, and u * (K v + stabilizer) = a."""

    u: Array
    v: Array


def sinkhorn(
    a: Array,
    b: Array,
    cost: Array,
    *,
    epsilon: float | Array,
    num_iters: int,
    gradient: str = "unrolled",
    threshold: float | None = None,
    stabilizer: float = 0.0,
    where: Array | None = None,
    return_plan: bool = False,
) -> SinkhornOutput:
    r"""Entropic optimal transport from a (rows of the cost) to b (its columns), batched over leading axes.

    With K = exp(-cost / epsilon) and u uniform at the start, each iteration does
    v = b / (K^T u + stabilizer), u = a / (K v + stabilizer). The plan is diag(u) K diag(v): its row marginal is a, its
    column marginal tends to b, and `error` says how far off it still is.

    `gradient` names what is differentiated, always exactly the derivative of the `cost` that is returned:

    - "unrolled": sum(plan * cost) after exactly `num_iters` iterations, converged or not. Ten are the paper's loss.
    - "implicit": the same value; the derivative is that of the fixed point (with the stabilizer in it), from a linear
      system solved by conjugate gradients. Right only where `error` is small. Memory does not grow with `num_iters`.
    - "envelope": the value is the entropic cost sum(plan * cost) + epsilon * KL(plan | a b^T), of which the potentials
      are the derivative at the fixed point, at no further cost. It is not the transport cost: that one has no such
      derivative, because the potentials maximise the entropic dual alone. Computed from that dual, so its error is of
      second order in what is missing to convergence.

    All modes differentiate with respect to a, b, cost and epsilon, in reverse mode. Masses are taken to be balanced
    (each row of a and of b has the same sum); without a stabilizer the derivatives in a and b are then defined up to
    one constant per row, which a softmax in front removes.

    Args:
      a: [..., C], non-negative masses, any float dtype; computed in float32, or float64 where an input is.
      b: [..., C'], likewise. Leading axes broadcast against those of a.
      cost: [C, C'], the ground cost. Use `jax.vmap` where every example has its own.
      epsilon: Regularizer, in units of the cost, may be traced. Below about max(cost) / 80 the kernel underflows in
        float32; `error` shows it.
      num_iters: Iterations; with a `threshold`, the most there may be.
      gradient: "unrolled", "implicit" or "envelope".
      threshold: If given, an example stops once sum |v (K^T u + stabilizer) - b| is below this: the `error`, but for
        the stabilizer, which keeps `error` itself from reaching zero. Not with "unrolled".
      stabilizer: Added to the denominators of the updates. The paper's code uses 1e-8; 0 is the pure form.
      where: [..., C] bool, rows that take part; the others have neither mass nor a share in the start, which equals
        deleting them. A column is deleted by b = 0 alone. None: all.
      return_plan: Whether to build the plan, C * C' numbers an example.

    Returns:
      `SinkhornOutput` (cost, error, plan).

    Raises:
      ValueError: If shapes do not match, `gradient` is unknown, a number is out of range, or a `threshold` is combined
        with "unrolled". Raised at trace time.

    Example:
      >>> import jax.numpy as jnp
      >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> a, b = jnp.array([[0.5, 0.5]]), jnp.array([[0.25, 0.75]])
      >>> out = sinkhorn(a, b, cost, epsilon=0.1, num_iters=20, return_plan=True)
      >>> print(out.cost.round(3), out.error < 1e-3)
      [0.25] [ True]
      >>> print(out.plan[0].round(2))
      [[0.25 0.25]
       [0.   0.5 ]]

    References:
      Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NeurIPS 2013.
      Lv et al., Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation, arXiv 2412.08139.
    """
    a, b, cost, start = _prepare(a, b, cost, where)
    spec = _Spec(gradient, num_iters, threshold, float(stabilizer))
    _check(spec, epsilon)
    epsilon = jnp.asarray(epsilon, cost.dtype)
    # K and K * cost are made out here, so that the cost and epsilon get their derivative from the kernel's.
    kernel = jnp.exp(-cost / epsilon)
    value, scaling = _transport(spec, *_same_devices(a, b, kernel, kernel * cost, lax.stop_gradient(start)))
    if gradient == "envelope":
        value = epsilon * value
    u, v, kernel, b = lax.stop_gradient((*scaling, kernel, b))
    error = jnp.abs(v * _times(u, kernel, axis=0) - b).sum(-1)
    plan = u[..., :, None] * kernel * v[..., None, :] if return_plan else None
    return SinkhornOutput(value, error, plan)


def _prepare(a: Array, b: Array, cost: Array, where: Array | None) -> tuple[Array, Array, Array, Array]:
    """Checks shapes; returns a, b, cost in one dtype, leading axes broadcast, and the first u."""
    a, b, cost = jnp.asarray(a), jnp.asarray(b), jnp.asarray(cost)
    mask = jnp.asarray(True if where is None else where, bool)
    if cost.ndim != 2 or a.ndim < 1 or b.ndim < 1 or (a.shape[-1], b.shape[-1]) != cost.shape:
        raise ValueError(
            f"sinkhorn wants a [..., C], b [..., C'] and cost [C, C'], got {a.shape}, {b.shape} and {cost.shape}"
        )
    try:
        lead = jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        mask = jnp.broadcast_to(mask, (*lead, a.shape[-1]))
    except ValueError as error:
        raise ValueError(
            f"sinkhorn: leading axes of a {a.shape}, b {b.shape} and where {mask.shape} do not broadcast"
        ) from error
    dtype = jnp.promote_types(jnp.result_type(a, b, cost), jnp.float32)
    a = jnp.where(mask, jnp.broadcast_to(a.astype(dtype), mask.shape), 0)
    b = jnp.broadcast_to(b.astype(dtype), (*lead, b.shape[-1]))
    start = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(dtype)
    return a, b, cost.astype(dtype), start


def _same_devices(*arrays: Array) -> tuple[Array, ...]:
    """Under `shard_map`: makes all differ between devices where one does, so that derivatives of the shared are summed.

    A sum over nothing is zero and carries that property; XLA folds it away.
    """
    zero = sum(x[..., :0].sum() for x in arrays)
    return tuple(x + zero for x in arrays)


def _check(spec: _Spec, epsilon: float | Array) -> None:
    if spec.gradient not in _RULES:
        raise ValueError(registry.unknown("gradient", spec.gradient, _RULES))
    if spec.num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {spec.num_iters}")
    if spec.stabilizer < 0:
        raise ValueError(f"stabilizer must not be negative, got {spec.stabilizer}")
    if np.ndim(epsilon) != 0 or (not isinstance(epsilon, jax.core.Tracer) and not epsilon > 0):
        raise ValueError(f"epsilon must be one positive number, got {epsilon}")
    if spec.threshold is not None and spec.gradient == "unrolled":
        raise ValueError(
            "gradient='unrolled' differentiates a fixed number of iterations: leave threshold=None, "
            "or choose gradient='implicit' or 'envelope'"
        )
    if spec.threshold is not None and not spec.threshold > 0:
        raise ValueError(f"threshold must be positive, got {spec.threshold}")


# --- the iteration ---------------------------------------------------------------------------------------------------


def _times(x: Array, kernel: Array, axis: int) -> Array:
    """K^T x (axis 0) or K x (axis 1) of every row of x [..., n]. Full float32: ten updates amplify TF32 or bfloat16."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)


def _outer(x: Array, y: Array) -> Array:
    """[C, C'], the sum of x_i y_j over all leading axes."""
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(x, y, ((lead, lead), ((), ())), precision=lax.Precision.HIGHEST)


def _reciprocal(x: Array) -> Array:
    """1 / x; 0 where the kernel underflowed to zero, so that what nothing reaches keeps scaling and derivative 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


@functools.cache
def _ott() -> tuple[Any, Any, Any]:
    """(geometry class, problem class, solver module) of ott, loaded on first use."""
    with jax.ensure_compile_time_eval():  # constants that ott makes on import must not belong to the caller's trace
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn as solver

    class SharedKernel(geometry.Geometry):
        """One kernel for a batch, and a stabilizer.

        Scalings and marginals carry a leading axis of two: (u, u / a) and (a, 1). The ratio is what the derivative
        needs, and it is known here even where a is zero.
        """

        def __init__(self, kernel: Array, stabilizer: float) -> None:
            super().__init__(kernel_matrix=kernel)
            self.stabilizer = stabilizer

        def apply_kernel(self, vec: Array, eps: float | None = None, axis: int = 0) -> Array:
            del eps  # the kernel is made for one
            return _times(vec, self.kernel_matrix, axis)

        def update_scaling(self, scaling: Array, marginal: Array, iteration: Any = None, axis: int = 0) -> Array:
            del iteration  # of a schedule for epsilon, which there is none of
            return marginal * _reciprocal(self.apply_kernel(scaling[0], axis=axis) + self.stabilizer)

    return SharedKernel, linear_problem.LinearProblem, solver


def _updates(spec: _Spec, a: Array, b: Array, kernel: Array) -> Callable[[Array, Array], tuple[Array, Array]]:
    """One Sinkhorn iteration on (u, u / a) [2, ..., C] and (v, v / b) [2, ..., C']: v first, then u."""
    geometry, problem, solver = _ott()
    both = [jnp.stack([mass, jnp.ones_like(mass)]) for mass in (a, b)]
    transport = problem(geometry(kernel, spec.stabilizer), a=both[0], b=both[1])
    step = solver.Sinkhorn(lse_mode=False).kernel_step

    def update(u: Array, v: Array) -> tuple[Array, Array]:
        u, v = step(transport, solver.SinkhornState(potentials=(u, v)), 0).potentials
        return u, v

    return update


def _unroll(length: int) -> int:
    """Updates that are compiled as straight code: half the kernels of a loop, and none waits for a counter."""
    return max(1, min(length, 16))


def _solve(
    spec: _Spec, a: Array, b: Array, kernel: Array, start: Array, *, keep: bool = False
) -> tuple[_Scaling, tuple[Array, Array] | None]:
    """Runs the updates. With `keep`, also returns u / a and v / b of each, [num_iters, ..., C] and [..., C']."""
    update = _updates(spec, a, b, kernel)
    threshold = spec.threshold
    u, v = jnp.stack([start, start]), jnp.stack([jnp.zeros_like(b)] * 2)  # the start has no ratio; none is used

    if threshold is None:

        def body(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
            u, v = update(*carry)
            return (u, v), (u[1], v[1]) if keep else None

        (u, v), ratios = lax.scan(body, (u, v), length=spec.num_iters, unroll=_unroll(spec.num_iters))
        return _Scaling(u[0], v[0]), ratios

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        count, _, _, residual = carry
        return (count < spec.num_iters) & jnp.any(residual >= threshold)

    def improve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, u, v, _ = carry
        next_u, next_v = update(u, v)
        # v * (K^T u + stabilizer) - b; the new v has that denominator, so that no product is spent on the check.
        residual = jnp.abs(v[0] * _reciprocal(next_v[1]) - b).sum(-1)
        done = (residual < threshold)[..., None]  # frozen: an example's result does not depend on its batch
        return count + 1, jnp.where(done, u, next_u), jnp.where(done, v, next_v), residual

    _, u, v, _ = lax.while_loop(unfinished, improve, (jnp.int32(0), u, v, jnp.full_like(b[..., 0], jnp.inf)))
    return _Scaling(u[0], v[0]), None


# --- the derivatives -------------------------------------------------------------------------------------------------
# Each mode is a pair: forward(spec, a, b, kernel, weighted, start) -> (value, scaling), saved, and
# backward(spec, saved, g) -> cotangents of a, b, kernel and weighted = kernel * cost. The [C, C'] ones are single
# products outside the loops, so that XLA drops them where neither cost nor epsilon is differentiated.

_Saved = tuple[Any, ...]
_Forward = tuple[tuple[Array, _Scaling], _Saved]
_Cotangents = tuple[Array, Array, Array, Array]


def _unrolled_forward(spec: _Spec, a: Array, b: Array, kernel: Array, weighted: Array, start: Array) -> _Forward:
    scaling, ratios = _solve(spec, a, b, kernel, start, keep=True)
    lifted = _times(scaling.v, weighted, axis=1)
    return ((scaling.u * lifted).sum(-1), scaling), (a, b, kernel, weighted, start, ratios, lifted)


def _unrolled_backward(spec: _Spec, saved: _Saved, g: Array) -> _Cotangents:
    """Reverse sweep through the updates. With p = u / a = 1 / (K v + s), an update's derivative is -u p, likewise v."""
    a, b, kernel, weighted, start, (p, q), lifted = saved

    def pull(u_bar: Array, v_bar: Array | float, p: Array, q: Array) -> tuple[Array, Array, Array, Array]:
        """Cotangents of an iteration's masses (shares of a and b) and of its two denominators."""
        row_bar = -u_bar * a * p * p
        v_bar = v_bar + _times(row_bar, kernel, axis=0)
        return u_bar * p, v_bar * q, row_bar, -v_bar * b * q * q

    def body(carry: tuple[Array, Array, Array], ratios: tuple[Array, Array]) -> Any:
        a_bar, b_bar, column_bar = carry
        a_part, b_part, row_bar, column_bar = pull(_times(column_bar, kernel, axis=1), 0.0, *ratios)
        return (a_bar + a_part, b_bar + b_part, column_bar), (row_bar, column_bar)

    u_last, v_last = a * p[-1], b * q[-1]
    a_bar, b_bar, row_bar, column_bar = pull(g * lifted, _times(g * u_last, weighted, axis=0), p[-1], q[-1])
    (a_bar, b_bar, _), (rows, columns) = lax.scan(
        body, (a_bar, b_bar, column_bar), (p[:-1], q[:-1]), reverse=True, unroll=_unroll(spec.num_iters - 1)
    )
    rows, columns = jnp.concatenate([rows, row_bar[None]]), jnp.concatenate([columns, column_bar[None]])
    u_before = jnp.concatenate([start[None], a * p[:-1]])
    kernel_bar = _outer(rows, b * q) + _outer(u_before, columns)
    return a_bar, b_bar, kernel_bar, _outer(g * u_last, v_last)


def _implicit_forward(spec: _Spec, a: Array, b: Array, kernel: Array, weighted: Array, start: Array) -> _Forward:
    scaling, _ = _solve(spec, a, b, kernel, start)
    lifted = _times(scaling.v, weighted, axis=1)
    return ((scaling.u * lifted).sum(-1), scaling), (a, kernel, weighted, scaling, lifted)


def _implicit_backward(spec: _Spec, saved: _Saved, g: Array) -> _Cotangents:
    a, kernel, weighted, (u, v), lifted = saved
    solve = functools.partial(_adjoint, kernel=kernel, stabilizer=spec.stabilizer)
    for _ in range(a.ndim - 1):  # one linear system an example, their products still shared
        solve = jax.vmap(solve)
    x, y = solve(a, u, v, lifted, _times(u, weighted, axis=0))
    kernel_bar = -_outer(g * u * x, v) - _outer(g * u, v * y)
    return g * x, g * y, kernel_bar, _outer(g * u, v)


def _adjoint(
    a: Array, u: Array, v: Array, row_cost: Array, column_cost: Array, *, kernel: Array, stabilizer: float
) -> tuple[Array, Array]:
    r"""Derivatives (x, y) in a and b of the transport cost at the fixed point, for one example.

    With P = diag(u) K diag(v), r = u * row_cost and c = v * column_cost, they solve
    [diag(a), P; P^T, diag(b)] [x; y] = [r; c]: the fixed point's equations u (K v + s) = a and v (K^T u + s) = b,
    linearised in log u and log v. y is eliminated, and x = z / sqrt(a) scaled, which leaves I - A A^T with
    A = diag(a)^-1/2 P diag(b)^-1/2: eigenvalues in [0, 1], and (for s = 0) the null vector sqrt(a), a constant moved
    from y to x. That direction is given eigenvalue 1; the stabilizer fixes the constant, as <u, x> = <v, y>.
    """
    p, q = _reciprocal(_times(v, kernel, 1) + stabilizer), _reciprocal(_times(u, kernel, 0) + stabilizer)
    left, right = jnp.sqrt(u * p), jnp.sqrt(v * q)  # sqrt of u / (K v + s), which is u / sqrt(a), zero where a is
    null = jnp.sqrt(a / a.sum())

    def schur(z: Array) -> Array:
        across = right * right * _times(left * z, kernel, axis=0)
        return z - left * _times(across, kernel, axis=1) + null * (null * z).sum()

    def conjugate_gradients(target: Array, guess: Array) -> Array:
        tol = 8 * float(np.finfo(a.dtype).eps)
        solution: Array = jax.scipy.sparse.linalg.cg(schur, target, x0=guess, tol=tol)[0]  # type: ignore[no-untyped-call]
        return solution

    target = left * (row_cost - _times(v * q * column_cost, kernel, axis=1))
    z = conjugate_gradients(target, target)
    if stabilizer:
        shift = conjugate_gradients(null, null)
        weight = left * (1 + _times(v * q, kernel, axis=1))
        z = z + shift * ((v * q * column_cost).sum() - (weight * z).sum()) / (weight * shift).sum()
    # From z once around the two equations, which also gives x where a is zero.
    y = q * (column_cost - _times(left * z, kernel, axis=0))
    x = p * (row_cost - _times(v * y, kernel, axis=1))
    return x, y


def _envelope_forward(spec: _Spec, a: Array, b: Array, kernel: Array, weighted: Array, start: Array) -> _Forward:
    """The entropic dual divided by epsilon; f and g below are the potentials divided by epsilon."""
    scaling, _ = _solve(spec, a, b, kernel, start)
    u, v = scaling
    row, column = _times(v, kernel, axis=1) + spec.stabilizer, _times(u, kernel, axis=0) + spec.stabilizer
    f, g = -jnp.log(jnp.where(row > 0, row, 1)), -jnp.log(jnp.where(column > 0, column, 1))
    a_sum, b_sum = a.sum(-1), b.sum(-1)
    value = (a * f).sum(-1) + (b * g).sum(-1) + (a_sum - 1) * b_sum - spec.stabilizer * u.sum(-1)
    a_bar, b_bar = f + (b_sum - 1)[..., None], g + (a_sum - 1)[..., None]
    return (value, scaling), (a_bar, b_bar, u, b * _reciprocal(column), weighted)


def _envelope_backward(spec: _Spec, saved: _Saved, g: Array) -> _Cotangents:
    a_bar, b_bar, u, v, weighted = saved
    return g * a_bar, g * b_bar, -_outer(g * u, v), jnp.zeros_like(weighted)


_RULES: dict[str, tuple[Callable[..., _Forward], Callable[..., _Cotangents]]] = {
    "unrolled": (_unrolled_forward, _unrolled_backward),
    "implicit": (_implicit_forward, _implicit_backward),
    "envelope": (_envelope_forward, _envelope_backward),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transport(spec: _Spec, a: Array, b: Array, kernel: Array, weighted: Array, start: Array) -> tuple[Array, _Scaling]:
    """Value [...] of the mode that `spec` names, and the final scaling, which carries no derivative."""
    out, _ = _RULES[spec.gradient][0](spec, a, b, kernel, weighted, start)
    return out


def _transport_forward(spec: _Spec, *args: Array) -> _Forward:
    return _RULES[spec.gradient][0](spec, *args)


def _transport_backward(spec: _Spec, saved: _Saved, bar: tuple[Array, _Scaling]) -> tuple[Array, ...]:
    cotangents = _RULES[spec.gradient][1](spec, saved, bar[0][..., None])
    return *cotangents, jnp.zeros_like(cotangents[0])  # the start, of a's shape, is a constant


_transport.defvjp(_transport_forward, _transport_backward)
