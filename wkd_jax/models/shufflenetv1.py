"""ShuffleNetV1 for small images (CIFAR-100's 32 x 32), as distillation papers use it: shufflenetv1.

Three groups (Zhang et al., arXiv 1707.01083), a 1 x 1 stem without pooling, as RepDistiller and mdistiller have it
("ShuffleV1"); module names follow theirs (conv1, bn1, layer1/0/conv1, ..., linear).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import BatchNorm, Conv, Linear, avg_pool, conv_norm, mean_over_positions
from wkd_jax.types import Array, ModelInfo, Tap

GROUPS = 3
WIDTHS = (24, 240, 480, 960)
BLOCKS = (4, 8, 4)
STRIDES = {"stem": 1, "stage1": 2, "stage2": 4, "stage3": 8}


def channel_shuffle(x: Array, groups: int) -> Array:
    """Deals the channels of [..., D] out: the first of each of the groups, then the second of each, ...

    Example:
      >>> channel_shuffle(jnp.arange(6), 3).tolist()
      [0, 2, 4, 1, 3, 5]
    """
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


class Unit(nnx.Module):
    """ReLU of branch(x) + x or, with stride 2, of branch(x) beside a 3 x 3 average of x.

    The branch: 1 x 1 to a quarter of its channels, shuffle, depthwise 3 x 3 with the stride, 1 x 1, a BatchNorm after
    each convolution and a ReLU after the first two. The 1 x 1 convolutions are in groups, but the one on the stem.
    """

    def __init__(
        self, in_features: int, features: int, *, stride: int, norm_group_size: int | None, settings: dict[str, Any]
    ) -> None:
        self.stride = stride
        self.groups = 1 if in_features == WIDTHS[0] else GROUPS
        features = features - in_features if stride == 2 else features
        hidden = features // 4
        self.conv1 = Conv(in_features, hidden, 1, groups=self.groups, **settings)
        self.bn1 = BatchNorm(hidden, group_size=norm_group_size)
        self.conv2 = Conv(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, **settings)
        self.bn2 = BatchNorm(hidden, group_size=norm_group_size)
        self.conv3 = Conv(hidden, features, 1, groups=GROUPS, **settings)
        self.bn3 = BatchNorm(features, group_size=norm_group_size)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), features]."""
        y = conv_norm(x, self.conv1, self.bn1, train=train, relu=True)
        y = channel_shuffle(y, self.groups)
        y = conv_norm(y, self.conv2, self.bn2, train=train, relu=True)
        y = conv_norm(y, self.conv3, self.bn3, train=train)
        if self.stride == 2:
            return nnx.relu(jnp.concatenate([y, avg_pool(x, 3, stride=2, padding=1)], axis=-1))
        return nnx.relu(y + x)


class ShuffleNetV1(Staged):
    """The network for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps, all after a ReLU: "stem" at the image's size, "stage1" to "stage3" at a half to an eighth of it (rounded up).

    Args:
      name: The registered name.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      rngs: Source of the initial values, torch's defaults.

    Example:
      >>> def run(image):
      ...     return ShuffleNetV1("shufflenetv1", 100, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 32, 32, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage3"].shape
      ((2, 100), (2, 4, 4, 960))
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
            first = Unit(in_features, features, stride=2, **both)
            return nnx.List([first, *(Unit(features, features, stride=1, **both) for _ in range(blocks - 1))])

        self.conv1 = Conv(3, WIDTHS[0], 1, **settings)
        self.bn1 = BatchNorm(WIDTHS[0], group_size=norm_group_size)
        self.layer1 = stage(WIDTHS[0], WIDTHS[1], BLOCKS[0])
        self.layer2 = stage(WIDTHS[1], WIDTHS[2], BLOCKS[1])
        self.layer3 = stage(WIDTHS[2], WIDTHS[3], BLOCKS[2])
        self.linear = Linear(WIDTHS[3], num_classes, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        strides_widths = zip(STRIDES.items(), WIDTHS, strict=True)
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={tap: Tap(width, stride) for (tap, stride), width in strides_widths},
            pooled=WIDTHS[-1],
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
        del train, rngs
        pooled = mean_over_positions(x)
        return x, pooled, self.linear(pooled)


REGISTER = factories(ShuffleNetV1, ["shufflenetv1"])
