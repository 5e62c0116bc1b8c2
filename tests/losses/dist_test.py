"""DIST against the authors' numbers, NumPy's correlations, groups of examples, masks, and constant inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from wkd_jax.losses.dist import dist

STUDENT = np.array(
    [[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8], [-0.3, 0.6, 1.1, 0.4, -1.2], [0.9, -0.7, 0.2, 0.1, 1.4]]
)
TEACHER = np.array(
    [[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0], [0.5, -0.2, 2.2, 0.1, -0.8], [1.8, -1.0, 0.0, 0.6, 1.2]]
)
rng = np.random.default_rng(0)


def differentiated(**options):
    """Compiled: (student, teacher, temperature, where) -> value, (inter, intra), gradients of inter.mean() + intra."""

    @jax.jit
    def run(student, teacher, temperature, where):
        def total(student, teacher):
            inter, intra = dist(student, teacher, temperature=temperature, where=where, **options)
            return inter.mean() + intra, (inter, intra)

        return jax.value_and_grad(total, (0, 1), has_aux=True)(student, teacher)

    def in_float64(*arguments):
        with jax.enable_x64(True):
            (value, terms), gradients = jax.device_get(run(*arguments))
        assert {term.dtype for term in terms} == {np.dtype(np.float64)}
        return value, terms, gradients

    return in_float64


whole = differentiated()
pairs = differentiated(group_size=2)


def correlations(a, b):
    """Of rows, with the 1e-8 of the authors' code."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-8)


def oracle(student, teacher, temperature):
    """(inter [B], intra) of [B, C]."""
    p, q = softmax(teacher / temperature, -1), softmax(student / temperature, -1)
    return temperature**2 * (1 - correlations(p, q)), temperature**2 * (1 - correlations(p.T, q.T).mean())


def test_goldens():
    everything = np.ones(4, bool)
    for temperature, expected in ((1.0, (0.142133, 0.041689)), (4.0, (1.867907, 1.061812))):
        value, (inter, intra), gradients = whole(STUDENT, TEACHER, temperature, everything)
        assert inter.shape == (4,) and intra.shape == ()
        np.testing.assert_allclose([inter.mean(), intra], expected, atol=1e-6)
        np.testing.assert_array_equal(gradients[1], 0)
    np.testing.assert_allclose(value, 2.929720, atol=1e-6)
    np.testing.assert_allclose(gradients[0][0], [0.059652, -0.121307, 0.092944, 0.038322, -0.069611], atol=1e-6)
    order = np.array([2, 0, 3, 1])
    _, moved, _ = whole(STUDENT[order], TEACHER[order], temperature, everything)
    np.testing.assert_allclose(moved[0], inter[order])
    np.testing.assert_allclose(moved[1], intra)

    half = [jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER)]
    got = jax.jit(lambda *x: dist(*x, temperature=4.0))(*half)
    for term, wide in zip(got, whole(*(np.asarray(x, np.float64) for x in half), 4.0, everything)[1], strict=True):
        assert term.dtype == jnp.float32
        np.testing.assert_allclose(term, wide, rtol=1e-4)


def test_masked_equals_dropped():
    where = np.array([True, True, False, True])
    _, (inter, intra), (gradient, _) = whole(STUDENT, TEACHER, 2.0, where)
    expected = oracle(STUDENT, TEACHER, 2.0)[0], oracle(STUDENT[where], TEACHER[where], 2.0)[1]
    np.testing.assert_allclose(inter, expected[0], rtol=1e-10)  # not masked
    np.testing.assert_allclose(intra, expected[1], rtol=1e-10)
    step = 1e-5 * rng.normal(size=(4, 5))
    ends = [whole(STUDENT + s * step, TEACHER, 2.0, where)[0] for s in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, np.sum(gradient * step), rtol=1e-6)
    changed = np.where(where[:, None], STUDENT, 100 * STUDENT)
    assert whole(changed, TEACHER, 2.0, where)[1][1] == intra
    value, (_, intra), (gradient, _) = whole(STUDENT, TEACHER, 2.0, np.zeros(4, bool))
    assert intra == 0 and np.isfinite(gradient).all()


def test_groups_of_images_with_regions():
    """[6, 3, C] in groups of two images: six rows each, of which some count; in the last none does."""
    student, teacher = 2 * rng.normal(size=(2, 6, 3, 5))
    where = np.ones((6, 3), bool)
    where[0, 1] = where[3] = where[4:] = False
    inter, intra = pairs(student, teacher, 2.0, where)[1]
    flat = [x.reshape(18, 5) for x in (student, teacher)]
    np.testing.assert_allclose(inter.reshape(18), oracle(*flat, 2.0)[0], rtol=1e-10)
    groups = [[x[i : i + 2][where[i : i + 2]] for x in (student, teacher)] for i in (0, 2)]
    np.testing.assert_allclose(intra, np.mean([oracle(*rows, 2.0)[1] for rows in groups]), rtol=1e-10)


@pytest.mark.parametrize(
    "student",
    [TEACHER, 0 * TEACHER, 1e4 * np.eye(5)[[0, 0, 0, 0]], 1e4 * np.eye(5)[[0, 1, 2, 3]]],
    ids=["equal", "zero", "one answer", "one-hot"],
)
def test_constant_inputs_are_finite(student):
    one = np.array([True, False, False, False])
    for left, right in ((student, TEACHER), (TEACHER, student)):
        for where in (np.ones(4, bool), one):
            value, _, gradients = whole(left, right, 1.0, where)
            assert np.isfinite(value) and np.isfinite(gradients[0]).all()
    inter, intra = whole(TEACHER, TEACHER, 1.0, np.ones(4, bool))[1]
    np.testing.assert_allclose([*inter, intra], 0, atol=1e-6)
    assert whole(TEACHER, TEACHER, 1.0, one)[1][1] == 1  # one example correlates with nothing


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((STUDENT, TEACHER[:, :4]), {}, r"\(4, 5\) and \(4, 4\)"),
        ((STUDENT[0], TEACHER[0]), {}, r"needs \[B, ..., C\]"),
        ((STUDENT, TEACHER), {"group_size": 3}, "group_size=3: .*divide the 4"),
        ((STUDENT, TEACHER), {"group_size": 0}, "group_size=0"),
        ((STUDENT, TEACHER), {"where": np.ones(5, bool)}, r"where must be bool of shape \(4,\), got bool \(5,\)"),
        ((STUDENT, TEACHER), {"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: dist(*x, **options), *arguments)
