"""Weights in and out of the PyTorch world, without PyTorch.

`open_file` and `restore` read what torchvision, timm, mdistiller, RepDistiller, MMClassification, detectron2, the
authors of DeiT, Swin and ConvNeXt, and Google publish. `export` writes what PyTorch loads with strict=True, what Flax
users read, and a function for serving. On the command line: python -m wkd_jax.weights --help.
"""

from wkd_jax.weights.errors import WeightsError
from wkd_jax.weights.load import NATIVE_FILE, WeightsFile, open_file, restore, write

__all__ = ["NATIVE_FILE", "WeightsError", "WeightsFile", "open_file", "restore", "write"]
