"""Suppression against the sequential greedy algorithm, its properties, and both forms of the final detections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.models.detection.nms import final_detections, nms_mask, select_best

N, SETS = 40, 60
run = {t: jax.jit(jax.vmap(functools.partial(nms_mask, threshold=t))) for t in (0.3, 0.5)}
grouped = jax.jit(jax.vmap(lambda b, s, v, g: nms_mask(b, s, v, threshold=0.5, groups=g)))


def iou(box, others):
    sides = np.maximum(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0)
    shared = sides[:, 0] * sides[:, 1]
    area = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (box, others)]
    return np.where(shared > 0, shared / np.maximum(area[0] + area[1] - shared, 1e-30), 0).astype(np.float32)


def greedy(boxes, scores, valid, threshold, groups=None):
    """The definition: from the best score down, keep what no box kept before overlaps by more than the threshold."""
    groups = np.zeros(len(boxes)) if groups is None else groups
    keep = np.zeros(len(boxes), bool)
    for i in np.argsort(-scores, kind="stable"):
        rivals = keep & (groups == groups[i])
        keep[i] = valid[i] and not (iou(boxes[i], boxes[rivals]) > np.float32(threshold)).any()
    return keep


def draw(seed=0):
    """A third each: anywhere, in clusters, and small whole numbers with equal boxes, scores and IoU of 1/2 and 3/10."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.random((2, SETS, N, 2)) * 60
    sides += 5
    centres = rng.integers(0, 5, (SETS // 3, N, 1)) * 40
    corner[SETS // 3 : 2 * SETS // 3] = centres + rng.random((SETS // 3, N, 2)) * 10
    sides[SETS // 3 : 2 * SETS // 3] = 20 + rng.random((SETS // 3, N, 2)) * 10
    corner[-SETS // 3 :] = rng.integers(0, 4, (SETS // 3, N, 2))
    sides[-SETS // 3 :] = rng.integers(1, 6, (SETS // 3, N, 2))
    scores = rng.random((SETS, N))
    scores[-SETS // 3 :] = rng.integers(0, 10, (SETS // 3, N)) / 10
    boxes = np.concatenate([corner, corner + sides], axis=-1)
    return (
        boxes.astype(np.float32),
        scores.astype(np.float32),
        rng.random((SETS, N)) < 0.9,
        rng.integers(0, 3, (SETS, N)),
    )


BOXES, SCORES, VALID, GROUPS = draw()


@pytest.mark.parametrize("threshold", run)
def test_greedy(threshold):
    keep = np.asarray(run[threshold](BOXES, SCORES, VALID))
    for i in range(SETS):
        np.testing.assert_array_equal(keep[i], greedy(BOXES[i], SCORES[i], VALID[i], threshold))
    assert (keep.sum(axis=1) > 2).all()
    assert (keep.sum(axis=1) < VALID.sum(axis=1)).mean() > 0.9


def test_groups():
    keep = np.asarray(grouped(BOXES, SCORES, VALID, GROUPS))
    for i in range(SETS):
        np.testing.assert_array_equal(keep[i], greedy(BOXES[i], SCORES[i], VALID[i], 0.5, GROUPS[i]))
        for group in range(3):  # as if each were alone
            alone = greedy(BOXES[i], SCORES[i], VALID[i] & (GROUPS[i] == group), 0.5)
            np.testing.assert_array_equal(keep[i] & (GROUPS[i] == group), alone)
    assert (keep.sum() > np.sum(run[0.5](BOXES, SCORES, VALID))).all()


def test_exactly_the_threshold_is_kept():
    boxes = np.tile(np.array([[0, 0, 4, 4], [0, 0, 4, 8], [20, 0, 22, 4]], np.float32), (SETS, N // 3 + 1, 1))[:, :N]
    keep = run[0.5](
        boxes, np.tile(np.linspace(1, 0, N, dtype=np.float32), (SETS, 1)), np.arange(N) < np.full((SETS, 1), 3)
    )
    np.testing.assert_array_equal(keep[0], np.arange(N) < 3)


def test_the_longest_chain():
    """Each box overlaps the next alone: every second one is kept, found after as many steps as there are boxes."""
    left = np.arange(N, dtype=np.float32)
    boxes = np.stack([3 * left, 0 * left, 3 * left + 8, 0 * left + 4], axis=1)
    assert iou(boxes[0], boxes[1:3]) == pytest.approx([5 / 11, 2 / 14])
    scores = np.linspace(1, 0, N, dtype=np.float32)
    np.testing.assert_array_equal(nms_mask(boxes, scores, np.ones(N, bool), threshold=0.4), np.arange(N) % 2 == 0)


def test_properties():
    threshold, rng = 0.5, np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.linspace(0.1, 0.9, N, dtype=np.float32), (SETS, 1)), axis=1)  # all differ
    keep = np.asarray(run[threshold](BOXES, scores, VALID))
    np.testing.assert_array_equal(run[threshold](BOXES, scores, keep), keep)
    order = rng.permuted(np.tile(np.arange(N), (SETS, 1)), axis=1)
    moved = [np.take_along_axis(x, order.reshape(SETS, N, *[1] * (x.ndim - 2)), axis=1) for x in (BOXES, scores, VALID)]
    np.testing.assert_array_equal(run[threshold](*moved), np.take_along_axis(keep, order, axis=1))
    for box, score, valid, kept in zip(BOXES, scores, VALID, keep, strict=True):
        overlap = np.stack([iou(x, box) for x in box]) > threshold
        np.fill_diagonal(overlap, False)
        assert not overlap[np.ix_(kept, kept)].any()
        better = overlap & kept & (score > score[:, None])
        assert better[valid & ~kept].any(axis=1).all()
    low = scores < 0.4  # worse boxes do not matter to better ones
    np.testing.assert_array_equal(run[threshold](BOXES, scores, VALID & ~low), keep & ~low)


def test_padding_changes_nothing():
    keep = np.asarray(run[0.5](BOXES, SCORES, VALID))
    junk = np.where(VALID[..., None], BOXES, np.float32(np.nan)), np.where(VALID, SCORES, np.float32(np.inf))
    np.testing.assert_array_equal(run[0.5](*junk, VALID), keep)
    everything = np.ones_like(VALID)
    np.testing.assert_array_equal(run[0.5](junk[0], SCORES, everything), keep)  # what is not a number is not a box
    np.testing.assert_array_equal(run[0.5](BOXES, np.where(VALID, SCORES, np.float32(np.nan)), everything), keep)
    assert not np.any(run[0.5](BOXES, SCORES, np.zeros_like(VALID)))
    assert nms_mask(np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool), threshold=0.5).shape == (0,)
    empty = np.tile(np.array([3, 3, 3, 3], np.float32), (SETS, N, 1))
    np.testing.assert_array_equal(run[0.5](empty, SCORES, VALID), VALID)  # they overlap nothing


def test_select_best():
    scores = np.array([0.5, 0.9, np.nan, 0.5, 0.1, 0.9], np.float32)
    keep = np.array([True, True, True, True, False, True])
    indices, valid = select_best(scores, keep, count=3)
    np.testing.assert_array_equal(indices, [1, 5, 0])
    np.testing.assert_array_equal(valid, True)
    indices, valid = select_best(scores, keep, count=8)
    np.testing.assert_array_equal(indices, [1, 5, 0, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(valid, [True] * 4 + [False] * 4)


R, K, COUNT, CANDIDATES = 30, 4, 12, 24


def draw_regions(seed=0, images=30):
    """Regions in a few clusters with a box for each class; how many scores exceed the threshold differs widely."""
    rng = np.random.default_rng(seed)
    centre = rng.integers(0, 3, (images, R, 1, 1)) * 30.0
    corner = centre + rng.random((images, R, K, 2)) * 6
    boxes = np.concatenate([corner, corner + 15 + rng.random((images, R, K, 2)) * 6], axis=-1).astype(np.float32)
    scores = rng.random((images, R, K), np.float32) ** np.linspace(1, 25, images, dtype=np.float32)[:, None, None]
    return boxes, scores, rng.random((images, R, 1)) < 0.9


detect = {
    candidates: jax.jit(jax.vmap(functools.partial(final_detections, count=COUNT, candidates=candidates)))
    for candidates in (CANDIDATES, None)
}


def test_final_detections():
    boxes, scores, valid = draw_regions()
    capped, whole = (detect[c](boxes, scores, valid) for c in (CANDIDATES, None))
    present = (scores > 0.05) & valid
    for i in range(len(boxes)):
        keep = np.stack([greedy(boxes[i, :, k], scores[i, :, k], present[i, :, k], 0.5) for k in range(K)], axis=1)
        best = [at for at in np.argsort(-scores[i].ravel(), kind="stable") if keep.ravel()[at]][:COUNT]
        np.testing.assert_array_equal(whole.valid[i], np.arange(COUNT) < len(best))
        np.testing.assert_array_equal(np.asarray(whole.classes[i])[: len(best)], np.array(best, int) % K)
        np.testing.assert_array_equal(np.asarray(whole.boxes[i])[: len(best)], boxes[i].reshape(-1, 4)[best])
        np.testing.assert_array_equal(np.asarray(whole.scores[i])[: len(best)], scores[i].ravel()[best])
    assert not np.any(whole.overflow)
    empty = ~np.asarray(whole.valid)
    assert empty.any()
    np.testing.assert_array_equal(np.asarray(whole.classes)[empty], -1)
    np.testing.assert_array_equal(np.asarray(whole.scores)[empty], 0)
    np.testing.assert_array_equal(np.asarray(whole.boxes)[empty], 0)
    overflow = np.asarray(capped.overflow)
    for ours, exact in zip(capped[:4], whole[:4], strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[~overflow], np.asarray(exact)[~overflow])
    left_out = present.sum(axis=(1, 2)) > CANDIDATES
    full = np.asarray(capped.valid).all(axis=1)
    np.testing.assert_array_equal(overflow, left_out & ~full)
    assert overflow.any()
    assert (left_out & full).any()  # exact although candidates were left out
    assert (~left_out & ~full).any()
    missing = np.asarray(whole.valid).sum(axis=1) > np.asarray(capped.valid).sum(axis=1)
    assert missing.any()
    assert overflow[missing].all()


def test_no_gradient_and_errors():
    box, one = jnp.ones((2, 4)), jnp.ones(2)
    gradient = jax.grad(lambda b: jnp.sum(jnp.where(nms_mask(b, one, one > 0, threshold=0.5), jnp.sum(b), 0)))(box)
    np.testing.assert_array_equal(gradient, 2)  # of the sum alone, once for each that is kept
    with pytest.raises(ValueError, match=r"threshold=1.5"):
        nms_mask(box, one, one > 0, threshold=1.5)
    with pytest.raises(ValueError, match=r"use jax.vmap"):
        nms_mask(box[None], one[None], one[None] > 0, threshold=0.5)
    with pytest.raises(ValueError, match=r"groups must be \[N\] = \[2\] as the boxes, got \(3,\)"):
        nms_mask(box, one, one > 0, threshold=0.5, groups=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"candidates=5: must be at least count=100"):
        final_detections(jnp.zeros((3, 2, 4)), jnp.zeros((3, 2)), jnp.ones((3, 1), bool), candidates=5)
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) and \(2, 3\)"):
        final_detections(jnp.zeros((3, 2, 4)), jnp.zeros((2, 3)), jnp.ones((3, 1), bool))
