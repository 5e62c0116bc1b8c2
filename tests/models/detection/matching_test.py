"""Matching and sampling against the rules written as loops; no matrix of all anchors and boxes stays in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.models.detection.anchors import cell_anchors, grid_anchors
from wkd_jax.models.detection.boxes import pairwise_iou
from wkd_jax.models.detection.matching import beyond_image, match_anchors, match_proposals, near_objects, sample

A, M, CASES = 60, 6, 40


def iou_matrix(boxes, anchors):
    """[M, A] float32 in the order of operations of the definition."""
    sides = np.minimum(boxes[:, None, 2:], anchors[:, 2:]) - np.maximum(boxes[:, None, :2], anchors[:, :2])
    sides = np.maximum(sides, 0)
    shared = sides[..., 0] * sides[..., 1]
    area = [np.maximum(x[:, 2] - x[:, 0], 0) * np.maximum(x[:, 3] - x[:, 1], 0) for x in (boxes, anchors)]
    union = area[0][:, None] + area[1] - shared
    return np.where(shared > 0, shared / np.where(union > 0, union, 1), 0)


def oracle_anchors(anchors, boxes, valid, taking_part, positive=0.7, negative=0.3):
    real = np.flatnonzero(valid)
    labels, matches = np.zeros(len(anchors), int), np.zeros(len(anchors), int)
    iou = iou_matrix(boxes[real], anchors) if len(real) else np.zeros((0, len(anchors)), np.float32)
    iou[:, ~taking_part] = 0
    for i in range(len(anchors)):
        best = max(range(len(real)), key=lambda j: iou[j, i], default=None)  # the first on ties
        if best is not None and iou[best, i] > 0:
            matches[i] = real[best]
            labels[i] = 1 if iou[best, i] >= positive else 0 if iou[best, i] < negative else -1
    for row in iou:
        if row.max() > 0:
            labels[row == row.max()] = 1
    return np.where(taking_part, labels, -1), matches


def draw_cases(seed=0):
    """Small whole numbers: many IoU are equal, and some are at a threshold."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.integers(0, 12, (CASES, A + M, 2)), rng.integers(1, 9, (CASES, A + M, 2))
    everything = np.concatenate([corner, corner + sides], axis=-1).astype(np.float32)
    valid = rng.random((CASES, M)) < 0.6
    valid[0], valid[1] = False, True
    everything[:3, A:] += np.float32(100) * (np.arange(M) % 2)[:, None]  # boxes that overlap no anchor
    taking_part = rng.random((CASES, A)) < np.where(np.arange(CASES)[:, None] % 2, 0.7, 1.0)
    return everything[:, :A], everything[:, A:], valid, taking_part


run_anchors = jax.jit(jax.vmap(lambda a, b, v, t: match_anchors(a, b, v, anchor_valid=t)))
run_proposals = jax.jit(jax.vmap(lambda a, b, v, t: match_proposals(a, b, v, proposal_valid=t)))


def test_anchors():
    cases = draw_cases()
    labels, matches = map(np.asarray, run_anchors(*cases))
    for i, case in enumerate(zip(*cases, strict=True)):
        expected = oracle_anchors(*case)
        np.testing.assert_array_equal(labels[i], expected[0])
        np.testing.assert_array_equal(matches[i], expected[1])
    np.testing.assert_array_equal(labels[0], 0)  # nothing to find: all are negative
    ratio = [np.mean(labels == label) for label in (-1, 0, 1)]
    assert min(ratio) > 0.05
    iou = np.stack([np.where(v[:, None], iou_matrix(b, a), 0) for a, b, v, _ in zip(*cases, strict=True)])
    assert np.sum((labels == 1) & (iou.max(axis=1) < 0.7)) > CASES  # by the second rule


def test_the_second_rule_leaves_the_match_alone():
    """The best anchor of box 1 overlaps box 0 more: it is positive for box 0."""
    anchors = np.array([[0, 0, 10, 10], [90, 90, 92, 92]], np.float32)
    boxes = np.array([[0, 0, 10, 6], [0, 8, 10, 20]], np.float32)
    labels, matches = match_anchors(anchors, boxes, np.ones(2, bool))
    assert (int(labels[0]), int(matches[0])) == (1, 0)
    assert int(labels[1]) == 0


def test_thresholds_that_are_met():
    anchors = np.array([[0, 0, 4, 6], [0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 1]], np.float32)  # 3/4, 1/2, 1/4, 1/8
    box = np.array([[0, 0, 4, 8]], np.float32)
    labels, _ = match_anchors(anchors, box, np.ones(1, bool), positive=0.5, negative=0.25)
    np.testing.assert_array_equal(labels, [1, 1, -1, 0])


