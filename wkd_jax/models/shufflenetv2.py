"""ShuffleNetV2 for small images (CIFAR-100's 32 x 32), as distillation papers use it: shufflenetv2.

Width 1 (Ma et al., arXiv 1807.11164), a 1 x 1 stem without pooling, as RepDistiller and mdistiller have it
("ShuffleV2"); module names follow theirs (conv1, bn1, layer1/0/conv1, ..., conv2, bn2, linear).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import BatchNorm, Conv, Linear, conv_norm, mean_over_positions
from wkd_jax.models.shufflenetv1 import channel_shuffle
from wkd_jax.types import Array, ModelInfo, Tap

WIDTHS = (24, 116, 232, 464)
HEAD = 1024
BLOCKS = (3, 7, 3)  # basic units, after the one that halves the size
STRIDES = {"stem": 1, "stage1": 2, "stage2": 4, "stage3": 8}


class BasicUnit(nnx.Module):
    """Half of the channels pass; the others go through 1 x 1, depthwise 3 x 3, 1 x 1; then both are shuffled together.

    A BatchNorm follows each convolution, and a ReLU the first and the last.
    """

    def __init__(self, features: int, *, norm_group_size: int | None, settings: dict[str, Any]) -> None:
        half = features // 2
        self.conv1 = Conv(half, half, 1, **settings)
        self.bn1 = BatchNorm(half, group_size=norm_group_size)
        self.conv2 = Conv(half, half, 3, padding=1, groups=half, **settings)
        self.bn2 = BatchNorm(half, group_size=norm_group_size)
        self.conv3 = Conv(half, half, 1, **settings)
        self.bn3 = BatchNorm(half, group_size=norm_group_size)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, features] to the same shape."""
        passed, y = jnp.split(x, 2, axis=-1)
        y = conv_norm(y, self.conv1, self.bn1, train=train, relu=True)
        y = conv_norm(y, self.conv2, self.bn2, train=train)
        y = conv_norm(y, self.conv3, self.bn3, train=train, relu=True)
        return channel_shuffle(jnp.concatenate([passed, y], axis=-1), 2)


class DownUnit(nnx.Module):
    """Two branches on all channels, each making half of the new ones at half the size, shuffled together.

    Left: depthwise 3 x 3 with stride 2, 1 x 1. Right: 1 x 1, depthwise 3 x 3 with stride 2, 1 x 1. A BatchNorm follows
    each convolution, and a ReLU those that are 1 x 1.
    """

    def __init__(
        self, in_features: int, features: int, *, norm_group_size: int | None, settings: dict[str, Any]
    ) -> None:
        half = features // 2
        self.conv1 = Conv(in_features, in_features, 3, stride=2, padding=1, groups=in_features, **settings)
        self.bn1 = BatchNorm(in_features, group_size=norm_group_size)
        self.conv2 = Conv(in_features, half, 1, **settings)
        self.bn2 = BatchNorm(half, group_size=norm_group_size)
        self.conv3 = Conv(in_features, half, 1, **settings)
        self.bn3 = BatchNorm(half, group_size=norm_group_size)
        self.conv4 = Conv(half, half, 3, stride=2, padding=1, groups=half, **settings)
        self.bn4 = BatchNorm(half, group_size=norm_group_size)
        self.conv5 = Conv(half, half, 1, **settings)
        self.bn5 = BatchNorm(half, group_size=norm_group_size)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / 2), ceil(W / 2), features]."""
        left = conv_norm(x, self.conv1, self.bn1, train=train)
        left = conv_norm(left, self.conv2, self.bn2, train=train, relu=True)
        right = conv_norm(x, self.conv3, self.bn3, train=train, relu=True)
        right = conv_norm(right, self.conv4, self.bn4, train=train)
        right = conv_norm(right, self.conv5, self.bn5, train=train, relu=True)
        return channel_shuffle(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleNetV2(Staged):
    """The network for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps, all after a ReLU: "stem" at the image's size, "stage1" to "stage3" at a half to an eighth of it (rounded up).
    A 1 x 1 convolution to 1024 channels lies between "stage3" and `pooled`.

    Args:
      name: The registered name.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      rngs: Source of the initial values, torch's defaults.

    Example:
      >>> def run(image):
      ...     return ShuffleNetV2("shufflenetv2", 100, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 32, 32, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage3"].shape, outputs.pooled.shape
      ((2, 100), (2, 4, 4, 464), (2, 1024))
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
        settings = {"use_bias": False, "dtype": dtype, "rngs": rngs}

        def stage(in_features: int, features: int, blocks: int) -> nnx.List:
            both = {"norm_group_size": norm_group_size, "settings": settings}
            first = DownUnit(in_features, features, **both)
            return nnx.List([first, *(BasicUnit(features, **both) for _ in range(blocks))])

        self.conv1 = Conv(3, WIDTHS[0], 1, **settings)
        self.bn1 = BatchNorm(WIDTHS[0], group_size=norm_group_size)
        self.layer1 = stage(WIDTHS[0], WIDTHS[1], BLOCKS[0])
        self.layer2 = stage(WIDTHS[1], WIDTHS[2], BLOCKS[1])
        self.layer3 = stage(WIDTHS[2], WIDTHS[3], BLOCKS[2])
        self.conv2 = Conv(WIDTHS[3], HEAD, 1, **settings)
        self.bn2 = BatchNorm(HEAD, group_size=norm_group_size)
        self.linear = Linear(HEAD, num_classes, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        strides_widths = zip(STRIDES.items(), WIDTHS, strict=True)
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={tap: Tap(width, stride) for (tap, stride), width in strides_widths},
            pooled=HEAD,
            classifier="linear/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        del rngs
        if name == "stem":
            return conv_norm(x, self.conv1, self.bn1, train=train, relu=True)
        for unit in {"stage1": self.layer1, "stage2": self.layer2, "stage3": self.layer3}[name]:
            x = unit(x, train=train)
        return x

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del rngs
        x = conv_norm(x, self.conv2, self.bn2, train=train, relu=True)
        pooled = mean_over_positions(x)
        return x, pooled, self.linear(pooled)


REGISTER = factories(ShuffleNetV2, ["shufflenetv2"])
