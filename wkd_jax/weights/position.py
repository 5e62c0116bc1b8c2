"""Position embeddings of a Vision Transformer at another image size.

The same resizing as timm's since 0.9: bicubic, antialiased where the grid shrinks.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from wkd_jax.types import ModelInfo

Grid = tuple[int, int]
"""(height, width), in patches."""


def grid_of(info: ModelInfo) -> Grid:
    """The grid of the images that a network is built for."""
    height, width = info.image_size
    stride = info.taps[info.last_tap].stride
    return height // stride, width // stride


def square(count: int, info: ModelInfo) -> Grid | None:
    """The square grid of that many rows, those of the prefix tokens among them; None if there is none."""
    positions = count - info.taps[info.last_tap].prefix_tokens
    side = math.isqrt(max(positions, 0))
    return (side, side) if side and side * side == positions else None


def must_resize(found: tuple[int, ...], wanted: tuple[int, ...], info: ModelInfo, grid: Grid | None) -> bool:
    """Whether an embedding [1, N, D] of a file is that of another grid, and can be resized.

    Files of others do not tell their grid: it is a square where the number of rows is one, as in all published ones.

    Args:
      found: Shape in the file.
      wanted: Shape in the network.
      info: Of the network.
      grid: What the file says about itself; None if it says nothing.
    """
    if len(found) != 3 or (found[0], found[2]) != (wanted[0], wanted[2]):
        return False
    grid = grid or square(found[1], info)
    return grid is not None and grid != grid_of(info)


def resize(embedding: np.ndarray, info: ModelInfo, grid: Grid) -> np.ndarray:
    """Resizes [1, prefix + n * m, D], of a grid (n, m), to the grid of the network's `image_size`.

    The rows of prefix tokens stay as they are.

    Example:
      >>> from wkd_jax.types import Tap
      >>> taps = {"stage4": Tap(8, 16, "tokens", prefix_tokens=1)}
      >>> info = ModelInfo("vit", 10, taps, pooled=8, classifier="head/kernel", image_size=(64, 32))
      >>> resize(np.ones((1, 1 + 14 * 14, 8)), info, (14, 14)).shape
      (1, 9, 8)
    """
    prefix, rows = np.split(np.asarray(embedding, np.float32), [info.taps[info.last_tap].prefix_tokens], axis=1)
    (height, width), channels = grid_of(info), rows.shape[2]
    resized = jax.image.resize(rows.reshape(1, *grid, channels), (1, height, width, channels), "cubic", antialias=True)
    return np.concatenate([prefix, np.asarray(resized).reshape(1, height * width, channels)], axis=1)
