"""MobileNetV2 for small images (CIFAR-100's 32 x 32), as distillation papers use it: cifar_mobilenetv2.

Half the width of Sandler et al. (arXiv 1801.04381), three strides of 2 after the stem's instead of four, ReLU instead
of ReLU6, as RepDistiller and mdistiller have it ("mobile_half"). Module names follow theirs (conv1/0,
blocks/0/0/conv/0, ..., conv2/0, classifier/0).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import Conv, ConvNorms, Linear, he_fan_out, mean_over_positions
from wkd_jax.types import Array, ModelInfo, Tap

STEM, HEAD = 16, 1280
# (expansion, channels, blocks, stride of the first).
STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
PARTS = {"stage1": range(2), "stage2": range(2, 3), "stage3": range(3, 5), "stage4": range(5, 7)}  # of STAGES
STRIDES = {"stage1": 2, "stage2": 4, "stage3": 8, "stage4": 16}


class InvertedResidual(nnx.Module):
    """1 x 1 to `expansion` times the channels (even if that is 1), depthwise 3 x 3 with the stride, 1 x 1.

    A BatchNorm follows each and a ReLU the first two. The input is added where shapes agree.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        expansion: int,
        stride: int,
        norm_group_size: int | None,
        settings: dict[str, Any],
    ) -> None:
        hidden = expansion * in_features
        self.residual = stride == 1 and in_features == features
        self.conv = ConvNorms(
            [
                Conv(in_features, hidden, 1, **settings),
                Conv(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, **settings),
                Conv(hidden, features, 1, **settings),
            ],
            norm_group_size=norm_group_size,
        )

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), features]."""
        y = self.conv(x, train=train, last_relu=False)
        return x + y if self.residual else y


class CifarMobileNetV2(Staged):
    """The network for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps: "stem", after a ReLU, and "stage1" at half the image's size, "stage2" to "stage4" at a quarter to a sixteenth
    (rounded up). The stages are sums or outputs of linear bottlenecks, of either sign.

    Args:
      name: The registered name.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      rngs: Source of the initial values: He fan-out for convolutions (the channels of a depthwise one count as its
        fan-out), N(0, 0.01) for the classifier, its bias 0.

    Example:
      >>> def run(image):
      ...     return CifarMobileNetV2("cifar_mobilenetv2", 100, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 32, 32, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage4"].shape
      ((2, 100), (2, 2, 2, 160))
    """

    IMAGE_SIZE: ClassVar[tuple[int, int]] = (32, 32)
    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {"mdistiller": KeyStyle()}

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        dtype: Any = jnp.float32,
        norm_group_size: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(name, num_classes, dtype)
        settings = {"use_bias": False, "kernel_init": he_fan_out, "dtype": dtype, "rngs": rngs}

        def stage(in_features: int, expansion: int, features: int, blocks: int, stride: int) -> nnx.List:
            def block(in_features: int, stride: int) -> InvertedResidual:
                return InvertedResidual(
                    in_features,
                    features,
                    expansion=expansion,
                    stride=stride,
                    norm_group_size=norm_group_size,
                    settings=settings,
                )

            return nnx.List([block(in_features, stride), *(block(features, 1) for _ in range(blocks - 1))])

        before = (STEM, *(features for _, features, _, _ in STAGES))
        stem, head = Conv(3, STEM, 3, stride=2, padding=1, **settings), Conv(before[-1], HEAD, 1, **settings)
        self.conv1 = ConvNorms([stem], norm_group_size=norm_group_size)
        self.blocks = nnx.List([stage(width, *spec) for width, spec in zip(before, STAGES, strict=False)])
        self.conv2 = ConvNorms([head], norm_group_size=norm_group_size)
        normal, zeros = jax.nn.initializers.normal(0.01), jax.nn.initializers.zeros
        self.classifier = nnx.List([Linear(HEAD, num_classes, kernel_init=normal, bias_init=zeros, rngs=rngs)])

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        stages = {tap: Tap(STAGES[PARTS[tap][-1]][1], stride, signed=True) for tap, stride in STRIDES.items()}
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={"stem": Tap(STEM, 2), **stages},
            pooled=HEAD,
            classifier="classifier/0/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        del rngs
        if name == "stem":
            return self.conv1(x, train=train)
        for index in PARTS[name]:
            for block in self.blocks[index]:
                x = block(x, train=train)
        return x

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del rngs
        x = self.conv2(x, train=train)
        pooled = mean_over_positions(x)
        return x, pooled, self.classifier[0](pooled)


REGISTER = factories(CifarMobileNetV2, ["cifar_mobilenetv2"])
