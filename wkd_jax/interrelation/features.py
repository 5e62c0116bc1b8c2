"""Collects the features of a teacher by class, streamed over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from wkd_jax import registry
from wkd_jax.types import Array, Batch, ModelInfo, Outputs


def select(outputs: Outputs, features: str, info: ModelInfo) -> Array:
    """The feature of a model's outputs that a spec names.

    Args:
      outputs: Of the teacher, in evaluation mode.
      features: "logits", "pooled", or the name of a tap.
      info: What the teacher publishes.

    Returns:
      [B, D] logits or pooled features, or [B, P, D]: every position of the tap in row order, class tokens left out.

    Raises:
      ValueError: If there is no such feature.
    """
    if features == "logits":
        return outputs.logits
    if features == "pooled":
        if outputs.pooled is None:
            raise ValueError(f"interrelation.features='pooled': {info.name} has none; use logits or a tap")
        return outputs.pooled
    check_name(features, info)
    tap, layout = outputs.taps[features], info.taps[features]
    if layout.layout == "tokens":
        return tap[:, layout.prefix_tokens :]
    return tap.reshape(tap.shape[0], -1, tap.shape[-1])


def check_name(features: str, info: ModelInfo) -> None:
    """Refuses a feature that the model does not have, before anything runs.

    Raises:
      ValueError: Names the nearest valid one.
    """
    known = ["logits", "pooled", *info.taps]
    if features not in known:
        raise ValueError(f"interrelation.features: {registry.unknown(f'feature of {info.name}', features, known)}")


def count_samples(samples_per_class: int, labels: np.ndarray, class_names: Sequence[str]) -> int:
    """How many samples of each class to take: what is asked for, or for 0 what the smallest class has.

    Args:
      samples_per_class: 0, or at least 2.
      labels: [num_examples] int, of the data set that will be streamed.
      class_names: C names.

    Raises:
      ValueError: If a class has fewer than that, or than 2; names the class, its count and the remedy.

    Example:
      >>> count_samples(0, np.array([0, 1, 0, 1, 1, 0, 1]), ["cat", "dog"])
      3
    """
    counts = np.bincount(labels, minlength=len(class_names))
    smallest = int(np.argmin(counts))
    available = int(counts[smallest])
    needed = max(samples_per_class, 2)
    if available < needed:
        remedy = f"set it to at most {available}" if available >= 2 else "use more images, or set interrelation.file"
        raise ValueError(
            f"class {class_names[smallest]!r} (label {smallest}) has {available} training images, "
            f"interrelation.samples_per_class={samples_per_class} needs {needed}: {remedy}"
        )
    return samples_per_class or available


def collect(
    apply: Callable[[Array], Array],
    batches: Iterable[Batch],
    *,
    num_classes: int,
    samples_per_class: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of the first `samples_per_class` examples of each class, in data order.

    The result is all the memory it takes: num_classes * samples_per_class * P * D floats on the host, besides two
    batches. Batches that hold nothing new are not run, and none is read once every class is full. While the device
    works on one batch, the one before it is copied.

    Args:
      apply: The frozen teacher, jitted: images [B, H, W, 3] -> features [B, D], or [B, P, D] where every position is a
        sample (see `select`). What it returns must be addressable by this process.
      batches: Integer labels; examples with `valid` False are ignored. All of one batch size, to compile once.
      num_classes: C.
      samples_per_class: n, at least 1.
      progress: Called with (samples so far, num_classes * samples_per_class) after each batch.

    Returns:
      [C, n, D] float32, or [C, n * P, D]: sample after sample, all positions of each, so that sample and position of
      one class are paired with the same sample number and position of another.

    Raises:
      ValueError: If a class has too few examples, a label does not exist, labels are mixed, or a feature is not
        finite or of the wrong shape.

    Example:
      >>> image = np.arange(12.0).reshape(4, 1, 1, 3)
      >>> batch = Batch(image, np.array([1, 0, 1, 0]), np.arange(4), np.array([True, True, True, False]))
      >>> collect(lambda image: image[:, 0, 0, :2], [batch], num_classes=2, samples_per_class=1)
      array([[[3., 4.]],
      <BLANKLINE>
             [[0., 1.]]], dtype=float32)
    """
    if num_classes < 1 or samples_per_class < 1:
        raise ValueError(f"num_classes={num_classes}, samples_per_class={samples_per_class}: must be at least 1")
    counts = np.zeros(num_classes, np.int64)
    total = num_classes * samples_per_class
    out: np.ndarray | None = None
    pending: tuple[Array, np.ndarray, np.ndarray, np.ndarray] | None = None
    for batch in batches:
        rows, labels, slots = _wanted(batch, counts, samples_per_class)
        if rows.size:
            running = apply(batch.image)  # returns before the device is done
            if running.shape[0] != len(batch.label):
                raise ValueError(
                    f"apply returned features {running.shape} for a batch of {len(batch.label)} labels: on every "
                    "process, both must be of the same examples"
                )
            if pending:
                out = _store(out, *pending, num_classes, samples_per_class)
            pending = running, rows, labels, slots
        if progress:
            progress(int(counts.sum()), total)
        if counts.sum() == total:
            break
    if counts.sum() < total:
        short = int(np.argmin(counts))
        raise ValueError(
            f"class {short} has {counts[short]} of the {samples_per_class} examples that "
            f"interrelation.samples_per_class asks for ({np.sum(counts < samples_per_class)} of {num_classes} classes "
            "have too few): lower it, or set it to 0 for the smallest class's count"
        )
    out = _store(out, *pending, num_classes, samples_per_class)
    return out.reshape(num_classes, -1, out.shape[-1])


def _wanted(batch: Batch, counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a batch to keep, their labels, and which sample of its class each one is. Counts them in `counts`."""
    labels, valid = np.asarray(batch.label), np.asarray(batch.valid)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers [B], got {labels.dtype} {labels.shape}: use batches without mixup")
    wrong = valid & ((labels < 0) | (labels >= len(counts)))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"example {batch.index[row]} has label {labels[row]}, outside 0..{len(counts) - 1}")
    rows = np.flatnonzero(valid)
    order = rows[np.argsort(labels[rows], kind="stable")]  # by class, data order within
    sizes = np.bincount(labels[rows], minlength=len(counts))
    slots = np.arange(rows.size) - np.repeat(np.cumsum(sizes) - sizes, sizes) + counts[labels[order]]
    keep = slots < limit
    np.minimum(counts + sizes, limit, out=counts)
    return order[keep], labels[order[keep]], slots[keep]


def _store(
    out: np.ndarray | None,
    features: Array,
    rows: np.ndarray,
    labels: np.ndarray,
    slots: np.ndarray,
    num_classes: int,
    samples_per_class: int,
) -> np.ndarray:
    """Writes one batch's features into [C, n, P, D], which is made by the first batch."""
    values = np.asarray(jax.device_get(features))
    if values.ndim not in (2, 3):
        raise ValueError(f"features must be [B, D] or [B, P, D], got {values.shape}")
    values = values.reshape(values.shape[0], -1, values.shape[-1])[rows].astype(np.float32)
    if out is None:
        out = np.empty((num_classes, samples_per_class, *values.shape[1:]), np.float32)
    if values.shape[1:] != out.shape[2:]:
        raise ValueError(
            f"features an example changed from {out.shape[2:]} to {values.shape[1:]} (positions, channels)"
        )
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(
            f"a feature of class {labels[np.argmin(finite)]} (its sample number {slots[np.argmin(finite)]}) is not "
            "finite: check the teacher's weights and the normalisation of its input"
        )
    out[labels, slots] = values
    return out
