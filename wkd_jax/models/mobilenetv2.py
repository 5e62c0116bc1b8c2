"""MobileNetV2 for ImageNet (Sandler et al., arXiv 1801.04381), as torchvision and timm have it: mobilenetv2.

Width 1. Module names follow torchvision's (features/0/0, features/1/conv/0/0, ..., classifier/1).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import (
    BatchNorm,
    Conv,
    Linear,
    check_rate,
    conv_norm,
    dropout,
    he_fan_out,
    mean_over_positions,
    uniform_fan_in,
)
from wkd_jax.types import Array, ModelInfo, Tap

STEM, HEAD = 32, 1280
# (expansion, channels, blocks, stride of the first).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# The entries of `MobileNetV2.features` before each tap: the stem is 0, the blocks are 1 to 17, the head 18.
PARTS = {"stage1": range(4), "stage2": range(4, 7), "stage3": range(7, 14), "stage4": range(14, 19)}
TAPS = {
    "stage1": Tap(24, 4, signed=True),
    "stage2": Tap(32, 8, signed=True),
    "stage3": Tap(96, 16, signed=True),
    "stage4": Tap(HEAD, 32),
}


class ConvNorm(nnx.List):
    """[convolution, BatchNorm], then ReLU6."""

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, D]."""
        conv, norm = self
        return nnx.relu6(conv_norm(x, conv, norm, train=train))


