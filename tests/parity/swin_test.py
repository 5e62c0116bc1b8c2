"""Swin against torchvision's, and timm's where the two agree: at multiples of 224, where no map is padded."""

import harness
import pytest
import timm
import torch
import torchvision

from wkd_jax.models import swin

TINY, PICO = "swin_tiny_patch4_window7_224", "swin_pico_patch4_window7_224"
TORCHVISION_TAPS = {f"stage{i + 1}": f"features.{2 * i + 1}" for i in range(4)}
TIMM_TAPS = {f"stage{i + 1}": f"layers.{i}" for i in range(4)}
# (112, 84): windows are shifted in two stages, in the second on a padded map. (56, 104): in stage 2 they are shifted
# along one axis only, the other being a single window, and a map of odd size is merged.
SIZES = [(112, 84), (56, 104)]


def torchvision_swin(name, **settings):
    """torchvision's network with the sizes of ours."""
    spec = swin.SPECS[name]
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=spec.width,
        depths=[*spec.depths],
        num_heads=[*spec.heads],
        window_size=[7, 7],
        norm_layer=lambda features: torch.nn.LayerNorm(features, eps=1e-5),
        num_classes=7,
        **settings,
    )


def test_keys_of_torchvision():
    harness.ours(TINY, torchvision.models.swin_t(num_classes=7), style="torchvision")


@pytest.mark.parametrize(("name", "sizes"), [(PICO, SIZES), (TINY, SIZES[:1])])
def test_outputs_as_torchvision(name, sizes):
    harness.check_outputs(
        name,
        torchvision_swin(name),
        TORCHVISION_TAPS,
        sizes=sizes,
        style="torchvision",
        channels_last=True,
        num_classes=7,
    )


def test_outputs_as_timm():
    net = timm.create_model(TINY, num_classes=7, strict_img_size=False)
    harness.check_outputs(TINY, net, TIMM_TAPS, sizes=[(224, 224)], channels_last=True, batch=1, num_classes=7)


def test_pico_as_timm():
    size = (224, 448)
    net = timm.models.SwinTransformer(
        img_size=size, embed_dim=48, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), num_classes=7
    )
    harness.check_outputs(PICO, net, TIMM_TAPS, sizes=[size], channels_last=True, batch=1, num_classes=7)


def test_training(monkeypatch):
    """Of a small one, with shifted windows on a padded map."""
    monkeypatch.setitem(swin.SPECS, PICO, swin.Spec(24, (2, 1, 1, 1), (2, 4, 8, 16)))
    net = torchvision_swin(PICO, stochastic_depth_prob=0.0)
    harness.check_training(PICO, net, size=(56, 68), style="torchvision", drop_path_rate=0.0, num_classes=7)
