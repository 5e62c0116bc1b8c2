"""Which ground-truth box an anchor or a proposal belongs to, and the random choice of those that are trained on.

All functions are for one image; `jax.vmap` makes them a batch's. Labels are 1 (positive), 0 (negative) and -1 (does not
take part). Boxes are constants here: no gradient comes back. Imports jax only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wkd_jax.models.detection.boxes import matched_iou, pairwise_iou

Array = jax.Array


class Sample(NamedTuple):
    """A choice of candidates in a fixed number of slots, positives first.

    Attributes:
      indices: [count] int32, positions among the candidates; 0 in empty slots.
      valid: [count] bool, False in empty slots, which are the last ones.
      positive: [count] bool.
    """

    indices: Array
    valid: Array
    positive: Array


def match_anchors(
    anchors: Array,
    boxes: Array,
    box_valid: Array,
    *,
    anchor_valid: Array | None = None,
    positive: float = 0.7,
    negative: float = 0.3,
) -> tuple[Array, Array]:
    """Labels anchors by their overlap with ground truth, and gives each box its best anchors.

    An anchor is positive where its largest IoU is at least `positive`, negative where it is below `negative`. Besides,
    every anchor whose IoU with a box is the largest that any anchor has with that box, ties included and if above 0, is
    positive. It still belongs to the box that it itself overlaps most.

    Boxes are taken one after the other, so that no [M, A] matrix exists: at 268,569 anchors and 100 boxes it would be
    107 MB an image.

    Args:
      anchors: [A, 4] xyxy, pixels.
      boxes: [M, 4] xyxy, ground truth.
      box_valid: [M] bool, False for padding, whatever the values there.
      anchor_valid: [A] bool; others are labelled -1 and are no box's best anchor. None: all.
      positive: IoU, above 0.
      negative: IoU, at most `positive`.

    Returns:
      (labels [A] int32, matches [A] int32): the index of the box overlapped most, the first on ties, 0 without overlap.

    Raises:
      ValueError: If the thresholds are out of order or a shape does not fit.

    Example:
      >>> anchors = jnp.array([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 6.0], [8.0, 8.0, 12.0, 12.0]])
      >>> boxes = jnp.array([[0.0, 0.0, 4.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
      >>> labels, matches = match_anchors(anchors, boxes, jnp.array([True, False]))
      >>> print(labels, matches)  # IoU 0.4, 0.6 and 0: the second is the best that the box has
      [-1  1  0] [0 0 0]

    References:
      Ren et al., "Faster R-CNN", NeurIPS 2015, arXiv 1506.01497, section 3.1.2.
    """
    if not 0 < positive <= 1 or not 0 <= negative <= positive:
        raise ValueError(
            f"positive={positive}, negative={negative}: need 0 <= negative <= positive <= 1 and positive > 0"
        )
    count, taking_part = _checked(anchors, boxes, box_valid, anchor_valid, "anchor_valid")
    anchors, boxes = jax.lax.stop_gradient((anchors, boxes))

    def with_box(carry: tuple[Array, Array, Array], row: tuple[Array, Array, Array]) -> tuple[Any, None]:
        largest, matches, best = carry
        number, box, valid = row
        iou = jnp.where(valid & taking_part, matched_iou(box, anchors), 0)
        # Equality below needs one set of numbers: computed again in another fused loop, they may be rounded otherwise.
        iou = jax.lax.optimization_barrier(iou)
        maximum = jnp.max(iou, initial=0)
        matches = jnp.where(iou > largest, number, matches)
        best |= (iou == maximum) & (maximum > 0)
        return (jnp.maximum(iou, largest), matches, best), None

    start = (jnp.zeros(count, jnp.float32), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
    rows = (jnp.arange(len(boxes), dtype=jnp.int32), boxes, box_valid)
    (largest, matches, best), _ = jax.lax.scan(with_box, start, rows)
    labels = jnp.where((largest >= positive) | best, 1, jnp.where(largest < negative, 0, -1))
    return jnp.where(taking_part, labels, -1).astype(jnp.int32), matches


def match_proposals(
    proposals: Array,
    boxes: Array,
    box_valid: Array,
    *,
    proposal_valid: Array | None = None,
    positive: float = 0.5,
) -> tuple[Array, Array]:
    """Labels proposals by their overlap with ground truth: 1 where the largest IoU is at least `positive`, else 0.

    Args:
      proposals: [P, 4] xyxy, pixels.
      boxes: [M, 4] xyxy, ground truth.
      box_valid: [M] bool, False for padding, whatever the values there.
      proposal_valid: [P] bool; empty slots are labelled -1. None: all count.
      positive: IoU, above 0.

    Returns:
      (labels [P] int32, matches [P] int32): the index of the box overlapped most, the first on ties, 0 without overlap.

    Raises:
      ValueError: If the threshold is out of range or a shape does not fit.

    Example:
      >>> proposals, box = jnp.array([[0.0, 0.0, 4.0, 5.0], [0.0, 0.0, 4.0, 4.0]]), jnp.array([[0.0, 0.0, 4.0, 10.0]])
      >>> print(match_proposals(proposals, box, jnp.array([True]))[0])
      [1 0]

    References:
      Girshick, "Fast R-CNN", ICCV 2015, arXiv 1504.08083, section 2.3.
    """
    if not 0 < positive <= 1:
        raise ValueError(f"positive={positive}: must be above 0 and at most 1")
    count, taking_part = _checked(proposals, boxes, box_valid, proposal_valid, "proposal_valid")
    if not len(boxes):
        return jnp.where(taking_part, 0, -1).astype(jnp.int32), jnp.zeros(count, jnp.int32)
    proposals, boxes = jax.lax.stop_gradient((proposals, boxes))
    iou = jnp.where(box_valid, pairwise_iou(proposals, boxes), 0)
    labels = jnp.where(taking_part, jnp.max(iou, axis=1) >= positive, -1)
    return labels.astype(jnp.int32), jnp.argmax(iou, axis=1).astype(jnp.int32)


def near_objects(anchors: Array, boxes: Array, box_valid: Array, *, share: float = 0.5) -> Array:
    """Anchors that lie about as well on an object as the best ones: which positions FGFI imitates.

    An anchor is near a box where their IoU is above `share` of the largest that any anchor has with that box, and near
    objects where it is near any box. Boxes are taken one after the other, as in `match_anchors`.

    Args:
      anchors: [A, 4] xyxy, pixels, of all levels.
      boxes: [M, 4] xyxy, ground truth.
      box_valid: [M] bool, False for padding, whatever the values there.
      share: Of the largest IoU, from 0 to below 1.

    Returns:
      [A] bool.

    Raises:
      ValueError: If the share is out of range or a shape does not fit.

    Example:
      >>> anchors = jnp.array([[0.0, 0.0, 4.0, 8.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0]])
      >>> print(near_objects(anchors, jnp.array([[0.0, 0.0, 4.0, 10.0]]), jnp.array([True])))  # IoU 0.8, 0.4 and 0.3
      [ True False False]

    References:
      Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: must be from 0 to below 1")
    count, _ = _checked(anchors, boxes, box_valid, None, "anchor_valid")
    anchors, boxes = jax.lax.stop_gradient((anchors, boxes))

    def with_box(near: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        box, valid = row
        iou = jnp.where(valid, matched_iou(box, anchors), 0)
        return near | (iou > share * jnp.max(iou, initial=0)), None

    return jax.lax.scan(with_box, jnp.zeros(count, bool), (boxes, box_valid))[0]


def beyond_image(anchors: Array, size: Array, *, multiple: int = 32) -> Array:
    """Anchors whose centre only a larger canvas has: at or beyond a side of the image rounded up to a multiple.

    What an image would be padded to were it alone in its batch. Leaving these anchors out (`anchor_valid`) keeps the
    share of easy negatives what it is without large canvases.

    Args:
      anchors: [A, 4] xyxy, pixels.
      size: [2], (height, width) of the image without padding, pixels.
      multiple: Pixels.

    Returns:
      [A] bool.

    Example:
      >>> anchors = jnp.array([[-4.0, -4.0, 4.0, 4.0], [28.0, 28.0, 36.0, 36.0], [28.0, 60.0, 36.0, 68.0]])
      >>> print(beyond_image(anchors, jnp.array([50, 40])))
      [False False  True]
    """
    limits = -(-jnp.asarray(size) // multiple) * multiple
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return jnp.any(centre >= limits[jnp.array([1, 0])], axis=1)


def sample(labels: Array, priorities: Array, *, count: int, max_positive: int) -> Sample:
    """A uniform random subset without replacement: up to `max_positive` positives, then negatives up to `count`.

    Those with the largest priorities are taken, so priorities drawn anew for each image and step make it random, and
    equal ones make it repeatable.

    Args:
      labels: [N] int32: 1 positive, 0 negative, others never chosen.
      priorities: [N] float32 in [0, 1), such as `jax.random.uniform(key, labels.shape)`.
      count: Slots: 256 anchors or 512 proposals an image in the paper's successors.
      max_positive: At most so many are positive: 128 of either.

    Returns:
      `Sample`. With fewer candidates than slots the last slots are empty.

    Raises:
      ValueError: If the shapes differ or the counts are out of order.

    Example:
      >>> chosen = sample(jnp.array([0, 1, 1, -1, 0]), jnp.array([0.3, 0.2, 0.9, 0.8, 0.1]), count=3, max_positive=1)
      >>> print(chosen.indices, chosen.valid, chosen.positive)
      [2 0 4] [ True  True  True] [ True False False]

    References:
      Ren et al., arXiv 1506.01497, section 3.1.3.
    """
    if jnp.ndim(labels) != 1 or jnp.shape(labels) != jnp.shape(priorities):
        raise ValueError(f"labels and priorities must both be [N], got {jnp.shape(labels)} and {jnp.shape(priorities)}")
    if not 0 <= max_positive <= count or count < 1:
        raise ValueError(f"count={count}, max_positive={max_positive}: need 0 <= max_positive <= count and count >= 1")

    def first(label: int, limit: int) -> tuple[Array, Array]:
        """The `count` candidates of that label with the largest priorities, and how many of them there are."""
        keys = jnp.where(labels == label, priorities, -1)
        index = jax.lax.top_k(keys, min(count, len(labels)))[1]
        found = jnp.minimum(jnp.sum(labels == label), limit)
        return jnp.pad(index, (0, count - len(index))), found

    slots = jnp.arange(count)
    positives, num_positives = first(1, max_positive)
    negatives, num_negatives = first(0, count)
    positive = slots < num_positives
    valid = slots < jnp.minimum(num_positives + num_negatives, count)
    index = jnp.where(positive, positives, negatives[jnp.maximum(slots - num_positives, 0)])
    return Sample(jnp.where(valid, index, 0).astype(jnp.int32), valid, positive)


def _checked(
    candidates: Array, boxes: Array, box_valid: Array, candidate_valid: Array | None, name: str
) -> tuple[int, Array]:
    """How many candidates there are, and which take part."""
    if jnp.ndim(candidates) != 2 or jnp.ndim(boxes) != 2:
        raise ValueError(f"need [A, 4] and [M, 4] of one image, got {jnp.shape(candidates)} and {jnp.shape(boxes)}")
    count = len(candidates)
    mask = jnp.ones(count, bool) if candidate_valid is None else jnp.asarray(candidate_valid)
    for label, array, length in (("box_valid", box_valid, len(boxes)), (name, mask, count)):
        if jnp.shape(array) != (length,) or jnp.result_type(array) != jnp.bool_:
            raise ValueError(f"{label} must be bool of shape ({length},), got {jnp.result_type(array)} {array.shape}")
    return count, mask
