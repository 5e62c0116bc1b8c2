"""MobileNetV1 for ImageNet (Howard et al., arXiv 1704.04861), as mdistiller has it: mobilenetv1.

Width 1, ReLU (not ReLU6). Module names follow mdistiller's (model/0/0, model/1/3, ..., fc).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import Conv, ConvNorms, Linear, mean_over_positions
from wkd_jax.types import Array, ModelInfo, Tap

STEM = 32
# (channels, stride) of the depthwise-separable units.
UNITS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# The entries of `MobileNetV1.model` before each tap: the stem is 0, the first unit 1.
PARTS = {"stage1": range(4), "stage2": range(4, 6), "stage3": range(6, 12), "stage4": range(12, 14)}


class MobileNetV1(Staged):
    """The network for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    A stem with stride 2, then units of a depthwise 3 x 3 and a pointwise convolution, each with a BatchNorm and a ReLU;
    a global average (mdistiller's fixed 7 x 7 pool is that at 224 x 224) and a classifier.

    Taps, all after a ReLU: "stage1" to "stage4" at a quarter to a thirty-second of the image's size (rounded up). There
    is no "stem", as in mdistiller's `feats`.

    Args:
      name: The registered name.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      rngs: Source of the initial values, torch's defaults.

    Example:
      >>> def run(image):
      ...     return MobileNetV1("mobilenetv1", 1000, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 224, 224, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage1"].shape, outputs.taps["stage4"].shape
      ((2, 1000), (2, 56, 56, 128), (2, 7, 7, 1024))
    """

    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {
        "mdistiller": KeyStyle(),
        "mmclassification": KeyStyle(
            (
                (r"^model\.12\.", "s4.0."),
                (r"^model\.13\.", "s4.1."),
                (r"^(?!fc\.)", "backbone."),
                (r"^fc\.", "head.fc."),
            )
        ),
    }

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

        def unit(in_features: int, features: int, stride: int) -> ConvNorms:
            depthwise = Conv(in_features, in_features, 3, stride=stride, padding=1, groups=in_features, **settings)
            return ConvNorms([depthwise, Conv(in_features, features, 1, **settings)], norm_group_size=norm_group_size)

        stem = ConvNorms([Conv(3, STEM, 3, stride=2, padding=1, **settings)], norm_group_size=norm_group_size)
        before = (STEM, *(width for width, _ in UNITS))
        units = [unit(in_features, *spec) for in_features, spec in zip(before, UNITS, strict=False)]
        self.model = nnx.List([stem, *units])
        self.fc = Linear(before[-1], num_classes, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        widths = [UNITS[part[-1] - 1][0] for part in PARTS.values()]
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={
                tap: Tap(width, 4 << i, preactivation=True)
                for i, (tap, width) in enumerate(zip(PARTS, widths, strict=True))
            },
            pooled=widths[-1],
            classifier="fc/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array, Array]:
        del rngs
        *units, last = PARTS[name]
        for index in units:
            x = self.model[index](x, train=train)
        x = self.model[last](x, train=train, last_relu=False)
        return nnx.relu(x), x

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        pooled = mean_over_positions(x)
        return x, pooled, self.fc(pooled)


REGISTER = factories(MobileNetV1, ["mobilenetv1"])
