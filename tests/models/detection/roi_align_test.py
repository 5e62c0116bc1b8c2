"""Both forms of RoIAlign against float64 loops over the samples, their gradients, and the level of a box."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.models.detection.roi_align import assign_levels, roi_align_einsum, roi_align_gather

SHAPES, STRIDES, D = ((24, 32), (12, 16), (8, 6)), (4, 8, 16), 3
MAPS = [np.random.default_rng(i).normal(size=(*shape, D)).astype(np.float32) for i, shape in enumerate(SHAPES)]
FORMS = [(ratio, aligned) for ratio in (0, 2) for aligned in (True, False)]


def draw(count=24, seed=0):
    """Boxes of all sizes, beyond the borders too; slivers, points, and sides of exactly 21 and 28 positions."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.random((2, count, 2)) * 110 - 15, rng.random((count, 2)) ** 2 * 120 + 1
    boxes = np.concatenate([corner[0], corner[0] + sides], axis=1)
    boxes[:6] = [
        [4, 4, 88, 88],
        [0, 8, 112, 92],
        [3, 10, 3.2, 90],
        [20, 9, 120, 9.5],
        [50, 30, 50, 30],
        [-60, -60, -40, -45],
    ]
    boxes[6:8] = [[0, 0, 0, 0], [30, 30, 20, 20]]
    levels = rng.integers(0, 3, count)
    levels[:6] = 0
    return boxes.astype(np.float32), levels.astype(np.int32)


BOXES, LEVELS = draw()


def oracle_weights(lo, hi, stride, size, cells, ratio, aligned):
    """[cells, size] of one axis, sample by sample."""
    shift = 0.5 if aligned else 0.0
    start, length = lo / stride - shift, (hi - lo) / stride
    length = length if aligned else max(length, 1.0)
    samples = ratio or math.ceil(length / cells)
    weights = np.zeros((cells, size))
    for i in range(cells):
        for a in range(samples):
            y = start + (i + (a + 0.5) / samples) * length / cells
            if y < -1 or y > size:
                continue
            y = max(y, 0.0)
            low = math.floor(y)
            if low >= size - 1:
                weights[i, size - 1] += 1
            else:
                weights[i, low] += 1 - (y - low)
                weights[i, low + 1] += y - low
    return weights / max(samples, 1)


def oracle(maps, boxes, levels, ratio, aligned, cells=7):
    pooled = []
    for box, level in zip(np.asarray(boxes, np.float64), levels, strict=True):
        x, stride = np.asarray(maps[level], np.float64), STRIDES[level]
        down, across = (
            oracle_weights(box[i], box[i + 2], stride, x.shape[1 - i], cells, ratio, aligned) for i in (1, 0)
        )
        pooled.append(np.einsum("ph,hwd,qw->pqd", down, x, across))
    return np.array(pooled)


def compiled(form, ratio, aligned, cells=7):
    settings = {"strides": STRIDES, "sampling_ratio": ratio, "aligned": aligned, "output_size": cells, "chunk": 8}
    return jax.jit(functools.partial(form, **settings))


@pytest.mark.parametrize(("ratio", "aligned"), FORMS)
def test_einsum(ratio, aligned):
    ours = compiled(roi_align_einsum, ratio, aligned)(MAPS, BOXES, LEVELS)
    np.testing.assert_allclose(ours, oracle(MAPS, BOXES, LEVELS, ratio, aligned), atol=2e-5)
    empty = np.asarray(ours)[4]
    assert np.all(empty == 0) == (ratio == 0 and aligned)
    assert np.all(np.asarray(ours)[5] == 0)  # it lies beyond the map


@pytest.mark.parametrize("aligned", [True, False])
def test_gather(aligned):
    ours = compiled(roi_align_gather, 2, aligned)(MAPS, BOXES, LEVELS)
    np.testing.assert_allclose(ours, oracle(MAPS, BOXES, LEVELS, 2, aligned), atol=2e-5)


def test_another_grid():
    """As many cells as the resolution of distilled features has, and more samples."""
    for form in (roi_align_einsum, roi_align_gather):
        ours = jax.jit(functools.partial(form, strides=STRIDES, output_size=18, sampling_ratio=3))(MAPS, BOXES, LEVELS)
        np.testing.assert_allclose(ours, oracle(MAPS, BOXES, LEVELS, 3, True, cells=18), atol=2e-5)


@pytest.mark.parametrize(("form", "ratio"), [(roi_align_einsum, 0), (roi_align_gather, 2)])
def test_gradient(form, ratio):
    """The value is linear in the maps: the gradient is what the transposed oracle gives, and boxes get none."""
    cotangent = np.random.default_rng(5).normal(size=(len(BOXES), 7, 7, D)).astype(np.float32)
    run = functools.partial(form, strides=STRIDES, sampling_ratio=ratio, chunk=12)
    gradient, of_boxes = jax.jit(jax.grad(lambda m, b: jnp.sum(run(m, b, LEVELS) * cotangent), argnums=(0, 1)))(
        MAPS, BOXES
    )
    np.testing.assert_array_equal(of_boxes, 0)
    expected = [np.zeros(x.shape) for x in MAPS]
    for box, level, out in zip(BOXES.astype(np.float64), LEVELS, cotangent, strict=True):
        height, width = SHAPES[level]
        down, across = (
            oracle_weights(box[i], box[i + 2], STRIDES[level], size, 7, ratio, True)
            for i, size in ((1, height), (0, width))
        )
        expected[level] += np.einsum("ph,pqd,qw->hwd", down, out, across)
    for ours, exact in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-4)


