"""`fgfi` against the formula in float64 NumPy; which positions are near is tested with the anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wkd_jax import losses

SHAPES = [(2, 6, 4, 3), (2, 3, 2, 3)]
rng = np.random.default_rng(0)
STUDENTS, TEACHERS = ([rng.normal(size=shape) for shape in SHAPES] for _ in range(2))
NEAR = [rng.random(shape[:3]) < 0.4 for shape in SHAPES]
NOWHERE = [np.zeros_like(mask) for mask in NEAR]
fgfi = jax.jit(losses.fgfi)


def oracle(students, teachers, near):
    total = sum(np.square(s - t)[m].sum() for s, t, m in zip(students, teachers, near, strict=True))
    return total / (2 * sum(mask.sum() for mask in near))


def test_values():
    np.testing.assert_allclose(fgfi(STUDENTS, TEACHERS, NEAR), oracle(STUDENTS, TEACHERS, NEAR), rtol=1e-5)
    one = fgfi(STUDENTS[:1], TEACHERS[:1], NEAR[:1])
    np.testing.assert_allclose(one, oracle(STUDENTS[:1], TEACHERS[:1], NEAR[:1]), rtol=1e-5)
    assert abs(one - fgfi(STUDENTS, TEACHERS, NEAR)) > 0.01  # positions are counted over the levels together
    np.testing.assert_array_equal(fgfi(STUDENTS, STUDENTS, NEAR), 0)


def test_gradients():
    with jax.enable_x64(True):
        total = jax.jit(lambda s, t: losses.fgfi(s, t, NEAR))
        np.testing.assert_allclose(total(STUDENTS, TEACHERS), oracle(STUDENTS, TEACHERS, NEAR), rtol=1e-12)
        students, teachers = jax.tree.map(jnp.asarray, (STUDENTS, TEACHERS))
        check_grads(lambda s: total(s, teachers), (students,), order=1, modes=["rev"])
        ours, theirs = jax.jit(jax.grad(total, argnums=(0, 1)))(students, teachers)
    for gradient, mask in zip(ours, NEAR, strict=True):
        assert np.all((np.asarray(gradient) != 0) == mask[..., None])
    for gradient in theirs:
        np.testing.assert_array_equal(gradient, 0)


def test_no_object_at_all():
    value, gradient = jax.jit(jax.value_and_grad(lambda s: losses.fgfi(s, TEACHERS, NOWHERE)))(STUDENTS)
    assert value == 0
    assert not any(np.any(g) for g in gradient)


def test_what_is_masked_is_not_read():
    spoilt = [np.where(mask[..., None], t, np.nan) for t, mask in zip(TEACHERS, NEAR, strict=True)]
    run = jax.jit(jax.value_and_grad(losses.fgfi))
    jax.tree.map(np.testing.assert_array_equal, run(STUDENTS, TEACHERS, NEAR), run(STUDENTS, spoilt, NEAR))


def test_bfloat16_is_computed_in_float32():
    half = [[jnp.asarray(x, jnp.bfloat16) for x in side] for side in (STUDENTS, TEACHERS)]
    value = fgfi(*half, NEAR)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(*jax.tree.map(lambda x: np.asarray(x, float), half), NEAR), rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="as many levels of each, got 2, 2 and 1"):
        losses.fgfi(STUDENTS, TEACHERS, NEAR[:1])
    with pytest.raises(ValueError, match=r"near of \[B, H, W\], got \(2, 6, 4, 3\), \(2, 6, 4, 3\) and \(2, 6\)"):
        losses.fgfi(STUDENTS[:1], TEACHERS[:1], [NEAR[0][:, :, 0]])
