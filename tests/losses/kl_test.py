"""`kl` and `kd` against float64 NumPy, their goldens, and the extremes of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wkd_jax.losses.kl import kd, kl

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])


def oracle(student, teacher, temperature=1.0):
    log_p, log_q = (
        x / temperature - np.log(np.sum(np.exp(x / temperature), -1, keepdims=True)) for x in (teacher, student)
    )
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def test_goldens():
    np.testing.assert_allclose(kl(STUDENT, TEACHER), [0.035275, 0.097301], atol=1e-6)
    np.testing.assert_allclose(kd(STUDENT, TEACHER, temperature=1.0).mean(), 0.066288, atol=1e-6)
    np.testing.assert_allclose(kd(STUDENT, TEACHER, temperature=4.0).mean(), 0.161407, atol=2e-6)
    np.testing.assert_array_equal(kd(STUDENT, TEACHER), kd(STUDENT, TEACHER, temperature=4.0))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 7)])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_values(shape, temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, *shape)) * 3
    expected = oracle(student, teacher, temperature)
    np.testing.assert_allclose(kl(student, teacher, temperature=temperature), expected, rtol=2e-5, atol=1e-7)
    scaled = kd(student, teacher, temperature=temperature)
    np.testing.assert_allclose(scaled, temperature**2 * expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(kd)(student, teacher, temperature=temperature), scaled, rtol=1e-5, atol=1e-7)


def test_vmap_equals_batch():
    np.testing.assert_allclose(jax.vmap(kl)(STUDENT, TEACHER), kl(STUDENT, TEACHER), rtol=1e-5, atol=1e-7)


def test_student_gradient():
    """d kd / d student = T (q - p), whatever T: of the size of the gradient at T = 1."""
    T = 3.0
    gradient = jax.grad(lambda z: kd(z, TEACHER, temperature=T).sum())(STUDENT.astype(np.float32))
    softmax = lambda x: np.exp(x / T) / np.exp(x / T).sum(-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(gradient, T * (softmax(STUDENT) - softmax(TEACHER)), atol=1e-6)


def test_gradients_in_float64():
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        loss = jax.jit(lambda z, t: kd(z, teacher, temperature=t).sum())
        check_grads(loss, (student, jnp.array([2.0, 0.7])), order=1, modes=["rev"])


def test_no_gradient_reaches_the_teacher():
    gradient = jax.grad(lambda t: kd(STUDENT, t).sum())(TEACHER.astype(np.float32))
    np.testing.assert_array_equal(gradient, np.zeros_like(TEACHER))


def test_one_temperature_for_each_example():
    each = jnp.array([2.0, 5.0])
    expected = [kd(STUDENT[i], TEACHER[i], temperature=float(each[i])) for i in range(2)]
    np.testing.assert_allclose(kd(STUDENT, TEACHER, temperature=each), expected, rtol=1e-6)


def test_traced_temperature_compiles_once():
    jitted = jax.jit(lambda t: kd(STUDENT, TEACHER, temperature=t))
    for temperature in (1.0, 2.0, 8.0):
        np.testing.assert_allclose(jitted(temperature), kd(STUDENT, TEACHER, temperature=temperature), rtol=1e-5)
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_are_finite(scale):
    one_hot = np.eye(5, dtype=np.float32)[:2] * scale
    for student, teacher in ((one_hot, one_hot[::-1]), (STUDENT, one_hot), (one_hot, STUDENT)):
        value, gradient = jax.value_and_grad(lambda z, t: kl(z, t).sum())(jnp.asarray(student, jnp.float32), teacher)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    if scale > 0:
        np.testing.assert_allclose(kl(one_hot, one_hot[::-1]), [1e4, 1e4])
        np.testing.assert_allclose(
            kl(STUDENT, one_hot), -np.log(np.exp(STUDENT[[0, 1], [0, 1]]) / np.exp(STUDENT).sum(-1)), rtol=1e-5
        )


def test_class_masked_on_both_sides_equals_dropping_it():
    masked = [np.concatenate([x, np.full((2, 1), -np.inf)], axis=1).astype(np.float32) for x in (STUDENT, TEACHER)]
    value, gradient = jax.value_and_grad(lambda z: kd(z, masked[1]).sum())(jnp.asarray(masked[0]))
    expected = jax.grad(lambda z: kd(z, TEACHER).sum())(STUDENT.astype(np.float32))
    np.testing.assert_allclose(value, kd(STUDENT, TEACHER).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :-1], expected, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, -1], 0)
    of_temperature = jax.grad(lambda t, s, z: kd(s, z, temperature=t).sum())
    np.testing.assert_allclose(of_temperature(3.0, *masked), of_temperature(3.0, STUDENT, TEACHER), rtol=1e-5)


def test_properties():
    student, teacher = np.random.default_rng(1).normal(size=(2, 50, 10))
    np.testing.assert_array_equal(kl(student, student), np.zeros(50))
    assert (np.asarray(kl(student, teacher)) > 0).all()
    order = np.random.default_rng(2).permutation(10)
    np.testing.assert_allclose(kl(student[:, order], teacher[:, order]), kl(student, teacher), rtol=1e-4)
    np.testing.assert_allclose(kl(student + 7, teacher - 3), kl(student, teacher), rtol=1e-4, atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    student, teacher = jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16)
    value = kd(student, teacher)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, kd(student.astype(jnp.float32), teacher.astype(jnp.float32)))


def test_errors():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 4\)"):
        kl(STUDENT, TEACHER[:, :4])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature=.*above 0"):
            jax.jit(lambda z, t=temperature: kd(z, TEACHER, temperature=t))(STUDENT)
