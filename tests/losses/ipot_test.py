"""`ipot` against the multiplicative algorithm in float64 and exact assignments; `emd_ipot` against its definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from wkd_jax import losses

STUDENT = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
TEACHER = np.array([[1.0, 1.0, 2.0], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
STATIC = ("cost", "beta", "num_iters", "group_size")
emd_ipot = jax.jit(losses.emd_ipot, static_argnames=STATIC)
differentiated = jax.jit(jax.value_and_grad(losses.emd_ipot), static_argnames=STATIC)
ipot = jax.jit(losses.ipot, static_argnames=("beta", "num_iters", "inner_iters"))

METRICS = {"cosine": "cosine", "euclidean": "euclidean", "squared_euclidean": "sqeuclidean"}
rng = np.random.default_rng(0)
LARGE = rng.normal(size=(2, 8, 4))


def oracle(cost, beta, num_iters, inner_iters=1):
    """As published, by products."""
    n, m = cost.shape
    kernel, plan, b = np.exp(-cost / beta), np.ones((n, m)), np.ones(m) / m
    for _ in range(num_iters):
        q = kernel * plan
        for _ in range(inner_iters):
            a = 1 / n / (q @ b)
            b = 1 / m / (q.T @ a)
        plan = a[:, None] * q * b
    return plan


def exact(student, teacher):
    """Earth mover's distance between two sets of equally many, cost 1 - cosine."""
    costs = cdist(student, teacher, "cosine")
    return costs[linear_sum_assignment(costs)].mean()


@pytest.mark.parametrize(
    ("beta", "num_iters", "value"),
    [(1.0, 1, 0.324211), (1.0, 5, 0.155935), (0.5, 5, 0.097086), (0.5, 20, 0.081341)],
)
def test_goldens(beta, num_iters, value):
    np.testing.assert_allclose(emd_ipot(STUDENT, TEACHER, beta=beta, num_iters=num_iters), value, atol=1e-6)


def test_golden_plan():
    plan = ipot(cdist(STUDENT, TEACHER, "cosine"), beta=1.0, num_iters=5)
    np.testing.assert_allclose(plan[0], [0.238249, 0.043955, 0.051534], atol=1e-6)
    assert exact(STUDENT, TEACHER) == pytest.approx(0.0813395, abs=1e-7)
    np.testing.assert_allclose(emd_ipot(STUDENT, TEACHER), 0.0813395, atol=1e-6)  # by the default settings


@pytest.mark.parametrize("inner_iters", [1, 3])
def test_plans(inner_iters):
    costs = rng.random((2, 1, 6, 4))
    plans = ipot(costs, beta=0.4, num_iters=6, inner_iters=inner_iters)
    for cost, plan in zip(costs[:, 0], plans[:, 0], strict=True):
        np.testing.assert_allclose(plan, oracle(cost, 0.4, 6, inner_iters), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(plans.sum(-2), 0.25, rtol=1e-5)


def test_costs_at_which_exp_underflows():
    """exp(-cost / beta) is 0 for every entry, in float64 too. What a row has in common does not change the plan."""
    cost = 3 * rng.random((6, 6))
    plan = ipot(cost + 1000 * np.arange(1, 7)[:, None], beta=1.0, num_iters=20)
    np.testing.assert_allclose(plan, oracle(cost, 1.0, 20), atol=3e-4)


def test_the_plan_is_a_constant():
    gradient = jax.jit(jax.grad(lambda cost: ipot(cost, beta=1.0, num_iters=3)[0, 0]))(jnp.ones((3, 3)))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("cost", METRICS)
def test_distances(cost):
    student, teacher = LARGE
    value, gradient = differentiated(student.astype(np.float32), teacher, cost=cost, beta=0.7, num_iters=4)
    costs = cdist(student, teacher, METRICS[cost])
    plan = oracle(costs, 0.7, 4)
    np.testing.assert_allclose(value, (plan * costs).sum(), rtol=1e-5)
    step = 1e-6  # the plan stays as it is
    for i, d in ((0, 1), (5, 2)):
        moved = student.copy()
        moved[i, d] += step
        slope = (plan * (cdist(moved, teacher, METRICS[cost]) - costs)).sum() / step
        np.testing.assert_allclose(gradient[i, d], slope, rtol=1e-3, atol=1e-6)


def test_converged_it_is_the_exact_distance_with_its_gradient():
    """Around an assignment that does not change, the total derivative is that of the costs alone."""
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x) for x in LARGE)
        loss = jax.jit(lambda s: losses.emd_ipot(s, teacher, beta=0.2, num_iters=400))
        np.testing.assert_allclose(loss(student), exact(*LARGE), rtol=1e-6)
        check_grads(loss, (student,), order=1, modes=["rev"], eps=1e-5)


