"""`ban`, `cwtm` and `dkpp` against goldens and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax import losses

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
LABELS = np.array([3, 2], np.int32)
# The entries other than the largest, moved one to the left in class order.
ROTATED = np.array([[1.0, -1.0, 0.5, 3.0, 2.0], [1.0, 2.5, -2.0, 1.0, 0.0]])


def on_host(loss, *static):
    """Compiled, with NumPy results."""
    compiled = jax.jit(loss, static_argnames=static)
    return lambda *args, **settings: jax.device_get(compiled(*args, **settings))


ban, dkpp, cwtm = on_host(losses.ban), on_host(losses.dkpp), on_host(losses.cwtm, "group_size")


def test_goldens():
    np.testing.assert_allclose(ban(STUDENT, TEACHER).mean(), 1.104356, atol=1e-6)
    with_labels = ban(STUDENT, TEACHER).mean() - log_softmax(STUDENT, -1)[[0, 1], LABELS].mean()
    np.testing.assert_allclose(with_labels, 2.383876, atol=2e-6)
    np.testing.assert_allclose(cwtm(STUDENT, TEACHER, LABELS).mean(), 1.293546, atol=1e-6)
    np.testing.assert_allclose(ban(STUDENT, ROTATED).mean(), 1.322054, atol=1e-6)


def test_soft_cross_entropy():
    rng = np.random.default_rng(0)
    z, t = 3 * rng.normal(size=(2, 2, 3, 7))
    p, log_q = softmax(t, -1), log_softmax(z, -1)
    np.testing.assert_allclose(ban(z, t), -(p * log_q).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(ban(z, t) - ban(t, t), (p * (np.log(p) - log_q)).sum(-1), rtol=1e-4, atol=1e-5)


def test_confidence_weights():
    rng = np.random.default_rng(1)
    z, t = 2 * rng.normal(size=(2, 6, 5))
    labels, where = rng.integers(0, 5, 6), np.array([True, True, False, True, True, False])
    confidence = softmax(t, -1).max(-1)
    loss = -log_softmax(z, -1)[np.arange(6), labels]

    def published(rows):
        return (confidence[rows] / confidence[rows].sum() * loss[rows]).sum()

    every = np.arange(6)
    np.testing.assert_allclose(cwtm(z, t, labels).mean(), published(every), rtol=1e-5)
    halves = np.mean([published(every[:3]), published(every[3:])])
    np.testing.assert_allclose(cwtm(z, t, labels, group_size=3).mean(), halves, rtol=1e-5)
    for counts in (where, every == 3):  # alone, an example has its plain cross-entropy
        masked = cwtm(z, t, labels, where=counts)
        np.testing.assert_allclose(masked[counts].mean(), published(every[counts]), rtol=1e-5)
        np.testing.assert_array_equal(masked[~counts], np.zeros(sum(~counts)))
    np.testing.assert_array_equal(cwtm(z, t, labels, where=every > 6), np.zeros(6))
    np.testing.assert_allclose(cwtm(z, t, np.eye(5)[labels]), cwtm(z, t, labels), rtol=1e-5)
    order = rng.permutation(6)
    np.testing.assert_allclose(cwtm(z[order], t[order], labels[order]), cwtm(z, t, labels)[order], rtol=1e-5)


def test_permuted_predictions_are_one_of_all_permutations():
    """Of 6 for four classes each comes up about equally often, by row; the largest never moves."""
    row, t = np.array([0.3, -1.0, 0.7, 2.0]), np.array([1.0, 3.0, 0.0, -1.0])
    orders = [[a, 1, b, c] for a, b, c in ((0, 2, 3), (0, 3, 2), (2, 0, 3), (2, 3, 0), (3, 0, 2), (3, 2, 0))]
    expected = np.array([-(softmax(t[order]) * log_softmax(row)).sum() for order in orders])
    assert len(np.unique(expected.round(4))) == 6
    values = dkpp(np.tile(row, (600, 1)), np.tile(t, (600, 1)), jax.random.key(0))
    nearest = np.abs(values[:, None] - expected).argmin(1)
    np.testing.assert_allclose(values, expected[nearest], atol=1e-5)
    counts = np.bincount(nearest, minlength=6)
    assert (np.abs(counts - 100) < 40).all(), counts  # 4.4 standard deviations


def test_permutations_depend_on_the_key_alone():
    again, other = (dkpp(STUDENT, TEACHER, jax.random.key(k)) for k in (0, 5))
    np.testing.assert_array_equal(dkpp(STUDENT, TEACHER, jax.random.key(0)), again)
    assert not np.allclose(again, other)
    # A teacher whose other classes are alike has nothing to permute.
    flat = 4 * np.eye(5)[[1, 0]]
    np.testing.assert_allclose(dkpp(STUDENT, flat, jax.random.key(1)), ban(STUDENT, flat), rtol=1e-6)


def test_gradients_in_float64():
    """q - p, N w (q - y), and q - p permuted."""
    with jax.enable_x64(True):
        z, t = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        gradients = jax.jit(lambda z: [jax.grad(lambda z, f=f: f(z, t).sum())(z) for f in LOSSES.values()])
        soft, weighted, permuted = jax.device_get(gradients(z))
    p, q = softmax(TEACHER, -1), softmax(STUDENT, -1)
    np.testing.assert_allclose(soft, q - p, atol=1e-12)
    weights = np.array([[0.489793], [0.510207]])
    np.testing.assert_allclose(weighted, 2 * weights * (q - np.eye(5)[LABELS]), atol=2e-6)
    np.testing.assert_allclose(np.sort(q - permuted), np.sort(p), atol=1e-12)
    np.testing.assert_allclose((q - permuted).max(-1), (q - permuted)[[0, 1], p.argmax(-1)])


LOSSES = {
    "ban": losses.ban,
    "cwtm": lambda z, t: losses.cwtm(z, t, LABELS),
    "dkpp": lambda z, t: losses.dkpp(z, t, jax.random.key(0)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_teacher_dtype_and_extremes(loss):
    both = jax.jit(jax.value_and_grad(lambda z, t: loss(z, t).sum(), argnums=(0, 1)))
    certain = 1e4 * np.eye(5, dtype=np.float32)[LABELS]
    for z, t in ((certain, certain), (certain, certain[::-1]), (0 * certain, 0 * certain), (certain, 0 * certain)):
        value, (gradient, nothing) = both(z, t)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        np.testing.assert_array_equal(nothing, np.zeros((2, 5)))
    low = jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16)
    value = jax.jit(loss)(*low)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value.sum(), both(*(x.astype(jnp.float32) for x in low))[0], rtol=1e-6)


def test_errors():
    for call, message in (
        (lambda: ban(STUDENT, TEACHER[:, :4]), r"\(2, 5\) and \(2, 4\)"),
        (lambda: cwtm(STUDENT, TEACHER, LABELS, group_size=3), "group_size=3"),
        (lambda: cwtm(STUDENT, TEACHER, LABELS, where=np.ones(3, bool)), "where must be"),
        (lambda: cwtm(STUDENT[None], TEACHER[None], LABELS[None]), "one row of logits an example"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
