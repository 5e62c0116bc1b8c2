"""ConvNeXt: convnext_tiny (Liu et al., arXiv 2201.03545), in the authors' order of the head: pooling, then its norm.

Module names follow timm's (stem/0, stages/1/downsample/1, stages/0/blocks/0/conv_dw, head/fc).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import Conv, LayerNorm, dropout, mean_over_positions
from wkd_jax.models.transformer import Chain, Mlp, Stage, drop_path_rates, linear, normal_02, zeros
from wkd_jax.types import Array, ModelInfo, Tap

EPS = 1e-6
LAYER_SCALE = 1e-6


def conv(*args: Any, **settings: Any) -> Conv:
    """A convolution as this family starts it: weights N(0, 0.02), bias 0."""
    return Conv(*args, kernel_init=normal_02, bias_init=zeros, **settings)


class ConvNeXtBlock(nnx.Module):
    """x + gamma * mlp(norm(conv_dw(x))), with stochastic depth on the branch.

    Args:
      features: D.
      drop_path_rate: Of stochastic depth.
      dtype: Of the computation.
      rngs: Source of the initial values.
    """

    def __init__(self, features: int, *, drop_path_rate: float, dtype: Any, rngs: nnx.Rngs) -> None:
        self.drop_path_rate = drop_path_rate
        self.conv_dw = conv(features, features, 7, padding=3, groups=features, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(features, eps=EPS, dtype=dtype)
        self.mlp = Mlp(features, dtype=dtype, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(features, LAYER_SCALE, jnp.float32))

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Array:
        """Maps [B, H, W, D], keeping the shape."""
        y = self.gamma[...].astype(x.dtype) * self.mlp(self.norm(self.conv_dw(x)), train=train)
        return x + dropout(y, self.drop_path_rate, train=train, rngs=rngs, whole_examples=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network of the family.

    Attributes:
      widths: Channels in each of the four stages.
      depths: Blocks in each.
    """

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


SPECS = {"convnext_tiny": Spec((96, 192, 384, 768), (3, 3, 9, 3))}


class ConvNeXt(Staged):
    """A network of `SPECS` for [B, H, W, 3] images of 32 x 32 pixels or more; a `wkd_jax.types.Model`.

    Taps, all signed: "stage1" to "stage4", the ends of the stages, at a quarter to a thirty-second of the image's size
    (rounded down: nothing is padded, so that rows and columns beyond a multiple of the stride are not seen). `pooled`
    is the normalised mean of the last.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters, the last normalisation and the classifier stay float32.
      drop_path_rate: Stochastic depth at the last block; it rises evenly from 0 at the first.
      rngs: Source of the initial values: N(0, 0.02) for weights, biases 0, 1e-6 for the scales of the branches.

    Raises:
      ValueError: If the family has no network of that name or a setting is out of range. When called, if the image
        is too small.

    Example:
      >>> def run(image):
      ...     return ConvNeXt("convnext_tiny", 1000, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 224, 224, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage1"].shape, outputs.taps["stage4"].shape
      ((2, 1000), (2, 56, 56, 96), (2, 7, 7, 768))
    """

    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {
        "timm": KeyStyle(),
        "facebook": KeyStyle(
            (
                (r"^stem\.", "downsample_layers.0."),
                (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
                (r"\.blocks\.", "."),
                (r"\.conv_dw\.", ".dwconv."),
                (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
                (r"^head\.norm\.", "norm."),
                (r"^head\.fc\.", "head."),
            )
        ),
        "torchvision": KeyStyle(
            (
                (r"^stem\.", "features.0."),
                *((rf"^stages\.{s}\.downsample\.", f"features.{2 * s}.") for s in (1, 2, 3)),
                *((rf"^stages\.{s}\.blocks\.", f"features.{2 * s + 1}.") for s in (0, 1, 2, 3)),
                (r"\.conv_dw\.", ".block.0."),
                (r"^(features\.\d\.\d)\.norm\.", r"\1.block.2."),
                (r"\.mlp\.fc1\.", ".block.3."),
                (r"\.mlp\.fc2\.", ".block.5."),
                (r"\.gamma$", ".layer_scale"),
                (r"^head\.norm\.", "classifier.0."),
                (r"^head\.fc\.", "classifier.2."),
            ),
            columns=r"\.gamma$",
        ),
    }

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        dtype: Any = jnp.float32,
        drop_path_rate: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        if name not in SPECS:
            raise ValueError(registry.unknown("ConvNeXt", name, SPECS))
        super().__init__(name, num_classes, dtype)
        widths, depths = SPECS[name].widths, SPECS[name].depths
        settings = {"dtype": dtype, "rngs": rngs}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        self.stem = Chain([conv(3, widths[0], 4, stride=4, **settings), LayerNorm(widths[0], eps=EPS, dtype=dtype)])
        self.stages = nnx.List()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            before, downsample = widths[stage - 1], None
            if stage:
                norm = LayerNorm(before, eps=EPS, dtype=dtype)
                downsample = Chain([norm, conv(before, width, 2, stride=2, **settings)])
            blocks = [ConvNeXtBlock(width, drop_path_rate=next(rates), **settings) for _ in range(depth)]
            self.stages.append(Stage(blocks, downsample))
        self.head = nnx.Dict(norm=LayerNorm(widths[-1], eps=EPS), fc=linear(widths[-1], num_classes, rngs=rngs))

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        widths = SPECS[self.name].widths
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={f"stage{i + 1}": Tap(w, 4 << i, signed=True, rounding="down") for i, w in enumerate(widths)},
            pooled=widths[-1],
            classifier="head/fc/kernel",
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        if name == "stage1":
            x = self.stem(x)
        stage = self.stages[int(name[-1]) - 1]
        return stage(x, train=train, rngs=rngs)

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        pooled = self.head.norm(mean_over_positions(x))
        return None, pooled, self.head.fc(pooled)


REGISTER = factories(ConvNeXt, SPECS)
