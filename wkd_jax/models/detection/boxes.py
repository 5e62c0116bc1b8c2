"""Boxes: areas, overlaps, clipping, the regression code of R-CNN, and the distance-IoU loss.

A box is [x1, y1, x2, y2] in absolute pixels; its sides are x2 - x1 and y2 - y1, and one whose side is not above 0 is
empty. All is computed in float32 (float64 where an input is), whatever the dtype of the network. Imports jax only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

MAX_LOG_SCALE = math.log(1000 / 16)


def box_area(boxes: Array) -> Array:
    """Areas of boxes; 0 for empty ones.

    Args:
      boxes: [..., 4] xyxy, pixels.

    Returns:
      [...], float32, pixels squared.

    Example:
      >>> print(box_area(jnp.array([[1.0, 1.0, 3.0, 5.0], [3.0, 0.0, 1.0, 5.0]])))
      [8. 0.]
    """
    boxes = _wide(boxes)
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def pairwise_iou(a: Array, b: Array) -> Array:
    """Intersection over union of every box of one set with every box of the other.

    Args:
      a: [..., N, 4] xyxy, pixels.
      b: [..., M, 4]; the leading axes broadcast.

    Returns:
      [..., N, M], float32, from 0 to 1; exactly 0 where the intersection is empty.

    Raises:
      ValueError: If the last axis of an input is not 4.

    Example:
      >>> box, others = jnp.array([[0, 0, 2, 2]]), jnp.array([[0, 0, 2, 1], [1, 0, 2, 1], [2, 0, 3, 2]])
      >>> print(pairwise_iou(box, others))
      [[0.5  0.25 0.  ]]
    """
    for name, boxes in (("a", a), ("b", b)):
        if jnp.ndim(boxes) < 2 or jnp.shape(boxes)[-1] != 4:
            raise ValueError(f"{name} must be boxes [..., N, 4], got {jnp.shape(boxes)}")
    return matched_iou(_wide(a)[..., :, None, :], _wide(b)[..., None, :, :])


def matched_iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes that belong together.

    Args:
      a: [..., 4] xyxy, pixels.
      b: [..., 4]; the leading axes broadcast.

    Returns:
      [...], float32, from 0 to 1; exactly 0 where the intersection is empty. Finite gradients everywhere.

    Example:
      >>> print(matched_iou(jnp.array([0.0, 0.0, 2.0, 2.0]), jnp.array([0.0, 0.0, 2.0, 1.0])))
      0.5
    """
    a, b = _wide(a), _wide(b)
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    intersection = jnp.maximum(width, 0) * jnp.maximum(height, 0)
    union = box_area(a) + box_area(b) - intersection
    return intersection / jnp.where(union > 0, union, 1)


def clip_boxes(boxes: Array, size: Array) -> Array:
    """Boxes cut off at the borders of their image: x to [0, width], y to [0, height], both ends included.

    Args:
      boxes: [..., N, 4] xyxy, pixels.
      size: [..., 2], (height, width) of the image without padding, pixels.

    Returns:
      [..., N, 4], float32.

    Raises:
      ValueError: If `size` does not end in 2.

    Example:
      >>> print(clip_boxes(jnp.array([[-3.0, 2.0, 9.0, 12.0]]), jnp.array([8, 6])))
      [[0. 2. 6. 8.]]
    """
    if jnp.shape(size)[-1:] != (2,):
        raise ValueError(f"size must be (height, width) [..., 2], got {jnp.shape(size)}")
    boxes, size = _wide(boxes), jnp.asarray(size)
    limits = size[..., None, jnp.array([1, 0, 1, 0])].astype(boxes.dtype)
    return jnp.clip(boxes, 0, limits)


