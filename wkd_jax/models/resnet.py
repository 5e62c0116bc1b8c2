"""ResNets for ImageNet: resnet18, resnet34, resnet50, resnet101 (He et al., arXiv 1512.03385), as torchvision has them.

In the bottleneck the 3 x 3 convolution carries the stride ("v1.5"). Module names follow torchvision's (conv1, bn1,
layer1/0/conv1, ..., fc), which timm and mdistiller share.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import BatchNorm, Conv, Linear, conv_norm, he_fan_out, max_pool, mean_over_positions
from wkd_jax.types import Array, ModelInfo, Tap

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nnx.Module):
    """ReLU(bn2(conv2(ReLU(bn1(conv1(x))))) + shortcut(x)); the shortcut is a 1 x 1 convolution where shapes change."""

    EXPANSION: ClassVar[int] = 1

    def __init__(
        self, in_features: int, width: int, *, stride: int, dtype: Any, norm_group_size: int | None, rngs: nnx.Rngs
    ) -> None:
        conv, norm = _layers(dtype, norm_group_size, rngs)
        self.conv1 = conv(in_features, width, 3, stride=stride, padding=1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_features, width, stride, conv, norm)

    @property
    def last_norm(self) -> BatchNorm:
        """The normalisation before the sum."""
        return self.bn2

    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), width], also before its ReLU."""
        y = conv_norm(x, self.conv1, self.bn1, train=train, relu=True)
        y = conv_norm(y, self.conv2, self.bn2, train=train) + _apply_shortcut(self.downsample, x, train=train)
        return nnx.relu(y), y


class Bottleneck(nnx.Module):
    """ReLU(1 x 1, 3 x 3 with the stride, 1 x 1 to four times the width + shortcut(x)), a BatchNorm after each.

    `early_stride` gives the stride to the first 1 x 1 instead, as in the networks of the original paper.
    """

    EXPANSION: ClassVar[int] = 4

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        stride: int,
        dtype: Any,
        norm_group_size: int | None,
        rngs: nnx.Rngs,
        early_stride: bool = False,
    ) -> None:
        conv, norm = _layers(dtype, norm_group_size, rngs)
        features = self.EXPANSION * width
        self.conv1 = conv(in_features, width, 1, stride=stride if early_stride else 1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=1 if early_stride else stride, padding=1)
        self.bn2 = norm(width)
        self.conv3 = conv(width, features, 1)
        self.bn3 = norm(features)
        self.downsample = _shortcut(in_features, features, stride, conv, norm)

    @property
    def last_norm(self) -> BatchNorm:
        """The normalisation before the sum."""
        return self.bn3

    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), 4 * width], also before its ReLU."""
        y = conv_norm(x, self.conv1, self.bn1, train=train, relu=True)
        y = conv_norm(y, self.conv2, self.bn2, train=train, relu=True)
        y = conv_norm(y, self.conv3, self.bn3, train=train) + _apply_shortcut(self.downsample, x, train=train)
        return nnx.relu(y), y


Block = BasicBlock | Bottleneck


def stage(kind: type[Block], in_features: int, width: int, blocks: int, *, stride: int, **settings: Any) -> nnx.List:
    """Blocks of one width; the first carries the stride."""
    features = kind.EXPANSION * width
    first = kind(in_features, width, stride=stride, **settings)
    return nnx.List([first, *(kind(features, width, stride=1, **settings) for _ in range(blocks - 1))])


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network of the family.

    Attributes:
      block: Kind of its blocks.
      depths: Blocks in each of the four stages.
    """

    block: type[Block]
    depths: tuple[int, int, int, int]


