"""Zipf's label smoothing against its golden, float64 NumPy, and the published gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

from wkd_jax import losses

LOGITS = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
VOTES = np.array([[0, 3, 4, 7, 2], [1, 1, 12, 0, 2]])
LABELS = np.array([3, 2], np.int32)


def on_host(loss, *static):
    """Compiled, with NumPy results."""
    compiled = jax.jit(loss, static_argnames=static)
    return lambda *args, **settings: jax.device_get(compiled(*args, **settings))


zipf, zipf_targets = on_host(losses.zipf, "power"), on_host(losses.zipf_targets, "power")
zipf_ranks, zipf_votes = on_host(losses.zipf_ranks), on_host(losses.zipf_votes)


def test_golden():
    np.testing.assert_array_equal(zipf_ranks(VOTES), [[5, 3, 2, 1, 4], [3, 3, 1, 5, 2]])
    targets = [[0.155844, 0.259740, 0.389610, 0, 0.194805], [0.243902, 0.243902, 0, 0.146341, 0.365854]]
    np.testing.assert_allclose(zipf_targets(VOTES, LABELS), targets, atol=1e-6)
    with jax.enable_x64(True):
        loss = lambda z: losses.zipf(z, VOTES, LABELS).mean()  # noqa: E731
        value, gradient = on_host(jax.value_and_grad(loss))(jnp.asarray(LOGITS))
    cross_entropy = -log_softmax(LOGITS, -1)[[0, 1], LABELS].mean()
    np.testing.assert_allclose((value, cross_entropy + 0.1 * value), (0.294069, 1.308927), atol=1e-6)
    np.testing.assert_allclose(gradient[0], [0.149605, 0.008132, -0.144037, 0, -0.013700], atol=1e-6)
    nontarget = softmax(np.where(np.eye(5)[LABELS] == 1, -np.inf, LOGITS), -1)
    np.testing.assert_allclose(gradient, (nontarget - zipf_targets(VOTES, LABELS)) / 2, atol=1e-7)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_values(power):
    rng = np.random.default_rng(0)
    logits, votes = 3 * rng.normal(size=(2, 3, 9)), rng.integers(0, 4, (2, 3, 9))
    labels = rng.integers(0, 9, (2, 3))
    value = zipf(logits, votes, labels, power=power)
    assert value.shape == (2, 3)
    for row in np.ndindex(2, 3):
        others = np.arange(9) != labels[row]
        u = rankdata(-votes[row], "min")[others] ** -power
        u /= u.sum()
        expected = (u * (np.log(u) - log_softmax(logits[row][others]))).sum()
        np.testing.assert_allclose(value[row], expected, rtol=2e-5, atol=1e-6)


def test_votes_of_positions():
    logits = np.random.default_rng(1).normal(size=(2, 3, 4, 5))
    expected = [np.bincount(x.argmax(-1).ravel(), minlength=5) for x in logits]
    np.testing.assert_array_equal(zipf_votes(logits), expected)
    np.testing.assert_array_equal(zipf_votes(logits.reshape(2, 12, 5)), expected)


def test_ranks_by_logits_and_their_ties():
    np.testing.assert_array_equal(zipf_ranks(LOGITS), [[2, 3, 5, 1, 4], [4, 1, 3, 5, 2]])
    np.testing.assert_array_equal(zipf_ranks(np.zeros((2, 4))), np.ones((2, 4)))


def test_ranks_are_constants():
    """The gradient is that of fixed targets where the logits rank themselves, too."""
    gradient = on_host(jax.grad(lambda z: losses.zipf(z, z, LABELS).sum()))(LOGITS.astype(np.float32))
    nontarget = softmax(np.where(np.eye(5)[LABELS] == 1, -np.inf, LOGITS), -1)
    np.testing.assert_allclose(gradient, nontarget - zipf_targets(LOGITS, LABELS), atol=1e-6)


def test_extreme_and_agreeing_logits():
    z = 1e4 * np.eye(5, dtype=np.float32)[[3, 0]]
    value, gradient = on_host(jax.value_and_grad(lambda z: losses.zipf(z, VOTES, LABELS).sum()))(z)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    agreeing = np.log(np.maximum(zipf_targets(VOTES, LABELS), 1e-3))  # whatever the label's logit
    np.testing.assert_allclose(zipf(agreeing, VOTES, LABELS), [0, 0], atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    z = jnp.asarray(LOGITS, jnp.bfloat16)
    value = zipf(z, VOTES, LABELS)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, zipf(z.astype(jnp.float32), VOTES, LABELS), rtol=1e-6)


def test_errors():
    for call, message in (
        (lambda: zipf(LOGITS, VOTES[:, :4], LABELS), r"\(2, 5\) and \(2, 4\)"),
        (lambda: zipf(LOGITS, VOTES, LABELS, power=-1.0), "power=-1.0"),
        (lambda: zipf_targets(VOTES, LABELS[:1]), "labels must be integers"),
        (lambda: zipf_votes(LOGITS), "logits at positions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
