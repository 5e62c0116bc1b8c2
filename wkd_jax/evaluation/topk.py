"""Top-k accuracy and agreement as sums over a padded batch, so that any number of batches and hosts adds up exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from wkd_jax import losses
from wkd_jax.types import Array

CONFUSION_CLASSES = 100  # beyond so many, [C, C] counts cost more than a reader gets from them


def sums(logits: Array, teacher_logits: Array | None, labels: Array, valid: Array) -> dict[str, Array]:
    """Adds up one batch.

    A label counts as within the top k when fewer than k classes have a larger logit, and ties go to the lower class,
    as `argmax` does.

    Args:
      logits: [B, C].
      teacher_logits: [B, C]; None in a run without a teacher.
      labels: [B] int32.
      valid: [B] bool; False rows (padding) contribute nothing.

    Returns:
      int32 counts and a float32 sum: `examples`, `loss` (cross-entropy, summed), `top1`, `top5`; by class `count` and
      `student_correct` [C]; up to 100 classes `confusion` [C, C] (true class, predicted class). With a teacher also
      `teacher_top1`, `agreement` (same argmax) and by class `teacher_correct`, `agree` [C].
    """
    classes = logits.shape[-1]
    prediction = jnp.argmax(logits, axis=-1)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(classes) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=-1)
    rank = jnp.where(jnp.isfinite(own[:, 0]), rank, 1 << 30)  # nothing compares with NaN: it would rank first
    correct = (rank < 1) & valid

    def by_class(flags: Array) -> Array:
        return jnp.zeros(classes, jnp.int32).at[labels].add(flags.astype(jnp.int32))

    result = {
        "examples": jnp.sum(valid, dtype=jnp.int32),
        "loss": jnp.sum(jnp.where(valid, losses.cross_entropy(logits, labels), 0.0)),
        "top1": jnp.sum(correct, dtype=jnp.int32),
        "top5": jnp.sum((rank < 5) & valid, dtype=jnp.int32),
        "count": by_class(valid),
        "student_correct": by_class(correct),
    }
    if classes <= CONFUSION_CLASSES:
        blank = jnp.zeros((classes, classes), jnp.int32)
        result["confusion"] = blank.at[labels, prediction].add(valid.astype(jnp.int32))
    if teacher_logits is not None:
        teacher = jnp.argmax(teacher_logits, axis=-1)
        teacher_correct, agree = (teacher == labels) & valid, (teacher == prediction) & valid
        result |= {
            "teacher_top1": jnp.sum(teacher_correct, dtype=jnp.int32),
            "agreement": jnp.sum(agree, dtype=jnp.int32),
            "teacher_correct": by_class(teacher_correct),
            "agree": by_class(agree),
        }
    return result


def summarise(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Metrics of a data set from the sums of its batches.

    Returns:
      `student_top1`, `student_top5`, `teacher_top1`, `agreement` (percent), `loss` (mean cross-entropy of the
      student), `examples`, and the arrays by class.
    """
    total = {name: sum(np.asarray(batch[name], np.float64) for batch in batches) for name in batches[0]}
    examples = int(total["examples"])
    percent = {"student_top1": "top1", "student_top5": "top5", "teacher_top1": "teacher_top1", "agreement": "agreement"}
    metrics: dict[str, Any] = {
        name: 100.0 * int(total[source]) / examples for name, source in percent.items() if source in total
    }
    arrays = {name: np.asarray(value).astype(int) for name, value in total.items() if np.ndim(value)}
    return {**metrics, "loss": float(total["loss"]) / examples, "examples": examples, **arrays}
