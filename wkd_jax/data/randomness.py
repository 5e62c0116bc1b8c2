"""The random numbers of one example, on the host: a pure function of seed, epoch and the example's position.

So an example looks the same whatever process or worker reads it, in whatever order, before and after a restart. The
bits are hashes, which no library will ever change, and which cost a tenth of seeding a generator of NumPy's.
"""

from __future__ import annotations

import hashlib
import math
import struct

_PLACE = struct.Struct("<4Q")
_WORDS = struct.Struct("<8Q")
_LIMIT = 2**64


class Random:
    """An endless stream of random numbers, uniform and independent, of its own for every (seed, epoch, index).

    The bits are the BLAKE2b (RFC 7693) hashes of seed, epoch, index and a counter, 64-bit words in little-endian order;
    each gives eight words, taken from the last to the first.

    Args:
      seed: Of the run.
      epoch: 0-based.
      index: Position of the example in its data set.

    Raises:
      ValueError: If one of them is not in 0..2^64 - 1.

    Example:
      >>> random = Random(seed=0, epoch=3, index=1500)
      >>> random.uniform(), random.uniform(1.0, 2.0), random.integer(10), random.coin()
      (0.3417608198977026, 1.4290080279054798, 6, True)
    """

    __slots__ = ("_hashes", "_place", "_words")

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        if not (0 <= seed < _LIMIT and 0 <= epoch < _LIMIT and 0 <= index < _LIMIT):
            raise ValueError(f"seed={seed}, epoch={epoch}, index={index}: each must be in 0..2^64 - 1")
        self._place = seed, epoch, index
        self._hashes = 0
        self._words: list[int] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A multiple of 2^-53 in [0, 1), scaled to [low, high)."""
        return low + (high - low) * ((self._word() >> 11) * 2.0**-53)

    def integer(self, n: int) -> int:
        """One of 0..n - 1; n must be in 1..2^53 (above, some are noticeably more likely than others)."""
        if not 1 <= n <= 2**53:
            raise ValueError(f"n={n}: must be in 1..2^53")
        return self._word() * n >> 64

    def normal(self, mean: float = 0.0, std: float = 1.0) -> float:
        """Of the normal distribution (Box and Muller's way: two uniform numbers, one result)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return mean + std * radius * math.cos(2.0 * math.pi * self.uniform())

    def coin(self, p: float = 0.5) -> bool:
        """True with probability `p`."""
        return self.uniform() < p

    def _word(self) -> int:
        """The next 64 bits."""
        if not self._words:
            self._words.extend(_WORDS.unpack(hashlib.blake2b(_PLACE.pack(*self._place, self._hashes)).digest()))
            self._hashes += 1
        return self._words.pop()
