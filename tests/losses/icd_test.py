"""ICD's attention, distillation and auxiliary task against their golden and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import softmax

from wkd_jax import losses

B, Q, N, HEADS, D = 2, 3, 5, 2, 4
rng = np.random.default_rng(0)
QUERY, KEY, VALUE, STUDENT = (rng.normal(size=(B, n, HEADS, D)) for n in (Q, N, N, N))
VALID = np.array([[True, True, True, True, True], [True, False, True, True, False]])
REAL = np.array([[True, True, False], [False, True, False]])
attend = jax.jit(losses.instance_attention)


def waves(*shape):
    """sin(0.37 k) and cos(0.23 k)."""
    k = np.arange(np.prod(shape)).reshape(shape)
    return np.sin(0.37 * k), np.cos(0.23 * k)


def oracle_attention(query, key, value, valid, real):
    scores = np.einsum("bqhd,bnhd->bhqn", query, key) / np.sqrt(query.shape[-1])
    attention = softmax(np.where(valid[:, None, None], scores, -np.inf), -1)
    return np.einsum("bhqn,bnhd->bqhd", attention, value), (attention * real[:, None, :, None]).sum(2)


def oracle_icd(student, teacher, weights):
    normalised = [(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1) + 1e-5)[..., None] for x in (student, teacher)]
    squares = np.square(normalised[0] - normalised[1]).transpose(0, 2, 3, 1)  # [B, heads, d, N]
    return ((squares * weights[:, :, None]).sum(-1) / np.maximum(weights.sum(-1), 1e-6)[..., None]).mean((1, 2))


def test_golden():
    """The distillation term of the authors' code, of 5 positions, 2 images, 2 heads and 3 channels."""
    student, teacher = (x.transpose(1, 0, 2, 3) for x in (waves(5, 2, 2, 3)[0], waves(5, 2, 2, 3)[1]))
    scores = 2 * waves(2, 2, 3, 5)[0]  # [B, heads, Q, N], here the products of queries with unit vectors as keys
    key = np.sqrt(5) * np.broadcast_to(np.eye(5)[:, None], (2, 5, 2, 5))
    real = np.array([[True, True, False], [True, False, False]])
    _, weights = attend(scores.transpose(0, 2, 1, 3), key, key, valid=np.ones((2, 5), bool), real=real)
    np.testing.assert_allclose(weights, (softmax(scores, -1) * real[:, None, :, None]).sum(2), rtol=1e-5)
    np.testing.assert_allclose(losses.icd(student, teacher, weights).mean(), 1.904422, atol=2e-6)


def test_attention():
    attended, weights = attend(QUERY, KEY, VALUE, valid=VALID, real=REAL)
    expected = oracle_attention(QUERY, KEY, VALUE, VALID, REAL)
    np.testing.assert_allclose(attended, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weights, expected[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(weights)[1, :, ~VALID[1]], 0)
    spoilt = (np.where(VALID[..., None, None], x, 1e30) for x in (KEY, VALUE))
    for ours, others in zip((attended, weights), attend(QUERY, *spoilt, valid=VALID, real=REAL), strict=True):
        np.testing.assert_allclose(ours, others, rtol=1e-6, atol=1e-7)


def test_gradients_of_attention():
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, (QUERY, KEY, VALUE)))

        def both(*arrays):
            return losses.instance_attention(*arrays, valid=VALID, real=REAL)

        run = jax.jit(both)
        for ours, expected in zip(run(*arrays), oracle_attention(QUERY, KEY, VALUE, VALID, REAL), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-12)
        check_grads(jax.jit(lambda *x: jnp.sin(both(*x)[0])), arrays, order=1, modes=["rev"])
        for gradient in jax.jit(jax.grad(lambda *x: jnp.sum(both(*x)[1] ** 2), argnums=(0, 1, 2)))(*arrays):
            np.testing.assert_array_equal(gradient, 0)


def test_nothing_to_see_and_nothing_to_ask_about():
    hidden, nobody = np.zeros_like(VALID), np.zeros_like(REAL)

    def run(valid, real):
        def total(query, key, student):
            attended, weights = losses.instance_attention(query, key, VALUE, valid=valid, real=real)
            return jnp.sum(attended) + jnp.sum(losses.icd(student, VALUE, weights)), (attended, weights)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(QUERY, KEY, STUDENT)

    (value, (attended, weights)), gradients = run(hidden, REAL)
    assert value == 0 and not np.any(attended) and not np.any(weights) and not any(map(np.any, gradients))
    (value, (attended, weights)), (*gradients, of_student) = run(VALID, nobody)
    assert not np.any(weights) and not np.any(of_student)
    np.testing.assert_allclose(value, np.sum(attended), rtol=1e-6)
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in gradients)


