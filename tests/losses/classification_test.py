"""`cross_entropy` against float64 NumPy: hard and soft labels, smoothing, and labels that do not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wkd_jax.losses.classification import cross_entropy

LOGITS = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
LABELS = np.array([3, 2])


def oracle(logits, targets, smoothing=0.0):
    """Cross-entropy against (1 - e) y + e / C."""
    log_q = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return -np.sum(((1 - smoothing) * targets + smoothing / logits.shape[-1]) * log_q, axis=-1)


def test_golden():
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS).mean(), 1.279520, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_and_soft_labels(shape, smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=shape), rng.integers(0, 5, shape[:-1])
    soft = rng.dirichlet(np.ones(5), shape[:-1])
    hard = cross_entropy(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(hard, oracle(logits, np.eye(5)[labels], smoothing), rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(logits, np.eye(5)[labels], label_smoothing=smoothing), hard, rtol=1e-5)
    mixed = cross_entropy(logits, soft, label_smoothing=smoothing)
    np.testing.assert_allclose(mixed, oracle(logits, soft, smoothing), rtol=1e-5)
    jitted = jax.jit(cross_entropy, static_argnames="label_smoothing")(logits, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(jitted, hard, rtol=1e-6)


def test_vmap_equals_batch():
    np.testing.assert_allclose(jax.vmap(cross_entropy)(LOGITS, LABELS), cross_entropy(LOGITS, LABELS), rtol=1e-6)


def test_gradients():
    gradient = jax.grad(lambda z: cross_entropy(z, LABELS).sum())(LOGITS.astype(np.float32))
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, softmax - np.eye(5)[LABELS], atol=1e-6)
    with jax.enable_x64(True):
        loss = lambda z: cross_entropy(z, jnp.asarray(LABELS), label_smoothing=0.1)  # noqa: E731
        check_grads(loss, (jnp.asarray(LOGITS),), order=1)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_does_not_exist_gives_nan_and_only_there(label):
    loss = cross_entropy(LOGITS, np.array([3, label]))
    assert np.isfinite(loss[0]) and np.isnan(loss[1])
    masked = jax.grad(lambda z: jnp.where(jnp.array([True, False]), cross_entropy(z, np.array([3, label])), 0).sum())
    assert np.isfinite(masked(LOGITS.astype(np.float32))).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits_are_finite(smoothing):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    loss = lambda z: cross_entropy(z, jnp.array([0, 0]), label_smoothing=smoothing)  # noqa: E731
    np.testing.assert_allclose(loss(logits), oracle_extreme(smoothing), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda z: loss(z).sum())(logits)).all()


def oracle_extreme(smoothing):
    minus_log_q = np.array([[0.0, 2e4, 1e4], [2e4, 0.0, 1e4]])
    return (1 - smoothing) * minus_log_q[:, 0] + smoothing * minus_log_q.mean(-1)


def test_bfloat16_is_computed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    value = cross_entropy(logits, LABELS, label_smoothing=0.1)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, cross_entropy(logits.astype(jnp.float32), LABELS, label_smoothing=0.1))


@pytest.mark.parametrize("labels", [np.array([1]), np.ones((2, 4)), np.ones((2, 5), bool), np.array([0.0, 1.0])])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match=r"integers \[2\] or floats \[2, 5\]"):
        cross_entropy(LOGITS, labels)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
