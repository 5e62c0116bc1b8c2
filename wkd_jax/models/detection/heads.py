"""The learned parts of a detector behind its trunk: feature pyramid, region proposal head, box head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax.models.layers import Conv, Linear
from wkd_jax.types import Array

# U(-sqrt(3 / fan_in), sqrt(3 / fan_in)), which Caffe2 and detectron2 call Xavier.
xavier = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
zeros = jax.nn.initializers.zeros


class FeaturePyramid(nnx.Module):
    """Maps of one width at strides 4 to 64 (Lin et al., "Feature Pyramid Networks", arXiv 1612.03144).

    A 1 x 1 convolution of each map, added to the level above at twice its size; a 3 x 3 convolution of each sum; every
    second position of the coarsest result as one more level. No normalisation, no activation.

    Args:
      in_features: Channels of the trunk's four maps.
      features: Channels of every level.
      dtype: Compute dtype.
      rngs: Source of the initial values.
    """

    def __init__(self, in_features: Sequence[int], features: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        settings = {"kernel_init": xavier, "bias_init": zeros, "dtype": dtype, "rngs": rngs}
        self.lateral = nnx.List(Conv(channels, features, 1, **settings) for channels in in_features)
        self.output = nnx.List(Conv(features, features, 3, padding=1, **settings) for _ in in_features)

    def __call__(self, maps: Sequence[Array]) -> dict[str, Array]:
        """The levels "p2" to "p6" [B, H / stride, W / stride, features] of the trunk's maps.

        Raises:
          ValueError: If the image's sides are not multiples of 32.
        """
        laterals = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        inner, levels = laterals[-1], [self.output[-1](laterals[-1])]
        for lateral, conv in zip(reversed(laterals[:-1]), reversed(self.output[:-1]), strict=True):
            above = jnp.repeat(jnp.repeat(inner, 2, axis=1), 2, axis=2)
            if above.shape != lateral.shape:
                raise ValueError(
                    f"a pyramid level of {above.shape[1:3]} meets one of {lateral.shape[1:3]}: the sides of the canvas "
                    "must be multiples of 32"
                )
            inner = lateral + above
            levels.append(conv(inner))
        named = {f"p{level}": x for level, x in enumerate(reversed(levels), 2)}
        return named | {"p6": named["p5"][:, ::2, ::2]}


class ProposalHead(nnx.Module):
    """Objectness and box deltas of every anchor, the same weights at each level (Ren et al., arXiv 1506.01497).

    Args:
      features: Channels of the levels.
      anchors: Of each position.
      dtype: Compute dtype of the hidden layer; what follows it is float32, since in bfloat16 many anchors would tie.
      rngs: Source of the initial values: N(0, 0.01), biases 0.
    """

    def __init__(self, features: int, anchors: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        settings = {"kernel_init": jax.nn.initializers.normal(0.01), "bias_init": zeros, "rngs": rngs}
        self.conv = Conv(features, features, 3, padding=1, dtype=dtype, **settings)
        self.objectness = Conv(features, anchors, 1, **settings)
        self.deltas = Conv(features, 4 * anchors, 1, **settings)

    def __call__(self, levels: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """([B, A] logits, [B, A, 4] deltas) of each level, float32, in the order of `anchors`: row, column, ratio."""
        hidden = [nnx.relu(self.conv(x)) for x in levels]
        logits = [self.objectness(x).reshape(len(x), -1) for x in hidden]
        return logits, [self.deltas(x).reshape(len(x), -1, 4) for x in hidden]


class BoxHead(nnx.Module):
    """Two hidden layers, then class logits and box deltas by class (Girshick, "Fast R-CNN", arXiv 1504.08083).

    Args:
      features: Channels of a pooled region.
      size: Its side in positions.
      hidden: Width of the hidden layers.
      num_classes: Of objects and background together; the background is the last.
      dtype: Compute dtype of the hidden layers; what follows them is float32.
      rngs: Source of the initial values.
    """

    def __init__(self, features: int, size: int, hidden: int, num_classes: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        normal = jax.nn.initializers.normal
        # Holds the kernel as [size, size, features, hidden], which other code bases flatten in their own order.
        self.fc1 = Conv(features, hidden, size, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, hidden, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.cls_score = Linear(hidden, num_classes, kernel_init=normal(0.01), bias_init=zeros, rngs=rngs)
        self.bbox_pred = Linear(hidden, 4 * (num_classes - 1), kernel_init=normal(0.001), bias_init=zeros, rngs=rngs)

    def __call__(self, regions: Array) -> tuple[Array, Array, Array]:
        """(hidden [..., hidden], logits [..., C], deltas [..., C - 1, 4]), float32, of [..., size, size, features]."""
        lead, dtype = regions.shape[:-3], self.fc1.dtype
        kernel, bias = self.fc1.kernel[...], self.fc1.bias[...]
        x = regions.reshape(*lead, -1).astype(dtype) @ kernel.reshape(-1, kernel.shape[-1]).astype(dtype)
        x = nnx.relu(x + bias.astype(dtype))
        x = nnx.relu(self.fc2(x)).astype(jnp.float32)
        return x, self.cls_score(x), self.bbox_pred(x).reshape(*lead, -1, 4)
