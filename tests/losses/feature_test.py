"""`mse`, adaptive pooling and `widened` against NumPy, and FitNet's golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.losses.feature import adaptive_average_pool, mse, widened


def golden_maps(*shape):
    """sin(0.37 k) and cos(0.23 k) in NCHW order, as NHWC."""
    k = np.arange(np.prod(shape)).reshape(shape)
    return (np.moveaxis(x, 1, -1) for x in (np.sin(0.37 * k), np.cos(0.23 * k)))


def test_golden():
    student, teacher = golden_maps(2, 3, 4, 4)
    np.testing.assert_allclose(mse(student, teacher).mean(), 0.965648, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 6), (2, 7, 6)])
def test_mse(shape):
    student, teacher = np.random.default_rng(0).normal(size=(2, *shape))
    expected = np.square(student - teacher).reshape(len(student), -1).mean(1)
    with jax.enable_x64(True):
        value, pull = jax.vjp(jax.jit(mse), student, teacher)
        gradient, to_teacher = pull(jnp.ones(len(student)))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, 2 * (student - teacher) / np.prod(shape[1:]), rtol=1e-12)
    np.testing.assert_array_equal(to_teacher, 0)


def test_bfloat16_is_computed_in_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in golden_maps(2, 3, 4, 4))
    value = mse(student, teacher)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, mse(student.astype(jnp.float32), teacher.astype(jnp.float32)))
    assert [x.dtype for x in widened(student, jnp.ones(1, jnp.float16))] == [jnp.float32] * 2
    with jax.enable_x64(True):
        assert [x.dtype for x in widened(student, jnp.ones(1, jnp.float64))] == [jnp.float64] * 2


def cells(x, size):
    """Loop over the definition: cell i of n positions is floor(i n / size) to ceil((i + 1) n / size)."""
    spans = [[(i * n // size, -((i + 1) * n // -size)) for i in range(size)] for n in x.shape[1:3]]
    rows = [np.stack([x[:, a:b, c:d].mean((1, 2)) for c, d in spans[1]], axis=1) for a, b in spans[0]]
    return np.stack(rows, axis=1)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (8, 8), (5, 3), (1, 2)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_adaptive_average_pool(height, width, size):
    x = np.random.default_rng(1).normal(size=(2, height, width, 3))
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), size), cells(x, size), rtol=1e-5, atol=1e-6)


def test_the_cells_of_seven_positions_overlap_in_four():
    x = np.eye(7).reshape(1, 7, 7, 1)
    pooled = np.asarray(adaptive_average_pool(jnp.asarray(x), 4))[0, :, :, 0]
    spans = [(0, 2), (1, 4), (3, 6), (5, 7)]
    for i, (a, b) in enumerate(spans):
        for j, (c, d) in enumerate(spans):
            assert pooled[i, j] == pytest.approx(np.eye(7)[a:b, c:d].mean())


def test_errors():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 4\); a connector"):
        mse(jnp.ones((2, 5)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="one shape"):
        mse(jnp.ones(3), jnp.ones(3))
    for shape, size in (((2, 3, 4), 2), ((1, 2, 2, 3), 0)):
        with pytest.raises(ValueError, match=f"size={size}"):
            adaptive_average_pool(jnp.ones(shape), size)
