"""A 32-bit fingerprint of an array's bits, on the device and on the host: two programs for one formula.

The sum over the array's words of `_mix(word, position)`, modulo 2**32. A sum, so that a sharded array needs no
gathering and every sharding gives the same number. `_mix` is one-to-one in the word, so one changed word always
shows; several changed words hide with probability 2**-32. Not made against forgery.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1 << 16  # words at a time on the host: they stay in the processor's cache


@jax.jit
def on_device(array: jax.Array) -> jax.Array:
    """Fingerprint, a uint32 scalar, of an array of any shape, numeric dtype and sharding.

    Example:
      >>> int(on_device(jnp.float32([1, 2]))) == on_host(np.float32([1, 2]))
      True
      >>> int(on_device(jnp.float32([2, 1]))) == on_host(np.float32([1, 2]))
      False
    """
    words = jnp.atleast_1d(array).view(_word(array.dtype)).astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
    return jnp.sum(_mix(words, position), dtype=jnp.uint32)


def on_host(array: np.ndarray) -> int:
    """The same number as `on_device`, with NumPy alone."""
    words = np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype))
    total = 0
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        position = np.arange(start, start + block.size).astype(np.uint32)
        total += int(np.sum(_mix(block, position), dtype=np.uint32))
    return total % 2**32


def _word(dtype: Any) -> str:
    return f"uint{8 * min(4, np.dtype(dtype).itemsize)}"


def _mix(words: Any, position: Any) -> Any:
    """Word and position to 32 scattered bits: multiplicative hashing, then the finalizer of MurmurHash3 (Appleby)."""
    x = words ^ (position * np.uint32(0x9E3779B1))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
