"""VGGs for small images (CIFAR-100's 32 x 32), as distillation papers use them: vgg8, vgg11, vgg13, vgg16, vgg19.

The convolutions of Simonyan and Zisserman (arXiv 1409.1556), each with a BatchNorm, and one linear classifier, as
RepDistiller and mdistiller have them; module names follow theirs (block0/0, ..., block4/1, classifier).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import Conv, ConvNorms, Linear, he_fan_out, max_pool, mean_over_positions
from wkd_jax.types import Array, ModelInfo, Tap

# Convolutions in each of the five blocks. The names count three linear layers on top, as the paper has; here is one.
SPECS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
TAPS = {"stem": 1, "stage1": 2, "stage2": 4, "stage3": 8, "stage4": 8}  # name -> stride


class VGG(Staged):
    """A network of `SPECS` for [B, H, W, 3] images of at least 8 x 8; a `wkd_jax.types.Model`.

    Taps, all after a ReLU: "stem" at the image's size, "stage1" to "stage3" at a half, a quarter and an eighth of it
    (rounded down), "stage4" at an eighth. mdistiller pools once more before its last block where images are 64 high;
    this does not.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      rngs: Source of the initial values: He fan-out for convolutions, N(0, 0.01) for the classifier, biases 0.

    Raises:
      ValueError: If the family has no network of that name.

    Example:
      >>> def run(image):
      ...     return VGG("vgg13", 100, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 32, 32, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage4"].shape
      ((2, 100), (2, 4, 4, 512))
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
        if name not in SPECS:
            raise ValueError(registry.unknown("VGG", name, SPECS))
        super().__init__(name, num_classes, dtype)
        zeros = jax.nn.initializers.zeros

        def block(in_features: int, features: int, depth: int) -> ConvNorms:
            settings = {"padding": 1, "kernel_init": he_fan_out, "bias_init": zeros, "dtype": dtype, "rngs": rngs}
            widths = [in_features, *[features] * (depth - 1)]
            return ConvNorms(
                [Conv(width, features, 3, **settings) for width in widths], norm_group_size=norm_group_size
            )

        depths = SPECS[name]
        self.block0 = block(3, WIDTHS[0], depths[0])
        self.block1 = block(WIDTHS[0], WIDTHS[1], depths[1])
        self.block2 = block(WIDTHS[1], WIDTHS[2], depths[2])
        self.block3 = block(WIDTHS[2], WIDTHS[3], depths[3])
        self.block4 = block(WIDTHS[3], WIDTHS[4], depths[4])
        normal = jax.nn.initializers.normal(0.01)
        self.classifier = Linear(WIDTHS[4], num_classes, kernel_init=normal, bias_init=zeros, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        strides_widths = zip(TAPS.items(), WIDTHS, strict=True)
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={tap: Tap(width, stride, rounding="down") for (tap, stride), width in strides_widths},
            pooled=WIDTHS[-1],
            classifier="classifier/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        del rngs
        if name in ("stage1", "stage2", "stage3"):
            x = max_pool(x, 2, stride=2)
        blocks = (self.block0, self.block1, self.block2, self.block3, self.block4)
        return blocks[list(TAPS).index(name)](x, train=train)

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        pooled = mean_over_positions(x)
        return x, pooled, self.classifier(pooled)


REGISTER = factories(VGG, SPECS)
