"""Collects the features of a teacher by class, streamed over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np

from wkd_jax import registry
from wkd_jax.types import Array, Batch, ModelInfo, Outputs, Samples


def select(outputs: Outputs, features: str, info: ModelInfo) -> Array:
    """The feature of a model's outputs that a spec names.

    Args:
      outputs: Of the teacher, in evaluation mode.
      features: "logits", "pooled", or the name of a tap.
      info: What the teacher publishes.

    Returns:
      [B, D] logits or pooled features ([B, R, D] of a detector's regions), or [B, P, D]: every position of the tap in
      row order, class tokens left out.

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
    known = ["logits", "pooled", *(info.taps if info.task == "classification" else ())]
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
            f"class {class_names[smallest]!r} (label {smallest}) has {available} training samples, "
            f"interrelation.samples_per_class={samples_per_class} needs {needed}: {remedy}"
        )
    return samples_per_class or available


def collect(
    apply: Callable[[Batch], tuple[Array, Array, Array]],
    read: Callable[[np.ndarray], Iterable[Batch]],
    of: Samples,
    class_names: Sequence[str],
    samples_per_class: int,
    *,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray | None, list[int]]:
    """Features of the first `samples_per_class` samples of each class, in data order.

    Only the examples that hold these are read. A sample that cannot be had (it comes back with `valid` False) is
    replaced by the next of its class, in a further pass. So the result depends on the data alone, and not on the size
    of the batches or on how many devices and processes work. It is all the memory that is taken, C * n * P * D floats,
    besides two batches: while the device works on one, the one before it is copied.

    Where several processes work, all of them call this with the same arguments but `keep`, are given the same by
    `apply`, and raise the same errors.

    Args:
      apply: The frozen teacher, jitted: (features, index, valid) of all examples of a global batch, addressable by this
        process. Features are [B, D], or [B, P, D] where every position is a sample (see `select`), and valid is [B];
        where `of.row` counts rows, features are [B, R, D] and valid is [B, R].
      read: One pass over some examples: their positions [M] int64, increasing -> batches, all of one size.
      of: The class of every sample, and where it is; in data order within each class.
      class_names: C names.
      samples_per_class: n, as `count_samples` takes it.
      keep: Whether this process wants the result.
      progress: Called with (samples so far, C * n) after each batch.

    Returns:
      (features, lost): [C, n, D] float32, or [C, n * P, D]: sample after sample, all positions of each, so that sample
      and position of one class are paired with the same sample number and position of another; None where `keep` is
      False. And the samples, as positions in `of`, that could not be had.

    Raises:
      ValueError: If a class has too few samples, or too few that can be had; if a feature is not finite or of the
        wrong shape.

    Example:
      >>> image = np.arange(12.0).reshape(4, 1, 1, 3)
      >>> labels = np.array([1, 0, 1, 0])
      >>> read = lambda rows: [Batch(image[rows], labels[rows], rows, np.full(len(rows), True))]
      >>> apply = lambda batch: (batch.image[:, 0, 0, :2], batch.index, batch.valid)
      >>> features, _ = collect(apply, read, Samples(labels, np.arange(4)), ["cat", "dog"], 0)
      >>> features
      array([[[ 3.,  4.],
              [ 9., 10.]],
      <BLANKLINE>
             [[ 0.,  1.],
              [ 6.,  7.]]], dtype=float32)
    """
    samples = count_samples(samples_per_class, of.label, class_names)
    of_class = _by_class(of.label, len(class_names))
    chosen = np.concatenate([own[:samples] for own in of_class])  # of each slot: the sample that goes there
    spare = [own[samples:][::-1].tolist() for own in of_class]  # the next one last
    wanted, total, done, out = np.arange(len(chosen)), len(chosen), 0, None
    lost: list[int] = []
    while wanted.size:
        wanted = wanted[np.argsort(of.example[chosen[wanted]], kind="stable")]  # slots, in order of what they want
        asked, found = of.example[chosen[wanted]], np.zeros(wanted.size, bool)
        for features, index, valid in _results(apply, read(np.unique(asked))):
            there = np.flatnonzero(valid if of.row is None else valid.any(axis=1))
            first, last = (np.searchsorted(asked, index[there], side=side) for side in ("left", "right"))
            if np.any(first == last):
                raise ValueError("the data set gave other examples than those it was asked for")
            counts = last - first
            places = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
            cell: tuple[np.ndarray, ...] = (np.repeat(there, counts),)
            if of.row is not None:
                cell = (*cell, of.row[chosen[wanted[places]]])
                places, cell = places[valid[cell]], tuple(axis[valid[cell]] for axis in cell)
            values = _samples(features[cell], chosen[wanted[places]], of.label)
            if keep:
                out = _empty((total, *values.shape[1:])) if out is None else out
                out[wanted[places]] = values
            found[places] = True
            done += places.size
            if progress:
                progress(done, total)
        wanted = wanted[~found]
        lost += chosen[wanted].tolist()
        for slot in wanted:
            label = slot // samples
            if not spare[label]:
                _too_few_readable(class_names[label], label, of.example[chosen[slot]], samples, len(of_class[label]))
            chosen[slot] = spare[label].pop()
    return out.reshape(len(class_names), -1, out.shape[-1]) if keep else None, lost


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


def _samples(features: np.ndarray, sample: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features as [N, P, D] float32, if they are good."""
    if features.ndim not in (2, 3):
        raise ValueError(
            f"features must be [B, D], [B, P, D] or, of rows, [B, R, D]; one sample's are {features.shape[1:]}"
        )
    values = (features if features.ndim == 3 else features[:, None]).astype(np.float32, copy=False)
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.all():
        bad = sample[np.argmin(finite)]
        raise ValueError(
            f"a feature of training sample {bad} (class {labels[bad]}) is not finite: check the teacher's weights and "
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
        f"class {name!r} (label {label}) has {count} training samples, and fewer than {samples} of them can be read "
        f"(the last one that cannot is example {row}): restore the files, or lower interrelation.samples_per_class"
    )
