"""Attention transfer: where in a map the energy is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import widened

Array = jax.Array

_EPS = 1e-12  # the smallest norm that an attention vector is divided by


def attention_transfer(student_map: Array, target_map: Array) -> Array:
    """Mean squared difference of attention: each position's energy, normalised over the positions of an example.

    v(F) is mean_d F^2 at each position, as one vector divided by max(its L2 norm, 1e-12). The loss is the mean over
    positions of (v(student) - v(target))^2: small numbers, hence weights of about 100. The number of channels need not
    agree.

    Args:
      student_map: [B, H, W, D], any float dtype; computed in float32, or float64 where an input is.
      target_map: [B, H, W, D'], constants.

    Returns:
      [B], without unit, at most 2 / (H W).

    Raises:
      ValueError: If they are not maps of one B, H and W.

    Example:
      >>> x = jnp.array([[3.0, 1.0], [0.0, 1.0]]).reshape(2, 1, 2, 1)
      >>> print(attention_transfer(x, -2.0 * x), attention_transfer(x[1:], x[1:, :, ::-1]))
      [0. 0.] [1.]

    References:
      Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928; in this form, Ji et
      al., "Refine Myself by Teaching Myself", CVPR 2021, arXiv 2103.08273.
    """
    shapes = jnp.shape(student_map), jnp.shape(target_map)
    if any(len(shape) != 4 for shape in shapes) or shapes[0][:3] != shapes[1][:3]:
        raise ValueError(f"needs two maps [B, H, W, D] of one B, H and W, got {shapes[0]} and {shapes[1]}")
    student, target = (_attention(x) for x in widened(student_map, jax.lax.stop_gradient(target_map)))
    return jnp.mean(jnp.square(student - target), axis=-1)


def _attention(x: Array) -> Array:
    """[B, H W] energies of a map, divided by their norm; the norm's derivative at 0 is taken as 0."""
    energy = jnp.mean(jnp.square(x), axis=-1).reshape(x.shape[0], -1)
    squared = jnp.sum(jnp.square(energy), axis=-1, keepdims=True)
    tiny = squared <= _EPS**2
    return energy / jnp.where(tiny, _EPS, jnp.sqrt(jnp.where(tiny, 1, squared)))
