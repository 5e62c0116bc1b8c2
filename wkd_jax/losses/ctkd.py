"""CTKD: a temperature that is learned against the student, by reversing its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import widened
from wkd_jax.losses.kl import softened

Array = jax.Array


def ctkd_temperature(parameter: Array, reversal: float | Array, *, base: float = 1.0, span: float = 20.0) -> Array:
    """T = base + span * sigmoid(parameter), with the gradient that reaches the parameter multiplied by `reversal`.

    With a negative `reversal`, descent on the student's loss is ascent in the temperature: the two play against each
    other. The value does not depend on it, and what else the loss depends on keeps its gradient. Give the result to any
    loss whose temperature may be traced, such as `kd` or `dkd`: the gradient then goes through both softmaxes and T^2.

    The published schedule of `reversal` is -(1 - cos(pi min(e, E) / E)) / 2 over the 1-based epoch e: from 0 to -1 in E
    epochs.

    Args:
      parameter: Any shape, floats: one number for all examples, or one for each. 1 in the beginning, as published.
      reversal: The factor itself, sign included: -1 is the full reversal, 1 none. May be traced.
      base: The lowest temperature, above 0.
      span: The highest is base + span; above 0.

    Returns:
      Of the parameter's shape, float32 (float64 stays).

    Raises:
      ValueError: If `base` or `span` is not positive.

    Example:
      >>> temperature, gradient = jax.value_and_grad(ctkd_temperature)(jnp.array(1.0), -1.0)
      >>> round(float(temperature), 3), round(float(gradient), 3)
      (15.621, -3.932)

    References:
      Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv 2211.16231, section 3.
    """
    if not (base > 0 and span > 0):
        raise ValueError(f"base={base} and span={span}: both must be above 0")
    (parameter,) = widened(parameter)
    fixed = jax.lax.stop_gradient(parameter)
    return base + span * jax.nn.sigmoid(fixed + reversal * (parameter - fixed))


def ctkd_instance(student_logits: Array, teacher_logits: Array, *, temperature: Array) -> Array:
    """KD with a temperature for each example, as the authors print it: T^2 sum_k p'_k (log p'_k - log q_k).

    p' = softmax(teacher / T) + 1e-7, not renormalised, and q = softmax(student / T): besides the shift, which adds
    1e-7 (1 - log q_k) and the like to each class, this is `kd`. Only this formula is public; the network that gives the
    temperatures is not.

    Args:
      student_logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      teacher_logits: Same shape, constants; a gradient reaches the temperature through them all the same.
      temperature: [...], above 0, such as `ctkd_temperature` gives.

    Returns:
      [...], nats, not averaged.

    Raises:
      ValueError: If the shapes differ, or a temperature is not positive (checked where it is not traced).

    Example:
      >>> student = jnp.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
      >>> teacher = jnp.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
      >>> round(float(ctkd_instance(student, teacher, temperature=jnp.array([3.0, 7.0])).mean()), 4)
      0.1652

    References:
      Li et al., arXiv 2211.16231, section 3 (Instance-T).
    """
    student, teacher, squared = softened(student_logits, teacher_logits, temperature)
    p = jax.nn.softmax(teacher, axis=-1) + 1e-7
    return squared * jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(student, axis=-1)), axis=-1)