class InvertedResidual(nnx.Module):
    """1 x 1 to `expansion` times the channels, depthwise 3 x 3 with the stride, 1 x 1 without an activation.

    A BatchNorm follows each; without expansion the first is left out. The input is added where shapes agree.
    """

    def __init__(self, in_features: int, features: int, *, expansion: int, stride: int, conv: Any, norm: Any) -> None:
        hidden = expansion * in_features
        self.residual = stride == 1 and in_features == features
        self.conv = nnx.List(
            [
                *([ConvNorm([conv(in_features, hidden, 1), norm(hidden)])] if expansion > 1 else []),
                ConvNorm([conv(hidden, hidden, 3, stride=stride, groups=hidden), norm(hidden)]),
                conv(hidden, features, 1),
                norm(features),
            ]
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), features]."""
        *activated, project, norm = self.conv
        y = x
        for layer in activated:
            y = layer(y, train=train)
        y = conv_norm(y, project, norm, train=train)
        return x + y if self.residual else y


def body(conv: Any, norm: Any) -> list[nnx.Module]:
    """The stem and the blocks, of `conv(in_features, features, size, *, stride, groups)` and `norm(features)`."""
    modules: list[nnx.Module] = [ConvNorm([conv(3, STEM, 3, stride=2), norm(STEM)])]
    width = STEM
    for expansion, features, repeats, stride in STAGES:
        for position in range(repeats):
            settings = {"expansion": expansion, "stride": 1 if position else stride, "conv": conv, "norm": norm}
            modules.append(InvertedResidual(width, features, **settings))
            width = features
    return modules


def _rules(names: Mapping[str, str], within: str = "") -> tuple[tuple[str, str], ...]:
    """Rewritings of names before a dot, after what the expression `within` matches."""
    return tuple((rf"^({within}){re.escape(ours)}\.", rf"\g<1>{theirs}.") for ours, theirs in names.items())


# (entry of `features`, stage from 0, position in it) of the blocks.
_PLACES = [
    (index, *place)
    for index, place in enumerate(((s, p) for s, (_, _, blocks, _) in enumerate(STAGES) for p in range(blocks)), 1)
]
# In both styles the first block, which has no expansion, is written before the rules of the others see it.
_TIMM = (
    *_rules({f"features.{index}.conv": f"blocks.{stage}.{position}" for index, stage, position in _PLACES}),
    *_rules({"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}, r"blocks\.0\.0\."),
    *_rules({"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}, r"blocks\.\d\.\d\."),
    *_rules({"2": "conv_pwl", "3": "bn3"}, r"blocks\.\d\.\d\."),
    *_rules({"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2"}),
    *_rules({"classifier.1": "classifier"}),
)
_MMCLASSIFICATION = (
    *_rules({f"features.{index}.conv": f"layer{stage + 1}.{position}.conv" for index, stage, position in _PLACES}),
    *_rules({"1": "1.conv", "2": "1.bn"}, r"layer1\.0\.conv\."),
    *_rules({"2": "2.conv", "3": "2.bn"}, r"layer\d\.\d\.conv\."),
    *_rules({"0": "conv", "1": "bn"}, r"layer\d\.\d\.conv\.[01]\."),
    *_rules({"features.0.0": "conv1.conv", "features.0.1": "conv1.bn"}),
    *_rules({"features.18.0": "conv2.conv", "features.18.1": "conv2.bn"}),
    (r"^(?!classifier\.)", "backbone."),
    *_rules({"classifier.1": "head.fc"}),
)


class MobileNetV2(Staged):
    """The network for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps are those of OFA-KD: "stage1" to "stage3" are sums or outputs of linear bottlenecks, of either sign, at a
    quarter, an eighth and a sixteenth of the image's size (rounded up); "stage4", at a thirty-second, is the head
    convolution after its ReLU6. `pooled` is taken before dropout.

    Args:
      name: The registered name.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      dropout_rate: Before the classifier; torchvision's, while timm has 0.
      timm_init: Start as timm does: depthwise convolutions from N(0, sqrt(2 / 9)), the classifier from
        U(-1 / sqrt(C), 1 / sqrt(C)) for C classes.
      rngs: Source of the initial values: He fan-out for convolutions (the channels of a depthwise one count as its
        fan-out), N(0, 0.01) for the classifier, its bias 0.

    Example:
      >>> def run(image):
      ...     return MobileNetV2("mobilenetv2", 1000, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 224, 224, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage1"].shape, outputs.taps["stage4"].shape
      ((2, 1000), (2, 56, 56, 24), (2, 7, 7, 1280))
    """

    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {
        "torchvision": KeyStyle(),
        "timm": KeyStyle(_TIMM),
        "mmclassification": KeyStyle(_MMCLASSIFICATION),
    }

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        dtype: Any = jnp.float32,
        norm_group_size: int | None = None,
        dropout_rate: float = 0.2,
        timm_init: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(name, num_classes, dtype)
        check_rate("dropout_rate", dropout_rate)
        self.dropout_rate = dropout_rate

        def conv(in_features: int, features: int, size: int, *, stride: int = 1, groups: int = 1) -> Conv:
            of_one_channel = jax.nn.initializers.normal(math.sqrt(2 / size**2))
            kernel_init = of_one_channel if timm_init and groups > 1 else he_fan_out
            settings = {"kernel_init": kernel_init, "use_bias": False, "dtype": dtype, "rngs": rngs}
            return Conv(in_features, features, size, stride=stride, padding=size // 2, groups=groups, **settings)

        norm = functools.partial(BatchNorm, group_size=norm_group_size)
        self.features = nnx.List([*body(conv, norm), ConvNorm([conv(STAGES[-1][1], HEAD, 1), norm(HEAD)])])
        kernel_init = uniform_fan_in(num_classes) if timm_init else jax.nn.initializers.normal(0.01)
        zeros = jax.nn.initializers.zeros
        # Entry 0 of torchvision's classifier is its dropout.
        self.classifier = nnx.Dict(
            {"1": Linear(HEAD, num_classes, kernel_init=kernel_init, bias_init=zeros, rngs=rngs)}
        )

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps=TAPS,
            pooled=HEAD,
            classifier="classifier/1/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        del rngs
        for index in PARTS[name]:
            x = self.features[index](x, train=train)
        return x

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        pooled = mean_over_positions(x)
        return x, pooled, self.classifier["1"](dropout(pooled, self.dropout_rate, train=train, rngs=rngs))


REGISTER = factories(MobileNetV2, ["mobilenetv2"])
