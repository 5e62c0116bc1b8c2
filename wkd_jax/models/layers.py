"""Layers with torch's conventions, so that recipes and weights carry over: padding, initial values, BatchNorm.

Parameters are always float32; `dtype` is what a layer computes in. Layout is NHWC, kernels are [kh, kw, in, out].
"""

from __future__ import annotations

import functools
import itertools
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


class _Convolution(nnx.Conv):
    """How both kinds of convolution compute: in `dtype`, or where that is None in the input's."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Convolves [B, H, W, in_features]."""
        y = self._convolve(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def scaled(self, x: Array, factor: Array, offset: Array) -> Array:
        """`factor * conv(x) + offset`, both [out_features]: the factor goes into the kernel, which is far smaller."""
        if self.bias is not None:
            offset = offset + factor * self.bias[...]
        y = self._convolve(x, self.kernel[...] * factor)
        return y + offset.astype(y.dtype)

    def _convolve(self, x: Array, kernel: Array) -> Array:
        dtype = self.dtype or x.dtype
        return jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Conv(_Convolution):
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
      dtype: Of the computation and the output; None: the input's.
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
            input_dilation=(1, 1),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=use_bias,
            kernel_init=kernel_init or default_init,
            bias_init=bias_init or default_init,
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )


class ConvTranspose(_Convolution):
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
      dtype: Of the computation and the output; None: the input's.
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
            strides=(1, 1),
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

    def __call__(self, x: Array, *, train: bool, relu: bool = False) -> Array:
        """Normalises [B, ..., C], and applies a ReLU where asked for.

        `train` uses, and updates the running statistics with, those of the batch.
        """
        if not train:
            factor, offset = self.affine()
            y = (widen(x) * factor + offset).astype(x.dtype)
            return nnx.relu(y) if relu else y
        grouped = x.reshape(self._num_groups(x.shape), -1, *x.shape[1:])
        # Under `shard_map`: makes these differ between devices as x does, so that their derivatives are summed. A sum
        # over nothing is zero, and XLA folds it away.
        zero = jnp.sum(x[:0], dtype=jnp.float32)
        y, mean, var = _normalise(self.eps, relu, grouped, self.scale[...] + zero, self.bias[...] + zero)
        count = math.prod(grouped.shape[1:-1])
        self._update(self.mean, jnp.mean(mean, 0))
        self._update(self.var, jnp.mean(var, 0) * (count / (count - 1)))
        return y.reshape(x.shape)

    def affine(self) -> tuple[Array, Array]:
        """(factor, offset) [C] of evaluation, which is y = factor * x + offset."""
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
        return factor, self.bias[...] - self.mean[...] * factor

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(eps: float, relu: bool, x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Normalises groups by their own statistics.

    Mean and mean square are taken together, which reads the activations once less than the variance around a known
    mean. That cancels digits where the mean is far from 0, so a shift k near the mean comes off first: the mean at the
    middle position, 1/P of the activations to read (P positions). var >= (mean - k)^2 / P, so the relative error is a
    few times P roundings at worst, wherever the mean lies. (The running mean would need no pass of its own, and none of
    the communication where groups span devices; but in the first steps it is far off, and a run in float32 would then
    differ from the same run on other devices by ten times as much.)

    The derivative is written out, so that it too reads the activations (in their own dtype, nothing wider is kept) and
    their cotangents once for two sums and once more for the result. Differentiated by JAX it is three sums, in passes
    of their own.

    Args:
      eps: Added to the variance.
      relu: Whether a ReLU follows; its derivative is then part of the same passes.
      x: [G, B/G, ..., C].
      scale: [C].
      bias: [C].

    Returns:
      (x normalised, its mean, its biased variance, both [G, C] and without derivative).
    """
    return _normalise_forward(eps, relu, x, scale, bias)[0]


def _normalise_forward(
    eps: float, relu: bool, x: Array, scale: Array, bias: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    axes = tuple(range(1, x.ndim - 1))
    middle = x[:, :, *(slice(size // 2, size // 2 + 1) for size in x.shape[2:-1])]
    shift = jnp.mean(widen(middle), axes, keepdims=True)
    shifted = widen(x) - shift
    mean = jnp.mean(shifted, axes, keepdims=True)
    # Rounding alone can take the variance of a constant channel below 0.
    var = jnp.maximum(jnp.mean(jnp.square(shifted), axes, keepdims=True) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(var + eps)
    y = (shifted - mean) * inverse * scale + bias
    y = jnp.maximum(y, 0) if relu else y
    statistics = jnp.squeeze(shift + mean, axes), jnp.squeeze(var, axes)
    return (y.astype(x.dtype), *statistics), (x, shift, scale, bias, mean, inverse)


def _normalise_backward(
    eps: float, relu: bool, saved: tuple[Array, ...], bars: tuple[Array, Array, Array]
) -> tuple[Array, ...]:
    """With z, x normalised before scale and bias: dx = scale / std * (dy - mean(dy) - z * mean(dy * z))."""
    del eps
    x, shift, scale, bias, mean, inverse = saved
    axes = tuple(range(1, x.ndim - 1))

    def operands(inverse: Array) -> tuple[Array, Array]:
        z = (widen(x) - shift - mean) * inverse
        y_bar = widen(bars[0])
        return z, jnp.where(z * scale + bias > 0, y_bar, 0) if relu else y_bar

    z, y_bar = operands(inverse)
    bias_bar = jnp.sum(y_bar, axes, keepdims=True)
    scale_bar = jnp.sum(y_bar * z, axes, keepdims=True)
    # Made a second time: a compiler that sees the same values used twice writes them to memory, the whole map of them.
    z, y_bar = operands(jax.lax.optimization_barrier(inverse))
    x_bar = (inverse * scale) * (y_bar - (bias_bar + z * scale_bar) / math.prod(x.shape[1:-1]))
    groups = (0, *axes)
    sums = (jnp.sum(bar, groups).astype(scale.dtype) for bar in (scale_bar, bias_bar))
    return x_bar.astype(x.dtype), *sums


_normalise.defvjp(_normalise_forward, _normalise_backward)


def conv_norm(x: Array, conv: Conv, norm: BatchNorm, *, train: bool, relu: bool = False) -> Array:
    """norm(conv(x)), and a ReLU where asked for.

    Evaluation multiplies the kernel instead of the activations by what the normalisation would, and adds the rest like
    a bias, in the compute dtype: with bfloat16 that rounds once less a value and once more a channel. Compilers make
    one kernel of convolution, bias, a sum and a ReLU; the normalisation would be another pass over the activations.

    Example:
      >>> conv, norm = Conv(3, 8, 3, padding=1, use_bias=False, rngs=nnx.Rngs(0)), BatchNorm(8)
      >>> conv_norm(jnp.ones((1, 5, 5, 3)), conv, norm, train=False, relu=True).shape
      (1, 5, 5, 8)
    """
    if train:
        return norm(conv(x), train=True, relu=relu)
    y = conv.scaled(x, *norm.affine())
    return nnx.relu(y) if relu else y


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
        last = len(self) // 2 - 1
        for number in range(last + 1):
            relu = last_relu or number < last
            x = conv_norm(x, self[str(3 * number)], self[str(3 * number + 1)], train=train, relu=relu)
        return x


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

    The derivative goes to the first of the largest values, as in torch. NaN passes through.

    Example:
      >>> max_pool(-jnp.ones((1, 4, 4, 1)), 3, stride=2, padding=1).ravel().tolist()
      [-1.0, -1.0, -1.0, -1.0]
    """
    window = (size, stride, padding)
    return jax.lax.platform_dependent(
        x,
        tpu=functools.partial(_reduce_window, window),
        default=functools.partial(_max_pool, window, x.shape[1:3]),
    )


def _reduce_window(window: tuple[int, int, int], x: Array) -> Array:
    """With XLA's own derivative: what a TPU is best at."""
    size, stride, padding = window
    return nnx.max_pool(x, (size, size), strides=(stride, stride), padding=((padding, padding),) * 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _max_pool(window: tuple[int, int, int], sides: tuple[int, int], x: Array) -> Array:
    """With a derivative that needs a byte a window: which of its values was the largest.

    XLA's own reads the whole input again and, on a GPU, pools bfloat16 in float32: three times the traffic. On CPUs it
    takes four times as long, in float32. Slices and pads with strides are what TPUs are slow at, and CPUs without the
    derivative or in bfloat16.

    Args:
      window: (size, stride, padding).
      sides: Height and width of `x`.
      x: [B, H, W, D].
    """

    def slices(x: Array) -> Array:
        return _max_pool_forward(window, sides, x)[0]

    return jax.lax.platform_dependent(x, cpu=functools.partial(_reduce_window, window), default=slices)


def _max_pool_forward(window: tuple[int, int, int], sides: tuple[int, int], x: Array) -> tuple[Array, Array]:
    del sides
    size, stride, padding = window
    border = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
    padded = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), border)
    height, width = ((side - size) // stride + 1 for side in padded.shape[1:3])
    kind = jnp.uint8 if size * size <= 256 else jnp.uint32
    best = winner = None
    for number, (i, j) in enumerate(itertools.product(range(size), repeat=2)):
        value = padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        if best is None:
            best, winner = value, jnp.zeros(value.shape, kind)
        else:
            winner = jnp.where(value > best, kind(number), winner)
            best = jnp.maximum(best, value)
    return best, winner


def _max_pool_backward(
    window: tuple[int, int, int], sides: tuple[int, int], winner: Array, y_bar: Array
) -> tuple[Array]:
    size, stride, padding = window
    x_bar = 0.0
    for number, (i, j) in enumerate(itertools.product(range(size), repeat=2)):
        part = jnp.where(winner == number, widen(y_bar), 0)
        borders = [(0, 0, 0)] * 4
        for axis, offset in ((1, i - padding), (2, j - padding)):
            covered = stride * (y_bar.shape[axis] - 1) + 1
            borders[axis] = (offset, sides[axis - 1] - covered - offset, stride - 1)
        x_bar = x_bar + jax.lax.pad(part, jnp.zeros((), part.dtype), borders)
    return (x_bar.astype(y_bar.dtype),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


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
