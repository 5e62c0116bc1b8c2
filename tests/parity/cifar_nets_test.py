"""The CIFAR networks against independent ones in PyTorch."""

import harness
import pytest
import torch
import torch_cifar_nets as nets
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import cifar_mobilenetv2, functional, shufflenetv1, shufflenetv2
from wkd_jax.weights import keys

SIZES = [(32, 32), (37, 21)]  # the second is where rounding up or down matters


def relu(module):
    return lambda outputs: outputs[module].relu()


LAYERS = {"stem": relu("bn1"), "stage1": "layer1", "stage2": "layer2", "stage3": "layer3"}
# name -> (the torch network for a number of classes, where its taps are)
CASES = {
    "cifar_mobilenetv2": (
        nets.CifarMobileNetV2,
        {"stem": "conv1", "stage1": "blocks.1", "stage2": "blocks.2", "stage3": "blocks.4", "stage4": "blocks.6"},
    ),
    "shufflenetv1": (nets.ShuffleNetV1, LAYERS),
    "shufflenetv2": (nets.ShuffleNetV2, LAYERS),
    **{
        f"wrn_{depth}_{widening}": (
            lambda classes, depth=depth, widening=widening: nets.WideResNet(depth, widening, classes),
            {"stem": "conv1", "stage1": "block1", "stage2": "block2", "stage3": "block3"},
        )
        for depth, widening in ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))
    },
    **{
        f"vgg{depth}": (
            lambda classes, depth=depth: nets.VGG(depth, classes),
            {"stem": relu("block0"), **{f"stage{i}": relu(f"block{i}") for i in (1, 2, 3, 4)}},
        )
        for depth in (8, 11, 13, 16, 19)
    },
}


@pytest.mark.parametrize(
    "name",
    ["cifar_mobilenetv2", "shufflenetv1", "shufflenetv2", "wrn_16_1", "wrn_40_2", "vgg8", "vgg13"],
)
def test_outputs(name):
    make, taps = CASES[name]
    harness.check_outputs(name, make(7), taps, sizes=SIZES, num_classes=7)


@pytest.mark.parametrize("name", CASES)
def test_arrays(name):
    """Every network of the families: keys, shapes, and so the number of parameters."""
    with torch.device("meta"):
        state = CASES[name][0](100).state_dict()
    model = nnx.eval_shape(lambda: registry.get("models", name)(100, rngs=nnx.Rngs(0)))
    _, params, variables, _ = functional.split(model)
    shapes = {key: value.shape for key, value in {**params, **variables}.items()}
    entries = keys.layout(shapes, model.KEY_STYLES["mdistiller"]).values()
    assert {entry.key: entry.shape for entry in entries} == {
        key: tuple(value.shape) for key, value in state.items() if not key.endswith(harness.BUFFERS)
    }


@pytest.mark.parametrize("name", ["wrn_16_1", "vgg8"])
def test_training(name):
    harness.check_training(name, CASES[name][0](7), size=(32, 24), num_classes=7)


# Gradients of depthwise convolutions in float64 are slow, and further or wider units are the same again: for these
# tests the networks are made small, on both sides.


def test_cifar_mobilenetv2_training(monkeypatch):
    widths, repeats = (16, 8, 12, 12, 12, 16, 16, 16), (1, 2, 1, 1, 1, 1, 1)
    stages = [
        (expansion, width, count, stride)
        for (expansion, _, _, stride), width, count in zip(cifar_mobilenetv2.STAGES, widths[1:], repeats, strict=True)
    ]
    monkeypatch.setattr(cifar_mobilenetv2, "STAGES", stages)
    net = nets.CifarMobileNetV2(7, widths, repeats)
    harness.check_training("cifar_mobilenetv2", net, size=(32, 24), num_classes=7)


def test_shufflenetv1_training(monkeypatch):
    monkeypatch.setattr(shufflenetv1, "BLOCKS", (2, 1, 1))
    harness.check_training("shufflenetv1", nets.ShuffleNetV1(7, (2, 1, 1)), size=(16, 24), num_classes=7)


def test_shufflenetv2_training(monkeypatch):
    monkeypatch.setattr(shufflenetv2, "BLOCKS", (1, 0, 0))
    harness.check_training("shufflenetv2", nets.ShuffleNetV2(7, (1, 0, 0)), size=(16, 24), num_classes=7)
