"""OFA-KD's loss: KD as a cross-entropy whose teacher is raised to a power, the target class apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.decoupled import target_mask
from wkd_jax.losses.kl import softened

Array = jax.Array


def ofa(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    power: float = 1.0,
    temperature: float = 1.0,
    form: str = "code",
) -> Array:
    """OFA-KD: -sum_k w_k log q_k, with the teacher's probabilities, one added at the label's, raised to a power.

    With p = softmax(teacher / T), q = softmax(student / T), the label y and the power e:

    | form | w_y | w_k, k != y |
    | --- | --- | --- |
    | code | (1 + p_y)^e - 1 | p_k^e |
    | paper | (1 + p_y)^e | p_k |

    A power above 1 gives the target class more weight, the more the surer the teacher is of it. "code" is what the
    authors released: one cross-entropy is taken out, which the task's own label term puts back, and the power takes
    weight from the other classes as well. At power 1 it has the gradient of `kl`. There is no factor T^2, and the
    teacher is a constant.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape. A class that one of the networks rules out (-inf) contributes nothing where w_k is 0.
      labels: [...] integers; of mixed labels, the argmax. A label outside [0, C) (padding) leaves no class apart: mask
        such rows in the result.
      power: e, at least 1.
      temperature: T > 0.
      form: "code" or "paper".

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If the shapes differ, labels are not integers, a number is out of range, or there is no such form.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(ofa(student, teacher, jnp.array([3, 2]), power=1.5).mean()), 4)
      0.9228

    References:
      Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
      NeurIPS 2023, arXiv 2310.19444.
    """
    if not power >= 1:
        raise ValueError(f"power={power}: must be 1 or more")
    if form not in ("code", "paper"):
        raise ValueError(f'form={form!r}: must be "code" or "paper"')
    student, teacher, _ = softened(student_logits, teacher_logits, temperature)
    target = target_mask(student, labels)
    p, log_q = jax.nn.softmax(teacher), jax.nn.log_softmax(student)
    if form == "code":
        weights = jnp.where(target, jnp.expm1(power * jnp.log1p(p)), p**power)  # exact for small p, too
    else:
        weights = jnp.where(target, (1 + p) ** power, p)
    return -jnp.sum(weights * jnp.where(weights > 0, log_q, 0), axis=-1)
