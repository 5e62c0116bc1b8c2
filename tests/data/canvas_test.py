"""Sizes, canvases and boxes of resized images."""

from fractions import Fraction

import numpy as np
import pytest

from wkd_jax.data.canvas import place_boxes, resized_sizes, smallest_canvases
from wkd_jax.data.detection_split import CANVASES


def exact_size(height, width, short, max_side):
    scale = min(Fraction(short, min(height, width)), Fraction(max_side, max(height, width)))
    return [int(side * scale + Fraction(1, 2)) for side in (height, width)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((426, 640), (800, 1202)), ((360, 640), (750, 1333)), ((640, 426), (1202, 800)), ((640, 640), (800, 800))],
)
def test_known_sizes(size, expected):
    np.testing.assert_array_equal(resized_sizes(np.array(size), 800, 1333), expected)


def test_sizes_equal_exact_arithmetic_but_for_ties():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1200, (3000, 2))
    for short, limit in ((800, 1333), (640, 1333), (48, 64)):
        got = resized_sizes(sizes, short, limit)
        expected = np.maximum([exact_size(*map(int, size), short, limit) for size in sizes], 1)
        assert np.abs(got - expected).max() <= 1
        assert (got != expected).mean() < 1e-3  # where floats round x.5 down
        assert got.max() <= limit and (got.min(axis=1) <= short).all()


def test_larger_short_sides_never_give_smaller_images():
    """What lets one canvas serve all short sides of training."""
    sizes = np.random.default_rng(1).integers(20, 1200, (1000, 2))
    grown = [resized_sizes(sizes, short, 1333) for short in (640, 672, 704, 736, 768, 800)]
    assert all((small <= large).all() for small, large in zip(grown, grown[1:], strict=False))


def test_every_proportion_has_a_default_canvas_that_holds_it():
    sides = np.arange(100, 1001, 50)
    sizes = np.stack(np.meshgrid(sides, sides), axis=-1).reshape(-1, 2)
    resized = resized_sizes(sizes, 800, 1333)
    chosen = smallest_canvases(resized, CANVASES)
    assert (chosen >= 0).all()
    assert (resized <= np.array(CANVASES)[chosen]).all()
    mirrored = smallest_canvases(resized[:, ::-1], CANVASES)
    different = sizes[:, 0] != sizes[:, 1]
    np.testing.assert_array_equal(mirrored[different], (chosen[different] + 2) % 4)  # transposes
    assert CANVASES[smallest_canvases(np.array([[800, 1067]]), CANVASES)[0]] == (800, 1088)
    assert CANVASES[smallest_canvases(np.array([[1199, 800]]), CANVASES)[0]] == (1344, 800)


def test_the_smallest_canvas_is_taken_whatever_their_order():
    sizes = np.array([[60, 60], [60, 90], [90, 60], [97, 10], [64, 96]])
    canvases = ((128, 128), (96, 64), (64, 96), (64, 64), (96, 64))
    assert smallest_canvases(sizes, canvases).tolist() == [3, 2, 1, 0, 2]
    assert smallest_canvases(sizes, canvases[1:]).tolist() == [2, 1, 0, -1, 1]


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_equal_the_definition(flip):
    rng = np.random.default_rng(2)
    boxes = np.concatenate([rng.uniform(-5, 60, (50, 2)), rng.uniform(0, 50, (50, 2))], axis=1)
    size, new_size = (53, 71), (97, 130)
    got = place_boxes(boxes, np.array(size), np.array(new_size), flip)
    assert got.dtype == np.float32
    for (x, y, w, h), row in zip(boxes, got, strict=True):
        x1, x2 = (min(max(value * 130 / 71, 0), 130) for value in (x, x + w))
        y1, y2 = (min(max(value * 97 / 53, 0), 97) for value in (y, y + h))
        if flip:
            x1, x2 = 130 - x2, 130 - x1
        np.testing.assert_allclose(row, (x1, y1, x2, y2), rtol=1e-6, atol=1e-5)
    many = place_boxes(boxes, np.tile(size, (50, 1)), np.tile(new_size, (50, 1)), flip)
    np.testing.assert_array_equal(many, got)
    assert place_boxes(np.zeros((0, 4)), np.array(size), np.array(new_size), flip).shape == (0, 4)
