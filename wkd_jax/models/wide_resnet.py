"""Wide ResNets for small images (CIFAR-100's 32 x 32): wrn_16_1, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2.

The networks of Zagoruyko and Komodakis (arXiv 1605.07146), with BatchNorm and ReLU before the convolutions, in the
names of RepDistiller and mdistiller, whose module names they follow (conv1, block1/layer/0/bn1, ..., bn1, fc).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
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
)
from wkd_jax.types import Array, ModelInfo, Tap

STEM = 16
STRIDES = {"stem": 1, "stage1": 1, "stage2": 2, "stage3": 4}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network of the family.

    Attributes:
      blocks: Residual blocks in each of the three stages; the depth, first in a network's name, is 6 * blocks + 4.
      widening: Factor of the widths 16, 32 and 64 of the stages, second in the name.
    """

    blocks: int
    widening: int

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of the stem and of the stages."""
        return (STEM, 16 * self.widening, 32 * self.widening, 64 * self.widening)


SPECS = {
    "wrn_16_1": Spec(2, 1),
    "wrn_16_2": Spec(2, 2),
    "wrn_28_10": Spec(4, 10),
    "wrn_40_1": Spec(6, 1),
    "wrn_40_2": Spec(6, 2),
}


class Block(nnx.Module):
    """x + conv2(dropout(ReLU(bn2(conv1(a))))) with a = ReLU(bn1(x)).

    Where channels change, a 1 x 1 convolution of a, not of x, takes the place of the first x.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int,
        dropout_rate: float,
        norm_group_size: int | None,
        settings: dict[str, Any],
    ) -> None:
        self.dropout_rate = dropout_rate
        self.bn1 = BatchNorm(in_features, group_size=norm_group_size)
        self.conv1 = Conv(in_features, features, 3, stride=stride, padding=1, **settings)
        self.bn2 = BatchNorm(features, group_size=norm_group_size)
        self.conv2 = Conv(features, features, 3, padding=1, **settings)
        self.convShortcut = (
            None if in_features == features else Conv(in_features, features, 1, stride=stride, **settings)
        )

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), features]."""
        a = self.bn1(x, train=train, relu=True)
        y = conv_norm(a, self.conv1, self.bn2, train=train, relu=True)
        y = self.conv2(dropout(y, self.dropout_rate, train=train, rngs=rngs))
        return y + (x if self.convShortcut is None else self.convShortcut(a))


class WideResNet(Staged):
    """A network of `SPECS` for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps: "stem" and "stage1" at the image's size, "stage2" at half of it, "stage3" at a quarter (rounded up). All are
    of either sign: the stem's convolution, and sums of blocks before the BatchNorm and ReLU that follow.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      dropout_rate: Between the two convolutions of every block; 0.3 in the paper's experiments with dropout.
      rngs: Source of the initial values: He fan-out for convolutions, torch's default for the classifier, its bias 0.

    Raises:
      ValueError: If the family has no network of that name.

    Example:
      >>> def run(image):
      ...     return WideResNet("wrn_40_2", 100, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 32, 32, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage3"].shape
      ((2, 100), (2, 8, 8, 128))
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
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        if name not in SPECS:
            raise ValueError(registry.unknown("Wide ResNet", name, SPECS))
        super().__init__(name, num_classes, dtype)
        check_rate("dropout_rate", dropout_rate)
        settings = {"use_bias": False, "kernel_init": he_fan_out, "dtype": dtype, "rngs": rngs}

        def stage(in_features: int, features: int, *, stride: int) -> nnx.Dict:
            def block(in_features: int, stride: int) -> Block:
                return Block(
                    in_features,
                    features,
                    stride=stride,
                    dropout_rate=dropout_rate,
                    norm_group_size=norm_group_size,
                    settings=settings,
                )

            rest = (block(features, 1) for _ in range(SPECS[name].blocks - 1))
            return nnx.Dict(layer=nnx.List([block(in_features, stride), *rest]))

        widths = SPECS[name].widths
        self.conv1 = Conv(3, STEM, 3, padding=1, **settings)
        self.block1 = stage(widths[0], widths[1], stride=1)
        self.block2 = stage(widths[1], widths[2], stride=2)
        self.block3 = stage(widths[2], widths[3], stride=2)
        self.bn1 = BatchNorm(widths[3], group_size=norm_group_size)
        self.fc = Linear(widths[3], num_classes, bias_init=jax.nn.initializers.zeros, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        widths = SPECS[self.name].widths
        strides_widths = zip(STRIDES.items(), widths, strict=True)
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={tap: Tap(width, stride, signed=True) for (tap, stride), width in strides_widths},
            pooled=widths[-1],
            classifier="fc/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        if name == "stem":
            return self.conv1(x)
        for block in {"stage1": self.block1, "stage2": self.block2, "stage3": self.block3}[name].layer:
            x = block(x, train=train, rngs=rngs)
        return x

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del rngs
        x = self.bn1(x, train=train, relu=True)
        pooled = mean_over_positions(x)
        return x, pooled, self.fc(pooled)


REGISTER = factories(WideResNet, SPECS)
