"""Makes torchvision importable beside a CPU build of torch.

The wheels of the package index are built against CUDA: beside a CPU torch their compiled operators do not load, and the
import fails where it attaches a shape function to an operator that is not there. Declaring it is enough for models.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")  # lives as long as this module
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
