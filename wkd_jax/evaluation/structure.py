"""How much a class similarity says about which classes are alike, and how much of it is an accident. Float64 NumPy.

A matrix may vary from pair to pair for no other reason than that some classes are like everything and others like
nothing: then s_ij is about a_i a_j, one number a class, and says of no two classes that they belong together. Another
may have structure that is gone once the images are shuffled. How to read the measures: docs/interrelations.md. Loads
without JAX, for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import linalg, optimize

_ALIKE = 1e-6  # of float32 similarities: differences that are rounding
_MOSTLY = 0.5  # share of the variance from which on a matrix is said to be mostly one number a class
_AROUND = 3  # points around a start
_DESCENT = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-10}
_FEWEST = 4  # classes; fewer have no more pairs than there are numbers a class


def rank_one(similarity: np.ndarray) -> np.ndarray:
    """The numbers a that make a_i a_j closest to s_ij, by the sum of squares over i != j.

    Found by descent (L-BFGS) from the leading eigenvector, from the best constant, and from a few points around them,
    since either may be a saddle; the best end is taken, which no search proves to be the best there is.

    Args:
      similarity: [C, C], symmetric. The diagonal does not count.

    Returns:
      [C] float64. Their common sign has no meaning.

    Example:
      >>> a = np.array([0.5, 0.4, 0.2, 0.1])
      >>> np.abs(rank_one(np.outer(a, a))).round(3)
      array([0.5, 0.4, 0.2, 0.1])
    """
    s = _hollow(similarity)
    size = np.sqrt(np.mean(s**2))
    if size == 0:
        return np.zeros(len(s))
    s = s / size

    def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
        """A quarter of the sum of squares, up to a constant, without a [C, C] array of its own."""
        product, square = s @ a, a @ a
        return (square**2 - np.sum(a**4)) / 4 - a @ product / 2, square * a - a**3 - product

    value, vector = linalg.eigh(s, subset_by_index=[len(s) - 1, len(s) - 1])
    constant = np.full(len(s), np.sqrt(max(_pairs(s).mean(), 0)))
    starts = [np.sqrt(value[0]) * vector[:, 0], constant]
    rng = np.random.default_rng(0)
    starts += [a + rng.normal(size=len(s)) for a in starts for _ in range(_AROUND)]
    ends = [optimize.minimize(loss, a, jac=True, method="L-BFGS-B", options=_DESCENT) for a in starts]
    return min(ends, key=lambda end: end.fun).x * np.sqrt(size)


def remainder(similarity: np.ndarray) -> np.ndarray:
    """What `rank_one` leaves: s_ij - a_i a_j, and 0 on the diagonal. [C, C] float64."""
    a = rank_one(similarity)
    return _hollow(np.asarray(similarity, np.float64) - np.outer(a, a))


def rank_one_share(similarity: np.ndarray, left: np.ndarray | None = None) -> float:
    """Share of the variance of s_ij over pairs of classes that the best a_i a_j explains.

    1 - sum (s_ij - a_i a_j)^2 / sum (s_ij - mean)^2 over i != j; 0 where no a is better than the constant. NaN where
    all pairs are equally alike, and for fewer than 4 classes, which have no more pairs than numbers. Of C (C - 1) / 2
    unrelated numbers, a share of 2 / C to 4 / C is explained too.

    Args:
      similarity: [C, C], symmetric. The diagonal does not count.
      left: Its `remainder`, where it is known.

    Example:
      >>> groups = np.kron(np.eye(3), np.ones((4, 4)))  # three groups of four, nothing in common
      >>> round(rank_one_share(groups), 2), round(rank_one_share(np.outer([1, 2, 3, 4], [1, 2, 3, 4])), 6)
      (0.08, 1.0)
    """
    values = _pairs(similarity)
    if len(similarity) < _FEWEST or np.ptp(values) <= _ALIKE:
        return np.nan
    left = remainder(similarity) if left is None else left
    return float(max(0.0, 1 - np.sum(_pairs(left) ** 2) / np.sum((values - values.mean()) ** 2)))


def check_groups(groups: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuses a grouping that is not one name a class.

    Raises:
      ValueError: Names the key and both counts.
    """
    if groups and len(groups) != len(class_names):
        raise ValueError(
            f"interrelation.groups has {len(groups)} names and there are {len(class_names)} classes "
            f"({class_names[0]!r} to {class_names[-1]!r}): give one for each, in their order, or () for none"
        )


