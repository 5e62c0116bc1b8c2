"""A distiller put together from parts: transformations of the logits, then a distance. Not a published loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted
from wkd_jax.losses.decoupled import target_mask
from wkd_jax.losses.dist import correlation, cosine, safe_sqrt
from wkd_jax.losses.kl import softened

Array = jax.Array


def distiller(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    transformations: Sequence[str] = ("log_softmax",),
    distance: str = "kl",
    temperature: float = 1.0,
    where: Array | None = None,
) -> Array:
    """T^2 D(phi(student / T), phi(teacher / T)): a chain phi of transformations, then a distance D.

    A tool to try combinations with. KD-Zero searches such combinations, and this is all of it that is public: that a
    distiller is a chain of transformations, a distance and a weight. Its list of operations, their definitions and what
    its search found are not published. The operations here are our choice, and no combination of them is "KD-Zero".

    | transformation | of each row x |
    | --- | --- |
    | softmax, log_softmax | class probabilities, or their logarithms |
    | standardize | (x - mean) / std over the classes |
    | standardize_batch | the same over the examples, each class by itself |
    | mask_target | drops the labelled class; what follows is over the others |
    | l2_normalize | x / norm |

    | distance | between rows a (student) and b (teacher) |
    | --- | --- |
    | kl | sum_k exp(b_k) (b_k - a_k); the chain ends with log_softmax |
    | l1, l2 | mean_k abs(a_k - b_k), mean_k (a_k - b_k)^2 |
    | cosine, pearson | 1 - cosine, 1 - Pearson's correlation |

    Some known losses are among them: ("log_softmax",) with kl is `kd`; ("mask_target", "log_softmax") with kl is the
    non-target term of `dkd`; ("softmax",) with pearson is `inter` of `dist`; and ("softmax", "standardize_batch") with
    l2, averaged over the batch, is twice its `intra`. Standard deviations are divided by n and, like norms, have 1e-8
    added where they divide.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants.
      labels: [...], integers; needed by mask_target only.
      transformations: Names of the first table, in order; () is the logits themselves.
      distance: A name of the second table.
      temperature: T > 0.
      where: [...] bool, the rows whose statistics standardize_batch takes. None: all rows.

    Returns:
      [...], not averaged.

    Raises:
      ValueError: For an unknown name, a chain that the distance cannot take, missing labels, wrong shapes or a T that
        is not positive.

    Example:
      >>> student, teacher = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[2.0, 1.0, 5.0]])
      >>> print(distiller(student, teacher, transformations=("standardize",), distance="l1").round(3))
      [0.476]
      >>> print(distiller(student, teacher, jnp.array([2]), transformations=("mask_target", "log_softmax")).round(3))
      [0.462]

    References:
      Li et al., "KD-Zero: Evolving Knowledge Distiller for Any Teacher-Student Pairs", NeurIPS 2023.
    """
    check(transformations, distance)
    if "mask_target" in transformations and labels is None:
        raise ValueError("transformation 'mask_target' needs labels")
    student, teacher, squared = softened(student_logits, teacher_logits, temperature)
    rows = counted(where, student.shape[:-1])
    kept = jnp.ones_like(student, bool)
    for name in transformations:
        if name == "mask_target":
            kept = ~target_mask(student, jnp.asarray(labels))
        else:
            student, teacher = (_TRANSFORMATIONS[name](x, kept, rows[..., None]) for x in (student, teacher))
        student, teacher = (jnp.where(kept, x, 0) for x in (student, teacher))
    return squared * _DISTANCES[distance](student, teacher, kept)


def check(transformations: Sequence[str], distance: str) -> None:
    """Refuses names that do not exist, and a chain that the distance cannot take.

    Args:
      transformations: As in `distiller`.
      distance: As in `distiller`.

    Raises:
      ValueError: Names what is wrong and what is valid.
    """
    valid = (*_TRANSFORMATIONS, "mask_target")
    for name in transformations:
        if name not in valid:
            raise ValueError(f"unknown transformation {name!r}: valid are {', '.join(valid)}")
    if distance not in _DISTANCES:
        raise ValueError(f"unknown distance {distance!r}: valid are {', '.join(_DISTANCES)}")
    if distance == "kl" and tuple(transformations[-1:]) != ("log_softmax",):
        raise ValueError(f"distance 'kl' needs a chain that ends with 'log_softmax', got {tuple(transformations)}")


def _log_softmax(x: Array, kept: Array, rows: Array) -> Array:
    del rows
    return jax.nn.log_softmax(jnp.where(kept, x, -jnp.inf), axis=-1)


def _standardized(x: Array, where: Array, axes: tuple[int, ...]) -> Array:
    """(x - mean) / std with mean and std of the entries in `where` along the axes."""
    count = jnp.maximum(where.sum(axes, keepdims=True), 1)
    centred = x - jnp.sum(jnp.where(where, x, 0), axes, keepdims=True) / count
    variance = jnp.sum(jnp.where(where, centred * centred, 0), axes, keepdims=True) / count
    return centred / (safe_sqrt(variance) + 1e-8)


def _l2_normalized(x: Array, kept: Array, rows: Array) -> Array:
    del kept, rows  # what was dropped is 0 already
    return x / (safe_sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + 1e-8)


def _kl(student: Array, teacher: Array, kept: Array) -> Array:
    """Of log-probabilities; a class without probability in the teacher's contributes nothing."""
    p = jnp.where(kept, jnp.exp(teacher), 0)
    return jnp.sum(p * jnp.where(p > 0, teacher - student, 0), axis=-1)


# Each takes x [..., C], the entries of x that are kept [..., C], and the rows that count [..., 1].
_TRANSFORMATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "softmax": lambda x, kept, rows: jnp.exp(_log_softmax(x, kept, rows)),
    "log_softmax": _log_softmax,
    "standardize": lambda x, kept, rows: _standardized(x, kept, (-1,)),
    "standardize_batch": lambda x, kept, rows: _standardized(x, kept & rows, tuple(range(x.ndim - 1))),
    "l2_normalize": _l2_normalized,
}

# Each takes student and teacher [..., C], 0 where nothing is kept, and the entries that are.
_DISTANCES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "kl": _kl,
    "l1": lambda a, b, kept: jnp.sum(jnp.abs(a - b), axis=-1) / kept.sum(-1),
    "l2": lambda a, b, kept: jnp.sum(jnp.square(a - b), axis=-1) / kept.sum(-1),
    "cosine": lambda a, b, kept: 1 - cosine(a, b, -1),
    "pearson": lambda a, b, kept: 1 - correlation(a, b, kept, -1),
}
