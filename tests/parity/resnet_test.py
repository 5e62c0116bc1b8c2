"""ResNets against torchvision's."""

import harness
import pytest
import torchvision

TAPS = {**{f"stage{i}": f"layer{i}" for i in (1, 2, 3, 4)}, "stem": lambda outputs: outputs["bn1"].relu()}


# Of the bottleneck networks rounding alone moves settled features by 4e-4: settled they are compared in float64.
@pytest.mark.parametrize(
    ("name", "settled"), [("resnet18", True), ("resnet34", True), ("resnet50", False), ("resnet101", False)]
)
def test_outputs(name, settled):
    net = getattr(torchvision.models, name)(num_classes=7)
    harness.check_outputs(name, net, TAPS, sizes=[(64, 64), (37, 70)], settled=settled, num_classes=7)


def test_outputs_in_float64():
    net = torchvision.models.resnet50(num_classes=7)
    harness.check_outputs("resnet50", net, TAPS, sizes=[(37, 70)], dtype="float64", atol=1e-9, num_classes=7)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_training(name):
    harness.check_training(name, getattr(torchvision.models, name)(num_classes=7), size=(64, 48), num_classes=7)


def test_training_in_float32():
    net = torchvision.models.resnet18(num_classes=7)
    harness.check_training("resnet18", net, size=(64, 48), num_classes=7, dtype="float32", rtol=1e-3)
