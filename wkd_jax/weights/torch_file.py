"""Reads files of `torch.save`, in its zip and its older format, and pickles of NumPy arrays. Needs no PyTorch.

Nothing that a file holds is run (see `wkd_jax.weights.pickles`), and nothing is unpacked to disk. The file is read into
memory once; arrays are read-only views of it.
"""

from __future__ import annotations

import math
import os
import pathlib
import struct
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from wkd_jax.weights import inert, pickles
from wkd_jax.weights.archive import Archive
from wkd_jax.weights.errors import WeightsError, damaged, refused, short
from wkd_jax.weights.inert import Budget, Inert, Name
from wkd_jax.weights.objects import BUILDERS, are_sizes, unfit, view
from wkd_jax.weights.pickles import Builder

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # begin files of the older format

_DTYPES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "complex128": "ComplexDouble",
    "complex64": "ComplexFloat",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
"""Number types, and what PyTorch calls their storages."""

_BYTES = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_STORAGES = {f"torch.{kind}Storage": name for name, kind in _DTYPES.items()} | dict.fromkeys(_BYTES, "uint8")
_UNTYPED = "uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"  # these have none
_TENSORS = {f"torch.{name}": name for name in [*_DTYPES, *_UNTYPED.split()]}


def read(path: str | os.PathLike[str]) -> Any:
    """Everything in a file of `torch.save` or `pickle.dump`.

    Args:
      path: A file of `torch.save` (both formats, any protocol and byte order), or a pickle of NumPy arrays, also by
        Python 2.

    Returns:
      Dicts, lists, tuples, sets, strings, bytes, numbers and None, with tensors and NumPy arrays as read-only NumPy
      arrays in the machine's byte order. Arrays of one storage share memory, and all may share that of the whole file.
      Namespaces of arguments are dicts; paths, devices, dtypes, and names of classes are strings.

    Raises:
      WeightsError: If the file is of another kind, damaged, holds anything else, or would unpack to far more than it
        holds.
      OSError: If it cannot be opened.

    Example:
      >>> import pickle, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "weights.pkl"
      ...     _ = path.write_bytes(pickle.dumps({"weight": np.arange(3.0)}))
      ...     read(path)
      {'weight': array([0., 1., 2.])}
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    try:
        if data.startswith(b"PK"):
            return _Zip(data).read()
        if what := _other_kind(data):
            raise WeightsError(what)
        return _read_stream(data)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


class _Storage(Inert):
    """Numbers that tensors are views of.

    Attributes:
      dtype: Of the numbers.
      numel: How many.
      data: Gives the bytes of numbers of a dtype, in the machine's byte order. Called when the pickle has been
        followed: in the older format they come after it.
    """

    def __init__(self, dtype: np.dtype, numel: int, data: Callable[[np.dtype], memoryview]) -> None:
        self.dtype, self.numel, self.data = dtype, numel, data

    def plain(self, budget: Budget) -> np.ndarray:
        return view((self.numel,), self.dtype, self.data(self.dtype))


class _Tensor(Inert):
    """A view of a storage, checked to lie within it."""

    def __init__(self, storage: _Storage, dtype: np.dtype, offset: Any, size: Any, stride: Any) -> None:
        if not are_sizes(size) or not are_sizes(stride) or not are_sizes((offset,)) or len(size) != len(stride):
            raise refused("a tensor has sizes, strides or an offset that are no counts (negative ones are not views)")
        numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
        axes = [(n, step) for n, step in zip(size, stride, strict=True) if n > 1]
        what = f"a tensor of size {size}, stride {stride} and offset {offset} on a storage of {numel} numbers"
        if math.prod(size) > numel or any(step == 0 for _, step in axes):
            raise refused(f"{what} repeats them: save it with .contiguous()")
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in axes)
        if offset + extent > numel:
            raise damaged(f"{what} ends outside of them")
        self._storage, self._dtype, self._offset, self._size = storage, dtype, offset, size
        # Steps along axes of one number mean nothing, and may be too large to count in bytes.
        self._strides = tuple(step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True))

    def plain(self, budget: Budget) -> np.ndarray:
        if 0 in self._size:
            return view(self._size, self._dtype, b"")
        data = self._storage.data(self._dtype)
        return view(self._size, self._dtype, data, self._offset * self._dtype.itemsize, self._strides)


def _tensor(arguments: tuple, budget: Budget) -> _Tensor:
    """_rebuild_tensor and _rebuild_tensor_v2; what follows the stride (gradient, hooks, metadata) is no number."""
    match arguments:
        case (_Storage(), _, _, _, _, _, metadata) if metadata:
            raise refused("a tensor has metadata, such as a conjugation still to be made")
        case (_Storage(dtype=dtype) as storage, offset, size, stride, *_):
            return _Tensor(storage, dtype, offset, size, stride)
    raise unfit("torch._utils._rebuild_tensor")


def _tensor_v3(arguments: tuple, budget: Budget) -> _Tensor:
    """As v2, of untyped bytes and with a dtype: for types that have no storage class."""
    match arguments:
        case (_Storage(), _, _, _, _, _, _, metadata) if metadata:
            raise refused("a tensor has metadata, such as a conjugation still to be made")
        case (_Storage() as storage, offset, size, stride, _, _, Name() as kind, *_):
            if str(kind) not in _TENSORS:
                raise refused(f"a tensor is of the type {short(str(kind))}, which is not read")
            return _Tensor(storage, _dtype(_TENSORS[str(kind)]), offset, size, stride)
    raise unfit("torch._utils._rebuild_tensor_v3")


def _parameter(arguments: tuple, budget: Budget) -> _Tensor:
    match arguments:
        case (_Tensor() as tensor, _, _):
            return tensor
    raise unfit("torch._utils._rebuild_parameter")


def _size(arguments: tuple, budget: Budget) -> tuple:
    match arguments:
        case (tuple() as sizes,) if are_sizes(sizes):
            return sizes
    raise unfit("torch.Size")


def _device(arguments: tuple, budget: Budget) -> str:
    match arguments:
        case (str() as kind,) if len(kind) < 20:
            return kind
        case (str() as kind, int() as index) if len(kind) < 20:
            return f"{kind}:{index}"
    raise unfit("torch.device")


_TORCH_BUILDERS: dict[str, Builder] = BUILDERS | {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
}


def _dtype(name: str) -> np.dtype:
    """Also of those that NumPy has not itself."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _storage_id(key: Any) -> tuple[np.dtype, str, int, Any]:
    """(dtype, key, number of elements, view or None) of what stands for a storage in the pickle."""
    match key:
        case ("storage", Name() as kind, str() | int() as name, _, int() as numel, *part):
            if str(kind) not in _STORAGES:
                raise refused(f"it has tensors of {short(str(kind))}, which are not plain numbers")
            if not are_sizes((numel,)):
                raise damaged("a storage has an impossible number of elements")
            return _dtype(_STORAGES[str(kind)]), str(name), numel, part[0] if part else None
        case ("module", Name() as kind, *_):
            raise refused(f"it holds a whole model, an object of {short(str(kind))}, not its state dict")
    raise refused("it refers to something outside of its pickle that is not a storage")