def test_padding_changes_nothing():
    anchors, boxes, valid, taking_part = draw_cases()
    spoilt = np.where(valid[..., None], boxes, np.float32(np.nan))
    for x in (0.0, 3.0):
        wider = np.pad(spoilt, ((0, 0), (0, 4), (0, 0)), constant_values=x)
        more = np.pad(valid, ((0, 0), (0, 4)))
        for run in (run_anchors, run_proposals):
            for ours, padded in zip(
                run(anchors, boxes, valid, taking_part), run(anchors, wider, more, taking_part), strict=True
            ):
                np.testing.assert_array_equal(ours, padded)


def test_proposals():
    proposals, boxes, valid, taking_part = draw_cases(seed=1)
    labels, matches = map(np.asarray, run_proposals(proposals, boxes, valid, taking_part))
    for i in range(CASES):
        iou = np.where(valid[i][:, None], iou_matrix(boxes[i], proposals[i]), 0)
        np.testing.assert_array_equal(labels[i], np.where(taking_part[i], iou.max(axis=0) >= 0.5, -1))
        np.testing.assert_array_equal(matches[i], iou.argmax(axis=0))
    assert 0.02 < np.mean(labels == 1) < 0.9
    at = np.array([[0, 0, 4, 5]], np.float32), np.array([[0, 0, 4, 10]], np.float32), np.ones(1, bool)
    assert int(match_proposals(*at)[0][0]) == 1  # a threshold that is met
    nothing = match_proposals(proposals[0], np.zeros((0, 4), np.float32), np.zeros(0, bool))
    np.testing.assert_array_equal(nothing, np.zeros((2, A)))


def test_memory_of_anchors():
    """A canvas of 800 x 1344 with 100 boxes: the matrix would take 107 MB."""
    count, rows = 268_569, 100
    shapes = [jax.ShapeDtypeStruct((n, 4), jnp.float32) for n in (count, rows)] + [jax.ShapeDtypeStruct((rows,), bool)]

    def temporary(function):
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def direct(anchors, boxes, valid):
        iou = jnp.where(valid[:, None], pairwise_iou(boxes, anchors), 0)
        return jnp.max(iou, axis=0), jnp.any(iou == jnp.max(iou, axis=1, keepdims=True), axis=0)

    assert temporary(match_anchors) < 30 * count < 4 * count * rows <= temporary(direct)
    assert temporary(near_objects) < 30 * count


def test_near_objects_golden():
    """One box on a 6 x 6 grid of stride 8: its largest IoU is 0.75, and 8 positions are near it."""
    anchors = grid_anchors(cell_anchors(32), (6, 6), (8, 8))
    box = np.array([[8, 8, 40, 32]], np.float32)
    assert pairwise_iou(box, anchors).max() == 0.75
    near = np.asarray(near_objects(anchors, box, np.ones(1, bool))).reshape(6, 6, 3).any(-1)
    expected = np.zeros((6, 6), bool)
    expected[1, 3] = expected[4, 3] = True
    expected[2:4, 2:5] = True
    np.testing.assert_array_equal(near, expected)


def test_near_objects():
    anchors, boxes, valid, _ = draw_cases()
    near = np.asarray(jax.jit(jax.vmap(near_objects))(anchors, boxes, valid))
    spoilt = np.where(valid[..., None], boxes, np.float32(np.nan))
    np.testing.assert_array_equal(near, jax.jit(jax.vmap(near_objects))(anchors, spoilt, valid))
    for i in range(CASES):
        iou = iou_matrix(boxes[i], anchors[i])[valid[i]]
        np.testing.assert_array_equal(near[i], (iou > 0.5 * iou.max(axis=1, keepdims=True)).any(axis=0))
    assert not near[0].any()  # no box is valid
    assert 0.1 < near.mean() < 0.9
    assert not near_objects(anchors[1], boxes[1] + 1000, valid[1]).any()  # nor where no anchor overlaps one
    shared = iou_matrix(boxes[1], anchors[1]).max(axis=0) > 0
    np.testing.assert_array_equal(near_objects(anchors[1], boxes[1], valid[1], share=0.0), shared)
    with pytest.raises(ValueError, match="share=1.0: must be from 0 to below 1"):
        near_objects(anchors[0], boxes[0], valid[0], share=1.0)


def test_beyond_image():
    anchors = np.array([[x - 5, y - 5, x + 5, y + 5] for x in (-3, 31, 63, 64) for y in (0, 95, 96)], np.float32)
    expected = [x >= 64 or y >= 96 for x in (-3, 31, 63, 64) for y in (0, 95, 96)]
    np.testing.assert_array_equal(beyond_image(anchors, np.array([90, 33], np.int32)), expected)
    np.testing.assert_array_equal(beyond_image(anchors, np.array([96, 64], np.int32)), expected)