@pytest.mark.parametrize("form", [roi_align_einsum, roi_align_gather])
def test_properties(form):
    run = jax.jit(functools.partial(form, strides=(4,), sampling_ratio=2, output_size=3))
    level, inside = jnp.zeros(2, jnp.int32), np.array([[20, 20, 41, 50], [24, 30, 30, 34]], np.float32)
    np.testing.assert_allclose(run([np.full_like(MAPS[0], 2.5)], inside, level), 2.5, rtol=1e-6)
    moved = run([np.roll(MAPS[0], (2, 3), axis=(0, 1))], inside + np.float32([12, 8, 12, 8]), level)
    np.testing.assert_allclose(moved, run([MAPS[0]], inside, level), atol=1e-5)


def test_chunks_and_batches():
    for form in (roi_align_einsum, roi_align_gather):
        run = functools.partial(form, strides=STRIDES, sampling_ratio=2, output_size=2, chunk=5)  # the last is padded
        other, levels = draw(seed=1)
        maps, boxes = [np.stack([x, 2 * x]) for x in MAPS], np.stack([BOXES, other])
        batch = jax.jit(jax.vmap(run))(maps, boxes, np.stack([LEVELS, levels]))
        np.testing.assert_allclose(batch[0], oracle(MAPS, BOXES, LEVELS, 2, True, cells=2), atol=2e-5)
        np.testing.assert_allclose(batch[1], 2 * oracle(MAPS, other, levels, 2, True, cells=2), atol=4e-5)


@pytest.mark.parametrize(("form", "ratio"), [(roi_align_einsum, 0), (roi_align_gather, 2)])
def test_bfloat16(form, ratio):
    half = [jnp.asarray(x, jnp.bfloat16) for x in MAPS]
    run = compiled(form, ratio, True)
    ours = run(half, BOXES, LEVELS)
    assert ours.dtype == jnp.bfloat16
    exact = oracle(half, BOXES, LEVELS, ratio, True)
    np.testing.assert_allclose(
        ours.astype(jnp.float32), exact, atol=0.04
    )  # three roundings to 8 bits of values below 4


def test_boxes_that_are_not_finite_come_back():
    boxes = np.array([[np.nan, 0, 10, 10], [0, 0, np.inf, 10], [4, 4, 30, 30]], np.float32)
    run = compiled(roi_align_einsum, 0, True)
    ours = run(MAPS, np.pad(boxes, ((0, 21), (0, 0))), np.zeros(24, np.int32))
    np.testing.assert_allclose(ours[2], oracle(MAPS, boxes[2:], [0], 0, True)[0], atol=2e-5)


def test_levels():
    sides = np.array([1, 50, 111, 113, 223, 225, 447, 449, 895, 897, 5000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    expected = np.clip(np.floor(4 + np.log2(sides.astype(np.float64) / 224)), 2, 5) - 2
    for preset in ("d2", "tv"):
        np.testing.assert_array_equal(assign_levels(boxes, preset=preset), expected)
    wide = np.floor(4 + np.log2(sides.astype(np.float64) / 224))
    np.testing.assert_array_equal(assign_levels(boxes, min_level=1, max_level=6), np.clip(wide, 1, 6) - 1)
    np.testing.assert_array_equal(assign_levels(np.array([[0, 0, 0, 0], [9, 9, 2, 2]], np.float32)), 0)


@pytest.mark.parametrize("side", [112, 224, 448])
def test_levels_at_a_border(side):
    """Areas within a few roundings of a border, with the rule of each preset in float32."""
    roundings = np.arange(-40, 41, dtype=np.int32)
    area = (np.float32(side**2).view(np.int32) + roundings).view(np.float32)
    boxes = np.stack([0 * area, 0 * area, area, 0 * area + 1], axis=1)
    root, one = np.sqrt(area) / np.float32(224), np.float32(1)
    rules = {"d2": 4 * one + np.log2(root + one * 1e-8), "tv": 4 * one + np.log2(root) + one * 1e-6}
    first = {}
    for preset, rule in rules.items():
        levels = np.asarray(assign_levels(boxes, preset=preset))
        np.testing.assert_array_equal(levels, np.clip(np.floor(rule), 2, 5) - 2)
        first[preset] = roundings[np.argmax(levels == levels[-1])]
    assert -40 < first["tv"] < first["d2"] <= 0  # the upper level from the exact area on, in both


def test_errors():
    with pytest.raises(ValueError, match="preset='TV'"):
        assign_levels(BOXES, preset="TV")
    with pytest.raises(ValueError, match="min_level=5, max_level=2"):
        assign_levels(BOXES, min_level=5, max_level=2)
    for form in (roi_align_einsum, roi_align_gather):
        with pytest.raises(ValueError, match=r"3 maps and strides=\(4, 8, 16, 32\)"):
            form(MAPS, BOXES, LEVELS)
        with pytest.raises(ValueError, match="one D and one dtype"):
            form([*MAPS[:2], MAPS[2][..., :1]], BOXES, LEVELS, strides=STRIDES)
        with pytest.raises(ValueError, match="maps of one image"):
            form([x[None] for x in MAPS], BOXES, LEVELS, strides=STRIDES)
        with pytest.raises(ValueError, match=r"\(24, 4\) and \(23,\)"):
            form(MAPS, BOXES, LEVELS[1:], strides=STRIDES)
        with pytest.raises(ValueError, match="output_size=0"):
            form(MAPS, BOXES, LEVELS, strides=STRIDES, output_size=0)
    with pytest.raises(ValueError, match="sampling_ratio=0: .*roi_align_einsum"):
        roi_align_gather(MAPS, BOXES, LEVELS, strides=STRIDES, sampling_ratio=0)
    with pytest.raises(ValueError, match="sampling_ratio=-1"):
        roi_align_einsum(MAPS, BOXES, LEVELS, strides=STRIDES, sampling_ratio=-1)
