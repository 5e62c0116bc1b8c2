"""A file of weights as a flat dict of arrays, whatever wrote it: PyTorch, safetensors, Google's .npz, or ourselves."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file

from wkd_jax.weights import detectron, google, torch_file
from wkd_jax.weights.errors import WeightsError

# Where training scripts put the state dict, the wanted one first: an average of weights before the last ones.
ENTRIES = ("state_dict_ema", "state_dict", "model_ema", "model", "net", "blobs")
_SAFETENSORS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}  # what NumPy has
# What state dicts hold besides weights: counters, and tables that follow from the architecture or the config.
BUFFERS = ("num_batches_tracked", "relative_position_index", "attn_mask", "pixel_mean", "pixel_std")
_NOT_WEIGHTS = re.compile(rf"(?:^|\.)({'|'.join(BUFFERS)}|anchor_generator\.cell_anchors)(?:\.\d+)?$")


@dataclasses.dataclass(frozen=True)
class State:
    """What a file holds.

    Attributes:
      arrays: By the file's own keys, without what is no weight.
      metadata: Of a safetensors file; empty for others.
      notes: What a reader should know, a sentence each: which of several state dicts was read, what was left out.
      buffers: What is no weight, by the file's own keys.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    buffers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> State:
    """Reads a file by its content; its name does not matter. Nothing in the file is run.

    Raises:
      WeightsError: If it is of an unknown kind or damaged, or holds anything but arrays and plain containers.
      OSError: If it cannot be opened.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[:2] == b"PK" and _is_npz(path):
            found = State(_read_npz(path))
        elif len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            found = _read_safetensors(path)
        else:
            found = _state_dict(torch_file.read(path), path)
    except (WeightsError, OSError):
        raise
    except Exception as error:  # whatever parsers of other people raise on broken bytes
        raise WeightsError(f"{path}: is damaged ({type(error).__name__}: {error}): get it again") from error
    buffers = {key: value for key, value in found.arrays.items() if _NOT_WEIGHTS.search(key)}
    kept = {key: value for key, value in found.arrays.items() if key not in buffers}
    if not kept:
        raise WeightsError(f"{path}: holds no weights: save a network's state_dict()")
    left_out = collections.Counter(_NOT_WEIGHTS.search(key)[1] for key in buffers)  # type: ignore[index]
    notes = [*found.notes]
    if left_out:
        notes.append("left out what is no weight: " + ", ".join(f"{name} ({n})" for name, n in left_out.items()))
    if detectron.is_caffe2(kept):
        kept, others = detectron.from_caffe2(kept)
        notes.append(f"read Caffe2's names and left out {', '.join(others[:4])}{' and so on' * (len(others) > 4)}")
    return dataclasses.replace(found, arrays=kept, notes=tuple(notes), buffers=buffers)


def _state_dict(tree: Any, path: pathlib.Path) -> State:
    """The state dict within what a training script saved."""
    if not isinstance(tree, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(tree).__name__}, not a dict of arrays: save the model's state_dict()"
        )
    notes = []
    while found := [key for key in ENTRIES if isinstance(tree.get(key), Mapping)]:
        also = f", which also holds {', '.join(map(repr, found[1:]))}" if found[1:] else ""
        notes.append(f"read {found[0]!r} of the file{also}")
        tree = tree[found[0]]
    arrays = dict(tree)
    wrong = [key for key, value in arrays.items() if not isinstance(value, np.ndarray | np.generic)]
    if wrong or not arrays:
        what = f"{wrong[0]!r} is a {type(arrays[wrong[0]]).__name__}" if wrong else "it is empty"
        raise WeightsError(
            f"{path}: has no state dict at the top or under {', '.join(ENTRIES)} ({what}): save a dict of arrays alone"
        )
    return State({str(key): np.asarray(value) for key, value in arrays.items()}, notes=tuple(notes))


def _read_safetensors(path: pathlib.Path) -> State:
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  (it is no dict)
    if unread := sorted(kinds - _SAFETENSORS):
        raise WeightsError(f"{path}: has arrays of {', '.join(unread)}: save them as F32, F16 or BF16")
    return State(load_file(path), metadata)


def _is_npz(path: pathlib.Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; those of a Google ViT in timm's keys."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise WeightsError(f"{path}: {info.filename} is compressed: save the arrays with numpy.savez")
            arrays[info.filename.removesuffix(".npy")] = _read_npy(archive.read(info))
    return google.to_timm(arrays) if google.is_google(arrays) else arrays


def _read_npy(data: bytes) -> np.ndarray:
    """One .npy file in memory. The array is a view of `data`, so a header that lies cannot make memory."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.kind not in "fiub":
        raise ValueError(f"it holds {'Python objects' if dtype.hasobject else dtype}, not numbers, which are not read")
    if min(shape, default=0) < 0:
        raise ValueError(f"an array in it says shape {shape}")
    return np.ndarray(shape, dtype, data, stream.tell(), order="F" if fortran else "C")
