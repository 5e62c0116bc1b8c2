"""Vision transformers on 16 x 16 patches: ViT (Dosovitskiy et al., arXiv 2010.11929) and DeiT (arXiv 2012.12877).

The two are one network, trained differently; DeiT is the form without a distillation token. Module names follow timm's
(patch_embed/proj, blocks/0/attn/qkv, norm, head), which DeiT's authors use as well.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Staged, factories
from wkd_jax.models.layers import LayerNorm, check_rate, dropout
from wkd_jax.models.transformer import Attention, Block, PatchEmbed, drop_path_rates, linear, normal_02
from wkd_jax.types import Array, ModelInfo, Tap

PATCH = 16
EPS = 1e-6
DEPTH = 12
# Blocks of each part. The taps are those of OFA-KD (arXiv 2310.19444), at the depths where a Swin-T changes stages.
PARTS = {"stage1": (0, 2), "stage2": (2, 4), "stage3": (4, 10), "stage4": (10, DEPTH)}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network of the family.

    Attributes:
      width: Channels of a token.
      heads: Of width / heads channels each.
    """

    width: int
    heads: int


SPECS = {
    "vit_tiny_patch16_224": Spec(192, 3),
    "vit_small_patch16_224": Spec(384, 6),
    "vit_base_patch16_224": Spec(768, 12),
    "deit_tiny_patch16_224": Spec(192, 3),
    "deit_small_patch16_224": Spec(384, 6),
    "deit_base_patch16_224": Spec(768, 12),
}


class ViT(Staged):
    """A network of `SPECS` for [B, H, W, 3] images of one size; a `wkd_jax.types.Model`.

    A class token stands before the patches, row by row; learned position embeddings are added to all of them; twelve
    pre-norm blocks follow, and the logits come from the normalised class token, `pooled`. Taps: "stage1" to "stage4",
    outputs of blocks 1, 3, 9 and 11 (of 0 to 11), [B, 1 + H / 16 * W / 16, D], class token included, not normalised.

    Args:
      name: Key of `SPECS`.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters, the last normalisation and the classifier stay float32.
      image_size: (height, width) of the images, pixels, multiples of 16. The position embeddings are made for it.
      drop_path_rate: Stochastic depth at the last block; it rises evenly from 0 at the first.
      dropout_rate: After the position embeddings, the attention and both layers of each MLP.
      rngs: Source of the initial values: N(0, 0.02) for weights and position embeddings, N(0, 1e-6) for the class
        token, torch's default for the patch embedding, biases 0.

    Raises:
      ValueError: If the family has no network of that name or a setting is out of range.

    References:
      The initial values and the places of dropout are those of timm 0.6 and DeiT.

    Example:
      >>> def run(image):
      ...     return ViT("vit_small_patch16_224", 1000, rngs=nnx.Rngs(0))(image, train=False)
      >>> outputs = nnx.eval_shape(run, jnp.zeros((2, 224, 224, 3)))  # shapes; run(...) gives arrays
      >>> outputs.logits.shape, outputs.pooled.shape, outputs.taps["stage4"].shape
      ((2, 1000), (2, 384), (2, 197, 384))
    """

    KEY_STYLES: ClassVar[dict[str, KeyStyle]] = {"timm": KeyStyle()}

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        dtype: Any = jnp.float32,
        image_size: tuple[int, int] = (224, 224),
        drop_path_rate: float = 0.0,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        if name not in SPECS:
            raise ValueError(registry.unknown("ViT", name, SPECS))
        super().__init__(name, num_classes, dtype)
        check_rate("dropout_rate", dropout_rate)
        self.image_size = _checked(image_size)
        self.dropout_rate = dropout_rate
        width, heads = SPECS[name].width, SPECS[name].heads
        settings = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}

        tokens = 1 + (self.image_size[0] // PATCH) * (self.image_size[1] // PATCH)
        self.cls_token = nnx.Param(jax.nn.initializers.normal(1e-6)(rngs.params(), (1, 1, width), jnp.float32))
        self.pos_embed = nnx.Param(normal_02(rngs.params(), (1, tokens, width), jnp.float32))
        self.patch_embed = PatchEmbed(PATCH, width, norm_eps=None, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            Block(Attention(width, heads, **settings), width, eps=EPS, drop_path_rate=rate, **settings)
            for rate in drop_path_rates(drop_path_rate, DEPTH)
        )
        self.norm = LayerNorm(width, eps=EPS)
        self.head = linear(width, num_classes, rngs=rngs)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        width = SPECS[self.name].width
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps={part: Tap(width, PATCH, "tokens", signed=True, prefix_tokens=1) for part in PARTS},
            pooled=width,
            classifier="head/kernel",
            image_size=self.image_size,
        )

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array:
        if name == "stage1":
            x = dropout(self._embed(x), self.dropout_rate, train=train, rngs=rngs)
        for block in self.blocks[slice(*PARTS[name])]:
            x = block(x, train=train, rngs=rngs)
        return x

    def _embed(self, image: Array) -> Array:
        """Class token and patches with their position embeddings, [B, N, D]."""
        patches = self.patch_embed(image)
        batch, width = patches.shape[0], patches.shape[-1]
        token = jnp.broadcast_to(self.cls_token[...].astype(patches.dtype), (batch, 1, width))
        x = jnp.concatenate([token, patches.reshape(batch, -1, width)], axis=1)
        return x + self.pos_embed[...].astype(x.dtype)

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        del train, rngs
        pooled = self.norm(x[:, 0])
        return None, pooled, self.head(pooled)


def _checked(image_size: Sequence[int]) -> tuple[int, int]:
    """`image_size` as a tuple, if it is one that patches fill."""
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size,)
    if len(sides) != 2 or not all(
        isinstance(side, numbers.Integral) and side > 0 and side % PATCH == 0 for side in sides
    ):
        raise ValueError(
            f"image_size={image_size!r}: must be (height, width), both multiples of {PATCH}, as in "
            "image_size=(224, 224)"
        )
    return int(sides[0]), int(sides[1])


REGISTER = factories(ViT, SPECS)
