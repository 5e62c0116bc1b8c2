"""TTM and WTTM: the teacher's distribution raised to a power, and a student without a temperature."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import widened
from wkd_jax.losses.kl import kl

Array = jax.Array


def ttm(student_logits: Array, teacher_logits: Array, *, power: float) -> Array:
    """Transformed teacher matching: KL(p^ || q), with p^_k = p_k^c / sum_j p_j^c and q = softmax(student).

    p = softmax(teacher), so p^ is the teacher at temperature T = 1 / c. The student has no temperature and there is no
    factor T^2. Up to a constant it equals T KL(p^ || softmax(student / T)) - (T - 1) H(q), with H the Renyi entropy of
    order c: KD with a regulariser that holds the student back from confidence.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants.
      power: c, above 0 and at most 1.

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If the shapes differ or `power` is out of range.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(ttm(student, teacher, power=0.1).mean()), 4)
      0.2354
      >>> round(float(wttm(student, teacher, power=0.1).mean()), 4)
      0.9354

    References:
      Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, arXiv 2402.11148.
    """
    if not 0 < power <= 1:
        raise ValueError(f"power={power}: must be above 0 and at most 1; it is 1 / temperature")
    student, teacher = widened(student_logits, teacher_logits)
    return kl(student, power * teacher)


def wttm(student_logits: Array, teacher_logits: Array, *, power: float) -> Array:
    """Weighted TTM: U `ttm`, with U = sum_k p_k^c of each example, large where the teacher is unsure.

    U lies between 1 and C^(1 - c), so the weight of WTTM in a total is far below that of TTM. See `ttm` for the rest.

    Args:
      student_logits: [..., C].
      teacher_logits: [..., C], constants.
      power: c, above 0 and at most 1.

    Returns:
      [...], nats, not averaged.

    Example:
      >>> unsure, sure = [0.0, 0.0], [50.0, 0.0]
      >>> student, teacher = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([unsure, sure])
      >>> ratio = wttm(student, teacher, power=0.5) / ttm(student, teacher, power=0.5)
      >>> [round(float(u), 4) for u in ratio]
      [1.4142, 1.0]

    References:
      Zheng and Yang, arXiv 2402.11148, section 4.
    """
    value = ttm(student_logits, teacher_logits, power=power)
    (teacher,) = widened(jax.lax.stop_gradient(teacher_logits))
    weight = jnp.exp(jax.nn.logsumexp(power * jax.nn.log_softmax(teacher.astype(value.dtype), axis=-1), axis=-1))
    return weight * value