def encode_boxes(boxes: Array, anchors: Array, *, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Array:
    """Regression targets that turn anchors into boxes.

    With centres (cx, cy) and sides (w, h): wx (cx - cx_a) / w_a, wy (cy - cy_a) / h_a, ww ln(w / w_a), wh ln(h / h_a).

    Args:
      boxes: [..., 4] xyxy, pixels.
      anchors: [..., 4]; the leading axes broadcast.
      weights: (wx, wy, ww, wh): ones for proposals, 10, 10, 5, 5 for the boxes of classes.

    Returns:
      [..., 4] (dx, dy, dw, dh), float32. 0, with gradient 0, where the box or the anchor is empty, as padding is.

    Example:
      >>> print(encode_boxes(jnp.array([3.0, 0.0, 7.0, 4.0]), jnp.array([0.0, 0.0, 4.0, 4.0])))
      [0.75 0.   0.   0.  ]

    References:
      Girshick et al., "Rich feature hierarchies for accurate object detection", CVPR 2014, arXiv 1311.2524, appendix C.
    """
    boxes, anchors = _wide(boxes), _wide(anchors)
    solid = (box_area(boxes) > 0) & (box_area(anchors) > 0)
    unit = jnp.array([0, 0, 1, 1], boxes.dtype)
    (centre, sides), (anchor_centre, anchor_sides) = (
        _centre_and_sides(jnp.where(solid[..., None], x, unit)) for x in (boxes, anchors)
    )
    shift, scale = (centre - anchor_centre) / anchor_sides, jnp.log(sides / anchor_sides)
    return jnp.asarray(weights, boxes.dtype) * jnp.concatenate([shift, scale], axis=-1)


def decode_boxes(deltas: Array, anchors: Array, *, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Array:
    """Boxes that regression outputs make of anchors: the inverse of `encode_boxes`.

    dw / ww and dh / wh are cut at ln(1000 / 16) from above, so that no output grows an anchor beyond measure. Nothing
    is clipped to the image.

    Args:
      deltas: [..., 4] (dx, dy, dw, dh), any float dtype. Outputs by class are [N, K, 4], with anchors [N, 1, 4].
      anchors: [..., 4] xyxy, pixels; the leading axes broadcast.
      weights: As in `encode_boxes`.

    Returns:
      [..., 4] xyxy, float32.

    Example:
      >>> print(decode_boxes(jnp.array([0.75, 0.0, 0.0, 9.0]), jnp.array([0.0, 0.0, 4.0, 4.0])).round())
      [   3. -123.    7.  127.]

    References:
      Girshick et al., arXiv 1311.2524, appendix C; the limit is that of the Detectron code base.
    """
    deltas = _wide(deltas) / jnp.asarray(weights, jnp.float32)
    centre, sides = _centre_and_sides(_wide(anchors))
    centre = deltas[..., :2] * sides + centre
    half = 0.5 * (jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * sides)
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def own_deltas(deltas: Array, labels: Array) -> Array:
    """Of deltas by class, those of each region's own class; of the background, which has no box, the last class's.

    Args:
      deltas: [..., C - 1, 4].
      labels: [...] integers in 0..C - 1, the background last.

    Returns:
      [..., 4], dtype of the deltas.

    Example:
      >>> print(own_deltas(jnp.arange(16.0).reshape(2, 2, 4), jnp.array([0, 2])))
      [[ 0.  1.  2.  3.]
       [12. 13. 14. 15.]]
    """
    own = jnp.minimum(labels, deltas.shape[-2] - 1)[..., None, None]
    return jnp.take_along_axis(deltas, own, axis=-2)[..., 0, :]


def distance_iou_loss(boxes: Array, targets: Array) -> Array:
    """Distance-IoU loss of boxes against those they belong to: 1 - IoU + d^2 / c^2.

    d is the distance of the two centres, c the diagonal of the smallest box around both. Gradients flow into both
    sides; stop the teacher's.

    Args:
      boxes: [..., 4] xyxy, pixels, float.
      targets: Same shape.

    Returns:
      [...], float32, from 0 to 2; no mean is taken. Two boxes that are one point have 1, with gradient 0.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> print(distance_iou_loss(jnp.array([0.0, 0.0, 4.0, 3.0]), jnp.array([0.0, 0.0, 2.0, 3.0])))  # 1 - 1/2 + 1/25
      0.54

    References:
      Zheng et al., "Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression", AAAI 2020, arXiv
      1911.08287, equation 7.
    """
    if jnp.shape(boxes) != jnp.shape(targets):
        raise ValueError(f"boxes and targets must be of one shape, got {jnp.shape(boxes)} and {jnp.shape(targets)}")
    boxes, targets = _wide(boxes), _wide(targets)
    around = jnp.maximum(boxes[..., 2:], targets[..., 2:]) - jnp.minimum(boxes[..., :2], targets[..., :2])
    diagonal = jnp.sum(jnp.square(around), axis=-1)
    apart = jnp.sum(jnp.square(_centre_and_sides(boxes)[0] - _centre_and_sides(targets)[0]), axis=-1)
    return 1 - matched_iou(boxes, targets) + apart / jnp.where(diagonal > 0, diagonal, 1)


def _centre_and_sides(boxes: Array) -> tuple[Array, Array]:
    """[..., 2] each, (x, y) and (width, height)."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides


def _wide(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
