"""The parts of CRD against float64 NumPy: goldens of one step, gradients, chunks, masks, rows that come up twice."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.losses.crd import crd, crd_constant, crd_scores, crd_update

N, K, TEMPERATURE = 8, 3, 0.07
INDEX = np.array([[0, 3, 5, 6], [1, 2, 4, 7]])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def wave(function, step, shape, shift):
    return unit(function(step * np.arange(np.prod(shape))).reshape(shape) + shift)


STUDENT, TEACHER = wave(np.sin, 0.37, (2, 3), 0.5), wave(np.cos, 0.23, (2, 3), 0.5)
STUDENT_BANK, TEACHER_BANK = wave(np.sin, 0.37, (N, 3), 0.1), wave(np.cos, 0.23, (N, 3), 0.1)
scores = functools.partial(crd_scores, temperature=TEMPERATURE)


def oracle(bank, index, embedding, constant=None, num_examples=N):
    """(loss of each example, constant) from the paper's own quantities."""
    o = np.exp(np.einsum("bkd,bd->bk", bank[index], embedding) / TEMPERATURE)
    constant = o.mean() * num_examples if constant is None else constant
    o, c = o / constant, (index.shape[1] - 1) / num_examples
    own = np.log(o[:, 0] / (o[:, 0] + c + 1e-7))
    return -own - np.log(c / (o[:, 1:] + c + 1e-7)).sum(1), constant


@jax.jit
def step(bank, embedding):
    """(loss, constant, d mean loss / d embedding, d mean loss / d bank) on a first batch."""

    def loss(embedding, bank):
        similarity = scores(bank, INDEX, embedding)
        constant = crd_constant(similarity, num_examples=N)
        value = crd(similarity, constant, num_examples=N)
        return value.mean(), (value, constant)

    (_, (value, constant)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(embedding, bank)
    return value, constant, *gradients


@pytest.mark.parametrize(
    ("bank", "embedding", "constant", "expected"),
    [(TEACHER_BANK, STUDENT, 2386588.768976, 0.991996), (STUDENT_BANK, TEACHER, 4827650.712853, 2.422533)],
    ids=["student", "teacher"],
)
def test_goldens_and_gradients(bank, embedding, constant, expected):
    with jax.enable_x64(True):
        value, estimate, gradient, to_bank = map(np.asarray, step(bank, embedding))
    np.testing.assert_allclose(estimate, constant, rtol=1e-12)
    np.testing.assert_allclose(value.mean(), expected, atol=6e-7)
    np.testing.assert_allclose(value, oracle(bank, INDEX, embedding)[0], rtol=1e-12)
    numeric = np.zeros_like(embedding)  # with the constant fixed, which is no function of the embedding
    for at in np.ndindex(embedding.shape):
        shift = np.zeros_like(embedding)
        shift[at] = 1e-6
        ends = [oracle(bank, INDEX, embedding + s, constant)[0].mean() for s in (shift, -shift)]
        numeric[at] = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(to_bank, 0)


def test_golden_in_float32():
    value, constant, gradient, _ = step(TEACHER_BANK.astype(np.float32), STUDENT.astype(np.float32))
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(constant, 2386588.768976, rtol=1e-5)
    np.testing.assert_allclose(value.mean(), 0.991996, rtol=1e-5)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (TEACHER_BANK, STUDENT)]
    value, _, gradient, _ = step(*low)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, step(*(x.astype(jnp.float32) for x in low))[0], rtol=1e-6)


def test_sum_of_many_small_negatives():
    """Each of 16384 terms is near 1e-5, which a sum of logarithms of float32 near 1 would lose."""
    similarity = np.random.default_rng(0).normal(size=(2, 16385)) * 0.5
    o, c = np.exp(similarity) / 50000.0, 16384 / 50000
    expected = -np.log(o[:, 0] / (o[:, 0] + c + 1e-7)) - np.log(c / (o[:, 1:] + c + 1e-7)).sum(1)
    np.testing.assert_allclose(crd(similarity.astype(np.float32), 50000.0, num_examples=50000), expected, rtol=2e-6)


