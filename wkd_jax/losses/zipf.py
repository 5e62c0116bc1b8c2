"""Zipf's label smoothing: the classes other than the labelled one are given probabilities that fall with their rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.decoupled import nontarget_log_softmax, target_mask
from wkd_jax.losses.feature import widened

Array = jax.Array


def zipf(logits: Array, votes: Array, labels: Array, *, power: float = 1.0) -> Array:
    """KL(u || q~) from Zipf's law over the non-target classes to the student's distribution over them.

    u is that of `zipf_targets`, a constant; q~ is the softmax over the classes other than the label, at temperature 1.

    Args:
      logits: [..., C], any float dtype; computed in float32 (float64 stays). C >= 2.
      votes: [..., C], what the classes are ranked by: counts of `zipf_votes` ("dense"), or the logits themselves.
      labels: [...], integers.
      power: Of the rank, 0 or more; 0 makes u uniform.

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If shapes do not match, labels are not integers, there is one class only, or the power is negative.

    Example:
      >>> logits = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> votes = jnp.array([[0, 3, 4, 7, 2], [1, 1, 12, 0, 2]])
      >>> round(float(zipf(logits, votes, jnp.array([3, 2])).mean()), 4)
      0.2941

    References:
      Liang et al., "Efficient One Pass Self-distillation with Zipf's Label Smoothing", ECCV 2022, arXiv 2207.12980.
    """
    if jnp.shape(logits) != jnp.shape(votes):
        raise ValueError(f"logits and votes must both be [..., C], got {jnp.shape(logits)} and {jnp.shape(votes)}")
    log_q = nontarget_log_softmax(logits, labels)
    u = zipf_targets(votes, labels, power=power).astype(log_q.dtype)
    return jnp.sum(u * (jnp.log(jnp.where(u > 0, u, 1)) - log_q), axis=-1)


def zipf_targets(votes: Array, labels: Array, *, power: float = 1.0) -> Array:
    """rank^-power of every class but the label, divided by their sum: what `zipf` teaches.

    Ranks are those of `zipf_ranks`, among all classes, the label included. No gradient flows through them.

    Args:
      votes: [..., C], integers or floats. C >= 2.
      labels: [...], integers.
      power: 0 or more.

    Returns:
      [..., C] float32 (float64 for votes of that), 0 at the label.

    Raises:
      ValueError: If labels do not fit, there is one class only, or the power is negative.

    Example:
      >>> print(zipf_targets(jnp.array([[9, 4, 4, 0]]), jnp.array([3])))  # ranks 1, 2, 2
      [[0.5  0.25 0.25 0.  ]]
    """
    if not power >= 0:
        raise ValueError(f"power={power}: must be 0 or more; below it, lower ranks would get more")
    ranks = zipf_ranks(votes)
    dtype = jnp.promote_types(jnp.result_type(votes), jnp.float32)
    weight = jnp.where(target_mask(ranks, labels), 0, ranks.astype(dtype) ** -power)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def zipf_ranks(votes: Array) -> Array:
    """Rank of each class, 1 for the most votes; classes of equal votes share the best of their ranks (1, 2, 2, 4).

    Args:
      votes: [..., C], integers or floats.

    Returns:
      [..., C] integers: 1 + the number of classes with more votes.

    Example:
      >>> print(zipf_ranks(jnp.array([0, 3, 4, 7, 3])))
      [5 3 2 1 3]
    """

    def rank(negative: Array) -> Array:
        return 1 + jnp.searchsorted(jnp.sort(negative), negative, method="sort")

    ranks: Array = jnp.vectorize(rank, signature="(c)->(c)")(-jax.lax.stop_gradient(jnp.asarray(votes)))
    return ranks


def zipf_votes(logits: Array) -> Array:
    """Votes of positions: each gives one to the class of its largest logit (the first of several).

    Args:
      logits: [B, P, C] or [B, H, W, C], the classifier applied at every position of a map.

    Returns:
      [B, C] int32 counts, which sum to the number of positions.

    Raises:
      ValueError: If there are no positions.

    Example:
      >>> print(zipf_votes(jnp.array([[[0.0, 1.0, 0.5], [2.0, 1.0, 0.0], [0.0, 0.1, 0.0]]])))
      [[1 2 0]]
    """
    if jnp.ndim(logits) < 3:
        raise ValueError(f"needs logits at positions, [B, P, C] or [B, H, W, C], got {jnp.shape(logits)}")
    (logits,) = widened(jax.lax.stop_gradient(logits))
    elected = jnp.argmax(logits, axis=-1).reshape(logits.shape[0], -1)
    return jnp.sum(jax.nn.one_hot(elected, logits.shape[-1], dtype=jnp.int32), axis=1)
