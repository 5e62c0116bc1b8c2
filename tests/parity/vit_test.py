"""ViT and DeiT against timm's."""

import harness
import pytest
import timm

from wkd_jax.models import vit

TAPS = {"stage1": "blocks.1", "stage2": "blocks.3", "stage3": "blocks.9", "stage4": "blocks.11"}


@pytest.mark.parametrize("size", [(48, 64), (80, 80)])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit_tiny_patch16_224"])
def test_outputs(name, size):
    net = timm.create_model(name, img_size=size, num_classes=7)
    harness.check_outputs(name, net, TAPS, sizes=[size], image_size=size, num_classes=7)


def test_training(monkeypatch):
    """Of a shallow one, which compiles in less time."""
    size, name = (32, 48), "deit_tiny_patch16_224"
    monkeypatch.setattr(vit, "DEPTH", 2)
    net = timm.create_model(name, img_size=size, depth=2, num_classes=7)
    harness.check_training(name, net, size=size, image_size=size, num_classes=7)
