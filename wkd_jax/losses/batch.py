"""What losses on a whole batch share: which examples count, and groups of examples that stand for a device each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def counted(where: Array | None, shape: tuple[int, ...]) -> Array:
    """Which examples count.

    Args:
      where: Bool of that shape; None: all count.
      shape: Of the examples: [B], or [B, ...] where a row is one of several of an example.

    Returns:
      Bool of `shape`.

    Raises:
      ValueError: If `where` has another shape or is not bool.

    Example:
      >>> print(counted(None, (2,)))
      [ True  True]
    """
    counts = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    if counts.shape != shape or counts.dtype != bool:
        raise ValueError(f"where must be bool of shape {shape}, got {counts.dtype} {counts.shape}")
    return counts


def group_length(group_size: int | None, examples: int) -> int:
    """How many examples a group has.

    Args:
      group_size: As a caller gives it; None: all examples are one group.
      examples: Of the batch.

    Returns:
      `group_size`, or `examples` where it is None.

    Raises:
      ValueError: If groups of that size do not divide the examples.

    Example:
      >>> group_length(None, 8), group_length(2, 8)
      (8, 2)
    """
    length = examples if group_size is None else group_size
    if length < 1 or examples % length:
        raise ValueError(f"group_size={group_size}: must be at least 1 and divide the {examples} examples of the batch")
    return length


def group_mean(x: Array, where: Array, group_size: int | None) -> Array:
    """Mean over each group of consecutive examples of those that count, given to all of the group.

    Args:
      x: [B] floats.
      where: [B] bool.
      group_size: Examples in a group; None: all are one.

    Returns:
      Of the shape of `x`; 0 where no example of a group counts.

    Raises:
      ValueError: If groups do not divide the batch.

    Example:
      >>> print(group_mean(jnp.array([1.0, 3.0, 5.0, 9.0]), jnp.array([True, True, True, False]), 2))
      [2. 2. 5. 5.]
    """
    length = group_length(group_size, len(x))
    grouped, counts = x.reshape(-1, length), where.reshape(-1, length)
    total = jnp.sum(grouped, axis=1, keepdims=True, where=counts)
    mean = total / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
    return jnp.broadcast_to(mean, grouped.shape).reshape(x.shape)
