"""Names of a detector's arrays in detectron2 and torchvision, and what these do with some of them."""

from __future__ import annotations

import math

import numpy as np

from wkd_jax.models.base import KeyStyle, Step

# Both flatten a pooled region [D, 7, 7] before the first hidden layer.
FLAT = Step(
    shape=lambda shape: (shape[0], math.prod(shape[1:])),
    store=lambda array: array.reshape(len(array), -1),
    load=lambda array: array,
)
# The networks of detectron2 are fed B, G, R, as OpenCV decodes images, and ours R, G, B.
BGR = Step(
    shape=lambda shape: shape,
    store=lambda array: array[:, ::-1],
    load=lambda array: array[:, ::-1],
    note="turned the first convolution from channels B, G, R to R, G, B",
)
# In torchvision the background is the first class, and has box deltas that nothing reads.
BACKGROUND_FIRST = Step(
    shape=lambda shape: shape,
    store=lambda array: np.roll(array, 1, axis=0),
    load=lambda array: np.roll(array, -1, axis=0),
    note="moved the background from the first class to the last",
)
BACKGROUND_BOXES = Step(
    shape=lambda shape: (shape[0] + 4, *shape[1:]),
    store=lambda array: np.concatenate([np.zeros_like(array[:4]), array]),
    load=lambda array: array[4:],
    note="left out the box deltas of the background",
)
_FC1 = r"^box_head\.fc1\.weight$"

_BOTTOM_UP = "backbone.bottom_up."
# (ours, theirs) of the layers in a MobileNetV2 block, in an order in which none is written twice: first the block
# without expansion, then the others.
_BLOCKS = (
    (r"1", (("2", "4"), ("1", "3"), (r"0\.1", "1"), (r"0\.0", "0"))),
    (r"(?:[2-9]|1\d)", (("3", "7"), ("2", "6"), (r"1\.1", "4"), (r"1\.0", "3"), (r"0\.1", "1"), (r"0\.0", "0"))),
)
_DETECTRON2 = (
    (r"^trunk\.conv1\.", f"{_BOTTOM_UP}stem.conv1."),
    (r"^trunk\.bn1\.", f"{_BOTTOM_UP}stem.conv1.norm."),
    *((rf"^trunk\.layer{stage}\.", f"{_BOTTOM_UP}res{stage + 1}.") for stage in (1, 2, 3, 4)),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    *(
        (rf"^(trunk\.features\.{index}\.conv)\.{ours}\.", rf"\1.{theirs}.")
        for index, layers in _BLOCKS
        for ours, theirs in layers
    ),
    (r"^trunk\.", _BOTTOM_UP),
    *((rf"^fpn\.lateral\.{i}\.", f"backbone.fpn_lateral{i + 2}.") for i in range(4)),
    *((rf"^fpn\.output\.{i}\.", f"backbone.fpn_output{i + 2}.") for i in range(4)),
    (r"^rpn\.objectness\.", "rpn.objectness_logits."),
    (r"^rpn\.deltas\.", "rpn.anchor_deltas."),
    (r"^rpn\.", "proposal_generator.rpn_head."),
    (r"^box_head\.fc", "roi_heads.box_head.fc"),
    (r"^box_head\.", "roi_heads.box_predictor."),
)


def _torchvision(inner: str, conv: str) -> KeyStyle:
    """Of a version that wraps the convolutions of the pyramid and of the proposal head so."""
    renames = (
        (r"^trunk\.features\.", "backbone.body."),
        (r"^trunk\.", "backbone.body."),
        (r"^fpn\.lateral\.(\d)\.", rf"backbone.fpn.inner_blocks.\1.{inner}"),
        (r"^fpn\.output\.(\d)\.", rf"backbone.fpn.layer_blocks.\1.{inner}"),
        (r"^rpn\.conv\.", f"rpn.head.conv.{conv}"),
        (r"^rpn\.objectness\.", "rpn.head.cls_logits."),
        (r"^rpn\.deltas\.", "rpn.head.bbox_pred."),
        (r"^box_head\.fc1\.", "roi_heads.box_head.fc6."),
        (r"^box_head\.fc2\.", "roi_heads.box_head.fc7."),
        (r"^box_head\.", "roi_heads.box_predictor."),
    )
    return KeyStyle(
        renames,
        steps=(
            (_FC1, FLAT),
            (r"^box_head\.cls_score\.", BACKGROUND_FIRST),
            (r"^box_head\.bbox_pred\.", BACKGROUND_BOXES),
        ),
    )


KEY_STYLES = {
    # MobileNetV2 as in the code of ReviewKD and DKD, which are built on detectron2.
    "detectron2": KeyStyle(_DETECTRON2, steps=((_FC1, FLAT), (r"^trunk\.(conv1|features\.0\.0)\.weight$", BGR))),
    # The same of a network whose INPUT.FORMAT is RGB.
    "detectron2_rgb": KeyStyle(_DETECTRON2, steps=((_FC1, FLAT),)),
    "torchvision": _torchvision("0.", "0.0."),
    # Also the published file: up to 0.12.
    "torchvision_0_12": _torchvision("", ""),
}
"""By code base, see `wkd_jax.models.base.Network`."""
