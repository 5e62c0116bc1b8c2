"""Losses that treat the labelled class and the other classes apart: DKD and NKD, and the parts they are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import widened
from wkd_jax.losses.kl import divergence, softened

Array = jax.Array

_ABSENT = -1e30  # log-probability of the target among the others: exp gives 0, and 0 times it, even scaled, is 0


def dkd(
    student_logits: Array, teacher_logits: Array, labels: Array, *, temperature: float | Array = 4.0
) -> tuple[Array, Array]:
    """Decoupled knowledge distillation; the published total is `alpha * target_term + beta * nontarget_term`.

    With p = softmax(teacher / T) and q = softmax(student / T), y the label, and p~, q~ the same softmaxes over the
    classes other than y:

        target_term    = T^2 KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        nontarget_term = T^2 KL(p~ || q~)

    so that `kd = target_term + (1 - p_y) nontarget_term`. 1 - q_y is the sum over the other classes, in logarithms: it
    stays exact where q_y rounds to 1.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is. C >= 2.
      teacher_logits: Same shape, constants.
      labels: [...], integers, the classes y. A label outside [0, C) (padding) leaves no class out: mask such rows in
        the result.
      temperature: T > 0, a scalar, or one for each example, [...]; may be traced and learned.

    Returns:
      (target_term, nontarget_term), each [...], nats, neither weighted nor averaged.

    Raises:
      ValueError: If shapes do not match, labels are not integers, there is one class only, or T is not positive.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> target, nontarget = dkd(student, teacher, jnp.array([3, 2]))
      >>> round(float(target.mean()), 4), round(float(nontarget.mean()), 4)
      (0.0237, 0.1823)

    References:
      Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, section 3.
    """
    student, teacher, squared = softened(student_logits, teacher_logits, temperature)
    target = target_mask(student, labels)
    binary_p, binary_q = (_target_or_not(x, target) for x in (teacher, student))
    log_p, log_q = (_without_target(x, target) for x in (teacher, student))
    return squared * divergence(binary_p, binary_q), squared * divergence(log_p, log_q)


def nkd(
    student_logits: Array, teacher_logits: Array, labels: Array, *, temperature: float | Array = 1.0
) -> tuple[Array, Array]:
    """Normalised knowledge distillation; the published total is `target_term + gamma * nontarget_term`.

    With y the label, p and q the softmaxes of teacher and student at temperature 1, and p~, q~ those of logits / T over
    the classes other than y:

        target_term    = -p_y log q_y
        nontarget_term = -T^2 sum_k p~_k log q~_k

    Both are cross-entropies, not divergences, and do not vanish where student and teacher agree.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is. C >= 2.
      teacher_logits: Same shape, constants.
      labels: [...], integers, the classes y. A label outside [0, C) (padding) leaves no class out and has target term
        0: mask such rows in the result.
      temperature: T > 0 of the non-target term, a scalar, or one for each example, [...]. The target term has none.

    Returns:
      (target_term, nontarget_term), each [...], nats, neither weighted nor averaged.

    Raises:
      ValueError: If shapes do not match, labels are not integers, there is one class only, or T is not positive.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> target, nontarget = nkd(student, teacher, jnp.array([3, 2]))
      >>> round(float(target.mean()), 4), round(float(nontarget.mean()), 4)
      (0.3272, 0.9588)

    References:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
      and Customized Soft Labels", ICCV 2023, arXiv 2303.13005, section 3.
    """
    student, teacher, _ = softened(student_logits, teacher_logits, 1.0)
    target = target_mask(student, labels)
    target_term = -jnp.sum(jnp.where(target, jax.nn.softmax(teacher) * jax.nn.log_softmax(student), 0), axis=-1)
    student, teacher, squared = softened(student, teacher, temperature)
    p, log_q = jnp.exp(_without_target(teacher, target)), _without_target(student, target)
    return target_term, -squared * jnp.sum(p * jnp.where(p > 0, log_q, 0), axis=-1)


def nontarget_log_softmax(logits: Array, labels: Array) -> Array:
    """log-softmax over the classes other than the labelled one.

    Args:
      logits: [..., C], any float dtype; computed in float32 (float64 stays). C >= 2. Already divided by a temperature.
      labels: [...], integers. A label outside [0, C) leaves no class out.

    Returns:
      [..., C]. The labelled class has -1e30: finite, so that a target distribution that is 0 there can be multiplied
      with it, and exp of it is 0. No gradient passes through that entry.

    Raises:
      ValueError: If shapes do not match, labels are not integers, or there is one class only.

    Example:
      >>> jnp.exp(nontarget_log_softmax(jnp.array([[5.0, 1.0, 1.0]]), jnp.array([0])))
      Array([[0. , 0.5, 0.5]], dtype=float32)

    """
    (logits,) = widened(logits)
    return _without_target(logits, target_mask(logits, labels))


def target_mask(logits: Array, labels: Array) -> Array:
    """Which entry of the logits is the labelled class's.

    Args:
      logits: [..., C], of which only the shape counts.
      labels: [...], integers; one outside [0, C) marks nothing.

    Returns:
      [..., C] bool.

    Raises:
      ValueError: If labels are not integers of the logits' leading shape, or there are fewer than two classes.

    Example:
      >>> print(target_mask(jnp.zeros((2, 3)), jnp.array([1, 0])))
      [[False  True False]
       [ True False False]]
    """
    labels = jnp.asarray(labels)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:-1]}, got {labels.dtype} {labels.shape}; of mixed "
            "labels, take the argmax"
        )
    if logits.shape[-1] < 2:
        raise ValueError("needs at least two classes: without the target none would be left")
    return labels[..., None] == jnp.arange(logits.shape[-1])


def _without_target(logits: Array, target: Array) -> Array:
    """log-softmax [..., C] over the classes where `target` is False; `_ABSENT` elsewhere."""
    return jnp.where(target, _ABSENT, jax.nn.log_softmax(jnp.where(target, -jnp.inf, logits), axis=-1))


def _target_or_not(logits: Array, target: Array) -> Array:
    """[..., 2] log-probabilities of the target and of all other classes together."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    of_target = jnp.sum(jnp.where(target, log_p, 0), axis=-1)
    return jnp.stack([of_target, jax.nn.logsumexp(jnp.where(target, -jnp.inf, log_p), axis=-1)], axis=-1)
