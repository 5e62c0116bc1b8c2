"""USKD's three terms against goldens, float64 NumPy written from the formulas, and the authors' gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax import losses

LOGITS = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
WEAK = np.array([[0.3, 0.1, -0.2, 0.9, 0.4], [0.5, 0.4, 0.6, -0.3, 0.1]])
LABELS = np.array([3, 2], np.int32)
MIXED = np.array([[0, 0, 0.3, 0.7, 0], [0.6, 0, 0.4, 0, 0]])


def on_host(loss, *static):
    """Compiled, with NumPy results."""
    compiled = jax.jit(loss, static_argnames=static)
    return lambda *args, **settings: jax.device_get(compiled(*args, **settings))


uskd = on_host(losses.uskd, "rank_from_prob", "group_size")


def oracle(logits, weak, labels, rank_from_prob=False):
    """Row by row; mixed labels have two classes each."""
    rows, classes = logits.shape
    q, w = softmax(logits, -1), softmax(weak, -1)
    soft = labels if labels.ndim == 2 else np.eye(classes)[labels]
    picked = [np.argsort(-row, kind="stable")[: labels.ndim] for row in soft]
    means = [np.mean([q[n, picked[n][i]] ** 2 for n in range(rows)]) for i in range(labels.ndim)]
    terms = []
    for n, chosen in enumerate(picked):
        brackets = [q[n, k] ** 2 + soft[n, k] - mean for k, mean in zip(chosen, means, strict=True)]
        target = -sum(b * np.log(q[n, k]) for b, k in zip(brackets, chosen, strict=True))
        second = q[n] if rank_from_prob else np.log(q[n])
        score = w[n] / (1 - w[n, chosen].sum() + 1e-6) + second / (1 - second[chosen].sum() + 1e-6)
        place = np.empty(classes)
        place[np.argsort(-score, kind="stable")] = np.arange(1, classes + 1)
        others = np.delete(np.arange(classes), chosen)
        u = 1 / place[others] / np.sum(1 / place[others])
        smoothed = 0.9 * soft[n] + 0.1 / classes
        terms.append((target, -(u * log_softmax(logits[n, others])).sum(), -(smoothed * np.log(w[n])).sum()))
    return np.array(terms).T


def means(*args, **settings):
    return np.mean(np.array(uskd(*args, **settings)), axis=1)


def test_goldens():
    code, paper = (means(LOGITS, WEAK, LABELS, rank_from_prob=flag) for flag in (False, True))
    np.testing.assert_allclose(code, [1.181205, 1.282090, 1.244884], atol=1e-6)
    np.testing.assert_allclose(paper[1], 1.277537, atol=1e-6)
    np.testing.assert_allclose([x @ [1, 0.1, 0.005] for x in (code, paper)], [1.315639, 1.315184], atol=1e-6)
    np.testing.assert_allclose(means(LOGITS, WEAK, MIXED), [1.572811, 0.993493, 1.420384], atol=1e-6)


@pytest.mark.parametrize("rank_from_prob", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_values(mixed, rank_from_prob):
    rng = np.random.default_rng(0)
    for _ in range(5):
        logits, weak = 2 * rng.normal(size=(2, 2, 5))
        labels = rng.integers(0, 5, 2)
        if mixed:
            share = rng.uniform(0.1, 0.9, (2, 1))
            labels = share * np.eye(5)[labels] + (1 - share) * np.eye(5)[(labels + [1, 2]) % 5]
        value = uskd(logits, weak, labels, rank_from_prob=rank_from_prob)
        np.testing.assert_allclose(value, oracle(logits, weak, labels, rank_from_prob), rtol=3e-5, atol=1e-6)


def test_rows_of_one_label_are_as_if_integer():
    one_hot = np.eye(5)[LABELS]
    np.testing.assert_allclose(uskd(LOGITS, WEAK, one_hot), uskd(LOGITS, WEAK, LABELS), rtol=1e-6)
    both = uskd(LOGITS, WEAK, np.stack([MIXED[0], one_hot[1]]))
    np.testing.assert_allclose(both[1], [uskd(LOGITS, WEAK, x)[1][i] for i, x in ((0, MIXED), (1, LABELS))], rtol=1e-6)


def test_gradients():
    """With brackets and u constant: bracket (q - y), q~ - u and W - V'. Only the weak term reaches the weak logits."""
    with jax.enable_x64(True):
        stacked = on_host(jax.jacrev(lambda z, a: jnp.stack(losses.uskd(z, a, LABELS)).sum(1), argnums=(0, 1)))
        by_logits, by_weak = stacked(jnp.asarray(LOGITS), jnp.asarray(WEAK))
    y = np.eye(5)[LABELS]
    np.testing.assert_allclose(by_logits[0], np.array([[1.143095], [0.856905]]) * (softmax(LOGITS, -1) - y), atol=1e-6)
    place = np.array([[2, 3, 5, 1, 4], [4, 1, 3, 5, 2]])
    u = (1 - y) / place / np.sum((1 - y) / place, -1, keepdims=True)
    np.testing.assert_allclose(by_logits[1], softmax(LOGITS - 1e4 * y, -1) - u, atol=1e-12)
    np.testing.assert_allclose(by_weak[2], softmax(WEAK, -1) - (0.9 * y + 0.02), atol=1e-12)
    for nothing in (by_logits[2], by_weak[0], by_weak[1]):
        np.testing.assert_array_equal(nothing, np.zeros((2, 5)))
    authors = [0.119539, 0.071333, 0.023227, -0.255501, 0.041402]  # of the weighted sum's mean, first row
    np.testing.assert_allclose((by_logits[0] + 0.1 * by_logits[1])[0] / 2, authors, atol=1e-6)


