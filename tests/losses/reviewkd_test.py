"""`hcl` against its goldens and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wkd_jax import losses

hcl = jax.jit(losses.hcl)


def waves(*shape):
    """sin(0.37 k) and cos(0.23 k), laid out as channels before positions, as channels last."""
    k = np.arange(np.prod(shape)).reshape(shape)
    return [np.moveaxis(x, 1, -1) for x in (np.sin(0.37 * k), np.cos(0.23 * k))]


def cells(x, size):
    bounds = [[(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in x.shape[1:3]]
    return np.array([[x[:, a:b, c:d].mean((1, 2)) for c, d in bounds[1]] for a, b in bounds[0]])


def oracle(student, teacher):
    parts = [np.square(student - teacher).mean((1, 2, 3))]
    for size in (4, 2, 1):
        if size < student.shape[1]:
            parts.append(np.square(cells(student, size) - cells(teacher, size)).mean((0, 1, 3)))
    weights = 0.5 ** np.arange(len(parts))
    return weights @ np.array(parts) / weights.sum()


@pytest.mark.parametrize(("side", "golden"), [(8, 0.560893), (7, 0.544474), (4, 0.736549), (1, 0.316166)])
def test_goldens(side, golden):
    np.testing.assert_allclose(hcl(*waves(2, 3, side, side)).mean(), golden, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7, 5, 2), (2, 3, 8, 4), (2, 2, 2, 3)])
def test_values(shape):
    student, teacher = np.random.default_rng(0).normal(size=(2, *shape))
    np.testing.assert_allclose(hcl(student, teacher), oracle(student, teacher), rtol=1e-5)
    np.testing.assert_array_equal(hcl(student, student), 0)


def test_gradients():
    with jax.enable_x64(True):
        student, teacher = map(jnp.asarray, waves(2, 3, 5, 5))
        total = jax.jit(lambda x, y: hcl(x, y).sum())
        np.testing.assert_allclose(total(student, teacher), oracle(*waves(2, 3, 5, 5)).sum(), rtol=1e-12)
        check_grads(lambda x: total(x, teacher), (student,), order=1, modes=["rev"])
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
        np.testing.assert_array_equal(gradients(student, teacher)[1], 0)
        np.testing.assert_array_equal(gradients(teacher, teacher)[0], 0)


def test_bfloat16_is_computed_in_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in waves(2, 3, 5, 5))
    value = hcl(student, teacher)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, hcl(student.astype(jnp.float32), teacher.astype(jnp.float32)))


def test_errors():
    with pytest.raises(ValueError, match=r"needs maps \[B, H, W, D\], got \(2, 3\)"):
        hcl(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\) and \(2, 4, 4, 5\)"):
        hcl(np.ones((2, 4, 4, 3)), np.ones((2, 4, 4, 5)))
