"""`gaussian_w2` against float64 NumPy: values, gradients, and every way in which a covariance can be degenerate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wkd_jax.losses.gaussian import gaussian_w2


def bures(cov_s, cov_t):
    """tr S + tr T - 2 tr (T^1/2 S T^1/2)^1/2 in float64, straight from the formula."""
    S, T = np.asarray(cov_s, np.float64), np.asarray(cov_t, np.float64)
    root = _sqrtm(T)
    return np.trace(S) + np.trace(T) - 2 * np.trace(_sqrtm(root @ S @ root))


def _sqrtm(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def factor_distance(A, B):
    """The Bures distance of A A^T and B B^T without any root of a singular matrix: through the nuclear norm."""
    return np.sum(A**2) + np.sum(B**2) - 2 * np.linalg.svd(A.T @ B, compute_uv=False).sum()


def finite_differences(function, x, step=1e-6):
    x = np.asarray(x, np.float64)
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[index] += step
        minus[index] -= step
        gradient[index] = (function(plus) - function(minus)) / (2 * step)
    return gradient


def covariance(seed, size, condition):
    """Random eigenvectors, eigenvalues from 1 down to 1 / condition."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return ((basis * np.logspace(0, -np.log10(condition), size)) @ basis.T).astype(np.float32)


@jax.jit
def cov_term(cov_s, cov_t):
    mean = jnp.zeros(jnp.shape(cov_s)[:-1], jnp.result_type(cov_s))
    return gaussian_w2(mean, cov_s, mean, cov_t)[1]


gradients = jax.jit(jax.grad(cov_term, argnums=(0, 1)))


@pytest.mark.parametrize(("size", "condition"), [(8, 1e2), (8, 1e6), (48, 1e6)])
def test_full_matches_the_formula(size, condition):
    S, T = covariance(0, size, condition), covariance(1, size, condition)
    np.testing.assert_allclose(cov_term(S, T), bures(S, T), rtol=1e-5)


def test_goldens_of_the_feature_specification():
    k = np.arange(27)
    student, teacher = np.sin(0.37 * k).reshape(3, 9), np.cos(0.23 * k).reshape(3, 9)
    mean_s, mean_t = student.mean(axis=1), teacher.mean(axis=1)
    cov_s, cov_t = np.cov(student, bias=True), np.cov(teacher, bias=True)
    mean_term, full = gaussian_w2(mean_s, cov_s, mean_t, cov_t)
    _, diagonal = gaussian_w2(mean_s, np.diag(cov_s), mean_t, np.diag(cov_t))
    np.testing.assert_allclose([mean_term, full, diagonal], [0.145380, 0.379671, 0.055882], atol=1e-6)


def test_close_covariances_do_not_cancel():
    """The trace formula in float32 has an error near 1e-6 here, as large as the distance itself."""
    S = covariance(0, 8, 1e2)
    T = (S * 1.001).astype(np.float32)
    assert 1e-7 < bures(S, T) < 1e-6
    np.testing.assert_allclose(cov_term(S, T), bures(S, T), rtol=1e-2)


def test_full_gradients_match_finite_differences():
    S, T = covariance(0, 8, 1e2), covariance(1, 8, 1e2)
    grad_s, grad_t = gradients(S, T)
    # The oracle moves one entry; symmetrising spreads it over both halves, as the gradient must be symmetric.
    symmetric = lambda x: (x + x.T) / 2  # noqa: E731
    np.testing.assert_allclose(grad_s, finite_differences(lambda x: bures(symmetric(x), T), S), atol=2e-5)
    np.testing.assert_allclose(grad_t, finite_differences(lambda x: bures(S, symmetric(x)), T), atol=2e-5)
    np.testing.assert_allclose(grad_s, grad_s.T, atol=1e-6)


def test_gradients_in_float64():
    with jax.enable_x64(True):
        S, T = jnp.asarray(covariance(0, 5, 1e2), jnp.float64), jnp.asarray(covariance(1, 5, 1e2), jnp.float64)
        mean_s, mean_t = jnp.linspace(-1.0, 1.0, 5), jnp.linspace(0.0, 2.0, 5)
        check_grads(lambda *args: sum(gaussian_w2(*args)), (mean_s, S, mean_t, T), order=1, modes=["rev"], eps=1e-6)
        check_grads(lambda *args: sum(gaussian_w2(*args)), (mean_s, S[0] ** 2, mean_t, T[0] ** 2), order=1, eps=1e-6)


@pytest.mark.parametrize("ranks", [(3, 3), (3, 8), (1, 1)])
def test_gradient_through_samples_at_singular_covariances(ranks):
    """Covariances from fewer samples than channels; the chain to the samples is well defined and must be exact."""
    rng = np.random.default_rng(0)
    A, B = (rng.normal(size=(8, rank)).astype(np.float32) for rank in ranks)
    S, T = A @ A.T, B @ B.T
    np.testing.assert_allclose(cov_term(S, T), factor_distance(A.astype(np.float64), B.astype(np.float64)), rtol=1e-5)
    grad_s, grad_t = gradients(S, T)
    grad_a, grad_b = 2 * grad_s @ A, 2 * grad_t @ B  # the chain rule
    np.testing.assert_allclose([grad_s, grad_t], [grad_s.T, grad_t.T], atol=1e-5)
    np.testing.assert_allclose(grad_a, finite_differences(lambda x: factor_distance(x, B), A), atol=1e-4)
    np.testing.assert_allclose(grad_b, finite_differences(lambda x: factor_distance(A, x), B), atol=1e-4)


