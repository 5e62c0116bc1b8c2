"""Collects the features of a teacher by class, streamed over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

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
      ValueError: If a class has fewer than that, or than 2; names the class, its count and the remedy. If a label is of
        no class.

    Example:
      >>> count_samples(0, np.array([0, 1, 0, 1, 1, 0, 1]), ["cat", "dog"])
      3
    """
    wrong = (labels < 0) | (labels >= len(class_names))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"training example {row} has label {labels[row]}, outside 0..{len(class_names) - 1}")
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
    apply: Callable[[Batch], tuple[Array, Array, Array]],
    read: Callable[[np.ndarray], Iterable[Batch]],
    labels: np.ndarray,
    class_names: Sequence[str],
    samples_per_class: int,
    *,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray | None, list[int]]:
    """Features of the first `samples_per_class` examples of each class, in data order.

    Only these examples are read. One that cannot be read (it comes back with `valid` False) is replaced by the next of
    its class, in a further pass. So the result depends on the data alone, and not on the size of the batches or on how
    many devices and processes work. It is all the memory that is taken, C * n * P * D floats, besides two batches:
    while the device works on one, the one before it is copied.

    Where several processes work, all of them call this with the same arguments but `keep`, are given the same by
    `apply`, and raise the same errors.

    Args:
      apply: The frozen teacher, jitted: (features, index, valid) of all examples of a global batch, addressable by this
        process. Features are [B, D], or [B, P, D] where every position is a sample (see `select`).
      read: One pass over some examples: their positions [M] int64, increasing -> batches, all of one size.
      labels: [num_examples] int, of all examples.
      class_names: C names.
      samples_per_class: n, as `count_samples` takes it.
      keep: Whether this process wants the result.
      progress: Called with (samples so far, C * n) after each batch.

    Returns:
      (features, unreadable): [C, n, D] float32, or [C, n * P, D]: sample after sample, all positions of each, so that
      sample and position of one class are paired with the same sample number and position of another; None where
      `keep` is False. And the examples that could not be read.

    Raises:
      ValueError: If a class has too few examples, or too few that can be read; if a feature is not finite or of the
        wrong shape.

    Example:
      >>> image = np.arange(12.0).reshape(4, 1, 1, 3)
      >>> labels = np.array([1, 0, 1, 0])
      >>> read = lambda rows: [Batch(image[rows], labels[rows], rows, np.full(len(rows), True))]
      >>> apply = lambda batch: (batch.image[:, 0, 0, :2], batch.index, batch.valid)
      >>> features, _ = collect(apply, read, labels, ["cat", "dog"], 0)
      >>> features
      array([[[ 3.,  4.],
              [ 9., 10.]],
      <BLANKLINE>
             [[ 0.,  1.],
              [ 6.,  7.]]], dtype=float32)
    """
    samples = count_samples(samples_per_class, labels, class_names)
    of_class = _by_class(labels, len(class_names))
    rows = np.concatenate([own[:samples] for own in of_class])  # of each slot: the example that goes there
    spare = [own[samples:][::-1].tolist() for own in of_class]  # the next one last
    wanted, total, done, out = np.arange(len(rows)), len(rows), 0, None
    unreadable: list[int] = []
    while wanted.size:
        wanted = wanted[np.argsort(rows[wanted])]  # slots, in data order of what they want
        asked, found = rows[wanted], np.zeros(wanted.size, bool)
        for features, index, valid in _results(apply, read(asked)):
            places = np.searchsorted(asked, index[valid])
            if not np.array_equal(asked.take(places, mode="clip"), index[valid]):
                raise ValueError("the data set gave other examples than those it was asked for")
            values = _samples(features[valid], index[valid], labels)
            if keep:
                out = _empty((total, *values.shape[1:])) if out is None else out
                out[wanted[places]] = values
            found[places] = True
            done += places.size
            if progress:
                progress(done, total)
        wanted = wanted[~found]
        unreadable += rows[wanted].tolist()
        for slot in wanted:
            label = slot // samples
            if not spare[label]:
                _too_few_readable(class_names[label], label, rows[slot], samples, len(of_class[label]))
            rows[slot] = spare[label].pop()
    return out.reshape(len(class_names), -1, out.shape[-1]) if keep else None, unreadable


def _by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The examples of each class, in data order."""
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def _results(
    apply: Callable[[Batch], tuple[Array, Array, Array]], batches: Iterable[Batch]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `apply` gives for each batch, copied to the host while the device works on the next batch."""
    pending = None
    for batch in batches:
        running = apply(batch)  # returns before the device is done
        if pending:
            yield jax.device_get(pending)
        pending = running
    if pending:
        yield jax.device_get(pending)


def _samples(features: np.ndarray, index: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features as [B, P, D] float32, if they are good."""
    if features.ndim not in (2, 3):
        raise ValueError(f"features must be [B, D] or [B, P, D], got {features.shape}")
    values = (features if features.ndim == 3 else features[:, None]).astype(np.float32, copy=False)
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.all():
        row = index[np.argmin(finite)]
        raise ValueError(
            f"a feature of training example {row} (class {labels[row]}) is not finite: check the teacher's weights and "
            "the normalisation of its input"
        )
    return values


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 of any values, at an address that JAX's CPU backend takes over without a copy of its own."""
    size, alignment = math.prod(shape) * 4, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(np.float32).reshape(shape)


def _too_few_readable(name: str, label: int, row: int, samples: int, count: int) -> NoReturn:
    raise ValueError(
        f"class {name!r} (label {label}) has {count} training images, and fewer than {samples} of them can be read "
        f"(the last one that cannot is example {row}): restore the files, or lower interrelation.samples_per_class"
    )
