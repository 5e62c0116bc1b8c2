"""Trained weights that anybody can download: where they are, what they score, and how they want their images.

Facts of the publishers (torchvision's weight metadata, timm's, RepDistiller's and detectron2's tables), none measured
here. A file is downloaded when somebody asks for it by its name; nothing of it is part of this package.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from wkd_jax.types import Normalisation

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CIFAR100 = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
DETECTRON2 = Normalisation(IMAGENET.mean, (1 / 255,) * 3)  # 0 to 255 less a mean: (103.53, 116.28, 123.675) in B, G, R


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the publisher's accuracy was measured.

    Attributes:
      resize: Shorter side after resizing, pixels; 0: images as they are.
      crop: Side of the centre crop; of detectors, which see whole images, the longest side after resizing.
      interpolation: Of the resizing; "" where there is none.
    """

    resize: int
    crop: int
    interpolation: str


@dataclasses.dataclass(frozen=True)
class PublicWeights:
    """One published file.

    Attributes:
      model: Our registered name of the network.
      url: Where it is. A file name that ends in -<hex digits> carries the beginning of its SHA-256.
      data: Data set that it was trained on, and that the accuracies are of.
      normalisation: Of its images.
      num_classes: Rows of its classifier, the background included; None for the trunk of a detector alone.
      top1: Percent, of the publisher; None for detectors.
      top5: Percent; None where it was not published.
      box_ap: Of a detector, COCO's average precision of boxes over ten overlaps, percent.
      evaluation: How the accuracies were measured; None where there are none.
      settings: Of the network, where they are not the defaults.
    """

    model: str
    url: str
    data: str
    normalisation: Normalisation
    num_classes: int | None = None
    top1: float | None = None
    top5: float | None = None
    box_ap: float | None = None
    evaluation: Evaluation | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> str:
        """As tables show it: "73.31 / 91.42", "79.42", "42.0 AP", or "-" for a trunk alone."""
        if self.box_ap is not None:
            return f"{self.box_ap:.1f} AP"
        if self.top1 is None:
            return "-"
        return f"{self.top1:.2f}" + (f" / {self.top5:.2f}" if self.top5 is not None else "")


def _imagenet(
    model: str,
    url: str,
    top1: float,
    top5: float,
    resize: int = 256,
    interpolation: str = "bilinear",
    normalisation: Normalisation = IMAGENET,
) -> PublicWeights:
    evaluation = Evaluation(resize, 224, interpolation)
    return PublicWeights(model, url, "ImageNet", normalisation, 1000, top1, top5, evaluation=evaluation)


def _cifar(model: str, top1: float) -> PublicWeights:
    url = f"http://shape2prog.csail.mit.edu/repo/{model}_vanilla/ckpt_epoch_240.pth"
    return PublicWeights(model, url, "CIFAR-100", CIFAR100, 100, top1, evaluation=Evaluation(0, 32, ""))


def _coco(model: str, path: str, box_ap: float) -> PublicWeights:
    url = f"{_FACEBOOK}/detectron2/COCO-Detection/{path}"
    evaluation = Evaluation(800, 1333, "bilinear")
    return PublicWeights(model, url, "COCO", DETECTRON2, 81, box_ap=box_ap, evaluation=evaluation)


def _msra(model: str, name: str) -> PublicWeights:
    url = f"{_FACEBOOK}/detectron2/ImageNetPretrained/MSRA/{name}.pkl"
    return PublicWeights(model, url, "ImageNet", DETECTRON2)


_TORCH = "https://download.pytorch.org/models"
_FACEBOOK = "https://dl.fbaipublicfiles.com"
_AUGREG = "gs://vit_models/augreg"
_VIT, _DEIT, _SWIN = "vit_small_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"

