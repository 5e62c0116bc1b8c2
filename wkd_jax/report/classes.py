"""What a report says of each class: accuracy, average precision, mistakes, and how alike classes are to the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

from wkd_jax.evaluation import structure
from wkd_jax.report import plots, text
from wkd_jax.report.elements import Figure, Table
from wkd_jax.report.read import Evaluation, Interrelation, Precision

EXTREMES = 10  # classes, or pairs of classes, in a table of the best or the worst
_NAMED = 100  # classes up to which average precision is drawn with their names, as of COCO's 80


def percent(part: Any, whole: Any) -> np.ndarray:
    """Percentages; NaN where the whole is 0, as for a class without examples.

    Example:
      >>> percent(np.array([1.0, 0.0]), np.array([4.0, 0.0]))
      array([25., nan])
    """
    return 100 * np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


@dataclasses.dataclass(frozen=True)
class Percentages:
    """Percentages by class, [C]; NaN for a class without examples, None for what needs a teacher that there is not.

    `count` has the examples of each class; None where they are not counted.
    """

    names: Sequence[str]
    count: np.ndarray | None
    student: np.ndarray
    teacher: np.ndarray | None
    agree: np.ndarray | None

    def table(self, caption: str, classes: Iterable[int]) -> Table:
        """What is known of some classes, in their order."""
        head = ["class", *([] if self.count is None else ["examples"]), "student %"]
        head += [] if self.teacher is None else ["teacher %", "gap"]
        head += [] if self.agree is None else ["agree %"]
        rows = []
        for i in classes:
            row = [self.names[i], *([] if self.count is None else [f"{self.count[i]:,.0f}"])]
            row += [text.fixed(self.student[i], 1)]
            if self.teacher is not None:
                row += [text.fixed(self.teacher[i], 1), text.signed(self.student[i] - self.teacher[i], 1)]
            if self.agree is not None:
                row += [text.fixed(self.agree[i], 1)]
            rows.append(row)
        return Table(caption, head, rows)

    def extremes(self) -> list[Table]:
        """The classes at either end, for more classes than a person reads through."""
        known = np.flatnonzero(np.isfinite(self.student))

        def first(key: np.ndarray) -> np.ndarray:
            return known[np.argsort(key[known], kind="stable")][:EXTREMES]

        tables = [
            self.table(f"The student's {EXTREMES} best classes", first(-self.student)),
            self.table(f"The student's {EXTREMES} worst classes", first(self.student)),
        ]
        if self.teacher is not None:
            behind = first(self.student - self.teacher)
            tables.append(self.table(f"The {EXTREMES} classes furthest behind the teacher", behind))
        if self.agree is not None:
            tables.append(self.table(f"The {EXTREMES} classes with the least agreement", first(self.agree)))
        return tables


def section(evaluation: Evaluation) -> dict[str, Any]:
    """Figures and tables by class.

    Returns:
      `examples` and `agreement` (None without a teacher) over all classes, `figures`, `tables`, `everything`: the table
      of all classes, best first, and `long`: whether that is too long to be shown at once.
    """
    names, count = evaluation.class_names, evaluation.count
    teacher = None if evaluation.teacher_correct is None else percent(evaluation.teacher_correct, count)
    agree = None if evaluation.agree is None else percent(evaluation.agree, count)
    known = Percentages(names, count, percent(evaluation.student_correct, count), teacher, agree)
    order = np.argsort(-known.student, kind="stable")  # NaN last
    drawing = plots.by_class(
        "class accuracy",
        [names[i] for i in order],
        known.student[order],
        None if teacher is None else teacher[order],
    )
    long = len(names) > plots.BARS
    figures = [Figure("Accuracy of each class", drawing)]
    tables = known.extremes() if long else []
    if evaluation.confusion is not None:
        if len(names) <= plots.ALL_NAMES:
            figures.append(
                Figure("The student's confusions", plots.confusion("confusion", names, evaluation.confusion))
            )
        tables.append(_mistakes(evaluation))
    overall = None if evaluation.agree is None else text.fixed(float(percent(evaluation.agree.sum(), count.sum())))
    return {
        "examples": f"{count.sum():,.0f}",
        "agreement": overall,
        "figures": figures,
        "tables": tables,
        "everything": known.table(f"All {len(names)} classes, best first", order),
        "long": long,
    }


def precision(found: Precision) -> dict[str, Any]:
    """Average precision by class.

    Returns:
      `absent`: names of the classes without objects, which are left out of all else. `figure`; None if there is no
      other class. `tables` of the extremes, where the classes are many. `everything`: the table of all classes, best
      first. `long`: whether that is too long to be shown at once.
    """
    order = np.argsort(-found.student, kind="stable")  # NaN last
    order = order[np.isfinite(found.student[order])]
    teacher = None if found.teacher is None else found.teacher[order]
    known = Percentages([found.class_names[i] for i in order], None, found.student[order], teacher, None)
    figure = None
    if order.size:
        drawing = plots.by_class("class AP", known.names, known.student, teacher, measure="AP", bars=_NAMED)
        figure = Figure("Average precision of each class", drawing)
    long = order.size > plots.BARS
    return {
        "absent": [name for name, value in zip(found.class_names, found.student, strict=True) if np.isnan(value)],
        "figure": figure,
        "tables": known.extremes() if long else [],
        "everything": known.table(f"All {order.size} classes with objects, best first", range(order.size)),
        "long": long,
    }


def _mistakes(evaluation: Evaluation) -> Table:
    """The most frequent confusions of two classes."""
    names, count = evaluation.class_names, evaluation.count
    wrong = evaluation.confusion * (1 - np.eye(len(names)))
    rows = []
    for i in np.argsort(-wrong, axis=None, kind="stable")[:EXTREMES]:
        true, predicted = np.unravel_index(i, wrong.shape)
        if wrong[true, predicted]:
            share = text.fixed(float(percent(wrong[true, predicted], count[true])), 1)
            rows.append([names[true], names[predicted], f"{wrong[true, predicted]:,.0f}", share])
    return Table("The student's most frequent mistakes", ["true", "predicted", "examples", "% of true"], rows, 2)


def interrelation(relation: Interrelation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the matrix says in words, heat maps with similar classes side by side, and where it comes from.

    Args:
      relation: The matrix.
      settings: The config's `interrelation` section; {} where the config has none.
    """
    similarity, names = relation.similarity, relation.class_names
    order = similar_order(similarity)
    rows, columns = np.triu_indices(len(names), k=1)
    most = np.argsort(-similarity[rows, columns], kind="stable")[:EXTREMES]
    pairs = [[names[rows[i]], names[columns[i]], text.fixed(float(similarity[rows[i], columns[i]]), 4)] for i in most]
    drawing = plots.similarity("similarity", [names[i] for i in order], similarity[np.ix_(order, order)])
    provenance: Mapping[str, Any] = relation.provenance
    groups = settings.get("groups") or []
    structure.check_groups(groups, names)
    measured = relation.structure or structure.measure(similarity)
    sentences = structure.sentences(measured, similarity, groups)
    if wanted := settings.get("mean_distance"):
        factor = wanted / np.mean(1 - similarity[rows, columns])
        sentences.append(
            f"The matrix is drawn as it was made; for training 1 - similarity was multiplied by {factor:.3g}, so that "
            f"its mean over pairs of classes is {wanted:g}."
        )
    figures = [Figure("Class similarity", drawing)]
    if measured.get("rank_one_share") is not None:
        left = structure.remainder(similarity)[np.ix_(order, order)]
        together = [groups[i] for i in order] if groups else None
        drawing = plots.remainder("remainder", [names[i] for i in order], left, together)
        caption = "What one number a class leaves of it" + (". Dots: classes of one group" if groups else "")
        if (block := -(-len(names) // plots.COARSE)) > 1:
            caption += f". A pixel is the mean of {block} × {block} classes"
        figures.append(Figure(caption, drawing))
    return {
        "sentences": sentences,
        "figures": figures,
        "pairs": Table("The most similar pairs of classes", ["class", "class", "similarity"], pairs, 2),
        "sparse": len(names) > plots.ALL_NAMES,
        "block": -(-len(names) // plots.PIXELS),
        "provenance": text.flat(provenance),
    }


def similar_order(similarity: np.ndarray) -> np.ndarray:
    """Orders classes so that similar ones are neighbours: the leaves of an average-linkage tree.

    Args:
      similarity: [C, C].

    Returns:
      [C] integers, a permutation.

    Example:
      >>> similar_order(np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]])).tolist()
      [1, 0, 2]
    """
    if len(similarity) < 3:
        return np.arange(len(similarity))
    apart = similarity.max() - (similarity + similarity.T) / 2
    np.fill_diagonal(apart, 0)
    return hierarchy.leaves_list(hierarchy.linkage(distance.squareform(apart, checks=False), method="average"))
