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
    "warmup": 0,  # epochs over which the weight rises linearly to its full value; 0: none
}


def check(method: str, base: float, schedule: Mapping[str, Any], epochs: int) -> None:
    """Refuses, when a method is built, a weight that is negative, or a schedule that does not exist or is 0 throughout.

    Raises:
      ValueError: Names the config's key.
    """
    if base < 0:
        raise ValueError(f"methods.{method}.weight={base}: must be 0 or more; a negative weight drives the two apart")
    if schedule["name"] not in ("constant", "cosine"):
        known = registry.unknown("schedule", schedule["name"], ["constant", "cosine"])
        raise ValueError(f"methods.{method}.schedule.name: {known}")
    if not 0 <= schedule["start"] < max(epochs, 1):
        raise ValueError(
            f"methods.{method}.schedule.start={schedule['start']}: must be from 0 to below the run's epochs, {epochs}"
        )
    if schedule["name"] == "constant" and schedule["start"]:
        raise ValueError(
            f"methods.{method}.schedule.start={schedule['start']}: belongs to 'cosine'; leave it at 0, or set "
            f"methods.{method}.schedule.name to 'cosine'"
        )
    if schedule["warmup"] < 0:
        raise ValueError(f"methods.{method}.schedule.warmup={schedule['warmup']}: must be 0 or more epochs")
    if schedule["name"] == "cosine" and epochs == 1:
        raise ValueError(
            f"methods.{method}.schedule.name='cosine' ends at 0 in the last epoch, and this run has only one: train "
            "longer, or set it to 'constant'"
        )


def weight(base: float, schedule: Mapping[str, Any], progress: Progress) -> Array:
    """The weight of a loss term at this point of the run.

    "cosine" is the released WKD code's decay: the full weight up to and including epoch `start`, then
    base / 2 * (1 + cos(pi (e - start) / (epochs - start))) with the 1-based epoch e, constant within an epoch and 0
    in the last one. The paper does not mention it. `warmup` multiplies either by min(e / warmup, 1), as DKD and
    ReviewKD do.

    Returns:
      float32 scalar.
    """
    if schedule["warmup"]:
        base = base * jnp.minimum(progress.epoch / schedule["warmup"], 1)
    if schedule["name"] == "constant":
        return jnp.asarray(base, jnp.float32)
    start = schedule["start"]
    done = (progress.epoch - start) / jnp.maximum(progress.epochs - start, 1)
    return jnp.asarray(base * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))), jnp.float32)