def test_no_gradient_reaches_the_teacher():
    gradient = jax.jit(jax.grad(lambda t: losses.emd_ipot(STUDENT, t, num_iters=3)))(TEACHER.astype(np.float32))
    np.testing.assert_array_equal(gradient, 0)


def test_groups():
    student, teacher = LARGE.astype(np.float32)
    parts = [emd_ipot(student[i : i + 4], teacher[i : i + 4], num_iters=5) for i in (0, 4)]
    np.testing.assert_allclose(emd_ipot(student, teacher, num_iters=5, group_size=4), np.mean(parts), rtol=1e-5)


def test_masked_equals_dropped():
    where = np.array([1, 0, 1, 1, 0, 0, 0, 0], bool)
    student, teacher = LARGE.astype(np.float32)
    kept = differentiated(student[where], teacher[where], num_iters=5)
    student[~where], teacher[~where] = np.nan, np.inf  # whatever it is
    for group_size in (None, 4):  # the second group of four is empty
        value, gradient = differentiated(student, teacher, num_iters=5, where=where, group_size=group_size)
        np.testing.assert_allclose(value, kept[0], rtol=1e-5)
        np.testing.assert_allclose(gradient[where], kept[1], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(gradient[~where], 0)
    value, gradient = differentiated(student, teacher, num_iters=5, where=np.zeros(8, bool), group_size=4)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_sets_have_no_order():
    student, teacher = LARGE
    value = emd_ipot(student, teacher, num_iters=5)
    np.testing.assert_allclose(emd_ipot(student[::-1], teacher[rng.permutation(8)], num_iters=5), value, rtol=1e-5)


@pytest.mark.parametrize("cost", ["cosine", "euclidean"])
def test_degenerate_features(cost):
    loss = functools.partial(differentiated, cost=cost, num_iters=20)
    zero, equal = np.zeros((3, 3), np.float32), TEACHER.astype(np.float32)
    for student, teacher in ((zero, equal), (equal, zero), (zero, zero), (equal, equal)):
        value, gradient = loss(student, teacher)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
    assert loss(equal, equal)[0] < 1e-3


def test_a_batch_of_one_pairs_its_example():
    value, gradient = differentiated(np.array([[0.0, 4.0]], np.float32), np.array([[3.0, 0.0]]), cost="euclidean")
    np.testing.assert_allclose(value, 5.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.6, 0.8]], rtol=1e-6)


def test_bfloat16_is_computed_in_float32():
    student, teacher = jnp.asarray(LARGE, jnp.bfloat16)
    value = emd_ipot(student, teacher, num_iters=5)
    assert value.dtype == jnp.float32
    costs = cdist(np.asarray(student, np.float64), np.asarray(teacher, np.float64), "cosine")
    np.testing.assert_allclose(value, (oracle(costs, 1.0, 5) * costs).sum(), rtol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_are_in_full_float32(platform):
    traced = differentiated.trace(jnp.ones((4, 3)), jnp.ones((4, 3)), num_iters=2)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot" in line]
    assert products
    for line in products:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", line), line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": "l1"}, "cost='l1': valid are cosine, euclidean, squared_euclidean"),
        ({"beta": 0.0}, "beta=0.0: must be above 0"),
        ({"num_iters": 0}, "num_iters=0: must be at least 1"),
        ({"group_size": 2}, "group_size=2: must be at least 1 and divide the 3"),
        ({"group_size": 0}, "group_size=0"),
        ({"where": np.ones(2, bool)}, r"where must be bool of shape \(3,\)"),
        ({"teacher": TEACHER[:, :2]}, r"\(3, 3\) and \(3, 2\)"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        losses.emd_ipot(**{"student": STUDENT, "teacher": TEACHER, **changes})


def test_errors_of_the_solver():
    with pytest.raises(ValueError, match="inner_iters=0"):
        losses.ipot(np.ones((2, 2)), beta=1.0, num_iters=1, inner_iters=0)
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        losses.ipot(np.ones(2), beta=1.0, num_iters=1)
