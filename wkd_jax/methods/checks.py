"""What methods refuse in their settings when they are built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wkd_jax import registry


def positive(method: str, config: Mapping[str, Any], *keys: str) -> None:
    """Raises ValueError, naming the config's key, where a setting is not above 0."""
    for key in keys:
        if not config[key] > 0:
            raise ValueError(f"methods.{method}.{key}={config[key]}: must be above 0")


def not_negative(method: str, config: Mapping[str, Any], *keys: str) -> None:
    """Raises ValueError, naming the config's key, where a setting is below 0."""
    for key in keys:
        if not config[key] >= 0:
            raise ValueError(f"methods.{method}.{key}={config[key]}: must be 0 or more")


def one_of(method: str, config: Mapping[str, Any], key: str, valid: Iterable[str]) -> None:
    """Raises ValueError, naming the config's key, the nearest valid value and all of them."""
    valid = list(valid)
    if config[key] not in valid:
        raise ValueError(f"methods.{method}.{key}: {registry.unknown('value', config[key], valid)}")


def groups(method: str, config: Mapping[str, Any], batch_size: int) -> None:
    """Raises ValueError where `group_size` (0: the whole batch) does not cut a (micro)batch evenly."""
    size = config["group_size"]
    if size < 0 or (size and batch_size % size):
        raise ValueError(
            f"methods.{method}.group_size={size}: must be 0 (the whole batch) or divide the {batch_size} examples of a "
            "(micro)batch"
        )
