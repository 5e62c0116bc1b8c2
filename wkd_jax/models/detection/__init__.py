"""Faster R-CNN with a feature pyramid: its pure functions on boxes, for one image and of fixed shapes.

Boxes are [x1, y1, x2, y2] in absolute pixels, float32. What is missing is masked, never left out, so that everything
compiles once. The files of these functions import jax and numpy only and serve any training loop.
"""

from wkd_jax.models.detection.anchors import cell_anchors, grid_anchors, pyramid_anchors
from wkd_jax.models.detection.boxes import (
    box_area,
    clip_boxes,
    decode_boxes,
    distance_iou_loss,
    encode_boxes,
    matched_iou,
    own_deltas,
    pairwise_iou,
)
from wkd_jax.models.detection.matching import (
    Sample,
    beyond_image,
    match_anchors,
    match_proposals,
    near_objects,
    sample,
)
from wkd_jax.models.detection.nms import Detections, final_detections, nms_mask, select_best
from wkd_jax.models.detection.roi_align import assign_levels, roi_align_einsum, roi_align_gather

__all__ = [
    "Detections",
    "Sample",
    "assign_levels",
    "beyond_image",
    "box_area",
    "cell_anchors",
    "clip_boxes",
    "decode_boxes",
    "distance_iou_loss",
    "encode_boxes",
    "final_detections",
    "grid_anchors",
    "match_anchors",
    "match_proposals",
    "matched_iou",
    "near_objects",
    "nms_mask",
    "own_deltas",
    "pairwise_iou",
    "pyramid_anchors",
    "roi_align_einsum",
    "roi_align_gather",
    "sample",
    "select_best",
]
