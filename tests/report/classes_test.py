"""Numbers by class: percentages, extremes and the order of similar classes."""

import numpy as np
import pytest

from wkd_jax.report import classes
from wkd_jax.report.read import Evaluation


def evaluation(count, student, teacher=None, agree=None, confusion=None):
    arrays = [None if x is None else np.asarray(x, np.float64) for x in (count, student, teacher, agree, confusion)]
    return Evaluation([f"c{i}" for i in range(len(count))], *arrays)


def test_extremes_are_sorted_and_skip_classes_without_examples():
    rng = np.random.default_rng(0)
    count = np.full(60, 100)
    count[7] = 0
    student, teacher, agree = (rng.permutation(60) * (count > 0) for _ in range(3))
    best, worst, behind, apart = classes.section(evaluation(count, student, teacher, agree))["tables"]
    known = np.flatnonzero(count)

    def names(key):
        return [f"c{i}" for i in sorted(known, key=lambda i: (key[i], i))[:10]]

    assert [row[0] for row in best.rows] == names(-student)
    assert [row[0] for row in worst.rows] == names(student)
    assert [row[0] for row in behind.rows] == names(student - teacher)
    assert [row[0] for row in apart.rows] == names(agree)


def test_overall_agreement_weighs_classes_by_their_examples():
    section = classes.section(evaluation([10, 30], [1, 2], [3, 4], [10, 0]))
    assert section["agreement"] == "25.00"
    assert section["examples"] == "40"
    assert section["everything"].rows == [
        ["c0", "10", "10.0", "30.0", "−20.0", "100.0"],
        ["c1", "30", "6.7", "13.3", "−6.7", "0.0"],
    ]


def test_most_frequent_mistakes():
    confusion = [[5, 3, 0], [0, 4, 1], [2, 0, 8]]
    table = classes.section(evaluation([8, 5, 10], [5, 4, 8], confusion=confusion))["tables"][-1]
    assert table.rows == [["c0", "c1", "3", "37.5"], ["c2", "c0", "2", "20.0"], ["c1", "c2", "1", "20.0"]]


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_similar_order_is_a_permutation(count):
    similarity = np.random.default_rng(count).random((count, count))
    assert sorted(classes.similar_order(similarity)) == list(range(count))


def test_similar_order_puts_groups_together():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.arange(24) % 3)
    similarity = np.where(group[:, None] == group, 0.8, 0.2) + rng.uniform(-0.1, 0.1, (24, 24))
    ordered = group[classes.similar_order(similarity)]
    assert np.count_nonzero(np.diff(ordered)) == 2


def test_similar_order_is_that_of_the_classes_not_of_the_scale():
    similarity = np.random.default_rng(1).random((12, 12))
    similarity = (similarity + similarity.T) / 2
    np.testing.assert_array_equal(classes.similar_order(similarity), classes.similar_order(3 * similarity - 1))
