"""Anchors: the numbers of the published configurations, and their order from nested loops."""

import math

import numpy as np
import pytest

from wkd_jax.models.detection.anchors import cell_anchors, grid_anchors, pyramid_anchors


@pytest.mark.parametrize("size", [16, 32, 512])
def test_exact_cells(size):
    for cell, ratio in zip(cell_anchors(size, (0.5, 1.0, 3.0)), (0.5, 1.0, 3.0), strict=True):
        width = math.sqrt(size**2 / ratio)
        expected = np.array([-width, -ratio * width, width, ratio * width]) / 2
        np.testing.assert_allclose(cell, expected, atol=1e-4)


def test_cells_of_both_presets():
    exact, rounded = cell_anchors(32), cell_anchors(32, preset="tv")
    np.testing.assert_allclose(exact[0], [-22.627417, -11.3137085, 22.627417, 11.3137085], atol=1e-5)
    np.testing.assert_array_equal(rounded, [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]])
    assert exact.dtype == rounded.dtype == np.float32


def test_order():
    cells, (height, width), (down, across) = cell_anchors(64), (3, 4), (8, 16)
    expected = [
        cells[r] + np.array([x * across, y * down, x * across, y * down], np.float32)
        for y in range(height)
        for x in range(width)
        for r in range(3)
    ]
    np.testing.assert_array_equal(grid_anchors(cells, (height, width), (down, across)), expected)


def test_whole_canvas():
    levels = pyramid_anchors((800, 1344))
    assert sum(map(len, levels)) == 268_569
    for anchors, (size, stride) in zip(levels, ((32, 4), (64, 8), (128, 16), (256, 32), (512, 64)), strict=True):
        sides = anchors[:, 2:] - anchors[:, :2]
        np.testing.assert_allclose(sides.prod(axis=1), size**2, rtol=1e-4)
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2
        np.testing.assert_allclose(centre[[0, 3]], [[0, 0], [stride, 0]], atol=1e-3)
    assert len(pyramid_anchors((96, 96), sizes=(16, 32), strides=(4, 64))[1]) == 2 * 2 * 3  # rounded up


def test_torchvision_divides_the_canvas():
    """At the coarsest level of 800 x 1344 positions are 800 // 13 = 61 rows and 1344 // 21 = 64 columns apart."""
    coarse, exact = pyramid_anchors((800, 1344), preset="tv")[-1], pyramid_anchors((800, 1344))[-1]
    grid, ours = coarse.reshape(13, 21, 3, 4), exact.reshape(13, 21, 3, 4)
    np.testing.assert_array_equal(grid[1, 0, 1] - grid[0, 0, 1], [0, 61, 0, 61])
    np.testing.assert_array_equal(grid[0, 1, 1] - grid[0, 0, 1], [64, 0, 64, 0])
    np.testing.assert_array_equal(ours[1, 0, 1] - ours[0, 0, 1], [0, 64, 0, 64])


def test_errors():
    with pytest.raises(ValueError, match="preset='D2'"):
        pyramid_anchors((64, 64), preset="D2")
    with pytest.raises(ValueError, match="ratios above 0"):
        cell_anchors(32, (0.5, 0.0))
    with pytest.raises(ValueError, match=r"sizes=\(32,\).*one size for each"):
        pyramid_anchors((64, 64), sizes=(32,))
    with pytest.raises(ValueError, match="canvas"):
        pyramid_anchors((0, 64))
