"""Teacher-free knowledge distillation: from the same network trained before, or from a designed distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.decoupled import target_mask
from wkd_jax.losses.feature import widened
from wkd_jax.losses.kl import kd, kl

Array = jax.Array


def tf_kd_self(
    student_logits: Array, teacher_logits: Array, *, temperature: float | Array = 6.0, reduction: str = "mean"
) -> Array:
    """Tf-KD's self-training: T^2 KL(p || q), whose teacher is the same network trained before with labels alone.

    The published code averages over the batch *and* over the classes, which divides the divergence by C, and multiplies
    with a factor (50 for most networks on CIFAR-100) in its loss weight.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants.
      temperature: T > 0 of both sides, a scalar, or one for each example, [...].
      reduction: Over the classes: "mean" as published, or "sum", which is `kd`.

    Returns:
      [...], nats, not averaged over examples.

    Raises:
      ValueError: If the shapes differ, T is not positive, or there is no such reduction.

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(tf_kd_self(student, teacher).mean()), 4)
      0.0349

    References:
      Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020, arXiv 1909.11723,
      section 4 (the published code is the "mean" form).
    """
    return _reduced(kd(student_logits, teacher_logits, temperature=temperature), student_logits, reduction)


def tf_kd_reg(
    student_logits: Array,
    labels: Array,
    *,
    temperature: float = 20.0,
    correct_probability: float = 0.99,
    soften_student: bool = False,
    reduction: str = "mean",
) -> Array:
    """Tf-KD's regularisation: KL(u || q) to a virtual teacher u that knows the label and nothing else.

    u = softmax(d / T), where d itself is a distribution: `correct_probability` on the label, the rest spread evenly. A
    softmax of probabilities is nearly uniform at the published T, so this acts as label smoothing. There is no factor
    T^2, and q = softmax(logits) at temperature 1, as in the published CIFAR code; the paper (and by its authors' word
    their ImageNet code) softens the student with the same T.

    Args:
      student_logits: [..., C], any float dtype; computed in float32 (float64 stays). C >= 2.
      labels: [...], integers.
      temperature: T > 0 of the virtual teacher.
      correct_probability: Of the label in d, from 0 to 1.
      soften_student: q = softmax(logits / T), as in the paper.
      reduction: Over the classes: "mean" as published, which divides by C, or "sum".

    Returns:
      [...], nats, not averaged over examples.

    Raises:
      ValueError: If labels are not integers of the logits' leading shape, or a setting is out of range.

    Example:
      >>> logits = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> round(float(tf_kd_reg(logits, jnp.array([3, 2]), reduction="sum").mean()), 4)
      0.3336

    References:
      Yuan et al., CVPR 2020, arXiv 1909.11723, section 5.
    """
    if not 0 <= correct_probability <= 1:
        raise ValueError(f"correct_probability={correct_probability}: must be from 0 to 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    (student,) = widened(student_logits)
    others = (1 - correct_probability) / max(student.shape[-1] - 1, 1)
    virtual = jnp.where(target_mask(student, labels), correct_probability, others).astype(student.dtype)
    if soften_student:
        student = student / temperature
    return _reduced(kl(student, virtual / temperature), student_logits, reduction)


def _reduced(divergence: Array, logits: Array, reduction: str) -> Array:
    """A sum over classes as it is, or as the mean."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r}: must be "mean" or "sum" (over the classes)')
    return divergence / jnp.shape(logits)[-1] if reduction == "mean" else divergence
