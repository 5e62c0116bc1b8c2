"""`ofa` against float64 NumPy and the values and gradients of the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import log_softmax, softmax

from wkd_jax.losses.kl import kl
from wkd_jax.losses.ofa import ofa

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
LABELS = np.array([3, 2], np.int32)


def oracle(student, teacher, labels, power, temperature, form):
    p, one_hot = softmax(teacher / temperature, -1), np.eye(student.shape[-1])[labels]
    forms = {"code": (p + one_hot) ** power - one_hot, "paper": np.where(one_hot, (1 + p) ** power, p)}
    return -(forms[form] * log_softmax(student / temperature, -1)).sum(-1)


@pytest.mark.parametrize(
    ("form", "values"),
    [("code", [1.104356, 0.976524, 0.922845]), ("paper", [2.383876, 2.463721, 2.594584])],
)
def test_goldens(form, values):
    for power, value in zip((1.0, 1.2, 1.5), values, strict=True):
        np.testing.assert_allclose(ofa(STUDENT, TEACHER, LABELS, power=power, form=form).mean(), value, atol=1e-6)


def test_golden_gradient():
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda z: ofa(z, TEACHER, LABELS, power=1.5).mean()))(jnp.asarray(STUDENT))
    np.testing.assert_allclose(gradient[0], [0.068741, 0.062757, 0.026986, -0.198194, 0.039709], atol=1e-6)


@pytest.mark.parametrize(("shape", "form"), [((5,), "code"), ((2, 3, 7), "paper")])
def test_values(shape, form):
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.normal(size=(2, *shape))
    labels = rng.integers(0, shape[-1], shape[:-1])
    settings = {"power": 1.3, "temperature": 2.0, "form": form}
    expected = oracle(student, teacher, labels, **settings)
    np.testing.assert_allclose(
        jax.jit(functools.partial(ofa, **settings))(student, teacher, labels), expected, rtol=1e-5
    )


def test_power_one_has_the_gradient_of_kl():
    student = STUDENT.astype(np.float32)
    of_ofa, of_kl = (
        jax.jit(jax.grad(loss))(student)
        for loss in (
            lambda z: ofa(z, TEACHER, LABELS, temperature=3.0).sum(),
            lambda z: kl(z, TEACHER, temperature=3.0).sum(),
        )
    )
    np.testing.assert_allclose(of_ofa, of_kl, atol=1e-6)


def test_gradients():
    with jax.enable_x64(True):
        loss = jax.jit(lambda z: ofa(z, TEACHER, LABELS, power=1.4, temperature=1.5).sum())
        check_grads(loss, (jnp.asarray(STUDENT),), order=1, modes=["rev"])
    to_teacher = jax.jit(jax.grad(lambda t: ofa(STUDENT, t, LABELS, power=1.4).sum()))
    np.testing.assert_array_equal(to_teacher(TEACHER.astype(np.float32)), np.zeros_like(TEACHER))


def test_small_probabilities_keep_their_digits():
    """(1 + p)^e - 1 is e p for a small p, also where 1 + p is 1 in float32."""
    teacher = np.array([[0.0, 20.0], [0.0, 0.0]])
    student = np.array([[0.0, 50.0], [0.0, 0.0]])  # the target's log q is -50, the other's 0
    value = ofa(student, teacher, np.array([0, 0]), power=1.5)[0]
    np.testing.assert_allclose(value, 50 * 1.5 * np.exp(-20.0), rtol=1e-5)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_extremes_are_finite(form):
    one_hot = np.array([[1e4, 0, 0, 0, 0], [0, 0, 1e4, 0, 0]])  # a wrong teacher, and a right one
    loss = jax.jit(jax.value_and_grad(lambda z: ofa(z, one_hot, LABELS, power=1.5, form=form).sum()))
    for student in (STUDENT, np.array([[1e4, -1e4, 0, 0, 0]] * 2), one_hot):
        value, gradient = loss(student.astype(np.float32))
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_a_class_ruled_out_by_both_equals_dropping_it():
    masked = [np.concatenate([x, np.full((2, 1), -np.inf)], axis=1).astype(np.float32) for x in (STUDENT, TEACHER)]
    loss = jax.jit(jax.value_and_grad(lambda z, t: ofa(z, t, LABELS, power=1.5).sum()))
    value, gradient = loss(*masked)
    expected, expected_gradient = loss(STUDENT.astype(np.float32), TEACHER.astype(np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :-1], expected_gradient, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, -1], 0)


def test_bfloat16_is_computed_in_float32():
    student, teacher = jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16)
    value = ofa(student, teacher, LABELS, power=1.5)
    assert value.dtype == jnp.float32
    wide = ofa(student.astype(jnp.float32), teacher.astype(jnp.float32), LABELS, power=1.5)
    np.testing.assert_array_equal(value, wide)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": 0.9}, "power=0.9: must be 1 or more"),
        ({"power": float("nan")}, "power=nan"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"form": "Code"}, "form='Code'"),
        ({"labels": np.eye(5)[LABELS]}, "take the argmax"),
        ({"labels": LABELS.astype(np.float32)}, "labels must be integers"),
        ({"teacher_logits": TEACHER[:, :4]}, r"\(2, 5\) and \(2, 4\)"),
    ],
)
def test_errors(changes, message):
    arguments = {"student_logits": STUDENT, "teacher_logits": TEACHER, "labels": LABELS, **changes}
    with pytest.raises(ValueError, match=message):
        ofa(**arguments)
