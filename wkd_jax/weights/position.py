"""Position embeddings of a Vision Transformer at another image size.

The same resizing as timm's since 0.9: bicubic, antialiased where the grid shrinks.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from wkd_jax.types import ModelInfo


def is_square(count: int, info: ModelInfo) -> bool:
    """Whether that many rows, less those of the prefix tokens, are a square grid."""
    positions = count - info.taps[info.last_tap].prefix_tokens
    return positions > 0 and math.isqrt(positions) ** 2 == positions


def resize(embedding: np.ndarray, info: ModelInfo) -> np.ndarray:
    """Resizes [1, prefix + n * n, D] to [1, prefix + h * w, D], the grid of the network's `image_size`.

    The rows of prefix tokens stay as they are.

    Example:
      >>> from wkd_jax.types import Tap
      >>> taps = {"stage4": Tap(8, 16, "tokens", prefix_tokens=1)}
      >>> info = ModelInfo("vit", 10, taps, pooled=8, classifier="head/kernel", image_size=(64, 32))
      >>> resize(np.ones((1, 1 + 14 * 14, 8)), info).shape
      (1, 9, 8)
    """
    tap = info.taps[info.last_tap]
    height, width = (side // tap.stride for side in info.image_size)
    prefix, grid = np.split(np.asarray(embedding, np.float32), [tap.prefix_tokens], axis=1)
    side, channels = math.isqrt(grid.shape[1]), grid.shape[2]
    grid = grid.reshape(1, side, side, channels)
    grid = jax.image.resize(grid, (1, height, width, channels), "cubic", antialias=True)
    return np.concatenate([prefix, np.asarray(grid).reshape(1, height * width, channels)], axis=1)
