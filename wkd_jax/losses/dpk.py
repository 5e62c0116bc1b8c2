"""How alike two networks see one batch: the unbiased HSIC of a minibatch, and the CKA made of it, as DPK uses them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted
from wkd_jax.losses.feature import widened

Array = jax.Array


def minibatch_hsic(x: Array, y: Array, *, where: Array | None = None) -> Array:
    """Unbiased estimate HSIC_1 of the Hilbert-Schmidt independence criterion with linear kernels, from one batch.

    With the Gram matrices K = X X^T and L = Y Y^T, their diagonals set to 0, over n examples:
    (tr(K L) + sum(K) sum(L) / ((n - 1) (n - 2)) - 2 / (n - 2) sum(K L)) / (n (n - 3)), where sum runs over all entries.
    It is computed as the inner product of the doubly centred matrices, which is the same and loses fewer digits. Both
    sides are differentiated.

    Args:
      x: [B, ...], flattened to B vectors; any float dtype, computed in float32, or float64 where an input is.
      y: [B, ...], the same examples; other axes may differ.
      where: [B] bool, the examples that count. None: all. With fewer than four the estimate does not exist: 0.

    Returns:
      A scalar of the whole batch, in squared units of both features. It may be negative.

    Raises:
      ValueError: If the batches differ, hold fewer than four examples, or `where` does not fit.

    Example:
      >>> x = jnp.array([[0.0], [1.0], [2.0], [4.0]])
      >>> print(minibatch_hsic(x, 3 * x), minibatch_hsic(x + 5, 3 * x))
      42.0 42.0

    References:
      Song et al., "Feature Selection via Dependence Maximization", JMLR 2012.
      Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, arXiv 2010.15327.
    """
    (k, l), n = _centred_grams(x, y, where)  # noqa: E741
    return jnp.where(n >= 4, jnp.sum(k * l) / jnp.maximum(n * (n - 3), 1), 0.0)


def minibatch_cka(x: Array, y: Array, *, where: Array | None = None) -> Array:
    """Centred kernel alignment of one batch, HSIC_1(x, y) / sqrt(HSIC_1(x, x) HSIC_1(y, y)).

    Args:
      x: [B, ...], as in `minibatch_hsic`.
      y: [B, ...].
      where: [B] bool, the examples that count. None: all.

    Returns:
      A scalar of the whole batch in [-1, 1]. 0 where a side does not vary, or fewer than four examples count.

    Raises:
      ValueError: As `minibatch_hsic`.

    Example:
      >>> x = jnp.array([[0.0], [1.0], [2.0], [4.0]])
      >>> print(minibatch_cka(x, 3 * x + 1).round(4), minibatch_cka(x, jnp.ones((4, 2, 2))))
      1.0 0.0

    References:
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414.
      Qiu et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge Distillation", ICLR 2023,
      arXiv 2206.06067.
    """
    (k, l), n = _centred_grams(x, y, where)  # noqa: E741
    return jnp.where(n >= 4, jnp.sum(_unit(k) * _unit(l)), 0.0)


def _centred_grams(x: Array, y: Array, where: Array | None) -> tuple[list[Array], Array]:
    """([K, L] doubly centred with zero diagonals and masked rows and columns, the number of examples that count)."""
    if min(jnp.ndim(x), jnp.ndim(y)) < 2 or jnp.shape(x)[0] != jnp.shape(y)[0] or jnp.shape(x)[0] < 4:
        raise ValueError(
            f"needs two features [B, ...] of one batch of at least 4, got {jnp.shape(x)} and {jnp.shape(y)}"
        )
    size = jnp.shape(x)[0]
    where = counted(where, (size,))
    n = jnp.sum(where)
    pairs = where[:, None] & where & ~jnp.eye(size, dtype=bool)
    return [
        _centred_gram(side.reshape(size, -1), where[:, None], pairs, jnp.maximum(n, 4)) for side in widened(x, y)
    ], n


def _centred_gram(x: Array, where: Array, pairs: Array, n: Array) -> Array:
    """The Gram matrix of [B, D] whose rows and columns sum to 0, with a diagonal of zeros."""
    x = jnp.where(where, x, 0)
    x = jnp.where(where, x - jnp.sum(x, axis=0) / n, 0)  # changes nothing but the rounding
    gram = jnp.where(pairs, jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), 0)
    rows = jnp.sum(gram, axis=1) / (n - 2)
    return jnp.where(pairs, gram - rows[:, None] - rows + jnp.sum(gram) / ((n - 1) * (n - 2)), 0)


def _unit(x: Array) -> Array:
    """`x` divided by its norm; 0 where that is 0."""
    squares = jnp.sum(jnp.square(x))
    return x * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
