"""Cross-entropy with hard or soft labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """(1 - e) * (-sum_k y_k log q_k) + e * mean_k(-log q_k), with q = softmax(logits) and e the label smoothing.

    With integer labels, and with soft ones that sum to 1, this is the cross-entropy against (1 - e) y + e / C: the
    true class gets 1 - e + e / C.

    Args:
      logits: [..., C], any float dtype; computed in float32, or float64 where an input is.
      labels: [...] integers, or [..., C] floats: a class distribution, such as mixup makes.
      label_smoothing: e, at least 0 and below 1.

    Returns:
      [...], nats, not averaged. NaN where an integer label is not in 0..C-1.

    Raises:
      ValueError: If the labels' shape or dtype fits neither form, or `label_smoothing` is out of range.

    Example:
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> print(cross_entropy(logits, jnp.array([0, 1])))
      [0.23954484 1.0986123 ]
      >>> print(cross_entropy(logits, jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])))
      [1.2395449 1.0986123]

    References:
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7 (smoothing).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: must be at least 0 and below 1")
    shape, label_shape, label_dtype = jnp.shape(logits), jnp.shape(labels), jnp.result_type(labels)
    hard = jnp.issubdtype(label_dtype, jnp.integer)
    if not shape or label_shape != (shape[:-1] if hard else shape) or label_dtype == jnp.bool_:
        raise ValueError(
            f"labels must be integers {list(shape[:-1])} or floats {list(shape)} for logits {list(shape)}, "
            f"got {label_dtype} {list(label_shape)}"
        )
    log_q = jax.nn.log_softmax(jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32)), axis=-1)
    true = _pick(log_q, jnp.asarray(labels)) if hard else jnp.sum(jnp.asarray(labels, log_q.dtype) * log_q, axis=-1)
    return -(1 - label_smoothing) * true - label_smoothing * jnp.mean(log_q, axis=-1)


def _pick(log_q: Array, labels: Array) -> Array:
    """log_q of each label; NaN for a label that does not exist (indexing would wrap, or take another class)."""
    picked = jnp.take_along_axis(log_q, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where((labels >= 0) & (labels < log_q.shape[-1]), picked, jnp.nan)
