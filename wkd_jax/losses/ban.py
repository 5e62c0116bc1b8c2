"""What born-again networks learn from the generation before: its distribution, or how sure it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.batch import counted, group_mean
from wkd_jax.losses.classification import cross_entropy
from wkd_jax.losses.kl import softened

Array = jax.Array


def ban(student_logits: Array, teacher_logits: Array) -> Array:
    """Soft cross-entropy -sum_k p_k log q_k at temperature 1: `kl` plus the entropy of the teacher, a constant.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants. A class at -inf has probability 0 and contributes nothing.

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(ban(student, teacher).mean()), 4)
      1.1044

    References:
      Furlanello et al., "Born Again Neural Networks", ICML 2018, arXiv 1805.04770.
    """
    student, teacher, _ = softened(student_logits, teacher_logits)
    p, log_q = jax.nn.softmax(teacher), jax.nn.log_softmax(student)
    return -jnp.sum(p * jnp.where(p > 0, log_q, 0), axis=-1)


def cwtm(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    group_size: int | None = None,
    where: Array | None = None,
) -> Array:
    """Confidence weighted by the teacher's maximum: cross-entropy with the labels, more where the teacher is sure.

    Published as a sum over the batch, sum_n w_n CE_n with w_n = max_k p_nk / sum_m max_k p_mk. Returned is N w_n CE_n,
    N being the number of examples that share the weights, so that the *mean* over examples is that sum.

    Args:
      student_logits: [B, C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: [B, C], constants; only the largest probability of each row matters.
      labels: [B] integers, or [B, C] floats: a class distribution.
      group_size: Weights sum to 1 over each group of that many consecutive examples, as on a device of its own; None:
        over the batch.
      where: [B] bool, the examples that count; None: all. The others neither share the weights nor have any: 0.

    Returns:
      [B], nats: average it over the examples that count.

    Raises:
      ValueError: If shapes do not match, or groups do not divide the batch.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(cwtm(student, teacher, jnp.array([3, 2])).mean()), 4)
      1.2935

    References:
      Furlanello et al., "Born Again Neural Networks", ICML 2018, arXiv 1805.04770, section 3.2.
    """
    student, teacher, _ = softened(student_logits, teacher_logits)
    if student.ndim != 2:
        raise ValueError(f"needs one row of logits an example, [B, C], got {student.shape}")
    confidence = jnp.max(jax.nn.softmax(teacher), axis=-1)
    counts = counted(where, (len(student),))
    mean = group_mean(confidence, counts, group_size)
    weight = jnp.where(counts, confidence / jnp.where(counts, mean, 1), 0)
    return weight * cross_entropy(student, labels)


def dkpp(student_logits: Array, teacher_logits: Array, key: Array) -> Array:
    """Dark knowledge with permuted predictions: `ban` with the teacher's other probabilities shuffled in each row.

    The largest probability stays with its class (the first of several equal ones); the others are permuted among the
    other classes, uniformly at random. What is left of the teacher is how sure it is, and of how many classes.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants.
      key: PRNG key; every row draws its own permutation.

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> student = teacher = jnp.array([[3.0, 2.0, 0.0]] * 4)  # two classes to permute: as it was, or swapped
      >>> print(ban(student, teacher)[0].round(2), dkpp(student, teacher, jax.random.key(1)).round(2))
      0.71 [1.16 1.16 0.71 0.71]

    References:
      Furlanello et al., "Born Again Neural Networks", ICML 2018, arXiv 1805.04770, section 3.2.
    """
    student, teacher, _ = softened(student_logits, teacher_logits)
    classes = jnp.broadcast_to(jnp.arange(teacher.shape[-1]), teacher.shape)
    best = jnp.argmax(teacher, axis=-1, keepdims=True)
    source = jax.random.permutation(key, classes, axis=-1, independent=True)
    # Takes the largest out of its cycle, which leaves a uniform permutation of the rest.
    source = jnp.where(source == best, jnp.take_along_axis(source, best, axis=-1), source)
    source = jnp.where(classes == best, best, source)
    return ban(student, jnp.take_along_axis(teacher, source, axis=-1))