def test_no_array_of_all_heads():
    """Of the values and the gradient together, less than one [B, heads, Q, N] array is kept."""
    batch, queries, positions, heads, channels = 1, 64, 2048, 16, 4
    shapes = [jax.ShapeDtypeStruct((batch, n, heads, channels), jnp.float32) for n in (queries, positions, positions)]
    masks = [jax.ShapeDtypeStruct((batch, n), bool) for n in (positions, queries)]

    def total(query, key, value, valid, real):
        attended, weights = losses.instance_attention(query, key, value, valid=valid, real=real)
        return jnp.sum(jnp.square(attended)), weights

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    temporary = run.lower(*shapes, *masks).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * batch * heads * queries * positions


def test_distillation():
    weights = oracle_attention(QUERY, KEY, VALUE, VALID, REAL)[1]
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, (STUDENT, VALUE, weights)))
        run = jax.jit(losses.icd)
        np.testing.assert_allclose(run(*arrays), oracle_icd(STUDENT, VALUE, weights), rtol=1e-12)
        check_grads(lambda student: run(student, *arrays[1:]), arrays[:1], order=1, modes=["rev"])
        gradients = jax.jit(jax.grad(lambda *x: losses.icd(*x).sum(), argnums=(0, 1, 2)))
        for gradient in gradients(*arrays)[1:]:
            np.testing.assert_array_equal(gradient, 0)
        flat = jnp.ones((B, N, HEADS, D))  # no variance over the channels
        assert all(np.all(np.isfinite(gradients(x, y, arrays[2])[0])) for x, y in ((flat, flat), (flat, VALUE)))
    np.testing.assert_allclose(losses.icd(STUDENT, VALUE, weights), oracle_icd(STUDENT, VALUE, weights), rtol=1e-4)
    np.testing.assert_array_equal(losses.icd(STUDENT, VALUE, np.zeros_like(weights)), 0)
    np.testing.assert_allclose(losses.icd(3 * STUDENT + 5, STUDENT, weights), 0, atol=1e-6)


def test_auxiliary_task():
    outputs, real = rng.normal(size=(B, Q, 5)), REAL
    distances = rng.uniform(0.05, 0.4, (B, Q, 4))
    with jax.enable_x64(True):
        run = jax.jit(losses.icd_auxiliary)
        identification, localisation = run(jnp.asarray(outputs), jnp.asarray(distances), real)
        probability, predicted = (1 / (1 + np.exp(-x)) for x in (outputs[..., 0], outputs[..., 1:]))
        np.testing.assert_allclose(identification, -np.log(np.where(real, probability, 1 - probability)), rtol=1e-12)
        left, top, right, bottom = np.moveaxis(distances, -1, 0)
        sides = np.stack([left + right, top + bottom, left + right, top + bottom], -1)
        np.testing.assert_allclose(localisation, (np.abs(predicted - distances) / sides).sum(-1), rtol=1e-12)
        check_grads(lambda x: run(x, jnp.asarray(distances), real), (jnp.asarray(outputs),), order=1, modes=["rev"])
        large = jnp.asarray(1e3 * outputs)
        values = run(large, jnp.zeros((B, Q, 4)), real)  # a box without extent
        assert all(np.all(np.isfinite(value)) for value in values)


def test_bfloat16_is_computed_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (QUERY, KEY, VALUE, STUDENT)]
    wide = [np.asarray(x, float) for x in half]
    attended, weights = attend(*half[:3], valid=VALID, real=REAL)
    expected = oracle_attention(*wide[:3], VALID, REAL)
    value = losses.icd(half[3], half[2], weights)
    assert {x.dtype for x in (attended, weights, value)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(attended, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, oracle_icd(wide[3], wide[2], expected[1]), rtol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match=r"valid must be \(2, 5\), got \(2, 4\)"):
        losses.instance_attention(QUERY, KEY, VALUE, valid=VALID[:, 1:], real=REAL)
    with pytest.raises(ValueError, match=r"weights of \[B, heads, N\], got .* and \(2, 5, 2\)"):
        losses.icd(STUDENT, VALUE, np.ones((B, N, HEADS)))
    with pytest.raises(ValueError, match=r"outputs must be \(2, 3, 5\)"):
        losses.icd_auxiliary(np.ones((B, Q, 4)), np.ones((B, Q, 4)), REAL)
