"""The composable distiller: known losses as special cases, each part against NumPy, gradients, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax.losses.decoupled import dkd
from wkd_jax.losses.dist import dist
from wkd_jax.losses.distiller import distiller
from wkd_jax.losses.kl import kd

rng = np.random.default_rng(0)
STUDENT, TEACHER = 2 * rng.normal(size=(2, 6, 5))
LABELS = np.array([3, 2, 0, 4, 1, 1], np.int32)
T = 2.0

COMBINATIONS = [  # every transformation and every distance
    (("log_softmax",), "kl"),
    (("mask_target", "log_softmax"), "kl"),
    (("softmax",), "pearson"),
    (("softmax", "standardize_batch"), "l2"),
    (("standardize",), "l1"),
    (("mask_target", "standardize"), "l2"),
    (("mask_target", "softmax"), "pearson"),
    (("softmax", "mask_target", "l2_normalize"), "l1"),
    (("l2_normalize", "softmax"), "cosine"),
]


def every(student, teacher, labels, where):
    """[combinations, ...]."""
    return jnp.stack(
        [
            distiller(student, teacher, labels, transformations=chain, distance=distance, temperature=T, where=where)
            for chain, distance in COMBINATIONS
        ]
    )


@jax.jit
def differentiated(student, teacher, labels, where, weights):
    """The combinations, and gradients of their weighted sum."""

    def total(student, teacher):
        values = every(student, teacher, labels, where)
        return jnp.sum(weights * values), values

    (value, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(student, teacher)
    return value, values, gradients


def run(student, teacher, where, weights=None):
    """In float64 and in the shape [2, 3]."""
    weights = np.ones((len(COMBINATIONS), 6)) if weights is None else weights
    rows = [x.reshape(2, 3, 5) for x in (student, teacher)]
    rows += [LABELS.reshape(2, 3), where.reshape(2, 3), weights.reshape(-1, 2, 3)]
    with jax.enable_x64(True):
        value, values, gradients = jax.device_get(differentiated(*rows))
    assert values.dtype == np.float64
    return value, values.reshape(-1, 6), [x.reshape(6, 5) for x in gradients]


def standardize(x, axis, over=slice(None)):
    return (x - x[over].mean(axis, keepdims=True)) / x[over].std(axis, keepdims=True)


def drop(x):
    return np.stack([np.delete(row, label) for row, label in zip(x, LABELS, strict=True)])


def oracle(student, teacher, where):
    """[combinations, 6]; a masked target is deleted."""
    student, teacher = student / T, teacher / T

    def kl(a, b):
        return np.sum(softmax(b, -1) * (log_softmax(b, -1) - log_softmax(a, -1)), -1)

    def pearson(a, b):
        return np.array([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])

    def l1(a, b):
        return np.abs(a - b).mean(-1)

    def l2(a, b):
        return np.square(a - b).mean(-1)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def cosine(a, b):
        return 1 - np.sum(unit(a) * unit(b), -1)

    def probabilities(x):
        return softmax(x, -1)

    expected = [
        kl(student, teacher),
        kl(drop(student), drop(teacher)),
        pearson(probabilities(student), probabilities(teacher)),
        l2(*(standardize(probabilities(x), 0, where) for x in (student, teacher))),
        l1(standardize(student, -1), standardize(teacher, -1)),
        l2(standardize(drop(student), -1), standardize(drop(teacher), -1)),
        pearson(probabilities(drop(student)), probabilities(drop(teacher))),
        l1(unit(drop(probabilities(student))), unit(drop(probabilities(teacher)))),
        cosine(probabilities(unit(student)), probabilities(unit(teacher))),
    ]
    return T**2 * np.array(expected)


def test_values_gradients_and_the_rows_that_count():
    where = np.array([1, 1, 0, 1, 0, 1], bool)
    weights = rng.normal(size=(len(COMBINATIONS), 6))
    _, values, (gradient, by_teacher) = run(STUDENT, TEACHER, where, weights)
    np.testing.assert_allclose(values, oracle(STUDENT, TEACHER, where), rtol=1e-6)
    np.testing.assert_array_equal(by_teacher, 0)
    step = 1e-6 * rng.normal(size=(6, 5))
    ends = [run(STUDENT + s * step, TEACHER, where, weights)[0] for s in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, np.sum(gradient * step), rtol=1e-6)


def test_known_losses_are_special_cases():
    values = run(STUDENT, TEACHER, np.ones(6, bool))[1]

    @jax.jit
    def known(*rows):
        return kd(*rows, temperature=T), dkd(*rows, LABELS, temperature=T)[1], *dist(*rows, temperature=T)

    kl, nontarget, inter, intra = known(*(x.astype(np.float32) for x in (STUDENT, TEACHER)))
    np.testing.assert_allclose(values[0], kl, rtol=1e-4)
    np.testing.assert_allclose(values[1], nontarget, rtol=1e-4)
    np.testing.assert_allclose(values[2], inter, rtol=1e-4)
    np.testing.assert_allclose(values[3].mean() / 2, intra, rtol=1e-4)


def test_constant_and_extreme_inputs_are_finite():
    one_hot = 1e4 * np.eye(5)[LABELS]
    for student, teacher in ((TEACHER, TEACHER), (0 * TEACHER, TEACHER), (TEACHER, one_hot), (one_hot, one_hot[::-1])):
        for where in (np.ones(6, bool), np.eye(6, dtype=bool)[0], np.zeros(6, bool)):
            _, values, (gradient, _) = run(student, teacher, where)
            assert np.isfinite(values).all() and np.isfinite(gradient).all()


def test_bfloat16_is_computed_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER)]
    where = np.ones(6, bool)
    got = jax.jit(every)(*half, LABELS, where)
    assert got.dtype == jnp.float32
    wide = run(*(np.asarray(x, np.float64) for x in half), where)[1]
    np.testing.assert_allclose(got, wide, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformations": ("sigmoid",)}, "unknown transformation 'sigmoid': valid are softmax, .*mask_target"),
        ({"distance": "js"}, "unknown distance 'js': valid are kl, l1"),
        ({"transformations": ("softmax",)}, "'kl' needs a chain that ends with 'log_softmax', got .'softmax'"),
        ({"transformations": ()}, "'kl' needs a chain"),
        ({"transformations": ("mask_target", "log_softmax")}, "'mask_target' needs labels"),
        ({"where": np.ones(5, bool)}, r"where must be bool of shape \(6,\), got bool \(5,\)"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: distiller(*x, **options), STUDENT, TEACHER)
