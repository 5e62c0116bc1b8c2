"""Sizes and boxes of images that keep their proportions and are padded to one of a few canvases."""

from __future__ import annotations

import numpy as np

MIN_SIDE = 1e-5  # pixels, once resized: a box that is not wider and higher is of no use


def resized_sizes(sizes: np.ndarray, short: int, max_side: int) -> np.ndarray:
    """Sizes of images resized to a short side, or to a long side of `max_side` where that is less.

    Both sides are rounded to the nearest pixel, halves up.

    Args:
      sizes: [..., 2] integers, (height, width), pixels.
      short: Short side wanted.
      max_side: Limit of the long side.

    Returns:
      [..., 2] int32, at least 1.

    Example:
      >>> resized_sizes(np.array([[426, 640], [360, 640]]), 800, 1333)
      array([[ 800, 1202],
             [ 750, 1333]], dtype=int32)
    """
    sizes = np.asarray(sizes, np.float64)
    shortest = sizes.min(axis=-1, keepdims=True)
    scaled = np.where(sizes == shortest, short, sizes * (short / shortest))
    longest = scaled.max(axis=-1, keepdims=True)
    scaled = np.where(longest > max_side, scaled * (max_side / longest), scaled)
    return np.maximum(np.floor(scaled + 0.5), 1).astype(np.int32)


def smallest_canvases(sizes: np.ndarray, canvases: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which canvas of the least area holds each image.

    Args:
      sizes: [N, 2] integers, (height, width) of the resized images, pixels.
      canvases: (height, width) of each.

    Returns:
      [N] int64, positions in `canvases`, the first of equals; -1 where none is large enough.

    Example:
      >>> smallest_canvases(np.array([[50, 60], [60, 90], [65, 10]]), ((64, 96), (64, 64)))
      array([ 1,  0, -1])
    """
    shapes = np.array(canvases)
    fits = (sizes[:, None] <= shapes).all(axis=-1)
    cost = np.where(fits, shapes.prod(axis=-1), np.inf)
    return np.where(fits.any(axis=-1), cost.argmin(axis=-1), -1)


def place_boxes(boxes: np.ndarray, size: np.ndarray, new_size: np.ndarray, flip: bool) -> np.ndarray:
    """Boxes of an image in pixels of its resized and perhaps mirrored copy, clipped to it.

    Each axis is scaled by its own ratio, since both sides were rounded. Computed in float64.

    Args:
      boxes: [A, 4] float64, (x, y, width, height), pixels of the original.
      size: [2] or [A, 2], (height, width) of the original.
      new_size: Likewise, of the copy.
      flip: Whether it is mirrored left-right: x becomes its width minus x.

    Returns:
      [A, 4] float32, xyxy.

    Example:
      >>> place_boxes(np.array([[1.0, 2.0, 3.0, 9.0]]), np.array([4, 6]), np.array([8, 12]), flip=True)
      array([[ 4.,  4., 10.,  8.]], dtype=float32)
    """
    new_size = np.asarray(new_size, np.float64)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.tile(np.broadcast_to(new_size[..., ::-1], (len(boxes), 2)), 2)
    placed = np.clip(corners * np.tile((new_size / size)[..., ::-1], 2), 0.0, limits)
    if flip:
        placed[:, [2, 0]] = limits[:, [0]] - placed[:, [0, 2]]
    return placed.astype(np.float32)
