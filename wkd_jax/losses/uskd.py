"""Universal self-knowledge distillation: soft labels made from a network's own predictions, without a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted, group_mean
from wkd_jax.losses.classification import cross_entropy
from wkd_jax.losses.feature import widened

Array = jax.Array

_EPS = 1e-6  # added to the denominators of the rank score, as in the authors' code


def uskd(
    logits: Array,
    weak_logits: Array,
    labels: Array,
    *,
    weak_smoothing: float = 0.1,
    rank_from_prob: bool = False,
    group_size: int | None = None,
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    """USKD's three terms; the published total is `alpha * target_term + beta * nontarget_term + mu * weak_term`.

    q = softmax(logits), W = softmax(weak_logits) from a linear layer on an earlier feature, y the label, and q~ the
    softmax of the logits over the classes other than y:

        target_term    = -(q_y^2 + 1 - mean over the batch of q_y^2) log q_y
        nontarget_term = -sum_k u_k log q~_k, with u_k proportional to 1 / (place of k when classes are sorted by score)
        weak_term      = cross-entropy of W with the smoothed label

    The score is W_k / (1 - W_y) + log q_k / (1 - log q_y) in the authors' code and W_k / (1 - W_y) + q_k / (1 - q_y) in
    the paper; the two order classes differently. All classes are sorted, the target too; of equal scores the lower
    class comes first. The bracket of the target term (which lies between 0 and 2) and u are constants, so only
    `weak_term` sends a gradient into `weak_logits`.

    Mixed labels: the two largest entries V_l of a row are its labels. Each has a bracket, q_l^2 + V_l - mean of q_l^2
    (means are over the rows' first labels, and apart from them over the second ones; it may be negative), both are left
    out of q~ and u, and the denominators of the score are 1 - sum_l W_l and so on. A row of one label is treated as if
    it had been an integer; in the authors' code an arbitrary class would be its second label.

    Args:
      logits: [B, C], any float dtype; computed in float32, or float64 where an input is.
      weak_logits: [B, C].
      labels: [B] integers, or [B, C] floats: a class distribution, such as mixup makes.
      weak_smoothing: Label smoothing of the weak term.
      rank_from_prob: The paper's score instead of the code's.
      group_size: The mean of q_y^2 is over groups of that many consecutive examples, as on a device of its own; None:
        over the batch. The published results have 32.
      where: [B] bool, the examples that count in that mean; None: all.

    Returns:
      (target_term, nontarget_term, weak_term), each [B], nats, not averaged. They are not masked.

    Raises:
      ValueError: If shapes do not match, there are too few classes for a non-target one, or groups do not divide B.

    Example:
      >>> logits = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> weak = jnp.array([[0.3, 0.1, -0.2, 0.9, 0.4], [0.5, 0.4, 0.6, -0.3, 0.1]])
      >>> print([round(float(term.mean()), 4) for term in uskd(logits, weak, jnp.array([3, 2]))])
      [1.1812, 1.2821, 1.2449]

    References:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
      and Customized Soft Labels", ICCV 2023, arXiv 2303.13005, section 3.
    """
    if jnp.ndim(logits) != 2 or jnp.shape(logits) != jnp.shape(weak_logits):
        raise ValueError(
            f"logits and weak_logits must both be [B, C], got {jnp.shape(logits)} and {jnp.shape(weak_logits)}"
        )
    labels = jnp.asarray(labels)
    weak_term = cross_entropy(weak_logits, labels, label_smoothing=weak_smoothing)  # checks the labels
    logits, weak_logits = widened(logits, weak_logits)
    if logits.shape[-1] <= labels.ndim:
        raise ValueError(f"needs more than {labels.ndim} classes, or no non-target class is left")
    if labels.ndim == 1:
        values, classes = jnp.ones((len(labels), 1), logits.dtype), labels[:, None]
    else:
        values, classes = jax.lax.top_k(labels.astype(logits.dtype), 2)

    log_q = jax.nn.log_softmax(logits)
    labelled = (classes[..., None] == jnp.arange(logits.shape[-1])) & (values > 0)[..., None]  # [B, 1 or 2, C]
    counts = counted(where, (len(logits),))
    target_term = jnp.zeros(len(logits), logits.dtype)
    for number in range(classes.shape[-1]):
        value = values[:, number]
        log_q_l = jnp.sum(jnp.where(labelled[:, number], log_q, 0), axis=-1)
        squared = jnp.exp(2 * log_q_l)
        bracket = squared + value - group_mean(squared, counts & (value > 0), group_size)
        target_term -= jax.lax.stop_gradient(jnp.where(value > 0, bracket, 0)) * log_q_l

    target = labelled.any(1)
    u = _targets(log_q, weak_logits, target, rank_from_prob)
    log_nontarget = jax.nn.log_softmax(jnp.where(target, -jnp.inf, logits))
    nontarget_term = -jnp.sum(u * jnp.where(target, 0, log_nontarget), axis=-1)
    return target_term, nontarget_term, weak_term


def _targets(log_q: Array, weak_logits: Array, target: Array, rank_from_prob: bool) -> Array:
    """1 / (place by score) [B, C], 0 at the labels, normalised: u."""
    log_q, weak_logits = jax.lax.stop_gradient((log_q, weak_logits))

    def part(x: Array) -> Array:
        return x / (1 - jnp.sum(jnp.where(target, x, 0), axis=-1, keepdims=True) + _EPS)

    score = part(jax.nn.softmax(weak_logits)) + part(jnp.exp(log_q) if rank_from_prob else log_q)
    place = 1 + jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
    weight = jnp.where(target, 0, 1 / place.astype(log_q.dtype))
    return weight / jnp.sum(weight, axis=-1, keepdims=True)
