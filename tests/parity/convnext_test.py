"""ConvNeXt against timm's and torchvision's."""

import harness
import pytest
import timm
import torchvision

from wkd_jax.models import convnext

WIDTHS, DEPTHS = (8, 12, 16, 24), (1, 1, 3, 1)
TORCHVISION_TAPS = {f"stage{i + 1}": f"features.{2 * i + 1}" for i in range(4)}


@pytest.fixture
def narrow(monkeypatch):
    """On a CPU wide depthwise convolutions are slow, their gradients very much so."""
    monkeypatch.setitem(convnext.SPECS, "convnext_tiny", convnext.Spec(WIDTHS, DEPTHS))


def test_outputs_as_timm():
    taps = {f"stage{i + 1}": f"stages.{i}" for i in range(4)}
    net = timm.create_model("convnext_tiny", num_classes=7)
    harness.check_outputs("convnext_tiny", net, taps, sizes=[(43, 70), (64, 64)], num_classes=7)


def test_keys_of_torchvision():
    harness.ours("convnext_tiny", torchvision.models.convnext_tiny(num_classes=7), style="torchvision")


@pytest.mark.parametrize("size", [(64, 64), (47, 101)])
def test_outputs_as_torchvision(narrow, size):
    after = (*WIDTHS[1:], None)
    setting = [torchvision.models.convnext.CNBlockConfig(*stage) for stage in zip(WIDTHS, after, DEPTHS, strict=True)]
    net = torchvision.models.ConvNeXt(setting, num_classes=7)
    harness.check_outputs("convnext_tiny", net, TORCHVISION_TAPS, sizes=[size], style="torchvision", num_classes=7)


def test_training(narrow):
    net = timm.models.ConvNeXt(dims=WIDTHS, depths=DEPTHS, num_classes=7)
    harness.check_training("convnext_tiny", net, size=(64, 96), num_classes=7)