class _Zip:
    """A file of the zip format: a pickle, and an entry for each storage."""

    def __init__(self, data: bytes) -> None:
        self._budget = Budget(len(data))
        self._archive = Archive(data)
        self._order = "little"  # before PyTorch 2.1 it was not written
        if self._archive.size("byteorder") is not None:
            self._order = bytes(self._archive.read("byteorder")).decode("latin-1")
        if self._order not in ("little", "big"):
            raise damaged(f"its byte order is {short(self._order)}, neither little nor big")
        self._storages: dict[tuple[str, int], memoryview] = {}

    def read(self) -> Any:
        """The object."""
        pickle = bytes(self._archive.read("data.pkl"))
        value, end = pickles.load(pickle, 0, self._budget, _TORCH_BUILDERS, self._persistent)
        if end != len(pickle):
            raise damaged(f"{len(pickle) - end} bytes follow its pickle")
        return inert.plain(value, self._budget)

    def _persistent(self, identity: Any) -> _Storage:
        dtype, key, numel, part = _storage_id(identity)
        size = self._archive.size(f"data/{key}")
        if size is None:
            raise damaged(f"the storage {short(key)} is missing")
        if part is not None:
            raise damaged(f"the storage {short(key)} is a part, which only the older format has")
        if size != numel * dtype.itemsize:
            raise damaged(f"the storage {short(key)} should have {numel} {dtype.name} numbers, but has {size} bytes")
        return _Storage(dtype, numel, lambda dtype: self._bytes(key, dtype))

    def _bytes(self, key: str, dtype: np.dtype) -> memoryview:
        width = dtype.itemsize // (2 if dtype.kind == "c" else 1)  # of what has a byte order
        if (key, width) not in self._storages:
            content = self._archive.read(f"data/{key}")
            if self._order != sys.byteorder and width > 1:
                numbers = np.frombuffer(content, f"u{width}", len(content) // width)
                content = memoryview(numbers.byteswap().view(np.uint8))
            self._storages[key, width] = content
        return self._storages[key, width]


def _read_stream(data: bytes) -> Any:
    budget = Budget(len(data))
    value, end = pickles.load(data, 0, budget, _TORCH_BUILDERS)
    if type(value) is int and value == _MAGIC:
        return _Legacy(data, budget).read(end)
    if end != len(data):
        raise damaged(f"{len(data) - end} bytes follow its pickle")
    return inert.plain(value, budget)


class _Legacy:
    """A file of the older format."""

    def __init__(self, data: bytes, budget: Budget) -> None:
        self._data, self._budget = data, budget
        self._sizes: dict[str, tuple[int, int]] = {}  # (bytes, bytes an element) of each storage that the pickle names
        self._storages: dict[str, memoryview] = {}

    def read(self, position: int) -> Any:
        """The object, from the end of the first pickle on."""
        protocol, position = pickles.load(self._data, position, self._budget, {})
        if type(protocol) is not int or protocol != _PROTOCOL:
            raise damaged("it begins like a file of torch.save, but has another protocol")
        _, position = pickles.load(self._data, position, self._budget, {})  # sizes of C types where it was written
        value, position = pickles.load(self._data, position, self._budget, _TORCH_BUILDERS, self._persistent)
        keys, position = pickles.load(self._data, position, self._budget, {})
        if type(keys) is not list or not all(isinstance(key, (str, int)) for key in keys):
            raise damaged("its list of storages is not one")
        for key in map(str, keys):
            position = self._read_storage(key, position)
        if position != len(self._data):
            raise damaged(f"{len(self._data) - position} bytes follow its last storage")
        return inert.plain(value, self._budget)

    def _persistent(self, identity: Any) -> _Storage:
        dtype, key, numel, part = _storage_id(identity)
        size = numel * dtype.itemsize
        if self._sizes.setdefault(key, (size, dtype.itemsize))[0] != size:
            raise damaged(f"the storage {short(key)} has two sizes")
        begin = 0
        match part:
            case None:
                pass
            case (_, int() as first, int() as count) if 0 <= first <= first + count <= numel:
                begin, numel = first * dtype.itemsize, count
            case _:
                raise damaged(f"a part of the storage {short(key)} lies outside of it")
        end = begin + numel * dtype.itemsize
        return _Storage(dtype, numel, lambda _: self._bytes(key)[begin:end])

    def _bytes(self, key: str) -> memoryview:
        if key not in self._storages:
            raise damaged(f"the storage {short(key)} is missing")
        return self._storages[key]

    def _read_storage(self, key: str, position: int) -> int:
        """Takes the storage at `position`; returns where it ends."""
        if key not in self._sizes or key in self._storages:
            raise damaged(f"the storage {short(key)} is there, but nothing or something else refers to it")
        size, width = self._sizes[key]
        start = position + 8
        if start + size > len(self._data):
            raise damaged(f"it ends before the {size} bytes of storage {short(key)}")
        (count,) = struct.unpack_from("<q", self._data, position)
        if count * width != size:
            raise damaged(f"the storage {short(key)} says {count} numbers of {width} bytes, its tensors {size} bytes")
        numbers = np.frombuffer(self._data, np.uint8, size, start)
        # Pickles of any length lie before it. A copy puts the numbers where processors want them.
        self._storages[key] = memoryview(numbers if start % 8 == 0 else numbers.copy())
        return start + size


def _other_kind(data: bytes) -> str | None:
    """Of a file that is often taken for weights: what it is and what to do."""
    head = data[:1024].lstrip().lower()
    if not data:
        return "it is empty: download it again"
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page: the link led to one, or to an error message. Download the file itself"
    if data[257:262] == b"ustar":
        return (
            "it is a tar archive: if it is of PyTorch before 0.2, load it with such a PyTorch and save it again; if it "
            "holds files of weights, unpack it"
        )
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return "it is a safetensors file: give its name the suffix .safetensors"
    for magic, kind in _MAGICS.items():
        if data.startswith(magic):
            return f"it is {kind}, not a file of torch.save or a pickle"
    return None


_MAGICS = {
    b"\x1f\x8b": "compressed with gzip (unpack it first)",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUMPY": "one NumPy array (.npy)",
    b"{": "JSON text",
}