SPECS = {
    "resnet18": Spec(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Spec(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Spec(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Spec(Bottleneck, (3, 4, 23, 3)),
}


class ResNet(Staged):
    """A network of `SPECS` for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps, all after a ReLU: "stem" (before the max-pool) at half the image's size, "stage1" to "stage4" at a quarter to
    a thirty-second (rounded up), whose preactivations are the sums before it.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      zero_init_residual: Start the last BatchNorm of every block at 0, as timm does and torchvision does not.
      rngs: Source of the initial values: He fan-out for convolutions, torch's default for the classifier.

    Raises:
      ValueError: If the family has no network of that name.

    Example:
      >>> def run(image):
      ...     return ResNet("resnet50", 1000, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 224, 224, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stem"].shape, outputs.taps["stage4"].shape
      ((2, 1000), (2, 112, 112, 64), (2, 7, 7, 2048))
    """

    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {
        "torchvision": KeyStyle(),
        "timm": KeyStyle(),
        "mmclassification": KeyStyle(((r"^(?!fc\.)", "backbone."), (r"^fc\.", "head.fc."))),
    }

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        dtype: Any = jnp.float32,
        norm_group_size: int | None = None,
        zero_init_residual: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if name not in SPECS:
            raise ValueError(registry.unknown("ResNet", name, SPECS))
        super().__init__(name, num_classes, dtype)
        spec = SPECS[name]
        settings = {"dtype": dtype, "norm_group_size": norm_group_size, "rngs": rngs}
        features = [spec.block.EXPANSION * width for width in WIDTHS]
        self.conv1 = Conv(
            3, WIDTHS[0], 7, stride=2, padding=3, use_bias=False, kernel_init=he_fan_out, dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(WIDTHS[0], group_size=norm_group_size)
        self.layer1 = stage(spec.block, WIDTHS[0], WIDTHS[0], spec.depths[0], stride=1, **settings)
        self.layer2 = stage(spec.block, features[0], WIDTHS[1], spec.depths[1], stride=2, **settings)
        self.layer3 = stage(spec.block, features[1], WIDTHS[2], spec.depths[2], stride=2, **settings)
        self.layer4 = stage(spec.block, features[2], WIDTHS[3], spec.depths[3], stride=2, **settings)
        self.fc = Linear(features[3], num_classes, rngs=rngs)
        if zero_init_residual:
            for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
                block.last_norm.scale.set_value(jnp.zeros_like(block.last_norm.scale[...]))

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        expansion = SPECS[self.name].block.EXPANSION
        stages = {f"stage{i + 1}": Tap(expansion * width, 4 << i, preactivation=True) for i, width in enumerate(WIDTHS)}
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={"stem": Tap(WIDTHS[0], 2), **stages},
            pooled=expansion * WIDTHS[-1],
            classifier="fc/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array | tuple[Array, Array]:
        del rngs
        if name == "stem":
            return conv_norm(x, self.conv1, self.bn1, train=train, relu=True)
        if name == "stage1":
            x = max_pool(x, 3, stride=2, padding=1)
        blocks = {"stage1": self.layer1, "stage2": self.layer2, "stage3": self.layer3, "stage4": self.layer4}[name]
        for block in blocks:
            x, before = block(x, train=train)
        return x, before

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        pooled = mean_over_positions(x)
        return x, pooled, self.fc(pooled)


def _layers(dtype: Any, norm_group_size: int | None, rngs: nnx.Rngs) -> tuple[Any, Any]:
    conv = functools.partial(Conv, use_bias=False, kernel_init=he_fan_out, dtype=dtype, rngs=rngs)
    return conv, functools.partial(BatchNorm, group_size=norm_group_size)


def _shortcut(in_features: int, features: int, stride: int, conv: Any, norm: Any) -> nnx.List | None:
    if stride == 1 and in_features == features:
        return None
    return nnx.List([conv(in_features, features, 1, stride=stride), norm(features)])


def _apply_shortcut(downsample: nnx.List | None, x: Array, *, train: bool) -> Array:
    if downsample is None:
        return x
    conv, norm = downsample
    return conv_norm(x, conv, norm, train=train)


REGISTER = factories(ResNet, SPECS)
