"""Weights of loss terms over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from wkd_jax import registry
from wkd_jax.types import Array, Progress

DEFAULTS: dict[str, Any] = {
    "name": "constant",  # constant or cosine
    "start": 0,  # cosine: the last epoch with the full weight
}


def check(schedule: Mapping[str, Any]) -> None:
    """Raises ValueError, when a method is built, for a schedule that does not exist."""
    if schedule["name"] not in ("constant", "cosine"):
        raise ValueError(registry.unknown("schedule", schedule["name"], ["constant", "cosine"]))
    if schedule["start"] < 0:
        raise ValueError(f"schedule.start={schedule['start']}: must be 0 or more")


def weight(base: float, schedule: Mapping[str, Any], progress: Progress) -> Array:
    """The weight of a loss term at this point of the run.

    "cosine" is the released WKD code's decay: the full weight up to and including epoch `start`, then
    base / 2 * (1 + cos(pi (e - start) / (epochs - start))) with the 1-based epoch e, constant within an epoch and 0
    in the last one. The paper does not mention it.

    Returns:
      float32 scalar.
    """
    if schedule["name"] == "constant":
        return jnp.asarray(base, jnp.float32)
    start = schedule["start"]
    done = (progress.epoch - start) / jnp.maximum(progress.epochs - start, 1)
    return jnp.asarray(base * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))), jnp.float32)
