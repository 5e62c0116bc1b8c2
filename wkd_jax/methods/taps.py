"""Taps by the names that configs use, tokens as maps, and maps at other sizes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wkd_jax import registry
from wkd_jax.models import connectors
from wkd_jax.types import Array, ModelInfo, Tap


def find_tap(info: ModelInfo, name: str, key: str) -> tuple[str, Tap]:
    """A tap by name ("last" is the last one).

    Raises:
      ValueError: If the model has no such tap; names the config key, the nearest tap and all of them.
    """
    name = info.last_tap if name == "last" else name
    if name not in info.taps:
        raise ValueError(f"{key}: {registry.unknown(f'tap of {info.name}', name, ['last', *info.taps])}")
    return name, info.taps[name]


def as_map(tap: Tap) -> Tap:
    """What `map_of` makes of a tap: a map without its leading tokens.

    Example:
      >>> tap = as_map(Tap(192, 16, "tokens", signed=True, prefix_tokens=1))
      >>> tap.layout, tap.prefix_tokens
      ('NHWC', 0)
    """
    return dataclasses.replace(tap, layout="NHWC", prefix_tokens=0)


def map_of(x: Array, tap: Tap, image_size: tuple[int, int]) -> Array:
    """A tap's feature as a map [B, H, W, D]: tokens [B, N, D] without the leading ones, row by row; maps as they are.

    Args:
      x: The feature.
      tap: What the model publishes about it.
      image_size: (height, width) of the images, pixels.
    """
    if tap.layout == "NHWC":
        return x
    return x[:, tap.prefix_tokens :].reshape(x.shape[0], *connectors.spatial_size(tap, image_size), x.shape[-1])


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """[B, H, W, D] at another size: position i takes what is at floor(i * H / size), as torch's "nearest" does.

    (`jax.image.resize` takes the nearest to the middle, which is another one where a map shrinks.)

    Args:
      x: [B, H, W, D].
      size: (rows, columns) of the result.

    Returns:
      [B, *size, D].

    Example:
      >>> nearest(jnp.arange(4.0).reshape(1, 1, 4, 1), (1, 2)).ravel().tolist()
      [0.0, 2.0]
    """
    for axis, side in ((1, size[0]), (2, size[1])):
        now = x.shape[axis]
        if side % now == 0:
            x = jnp.repeat(x, side // now, axis=axis)  # a broadcast, whose derivative is a sum
        else:
            x = jnp.take(x, np.arange(side) * now // side, axis=axis)
    return x
