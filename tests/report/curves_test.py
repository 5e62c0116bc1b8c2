"""Which curves a report draws, and where."""

import numpy as np

from wkd_jax.report import curves
from wkd_jax.report.read import Curve


def curve(values, steps=None):
    return Curve(np.arange(1, len(values) + 1) if steps is None else np.asarray(steps), np.asarray(values, np.float64))


def captions(groups):
    return {group.title: [figure.caption for figure in group.figures] for group in groups}


def test_every_quantity_has_its_place():
    train = {
        "total": curve([1, 2]),
        "m/a": curve([1, 2]),
        "m/a/weight": curve([1, 1]),
        "m/b": curve([1, 2]),
        "m/b/weight": curve([0, 1]),
        "m/error": curve([1, 2]),
        "learning_rate": curve([1, 2]),
        "grad_norm": curve([1, "nan"]),
    }
    evaluation = {"student_top1": curve([50, 60]), "loss": curve([2, 1]), "examples": curve([10, 10])}
    groups = curves.groups(
        {"train": train, "eval": evaluation, "holdout": {"student_top1": curve([1, 2])}}, {"student_top1": 90.0}
    )
    assert captions(groups) == {
        "Overview": ["total loss", "weight × term, all terms", "top-1 accuracy in evaluation, %"],
        "Loss terms": ["m/a", "m/a: its weight", "m/a: weight × term", "m/b", "m/b: its weight", "m/b: weight × term"],
        "Watched, not trained on": ["m/error"],
        "Optimisation": ["learning_rate", "grad_norm (1 point not finite, marked in red)"],
        "Evaluation": ["loss", "holdout: student_top1"],
    }
    assert groups[-1].remark == "The same in every evaluation: examples 10."
    assert ">teacher<" in groups[0].figures[2].svg


def test_a_single_evaluation():
    once = {"student_top1": curve([50]), "loss": curve([2]), "examples": curve([10])}
    groups = curves.groups({"eval": once, "holdout": {"loss": curve([3, 3])}}, {"student_top1": 90.0})
    assert groups[-1].remark == (
        "At the only evaluation: loss 2, examples 10. The same in every evaluation: holdout: loss 3."
    )


def test_nothing_logged():
    assert curves.groups({}, {}) == []
    assert curves.longest({}) == 0


def test_no_teacher_no_level():
    (overview,) = curves.groups({"eval": {"student_top1": curve([50, 60])}}, {"student_top1": None})
    assert ">teacher<" not in overview.figures[0].svg


def test_weighted_term_is_the_product_at_the_steps_that_have_both():
    product = curves._product(curve([1, 2, 3], [10, 20, 40]), curve([5, 7, 11], [20, 30, 40]))
    np.testing.assert_array_equal(product.steps, [20, 40])
    np.testing.assert_array_equal(product.values, [10, 33])
