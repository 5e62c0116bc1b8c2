"""`minibatch_hsic` and `minibatch_cka` against their goldens, the U-statistic, and the formula in float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wkd_jax.losses import minibatch_cka, minibatch_hsic

FUNCTIONS = hsic, cka = jax.jit(minibatch_hsic), jax.jit(minibatch_cka)
with_gradient = jax.jit(jax.value_and_grad(minibatch_cka))
X = np.sin(0.37 * np.arange(24)).reshape(6, 4)
Y = np.cos(0.23 * np.arange(30)).reshape(6, 5)


def oracle(x, y):
    n = len(x)
    k, l = (z @ z.T * (1 - np.eye(n)) for z in (x.reshape(n, -1), y.reshape(n, -1)))  # noqa: E741
    cross = 2 / (n - 2) * (k @ l).sum()
    return (np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - cross) / (n * (n - 3))


def test_goldens():
    np.testing.assert_allclose(hsic(X, Y), 3.142781, atol=1e-6)
    np.testing.assert_allclose(cka(X, Y), 0.638937, atol=1e-6)


def test_is_the_u_statistic():
    """The mean over all quadruples of different examples of k_ij (l_ij + l_qr - 2 l_iq)."""
    k, l = X @ X.T, Y @ Y.T  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    np.testing.assert_allclose(hsic(X, Y), np.mean(terms), rtol=1e-5)


def test_maps_and_properties():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3, 3, 4)), rng.normal(size=(9, 2, 2, 7))
    np.testing.assert_allclose(hsic(x, y), oracle(x, y), rtol=1e-4)
    expected = oracle(x, y) / np.sqrt(oracle(x, x) * oracle(y, y))
    np.testing.assert_allclose(cka(x, y), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cka(y, x), expected, rtol=1e-4, atol=1e-6)
    order = rng.permutation(9)
    np.testing.assert_allclose(cka(x[order], y[order]), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cka(x, -3 * x + 100), 1, rtol=1e-5)  # float32: the offset has to cancel
    assert abs(float(cka(x * 1e6, y * 1e6)) - expected) < 1e-5


def test_masked_equals_dropped():
    where = np.array([True, False, True, True, True, False])
    x = np.where(where[:, None], X, np.nan)
    np.testing.assert_allclose(hsic(x, Y, where=where), oracle(X[where], Y[where]), rtol=1e-4)
    value, gradient = with_gradient(x, Y, where=where)
    expected, expected_gradient = with_gradient(X[where], Y[where])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[where], expected_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradient[~where], 0)
    few = where & (np.arange(6) > 0)  # three are left
    assert hsic(x, Y, where=few) == 0
    value, gradient = with_gradient(x, Y, where=few)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_gradients_reach_both_sides():
    with jax.enable_x64(True):
        x, y = jnp.asarray(X), jnp.asarray(Y)
        np.testing.assert_allclose(hsic(x, y), oracle(X, Y), rtol=1e-12)
        for function in FUNCTIONS:
            check_grads(function, (x, y), order=1, modes=["rev"])


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_features_that_do_not_vary(constant):
    value, gradient = with_gradient(np.full(X.shape, constant), Y, where=np.ones(6, bool))
    assert value == 0
    assert np.isfinite(gradient).all()


def test_bfloat16_is_computed_in_float32():
    x, y = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16)
    value = cka(x, y)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, cka(x.astype(jnp.float32), y.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("x", "y", "where", "message"),
    [
        (X[:3], Y[:3], None, r"at least 4, got \(3, 4\) and \(3, 5\)"),
        (X, Y[:5], None, r"got \(6, 4\) and \(5, 5\)"),
        (X[:, 0], Y, None, r"got \(6,\) and"),
        (X, Y, np.ones(5, bool), r"where must be bool of shape \(6,\), got bool \(5,\)"),
    ],
)
def test_errors(x, y, where, message):
    for function in (minibatch_hsic, minibatch_cka):
        with pytest.raises(ValueError, match=message):
            function(x, y, where=where)
