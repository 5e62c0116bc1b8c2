"""Swin transformers with windows of 7 x 7: Swin-T (Liu et al., arXiv 2103.14030) and the smaller ones of OFA-KD.

Module names follow timm's since 0.9 (layers/1/downsample/reduction, layers/0/blocks/1/attn/qkv, head/fc).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import LayerNorm, check_rate, dropout, mean_over_positions
from wkd_jax.models.transformer import (
    Attention,
    Block,
    PatchEmbed,
    Stage,
    drop_path_rates,
    linear,
    normal_02,
)
from wkd_jax.types import Array, ModelInfo, Tap

PATCH = 4
WINDOW = 7
SHIFT = WINDOW // 2
EPS = 1e-5


def to_windows(x: Any) -> Any:
    """Cuts [B, H, W, D], of whole windows, into [B, H / 7 * W / 7, 49, D], both row by row."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, features)
    return x.swapaxes(2, 3).reshape(batch, -1, WINDOW * WINDOW, features)


def from_windows(x: Array, size: tuple[int, int]) -> Array:
    """The inverse of `to_windows` for maps of `size` (height, width)."""
    batch, _, _, features = x.shape
    height, width = size
    x = x.reshape(batch, height // WINDOW, width // WINDOW, WINDOW, WINDOW, features)
    return x.swapaxes(2, 3).reshape(batch, height, width, features)


def relative_index() -> np.ndarray:
    """[49, 49] rows of the table of biases: one for each difference of positions (query minus key) in a window."""
    row, column = np.divmod(np.arange(WINDOW * WINDOW), WINDOW)
    rows, columns = (axis[:, None] - axis[None, :] + WINDOW - 1 for axis in (row, column))
    return rows * (2 * WINDOW - 1) + columns


RELATIVE_INDEX = relative_index()


def shift_bias(size: tuple[int, int], shift: tuple[int, int]) -> Array:
    """Keeps apart what only the shift brought into one window.

    A map shifted up and left by `shift` continues at its far borders with what left it at the near ones.

    Args:
      size: (height, width) of the map, whole windows.
      shift: Along both axes, positions.

    Returns:
      [windows, 1, 49, 49] float32, to be added to the scores of all heads: 0 between tokens that were neighbours
      before the shift, -100 between others.
    """
    wrapped = [np.arange(side) >= side - step for side, step in zip(size, shift, strict=True)]
    region = 2 * wrapped[0][:, None] + wrapped[1]
    # A small constant: the comparison, 49 times as large, is left to the device.
    region = jnp.asarray(to_windows(region[None, :, :, None])[0, :, :, 0], jnp.int32)
    return jnp.where(region[:, None, :, None] == region[:, None, None, :], 0.0, -100.0)


class WindowAttention(Attention):
    """Attention within windows of 7 x 7 positions, with a learned bias for each difference of positions and head.

    Maps that are not whole windows are padded by zeros below and on the right, which take part as keys. `shifted`
    moves the windows by 3 positions down and right, except along an axis of a single window.

    Args:
      features: D.
      heads: Of D / heads channels each.
      shifted: Whether the windows are shifted.
      dropout_rate: Of the result.
      dtype: Of the computation.
      rngs: Source of the initial values.

    Example:
      >>> attend = WindowAttention(8, 2, shifted=True, rngs=nnx.Rngs(0))
      >>> attend(jnp.zeros((1, 9, 14, 8)), train=False).shape
      (1, 9, 14, 8)
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        shifted: bool,
        dropout_rate: float = 0.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(features, heads, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)
        self.shifted = shifted
        table = normal_02(rngs.params(), ((2 * WINDOW - 1) ** 2, heads), jnp.float32)
        self.relative_position_bias_table = nnx.Param(table)

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Array:
        """Maps [B, H, W, D], keeping the shape."""
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (0, -height % WINDOW), (0, -width % WINDOW), (0, 0)))
        size = x.shape[1:3]
        down, right = (SHIFT if self.shifted and side > WINDOW else 0 for side in size)
        bias = self.relative_position_bias_table[...][RELATIVE_INDEX].transpose(2, 0, 1)
        if down or right:
            bias = bias + shift_bias(size, (down, right))
        x = to_windows(jnp.roll(x, (-down, -right), (1, 2)))
        x = super().__call__(x, train=train, rngs=rngs, bias=bias)
        return jnp.roll(from_windows(x, size), (down, right), (1, 2))[:, :height, :width]


class PatchMerging(nnx.Module):
    """Concatenates the channels of 2 x 2 positions, normalises, and maps them to twice the width.

    The order of the four is down the first column, then down the second: (0, 0), (1, 0), (0, 1), (1, 1). Maps of odd
    size are padded by zeros below and on the right.

    Args:
      features: Input channels D.
      dtype: Of the computation.
      rngs: Source of the initial values.

    Example:
      >>> PatchMerging(4, dtype=jnp.float32, rngs=nnx.Rngs(0))(jnp.zeros((1, 5, 6, 4))).shape
      (1, 3, 3, 8)
    """

    def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(4 * features, eps=EPS, dtype=dtype)
        self.reduction = linear(4 * features, 2 * features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [B, H, W, D] to [B, ceil(H / 2), ceil(W / 2), 2 D]."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        batch, height, width, features = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, features).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, height // 2, width // 2, 4 * features)))


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network of the family.

    Attributes:
      width: Channels of the first stage; they double from stage to stage.
      depths: Blocks in each of the four stages; every second one has shifted windows.
      heads: Heads in each stage.
    """

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]


