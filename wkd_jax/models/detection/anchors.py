"""Anchors of a feature pyramid, in NumPy: they depend on sizes alone, so they are constants of the compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
STRIDES = (4, 8, 16, 32, 64)
Preset = Literal["d2", "tv"]


def cell_anchors(size: float, ratios: Sequence[float] = RATIOS, *, preset: Preset = "d2") -> np.ndarray:
    """Anchors of one cell, centred at 0: for each ratio a box of area size^2.

    Args:
      size: Side of the square anchor, pixels.
      ratios: Height over width.
      preset: "d2": the exact sides, as in detectron2. "tv": coordinates rounded to integers (a half to the even one),
        as in torchvision.

    Returns:
      [R, 4] xyxy, float32, in the order of `ratios`.

    Raises:
      ValueError: If a size, a ratio or the preset is out of range.

    Example:
      >>> print(cell_anchors(32, (0.5, 1.0), preset="tv"))
      [[-23. -11.  23.  11.]
       [-16. -16.  16.  16.]]

    References:
      Ren et al., "Faster R-CNN", NeurIPS 2015, arXiv 1506.01497, section 3.1; Lin et al., "Feature Pyramid Networks for
      Object Detection", CVPR 2017, arXiv 1612.03144, section 4.1.
    """
    _check(preset)
    if not size > 0 or not len(ratios) or not min(ratios) > 0:
        raise ValueError(f"size={size}, ratios={tuple(ratios)}: anchors need a size and ratios above 0")
    # "tv" in float32 throughout: which integer is nearest may depend on it.
    root = np.sqrt(np.asarray(ratios, np.float32 if preset == "tv" else np.float64))
    width, height = 1 / root * size, root * size
    cells = np.stack([-width, -height, width, height], axis=1) / 2
    return (np.round(cells) if preset == "tv" else cells).astype(np.float32)


def grid_anchors(cells: np.ndarray, grid: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """The anchors of a cell at every position of a map; the first one's centre is pixel (0, 0).

    Args:
      cells: [R, 4] xyxy around 0.
      grid: (height, width) of the map, in positions.
      stride: Pixels from one position to the next, (vertical, horizontal).

    Returns:
      [height * width * R, 4] xyxy, float32: y slowest, then x, then the anchor of the cell, which is the order of a
      head's output [height, width, R * 4] once reshaped.

    Example:
      >>> print(grid_anchors(cell_anchors(4, (1.0,)), (2, 2), (8, 16)))
      [[-2. -2.  2.  2.]
       [14. -2. 18.  2.]
       [-2.  6.  2. 10.]
       [14.  6. 18. 10.]]
    """
    sides = (np.arange(count) * step for count, step in zip(grid, stride, strict=True))
    y, x = np.meshgrid(*sides, indexing="ij")
    shifts = np.stack([x, y, x, y], axis=-1).astype(np.float32)
    return (shifts[:, :, None] + cells).reshape(-1, 4)


def pyramid_anchors(
    canvas: tuple[int, int],
    *,
    sizes: Sequence[float] = SIZES,
    ratios: Sequence[float] = RATIOS,
    strides: Sequence[int] = STRIDES,
    preset: Preset = "d2",
) -> list[np.ndarray]:
    """Anchors of all levels of a canvas; `np.concatenate` of the list is the order of the concatenated outputs.

    A level's map has ceil(side / stride) positions along each side, as strided convolutions with symmetric padding
    leave it. Anchors are not cut off at the borders.

    Args:
      canvas: (height, width) of the padded image, pixels.
      sizes: Side of the square anchor of each level, pixels.
      ratios: Height over width, the same at each level.
      strides: Of each level, pixels.
      preset: As in `cell_anchors`. "tv" also takes the side of the canvas divided by that of the map, rounded down, for
        the distance of two positions. At the coarsest level it is often below the stride: 800 // 13 = 61, not 64.

    Returns:
      One [positions * R, 4] float32 xyxy array for each level, in the order of `grid_anchors`.

    Raises:
      ValueError: If sizes and strides differ in number, or a value is out of range.

    Example:
      >>> [len(anchors) for anchors in pyramid_anchors((800, 1344))]
      [201600, 50400, 12600, 3150, 819]
    """
    _check(preset)
    if len(sizes) != len(strides):
        raise ValueError(f"sizes={tuple(sizes)}, strides={tuple(strides)}: need one size for each level's stride")
    if min(canvas) < 1 or min(strides) < 1:
        raise ValueError(f"canvas={tuple(canvas)}, strides={tuple(strides)}: must be at least 1")
    levels = []
    for size, stride in zip(sizes, strides, strict=True):
        grid = (-(-canvas[0] // stride), -(-canvas[1] // stride))
        step = (canvas[0] // grid[0], canvas[1] // grid[1]) if preset == "tv" else (stride, stride)
        levels.append(grid_anchors(cell_anchors(size, ratios, preset=preset), grid, step))
    return levels


def _check(preset: str) -> None:
    if preset not in ("d2", "tv"):
        raise ValueError(f"preset={preset!r}: must be 'd2' or 'tv'")
