"""CTKD's temperature, its reversed gradient, and its loss for single examples, against the authors' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax.losses.ctkd import ctkd_instance, ctkd_temperature
from wkd_jax.losses.kl import kd

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])


def test_temperature():
    parameter = np.array([-50.0, 0.0, 1.3, 50.0], np.float32)

    def at(reversal, **options):
        return lambda x: ctkd_temperature(x, reversal, **options)

    def slopes(x):
        return [jax.vjp(at(r, base=2.0, span=4.0), x)[1](jnp.ones(4))[0] for r in (1.0, -0.3, 0.0)]

    functions = [at(-0.3, base=2.0, span=4.0), at(0.7), at(-1.0), slopes]
    value, one, other, (true, reversed_, none) = jax.device_get(jax.jit(lambda x: [f(x) for f in functions])(parameter))
    sigmoid = 1 / (1 + np.exp(-parameter.astype(np.float64)))
    np.testing.assert_allclose(value, 2 + 4 * sigmoid, rtol=1e-6)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(true, 4 * sigmoid * (1 - sigmoid), atol=1e-6)
    np.testing.assert_allclose(reversed_, -0.3 * true, rtol=1e-6)
    np.testing.assert_array_equal(none, 0)
    half = jax.eval_shape(at(-1.0), jnp.ones((), jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_goldens_with_gradients():
    @jax.jit
    def differentiated(student, parameter, reversal):
        def total(student, parameter):
            temperature = ctkd_temperature(parameter, reversal)
            return kd(student, jnp.asarray(TEACHER, student.dtype), temperature=temperature).mean(), temperature

        return jax.value_and_grad(total, (0, 1), has_aux=True)(student, parameter)

    with jax.enable_x64(True):  # the true derivative by the parameter is a difference of nearly equal terms
        delivered = {}
        for reversal in (1.0, -1.0, -0.5, 0.0):
            (value, temperature), (by_student, by_parameter) = differentiated(STUDENT, np.float64(1), reversal)
            np.testing.assert_allclose(value, 0.189888, atol=1e-6)
            np.testing.assert_allclose(temperature, 15.621172, atol=1e-6)
            # What the student sees is not reversed.
            np.testing.assert_allclose(by_student[0], [-0.048376, 0.003443, 0.093172, -0.051574, 0.003335], atol=1e-6)
            delivered[reversal] = float(by_parameter)
        assert delivered == pytest.approx({1.0: 0.0022943, -1.0: -0.0022943, -0.5: -0.00114715, 0.0: 0}, abs=1e-8)
        ends = [differentiated(STUDENT, np.float64(g), 1.0)[0][0] for g in (1 + 1e-4, 1 - 1e-4)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-4, delivered[1.0], rtol=1e-6)


def test_instance():
    """The authors' two rows, and four extremes, in the shape [2, 3]."""
    big = 1e4 * np.eye(5)
    student = np.concatenate([STUDENT, [big[0], big[0], 0 * big[0], -big[0]]])
    teacher = np.concatenate([TEACHER, [big[0], big[1], big[0], big[0]]])
    temperature = np.array([3.0, 7.0, 1.0, 21.0, 1.0, 21.0])

    @jax.jit
    def differentiated(*arguments):
        def total(student, teacher, temperature):
            value = ctkd_instance(student, teacher, temperature=temperature)
            return value.sum(), value

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arguments)

    shaped = [x.reshape(2, 3, *x.shape[1:]) for x in (student, teacher, temperature)]
    with jax.enable_x64(True):
        (_, value), gradients = jax.device_get(differentiated(*shaped))
        direction = 1e-5 * np.random.default_rng(0).normal(size=(2, 3))
        ends = [differentiated(*shaped[:2], shaped[2] + s * direction)[0][1] for s in (1, -1)]
        ends = jax.device_get(ends)
    value = value.reshape(6)
    np.testing.assert_allclose(value[:2].mean(), 0.165161, atol=1e-6)
    p = softmax(teacher / temperature[:, None], -1) + 1e-7
    q = softmax(student / temperature[:, None], -1)
    log_q = log_softmax(student / temperature[:, None], -1)
    np.testing.assert_allclose(value, temperature**2 * np.sum(p * (np.log(p) - log_q), -1), rtol=1e-9, atol=1e-12)
    slope = temperature[:, None] * (q * p.sum(-1, keepdims=True) - p)
    np.testing.assert_allclose(gradients[0].reshape(6, 5), slope, atol=1e-9)
    np.testing.assert_array_equal(gradients[1], 0)
    assert np.isfinite(gradients[2]).all()
    np.testing.assert_allclose((ends[0] - ends[1])[0, :2] / 2, (gradients[2] * direction)[0, :2], rtol=1e-5)

    half = [jnp.asarray(x, jnp.bfloat16) for x in shaped[:2]]
    got = jax.jit(lambda z, t: ctkd_instance(z, t, temperature=shaped[2].astype(np.float32)))(*half)
    assert got.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.device_get(differentiated(*(np.asarray(x, np.float64) for x in half), shaped[2]))[0][1]
    np.testing.assert_allclose(got, wide, rtol=1e-3, atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="base=0.0 and span=20.0: both must be above 0"):
        ctkd_temperature(jnp.array(1.0), -1.0, base=0.0)
    with pytest.raises(ValueError, match="temperature=.*above 0"):
        ctkd_instance(STUDENT, TEACHER, temperature=np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 4\)"):
        ctkd_instance(STUDENT, TEACHER[:, :4], temperature=np.ones(2))