SPECS = {
    "swin_tiny_patch4_window7_224": Spec(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_nano_patch4_window7_224": Spec(64, (2, 2, 2, 2), (2, 4, 8, 16)),
    "swin_pico_patch4_window7_224": Spec(48, (2, 2, 2, 2), (2, 4, 8, 16)),
}


class Swin(Staged):
    """A network of `SPECS` for [B, H, W, 3] images; a `wkd_jax.types.Model`.

    Height and width are any multiples of 4. At sizes other than multiples of 224 maps are padded to whole windows as
    torchvision and the authors' detection code do: first padded, then shifted. (timm shifts first, and makes windows
    and tables smaller where a map is smaller than 7 x 7; at multiples of 224 there is no difference.)
    Taps, all signed: "stage1" to "stage4", the ends of the stages before patches are merged, at a quarter to a
    thirty-second of the image's size (rounded up). `pooled` is the mean of the normalised last tap.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters, the last normalisation and the classifier stay float32.
      drop_path_rate: Stochastic depth at the last block; it rises evenly from 0 at the first.
      dropout_rate: After the patch embedding, the attention and both layers of each MLP.
      rngs: Source of the initial values: N(0, 0.02) for weights and tables of biases, torch's default for the patch
        embedding, biases 0.

    Raises:
      ValueError: If the family has no network of that name or a setting is out of range. When called, if a side of
        the image is not a multiple of 4.

    References:
      OFA-KD (arXiv 2310.19444) has the sizes of swin_nano and swin_pico.

    Example:
      >>> def run(image):
      ...     return Swin("swin_pico_patch4_window7_224", 1000, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 224, 224, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.taps["stage1"].shape, outputs.taps["stage4"].shape
      ((2, 1000), (2, 56, 56, 48), (2, 7, 7, 384))
    """

    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {
        "timm": KeyStyle(),
        # Also timm up to 0.8: merging ends a stage.
        "microsoft": KeyStyle(
            (
                *((rf"^layers\.{s}\.downsample", f"layers.{s - 1}.downsample") for s in (1, 2, 3)),
                (r"^head\.fc", "head"),
            )
        ),
        "torchvision": KeyStyle(
            (
                (r"^patch_embed\.proj", "features.0.0"),
                (r"^patch_embed\.norm", "features.0.2"),
                *((rf"^layers\.{s}\.downsample", f"features.{2 * s}") for s in (1, 2, 3)),
                *((rf"^layers\.{s}\.blocks", f"features.{2 * s + 1}") for s in (0, 1, 2, 3)),
                (r"\.mlp\.fc1", ".mlp.0"),
                (r"\.mlp\.fc2", ".mlp.3"),
                (r"^head\.fc", "head"),
            )
        ),
    }

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        dtype: Any = jnp.float32,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        if name not in SPECS:
            raise ValueError(registry.unknown("Swin", name, SPECS))
        super().__init__(name, num_classes, dtype)
        check_rate("dropout_rate", dropout_rate)
        self.dropout_rate = dropout_rate
        spec, widths = SPECS[name], self._widths
        settings = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}
        rates = iter(drop_path_rates(drop_path_rate, sum(spec.depths)))

        self.patch_embed = PatchEmbed(PATCH, widths[0], norm_eps=EPS, dtype=dtype, rngs=rngs)
        self.layers = nnx.List()
        for stage, (width, depth, heads) in enumerate(zip(widths, spec.depths, spec.heads, strict=True)):
            merging = PatchMerging(widths[stage - 1], dtype=dtype, rngs=rngs) if stage else None
            blocks = []
            for index in range(depth):
                attn = WindowAttention(width, heads, shifted=index % 2 == 1, **settings)
                blocks.append(Block(attn, width, eps=EPS, drop_path_rate=next(rates), **settings))
            self.layers.append(Stage(blocks, merging))
        self.norm = LayerNorm(widths[-1], eps=EPS)
        self.head = nnx.Dict(fc=linear(widths[-1], num_classes, rngs=rngs))

    @property
    def _widths(self) -> list[int]:
        return [SPECS[self.name].width << stage for stage in range(4)]

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        taps = {f"stage{i + 1}": Tap(width, PATCH << i, signed=True) for i, width in enumerate(self._widths)}
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps=taps,
            pooled=self._widths[-1],
            classifier="head/fc/kernel",
            mean_pooled=True,
        )

    def buffers(self, style: str) -> dict[str, np.ndarray]:
        """The index of each block's table of biases, which torchvision keeps."""
        if style != "torchvision":
            return {}
        return {
            f"features.{2 * stage + 1}.{block}.attn.relative_position_index": RELATIVE_INDEX.ravel()
            for stage, depth in enumerate(SPECS[self.name].depths)
            for block in range(depth)
        }

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        if name == "stage1":
            if x.shape[1] % PATCH or x.shape[2] % PATCH:
                raise ValueError(
                    f"{self.name} takes images whose height and width are multiples of {PATCH} and was given "
                    f"{x.shape[1:3]}: resize or crop them"
                )
            x = dropout(self.patch_embed(x), self.dropout_rate, train=train, rngs=rngs)
        stage = self.layers[int(name[-1]) - 1]
        return stage(x, train=train, rngs=rngs)

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        x = self.norm(x)
        pooled = mean_over_positions(x)
        return x, pooled, self.head.fc(pooled)


REGISTER = factories(Swin, SPECS)
