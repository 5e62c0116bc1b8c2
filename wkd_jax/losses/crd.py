"""Contrastive representation distillation (CRD), as functions on arrays: scores, loss, constants, memory update.

A step of CRD, for one direction (the student's embedding against the memory of the teacher's; the other is alike):

    scores = crd_scores(bank, index, embedding, temperature=0.07)         # index: [B, 1 + K], the example itself first
    constant = crd_constant(scores, num_examples=N)                       # on the first batch; kept ever after
    loss = crd(scores, constant, num_examples=N).mean()
    bank = crd_update(bank, index[:, 0], own_embedding, momentum=0.5)     # each side's memory by its own embedding
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted
from wkd_jax.losses.feature import widened
from wkd_jax.losses.relational import unit_norm

Array = jax.Array
_GATHERED_BYTES = 2**26  # of memory rows that exist at a time


def crd_scores(bank: Array, index: Array, embedding: Array, *, temperature: float) -> Array:
    """Similarities of each example's embedding with rows of a memory: <bank[index], embedding> / temperature.

    The memory is a constant. Rows are gathered a chunk of columns at a time (64 MB), and again for the gradient: for
    256 examples with 16384 rows each they would be 2 GB at once. Products are sums over the memory's last axis, so
    with that one cut over devices no row is sent between them.

    Args:
      bank: [N, D], any float dtype; computed in float32, or float64 where an input is.
      index: [B, K] int, rows of the memory for each example, from 0 to N - 1 (others are not found out: under `jit`
        they read the nearest row).
      embedding: [B, D].
      temperature: Above 0.

    Returns:
      [B, K], natural logarithms of what the paper calls scores.

    Raises:
      ValueError: If the shapes do not fit, or the temperature is not positive.

    Example:
      >>> bank = jnp.eye(3)
      >>> print(crd_scores(bank, jnp.array([[0, 2]]), jnp.array([[0.5, 0.0, -1.0]]), temperature=0.5))
      [[ 1. -2.]]
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    shapes = [jnp.shape(x) for x in (bank, index, embedding)]
    if [len(shape) for shape in shapes] != [2, 2, 2] or shapes[1][0] != shapes[2][0] or shapes[0][1] != shapes[2][1]:
        raise ValueError(f"bank, index and embedding must be [N, D], [B, K] and [B, D], got {shapes}")
    bank, embedding = widened(jax.lax.stop_gradient(bank), embedding)

    def column(rows: Array) -> Array:
        return jnp.sum(bank[rows] * embedding, axis=-1)

    chunk = max(1, _GATHERED_BYTES // (embedding.size * embedding.dtype.itemsize))
    products: Array = jax.lax.map(jax.checkpoint(column), index.T, batch_size=chunk).T
    return products / temperature


def crd(scores: Array, constant: Array | float, *, num_examples: int, eps: float = 1e-7) -> Array:
    """The contrastive loss of one direction: the example itself is told from K others by a noise-contrastive estimate.

    With o = exp(scores) / constant and c = K / num_examples, it is -log(o_0 / (o_0 + c + eps)) - sum_(k >= 1)
    log(c / (o_k + c + eps)). CRD adds up both directions.

    Args:
      scores: [B, 1 + K], of `crd_scores`, the example's own row first; any float dtype, computed in float32, or float64
        where it is.
      constant: Scalar above 0, of `crd_constant`.
      num_examples: N, rows of the memory.
      eps: Added to the denominators.

    Returns:
      [B], nats.

    Raises:
      ValueError: If there is no negative, or `num_examples` is not positive.

    Example:
      >>> scores = jnp.log(jnp.array([[2.0, 0.5, 0.5]]))
      >>> print(crd(scores, 1.0, num_examples=2, eps=0.0))  # log(3 / 2) + 2 log(3 / 2)
      [1.2163954]

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, equations 17 to 19.
    """
    if jnp.ndim(scores) != 2 or jnp.shape(scores)[1] < 2 or num_examples < 1:
        raise ValueError(
            f"scores must be [B, 1 + K] with K >= 1 and num_examples at least 1, got {jnp.shape(scores)} and "
            f"num_examples={num_examples}"
        )
    scores, constant = widened(scores, jax.lax.stop_gradient(jnp.asarray(constant, jnp.result_type(scores))))
    scores = scores - jnp.log(constant)
    c = (scores.shape[1] - 1) / num_examples
    positive, negatives = scores[:, 0], jnp.exp(scores[:, 1:])
    own = jnp.logaddexp(positive, jnp.log(jnp.asarray(c + eps, scores.dtype))) - positive
    return own + jnp.sum(jnp.log1p((negatives + eps) / c), axis=-1)


def crd_constant(scores: Array, *, num_examples: int, where: Array | None = None) -> Array:
    """The normalising constant of one direction, estimated on a batch: mean(exp(scores)) * num_examples.

    It is taken once, on the first batch of a run, and kept.

    Args:
      scores: [B, 1 + K], of `crd_scores`.
      num_examples: N, rows of the memory.
      where: [B] bool, the examples that count. None: all.

    Returns:
      Scalar, at least float32, without a gradient; 0 where no example counts.

    Raises:
      ValueError: If `where` does not fit.

    Example:
      >>> scores = jnp.log(jnp.array([[2.0, 1.0], [9.0, 9.0]]))
      >>> print(crd_constant(scores, num_examples=10, where=jnp.array([True, False])))
      15.0
    """
    (scores,) = widened(jax.lax.stop_gradient(scores))
    where = counted(where, (len(scores),))
    means = jnp.where(where, jnp.mean(jnp.exp(scores), axis=1), 0)
    return jnp.sum(means) / jnp.maximum(jnp.sum(where), 1) * num_examples


def crd_update(
    bank: Array, index: Array, embedding: Array, *, momentum: float = 0.5, where: Array | None = None
) -> Array:
    """A memory after a batch: row y of each example becomes momentum * row + (1 - momentum) * embedding, at unit norm.

    Where a row comes up several times (the end of one epoch and the start of the next may meet in a batch), the last
    example in the batch that counts decides alone, and the row it starts from is the one before the batch.

    Args:
      bank: [N, D].
      index: [B] int, the row of each example.
      embedding: [B, D].
      momentum: Share of the old row, from 0 to below 1.
      where: [B] bool, the examples that count; the rows of the others stay. None: all.

    Returns:
      [N, D], dtype of `bank`, without a gradient.

    Raises:
      ValueError: If the momentum is out of range, or shapes do not fit.

    Example:
      >>> print(crd_update(jnp.eye(2), jnp.array([1]), jnp.array([[1.0, 0.0]])).round(4))
      [[1.     0.    ]
       [0.7071 0.7071]]
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: must be from 0 to below 1")
    shapes = [jnp.shape(x) for x in (bank, index, embedding)]
    if [len(shape) for shape in shapes] != [2, 1, 2] or (shapes[1][0], shapes[0][1]) != shapes[2]:
        raise ValueError(f"bank, index and embedding must be [N, D], [B] and [B, D], got {shapes}")
    index = jnp.asarray(index)
    bank, embedding = (jax.lax.stop_gradient(jnp.asarray(x)) for x in (bank, embedding))
    where = counted(where, (len(index),))
    later = jnp.arange(len(index)) > jnp.arange(len(index))[:, None]
    replaced = jnp.any(later & where & (index == index[:, None]), axis=1)
    rows = unit_norm(momentum * bank[index] + (1 - momentum) * embedding)
    target = jnp.where(where & ~replaced, index, len(bank))  # beyond the end: dropped
    return bank.at[target].set(rows.astype(bank.dtype), mode="drop")
