"""What ViT, Swin and ConvNeXt share: patches, attention, MLP, the pre-norm block, stages, and how they start.

Module names follow timm's (attn/qkv, mlp/fc1, norm1, downsample, blocks/0), which are the keys of most weights.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from wkd_jax.models.layers import Conv, LayerNorm, Linear, check_rate, dropout
from wkd_jax.types import Array

# "Truncated normal" of the original code bases truncates at +-2, a hundred deviations out: this is what is left of it.
normal_02: Initializer = jax.nn.initializers.normal(0.02)
zeros: Initializer = jax.nn.initializers.zeros


def linear(in_features: int, out_features: int, **settings: Any) -> Linear:
    """A linear layer as transformers start it: weights N(0, 0.02), bias 0."""
    return Linear(in_features, out_features, kernel_init=normal_02, bias_init=zeros, **settings)


def gelu(x: Array) -> Array:
    """GELU as torch has it: x times the exact normal distribution function of x, not JAX's default, a tanh form.

    Example:
      >>> print(f"{gelu(jnp.array(-3.0)):.5f}")
      -0.00405
    """
    return jax.nn.gelu(x, approximate=False)


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Rates of stochastic depth of a network's blocks: from 0 at the first to `last`, in even steps.

    Python numbers, since NumPy's would turn bfloat16 activations into float32.

    Raises:
      ValueError: If `last` is not in [0, 1).

    Example:
      >>> drop_path_rates(0.5, 3)
      [0.0, 0.25, 0.5]
    """
    check_rate("drop_path_rate", last)
    return [float(last) * block / max(blocks - 1, 1) for block in range(blocks)]


def attention(query: Array, key: Array, value: Array, bias: Array | None = None) -> Array:
    """Softmax attention of several heads (Vaswani et al., arXiv 1706.03762); scores and softmax are float32.

    Args:
      query: [..., N, heads, d], any float dtype.
      key: [..., M, heads, d].
      value: [..., M, heads, d].
      bias: Added to the scores query . key / sqrt(d); broadcast to [..., heads, N, M].

    Returns:
      [..., N, heads, d], dtype of `value`.

    Example:
      >>> x = jnp.array([0.0, 3.0]).reshape(2, 1, 1)  # N=2, heads=1, d=1
      >>> attention(x, x, x, jnp.array([[0.0, -1e9], [0.0, -1e9]])).ravel().tolist()  # the first key alone counts
      [0.0, 0.0]
    """
    query = query * query.shape[-1] ** -0.5
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("...nhd,...mhd->...hnm", query, key, preferred_element_type=wide)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...hnm,...mhd->...nhd", weights, value)


class Attention(nnx.Module):
    """Self-attention: one linear layer to queries, keys and values (head after head in each), one behind the heads.

    Args:
      features: D.
      heads: Of D / heads channels each.
      dropout_rate: Of the result.
      dtype: Of the computation.
      rngs: Source of the initial values.

    Example:
      >>> attend = Attention(8, 2, rngs=nnx.Rngs(0))
      >>> attend(jnp.zeros((3, 5, 8)), train=False).shape
      (3, 5, 8)
    """

    def __init__(
        self, features: int, heads: int, *, dropout_rate: float = 0.0, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.heads = heads
        self.dropout_rate = dropout_rate
        self.qkv = linear(features, 3 * features, dtype=dtype, rngs=rngs)
        self.proj = linear(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None = None, bias: Array | None = None) -> Array:
        """Lets the N tokens of [B, ..., N, D] attend to each other; `bias` as in `attention`."""
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:-1], 3, self.heads, -1), -3, 0)
        x = attention(query, key, value, bias).reshape(x.shape)
        return dropout(self.proj(x), self.dropout_rate, train=train, rngs=rngs)


class Mlp(nnx.Module):
    """Linear layer to four times the channels, GELU, linear layer back, dropout after both.

    Args:
      features: D.
      dropout_rate: Of both dropouts.
      dtype: Of the computation.
      rngs: Source of the initial values.

    Example:
      >>> Mlp(8, rngs=nnx.Rngs(0))(jnp.zeros((3, 5, 8)), train=False).shape
      (3, 5, 8)
    """

    def __init__(self, features: int, *, dropout_rate: float = 0.0, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.dropout_rate = dropout_rate
        self.fc1 = linear(features, 4 * features, dtype=dtype, rngs=rngs)
        self.fc2 = linear(4 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Array:
        """Maps each position of [B, ..., D] by itself."""
        drop = functools.partial(dropout, rate=self.dropout_rate, train=train, rngs=rngs)
        return drop(self.fc2(drop(gelu(self.fc1(x)))))


class Block(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), with stochastic depth on both branches.

    Args:
      attn: Called as attn(x, train=..., rngs=...); keeps the shape.
      features: D.
      eps: Of the layer normalisations.
      dropout_rate: In the MLP.
      drop_path_rate: Of stochastic depth.
      dtype: Of the computation.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        attn: nnx.Module,
        features: int,
        *,
        eps: float,
        dropout_rate: float,
        drop_path_rate: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.drop_path_rate = drop_path_rate
        self.norm1 = LayerNorm(features, eps=eps, dtype=dtype)
        self.attn = attn
        self.norm2 = LayerNorm(features, eps=eps, dtype=dtype)
        self.mlp = Mlp(features, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Array:
        """Maps [B, ..., D], keeping the shape."""
        drop_path = functools.partial(dropout, rate=self.drop_path_rate, train=train, rngs=rngs, whole_examples=True)
        x = x + drop_path(self.attn(self.norm1(x), train=train, rngs=rngs))
        return x + drop_path(self.mlp(self.norm2(x), train=train, rngs=rngs))


class PatchEmbed(nnx.Module):
    """One linear map (with torch's initial values) of each square of pixels, then, in Swin, a layer normalisation.

    Args:
      size: Side of a square, pixels.
      features: Output channels.
      norm_eps: Of the layer normalisation; None: there is none.
      dtype: Of the computation.
      rngs: Source of the initial values.

    Example:
      >>> PatchEmbed(4, 8, norm_eps=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 12, 3))).shape
      (2, 2, 3, 8)
    """

    def __init__(self, size: int, features: int, *, norm_eps: float | None, dtype: Any, rngs: nnx.Rngs) -> None:
        self.proj = Conv(3, features, size, stride=size, dtype=dtype, rngs=rngs)
        self.norm = None if norm_eps is None else LayerNorm(features, eps=norm_eps, dtype=dtype)

    def __call__(self, image: Array) -> Array:
        """Maps [B, H, W, 3] to [B, H / size, W / size, features]."""
        x = self.proj(image)
        return x if self.norm is None else self.norm(x)


class Chain(nnx.List):
    """Layers one after the other, under their numbers; called with the input alone."""

    def __call__(self, x: Array) -> Array:
        """The output of the last layer."""
        for layer in self:
            x = layer(x)
        return x


class Stage(nnx.Module):
    """Blocks of one width, after what makes the map smaller and wider.

    Args:
      blocks: Called as block(x, train=..., rngs=...).
      downsample: Called with the map alone; None in a first stage.
    """

    def __init__(self, blocks: list[nnx.Module], downsample: nnx.Module | None = None) -> None:
        self.downsample = downsample
        self.blocks = nnx.List(blocks)

    def __call__(self, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Array:
        """Maps [B, H, W, D] to the stage's output."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x, train=train, rngs=rngs)
        return x
