"""Instance-conditional distillation: attention that instances pay to a teacher's map, and what it makes of two maps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax.losses.feature import widened

Array = jax.Array

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def instance_attention(query: Array, key: Array, value: Array, *, valid: Array, real: Array) -> tuple[Array, Array]:
    """Softmax attention of instances to positions, and how much of it each position gets from the real ones.

    Heads are taken one after the other and computed again for the gradient, so that no [B, heads, Q, N] array exists:
    at 8 heads, 100 instances and the 89,523 positions of an 800 x 1344 pyramid it would be 286 MB an image.

    Args:
      query: [B, Q, heads, d], one an instance, any float dtype; computed in float32, or float64 where an input is.
      key: [B, N, heads, d], one a position.
      value: [B, N, heads, d].
      valid: [B, N] bool, positions that can be seen.
      real: [B, Q] bool, instances whose attention is counted.

    Returns:
      (attended [B, Q, heads, d]: means of the values, 0 where no position is valid; weights [B, heads, N]: the sum of
      the attention of the real instances, a constant).

    Raises:
      ValueError: If a shape does not fit.

    Example:
      >>> query, key = jnp.zeros((1, 2, 1, 3)), jnp.ones((1, 4, 1, 3))  # no instance prefers any position
      >>> valid, real = jnp.array([[True, True, True, False]]), jnp.array([[True, False]])
      >>> value = key * jnp.arange(4.0)[:, None, None]
      >>> attended, weights = instance_attention(query, key, value, valid=valid, real=real)
      >>> print(attended[0, 0, 0], weights[0, 0].round(3))
      [1. 1. 1.] [0.333 0.333 0.333 0.   ]

    References:
      Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021, arXiv 2110.12724.
      Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, section 3.2.
    """
    batch, count, heads, channels = jnp.shape(query)
    positions = jnp.shape(key)[1]
    wanted = {
        "key": (key, (batch, positions, heads, channels)),
        "value": (value, (batch, positions, heads, channels)),
        "valid": (valid, (batch, positions)),
        "real": (real, (batch, count)),
    }
    for name, (array, shape) in wanted.items():
        if jnp.shape(array) != shape:
            raise ValueError(f"with a query of {jnp.shape(query)}, {name} must be {shape}, got {jnp.shape(array)}")

    @jax.checkpoint
    def of_head(head: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v = widened(*head)
        scores = einsum("bqd,bnd->bqn", q * channels**-0.5, k)
        # The lowest number, not -inf: a map without a valid position has no NaN.
        scores = jnp.where(valid[:, None], scores, np.finfo(scores.dtype).min)
        attention = jnp.where(valid[:, None], jax.nn.softmax(scores, axis=-1), 0)
        weights = jnp.sum(jnp.where(real[..., None], jax.lax.stop_gradient(attention), 0), axis=1)
        return einsum("bqn,bnd->bqd", attention, v), weights

    attended, weights = jax.lax.map(of_head, tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value)))
    return jnp.moveaxis(attended, 0, 2), jnp.moveaxis(weights, 0, 1)


def icd(student: Array, teacher: Array, weights: Array, *, eps: float = 1e-5) -> Array:
    """Squared difference of two maps of values, where instances look, as a mean over heads and channels.

    Values are normalised over the channels of a head first: mean 0, variance 1. A head's difference is the mean over
    positions by `weights`; 0 where these are 0 throughout, as they are without a real instance. The teacher's values
    and the weights are constants.

    Args:
      student: [B, N, heads, d], any float dtype; computed in float32, or float64 where an input is.
      teacher: Same shape.
      weights: [B, heads, N], 0 or more, of `instance_attention`.
      eps: Added to the variance over the d channels.

    Returns:
      [B], no unit: values are normalised.

    Raises:
      ValueError: If a shape does not fit.

    Example:
      >>> student, teacher = jnp.array([1.0, -1.0]), jnp.array([-1.0, 1.0])  # at the second of two positions
      >>> values = (jnp.stack([teacher, x]).reshape(1, 2, 1, 2) for x in (student, teacher))
      >>> print(f"{icd(*values, jnp.array([[[1.0, 3.0]]]))[0]:.3f}")  # 3/4 of a squared difference of 4
      3.000

    References:
      Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021, arXiv 2110.12724;
      the form of the authors' PyTorch release.
    """
    shape = jnp.shape(student)
    if len(shape) != 4 or jnp.shape(teacher) != shape or jnp.shape(weights) != (shape[0], shape[2], shape[1]):
        raise ValueError(
            "student and teacher must be of one shape [B, N, heads, d] and weights of [B, heads, N], got "
            f"{shape}, {jnp.shape(teacher)} and {jnp.shape(weights)}"
        )
    student, teacher, weights = widened(student, *jax.lax.stop_gradient((teacher, weights)))
    difference = jnp.mean(jnp.square(_normalised(student, eps) - _normalised(teacher, eps)), axis=-1)
    total = jnp.sum(difference * jnp.swapaxes(weights, 1, 2), axis=1)
    return jnp.mean(total / jnp.maximum(jnp.sum(weights, axis=2), 1e-6), axis=1)


def icd_auxiliary(outputs: Array, distances: Array, real: Array) -> tuple[Array, Array]:
    """The task from which ICD's attention is learned: which instances are real, and where their sides are.

    Args:
      outputs: [B, Q, 5] of the decoder, any float dtype; computed in float32, or float64 where an input is: the logit
        of being real, then the logits of the distances.
      distances: [B, Q, 4] from a point within each box to its left, top, right and bottom side, 0 to 1: fractions of
        the image's width, height, width and height.
      real: [B, Q] bool, what is there and not made up.

    Returns:
      (identification, localisation), both [B, Q]: binary cross-entropy, in nats; the sum over the four sides of
      |predicted - true distance| over the box's own side, to be counted where instances are real.

    Raises:
      ValueError: If a shape does not fit.

    Example:
      >>> outputs = jnp.zeros((1, 1, 5))  # even odds, all distances 1/2
      >>> identification, localisation = icd_auxiliary(
      ...     outputs, jnp.array([[[0.5, 0.25, 0.5, 0.25]]]), jnp.array([[True]])
      ... )
      >>> print(identification, localisation)
      [[0.6931472]] [[1.]]

    References:
      Kang et al., arXiv 2110.12724, and the authors' PyTorch release.
    """
    shape = jnp.shape(real)
    if jnp.shape(outputs) != (*shape, 5) or jnp.shape(distances) != (*shape, 4):
        raise ValueError(
            f"with real of {shape}, outputs must be {(*shape, 5)} and distances {(*shape, 4)}, got "
            f"{jnp.shape(outputs)} and {jnp.shape(distances)}"
        )
    outputs, distances = widened(outputs, jax.lax.stop_gradient(distances))
    logits, predicted = outputs[..., 0], jax.nn.sigmoid(outputs[..., 1:])
    sides = jnp.maximum(distances + jnp.roll(distances, 2, axis=-1), 1e-7)
    identification = jax.nn.softplus(logits) - jnp.where(real, logits, 0)
    return identification, jnp.sum(jnp.abs(predicted - distances) / sides, axis=-1)


def _normalised(x: Array, eps: float) -> Array:
    """Mean 0 and variance 1 over the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
