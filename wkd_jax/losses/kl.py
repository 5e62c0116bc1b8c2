"""Kullback-Leibler divergence between the class distributions of teacher and student, and KD, which is built on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax.losses.feature import widened

Array = jax.Array


def kl(student_logits: Array, teacher_logits: Array, *, temperature: float | Array = 1.0) -> Array:
    """KL(p || q) = sum_k p_k (log p_k - log q_k), with p = softmax(teacher / T) and q = softmax(student / T).

    The teacher's logits are constants: no gradient flows into them. A temperature may be traced and learned; its
    gradient goes through p and q alike.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape. A class at -inf has probability 0 and contributes nothing.
      temperature: T > 0, a scalar, or one for each example, [...].

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If the shapes differ, or the temperature is not positive (checked where it is not traced).

    Example:
      >>> print(kl(jnp.array([[1.0, 0.0], [2.0, 2.0]]), jnp.array([[1.0, 0.0], [2.0, 2.0]])))
      [0. 0.]
      >>> print(kl(jnp.array([[0.0, 0.0]]), jnp.array([[1e4, -1e4]])))  # log 2
      [0.6931472]
    """
    student, teacher, _ = softened(student_logits, teacher_logits, temperature)
    return divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student))


def kd(student_logits: Array, teacher_logits: Array, *, temperature: float | Array = 4.0) -> Array:
    """Knowledge distillation: T^2 KL(p || q) with both sides softened by T. No cross-entropy is in it.

    The factor keeps the size of the student's gradient when T changes. See `kl` for arguments, constants and errors.

    Args:
      student_logits: [..., C].
      teacher_logits: [..., C], constants.
      temperature: T > 0, a scalar, or one for each example, [...].

    Returns:
      [...], nats, not averaged.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(kd(student, teacher).mean()), 4)
      0.1614

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """
    student, teacher, squared = softened(student_logits, teacher_logits, temperature)
    return squared * divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student))


def softened(
    student_logits: Array, teacher_logits: Array, temperature: float | Array = 1.0
) -> tuple[Array, Array, Array]:
    """What a loss on two sets of logits starts from: (student / T, teacher / T without gradient, T^2).

    Args:
      student_logits: [..., C], any float dtype.
      teacher_logits: Same shape.
      temperature: T > 0, a scalar, or one for each example, [...]; may be traced.

    Returns:
      [..., C], [..., C] and T^2 of the temperature's shape, in float32, or float64 where logits are.

    Raises:
      ValueError: If the shapes differ, or the temperature is not positive (checked where it is not traced).

    Example:
      >>> student, teacher, squared = softened(jnp.array([2.0, 4.0]), jnp.array([6.0, 0.0]), 2.0)
      >>> print(student, teacher, squared)
      [1. 2.] [3. 0.] 4.0
    """
    if jnp.shape(student_logits) != jnp.shape(teacher_logits) or jnp.ndim(student_logits) == 0:
        raise ValueError(
            f"student and teacher logits must both be [..., C], got {jnp.shape(student_logits)} and "
            f"{jnp.shape(teacher_logits)}"
        )
    if jnp.shape(temperature) not in ((), jnp.shape(student_logits)[:-1]):
        raise ValueError(
            f"temperature must be a scalar or {jnp.shape(student_logits)[:-1]}, got {jnp.shape(temperature)}"
        )
    if not isinstance(temperature, jax.core.Tracer) and not np.all(np.asarray(temperature) > 0):
        raise ValueError(f"temperature={temperature}: must be above 0")
    student, teacher = widened(student_logits, jax.lax.stop_gradient(teacher_logits))
    each = jnp.asarray(temperature, student.dtype)
    return _divided(student, each[..., None]), _divided(teacher, each[..., None]), jnp.square(each)


def divergence(log_p: Array, log_q: Array) -> Array:
    """sum_k p_k (log p_k - log q_k) over the last axis; an entry with p_k = 0 contributes nothing.

    Args:
      log_p: [..., C], log-probabilities.
      log_q: [..., C].

    Returns:
      [...], nats.

    Example:
      >>> float(divergence(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([1.0, 0.0]))))
      0.0
    """
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0), axis=-1)


def _divided(logits: Array, temperature: Array) -> Array:
    """Logits / T; -inf stays, and sends no gradient into a learned T."""
    finite = logits > -jnp.inf
    return jnp.where(finite, jnp.where(finite, logits, 0) / temperature, logits)
