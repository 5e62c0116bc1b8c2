"""Parameters and multiply-adds of the networks against the published figures."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import cost
from wkd_jax.models.layers import Conv

# network: (parameters with 1000 classes, with 100, G multiply-adds at the family's image size, attention's included).
PUBLISHED = {
    "resnet18": (11_689_512, 11_227_812, 1.814),
    "resnet34": (21_797_672, 21_335_972, 3.664),
    "resnet50": (25_557_032, 23_712_932, 4.089),
    "resnet101": (44_549_160, 42_705_060, 7.801),
    "mobilenetv1": (4_231_976, None, 0.5687),
    "mobilenetv2": (3_504_872, 2_351_972, 0.3008),
    "vit_small_patch16_224": (22_050_664, 21_704_164, 4.599),
    "deit_tiny_patch16_224": (5_717_416, 5_543_716, 1.254),
    "swin_tiny_patch4_window7_224": (28_288_354, 27_596_254, 4.491),
    "swin_pico_patch4_window7_224": (5_506_996, 5_160_496, 0.7999),
    "convnext_tiny": (28_589_128, 27_897_028, 4.456),
    "resnet8x4": (None, 1_233_540, 0.1771),
    "resnet32x4": (None, 7_433_860, 1.0830),
    "wrn_40_2": (None, 2_255_156, 0.3276),
    "shufflenetv1": (None, 949_258, 0.0387),
}


def build(name, num_classes):
    return nnx.eval_shape(lambda: registry.get("models", name)(num_classes, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    thousand, hundred, giga = PUBLISHED[name]
    for classes, count in ((1000, thousand), (100, hundred)):
        if count:
            assert cost.parameters(build(name, classes)) == count
    model = build(name, 1000 if thousand else 100)
    digits = len(str(giga).split(".")[1])
    assert round(cost.macs(model, type(model).IMAGE_SIZE) / 1e9, digits) == pytest.approx(giga, abs=1.01 * 10**-digits)


def test_macs_of_one_layer():
    """Grouped convolution and matrix product, by hand; a program within a program is counted too."""

    conv = Conv(4, 6, 3, padding=1, groups=2, use_bias=False, rngs=nnx.Rngs(0))
    program = jax.make_jaxpr(jax.jit(lambda x: conv(x)))(jnp.zeros((1, 5, 7, 4)))
    assert sum(cost._macs(e) for e in cost._equations(program.jaxpr)) == 5 * 7 * 6 * 2 * 9
    program = jax.make_jaxpr(lambda a, b: jnp.einsum("bnd,bmd->bnm", a, b))(jnp.zeros((2, 3, 4)), jnp.zeros((2, 5, 4)))
    assert sum(cost._macs(e) for e in cost._equations(program.jaxpr)) == 2 * 3 * 5 * 4
