"""Non-maximum suppression with fixed shapes, exact: the same boxes survive as in the sequential greedy algorithm.

All functions are for one image; `jax.vmap` makes them a batch's (the loop then runs until the slowest image is done).
Boxes and scores are constants here: no gradient comes back. Imports jax only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wkd_jax.models.detection.boxes import pairwise_iou

Array = jax.Array


class Detections(NamedTuple):
    """Final detections of an image in a fixed number of slots, by falling score.

    Attributes:
      boxes: [count, 4] float32 xyxy, pixels; 0 in empty slots.
      scores: [count] float32; 0 in empty slots.
      classes: [count] int32; -1 in empty slots.
      valid: [count] bool.
      overflow: Scalar bool: candidates were left out and slots are empty, so that detections may be missing.
    """

    boxes: Array
    scores: Array
    classes: Array
    valid: Array
    overflow: Array


def nms_mask(boxes: Array, scores: Array, valid: Array, *, threshold: float, groups: Array | None = None) -> Array:
    """Which boxes greedy non-maximum suppression keeps.

    In the order of falling scores (the lower index first on ties), a box is dropped where its IoU with a box kept
    before is above `threshold`. With S[j, i] = (j goes before i and overlaps it by more), that is the one
    solution of keep_i = valid_i and no j has S[j, i] and keep_j: an entry depends only on entries before it. The
    equation is iterated until nothing changes, which takes as many steps as the longest chain of boxes that suppress
    one another has members, at most N; a dozen for the proposals of an image.

    The N^2 matrix makes this a method for some thousands of boxes.

    Args:
      boxes: [N, 4] xyxy, pixels, in any order.
      scores: [N] floats; boxes with a NaN are not valid.
      valid: [N] bool, False for padding.
      threshold: IoU, from 0 to 1, in float32; a box that overlaps by exactly as much is kept.
      groups: [N] integers: boxes suppress only those of the same group, such as a class or a pyramid level. None: all
        are one group.

    Returns:
      [N] bool, in the order of the input.

    Raises:
      ValueError: If the threshold is out of range or a shape does not fit.

    Example:
      >>> boxes = jnp.array([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [0.0, 0.0, 4.0, 8.0]])
      >>> print(nms_mask(boxes, jnp.array([0.5, 0.9, 0.7]), jnp.ones(3, bool), threshold=0.7))
      [False  True  True]

    References:
      Girshick et al., "Rich feature hierarchies for accurate object detection", CVPR 2014, arXiv 1311.2524,
      section 2.2.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: must be an IoU from 0 to 1")
    count = len(boxes)
    if jnp.shape(boxes) != (count, 4):
        raise ValueError(f"boxes must be [N, 4] of one image, got {jnp.shape(boxes)}; use jax.vmap for a batch")
    for name, array in (("scores", scores), ("valid", valid), *([] if groups is None else [("groups", groups)])):
        if jnp.shape(array) != (count,):
            raise ValueError(f"{name} must be [N] = [{count}] as the boxes, got {jnp.shape(array)}")
    boxes, scores = jax.lax.stop_gradient((boxes, scores))
    valid = valid & ~jnp.isnan(scores) & ~jnp.any(jnp.isnan(boxes), axis=1)
    earlier = jnp.arange(count)[:, None] < jnp.arange(count)
    before = (scores[:, None] > scores) | ((scores[:, None] == scores) & earlier)
    suppresses = before & (pairwise_iou(boxes, boxes) > threshold)
    if groups is not None:
        suppresses &= groups[:, None] == groups

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        keep = valid & ~jnp.any(suppresses & state[0][:, None], axis=0)
        return keep, jnp.any(keep != state[0])

    return jax.lax.while_loop(lambda state: state[1], step, (valid, jnp.any(valid)))[0]


