"""Values against float64 NumPy and an exact linear program, derivatives against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from wkd_jax.losses.sinkhorn import sinkhorn as eager_sinkhorn

STATIC = ("num_iters", "gradient", "threshold", "stabilizer", "return_plan")
sinkhorn = jax.jit(eager_sinkhorn, static_argnames=STATIC)  # one compilation instead of one an operation
MODES = ("unrolled", "implicit", "envelope")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def problem(rows=5, columns=4, batch=(3,), seed=0, scale=2.0):
    """(a, b, cost) in float64, random."""
    rng = np.random.default_rng(seed)
    a, b = (softmax(scale * rng.standard_normal((*batch, n))) for n in (rows, columns))
    return a, b, rng.uniform(size=(rows, columns))


def oracle(a, b, cost, epsilon, num_iters, stabilizer=0.0):
    """Plan of one example, from the formula."""
    kernel = np.exp(-cost / epsilon)
    u = np.full(len(a), 1 / len(a))
    for _ in range(num_iters):
        v = b / (kernel.T @ u + stabilizer)
        u = a / (kernel @ v + stabilizer)
    return u[:, None] * kernel * v[None, :]


# --- values


@pytest.mark.parametrize("stabilizer", [0.0, 1e-3])
def test_value_plan_and_error_are_those_of_the_formula(stabilizer):
    a, b, cost = problem()
    plans = np.stack([oracle(*pair, cost, 0.1, 10, stabilizer) for pair in zip(a, b, strict=True)])
    out = sinkhorn(a, b, cost, epsilon=0.1, num_iters=10, stabilizer=stabilizer, return_plan=True)
    # rtol: float32 rounding, amplified over ten updates
    np.testing.assert_allclose(out.plan, plans, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.cost, (plans * cost).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(out.error, np.abs(plans.sum(1) - b).sum(-1), rtol=1e-4, atol=1e-6)
    assert sinkhorn(a, b, cost, epsilon=0.1, num_iters=10).plan is None


def test_row_marginal_is_exact_and_column_marginal_is_not_after_few_iterations():
    a, b, cost = problem()
    out = sinkhorn(a, b, cost, epsilon=0.05, num_iters=2, return_plan=True)
    np.testing.assert_allclose(out.plan.sum(2), a, rtol=1e-6)
    assert out.error.min() > 1e-3


def test_converged_cost_tends_to_the_linear_program_within_the_entropic_gap(x64):
    a, b, cost = problem(batch=())
    rows, columns = cost.shape
    sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    exact = scipy.optimize.linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([a, b])).fun
    gaps, values = [], []
    for epsilon in (0.1, 0.03, 0.01):
        options = {"epsilon": epsilon, "num_iters": 20000, "threshold": 1e-10}
        out = sinkhorn(a, b, cost, gradient="implicit", **options)
        assert out.error < 1e-9
        gaps.append(float(out.cost) - exact)
        values.append(float(sinkhorn(a, b, cost, gradient="envelope", **options).cost) - exact)
        # The entropic plan beats the exact one in cost + epsilon * KL, and KL is between 0 and the entropy of a.
        entropy = -(a * np.log(a)).sum()
        assert -1e-9 < gaps[-1] < values[-1] < epsilon * entropy
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 2e-3
    assert values[0] > values[1] > values[2]


def test_envelope_value_is_transport_plus_kl(x64):
    a, b, cost = problem()
    plain = sinkhorn(a, b, cost, epsilon=0.2, num_iters=500, gradient="implicit", return_plan=True)
    independent = a[:, :, None] * b[:, None, :]
    kl = (plain.plan * np.log(plain.plan / independent)).sum((1, 2))
    entropic = sinkhorn(a, b, cost, epsilon=0.2, num_iters=500, gradient="envelope").cost
    np.testing.assert_allclose(entropic, plain.cost + 0.2 * kl, rtol=1e-9)


def test_bfloat16_inputs_are_computed_in_float32():
    a, b, cost = (jnp.asarray(x, jnp.bfloat16) for x in problem())
    out = sinkhorn(a, b, cost, epsilon=0.1, num_iters=10)
    wide = sinkhorn(*(x.astype(jnp.float32) for x in (a, b, cost)), epsilon=0.1, num_iters=10)
    assert out.cost.dtype == jnp.float32
    np.testing.assert_array_equal(out.cost, wide.cost)


@pytest.mark.parametrize("mode", MODES)
def test_products_never_drop_below_float32(mode):
    """TF32 and bfloat16 products are what GPUs and TPUs choose unless told otherwise."""
    a, b, cost = problem()

    def total(a, b, cost):
        return sinkhorn(a, b, cost, epsilon=0.1, num_iters=3, gradient=mode, stabilizer=1e-8).cost.sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(a, b, cost))
    assert jaxpr.count("dot_general[") > 4
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == jaxpr.count("dot_general[")


# --- derivatives


@pytest.mark.parametrize("stabilizer", [0.0, 1e-2])
@pytest.mark.parametrize("mode", MODES)
def test_derivative_in_a_b_cost_and_epsilon_against_finite_differences(x64, mode, stabilizer):
    a, b, cost = problem(batch=(2,))
    num_iters = 6 if mode == "unrolled" else 2000
    # A pure solve has a fixed point only where masses are balanced: go through a softmax. A stabilized one has always.
    balanced = mode != "unrolled" and stabilizer == 0

    def value(a, b, cost, epsilon):
        if balanced:
            a, b = jax.nn.softmax(a), jax.nn.softmax(b)
        out = sinkhorn(a, b, cost, epsilon=epsilon, num_iters=num_iters, gradient=mode, stabilizer=stabilizer)
        return (out.cost * jnp.array([1.0, -3.0])).sum()

    check_grads(jax.jit(value), (a, b, cost, 0.3), order=1, modes=["rev"], eps=1e-5, atol=1e-6, rtol=1e-6)


def test_wrong_derivatives_would_be_seen(x64):
    """Few iterations are not a fixed point: the implicit derivative must then fail the check above."""
    a, b, cost = problem(batch=(2,))

    def value(cost):
        return sinkhorn(a, b, cost, epsilon=0.05, num_iters=2, gradient="implicit").cost.sum()

    with pytest.raises(AssertionError):
        check_grads(jax.jit(value), (cost,), order=1, modes=["rev"], eps=1e-5, atol=1e-6, rtol=1e-6)


def test_converged_unrolled_and_implicit_derivatives_agree_in_float32():
    a, b, cost = (jnp.asarray(x, jnp.float32) for x in problem(rows=20, columns=20))

    def of_logits(logits, mode):
        out = sinkhorn(jax.nn.softmax(logits), b, cost, epsilon=0.1, num_iters=300, gradient=mode, stabilizer=1e-8)
        return out.cost.sum()

    unrolled, implicit = (
        jax.jit(jax.grad(of_logits), static_argnums=1)(jnp.log(a), mode) for mode in ("unrolled", "implicit")
    )
    np.testing.assert_allclose(implicit, unrolled, atol=2e-4 * float(jnp.abs(unrolled).max()))


@pytest.mark.parametrize("mode", MODES)
def test_derivative_at_zero_mass_is_the_limit(x64, mode):
    """A class without mass is where ott's own derivatives are not finite."""
    a, b, cost = problem(rows=4, columns=4, batch=())
    a[1], b[2] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()

    def value(a, b):
        return sinkhorn(a, b, cost, epsilon=0.2, num_iters=300, gradient=mode, stabilizer=1e-3).cost

    grad = jax.jit(jax.grad(value, argnums=(0, 1)))
    at_zero = grad(a, b)
    nearby = grad(a.clip(1e-9), b.clip(1e-9))
    for zero, near in zip(at_zero, nearby, strict=True):
        assert np.isfinite(zero).all()
        np.testing.assert_allclose(zero, near, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_error_and_plan_carry_no_gradient(mode):
    a, b, cost = problem()

    def health(a, b, cost):
        out = sinkhorn(a, b, cost, epsilon=0.1, num_iters=3, gradient=mode, return_plan=True)
        return out.error.sum() + out.plan[..., 0].sum()

    for gradient in jax.jit(jax.grad(health, argnums=(0, 1, 2)))(a, b, cost):
        assert not gradient.any()


# --- masks, batches, transformations


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_masked_equals_dropped(x64, mode):
    logits, b, cost = problem(rows=6, columns=6, batch=(2,))
    keep = np.array([True, False, True, True, False, True])
    solve = functools.partial(sinkhorn, epsilon=0.1, num_iters=7, gradient=mode, stabilizer=1e-8)

    def masked(logits, b, cost):
        a = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf))
        return solve(a, jnp.where(keep, b, 0), cost, where=keep).cost.sum()

    def dropped(logits, b, cost):
        a = jax.nn.softmax(logits[:, keep])
        return solve(a, b[:, keep], cost[keep][:, keep]).cost.sum()

    arguments = [jnp.asarray(x) for x in (logits, b, cost)]
    values, gradients = zip(
        *(jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*arguments) for f in (masked, dropped)), strict=True
    )
    np.testing.assert_allclose(*values, rtol=1e-12)
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-8)