# The first of a model is the one that the paper's settings use. Names are timm's tags where timm has the file.
PUBLIC = {
    "resnet18.tv_in1k": _imagenet("resnet18", f"{_TORCH}/resnet18-f37072fd.pth", 69.758, 89.078),
    "resnet34.tv_in1k": _imagenet("resnet34", f"{_TORCH}/resnet34-b627a593.pth", 73.314, 91.420),
    "resnet50.tv_in1k": _imagenet("resnet50", f"{_TORCH}/resnet50-0676ba61.pth", 76.130, 92.862),
    "resnet50.tv2_in1k": _imagenet("resnet50", f"{_TORCH}/resnet50-11ad3fa6.pth", 80.858, 95.434, resize=232),
    "resnet101.tv_in1k": _imagenet("resnet101", f"{_TORCH}/resnet101-63fe2227.pth", 77.374, 93.546),
    "resnet101.tv2_in1k": _imagenet("resnet101", f"{_TORCH}/resnet101-cd907fc2.pth", 81.886, 95.780, resize=232),
    "mobilenetv2_100.ra_in1k": _imagenet(
        "mobilenetv2",
        "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
        "mobilenetv2_100_ra-b33bc2c4.pth",
        72.910,
        91.000,
        interpolation="bicubic",
    ),
    "mobilenet_v2.tv_in1k": _imagenet("mobilenetv2", f"{_TORCH}/mobilenet_v2-b0353104.pth", 71.878, 90.286),
    "mobilenet_v2.tv2_in1k": _imagenet(
        "mobilenetv2", f"{_TORCH}/mobilenet_v2-7ebf99e0.pth", 72.154, 90.822, resize=232
    ),
    "vit_small_patch16_224.augreg_in21k_ft_in1k": _imagenet(
        _VIT,
        f"{_AUGREG}/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-"
        "res_224.npz",
        81.402,
        96.150,
        resize=248,
        interpolation="bicubic",
        normalisation=INCEPTION,
    ),
    "deit_tiny_patch16_224.fb_in1k": _imagenet(
        _DEIT,
        f"{_FACEBOOK}/deit/deit_tiny_patch16_224-a1311bcf.pth",
        72.190,
        91.100,
        resize=248,
        interpolation="bicubic",
    ),
    "swin_tiny_patch4_window7_224.ms_in1k": _imagenet(
        _SWIN,
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth",
        81.388,
        95.540,
        resize=248,
        interpolation="bicubic",
    ),
    "swin_t.tv_in1k": _imagenet(
        _SWIN, f"{_TORCH}/swin_t-704ceda3.pth", 81.474, 95.776, resize=232, interpolation="bicubic"
    ),
    "convnext_tiny.fb_in1k": _imagenet(
        "convnext_tiny",
        f"{_FACEBOOK}/convnext/convnext_tiny_1k_224_ema.pth",
        82.066,
        95.854,
        interpolation="bicubic",
    ),
    "convnext_tiny.tv_in1k": _imagenet(
        "convnext_tiny", f"{_TORCH}/convnext_tiny-983f1562.pth", 82.520, 96.146, resize=236
    ),
    "resnet32x4.cifar100": _cifar("resnet32x4", 79.42),
    "wrn_40_2.cifar100": _cifar("wrn_40_2", 75.61),
    "vgg13.cifar100": _cifar("vgg13", 74.64),
    "resnet56.cifar100": _cifar("resnet56", 72.34),
    "resnet110.cifar100": _cifar("resnet110", 74.31),
    "faster_rcnn_r101.d2_3x_coco": _coco(
        "faster_rcnn_r101", "faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl", 42.0
    ),
    "faster_rcnn_r50.d2_3x_coco": _coco(
        "faster_rcnn_r50", "faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl", 40.2
    ),
    "faster_rcnn_r50.d2_1x_coco": _coco(
        "faster_rcnn_r50", "faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl", 37.9
    ),
    "faster_rcnn_r50.tv_coco": PublicWeights(
        "faster_rcnn_r50",
        f"{_TORCH}/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
        "COCO",
        IMAGENET,
        91,
        box_ap=37.0,
        evaluation=Evaluation(800, 1333, "bilinear"),
        settings={"preset": "tv", "norm_eps": 0.0},
    ),
    "resnet50.msra_in1k": _msra("faster_rcnn_r50", "R-50"),
    "resnet101.msra_in1k": _msra("faster_rcnn_r101", "R-101"),
}


def by_hash(sha256: str) -> PublicWeights | None:
    """The published file whose name carries the beginning of this hash; None if there is none.

    Example:
      >>> by_hash("b627a593" + 56 * "0").top1, by_hash(64 * "0")
      (73.314, None)
    """
    for weights in PUBLIC.values():
        found = re.search(r"-([0-9a-f]{8,})\.\w+$", weights.url)
        if found and sha256.startswith(found[1]):
            return weights
    return None