COUNT, MAX_POSITIVE, N = 16, 4, 40
run_sample = jax.jit(jax.vmap(functools.partial(sample, count=COUNT, max_positive=MAX_POSITIVE)))


def test_sample_counts():
    sizes = [(0, 0), (0, 40), (3, 30), (4, 36), (20, 20), (20, 5), (40, 0), (2, 3), (1, 15), (0, 15)]
    rng = np.random.default_rng(0)
    labels = np.stack([rng.permutation([1] * p + [0] * n + [-1] * (N - p - n)) for p, n in sizes]).astype(np.int32)
    priorities = rng.random(labels.shape, np.float32)
    chosen = run_sample(labels, priorities)
    for (positives, negatives), label, priority, indices, valid, positive in zip(
        sizes, labels, priorities, *map(np.asarray, chosen), strict=True
    ):
        wanted = min(positives, MAX_POSITIVE)
        others = min(negatives, COUNT - wanted)
        assert (positive.sum(), valid.sum()) == (wanted, wanted + others)
        np.testing.assert_array_equal(positive, np.arange(COUNT) < wanted)
        np.testing.assert_array_equal(valid, np.arange(COUNT) < wanted + others)
        order = np.argsort(-priority, kind="stable")
        expected = [*order[label[order] == 1][:wanted], *order[label[order] == 0][:others]]
        np.testing.assert_array_equal(indices, np.pad(expected, (0, COUNT - wanted - others)).astype(int))


def test_fewer_candidates_than_slots():
    labels = jnp.array([1, 0, 1, -1, 0], jnp.int32)
    chosen = sample(labels, jnp.array([0.1, 0.2, 0.3, 0.9, 0.4]), count=8, max_positive=7)
    np.testing.assert_array_equal(chosen.indices, [2, 0, 4, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(chosen.valid, [True] * 4 + [False] * 4)


def test_sample_is_uniform():
    """Chi-square of how often each candidate is taken in 2,000 draws: each subset is as likely as any other."""
    positives, negatives, draws = 12, 28, 2000
    labels = np.tile(np.repeat([1, 0], [positives, negatives]).astype(np.int32), (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    chosen = run_sample(labels, jax.vmap(lambda key: jax.random.uniform(key, (N,)))(keys))
    taken = np.bincount(np.asarray(chosen.indices)[np.asarray(chosen.valid)], minlength=N)
    for counts, share in ((taken[:positives], 4 / 12), (taken[positives:], 12 / 28)):
        assert counts.sum() == draws * share * len(counts)
        # Counts of a fixed number of draws without replacement: variance n p (1 - p), one degree of freedom fewer.
        statistic = np.sum(np.square(counts - draws * share)) / (draws * share * (1 - share))
        freedom = len(counts) - 1
        statistic *= freedom / len(counts)
        assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    pairs = np.sum(
        np.any(np.asarray(chosen.indices)[:, :4] == 0, axis=1) & np.any(np.asarray(chosen.indices)[:, :4] == 1, axis=1)
    )
    expected = draws * (4 * 3) / (12 * 11)
    assert abs(pairs - expected) < 4 * np.sqrt(expected)


def test_no_gradient_and_errors():
    anchors, boxes, valid, _ = (x[0] for x in draw_cases())
    iou = jax.grad(lambda a: jnp.sum(match_anchors(a, boxes, valid)[0] * jnp.sum(a)))(anchors)
    assert np.isfinite(iou).all()
    with pytest.raises(ValueError, match="positive=0.3, negative=0.7"):
        match_anchors(anchors, boxes, valid, positive=0.3, negative=0.7)
    with pytest.raises(ValueError, match=r"box_valid must be bool of shape \(6,\), got bool \(5,\)"):
        match_proposals(anchors, boxes, valid[1:])
    with pytest.raises(ValueError, match=r"anchor_valid must be bool of shape \(60,\), got float32"):
        match_anchors(anchors, boxes, valid, anchor_valid=np.ones(A, np.float32))
    with pytest.raises(ValueError, match="of one image"):
        match_proposals(anchors[None], boxes[None], valid[None])
    with pytest.raises(ValueError, match="positive=0: "):
        match_proposals(anchors, boxes, valid, positive=0)
    with pytest.raises(ValueError, match="count=4, max_positive=5"):
        sample(jnp.zeros(9, jnp.int32), jnp.zeros(9), count=4, max_positive=5)
    with pytest.raises(ValueError, match=r"got \(9,\) and \(8,\)"):
        sample(jnp.zeros(9, jnp.int32), jnp.zeros(8), count=4, max_positive=1)
