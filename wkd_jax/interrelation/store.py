"""Class similarities on disk: one .npz that says what it was computed from, or a released .npy distance matrix."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import secrets
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import wkd_jax

# What np.load raises for a file that is cut short or is something else.
_DAMAGED = (EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error)

# Distances are written in float32: what rounding leaves of a zero diagonal and of symmetry.
_ROUNDING = 1e-5

_AGAIN = "delete it and it is computed again"  # right of a run's directory and of the cache


@dataclasses.dataclass(frozen=True, eq=False)
class Interrelation:
    """A teacher's class similarity and where it comes from.

    Attributes:
      similarity: [C, C] float32, symmetric, 1 on the diagonal.
      class_names: C names.
      provenance: See `provenance`.
      structure: How much the matrix says, see `wkd_jax.evaluation.structure`; {} where nobody measured it.
    """

    similarity: np.ndarray
    class_names: tuple[str, ...]
    provenance: Mapping[str, Any]
    structure: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def provenance(
    *,
    teacher: str,
    weights_hash: str,
    data: str,
    data_fingerprint: str,
    num_classes: int,
    dtype: str,
    spec: Mapping[str, Any],
) -> dict[str, Any]:
    """The record that a file carries and that a run compares its own with.

    Args:
      teacher: Registered name of the model.
      weights_hash: `hash_arrays` of its arrays.
      data: Name of the data set; for people, not compared.
      data_fingerprint: Of the data set's content.
      num_classes: C.
      dtype: What the teacher computes in.
      spec: What `interrelation.similarity.relevant` gives.

    Returns:
      What JSON can hold; adds the package's version as "version", which is not compared either.
    """
    return {
        "teacher": teacher,
        "weights_hash": weights_hash,
        "data": data,
        "data_fingerprint": data_fingerprint,
        "num_classes": num_classes,
        "dtype": dtype,
        "spec": dict(spec),
        "version": wkd_jax.__version__,
    }


_FOR_PEOPLE = ("data", "version")


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what is compared of a provenance: records of one digest are of one content.

    Example:
      >>> digest({"teacher": "resnet20", "data": "digits"}) == digest({"teacher": "resnet20", "data": "a copy"})
      True
    """
    compared = {key: value for key, value in record.items() if key not in _FOR_PEOPLE}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def hash_arrays(arrays: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of the names: the same on every machine.

    Example:
      >>> x = np.arange(3, dtype=np.float32)
      >>> hash_arrays({"a": x, "b": 2 * x}) == hash_arrays({"b": 2 * x, "a": x})
      True
      >>> hash_arrays({"a": x})[:12]
      '68870ee78171'
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        digest.update(json.dumps([name, array.dtype.name, np.shape(arrays[name])]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(path: pathlib.Path, interrelation: Interrelation) -> None:
    """Writes the file so that a reader, or a run killed meanwhile, sees the old one or the whole new one.

    Raises:
      OSError: If it cannot be written; names the file.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                similarity=np.asarray(interrelation.similarity, np.float32),
                class_names=np.array(interrelation.class_names, dtype=np.str_),
                provenance=json.dumps(interrelation.provenance, sort_keys=True),
                structure=json.dumps(interrelation.structure, sort_keys=True),
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}. Free some space and run again") from error


def load(
    path: pathlib.Path,
    expected: Mapping[str, Any] | None = None,
    *,
    ignored: Sequence[str] = (),
    remedy: str = _AGAIN,
) -> Interrelation:
    """Reads what `save` wrote.

    Args:
      path: The .npz file.
      expected: This run's `provenance`. None: the file is taken as it is, whatever made it.
      ignored: Fields of it that are not compared.
      remedy: What messages tell the user to do.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged, or was made from something else than `expected`: names each field that
        differs, both values, and the remedy.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            similarity, names, record = file["similarity"], file["class_names"], json.loads(str(file["provenance"]))
            structure = json.loads(str(file.get("structure", "{}")))  # files of older versions
    except _DAMAGED as error:
        raise ValueError(
            f"{path} cannot be read as a class similarity ({error}): it is damaged or another kind of file; {remedy}"
        ) from error
    sound = similarity.shape == (len(names), len(names)) and np.isfinite(similarity).all()
    if not sound or not isinstance(record, dict) or not isinstance(structure, dict):
        raise ValueError(
            f"{path} is damaged: similarity {similarity.shape} of {len(names)} classes must be square and finite, with "
            f"a record of what it was made from; {remedy}"
        )
    if expected is not None:
        changed = _differences(record, {**expected, **{key: record.get(key) for key in ignored}})
        if changed:
            raise ValueError(
                f"{path} holds the class similarity of something else than this run: {'; '.join(changed)}. To go on, "
                f"{remedy}"
            )
    return Interrelation(similarity, tuple(str(name) for name in names), record, structure)


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields that differ, as "key: the file has this, this run has that"."""
    lines = []
    for key in [*expected, *(key for key in found if key not in expected)]:
        left, right, name = found.get(key), expected.get(key), f"{prefix}{key}"
        if name in _FOR_PEOPLE:
            continue
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += _differences(left, right, f"{name}.")
        elif left != right:
            lines.append(f"{name}: the file has {left!r}, this run has {right!r}")
    return lines


def load_file(path: pathlib.Path, class_names: Sequence[str]) -> np.ndarray:
    """The similarity [C, C] float32 of `load_named`, whatever teacher made it."""
    return load_named(path, class_names).similarity


def load_named(
    path: pathlib.Path, class_names: Sequence[str], expected: Mapping[str, Any] | None = None
) -> Interrelation:
    """A class similarity made elsewhere, what `interrelation.file` names.

    Args:
      path: .npz that `save` wrote, for the same classes in the same order; or .npy, see `load_distance`.
      class_names: Of this run's data set.
      expected: This run's `provenance`: a .npz must be of the same teacher and data, by whatever spec and arithmetic.
        None: it is taken whatever made it.

    Returns:
      It; of a .npy, whose provenance is not known, with none.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not of these classes, of something else than `expected`, is damaged, or ends otherwise.
    """
    if not path.is_file():
        raise FileNotFoundError(f"interrelation.file={path}: there is no such file")
    if path.suffix == ".npz":
        remedy = "point interrelation.file at one that this run's teacher made for this data set"
        interrelation = load(path, expected, ignored=("spec", "dtype"), remedy=remedy)
        if interrelation.class_names != tuple(class_names):
            pairs = itertools.zip_longest(interrelation.class_names, class_names)
            number, (theirs, ours) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"{path} is not of this run's classes: its class {number} is {theirs!r}, the data set's {ours!r}; "
                "point interrelation.file at one made for this data set"
            )
        return interrelation
    if path.suffix != ".npy":
        raise ValueError(f"interrelation.file={path}: must end in .npz (from a run) or .npy (a distance matrix)")
    similarity = load_distance(path)
    if len(similarity) != len(class_names):
        raise ValueError(
            f"{path} has {len(similarity)} classes, this run's data set {len(class_names)}: point "
            "interrelation.file at one made for this data set"
        )
    return Interrelation(similarity, tuple(class_names), {})


def load_distance(path: pathlib.Path) -> np.ndarray:
    """Class similarity from a released distance matrix: 1 - distance.

    The authors' files hold 1 - CKA, before sharpening. Classes are in the data set's usual order (labels 0..C-1).

    Args:
      path: .npy, [C, C] floats, symmetric, 0 on the diagonal, to 1e-5.

    Returns:
      [C, C] float32.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is anything else; names the file and what is wrong.
    """
    try:
        distance = np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read as a .npy array ({error}): fetch it again") from error
    if not isinstance(distance, np.ndarray) or distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"{path}: a distance matrix is [C, C], this is {getattr(distance, 'shape', type(distance))}")
    if not np.issubdtype(distance.dtype, np.floating):
        raise ValueError(f"{path}: a distance matrix holds floats, this {distance.dtype}")
    if not np.isfinite(distance).all():
        raise ValueError(f"{path}: {np.sum(~np.isfinite(distance))} entries are not finite")
    diagonal = float(np.max(np.abs(np.diagonal(distance)), initial=0))
    if diagonal > _ROUNDING:
        hint = ": it looks like a similarity, save 1 - it" if np.allclose(np.diagonal(distance), 1) else ""
        raise ValueError(f"{path}: the distance of a class to itself must be 0, the diagonal reaches {diagonal}{hint}")
    for wrong, what in ((np.abs(distance - distance.T), "not symmetric"), (-distance, "negative")):
        if wrong.max(initial=0) > _ROUNDING:
            i, j = np.unravel_index(np.argmax(wrong), wrong.shape)
            raise ValueError(f"{path}: {what} at [{i}, {j}]: {distance[i, j]} (and {distance[j, i]} at [{j}, {i}])")
    return (1 - distance).astype(np.float32)
