"""MobileNets against torchvision's, timm's, and networks written from the tables of mdistiller and MMClassification."""

import harness
import pytest
import timm
import torchvision
from torch import nn
from torch_cifar_nets import conv, conv_norm_relu

from wkd_jax.models import mobilenetv1, mobilenetv2

SIZES = [(64, 64), (37, 70)]


class MobileNetV1(nn.Module):
    UNITS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes, units=UNITS):
        super().__init__()
        layers, wide_in = [conv_norm_relu(conv(3, 32, 3, 2))], 32
        for wide_out, stride in units:
            depthwise = conv(wide_in, wide_in, 3, stride, groups=wide_in)
            layers.append(conv_norm_relu(depthwise, conv(wide_in, wide_out, 1)))
            wide_in = wide_out
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(wide_in, num_classes)

    def forward(self, x):
        return self.fc(self.model(x).flatten(1))


class MobileNetV1Backbone(nn.Module):
    """MMClassification's keys: the last two units apart."""

    def __init__(self):
        super().__init__()
        units = MobileNetV1(1).model
        self.model, self.s4 = units[:12], nn.Sequential(*units[12:14])

    def forward(self, x):
        return self.s4(self.model(x))


class ConvModule(nn.Module):
    def __init__(self, conv, act):
        super().__init__()
        self.conv, self.bn, self.act = conv, nn.BatchNorm2d(conv.out_channels), act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Inverted(nn.Module):
    def __init__(self, wide_in, wide_out, stride, expansion):
        super().__init__()
        hidden = expansion * wide_in
        expand = [ConvModule(conv(wide_in, hidden, 1), nn.ReLU6())] if expansion > 1 else []
        depthwise = ConvModule(conv(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6())
        self.conv = nn.Sequential(*expand, depthwise, ConvModule(conv(hidden, wide_out, 1), nn.Identity()))
        self.skip = stride == 1 and wide_in == wide_out

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNetV2Backbone(nn.Module):
    WIDTHS = (32, 16, 24, 32, 64, 96, 160, 320)
    REPEATS = (1, 2, 3, 4, 3, 3, 1)
    STRIDES = (1, 2, 2, 2, 1, 2, 1)

    def __init__(self):
        super().__init__()
        self.conv1 = ConvModule(conv(3, 32, 3, 2), nn.ReLU6())
        for i, (repeats, stride) in enumerate(zip(self.REPEATS, self.STRIDES, strict=True)):
            wide_in, wide_out = self.WIDTHS[i : i + 2]
            expansion = 6 if i else 1
            rest = (Inverted(wide_out, wide_out, 1, expansion) for _ in range(repeats - 1))
            setattr(self, f"layer{i + 1}", nn.Sequential(Inverted(wide_in, wide_out, stride, expansion), *rest))
        self.conv2 = ConvModule(conv(320, 1280, 1), nn.ReLU6())

    def forward(self, x):
        x = self.conv1(x)
        for i in range(1, 8):
            x = getattr(self, f"layer{i}")(x)
        return self.conv2(x)


class Classifier(nn.Module):
    """MMClassification's wrapper: backbone, global average, head."""

    def __init__(self, backbone, width, num_classes):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Module()
        self.head.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head.fc(self.backbone(x).mean((2, 3)))


V1_TAPS = {"stage1": "model.3", "stage2": "model.5", "stage3": "model.11", "stage4": "model.13"}
V1_MM_TAPS = {
    **{tap: f"backbone.{module}" for tap, module in V1_TAPS.items() if tap != "stage4"},
    "stage4": "backbone.s4.1",
}
V2_TAPS = {"stage1": "features.3", "stage2": "features.6", "stage3": "features.13", "stage4": "features.18"}
V2_TIMM_TAPS = {"stage1": "blocks.1", "stage2": "blocks.2", "stage3": "blocks.4", "stage4": "bn2"}
V2_MM_TAPS = {
    "stage1": "backbone.layer2",
    "stage2": "backbone.layer3",
    "stage3": "backbone.layer5",
    "stage4": "backbone.conv2",
}


@pytest.mark.parametrize("style", ["mdistiller", "mmclassification"])
def test_mobilenetv1_outputs(style):
    if style == "mdistiller":
        net, taps, sizes = MobileNetV1(7), V1_TAPS, SIZES
    else:
        net, taps, sizes = Classifier(MobileNetV1Backbone(), 1024, 7), V1_MM_TAPS, SIZES[1:]
    harness.check_outputs("mobilenetv1", net, taps, sizes=sizes, style=style, num_classes=7)


@pytest.mark.parametrize("style", ["torchvision", "timm", "mmclassification"])
def test_mobilenetv2_outputs(style):
    if style == "torchvision":
        net, taps, sizes = torchvision.models.mobilenet_v2(num_classes=7), V2_TAPS, SIZES
    elif style == "timm":
        net, taps, sizes = timm.create_model("mobilenetv2_100", num_classes=7), V2_TIMM_TAPS, SIZES[1:]
    else:
        net, taps, sizes = Classifier(MobileNetV2Backbone(), 1280, 7), V2_MM_TAPS, SIZES[1:]
    harness.check_outputs("mobilenetv2", net, taps, sizes=sizes, style=style, num_classes=7)


# Gradients of depthwise convolutions in float64 are slow, and further or wider units are the same again: for these two
# tests the networks are made small, on both sides.


def test_mobilenetv1_training(monkeypatch):
    units = ((64, 1), (128, 2), (128, 1), (256, 2))
    parts = {"stage1": range(2), "stage2": range(2, 3), "stage3": range(3, 4), "stage4": range(4, 5)}
    monkeypatch.setattr(mobilenetv1, "UNITS", units)
    monkeypatch.setattr(mobilenetv1, "PARTS", parts)
    harness.check_training("mobilenetv1", MobileNetV1(7, units), size=(32, 24), num_classes=7)


def test_mobilenetv2_training(monkeypatch):
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2), (6, 48, 1, 2))
    parts = {"stage1": range(4), "stage2": range(4, 5), "stage3": range(5, 6), "stage4": range(6, 7)}
    monkeypatch.setattr(mobilenetv2, "STAGES", stages)
    monkeypatch.setattr(mobilenetv2, "PARTS", parts)
    net = torchvision.models.MobileNetV2(7, inverted_residual_setting=stages, dropout=0.0)
    harness.check_training("mobilenetv2", net, size=(32, 24), num_classes=7, dropout_rate=0.0)
