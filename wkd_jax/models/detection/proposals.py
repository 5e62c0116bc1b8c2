"""From the outputs of the proposal head to proposals, and from ground truth to what the head and the box head learn.

All functions are for one image; `jax.vmap` makes them a batch's. Proposals and targets are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax.models.detection.boxes import clip_boxes, decode_boxes, encode_boxes
from wkd_jax.models.detection.matching import Sample, beyond_image, match_anchors, match_proposals, sample
from wkd_jax.models.detection.nms import nms_mask, select_best

Array = jax.Array


class Targets(NamedTuple):
    """What a sample of candidates learns.

    Attributes:
      indices: [S] int32, positions among the candidates; 0 in empty slots.
      valid: [S] bool, False in empty slots.
      positive: [S] bool, those that have a box to learn.
      deltas: [S, 4] float32, encoded from the candidate to its box; 0 where it has none.
      matches: [S] int32, the ground-truth box of each candidate.
    """

    indices: Array
    valid: Array
    positive: Array
    deltas: Array
    matches: Array


def propose(
    logits: Sequence[Array],
    deltas: Sequence[Array],
    *,
    anchors: Sequence[np.ndarray],
    size: Array,
    pre_nms: int,
    post_nms: int,
    min_side: float = 0.0,
    ignore_padding: bool = False,
    threshold: float = 0.7,
) -> tuple[Array, Array]:
    """Proposals: the best anchors of each level, moved, clipped and suppressed level by level, then the best of all.

    Args:
      logits: [A_l] objectness of each level.
      deltas: [A_l, 4] of each level.
      anchors: [A_l, 4] xyxy, pixels, of each level.
      size: [2], (height, width) of the image without padding, pixels.
      pre_nms: Candidates a level before suppression.
      post_nms: Slots of the result.
      min_side: Pixels that both sides must have; they must be above 0 in any case.
      ignore_padding: Leave out anchors that only a larger canvas has, see `matching.beyond_image`. Nothing is known of
        them, since they are not trained.
      threshold: IoU of the suppression.

    Returns:
      (boxes [post_nms, 4] float32 xyxy, valid [post_nms] bool), by falling logit; empty slots are 0 and last.

    Example:
      >>> anchors = np.array([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 9.0], [4.0, 4.0, 12.0, 12.0]], np.float32)
      >>> settings = {"anchors": [anchors], "size": jnp.array([8, 10]), "pre_nms": 3, "post_nms": 3}
      >>> boxes, valid = propose([jnp.array([0.0, 1.0, 2.0])], [jnp.zeros((3, 4))], **settings)
      >>> print(boxes[valid])
      [[ 4.  4. 10.  8.]
       [ 0.  0.  8.  8.]]

    References:
      Ren et al., "Faster R-CNN", NeurIPS 2015, arXiv 1506.01497, section 3.3.
    """
    candidates, scores, kept = [], [], []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        level_logits, level_deltas = jax.lax.stop_gradient((level_logits, level_deltas))
        if ignore_padding:
            level_logits = jnp.where(beyond_image(jnp.asarray(level_anchors), size), -jnp.inf, level_logits)
        score, index = jax.lax.top_k(level_logits, min(pre_nms, len(level_logits)))
        moved = decode_boxes(level_deltas[index], jnp.asarray(level_anchors)[index])
        moved = clip_boxes(moved, size)
        sides = moved[:, 2:] - moved[:, :2]
        valid = jnp.all((sides > 0) & (sides >= min_side) & jnp.isfinite(sides), axis=1) & jnp.isfinite(score)
        kept.append(nms_mask(moved, score, valid, threshold=threshold))
        candidates.append(moved)
        scores.append(score)
    slot, valid = select_best(jnp.concatenate(scores), jnp.concatenate(kept), count=post_nms)
    return jnp.where(valid[:, None], jnp.concatenate(candidates)[slot], 0), valid


def anchor_targets(
    anchors: np.ndarray,
    boxes: Array,
    box_valid: Array,
    size: Array,
    priorities: Array,
    *,
    count: int,
    positive_share: float = 0.5,
    ignore_padding: bool = True,
) -> Targets:
    """What a sample of the anchors learns: objectness, and the way to its box where it is positive.

    Args:
      anchors: [A, 4] xyxy, pixels, of all levels.
      boxes: [M, 4] xyxy, ground truth.
      box_valid: [M] bool.
      size: [2], (height, width) of the image without padding, pixels.
      priorities: [A] in [0, 1), see `matching.sample`.
      count: Slots.
      positive_share: At most so many of them are positive.
      ignore_padding: Leave out anchors that only a larger canvas has, see `matching.beyond_image`.
    """
    inside = ~beyond_image(jnp.asarray(anchors), size) if ignore_padding else None
    labels, matches = match_anchors(jnp.asarray(anchors), boxes, box_valid, anchor_valid=inside)
    chosen = sample(labels, priorities, count=count, max_positive=int(positive_share * count))
    return _targets(jnp.asarray(anchors), boxes, matches, chosen, (1.0, 1.0, 1.0, 1.0))


def region_targets(
    proposals: Array,
    proposal_valid: Array,
    boxes: Array,
    box_valid: Array,
    priorities: Array,
    *,
    count: int,
    weights: tuple[float, float, float, float],
    positive_share: float = 0.25,
) -> tuple[Array, Targets]:
    """A sample of the proposals and the ground-truth boxes, and what it learns.

    Args:
      proposals: [P, 4] xyxy, pixels.
      proposal_valid: [P] bool.
      boxes: [M, 4] xyxy, ground truth; they join the proposals.
      box_valid: [M] bool.
      priorities: [P + M] in [0, 1), see `matching.sample`.
      count: Slots.
      weights: Of the encoding, see `boxes.encode_boxes`.
      positive_share: At most so many of the slots are positive.

    Returns:
      (regions [count, 4] float32 xyxy, 0 in empty slots; `Targets`).
    """
    candidates = jax.lax.stop_gradient(jnp.concatenate([proposals, boxes]))
    present = jnp.concatenate([proposal_valid, box_valid])
    labels, matches = match_proposals(candidates, boxes, box_valid, proposal_valid=present)
    chosen = sample(labels, priorities, count=count, max_positive=int(positive_share * count))
    targets = _targets(candidates, boxes, matches, chosen, weights)
    return jnp.where(chosen.valid[:, None], candidates[chosen.indices], 0), targets


def _targets(candidates: Array, boxes: Array, matches: Array, chosen: Sample, weights: tuple[float, ...]) -> Targets:
    of = matches[chosen.indices]
    # Empty slots and negatives have no box: a pair whose encoding is finite stands in for theirs.
    unit = jnp.array([0.0, 0.0, 1.0, 1.0])
    pair = (jnp.where(chosen.positive[:, None], x, unit) for x in (boxes[of], candidates[chosen.indices]))
    return Targets(chosen.indices, chosen.valid, chosen.positive, encode_boxes(*pair, weights=weights), of)