def agreement(similarity: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """Classes whose most similar other class is of their own group, and how many there would be by chance.

    Args:
      similarity: [C, C]. Where several others are the most similar, each counts in part.
      groups: C names, of at least two classes.

    Returns:
      (count, chance), both out of C.

    Example:
      >>> s = np.array([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.1], [0.1, 0.3, 1.0, 0.2], [0.2, 0.1, 0.2, 1.0]])
      >>> agreement(s, ["pet", "pet", "car", "car"])
      (2.5, 1.3333333333333333)
    """
    s = np.array(similarity, np.float64)
    np.fill_diagonal(s, -np.inf)
    nearest = s == s.max(axis=1, keepdims=True)
    names = np.asarray(groups)
    same = (names[:, None] == names) & ~np.eye(len(s), dtype=bool)
    count = np.sum((nearest & same).sum(axis=1) / nearest.sum(axis=1))
    return float(count), float(same.sum() / (len(s) - 1))


def stability(
    make: Callable[[np.ndarray], np.ndarray],
    features: np.ndarray,
    similarity: np.ndarray,
    *,
    samples: int,
    paired: bool,
    left: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How a similarity, and what `rank_one` leaves of it, correlates over pairs of classes with another as good.

    Each class's samples are shuffled, independently of the other classes'. Where the order matters, the other matrix is
    made of all of them in the new order; else two are made, of either half of them, and compared with each other.

    Args:
      make: Features [C, n, D] -> similarity [C, C].
      features: [C, N, D]. They are shuffled in place: a copy may be gigabytes.
      similarity: What `make` gave for them.
      samples: Images of each class; their N / samples positions stay together.
      paired: Whether the order of samples matters to `make`.
      left: The `remainder` of the similarity, where it is known. Not used for halves.
      seed: Of the shuffling.

    Returns:
      `of`: "pairing" or "halves"; `all` and `rest`: correlations of the whole and of what is left, None where one of
      the two does not vary.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(5, 40, 3)).astype(np.float32) + np.arange(5)[:, None, None]
      >>> found = stability(lambda x: -np.abs(np.subtract.outer(*[x.mean(axis=(1, 2))] * 2)), x, None, samples=40,
      ...                   paired=False)
      >>> found["of"], round(found["all"], 2)
      ('halves', 0.98)
    """
    rng = np.random.default_rng(seed)
    for one in features:
        images = one.reshape(samples, -1, one.shape[-1])
        images[:] = images[rng.permutation(samples)]
    if paired:
        of, first, second = "pairing", similarity, make(features)
        left = remainder(first) if left is None else left
    else:
        half = samples // 2 * (features.shape[1] // samples)
        of, first, second = "halves", make(features[:, :half]), make(features[:, half : 2 * half])
        left = remainder(first)
    return {"of": of, "all": _correlation(first, second), "rest": _correlation(left, remainder(second))}


def measure(similarity: np.ndarray, left: np.ndarray | None = None) -> dict[str, Any]:
    """What is kept beside a matrix: `rank_one_share`, None where it is not defined. `left`: as there."""
    share = rank_one_share(similarity, left)
    return {"rank_one_share": None if np.isnan(share) else share}


def sentences(structure: Mapping[str, Any], similarity: np.ndarray, groups: Sequence[str] = ()) -> list[str]:
    """The measures of a matrix in words.

    Args:
      structure: What `measure` gives, and under "stability" what `stability` gives, if it is known.
      similarity: [C, C].
      groups: C names, or none.

    Example:
      >>> s = np.kron(np.eye(3), np.full((4, 4), 0.5)) + 0.1
      >>> for line in sentences(measure(s), s, ["a"] * 4 + ["b"] * 4 + ["c"] * 4):
      ...     print(line)
      One number a class, s_ij = a_i a_j, explains 0 % of the variance over pairs (of unrelated numbers 16.7 to 33.3 %).
      Neighbours agree with the groups in 12 of 12 classes, by chance in 3.3.
    """
    lines = []
    share, stable = structure.get("rank_one_share"), structure.get("stability")
    if share is not None:
        classes = len(similarity)
        if share >= max(_MOSTLY, 4 / classes):
            lines.append("This matrix mostly says one number a class, not which classes belong together.")
        lines.append(
            f"One number a class, s_ij = a_i a_j, explains {100 * share:.0f} % of the variance over pairs "
            f"(of unrelated numbers {_short(200 / classes)} to {_short(400 / classes)} %)."
        )
    elif (values := _pairs(similarity)).size > 1 and np.ptp(values) <= _ALIKE:
        lines.append("All pairs of classes are equally alike.")
    if groups:
        count, chance = (_short(number) for number in agreement(similarity, groups))
        lines.append(f"Neighbours agree with the groups in {count} of {len(groups)} classes, by chance in {chance}.")
    if stable and stable["all"] is not None:
        made = {
            "pairing": "The images paired in another order give a matrix that correlates {:.2f} with this one",
            "halves": "Two halves of the images give matrices that correlate {:.2f}",
        }[stable["of"]].format(stable["all"])
        rest = "" if stable["rest"] is None else f", and {stable['rest']:.2f} in what a_i a_j leaves"
        lines.append(f"{made}{rest}.")
    return lines


def _hollow(matrix: np.ndarray) -> np.ndarray:
    """A float64 copy with 0 on the diagonal."""
    hollow = np.array(matrix, np.float64)
    np.fill_diagonal(hollow, 0)
    return hollow


def _pairs(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal, float64."""
    return np.asarray(matrix, np.float64)[np.triu_indices(len(matrix), k=1)]


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's, over pairs of classes; None where one of the two does not vary."""
    x, y = (_pairs(matrix) for matrix in (first, second))
    if x.size < 2 or min(np.ptp(x), np.ptp(y)) <= _ALIKE:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