def test_null_space_to_null_space_has_gradient_zero():
    S, T = np.diag([4.0, 1.0, 0.0, 0.0]), np.eye(4)
    np.testing.assert_allclose(gradients(S, T)[0], np.diag([0.5, 0.0, 0.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("size", [1, 8])
def test_equal_covariances_are_the_minimum(size):
    S = covariance(0, size, 1e2)
    assert 0 <= cov_term(S, S) < 1e-9
    np.testing.assert_allclose(gradients(S, S), np.zeros((2, size, size)), atol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_zero_matrices(size):
    zero, T = np.zeros((size, size), np.float32), covariance(0, size, 10)
    assert cov_term(zero, zero) == 0
    np.testing.assert_allclose(cov_term(zero, T), np.trace(T), rtol=1e-6)
    for cov_s, cov_t in ((zero, zero), (zero, T), (T, zero)):
        assert np.isfinite(gradients(cov_s, cov_t)).all()
    # Nothing to transport onto: the distance is the trace of what there is.
    np.testing.assert_allclose(gradients(T, zero)[0], np.eye(size), atol=1e-5)


def test_covariances_without_overlap_do_not_pull():
    S, T = np.diag([1.0, 0.0, 0.0, 0.0]), np.diag([0.0, 4.0, 0.0, 0.0])
    np.testing.assert_allclose(cov_term(S, T), 5.0)
    np.testing.assert_allclose(gradients(S, T), [np.diag([1.0, 0, 0, 0]), np.diag([0, 1.0, 0, 0])], atol=1e-6)


def test_one_dimension_is_the_squared_difference_of_deviations():
    four, nine = np.array([[4.0]], np.float32), np.array([[9.0]], np.float32)
    np.testing.assert_allclose(cov_term(four, nine), 1.0)
    np.testing.assert_allclose(gradients(four, nine), [[[1 - 3 / 2]], [[1 - 2 / 3]]], rtol=1e-6)


def test_diagonal_form_agrees_with_full_form():
    rng = np.random.default_rng(0)
    v_s, v_t = rng.uniform(0.1, 2, size=(2, 8)).astype(np.float32)
    v_s[2] = 0
    full, full_grad = cov_term(np.diag(v_s), np.diag(v_t)), gradients(np.diag(v_s), np.diag(v_t))[0]
    mean = jnp.zeros(8)
    diag, diag_grad = jax.value_and_grad(lambda v: gaussian_w2(mean, v, mean, v_t)[1])(jnp.asarray(v_s))
    np.testing.assert_allclose(diag, np.sum((np.sqrt(v_s.astype(np.float64)) - np.sqrt(v_t)) ** 2), rtol=1e-6)
    np.testing.assert_allclose(full, diag, rtol=1e-5)
    np.testing.assert_allclose(np.diag(full_grad), diag_grad, atol=1e-5)


def test_diagonal_gradient_is_finite_at_zero_variance():
    mean, v_s, v_t = jnp.zeros(4), jnp.array([0.0, 0.0, 1.0, 4.0]), jnp.array([0.0, 1.0, 0.0, 1.0])
    grad_s, grad_t = jax.grad(lambda s, t: gaussian_w2(mean, s, mean, t)[1], argnums=(0, 1))(v_s, v_t)
    np.testing.assert_allclose(grad_s, [0, 0, 1, 0.5])  # 1 - sqrt(v_t / v_s), and 0 where that is not defined
    np.testing.assert_allclose(grad_t, [0, 1, 0, -1])


def test_mean_term_and_translation():
    rng = np.random.default_rng(0)
    mean_s, mean_t = rng.normal(size=(2, 3, 4))
    cov_s, cov_t = rng.uniform(size=(2, 3, 4))
    mean_term, cov = gaussian_w2(mean_s, cov_s, mean_t, cov_t)
    np.testing.assert_allclose(mean_term, np.sum((mean_s - mean_t) ** 2, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(cov, gaussian_w2(mean_s + 5, cov_s, mean_t, cov_t)[1])


def test_batched_equals_single_under_jit_and_vmap():
    S = np.stack([covariance(seed, 8, 100) for seed in range(6)]).reshape(2, 3, 8, 8)
    T, mean = S[::-1], np.zeros((2, 3, 8), np.float32)
    single = np.array([[cov_term(S[i, j], T[i, j]) for j in range(3)] for i in range(2)])
    np.testing.assert_allclose(gaussian_w2(mean, S, mean, T)[1], single, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(cov_term)))(S, T), single, rtol=1e-5)
    batched = jax.jit(jax.vmap(jax.grad(lambda s, t: cov_term(s, t).sum(), argnums=(0, 1))))(S, T)
    np.testing.assert_allclose([x[1, 2] for x in batched], gradients(S[1, 2], T[1, 2]), atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    S, T = (jnp.asarray(covariance(seed, 4, 10), jnp.bfloat16) for seed in range(2))
    mean = jnp.zeros(4, jnp.bfloat16)
    mean_term, cov = gaussian_w2(mean, S, mean, T)
    assert mean_term.dtype == cov.dtype == jnp.float32
    np.testing.assert_allclose(cov, bures(S.astype(jnp.float32), T.astype(jnp.float32)), rtol=1e-4)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4,), (3,), (4,), (3,)),
        ((4,), (4, 4), (4,), (4,)),
        ((2, 4), (4,), (2, 4), (4,)),
        ((4,), (4,), (3,), (3,)),
        ((),) * 4,
    ],
)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"must both be"):
        gaussian_w2(*(jnp.ones(shape) for shape in shapes))
