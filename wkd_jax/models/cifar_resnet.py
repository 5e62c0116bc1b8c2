"""ResNets for small images (CIFAR-100's 32 x 32), as distillation papers use them: resnet8 to resnet110, resnet8x4, ...

The family of He et al. (arXiv 1512.03385, section 4.2) with 1 x 1 convolutions as shortcuts, in the widths and names
of RepDistiller and mdistiller. Module names follow theirs (conv1, bn1, layer1/0/conv1, ..., fc), so that their weights
map by path.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.layers import BatchNorm, Conv, Linear, he_fan_out
from wkd_jax.types import Array, ModelInfo, Outputs, Tap


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
}


class BasicBlock(nnx.Module):
    """ReLU(bn2(conv2(ReLU(bn1(conv1(x))))) + shortcut(x)); the shortcut is a 1 x 1 convolution where shapes change."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int,
        dtype: Any,
        norm_group_size: int | None,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(Conv, use_bias=False, kernel_init=he_fan_out, dtype=dtype, rngs=rngs)
        norm = functools.partial(BatchNorm, features, group_size=norm_group_size)
        self.conv1 = conv(in_features, features, 3, stride=stride, padding=1)
        self.bn1 = norm()
        self.conv2 = conv(features, features, 3, padding=1)
        self.bn2 = norm()
        changes_shape = stride != 1 or in_features != features
        self.downsample = nnx.List([conv(in_features, features, 1, stride=stride), norm()]) if changes_shape else None

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / stride), ceil(W / stride), features]."""
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.conv2(y), train=train)
        if self.downsample is not None:
            conv, norm = self.downsample
            x = norm(conv(x), train=train)
        return nnx.relu(y + x)


class CifarResNet(nnx.Module):
    """A network of `SPECS` for [B, H, W, 3] images of any size; a `wkd_jax.types.Model`.

    Taps, all after a ReLU: "stem" and "stage1" at the image's size, "stage2" at half of it, "stage3" at a quarter
    (rounded up). Taps have the compute dtype; `pooled` and `logits` are float32.

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
        self.name = name
        self.num_classes = num_classes
        self.dtype = dtype
        settings = {"dtype": dtype, "norm_group_size": norm_group_size, "rngs": rngs}
        spec = SPECS[name]

        stem, *widths = spec.widths
        self.conv1 = Conv(3, stem, 3, padding=1, use_bias=False, kernel_init=he_fan_out, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(stem, group_size=norm_group_size)
        self.layer1 = _stage(stem, widths[0], spec.blocks, stride=1, **settings)
        self.layer2 = _stage(widths[0], widths[1], spec.blocks, stride=2, **settings)
        self.layer3 = _stage(widths[1], widths[2], spec.blocks, stride=2, **settings)
        self.fc = Linear(widths[2], num_classes, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        widths = SPECS[self.name].widths
        strides = {"stem": 1, "stage1": 1, "stage2": 2, "stage3": 4}
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={tap: Tap(width, stride) for (tap, stride), width in zip(strides.items(), widths, strict=True)},
            pooled=widths[-1],
            classifier="fc/kernel",
        )

    def __call__(self, image: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Outputs:
        """Runs the whole network on [B, H, W, 3] normalised images. Nothing in it is random: `rngs` is not used."""
        del rngs
        return self._run(image, self.info.taps, train=train)

    def forward_from(self, tap: str, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Outputs:
        """Continues from `x` in the place of the feature named `tap`; the outputs hold the taps after it.

        Raises:
          ValueError: If there is no such tap.
        """
        del rngs
        taps = list(self.info.taps)
        if tap not in taps:
            raise ValueError(registry.unknown(f"tap of {self.name}", tap, taps))
        return self._run(x, taps[taps.index(tap) + 1 :], train=train)

    def _run(self, x: Array, parts: Iterable[str], *, train: bool) -> Outputs:
        """The named parts, each ending in the tap of its name, then the head."""
        x = x.astype(self.dtype)
        taps = {}
        for part in parts:
            x = taps[part] = self._part(part, x, train=train)
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return Outputs(logits=self.fc(pooled), taps=taps, pooled=pooled)

    def _part(self, name: str, x: Array, *, train: bool) -> Array:
        if name == "stem":
            return nnx.relu(self.bn1(self.conv1(x), train=train))
        for block in {"stage1": self.layer1, "stage2": self.layer2, "stage3": self.layer3}[name]:
            x = block(x, train=train)
        return x


def _stage(in_features: int, features: int, blocks: int, *, stride: int, **settings: Any) -> nnx.List:
    """Blocks of one width; the first carries the stride."""
    first = BasicBlock(in_features, features, stride=stride, **settings)
    return nnx.List([first, *(BasicBlock(features, features, stride=1, **settings) for _ in range(blocks - 1))])


def _build(
    name: str, num_classes: int, *, dtype: Any = jnp.float32, norm_group_size: int | None = None, rngs: nnx.Rngs
) -> CifarResNet:
    # A function, since the signature of an nnx class is (*args, **kwargs) and configs are checked against signatures.
    return CifarResNet(name, num_classes, dtype=dtype, norm_group_size=norm_group_size, rngs=rngs)


REGISTER = {name: functools.partial(_build, name) for name in SPECS}
