"""Several processes, one a host: start them together, let one act for all, and fail together.

Everything here works alike with one process. All processes have to call a function of this file in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_KINDS: dict[str, type[Exception]] = {"OSError": OSError, "ValueError": ValueError}
HEARTBEAT_SECONDS = 30  # after so long without a sign of life a process counts as lost, and the others stop


def initialize() -> None:
    """Joins the other processes of this run. To be called before anything asks for a device.

    On Cloud TPU, GKE and SLURM the environment says who they are; elsewhere JAX_COORDINATOR_ADDRESS ("host:port" of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do, as `launch/local.sh` sets them.

    Raises:
      ValueError: If neither says it, or what they say is not complete.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given and len(given) < len(names):
        raise ValueError(f"--distributed: {', '.join(given)} set, {', '.join(set(names) - given.keys())} not")
    try:
        numbers = [int(given[name]) for name in names[1:]] if given else [None, None]
        jax.distributed.initialize(given.get(names[0]), *numbers, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: the processes of this run did not find each other ({error}). Set {', '.join(names)}, or "
            "start them with launch/; leave --distributed out for one process"
        ) from error
    gather("ready")  # on CPU the first exchange fails if it comes when the processes are far apart


def first(act: Callable[[], Any]) -> Any:
    """What `act` returns on process 0, on every process. If it raises a ValueError or OSError, every process does.

    Args:
      act: Run by process 0 alone. Returns what JSON can hold.

    Raises:
      ValueError: As raised by `act`.
      OSError: Likewise.

    Example:
      >>> first(lambda: {"step": 3})
      {'step': 3}
    """
    if jax.process_count() == 1:
        return act()
    outcome = None
    if jax.process_index() == 0:
        try:
            outcome = {"result": act()}
        except (ValueError, OSError) as error:
            outcome = {"kind": _kind(error), "message": str(error)}
    outcome = _broadcast(outcome)
    if "kind" in outcome:
        raise _KINDS[outcome["kind"]](outcome["message"])
    return outcome["result"]


def everywhere(act: Callable[[], Any]) -> Any:
    """What `act` returns on this process, once it has gone well on all of them.

    A process that fails while the others go on leaves them waiting for it; this makes all of them fail.

    Raises:
      ValueError: If `act` raised a ValueError or OSError on any process; names the first such process.
      OSError: Likewise.

    Example:
      >>> everywhere(lambda: 3)
      3
    """
    if jax.process_count() == 1:
        return act()
    result, problem = None, ""
    try:
        result = act()
    except (ValueError, OSError) as error:
        problem = f"{_kind(error)} {error}"
    for index, told in enumerate(gather(problem)):
        if told:
            kind, message = told.split(" ", 1)
            raise _KINDS[kind](f"process {index}: {message}")
    return result


def agree(what: str, value: str) -> None:
    """Refuses to go on where the processes differ.

    Args:
      what: Names the value, for the message.
      value: Of this process.

    Raises:
      ValueError: Names the first process whose value is not that of process 0, and both values.
    """
    values = gather(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"{what} differs between processes: process 0 has {values[0]}, process {index} has {other}. Give all "
                "of them the same files"
            )


def gather(text: str) -> list[str]:
    """The text of every process, by its index.

    Example:
      >>> gather("ready")
      ['ready']
    """
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    with jax.transfer_guard("allow"):
        sizes = np.ravel(multihost_utils.process_allgather(np.int32(encoded.size)))
        padded = np.zeros(max(1, sizes.max()), np.uint8)
        padded[: encoded.size] = encoded
        rows = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _kind(error: Exception) -> str:
    return "OSError" if isinstance(error, OSError) else "ValueError"


def _broadcast(value: Any) -> Any:
    """What JSON can hold, from process 0 to all."""
    return json.loads(gather(json.dumps(value) if jax.process_index() == 0 else "")[0])
