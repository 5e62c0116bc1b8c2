"""Layers with torch's conventions, so that recipes and weights carry over: padding, initial values, BatchNorm.

Parameters are always float32; `dtype` is what a layer computes in. Layout is NHWC, kernels are [kh, kw, in, out].
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from wkd_jax.types import Array

# N(0, sqrt(2 / (kh * kw * out))), for convolutions before a ReLU (He et al., arXiv 1502.01852, the "fan-out" form).
he_fan_out: Initializer = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): torch's default for weights and biases of convolutions and linear layers.

    Args:
      fan_in: in / groups * kh * kw for a convolution, out * kh * kw for a transposed one. Given rather than read from
        the shape, since the shape of a bias does not tell.
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nnx.Conv):
    """2-D convolution with torch's padding and initial values.

    `padding` zeros on both sides of each axis, whatever the size: "SAME" differs from this on every layer of stride 2
    with an odd kernel and an even input.

    Args:
      in_features: Input channels.
      out_features: Output channels.
      kernel_size: One number, or (height, width).
      stride: Along both axes.
      padding: Zeros on each side of both axes.
      groups: Groups of channels that do not see each other.
      use_bias: Whether to add a bias.
      kernel_init: Defaults to `uniform_fan_in`.
      bias_init: Likewise.
      dtype: Of the computation and the output.
      rngs: Source of the initial values.

    Example:
      >>> conv = Conv(3, 8, 3, stride=2, padding=1, rngs=nnx.Rngs(0))
      >>> conv(jnp.zeros((1, 7, 8, 3))).shape
      (1, 4, 4, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        default_init = uniform_fan_in(in_features // groups * math.prod(size))
        super().__init__(
            in_features,
            out_features,
            size,
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=use_bias,
            kernel_init=kernel_init or default_init,
            bias_init=bias_init or default_init,
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )


class ConvTranspose(nnx.Conv):
    """Transposed 2-D convolution with torch's geometry: out = (in - 1) * stride - 2 * padding + kernel_size.

    It is the convolution of the zero-interleaved input, padded by kernel_size - 1 - padding. The kernel is stored as
    that convolution uses it: torch's weight [in, out, kh, kw] is transposed to [kh, kw, in, out] and flipped along kh
    and kw. (`nnx.ConvTranspose` reads explicit padding in one of two ways, by a flag of `jax.lax.conv_transpose` that
    it does not pass on; this reads it in one.)

    Args:
      in_features: Input channels.
      out_features: Output channels.
      kernel_size: Along both axes.
      stride: Along both axes.
      padding: As torch counts it: rows and columns cut from each side of the full result.
      dtype: Of the computation and the output.
      rngs: Source of the initial values, `uniform_fan_in` of the output's side as in torch.

    Example:
      >>> double = ConvTranspose(8, 4, 4, stride=2, padding=1, rngs=nnx.Rngs(0))
      >>> double(jnp.zeros((1, 5, 4, 8))).shape
      (1, 10, 8, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int,
        padding: int,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        border = kernel_size - 1 - padding
        default_init = uniform_fan_in(out_features * kernel_size**2)
        super().__init__(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            input_dilation=(stride, stride),
            padding=((border, border), (border, border)),
            kernel_init=default_init,
            bias_init=default_init,
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )


class Linear(nnx.Linear):
    """Linear layer over the last axis with torch's initial values.

    Args:
      in_features: Input channels.
      out_features: Output channels.
      use_bias: Whether to add a bias.
      kernel_init: Defaults to `uniform_fan_in`.
      bias_init: Likewise.
      dtype: Of the computation and the output; None: float32, or the input's where that is wider.
      rngs: Source of the initial values.

    Example:
      >>> Linear(8, 4, rngs=nnx.Rngs(0))(jnp.zeros((2, 8))).shape
      (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        default_init = uniform_fan_in(in_features)
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init or default_init,
            bias_init=bias_init or default_init,
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, with torch's arithmetic (Ioffe and Szegedy, arXiv 1502.03167).

    Training: y = (x - mean) / sqrt(var + eps) * scale + bias with the batch's mean and biased variance, and
    running = momentum * running + (1 - momentum) * batch, where the variance kept is the unbiased one, as in torch
    (Flax keeps the biased one). Evaluation: the running statistics take the batch's place. Statistics and parameters
    are float32 whatever the activations are.

    Under `jax.jit` a batch cut over devices is one array, so `group_size=None` is what others call synchronised
    BatchNorm. With a group size the batch is cut into groups of that many consecutive examples, each normalised by
    itself; the running statistics take the average over groups. Where groups lie within devices, normalising needs no
    communication (only the running statistics do, and nothing waits for those).

    Args:
      num_features: Channels C.
      group_size: Examples that share statistics in training; None: the global batch.
      eps: Added to the variance.
      momentum: Share of the old running statistics that a step keeps: 1 minus torch's `momentum`.

    Raises:
      ValueError: If `group_size` is below 1. On a training call, if it does not divide the batch, or if a group has a
        single value a channel, whose variance does not exist.

    Example:
      >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
      >>> norm = BatchNorm(1, group_size=2, eps=0.0)
      >>> print(norm(x, train=True).ravel(), norm.mean[...], norm.var[...])
      [-1.  1. -1.  1.] [0.65000004] [1.4]
    """

    def __init__(
        self, num_features: int, *, group_size: int | None = None, eps: float = 1e-5, momentum: float = 0.9
    ) -> None:
        if group_size is not None and group_size < 1:
            raise ValueError(f"BatchNorm group size {group_size}: must be 1 or more, or None for the whole batch")
        self.group_size = group_size
        self.eps = eps
        self.momentum = momentum
        self.scale = nnx.Param(jnp.ones(num_features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_features, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(num_features, jnp.float32))

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Normalises [B, ..., C]. `train` uses, and updates the running statistics with, those of the batch."""
        y = widen(x)
        if train:
            y, mean, var = self._batch_statistics(y)
        else:
            mean, var = self.mean[...], self.var[...]
        y = (y - mean) * (self.scale[...] * jax.lax.rsqrt(var + self.eps)) + self.bias[...]
        return y.reshape(x.shape).astype(x.dtype)

    def _batch_statistics(self, x: Array) -> tuple[Array, Array, Array]:
        """Groups and shifts `x`; updates the running statistics.

        Mean and mean square are taken together, which reads the activations once less than the variance around a known
        mean. That cancels digits where the mean is far from 0, so a shift k near the mean comes off first: the mean at
        the middle position, 1/P of the activations to read (P positions). var >= (mean - k)^2 / P, so the relative
        error is a few times P roundings at worst, wherever the mean lies. The result does not depend on k, which
        therefore counts as a constant.

        Returns:
          (x - k [G, B/G, ..., C], its mean, its biased variance, both [G, 1, ..., C]).
        """
        x = x.reshape(self._num_groups(x.shape), -1, *x.shape[1:])
        axes = tuple(range(1, x.ndim - 1))
        middle = x[:, :, *(slice(size // 2, size // 2 + 1) for size in x.shape[2:-1])]
        shift = jax.lax.stop_gradient(jnp.mean(middle, axes, keepdims=True))
        x = x - shift
        mean = jnp.mean(x, axes, keepdims=True)
        # Rounding alone can take the variance of a constant channel below 0.
        var = jnp.maximum(jnp.mean(jnp.square(x), axes, keepdims=True) - jnp.square(mean), 0)

        count = math.prod(x.shape[1:-1])
        groups = (0, *axes)
        self._update(self.mean, jnp.mean(shift + mean, groups))
        self._update(self.var, jnp.mean(var, groups) * (count / (count - 1)))
        return x, mean, var

    def _update(self, running: nnx.BatchStat, batch: Array) -> None:
        running.set_value(self.momentum * running[...] + (1 - self.momentum) * batch)

    def _num_groups(self, shape: tuple[int, ...]) -> int:
        size = self.group_size or shape[0]
        if shape[0] % size:
            raise ValueError(
                f"BatchNorm: groups of {size} examples do not divide a batch of {shape[0]}; choose a norm_group_size "
                "that does, or None for statistics over the whole batch"
            )
        if size * math.prod(shape[1:-1]) == 1:
            raise ValueError(
                f"BatchNorm: one value a channel in a group of input {shape} has no variance; train on more than one "
                "example a group, or on larger images"
            )
        return shape[0] // size


class ConvNorms(nnx.Dict):
    """Convolutions with a BatchNorm and a ReLU after each, numbered as in torch's Sequential: 0, 1, (ReLU), 3, 4, ...

    Args:
      convs: The convolutions, in order.
      norm_group_size: See `layers.BatchNorm`.

    Example:
      >>> conv = Conv(3, 8, 3, padding=1, rngs=nnx.Rngs(0))
      >>> sequence = ConvNorms([conv, Conv(8, 4, 1, rngs=nnx.Rngs(1))], norm_group_size=None)
      >>> sorted(sequence), sequence(jnp.ones((1, 5, 5, 3)), train=False).shape
      (['0', '1', '3', '4'], (1, 5, 5, 4))
    """

    def __init__(self, convs: Sequence[Conv], *, norm_group_size: int | None) -> None:
        super().__init__()
        for number, conv in enumerate(convs):
            self[str(3 * number)] = conv
            self[str(3 * number + 1)] = BatchNorm(conv.out_features, group_size=norm_group_size)

    def __call__(self, x: Array, *, train: bool, last_relu: bool = True) -> Array:
        """Maps [B, H, W, D]; without `last_relu` the result is that of the last BatchNorm."""
        for number in range(len(self) // 2):
            if number:
                x = nnx.relu(x)
            x = self[str(3 * number + 1)](self[str(3 * number)](x), train=train)
        return nnx.relu(x) if last_relu else x


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the last axis (Ba et al., arXiv 1607.06450); statistics and parameters are float32.

    The variance is taken around the mean: the one-pass form loses digits where the mean is large, as it is in the
    residual streams of trained transformers.

    Args:
      num_features: Channels.
      eps: Added to the variance. No default, since torch's (1e-5) and most transformers' (1e-6) differ.
      dtype: Of the output; None: float32, or the input's where that is wider.

    Example:
      >>> print(LayerNorm(2, eps=0.0)(jnp.array([[1000.0, 1002.0]])))
      [[-1.  1.]]
    """

    def __init__(self, num_features: int, *, eps: float, dtype: Any = None) -> None:
        super().__init__(
            num_features,
            epsilon=eps,
            param_dtype=jnp.float32,
            use_fast_variance=False,
            rngs=nnx.Rngs(0),  # unused: the initial values are constants
        )
        self.output_dtype = dtype

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Normalises [..., C]."""
        y = super().__call__(widen(x))
        return y if self.output_dtype is None else y.astype(self.output_dtype)


def widen(x: Array) -> Array:
    """`x` in float32, or as it is where it is wider: what sums over many entries are taken in.

    Float64 goes through, so that a network can be checked free of rounding.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def mean_over_positions(x: Array) -> Array:
    """Global average pooling: [B, H, W, D] -> [B, D], at least float32."""
    return jnp.mean(widen(x), axis=(1, 2))


def max_pool(x: Array, size: int, *, stride: int, padding: int = 0) -> Array:
    """Largest value of each window of [B, H, W, D]; what is beyond the border never wins, and sizes round down.

    Example:
      >>> max_pool(-jnp.ones((1, 4, 4, 1)), 3, stride=2, padding=1).ravel().tolist()
      [-1.0, -1.0, -1.0, -1.0]
    """
    return nnx.max_pool(x, (size, size), strides=(stride, stride), padding=((padding, padding),) * 2)


def avg_pool(x: Array, size: int, *, stride: int, padding: int = 0) -> Array:
    """Mean of each window of [B, H, W, D], positions beyond the border counted as zeros, as torch does by default."""
    return nnx.avg_pool(x, (size, size), strides=(stride, stride), padding=((padding, padding),) * 2)


def dropout(x: Array, rate: float, *, train: bool, rngs: nnx.Rngs | None, whole_examples: bool = False) -> Array:
    """Sets entries to 0 at random in training and scales the others by 1 / (1 - rate).

    Args:
      x: [B, ...].
      rate: Share that is dropped.
      train: Nothing happens outside of training.
      rngs: Source of randomness; needed in training where `rate` is above 0.
      whole_examples: Draw once an example instead of once an entry. On a residual branch this is stochastic depth
        (Huang et al., arXiv 1603.09382), "drop path" in timm.

    Raises:
      ValueError: If randomness is needed and there is none.

    Example:
      >>> dropout(jnp.ones((2, 3)), 0.5, train=False, rngs=None).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if not train or rate == 0:
        return x
    if rngs is None:
        raise ValueError(
            f"dropout of rate {rate} in training needs randomness: call the network with rngs=nnx.Rngs(key)"
        )
    shape = (x.shape[0], *(1,) * (x.ndim - 1)) if whole_examples else x.shape
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0)


def check_rate(name: str, rate: Any) -> None:
    """Refuses a `rate`, of the setting `name`, that is no share of things to drop.

    Raises:
      ValueError: If it is not a number in [0, 1).
    """
    if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        raise ValueError(f"{name}={rate!r}: must be a number from 0 (drop nothing) to below 1")
