"""The classification networks as trunks of a detector: four maps at strides 4 to 32, with fixed normalisation.

Module names are those of the classification networks, so that their ImageNet weights fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from flax import nnx

from wkd_jax.models import mobilenetv2, resnet
from wkd_jax.models.functional import Fixed
from wkd_jax.models.layers import BatchNorm, Conv, conv_norm, he_fan_out, max_pool
from wkd_jax.types import Array

STRIDES = (4, 8, 16, 32)


class ResNetTrunk(nnx.Module):
    """The stem and the four stages of a ResNet.

    BatchNorm is a fixed scale and shift: its statistics and parameters are carried along and never trained.

    Attributes:
      early_stride: Where its bottlenecks have their stride, see below; None if it has none.

    Args:
      name: Key of `resnet.SPECS`.
      early_stride: Whether a bottleneck's first 1 x 1 convolution has its stride, as in detectron2's networks; else the
        3 x 3 one has it.
      freeze_at: Stages that are not trained: 0 none, 1 the stem, 2 the stem and the first stage, ...
      norm_eps: Added to the variances.
      dtype: Compute dtype; parameters stay float32.
      rngs: Source of the initial values.
    """

    def __init__(
        self, name: str, *, early_stride: bool, freeze_at: int, norm_eps: float, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        spec = resnet.SPECS[name]
        self.channels = tuple(spec.block.EXPANSION * width for width in resnet.WIDTHS)
        settings: dict[str, Any] = {"dtype": dtype, "norm_group_size": None, "rngs": rngs}
        self.early_stride = early_stride if spec.block is resnet.Bottleneck else None
        if self.early_stride is not None:
            settings["early_stride"] = early_stride
        first, *others = resnet.WIDTHS
        self.conv1 = Conv(
            3, first, 7, stride=2, padding=3, use_bias=False, kernel_init=he_fan_out, dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(first)
        self.layer1 = resnet.stage(spec.block, first, first, spec.depths[0], stride=1, **settings)
        for number, (width, depth) in enumerate(zip(others, spec.depths[1:], strict=True), 2):
            stage = resnet.stage(spec.block, self.channels[number - 2], width, depth, stride=2, **settings)
            setattr(self, f"layer{number}", stage)
        parts = [nnx.List([self.conv1, self.bn1]), self.layer1, self.layer2, self.layer3, self.layer4]
        _fix(parts, freeze_at, norm_eps)

    def __call__(self, x: Array, *, remat: bool = False) -> list[Array]:
        """Maps [B, H, W, 3] to four maps [B, ceil(H / stride), ceil(W / stride), D], after a ReLU.

        With `remat` the gradient computes each stage again from the map before it.
        """

        def run(blocks: nnx.List, x: Array) -> Array:
            for block in blocks:
                x, _ = block(x, train=False)
            return x

        x = max_pool(conv_norm(x, self.conv1, self.bn1, train=False, relu=True), 3, stride=2, padding=1)
        maps = []
        for blocks in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = (nnx.remat(run) if remat else run)(blocks, x)
            maps.append(x)
        return maps


class MobileNetV2Trunk(nnx.Module):
    """MobileNetV2 up to its last block; maps are the outputs of the blocks of 24, 32, 96 and 320 channels (no ReLU6).

    Args as in `ResNetTrunk`; `freeze_at` counts the parts that end in those maps after the stem.
    """

    LAST: ClassVar[tuple[int, ...]] = (3, 6, 13, 17)  # of `features`, in each part
    early_stride: ClassVar[bool | None] = None  # see `ResNetTrunk`
    channels: ClassVar[tuple[int, ...]] = (24, 32, 96, 320)

    def __init__(self, *, freeze_at: int, norm_eps: float, dtype: Any, rngs: nnx.Rngs) -> None:
        def conv(in_features: int, features: int, size: int, *, stride: int = 1, groups: int = 1) -> Conv:
            settings = {"kernel_init": he_fan_out, "use_bias": False, "dtype": dtype, "rngs": rngs}
            return Conv(in_features, features, size, stride=stride, padding=size // 2, groups=groups, **settings)

        self.features = nnx.List(mobilenetv2.body(conv, BatchNorm))
        ends = (0, *self.LAST)
        parts = [[self.features[0]], *(self.features[a + 1 : b + 1] for a, b in itertools.pairwise(ends))]
        _fix(parts, freeze_at, norm_eps)

    def __call__(self, x: Array, *, remat: bool = False) -> list[Array]:
        """Maps [B, H, W, 3] to four maps [B, ceil(H / stride), ceil(W / stride), D]; `remat` as in `ResNetTrunk`."""

        def run(blocks: nnx.List, x: Array) -> Array:
            for block in blocks:
                x = block(x, train=False)
            return x

        maps = []
        for start, end in itertools.pairwise((-1, *self.LAST)):
            x = (nnx.remat(run) if remat else run)(nnx.List(self.features[start + 1 : end + 1]), x)
            maps.append(x)
        return maps


def _fix(parts: Sequence[Sequence[nnx.Module]], freeze_at: int, norm_eps: float) -> None:
    """Makes the normalisation of all parts, and the convolutions of the first ones, `Fixed`.

    Raises:
      ValueError: If there are fewer parts.
    """
    if not 0 <= freeze_at <= len(parts):
        raise ValueError(f"freeze_at={freeze_at}: must be from 0 (nothing) to {len(parts)} (the whole trunk)")
    for number, part in enumerate(parts):
        for _, module in itertools.chain.from_iterable(map(nnx.iter_modules, part)):
            if isinstance(module, BatchNorm):
                module.eps = norm_eps
                module.scale, module.bias = Fixed(module.scale.get_value()), Fixed(module.bias.get_value())
            elif isinstance(module, Conv) and number < freeze_at:
                module.kernel = Fixed(module.kernel.get_value())