def test_scores_in_chunks(monkeypatch):
    bank, embedding = np.random.default_rng(1).normal(size=(20, 6)), np.random.default_rng(2).normal(size=(3, 6))
    index = np.random.default_rng(3).integers(0, 20, (3, 11))
    module = importlib.import_module("wkd_jax.losses.crd")  # the package has the function under that name
    monkeypatch.setattr(module, "_GATHERED_BYTES", 3 * 6 * 8 * 4)  # four columns a chunk, and a rest of three
    with jax.enable_x64(True):
        chunked = jax.jit(lambda h: crd_scores(bank, index, h, temperature=0.5))
        text = str(jax.make_jaxpr(chunked)(embedding))
        assert "f64[4,3,6]" in text and "f64[11,3,6]" not in text
        value, pull = jax.vjp(chunked, embedding)
        (gradient,) = pull(2 * value)  # of the sum of squares
    rows = bank[index]
    expected = 2 * np.einsum("bkd,bd->bk", rows, embedding)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, 4 * np.einsum("bkd,bk->bd", rows, expected), rtol=1e-12)


def test_constant_leaves_out_what_does_not_count():
    similarity = jnp.asarray(np.random.default_rng(4).normal(size=(3, 4)), jnp.float32)
    where = jnp.array([True, False, True])
    expected = np.exp(np.asarray(similarity))[np.asarray(where)].mean() * 10
    spoilt = similarity.at[1].set(jnp.nan)
    np.testing.assert_allclose(crd_constant(spoilt, num_examples=10, where=where), expected, rtol=1e-6)
    assert crd_constant(spoilt, num_examples=10, where=jnp.zeros(3, bool)) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: crd_constant(x, num_examples=10))(similarity), 0)


@jax.jit
def update(bank, index, embedding, where):
    """(memory, gradients of its sum)."""
    loss = lambda m, h: (lambda new: (new.sum(), new))(crd_update(m, index, h, where=where))  # noqa: E731
    gradients, bank = jax.grad(loss, argnums=(0, 1), has_aux=True)(bank, embedding)
    return bank, gradients


def test_update():
    where = np.array([True, True, False, False, False])
    index, new = np.array([0, 1, 2, 3, 4]), np.concatenate([STUDENT, np.full((3, 3), np.nan)])
    with jax.enable_x64(True):
        bank, gradients = update(STUDENT_BANK, index, new, where)
    np.testing.assert_allclose(bank[0], [0.219037, 0.538078, 0.813938], atol=6e-7)
    np.testing.assert_allclose(bank[:2], unit(0.5 * STUDENT_BANK[:2] + 0.5 * STUDENT), rtol=1e-12)
    np.testing.assert_array_equal(bank[2:], STUDENT_BANK[2:])
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
    slow = crd_update(STUDENT_BANK, np.array([0, 1]), STUDENT, momentum=0.9)
    np.testing.assert_allclose(slow[:2], unit(0.9 * STUDENT_BANK[:2] + 0.1 * STUDENT), rtol=1e-5)


def test_the_last_valid_example_of_a_row_decides():
    new = unit(np.random.default_rng(5).normal(size=(5, 3)))
    new[1] = -STUDENT_BANK[2]  # nothing is left of this row, and no NaN
    index, where = np.array([4, 2, 4, 7, 4]), np.array([True, True, True, False, False])
    expected = STUDENT_BANK.copy()
    expected[2], expected[4] = 0, unit(0.5 * STUDENT_BANK[4] + 0.5 * new[2])
    with jax.enable_x64(True):
        np.testing.assert_allclose(update(STUDENT_BANK, index, new, where)[0], expected, rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="temperature=0.0: must be above 0"):
        crd_scores(STUDENT_BANK, INDEX, STUDENT, temperature=0.0)
    with pytest.raises(ValueError, match=r"\[N, D\], \[B, K\] and \[B, D\]"):
        scores(STUDENT_BANK, INDEX[:1], STUDENT)
    with pytest.raises(ValueError, match=r"K >= 1 .* got \(2, 1\)"):
        crd(jnp.ones((2, 1)), 1.0, num_examples=N)
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"momentum={momentum}: must be from 0 to below 1"):
            crd_update(STUDENT_BANK, INDEX[:, 0], STUDENT, momentum=momentum)
