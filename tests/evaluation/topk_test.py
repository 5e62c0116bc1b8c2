"""Sums over padded batches against plain NumPy on the unpadded data."""

import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.evaluation import topk


@pytest.fixture(name="scores")
def _scores():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 50)
    student, teacher = rng.normal(size=(2, 50, 7)).astype(np.float32)
    student[:10] = np.round(student[:10])  # ties
    student[10] = 0.0  # all equal: argmax says class 0
    return student, teacher, labels


def padded(x, start, batch):
    """Rows start..start+batch, filled up with threes."""
    part = x[start : start + batch]
    return jnp.asarray(np.concatenate([part, np.full((batch - len(part), *x.shape[1:]), 3, x.dtype)]))


def padded_sums(student, teacher, labels, batch):
    parts = []
    for start in range(0, len(labels), batch):
        arrays = [x if x is None else padded(x, start, batch) for x in (student, teacher, labels)]
        parts.append(topk.sums(*arrays, jnp.arange(start, start + batch) < len(labels)))
    return parts


@pytest.mark.parametrize("batch", [7, 16, 50, 64])
def test_metrics_equal_numpy_whatever_the_padding(scores, batch):
    student, teacher, labels = scores
    got = topk.summarise(padded_sums(student, teacher, labels, batch))
    s, t = student.argmax(-1), teacher.argmax(-1)
    order = np.argsort(-student, axis=-1, kind="stable")
    top5 = (order[:, :5] == labels[:, None]).any(-1)
    x = student.astype(np.float64)
    nll = np.log(np.exp(x).sum(-1)) - x[np.arange(50), labels]
    assert got["examples"] == 50
    assert got["student_top1"] == pytest.approx(100 * np.mean(s == labels))
    assert got["student_top5"] == pytest.approx(100 * np.mean(top5))
    assert got["teacher_top1"] == pytest.approx(100 * np.mean(t == labels))
    assert got["agreement"] == pytest.approx(100 * np.mean(s == t))
    assert got["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    for name, flags in {
        "count": labels >= 0,
        "student_correct": s == labels,
        "teacher_correct": t == labels,
        "agree": s == t,
    }.items():
        np.testing.assert_array_equal(got[name], np.bincount(labels[flags], minlength=7))
    expected = np.zeros((7, 7), int)
    np.add.at(expected, (labels, s), 1)
    np.testing.assert_array_equal(got["confusion"], expected)


def test_without_a_teacher(scores):
    student, _, labels = scores
    got = topk.summarise(padded_sums(student, None, labels, 16))
    assert "teacher_top1" not in got and "agree" not in got
    assert got["student_correct"].sum() == (student.argmax(-1) == labels).sum()


def test_what_is_not_finite_is_never_right():
    logits = jnp.full((4, 3), jnp.nan)
    sums = topk.sums(logits, None, jnp.array([0, 1, 2, 0]), jnp.ones(4, bool))
    assert int(sums["top1"]) == int(sums["top5"]) == int(sums["student_correct"].sum()) == 0
