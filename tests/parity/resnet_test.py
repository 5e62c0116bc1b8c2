"""ResNets against torchvision's."""

import harness
import pytest
import torchvision


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_outputs(name):
    taps = {**{f"stage{i}": f"layer{i}" for i in (1, 2, 3, 4)}, "stem": lambda outputs: outputs["bn1"].relu()}
    net = getattr(torchvision.models, name)(num_classes=7)
    harness.check_outputs(name, net, taps, sizes=[(64, 64), (33, 70)], num_classes=7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training(name):
    harness.check_training(name, getattr(torchvision.models, name)(num_classes=7), size=(64, 48), num_classes=7)


def test_training_in_float32():
    net = torchvision.models.resnet18(num_classes=7)
    harness.check_training("resnet18", net, size=(64, 48), num_classes=7, dtype="float32", rtol=1e-3)
