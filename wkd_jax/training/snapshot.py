"""One checkpoint on disk: a folder with named arrays, their fingerprints and a record. The only file that knows Orbax.

Written with the free functions of Orbax's v1 API, which becomes the package's top level with 1.0. Its
`training.Checkpointer` is not used: it numbers, ranks and deletes steps by what is on disk, and a damaged newest step
would then block the saving of the steps that follow the one resumed from, or push whole ones out of the last ones
kept. `wkd_jax.training.checkpoint` does that part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from wkd_jax.training import fingerprint

TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix of a folder that is being written
_STATE, _RECORD = "state", "record"
# What TensorStore says when the trouble is not in the files.
_NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class DamagedError(Exception):
    """The folder is not what was written there. The message says what is wrong."""


class Spec(NamedTuple):
    """Shape and dtype of an array, as JSON has them."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: Any) -> Spec:
        """Of anything with `shape` and `dtype`."""
        return cls(tuple(array.shape), str(array.dtype))


@dataclasses.dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself.

    Attributes:
      metric: By which it is ranked; None if it has none.
      specs: Of every array, by name.
      fingerprints: Of every array, by name.
      record: What the run stored beside the arrays.
    """

    metric: float | None
    specs: dict[str, Spec]
    fingerprints: dict[str, int]
    record: dict[str, Any]


def start_saving(
    path: pathlib.Path, arrays: dict[str, jax.Array], record: dict[str, Any], metric: float | None
) -> ocp.AsyncResponse:
    """Copies the arrays to the host and starts to write them. `result()` of what it returns waits for the end.

    The folder appears under its name when it is complete. Failures of the writing are raised by `result()`.

    Raises:
      TypeError: If something is not an array of numbers, or the record holds what JSON has not.
      ValueError: If an array is empty.
      OSError: If the folder cannot be made.
    """
    for name, array in arrays.items():
        if not isinstance(array, jax.Array) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(f"cannot save {name}: it is {type(array).__name__}, not a jax.Array of numbers")
        if array.size == 0:
            raise ValueError(f"cannot save {name}: it is empty, shape {array.shape}")
    prints = jax.device_get({name: fingerprint.on_device(array) for name, array in arrays.items()})
    content = {
        "metric": metric,
        "specs": {name: Spec.of(array) for name, array in arrays.items()},
        "fingerprints": {name: int(value) for name, value in prints.items()},
        "record": record,
    }
    text = json.dumps(content)
    sealed = {"content": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    # Orbax fetches the arrays implicitly, which a loop that forbids that to its own code must not forbid here.
    try:
        with _context(), jax.transfer_guard("allow"):
            return ocp.save_checkpointables_async(path, {_STATE: arrays, _RECORD: sealed})
    except Exception as error:  # the arrays are fine, so it is the disk, in Orbax's or TensorStore's words
        raise OSError(f"{path} could not be written: {root_cause(error)}") from error


def read_header(path: pathlib.Path) -> Header:
    """Reads what a checkpoint says about itself.

    Raises:
      DamagedError: If it cannot be read or was altered.
      OSError: If the trouble is not in the files: permission, memory, a file server that does not answer.
    """
    sealed = _read(path, _RECORD, None)
    try:
        text = sealed["content"]
        intact = hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path / _RECORD} has no sealed content ({root_cause(error)})") from error
    if not intact:
        raise DamagedError(f"{path / _RECORD} is not as it was written: its SHA-256 differs")
    content = json.loads(text)
    specs = {name: Spec(tuple(shape), dtype) for name, (shape, dtype) in content["specs"].items()}
    return Header(content["metric"], specs, content["fingerprints"], content["record"])


def read_arrays(path: pathlib.Path, header: Header, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays into host memory and compares each with its fingerprint.

    Args:
      path: The checkpoint.
      header: Its header.
      names: Which arrays; None for all.

    Raises:
      DamagedError: If one cannot be read, or is not as it was saved.
      OSError: As `read_header`.
    """
    specs = header.specs if names is None else {name: header.specs[name] for name in names}
    # A broadcast zero has shape and dtype, as Orbax asks, and takes no memory.
    abstract = {name: np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape) for name, (shape, dtype) in specs.items()}
    arrays = _read(path, _STATE, abstract)
    wrong = [
        name
        for name, spec in specs.items()
        if Spec.of(arrays[name]) != spec or fingerprint.on_host(arrays[name]) != header.fingerprints[name]
    ]
    if wrong:
        raise DamagedError(f"{len(wrong)} of {len(specs)} arrays in {path} are not as they were saved: {some(wrong)}")
    return arrays


def root_cause(error: BaseException) -> str:
    """What went wrong at first: Orbax wraps it in errors about other things."""
    root = _root(error)
    return f"{type(root).__name__}: {' '.join(str(root).split())[:400]}"


def some(names: list[str]) -> str:
    """The first few names, and how many more there are.

    Example:
      >>> some(["a", "b"]), some(list("abcdefg"))
      ('a, b', 'a, b, c, d, e and 2 more')
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _context(*, alone: bool = False) -> ocp.Context:
    """Orbax's settings. `alone`: this process reads by itself, without waiting for the others."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_RECORD)
    context.checkpointables.registry = registry
    # By default folders are made in the background, and a save that fails at once leaves threads waiting for them,
    # which keep the process from ending for many minutes.
    context.asynchronous.create_directories_asynchronously = False
    context.pytree.loading.partial_load = True
    if alone:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
    return context


def _read(path: pathlib.Path, part: str, abstract: Any) -> Any:
    try:
        with _context(alone=True):
            return ocp.load_checkpointables(path, {part: abstract})[part]
    except Exception as error:  # whatever a decoder raises on broken bytes
        root = _root(error)
        if isinstance(root, (PermissionError, MemoryError)) or str(root).startswith(_NOT_DAMAGE):
            raise OSError(f"{path / part} could not be read, damaged or not: {root_cause(error)}") from error
        raise DamagedError(f"{path / part} cannot be read: {root_cause(error)}") from error


def _root(error: BaseException) -> BaseException:
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error