def test_without_where_a_massless_class_still_shares_in_the_start(x64):
    """What `where` is for: the start decides the result of few iterations."""
    a, b, cost = problem(rows=4, columns=4, batch=())
    a, b = a * (np.arange(4) > 0), b * (np.arange(4) > 0)
    full = sinkhorn(a, b, cost, epsilon=0.1, num_iters=2).cost
    masked = sinkhorn(a, b, cost, epsilon=0.1, num_iters=2, where=np.arange(4) > 0).cost
    assert abs(full - masked) > 1e-6


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_batch_equals_loop_equals_vmap_and_leading_axes(mode):
    a, b, cost = problem(batch=(2, 3))
    solve = functools.partial(sinkhorn, epsilon=0.1, num_iters=8, gradient=mode, stabilizer=1e-8)

    def value_and_grad(a, b):
        out, pull = jax.vjp(lambda a, b: solve(a, b, cost).cost, a, b)
        return out, *pull(jnp.ones_like(out))

    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    batched = jax.jit(value_and_grad)(a, b)
    mapped = jax.jit(jax.vmap(value_and_grad))(a, b)
    single = jax.jit(value_and_grad)(a[1, 2], b[1, 2])
    for one, other, alone in zip(batched, mapped, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(one[1, 2], alone, rtol=2e-5, atol=1e-6)


def test_one_histogram_broadcasts_against_a_batch(x64):
    a, b, cost = problem()
    many = sinkhorn(a, np.broadcast_to(b[0], b.shape), cost, epsilon=0.1, num_iters=5).cost
    one = sinkhorn(a, b[0], cost, epsilon=0.1, num_iters=5).cost
    np.testing.assert_allclose(one, many, rtol=1e-12)


def test_a_cost_of_ones_own_through_vmap():
    a, b, cost = problem()
    costs = np.stack([cost, 2 * cost, 1 - cost])
    solve = functools.partial(sinkhorn, epsilon=0.2, num_iters=5)
    mapped = jax.vmap(lambda *x: solve(*x).cost)(a, b, costs)
    np.testing.assert_allclose(mapped[1], solve(a[1], b[1], costs[1]).cost, rtol=1e-5)


def test_permuting_classes_permutes_the_gradient(x64):
    a, b, cost = problem(rows=5, columns=5)
    order = np.array([3, 0, 4, 1, 2])
    grad = jax.jit(jax.grad(lambda a, b, cost: sinkhorn(a, b, cost, epsilon=0.1, num_iters=6).cost.sum()))
    np.testing.assert_allclose(
        grad(a[:, order], b[:, order], cost[order][:, order]), grad(a, b, cost)[:, order], rtol=1e-9
    )


def test_jit_equals_eager_with_traced_epsilon():
    a, b, cost = problem()
    options = {"epsilon": 0.1, "num_iters": 6, "return_plan": True}
    for eager, jitted in zip(eager_sinkhorn(a, b, cost, **options), sinkhorn(a, b, cost, **options), strict=True):
        np.testing.assert_allclose(eager, jitted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_shard_map_equals_one_device(mode):
    """The cost is replicated: its derivative is the sum over devices."""
    a, b, cost = (jnp.asarray(x, jnp.float32) for x in problem(batch=(8,)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"epsilon": 0.3, "num_iters": 50, "gradient": mode, "stabilizer": 1e-3}
    options["threshold"] = None if mode == "unrolled" else 1e-6

    def local(a, b, cost):
        return sinkhorn(a, b, cost, **options).cost

    def sharded(a, b, cost):
        in_specs = (P("data"), P("data"), P())
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P("data"))(a, b, cost).sum()

    expected = jax.jit(jax.grad(lambda *x: local(*x).sum(), argnums=(0, 1, 2)))(a, b, cost)
    gradients = jax.jit(jax.grad(sharded, argnums=(0, 1, 2)))(a, b, cost)
    for ours, whole in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


# --- stopping, stabilizer, limits


def test_threshold_stops_each_example_by_itself():
    a, b, cost = problem(seed=1)
    solve = functools.partial(sinkhorn, epsilon=0.1, gradient="implicit", threshold=1e-3)
    together, alone = solve(a, b, cost, num_iters=1000), solve(a[1], b[1], cost, num_iters=1000)
    assert (together.error < 1.1e-3).all()
    np.testing.assert_allclose(together.cost[1], alone.cost, rtol=1e-6)
    fixed = sinkhorn(a, b, cost, epsilon=0.1, gradient="implicit", num_iters=1000)
    assert (fixed.error < 1e-5).all()
    assert (together.error > fixed.error).all()  # it did stop


def test_threshold_never_exceeds_num_iters():
    a, b, cost = problem()
    options = {"epsilon": 0.05, "num_iters": 4, "gradient": "implicit"}
    out, fixed = sinkhorn(a, b, cost, threshold=1e-12, **options), sinkhorn(a, b, cost, **options)
    np.testing.assert_allclose(out.cost, fixed.cost, rtol=1e-6)


def test_stabilizer_changes_a_sharp_problem_and_hardly_a_mild_one(x64):
    """Masses that must cross a kernel entry near the stabilizer are where it is felt."""
    cost = 1 - np.exp(-2 * (1 - np.eye(3)))  # sharpness 2: 0 or 0.86
    a, b = np.array([1 - 2e-6, 1e-6, 1e-6]), np.array([1e-6, 1 - 2e-6, 1e-6])
    solve = functools.partial(sinkhorn, a, b, num_iters=10)
    sharp = [float(solve(cost, epsilon=0.05, stabilizer=s).cost) for s in (0.0, 1e-8)]
    mild = [float(solve(cost, epsilon=0.5, stabilizer=s).cost) for s in (0.0, 1e-8)]
    oracles = [(oracle(a, b, cost, 0.05, 10, s) * cost).sum() for s in (0.0, 1e-8)]
    np.testing.assert_allclose(sharp, oracles, rtol=1e-9)
    assert abs(sharp[1] / sharp[0] - 1) > 1e-3
    assert abs(mild[1] / mild[0] - 1) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_underflow_is_finite_and_visible_in_the_error(mode):
    cost = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    mass = jnp.array([0.3, 0.7])

    def value(a):
        out = sinkhorn(a, a[::-1], cost, epsilon=1e-3, num_iters=5, gradient=mode)
        return out.cost, out.error

    (cost_value, error), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(mass)
    assert np.isfinite(cost_value)
    assert np.isfinite(gradient).all()
    assert error > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": "unroled"}, "did you mean 'unrolled'"),
        ({"num_iters": 0}, "num_iters"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": np.ones(3)}, "epsilon"),
        ({"stabilizer": -1.0}, "stabilizer"),
        ({"threshold": 1e-3}, "threshold=None"),
        ({"threshold": 0.0, "gradient": "implicit"}, "threshold"),
        ({"cost": np.ones((4, 5))}, r"\(4, 5\)"),
        ({"b": np.ones((2, 4))}, "broadcast"),
        ({"where": np.ones(3, bool)}, "broadcast"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    a, b, cost = problem()
    arguments = {"a": a, "b": b, "cost": cost, "epsilon": 0.1, "num_iters": 3, **changes}
    with pytest.raises(ValueError, match=message):
        eager_sinkhorn(**arguments)
