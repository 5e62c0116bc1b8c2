"""Augmentation of small images on the device: pure, traced inside the train step, on whole (global) sharded batches.

Each example's randomness comes from its own key, `fold_in(key, index)`, so its pixels depend neither on its row nor on
the layout of the batch over devices. An example that is twice in one batch (where an epoch ends) is augmented alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wkd_jax.types import Array


def augment(images: Array, index: Array, key: Array, *, pad: int, flip: bool) -> Array:
    """Pads with black, crops back at a random position, and flips left-right with probability 0.5.

    The recipe of the CIFAR literature: the padding is black pixels, put on before normalisation.

    Args:
      images: [B, H, W, 3] uint8.
      index: [B] integers, the examples' positions in their data set.
      key: Typed PRNG key of this step.
      pad: Pixels on each side; crops start uniformly in {0..2 * pad}^2. 0: no crop.
      flip: Whether to flip at random.

    Returns:
      [B, H, W, 3] uint8.

    Raises:
      ValueError: If `images` are not uint8, or `pad` is negative.

    Example:
      >>> images = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.uint8).reshape(2, 4, 4, 3)
      >>> augment(images, jnp.array([7, 3]), jax.random.key(0), pad=1, flip=True).shape
      (2, 4, 4, 3)
    """
    _check_uint8(images)
    if pad < 0:
        raise ValueError(f"pad={pad}: must be 0 or more pixels")

    def one(image: Array, index: Array) -> Array:
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, index))
        if pad:
            row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
            image = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = jax.lax.dynamic_slice(image, (row, column, 0), images.shape[1:])
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, index)


def normalise(images: Array, mean: ArrayLike, std: ArrayLike, dtype: jnp.dtype = jnp.float32) -> Array:
    """`(images / 255 - mean) / std`, computed in float32.

    Args:
      images: [..., 3] uint8.
      mean: [3], per channel, of `images / 255`.
      std: [3], likewise.
      dtype: Of the result.

    Returns:
      Of `images`' shape.

    Raises:
      ValueError: If `images` are not uint8 (they may have been normalised already).

    Example:
      >>> normalise(jnp.array([[0, 255, 255]], jnp.uint8), (0.0, 0.0, 0.5), (1.0, 0.5, 0.25))
      Array([[0., 2., 2.]], dtype=float32)
    """
    _check_uint8(images)
    scaled = images.astype(jnp.float32) / 255
    return ((scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)


def _check_uint8(images: Array) -> None:
    if images.dtype != jnp.uint8:
        raise ValueError(f"images: need uint8 as loaded, got {images.dtype}")
