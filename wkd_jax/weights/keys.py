"""Between our named arrays and the state dicts of other code bases: names and layouts, in both directions.

The canonical key of an array is its path in PyTorch's words: "layer1/0/bn1/mean" is "layer1.0.bn1.running_mean". A
`KeyStyle` rewrites canonical keys into those of one code base. Since a key is computed from our name, importing is a
look-up, exporting is a renaming, and both come from one description.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from wkd_jax.models.base import KeyStyle, Step

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Transpositions of kernels by their number of axes: [out, in] <-> [in, out], [out, in, kh, kw] <-> [kh, kw, in, out].
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one of our arrays stands in a state dict.

    Attributes:
      key: Its key there.
      shape: Its shape there.
      steps: What is done with it there, see `KeyStyle`.
    """

    key: str
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = dataclasses.field(default=(), repr=False)


def canonical(name: str) -> str:
    """The canonical key of one of our names.

    Example:
      >>> canonical("layer1/0/downsample/1/scale"), canonical("blocks/3/attn/qkv/kernel")
      ('layer1.0.downsample.1.weight', 'blocks.3.attn.qkv.weight')
    """
    *path, leaf = name.split("/")
    return ".".join([*path, _LEAVES.get(leaf, leaf)])


def layout(shapes: Mapping[str, tuple[int, ...]], style: KeyStyle) -> dict[str, Entry]:
    """Key and shape in a style of each of our arrays.

    Args:
      shapes: Of our arrays, by name.
      style: The code base's.

    Raises:
      ValueError: If two arrays would have one key.

    Example:
      >>> layout({"fc/kernel": (512, 10)}, KeyStyle(((r"^fc", "head.fc"),)))
      {'fc/kernel': Entry(key='head.fc.weight', shape=(10, 512))}
    """
    entries: dict[str, Entry] = {}
    owner: dict[str, str] = {}
    for name, shape in shapes.items():
        key = canonical(name)
        if style.columns and re.search(style.columns, key):
            shape = (*shape, 1, 1)
        elif name.endswith("/kernel"):
            shape = _torch_shape(shape)
        steps = tuple(step for pattern, step in style.steps if re.search(pattern, key))
        for step in steps:
            shape = step.shape(shape)
        for pattern, replacement in style.renames:
            key = re.sub(pattern, replacement, key)
        if key in owner:
            raise ValueError(f"{name} and {owner[key]} would both be called {key!r}")
        entries[name], owner[key] = Entry(key, shape, steps), name
    return entries


def from_torch(name: str, array: np.ndarray, shape: tuple[int, ...], steps: Sequence[Step] = ()) -> np.ndarray:
    """An array of a state dict in our layout, float32.

    Args:
      name: Our name of it.
      array: As stored, of the shape that `layout` gives.
      shape: Ours.
      steps: As `layout` gives them.
    """
    for step in reversed(steps):
        array = step.load(array)
    if name.endswith("/kernel"):
        array = array.reshape(_torch_shape(shape)).transpose(_FROM_TORCH[len(shape)])
    return np.ascontiguousarray(array.reshape(shape), np.float32)


def to_torch(name: str, array: np.ndarray, shape: tuple[int, ...], steps: Sequence[Step] = ()) -> np.ndarray:
    """The inverse of `from_torch`: one of our arrays as a state dict holds it, in the shape that `layout` gives."""
    if name.endswith("/kernel"):
        array = array.transpose(_TO_TORCH[array.ndim])
    for step in steps:
        array = step.store(array)
    return np.ascontiguousarray(array.reshape(shape))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape in PyTorch's layout."""
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
