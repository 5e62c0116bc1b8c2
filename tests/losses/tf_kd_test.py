"""`tf_kd_self` and `tf_kd_reg` against float64 NumPy, their goldens and the published code's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax import losses

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
LABELS = np.array([3, 2], np.int32)


def on_host(loss, *static):
    """Compiled, with NumPy results."""
    compiled = jax.jit(loss, static_argnames=static)
    return lambda *args, **settings: jax.device_get(compiled(*args, **settings))


tf_kd_self = on_host(losses.tf_kd_self, "temperature", "reduction")
tf_kd_reg = on_host(losses.tf_kd_reg, "temperature", "correct_probability", "soften_student", "reduction")


def test_goldens_of_self_training():
    def total(z):
        value = losses.tf_kd_self(z, TEACHER, temperature=6.0).mean()
        return 0.05 * losses.cross_entropy(z, LABELS).mean() + 0.95 * 50 * value, value

    both = on_host(jax.value_and_grad(total, has_aux=True))
    with jax.enable_x64(True):
        (loss, value), gradient = both(jnp.asarray(STUDENT))
    np.testing.assert_allclose(value, 0.0349056, atol=1e-7)
    np.testing.assert_allclose(loss, 1.721993, atol=1e-6)
    np.testing.assert_allclose(gradient[0], [-0.423259, 0.084052, 0.780049, -0.517206, 0.076364], atol=1e-6)
    single = both(STUDENT.astype(np.float32))[0][0]
    np.testing.assert_allclose(single, 1.721993, atol=1e-4)  # 1710 multiplies float32's rounding


def test_goldens_of_regularisation():
    def total(z):
        value = losses.tf_kd_reg(z, LABELS, temperature=20.0).mean()
        return 0.9 * losses.cross_entropy(z, LABELS).mean() + 0.1 * 100 * value, value

    with jax.enable_x64(True):
        (loss, value), gradient = on_host(jax.value_and_grad(total, has_aux=True))(jnp.asarray(STUDENT))
    np.testing.assert_allclose((loss, value), (1.818702, 0.0667134), atol=1e-6)
    np.testing.assert_allclose(gradient[0], [0.096970, -0.019090, -0.132180, 0.143783, -0.089484], atol=1e-6)
    cross_entropy = -log_softmax(STUDENT, -1)[[0, 1], LABELS].mean()
    summed = tf_kd_reg(STUDENT, LABELS, temperature=20.0, reduction="sum").mean()
    np.testing.assert_allclose((0.9 * cross_entropy + 0.1 * summed, summed), (1.184925, 0.333567), atol=1e-6)
    warm = tf_kd_reg(STUDENT, LABELS, temperature=40.0).mean()
    np.testing.assert_allclose((0.05 * cross_entropy + 0.95 * warm, warm), (0.127968, 0.0673598), atol=1e-6)


@pytest.mark.parametrize("soften_student", [False, True])
def test_regularisation_is_the_divergence_from_a_softmax_of_probabilities(soften_student):
    rng = np.random.default_rng(0)
    z, labels = 3 * rng.normal(size=(2, 3, 7)), rng.integers(0, 7, (2, 3))
    d = np.where(np.eye(7)[labels] == 1, 0.9, 0.1 / 6)
    u, log_q = softmax(d / 5, -1), log_softmax(z / 5 if soften_student else z, -1)
    settings = {"temperature": 5.0, "correct_probability": 0.9, "soften_student": soften_student}
    expected = (u * (np.log(u) - log_q)).sum(-1)
    np.testing.assert_allclose(tf_kd_reg(z, labels, reduction="sum", **settings), expected, rtol=2e-5)
    np.testing.assert_allclose(tf_kd_reg(z, labels, **settings), expected / 7, rtol=2e-5)


def test_self_training_is_kd_over_the_classes():
    value = tf_kd_self(STUDENT, TEACHER, temperature=3.0, reduction="sum")
    p, log_q = softmax(TEACHER / 3, -1), log_softmax(STUDENT / 3, -1)
    np.testing.assert_allclose(value, 9 * (p * (np.log(p) - log_q)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(tf_kd_self(STUDENT, TEACHER, temperature=3.0), value / 5, rtol=1e-6)
    np.testing.assert_array_equal(tf_kd_self(STUDENT, STUDENT, temperature=3.0), [0, 0])


def test_gradient_of_a_softened_student():
    """(q - u) / T, by class."""
    with jax.enable_x64(True):
        loss = lambda z: losses.tf_kd_reg(z, LABELS, temperature=2.0, soften_student=True).sum()  # noqa: E731
        gradient = on_host(jax.grad(loss))(jnp.asarray(STUDENT))
    u = softmax(np.where(np.eye(5)[LABELS] == 1, 0.99, 0.0025) / 2, -1)
    np.testing.assert_allclose(gradient, (softmax(STUDENT / 2, -1) - u) / 2 / 5, atol=1e-12)


def test_no_gradient_reaches_the_teacher():
    gradient = on_host(jax.grad(lambda t: losses.tf_kd_self(STUDENT, t).sum()))(TEACHER.astype(np.float32))
    np.testing.assert_array_equal(gradient, np.zeros_like(TEACHER))


def test_bfloat16_is_computed_in_float32():
    z, t = jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16)
    for low, high in (
        (tf_kd_self(z, t), tf_kd_self(z.astype(jnp.float32), t.astype(jnp.float32))),
        (tf_kd_reg(z, LABELS), tf_kd_reg(z.astype(jnp.float32), LABELS)),
    ):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, rtol=1e-6)


def test_a_certain_student_and_a_certain_virtual_teacher_are_finite():
    z = 1e4 * np.eye(5, dtype=np.float32)[:2]
    loss = lambda z: losses.tf_kd_reg(z, LABELS, temperature=1e-3, correct_probability=1.0).sum()  # noqa: E731
    value, gradient = on_host(jax.value_and_grad(loss))(z)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(value, 2e4 / 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tf_kd_self(STUDENT, TEACHER, reduction="batchmean"), "reduction='batchmean'"),
        (lambda: tf_kd_self(STUDENT, TEACHER[:, :4]), r"\(2, 5\) and \(2, 4\)"),
        (lambda: tf_kd_reg(STUDENT, LABELS, temperature=0.0), "temperature=0.0: must be above 0"),
        (lambda: tf_kd_reg(STUDENT, LABELS, correct_probability=1.5), "correct_probability=1.5"),
        (lambda: tf_kd_reg(STUDENT, LABELS[:1]), r"labels must be integers of shape \(2,\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