def select_best(scores: Array, keep: Array, *, count: int) -> tuple[Array, Array]:
    """The `count` best of those kept, as fixed slots.

    Args:
      scores: [N] floats.
      keep: [N] bool; a NaN score is not kept.
      count: Slots.

    Returns:
      (index [count] int32, valid [count] bool): positions by falling score, the lower one first on ties; the last slots
      are empty, with index 0, where fewer are kept.

    Example:
      >>> index, valid = select_best(jnp.array([0.1, 0.9, 0.5]), jnp.array([True, False, True]), count=3)
      >>> print(index, valid)
      [2 0 0] [ True  True False]
    """
    keep = keep & ~jnp.isnan(scores)
    index = jax.lax.top_k(jnp.where(keep, scores, -jnp.inf), min(count, len(scores)))[1]
    index = jnp.pad(index, (0, count - len(index)))
    valid = jnp.arange(count) < jnp.sum(keep)
    return jnp.where(valid, index, 0).astype(jnp.int32), valid


def final_detections(
    boxes: Array,
    scores: Array,
    valid: Array,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    count: int = 100,
    candidates: int | None = 4096,
) -> Detections:
    """The best detections of an image after suppression within each class.

    With `candidates` the best so many pairs (box, class) above the score threshold meet in one matrix. Boxes of a lower
    score do not change what happens to better ones, so the result is exact where all candidates fit, and also where
    all slots are filled. `overflow` says that neither holds; None then gives the exact result.

    Args:
      boxes: [R, K, 4] float32 xyxy, pixels: a box for each class, clipped to the image.
      scores: [R, K] float32, without the background.
      valid: [R, K] bool, or what broadcasts to it, such as [R, 1].
      score_threshold: A score must be above it.
      iou_threshold: As in `nms_mask`.
      count: Slots.
      candidates: Pairs that enter suppression. None: all, one class after the other, each with a matrix [R, R].

    Returns:
      `Detections`.

    Raises:
      ValueError: If the shapes do not fit, or `candidates` is below `count`.

    Example:
      >>> boxes = jnp.tile(jnp.array([0.0, 0.0, 4.0, 4.0]), (2, 2, 1))
      >>> scores = jnp.array([[0.6, 0.3], [0.4, 0.01]])
      >>> found = final_detections(boxes, scores, jnp.ones((2, 1), bool), count=3)
      >>> print(found.classes, found.scores, found.overflow)
      [ 0  1 -1] [0.6 0.3 0. ] False
    """
    if jnp.ndim(scores) != 2 or jnp.shape(boxes) != (*jnp.shape(scores), 4):
        raise ValueError(f"need boxes [R, K, 4] and scores [R, K], got {jnp.shape(boxes)} and {jnp.shape(scores)}")
    if candidates is not None and candidates < count:
        raise ValueError(f"candidates={candidates}: must be at least count={count}, or None for all")
    boxes, scores = jax.lax.stop_gradient((boxes, scores))
    classes = scores.shape[1]
    present = jnp.broadcast_to(valid, scores.shape) & (scores > score_threshold)
    if candidates is None:
        keep = jax.lax.map(
            lambda x: nms_mask(*x, threshold=iou_threshold), (jnp.swapaxes(boxes, 0, 1), scores.T, present.T)
        ).T.reshape(-1)
        boxes, scores, labels = boxes.reshape(-1, 4), scores.reshape(-1), jnp.arange(keep.size) % classes
        overflow = jnp.array(False)
    else:
        chosen, filled = select_best(scores.reshape(-1), present.reshape(-1), count=min(candidates, scores.size))
        boxes, scores, labels = boxes.reshape(-1, 4)[chosen], scores.reshape(-1)[chosen], chosen % classes
        keep = nms_mask(boxes, scores, filled, threshold=iou_threshold, groups=labels)
        overflow = (jnp.sum(present) > candidates) & (jnp.sum(keep) < count)
    slot, found = select_best(scores, keep, count=count)
    return Detections(
        boxes=jnp.where(found[:, None], boxes[slot], 0),
        scores=jnp.where(found, scores[slot], 0),
        classes=jnp.where(found, labels[slot], -1).astype(jnp.int32),
        valid=found,
        overflow=overflow,
    )
