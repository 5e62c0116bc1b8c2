"""ResNets for small images (CIFAR-100's 32 x 32), as distillation papers use them: resnet8 to resnet110, resnet8x4, ...

The family of He et al. (arXiv 1512.03385, section 4.2) with 1 x 1 convolutions as shortcuts, in the widths and names
of RepDistiller and mdistiller. Module names follow theirs (conv1, bn1, layer1/0/conv1, ..., fc), so that their weights
map by path.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import BatchNorm, Conv, Linear, conv_norm, he_fan_out, mean_over_positions
from wkd_jax.models.resnet import BasicBlock, stage
from wkd_jax.types import Array, ModelInfo, Tap


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network of the family.

    Attributes:
      blocks: Residual blocks in each of the three stages; the depth in a network's name is 6 * blocks + 2.
      widths: Channels of the stem and of the stages.
    """

    blocks: int
    widths: tuple[int, int, int, int]


SPECS = {
    "resnet8": Spec(1, (16, 16, 32, 64)),
    "resnet14": Spec(2, (16, 16, 32, 64)),
    "resnet20": Spec(3, (16, 16, 32, 64)),
    "resnet32": Spec(5, (16, 16, 32, 64)),
    "resnet44": Spec(7, (16, 16, 32, 64)),
    "resnet56": Spec(9, (16, 16, 32, 64)),
    "resnet110": Spec(18, (16, 16, 32, 64)),
    "resnet8x4": Spec(1, (32, 64, 128, 256)),
    "resnet32x4": Spec(5, (32, 64, 128, 256)),
    "resnet8_half": Spec(1, (8, 8, 16, 32)),  # of no paper: 20 k parameters, for experiments of many runs
}


class CifarResNet(Staged):
    """A network of `SPECS` for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps, all after a ReLU: "stem" and "stage1" at the image's size, "stage2" at half of it, "stage3" at a quarter
    (rounded up); preactivations of the stages are the sums before it. Taps have the compute dtype; `pooled` and
    `logits` are float32.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
      norm_group_size: Examples that share BatchNorm statistics in training, see `layers.BatchNorm`. None: all.
      rngs: Source of the initial values: He fan-out for convolutions, torch's default for the classifier.

    Raises:
      ValueError: If the family has no network of that name.

    Example:
      >>> def run(image):
      ...     model = CifarResNet("resnet8", 10, rngs=nnx.Rngs(0))
      ...     outputs = model(image, train=False)
      ...     return outputs, model.forward_from("stage1", outputs.taps["stage1"], train=False)
      >>> outputs, later = nnx.eval_shape(run, jnp.zeros((2, 9, 8, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage3"].shape
      ((2, 10), (2, 3, 2, 64))
      >>> list(later.taps)
      ['stage2', 'stage3']
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
            raise ValueError(registry.unknown("CIFAR ResNet", name, SPECS))
        super().__init__(name, num_classes, dtype)
        settings = {"dtype": dtype, "norm_group_size": norm_group_size, "rngs": rngs}
        spec = SPECS[name]

        stem, *widths = spec.widths
        self.conv1 = Conv(3, stem, 3, padding=1, use_bias=False, kernel_init=he_fan_out, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(stem, group_size=norm_group_size)
        self.layer1 = stage(BasicBlock, stem, widths[0], spec.blocks, stride=1, **settings)
        self.layer2 = stage(BasicBlock, widths[0], widths[1], spec.blocks, stride=2, **settings)
        self.layer3 = stage(BasicBlock, widths[1], widths[2], spec.blocks, stride=2, **settings)
        self.fc = Linear(widths[2], num_classes, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        widths = SPECS[self.name].widths
        strides = {"stem": 1, "stage1": 1, "stage2": 2, "stage3": 4}
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={
                tap: Tap(width, stride, preactivation=tap != "stem")
                for (tap, stride), width in zip(strides.items(), widths, strict=True)
            },
            pooled=widths[-1],
            classifier="fc/kernel",
            mean_pooled=True,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array | tuple[Array, Array]:
        del rngs
        if name == "stem":
            return conv_norm(x, self.conv1, self.bn1, train=train, relu=True)
        for block in {"stage1": self.layer1, "stage2": self.layer2, "stage3": self.layer3}[name]:
            x, before = block(x, train=train)
        return x, before

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        pooled = mean_over_positions(x)
        return x, pooled, self.fc(pooled)


REGISTER = factories(CifarResNet, SPECS)
