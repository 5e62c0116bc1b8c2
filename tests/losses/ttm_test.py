"""TTM and WTTM against the authors' numbers, a float64 formula, and the identity that ties them to KD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax.losses.ttm import ttm, wttm

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
POWERS = (0.1, 0.5, 1.0)
rng = np.random.default_rng(0)


def both(student, teacher):
    """[2, 3, ...]: TTM and WTTM at each power."""
    return jnp.stack([jnp.stack([loss(student, teacher, power=c) for c in POWERS]) for loss in (ttm, wttm)])


@jax.jit
def differentiated(student, teacher):
    """The values, and the gradient of the sum of each [2, 3, ..., C] by the student, of all by the teacher."""
    values, vjp = jax.vjp(both, student, teacher)
    each = jnp.eye(6).reshape(6, 2, 3, *(1,) * (values.ndim - 2)) * jnp.ones_like(values)
    by_student, by_teacher = jax.vmap(vjp)(each)
    return values, by_student.reshape(2, 3, *student.shape), by_teacher


def run(student, teacher):
    with jax.enable_x64(True):
        values, by_student, by_teacher = jax.device_get(differentiated(student, teacher))
    assert values.dtype == np.float64
    np.testing.assert_array_equal(by_teacher, 0)
    return values, by_student


def oracle(student, teacher):
    """[2, 3, ...] from powers of probabilities."""
    values = []
    for c in POWERS:
        powers = softmax(teacher, -1) ** c
        weight = powers.sum(-1, keepdims=True)
        p = powers / weight
        kl = np.sum(p * (np.log(p) - log_softmax(student, -1)), -1)
        values.append([kl, weight[..., 0] * kl])
    return np.swapaxes(values, 0, 1)


def test_values_and_gradients():
    """The authors' two rows and four drawn, in the shape [2, 3]."""
    student, teacher = (np.concatenate([x, 3 * rng.normal(size=(4, 5))]) for x in (STUDENT, TEACHER))
    regions = [x.reshape(2, 3, 5) for x in (student, teacher)]
    values, gradients = run(*regions)
    values, gradients = values.reshape(2, 3, 6), gradients.reshape(2, 3, 6, 5)
    np.testing.assert_allclose(values, oracle(student, teacher), rtol=1e-10)

    np.testing.assert_allclose(values[0, 0, :2], [0.278114, 0.192744], atol=1e-6)
    np.testing.assert_allclose(values[1, 0, :2] / values[0, 0, :2], [3.980210, 3.963123], atol=1e-6)
    np.testing.assert_allclose(values[:, 0, :2].mean(-1), [0.235429, 0.935410], atol=1e-6)
    np.testing.assert_allclose(values[:, 1, :2].mean(-1), [0.027962, 0.052839], atol=1e-6)
    for loss, golden in enumerate(
        ([-0.006711, -0.036414, -0.057627, 0.156656, -0.055903], [-0.026713, -0.144936, -0.229368, 0.623524, -0.222507])
    ):
        np.testing.assert_allclose(gradients[loss, 0, 0] / 2, golden, atol=1e-6)
    # Of the others, by the formula: U (q - p^).
    p = [softmax(teacher * c, -1) for c in POWERS]
    np.testing.assert_allclose(gradients[0], softmax(student, -1) - p, atol=1e-12)
    weight = np.stack([(softmax(teacher, -1) ** c).sum(-1) for c in POWERS])
    np.testing.assert_allclose(gradients[1], weight[..., None] * gradients[0], atol=1e-12)

    # At power 1 / 2: T KL(p^ || q^T) less (T - 1) times Renyi's entropy of q over Shannon's of p^, T = 2.
    p, q = softmax(teacher / 2, -1), softmax(student, -1)
    renyi, shannon = 2 * np.log(np.sum(np.sqrt(q), -1)), -np.sum(p * np.log(p), -1)
    kd = 2 * np.sum(p * (np.log(p) - log_softmax(student / 2, -1)), -1)
    np.testing.assert_allclose(values[0, 1], kd - (renyi - shannon), rtol=1e-8)

    half = [jnp.asarray(x, jnp.bfloat16) for x in regions]
    got = jax.jit(both)(*half)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, run(*(np.asarray(x, np.float64) for x in half))[0], rtol=1e-4, atol=1e-6)


def test_extremes():
    big, small = 1e4 * np.eye(5), np.array([0.0, -800.0, -900.0, -900.0, -900.0])
    cases = [(big[0], big[0]), (big[0], big[1]), (STUDENT[0], big[0]), (-big[0], big[0]), (0 * big[0], small)]
    cases.append((TEACHER[0], TEACHER[0]))
    student, teacher = (np.array(x).reshape(2, 3, 5) for x in zip(*cases, strict=True))
    values, gradients = run(student, teacher)
    assert np.isfinite(values).all() and np.isfinite(gradients).all()
    values = values.reshape(2, 3, 6)
    np.testing.assert_allclose(values[:, 2, 5], 0, atol=1e-12)
    # Probabilities below the smallest float64, whose powers are not.
    p = softmax(0.1 * small)
    np.testing.assert_allclose(values[0, 0, 4], np.sum(p * np.log(5 * p)), rtol=1e-12)
    np.testing.assert_allclose(values[1, 0, 4], np.sum(np.exp(0.1 * small)) * values[0, 0, 4], rtol=1e-12)


@pytest.mark.parametrize("loss", [ttm, wttm])
def test_errors(loss):
    for power in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=f"power={power}: must be above 0 and at most 1"):
            loss(STUDENT, TEACHER, power=power)
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 4\)"):
        jax.eval_shape(lambda *x: loss(*x, power=0.5), STUDENT, TEACHER[:, :4])
