"""`cat_kd` against its goldens and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.losses import adaptive_average_pool, cat_kd

K = np.arange(2 * 5 * 7 * 7).reshape(2, 5, 7, 7)
STUDENT, TEACHER = (np.moveaxis(x, 1, -1) for x in (np.sin(0.37 * K), np.cos(0.23 * K)))


def compiled(normalise):
    loss = lambda s, t: cat_kd(s, t, size=4, normalise=normalise).mean()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


RAW, NORMALISED = compiled(False), compiled(True)


@pytest.mark.parametrize(("loss", "golden"), [(RAW, 0.167638), (NORMALISED, 0.124078)], ids=["raw", "normalised"])
def test_goldens_and_gradients(loss, golden):
    with jax.enable_x64(True):
        value, (gradient, to_teacher) = loss(STUDENT, TEACHER)
        np.testing.assert_allclose(value, golden, atol=6e-7)
        np.testing.assert_array_equal(to_teacher, 0)
        direction = np.random.default_rng(1).normal(size=STUDENT.shape)
        ends = [float(loss(STUDENT + step * direction, TEACHER)[0]) for step in (1e-6, -1e-6)]
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_values():
    """Cells that fit, maps of two sizes, norms of each example and class."""
    student, teacher = STUDENT[:, :4, :6], TEACHER[:, :2, :2]
    cells = student.reshape(2, 2, 2, 2, 3, 5).mean((2, 4))
    np.testing.assert_allclose(cat_kd(student, teacher, size=2), np.square(cells - teacher).mean((1, 2, 3)), rtol=1e-5)
    s, t = (x / np.sqrt(np.square(x).sum((1, 2), keepdims=True)) for x in (cells, teacher))
    np.testing.assert_allclose(
        cat_kd(student, teacher, size=2, normalise=True), np.square(s - t).mean((1, 2, 3)), rtol=1e-5
    )


def test_the_classifier_commutes_with_the_cells():
    """What lets a method average the features first."""
    features, kernel = STUDENT, np.random.default_rng(0).normal(size=(5, 3))
    first = cat_kd(adaptive_average_pool(jnp.asarray(features), 4) @ kernel, TEACHER[..., :3], size=4)
    np.testing.assert_allclose(first, cat_kd(features @ kernel, TEACHER[..., :3], size=4), rtol=1e-5)


def test_degenerate_maps_and_dtypes():
    zero = np.zeros_like(STUDENT)
    with jax.enable_x64(True):
        for student, teacher in ((zero, zero), (zero, TEACHER), (TEACHER, zero)):
            value, (gradient, _) = NORMALISED(student, teacher)
            assert np.isfinite(value) and np.isfinite(gradient).all()
        assert RAW(STUDENT, STUDENT)[0] == 0
    low = [jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER)]
    value, _ = RAW(*low)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, RAW(*(x.astype(jnp.float32) for x in low))[0])


def test_errors():
    for maps in (jnp.ones((2, 4, 4, 4)), jnp.ones((1, 7, 7, 5)), jnp.ones((2, 7, 5))):
        with pytest.raises(ValueError, match="with the same B and C"):
            cat_kd(STUDENT, maps, size=2)
    with pytest.raises(ValueError, match="size=0"):
        cat_kd(STUDENT, TEACHER, size=0)
