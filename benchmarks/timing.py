"""What the benchmarks share: variants timed in turns, their ratios, and what the numbers depend on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, *, settle: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, by variant. Variants take turns, so that what slows the machine for a while slows all.

    Args:
      variants: Functions that return once their work is done on the device.
      rounds: Timed calls of each.
      settle: Whether an untimed call precedes each timed one, which then meets its own caches and not its neighbour's.
        Matters for what takes milliseconds. All are called once before the first round in any case.
    """
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        # Every other round backwards: what follows a heavy neighbour in one round precedes it in the next.
        order = list(variants.items())[:: -1 if number % 2 else 1]
        for name, run in order:
            if settle:
                run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: Sequence[float], reference: Sequence[float] | None = None) -> dict[str, Any]:
    """Median, quartiles and smallest in milliseconds; median and quartiles of the ratio to `reference` round by round.

    Example:
      >>> summary([0.002, 0.004, 0.006], [0.001, 0.002, 0.003])["ratio"]
      2.0
    """
    low, median, high = (1e3 * float(x) for x in np.percentile(times, [25, 50, 75]))
    row: dict[str, Any] = {"median_ms": median, "quartiles_ms": [low, high], "min_ms": 1e3 * min(times)}
    if reference is not None:
        # Of each round, so that what slows a whole round cancels.
        low, median, high = (float(x) for x in np.percentile(np.divide(times, reference), [25, 50, 75]))
        row |= {"ratio": median, "ratio_quartiles": [low, high]}
    return row


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers depend on: processor, device, load, versions of Python, JAX, NumPy and of `packages`."""
    import jax

    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "numpy", *packages)},
    }


def write(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a report as JSON and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
