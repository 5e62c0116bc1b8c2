"""`ickd` against its goldens and float64 NumPy that makes the channel matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.losses import ickd

FORMS = ("cifar", "imagenet", "paper")


def compiled(form):
    return jax.jit(jax.value_and_grad(lambda s, t: ickd(s, t, form=form).mean(), argnums=(0, 1)))


COMPILED = {form: compiled(form) for form in FORMS}


def golden_maps(*shape):
    k = np.arange(np.prod(shape)).reshape(shape)
    return [np.moveaxis(x, 1, -1) for x in (np.sin(0.37 * k), np.cos(0.23 * k))]


def oracle(student, teacher, form):
    matrices = []
    for x in (student, teacher):
        x = x.reshape(len(x), -1, x.shape[-1])
        matrix = np.einsum("bmc,bmd->bcd", x, x)
        if form != "paper":
            norm = np.linalg.norm(matrix, axis=2, keepdims=True)
            matrix = matrix / np.where(norm > 0, norm, 1)
        matrices.append(matrix)
    channels = student.shape[-1]
    divisor = {"cifar": channels, "imagenet": channels * len(student), "paper": channels**2}[form]
    return np.square(matrices[0] - matrices[1]).sum((1, 2)) / divisor


@pytest.mark.parametrize(("form", "golden"), [("cifar", 0.614688), ("imagenet", 0.307344), ("paper", 2.741665)])
def test_goldens(form, golden):
    value, _ = COMPILED[form](*golden_maps(2, 3, 2, 2))  # more positions than channels: through the matrices
    np.testing.assert_allclose(value, golden, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", [((2, 2), (2, 2)), ((1, 3), (2, 2))], ids=["equal", "unequal"])
def test_fewer_positions_than_channels(form, positions):
    """The other way to compute it, with the channel matrices never made, and for maps of two sizes."""
    rng = np.random.default_rng(0)
    student, teacher = (np.abs(rng.normal(size=(3, *size, 9))) for size in positions)
    student[0, ..., 2] = teacher[1, ..., 4] = 0  # channels that a ReLU has shut
    with jax.enable_x64(True):
        assert "f64[3,9,9]" not in str(jax.make_jaxpr(lambda s, t: ickd(s, t, form=form))(student, teacher))
        value, _ = COMPILED[form](student, teacher)
        np.testing.assert_allclose(value, oracle(student, teacher, form).mean(), rtol=1e-9)
        alive = np.abs(rng.normal(size=student.shape))  # the matrix of a shut channel jumps, so none is differentiated
        _, (gradient, to_teacher) = COMPILED[form](alive, teacher)
    np.testing.assert_array_equal(to_teacher, 0)
    direction = rng.normal(size=student.shape)
    ends = [oracle(alive + step * direction, teacher, form).mean() for step in (1e-6, -1e-6)]
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 2, 9)])
def test_degenerate_features(shape):
    x = np.abs(np.random.default_rng(1).normal(size=shape)).astype(np.float32)
    for student, teacher in ((x, x), (0 * x, x), (x, 0 * x), (0 * x, 0 * x)):
        value, (gradient, _) = COMPILED["cifar"](student, teacher)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(value, oracle(student, teacher, "cifar").mean(), atol=1e-6)


def test_scale_and_channel_order_and_teacher():
    student, teacher = golden_maps(2, 3, 2, 2)
    loss = COMPILED["cifar"]
    value, (_, to_teacher) = loss(student, teacher)
    np.testing.assert_array_equal(to_teacher, 0)
    np.testing.assert_allclose(loss(5 * student, teacher)[0], value, rtol=1e-5)
    order = [2, 0, 1]
    np.testing.assert_allclose(loss(student[..., order], teacher[..., order])[0], value, rtol=1e-5)


def test_bfloat16_is_computed_in_float32():
    low = [jnp.asarray(x, jnp.bfloat16) for x in golden_maps(2, 3, 2, 2)]
    value, _ = COMPILED["cifar"](*low)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, COMPILED["cifar"](*(x.astype(jnp.float32) for x in low))[0])


def test_errors():
    x = jnp.ones((2, 3, 4))
    for other in (jnp.ones((2, 3, 5)), jnp.ones((1, 3, 4)), jnp.ones((2, 4))):
        with pytest.raises(ValueError, match="with the same B and C"):
            ickd(x, other)
    with pytest.raises(ValueError, match="form='code': must be 'cifar', 'imagenet' or 'paper'"):
        ickd(x, x, form="code")
