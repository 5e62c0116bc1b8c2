"""The tables of the paper, its code and its rivals, and the config that makes each row here.

References:
  Lv, Yang, Li: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation. NeurIPS 2024.
  https://arxiv.org/abs/2412.08139
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from wkd_jax.report.metric import AP, TOP1, Metric

_PAPER = "Lv, Yang, Li, NeurIPS 2024, arXiv 2412.08139"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a published table.

    Attributes:
      name: As published.
      value: The table's metric, percent.
      more: Its further numbers (`Metric.more`), percent; None where one is not published. Fewer: the others are not.
      spread: Standard deviation of `value` over three runs; None where it is not published.
      config: What `--config` takes to make it; None where nothing here does.
      teacher: Whether it is the teacher of the other rows.
    """

    name: str
    value: float
    more: Sequence[float | None] = ()
    spread: float | None = None
    config: str | None = None
    teacher: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
      title: The setting.
      source: Where the numbers are from.
      rows: In the published order.
      metric: What the numbers are.
    """

    title: str
    source: str
    rows: Sequence[Row]
    metric: Metric = TOP1


# Name, method here, then top-1 and top-5 of resnet34 -> resnet18 and of resnet50 -> mobilenetv1.
_IMAGENET = (
    ("student", "none", (69.75, 89.07), (68.87, 88.76)),
    ("KD", "kd", (71.03, 90.05), (70.50, 89.80)),
    ("DKD", "dkd", (71.70, 90.41), (72.05, 91.05)),
    ("NKD", "nkd", (71.96, None), (72.58, None)),
    ("CTKD", "ctkd", (71.51, 90.47), None),
    ("WTTM", "wttm", (72.19, None), (73.09, None)),
    ("WKD-L", "wkd_l", (72.49, 90.75), (73.17, 91.32)),
    ("FitNet", "fitnet", (70.53, 89.87), (70.26, 90.14)),
    ("CRD", "crd", (71.17, 90.13), (71.37, 90.41)),
    ("ReviewKD", "reviewkd", (71.61, 90.51), (72.56, 91.00)),
    ("CAT", "cat_kd", (71.26, 90.45), (72.24, 91.13)),
    ("WKD-F", "wkd_f", (72.50, 91.00), (73.12, 91.39)),
    ("CRD + KD", "crd+kd", (71.38, 90.49), None),
    ("DPK", "dpk", (72.51, 90.77), (73.26, 91.17)),
    ("FCFD", "fcfd", (72.25, 90.71), (73.26, 91.24)),
    ("KD-Zero", None, (72.17, 90.46), (73.02, 91.05)),  # its searched losses are not published completely
    ("WKD-L + WKD-F", "wkd_l+wkd_f", (72.76, 91.08), (73.69, 91.63)),
    # Of the paper's table of training latency.
    ("ICKD-C", "ickd_c", (72.19, None), None),
    ("EMD + IPOT", "emd_ipot", (70.46, None), None),
)

# Methods here, in the order of the columns below; WKD with its spread.
_CROSS_METHODS = ("kd", "dkd", "dist", "ofa", "wkd_l", "fitnet", "cc", "rkd", "crd", "wkd_f")
_CROSS_NAMES = ("KD", "DKD", "DIST", "OFA", "WKD-L", "FitNet", "CC", "RKD", "CRD", "WKD-F")
# Pair -> title, teacher, student, and the methods' top-1.
_CROSS = {
    "swin_t_r18": (
        ("Swin-T -> ResNet-18", 89.26, 74.01),
        (78.74, 80.26, 77.75, 80.54, (81.42, 0.22), 78.87, 74.19, 74.11, 77.63, (81.57, 0.12)),
    ),
    "vit_s_r18": (
        ("ViT-S -> ResNet-18", 92.04, 74.01),
        (77.26, 78.10, 76.49, 80.15, (80.81, 0.21), 77.71, 74.26, 73.72, 76.60, (81.12, 0.24)),
    ),
    "vit_s_mv2": (
        ("ViT-S -> MobileNetV2", 92.04, 73.68),
        (72.77, 69.80, 72.54, 78.45, (79.04, 0.05), 73.54, 70.67, 68.46, 78.14, (79.11, 0.07)),
    ),
    "convnext_t_deit_t": (
        ("ConvNeXt-T -> DeiT-T", 88.41, 68.00),
        (72.99, 74.60, 73.55, 75.76, (76.11, 0.18), 60.78, 68.01, 69.79, 65.94, (73.27, 0.22)),
    ),
    "convnext_t_swin_p": (
        ("ConvNeXt-T -> Swin-P", 88.41, 72.63),
        (76.44, 76.80, 76.41, 78.32, (78.94, 0.17), 24.06, 72.63, 71.73, 67.09, (74.80, 0.13)),
    ),
}

# Name, method here, resnet32x4 -> resnet8x4, wrn_40_2 -> shufflenetv1. Of each rival the number that its own source
# or a benchmark's gives, as the head of configs/cifar100_wkd.py says.
_CIFAR = (
    ("student", "none", 72.50, 70.50),
    ("KD", "kd", 73.33, 74.83),
    ("DKD", "dkd", 76.32, 76.70),
    ("NKD", "nkd", 76.35, None),
    ("TTM", "ttm", 76.17, 75.39),
    ("WTTM", "wttm", 76.06, 75.42),
    ("DIST", "dist", 76.31, None),
    ("WKD-L", "wkd_l", 76.53, 76.72),
    ("FitNet", "fitnet", 73.50, 73.73),
    ("CC", "cc", 72.97, 71.38),
    ("RKD", "rkd", 71.90, 72.21),
    ("CRD", "crd", 75.51, 76.05),
    ("CRD + KD", "crd+kd", 75.46, 76.27),
    ("ReviewKD", "reviewkd", 75.63, 77.14),
    ("CAT", "cat_kd", 76.91, 77.35),
    ("FCFD", "fcfd", 76.62, 77.99),
    ("ICKD-C", "ickd_c", 75.25, None),
    ("WKD-F", "wkd_f", 76.77, 77.36),
    ("WKD-L + WKD-F", "wkd_l+wkd_f", 77.28, 77.50),
)

# Name, then AP, AP50 and AP75 on val2017 of Faster R-CNN-FPN: ResNet-101 -> 18, ResNet-101 -> 50,
# ResNet-50 -> MobileNetV2. Single runs.
_COCO = (
    ("teacher", None, (42.04, 62.48, 45.88), (42.04, 62.48, 45.88), (40.22, 61.02, 43.81)),
    ("student", "none", (33.26, 53.61, 35.26), (37.93, 58.84, 41.05), (29.47, 48.87, 30.90)),
    ("KD", "kd", (33.97, 54.66, 36.62), (38.35, 59.41, 41.71), (30.13, 50.28, 31.35)),
    ("DKD", "dkd", (35.05, 56.60, 37.54), (39.25, 60.90, 42.73), (32.34, 53.77, 34.01)),
    ("WKD-L", "wkd_l", (35.24, 56.73, 37.91), None, (32.48, 53.85, 34.21)),
    ("FitNet", "fitnet", (34.13, 54.16, 36.71), (38.76, 59.62, 41.80), (30.20, 49.80, 31.69)),
    ("FGFI", "fgfi", (35.44, 55.51, 38.17), (39.44, 60.27, 43.04), (31.16, 50.68, 32.92)),
    ("ICD", "icd", (35.90, 56.02, 38.75), None, (32.88, 52.56, 34.93)),
    ("ReviewKD", "reviewkd", (36.75, 56.72, 34.00), (40.36, 60.97, 44.08), (33.71, 53.15, 36.13)),
    ("WKD-F", "wkd_f", (37.21, 57.32, 40.15), None, (34.47, 54.67, 36.85)),
    ("DKD + ReviewKD", "dkd+reviewkd", (37.01, 57.53, 39.85), (40.65, 61.51, 44.44), (34.35, 54.89, 36.61)),
    ("WKD-L + WKD-F", "wkd_lf", (37.49, 57.76, 40.39), None, (34.80, 55.27, 37.28)),
    ("FCFD", "fcfd", (37.37, 57.60, 40.34), None, (34.97, 55.04, 37.51)),
    ("WKD-L + WKD-F, boxes", "wkd_lf_box", (37.79, 57.95, 41.08), None, (35.48, 55.21, 38.45)),
)


def _imagenet(pair: str, column: int, title: str, teacher: tuple[float, float]) -> Table:
    rows = [Row("teacher", teacher[0], teacher[1:], teacher=True)]
    for name, method, *numbers in _IMAGENET:
        if numbers[column] is None:
            continue
        top1, *top5 = numbers[column]
        file = "imagenet_wkd" if (method or "").startswith("wkd") else "imagenet_baselines"
        config = f"{file}:pair={pair},method={method}" if method else None
        rows.append(Row(name, top1, top5, config=config))
    source = f"{_PAPER}. WKD's numbers are of the best epoch, as its released code reports."
    return Table(f"ImageNet, {title}", source, rows)


def _cross(pair: str) -> Table:
    (title, teacher, student), numbers = _CROSS[pair]
    config = f"cifar100_cross:pair={pair},method="
    rows = [Row("teacher", teacher, teacher=True), Row("student", student, config=f"{config}none")]
    for name, method, number in zip(_CROSS_NAMES, _CROSS_METHODS, numbers, strict=True):
        top1, spread = number if isinstance(number, tuple) else (number, None)
        rows.append(Row(name, top1, spread=spread, config=config + method))
    return Table(f"CIFAR-100, {title}", f"{_PAPER}. WKD: mean and deviation of three runs.", rows)


def _cifar(pair: str, column: int, title: str, teacher: float) -> Table:
    rows = [Row("teacher", teacher, teacher=True)]
    rows += [
        Row(name, numbers[column], config=f"cifar100_wkd:pair={pair},method={method}")
        for name, method, *numbers in _CIFAR
        if numbers[column] is not None
    ]
    source = (
        "teacher, student and KD: README of RepDistiller; WKD: README of its authors' code, best epoch; others: their "
        "own papers or a benchmark's README, see configs/cifar100_wkd.py"
    )
    return Table(f"CIFAR-100, {title}", f"{source} ({_PAPER}).", rows)


def _selfkd() -> Table:
    config = "imagenet_selfkd:method="
    rows = (
        Row("standard", 69.75, config=f"{config}none"),
        Row("Tf-KD", 70.14, config=f"{config}tf_kd_self"),
        Row("FRSKD", 70.17, config=f"{config}frskd"),
        Row("Zipf's KD", 70.30, config=f"{config}zipf"),
        Row("BAN", 70.50, config=f"{config}kd"),
        Row("USKD", 70.75, config=f"{config}uskd"),
        Row("WKD-L", 71.35, config=f"{config}wkd_l"),
    )
    return Table("ImageNet, self-distillation of ResNet-18", f"{_PAPER}.", rows)


def _coco(pair: str, column: int, title: str, source: str) -> Table:
    config = f"coco_wkd:pair={pair},method="
    rows = [
        Row(name, value[0], value[1:], teacher=method is None, config=method and config + method)
        for name, method, *numbers in _COCO
        if (value := numbers[column]) is not None
    ]
    return Table(f"COCO, Faster R-CNN-FPN, {title}", f"{source} Single runs.", rows, AP)


TABLES = {
    "imagenet_r34_r18": _imagenet("r34_r18", 0, "ResNet-34 -> ResNet-18", (73.31, 91.42)),
    "imagenet_r50_mv1": _imagenet("r50_mv1", 1, "ResNet-50 -> MobileNetV1", (76.16, 92.86)),
    "imagenet_selfkd": _selfkd(),
    "cifar100_r32x4_r8x4": _cifar("r32x4_r8x4", 0, "ResNet-32x4 -> ResNet-8x4", 79.42),
    "cifar100_wrn40_2_snv1": _cifar("wrn40_2_snv1", 1, "WRN-40-2 -> ShuffleNetV1", 75.61),
    **{f"cifar100_{pair}": _cross(pair) for pair in _CROSS},
    "coco_r101_r18": _coco(
        "r101_r18",
        0,
        "ResNet-101 -> ResNet-18",
        f"{_PAPER}. ReviewKD's AP75 is as printed; it is below the student's, so probably a misprint.",
    ),
    "coco_r101_r50": _coco("r101_r50", 1, "ResNet-101 -> ResNet-50", "Zhao et al., CVPR 2022, arXiv 2203.08679 (DKD)."),
    "coco_r50_mv2": _coco("r50_mv2", 2, "ResNet-50 -> MobileNetV2", f"{_PAPER}."),
}