def test_groups_and_masks():
    rng = np.random.default_rng(1)
    logits, weak = rng.normal(size=(2, 6, 5))
    labels = rng.integers(0, 5, 6)
    halves = [oracle(logits[part], weak[part], labels[part]) for part in (slice(3), slice(3, 6))]
    np.testing.assert_allclose(uskd(logits, weak, labels, group_size=3), np.concatenate(halves, 1), rtol=1e-5)
    where = np.array([True, False, True, True, False, True])
    for counts in (where, np.arange(6) == 2):  # of one example the mean is its own: plain cross-entropy
        masked = np.array(uskd(logits, weak, labels, where=counts))
        np.testing.assert_allclose(masked[:, counts], oracle(logits[counts], weak[counts], labels[counts]), rtol=1e-5)
    np.testing.assert_allclose(masked[0, 2], -log_softmax(logits[2])[labels[2]], rtol=1e-5)
    order = rng.permutation(6)
    moved = uskd(logits[order], weak[order], labels[order], where=where[order])
    np.testing.assert_allclose(moved, np.array(uskd(logits, weak, labels, where=where))[:, order], rtol=1e-5)


def test_ties_and_extremes_are_finite():
    def total(z, a):
        return jnp.stack(losses.uskd(z, a, LABELS)).sum()

    both = on_host(jax.value_and_grad(total, argnums=(0, 1)))
    certain = 1e4 * np.eye(5, dtype=np.float32)[LABELS]
    for z, a in ((0 * certain, 0 * certain), (certain, certain), (certain[::-1], -certain)):
        value, gradients = both(z, a)
        assert np.isfinite(value) and np.isfinite(gradients).all()
        assert np.isfinite(uskd(z, a, LABELS, rank_from_prob=True)).all()
    z = np.array([[0.0, 0.0, 5.0, 0.0, 0.5], [0.0, 0.0, 5.0, 0.0, 0.5]])
    place = np.array([3, 4, 5, 2])  # of the others; 0, 1 and 3 are alike, and the lower class comes first
    u = 1 / place / np.sum(1 / place)
    expected = -(u * log_softmax(z[0, [0, 1, 3, 4]])).sum()
    np.testing.assert_allclose(uskd(z, z, np.array([2, 2]))[1], [expected, expected], rtol=1e-6)


def test_bfloat16_is_computed_in_float32():
    z, a = jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(WEAK, jnp.bfloat16)
    low, high = uskd(z, a, MIXED), uskd(z.astype(jnp.float32), a.astype(jnp.float32), MIXED)
    assert {term.dtype for term in low} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(low, high, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uskd(LOGITS, WEAK[:, :4], LABELS), "must both be"),
        (lambda: uskd(LOGITS, WEAK, LABELS[:1]), "labels must be integers"),
        (lambda: uskd(LOGITS, WEAK, LABELS, group_size=4), "group_size=4: must be at least 1 and divide the 2"),
        (lambda: uskd(LOGITS, WEAK, LABELS, where=np.ones(3, bool)), "where must be"),
        (lambda: uskd(LOGITS[:, :2], WEAK[:, :2], MIXED[:, :2]), "needs more than 2 classes"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
