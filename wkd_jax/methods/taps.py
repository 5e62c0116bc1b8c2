"""Taps by the names that configs use."""

from __future__ import annotations

from wkd_jax import registry
from wkd_jax.types import ModelInfo, Tap


def find_tap(info: ModelInfo, name: str, key: str) -> tuple[str, Tap]:
    """A tap by name ("last" is the last one).

    Raises:
      ValueError: If the model has no such tap; names the config key, the nearest tap and all of them.
    """
    name = info.last_tap if name == "last" else name
    if name not in info.taps:
        raise ValueError(f"{key}: {registry.unknown(f'tap of {info.name}', name, ['last', *info.taps])}")
    return name, info.taps[name]
