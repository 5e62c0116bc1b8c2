"""A file of weights as a flat dict of arrays, whatever wrote it: PyTorch, safetensors, Google's .npz, or ourselves."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file

from wkd_jax.weights import google, torch_file
from wkd_jax.weights.errors import WeightsError

# Where training scripts put the state dict, the wanted one first: an average of weights before the last ones.
ENTRIES = ("state_dict_ema", "state_dict", "model_ema", "model")
# What state dicts hold besides weights: counters, and tables that follow from the architecture.
BUFFERS = ("num_batches_tracked", "relative_position_index", "attn_mask")


@dataclasses.dataclass(frozen=True)
class State:
    """What a file holds.

    Attributes:
      arrays: By the file's own keys, without `BUFFERS`.
      metadata: Of a safetensors file; empty for others.
      notes: What a reader should know, a sentence each: which of several state dicts was read.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str]) -> State:
    """Reads a file by its content; its name does not matter. Nothing in the file is run.

    Raises:
      WeightsError: If it is of an unknown kind or damaged, or holds anything but arrays and plain containers.
      OSError: If it cannot be opened.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" and _is_npz(path):
        return State(_read_npz(path))
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    return _state_dict(torch_file.read(path), path)


def _state_dict(tree: Any, path: pathlib.Path) -> State:
    """The state dict within what a training script saved."""
    if not isinstance(tree, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(tree).__name__}, not a dict of arrays: save the model's state_dict()"
        )
    found = [key for key in ENTRIES if isinstance(tree.get(key), Mapping)]
    notes = [f"read {found[0]!r} of the file"] if found else []
    if others := found[1:]:
        notes[0] += f", which also holds {', '.join(map(repr, others))}"
    arrays = dict(tree[found[0]] if found else tree)
    wrong = [key for key, value in arrays.items() if not isinstance(value, np.ndarray | np.generic)]
    if wrong or not arrays:
        what = f"{wrong[0]!r} is a {type(arrays[wrong[0]]).__name__}" if wrong else "it is empty"
        raise WeightsError(
            f"{path}: has no state dict at the top or under {', '.join(ENTRIES)} ({what}): save a dict of arrays alone"
        )
    kept = {str(key): np.asarray(value) for key, value in arrays.items() if not str(key).endswith(BUFFERS)}
    return State(kept, notes=tuple(notes))


def _read_safetensors(path: pathlib.Path) -> State:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        arrays = load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: is a damaged safetensors file ({error}): get it again") from error
    return State({key: value for key, value in arrays.items() if not key.endswith(BUFFERS)}, metadata)


def _is_npz(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path}: is a damaged or incomplete zip archive ({error}): get it again") from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; those of a Google ViT in timm's keys."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(f"{path}: {info.filename} is compressed: save the arrays with numpy.savez")
                arrays[info.filename.removesuffix(".npy")] = _read_npy(archive.read(info))
    except WeightsError:
        raise
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError, OSError, RuntimeError) as error:
        raise WeightsError(f"{path}: is not a plain .npz file of arrays ({error})") from error
    return google.to_timm(arrays) if google.is_google(arrays) else arrays


def _read_npy(data: bytes) -> np.ndarray:
    """One .npy file in memory. The array is a view of `data`, so a header that lies cannot make memory."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    return np.ndarray(shape, dtype, data, stream.tell(), order="F" if fortran else "C")
