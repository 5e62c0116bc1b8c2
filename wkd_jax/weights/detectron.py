"""What files of detectron2, and of its predecessor in Caffe2, say otherwise than a state dict of PyTorch does."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from wkd_jax.types import Normalisation
from wkd_jax.weights.public import DETECTRON2, IMAGENET

_STEM = "res_conv1_bn_"
# The classifier; a bias of the first convolution, which Detectron and detectron2 do not use; what training left behind.
_UNUSED = re.compile(r"^(fc1000|pred)_[wb]$|^conv1_b$|_momentum$")
_LEAVES = {"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
_LEAVES |= {"rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var"}
_BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}


def is_caffe2(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the arrays of a ResNet in Caffe2's names, such as MSRA's ImageNet weights."""
    return "conv1_w" in arrays and any(key.startswith("res2_0_branch") for key in arrays)


def from_caffe2(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """(arrays in detectron2's names, keys left out, which its networks do not use). Other keys stay as they are.

    Example:
      >>> found, left_out = from_caffe2(dict.fromkeys(["conv1_w", "res2_0_branch2a_bn_s", "fc1000_b"], np.ones(1)))
      >>> [*found], left_out
      (['backbone.bottom_up.stem.conv1.weight', 'backbone.bottom_up.res2.0.conv1.norm.weight'], ['fc1000_b'])
    """
    left_out = [key for key in arrays if _UNUSED.search(key)]
    return {_renamed(key): value for key, value in arrays.items() if key not in left_out}, left_out


def _renamed(key: str) -> str:
    if key == "conv1_w":
        return "backbone.bottom_up.stem.conv1.weight"
    if key.startswith(_STEM) and key.removeprefix(_STEM) in _LEAVES:
        return f"backbone.bottom_up.stem.conv1.norm.{_LEAVES[key.removeprefix(_STEM)]}"
    found = re.fullmatch(r"res(\d)_(\d+)_(branch1|branch2[abc])_(?:(w)|bn_(\w+))", key)
    if not found or found[5] not in (None, *_LEAVES):
        return key
    leaf = "weight" if found[4] else f"norm.{_LEAVES[found[5]]}"
    return f"backbone.bottom_up.res{found[1]}.{found[2]}.{_BRANCHES[found[3]]}.{leaf}"


def normalisation(
    arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], style: str
) -> Normalisation | None:
    """How a detector wants its images, as R, G, B in units of the full range, by the keys of its arrays.

    detectron2's are fed B, G, R from 0 to 255, less a mean; or by `pixel_mean` and `pixel_std` of the file, in the
    order of its channels. torchvision's are fed like its image classifiers.

    Args:
      arrays: By the file's keys.
      buffers: What else the file holds.
      style: Whose keys, where the source says it; "": by the keys.

    Returns:
      None for the keys of other networks, and where channels are R, G, B in detectron2's keys and the file says no
      more.
    """
    if any(re.search(r"(^|\.)backbone\.body\.", key) for key in arrays):
        return IMAGENET
    if not any(re.search(r"(^|\.)(backbone\.bottom_up|stem\.conv1)\.", key) for key in arrays):
        return None
    if {"pixel_mean", "pixel_std"} <= {*buffers}:
        turn = 1 if style == "detectron2_rgb" else -1
        values = (buffers[key].ravel()[::turn].tolist() for key in ("pixel_mean", "pixel_std"))
        # float32 numbers as they were written: 103.53 and not 103.52999878.
        return Normalisation(*(tuple(float(f"{value:.7g}") / 255 for value in row) for row in values))
    return None if style == "detectron2_rgb" else DETECTRON2
