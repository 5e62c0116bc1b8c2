"""What a pickle may ask for, apart from tensors: standard containers, namespaces of arguments, and NumPy arrays.

`BUILDERS` is the whole list. Each entry makes an object of ours from arguments out of the file, which it checks; none
calls what the file names.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np

from wkd_jax.weights.errors import WeightsError, damaged, refused, short
from wkd_jax.weights.inert import OBJECT_BYTES, Budget, Inert, Name, Record, hashable
from wkd_jax.weights.pickles import Builder

_NUMBERS = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16"
_MOST_AXES, _LARGEST_SIZE = 32, 2**62  # NumPy computes sizes in 64 bits


def view(
    shape: tuple, dtype: np.dtype, data: Any, offset: int = 0, strides: Any = None, order: str = "C"
) -> np.ndarray:
    """A read-only array on a buffer. The caller has compared the sizes; NumPy does so again.

    Raises:
      WeightsError: If the shape has too many or too large axes.
    """
    try:
        return np.ndarray(shape, dtype, memoryview(data).toreadonly(), offset, strides, order)
    except (ValueError, TypeError) as error:
        raise damaged(f"an array of shape {shape} does not fit its data: {error}") from error


def are_sizes(values: Any) -> bool:
    """Whether it is a tuple of integers that can be the sizes or strides of an array."""
    return (
        isinstance(values, tuple)
        and len(values) <= _MOST_AXES
        and all(isinstance(n, int) and 0 <= n < _LARGEST_SIZE for n in values)
    )


def unfit(name: str) -> WeightsError:
    """Of arguments that what is called does not take."""
    return damaged(f"it calls {short(name)} with arguments that it does not take")


class _Dtype(Inert):
    """A number type. Its byte order follows as state."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def build(self, state: Any, budget: Budget) -> None:
        match state:
            case (_, "<" | ">" | "=" | "|" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise refused("it describes a numpy.dtype with fields or an unknown byte order, not a plain number")

    def plain(self, budget: Budget) -> str:
        return self.dtype.name


class _Array(Inert):
    """A NumPy array, whose contents may follow as state."""

    def __init__(self) -> None:
        self._value: np.ndarray | None = None

    def build(self, state: Any, budget: Budget) -> None:
        match state:
            case (int(), shape, _Dtype(dtype=dtype), fortran, data):
                self.fill(shape, dtype, "F" if fortran else "C", _bytes(data, budget), budget)
            case _:
                raise damaged("the state of a numpy.ndarray is not (version, shape, dtype, order, bytes)")

    def fill(self, shape: Any, dtype: np.dtype, order: str, data: Any, budget: Budget) -> None:
        """Sets the contents."""
        if not are_sizes(shape):
            raise damaged("the shape of a numpy.ndarray is not a tuple of sizes")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise damaged(f"a numpy.ndarray says shape {shape} {dtype.name}, but has {len(data)} bytes")
        self._value = view(shape, dtype, data, order=order)
        if not dtype.isnative:
            budget.charge(len(data))
            self._value = self._value.astype(dtype.newbyteorder("="))
            self._value.flags.writeable = False

    def plain(self, budget: Budget) -> np.ndarray:
        if self._value is None:
            raise damaged("a numpy.ndarray in it has no contents")
        return self._value


def _bytes(data: Any, budget: Budget) -> bytes | bytearray:
    """Bytes, also as Python 2 wrote them: as text, one character each."""
    if isinstance(data, str):
        budget.charge(len(data))
        try:
            return data.encode("latin-1")
        except UnicodeEncodeError:
            raise damaged("a string that should be bytes has other characters") from None
    if not isinstance(data, (bytes, bytearray)):
        raise refused(f"the contents of a numpy.ndarray are a {type(data).__name__}, not bytes")
    return data


def _encode(arguments: tuple, budget: Budget) -> bytes:
    match arguments:
        case (str() as text, "latin1" | "latin-1"):
            return bytes(_bytes(text, budget))
        case (_, str() as codec):
            raise refused(f"it calls _codecs.encode with the codec {short(codec)}")
    raise unfit("_codecs.encode")


def _empty_bytes(arguments: tuple, budget: Budget) -> bytes:
    if arguments:
        raise unfit("bytes")
    return b""


def _complex(arguments: tuple, budget: Budget) -> complex:
    match arguments:
        case (float() as real, float() as imaginary):
            return complex(real, imaginary)
    raise unfit("complex")


def _set(arguments: tuple, budget: Budget) -> set:
    match arguments:
        case (list() as items,):
            budget.charge(OBJECT_BYTES * len(items))
            return set(map(hashable, items))
    raise unfit("set")


def _frozenset(arguments: tuple, budget: Budget) -> frozenset:
    return frozenset(_set(arguments, budget))


def _mapping(arguments: tuple, budget: Budget) -> Record:
    """OrderedDict() or of a list of pairs, Counter(dict), CfgNode() or of a dict, defaultdict(factory)."""
    record = Record()
    match arguments:
        case () | (Name(),):
            pairs: Any = ()
        case (list() as pairs,) if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            pass
        case (dict() as items,):
            pairs = items.items()
        case _:
            raise unfit("a mapping")
    budget.charge(OBJECT_BYTES * len(pairs))
    record.update((hashable(key), value) for key, value in pairs)
    return record


def _namespace(arguments: tuple, budget: Budget) -> Record:
    if arguments:
        raise unfit("a namespace")
    return Record(keep_state=True)


def _reconstruct(arguments: tuple, budget: Budget) -> Record:
    """What protocols 0 and 1 write of the classes above: (class, base, base's value)."""
    match arguments:
        case (Name() as kind, Name(), None) if BUILDERS.get(str(kind)) is _namespace:
            return _namespace((), budget)
        case (Name() as kind, Name(), dict() as items) if BUILDERS.get(str(kind)) is _mapping:
            return _mapping((items,), budget)
        case (Name() as kind, *_):
            raise refused(f"it makes an object of {short(str(kind))}")
    raise unfit("copyreg._reconstructor")


def _path(arguments: tuple, budget: Budget) -> str:
    if not all(isinstance(part, str) for part in arguments):
        raise unfit("a path")
    budget.charge(sum(map(len, arguments)))
    return str(pathlib.PurePosixPath(*arguments))


def _dtype(arguments: tuple, budget: Budget) -> _Dtype:
    match arguments:
        case (str() as code, *_) if code in _NUMBERS.split():
            return _Dtype(np.dtype(code))
        case (str() as code, *_):
            raise refused(f"it has an array of numpy.dtype {short(code)}; only numbers are read (O is for objects)")
    raise unfit("numpy.dtype")


def _empty_array(arguments: tuple, budget: Budget) -> _Array:
    match arguments:
        case (Name() as kind, *_) if str(kind) == "numpy.ndarray":
            return _Array()
        case (Name() as kind, *_):
            raise refused(f"it makes an array of the class {short(str(kind))}")
    raise unfit("numpy._reconstruct")


def _array_from_buffer(arguments: tuple, budget: Budget) -> _Array:
    match arguments:
        case (bytes() | bytearray() as data, _Dtype(dtype=dtype), shape, "C" | "F" as order):
            array = _Array()
            array.fill(shape, dtype, order, data, budget)
            return array
    raise unfit("numpy._frombuffer")


def _scalar(arguments: tuple, budget: Budget) -> Any:
    match arguments:
        case (_Dtype(dtype=dtype), data):
            array = _Array()
            array.fill((), dtype, "C", _bytes(data, budget), budget)
            return array.plain(budget).item()
    raise unfit("numpy.scalar")


def _under(modules: str, names: str, builder: Builder) -> dict[str, Builder]:
    return {f"{module}.{name}": builder for module in modules.split() for name in names.split()}


BUILDERS: dict[str, Builder] = {
    **_under("collections", "OrderedDict Counter defaultdict", _mapping),
    **_under("yacs.config fvcore.common.config", "CfgNode", _mapping),
    **_under("argparse", "Namespace", _namespace),
    **_under("types", "SimpleNamespace", _namespace),
    **_under("pathlib pathlib._local", "PosixPath PurePosixPath", _path),
    **_under("copyreg copy_reg", "_reconstructor", _reconstruct),
    **_under("builtins __builtin__", "bytes", _empty_bytes),
    **_under("builtins __builtin__", "complex", _complex),
    **_under("builtins __builtin__", "set", _set),
    **_under("builtins __builtin__", "frozenset", _frozenset),
    **_under("_codecs", "encode", _encode),
    **_under("numpy", "dtype", _dtype),
    **_under("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", _empty_array),
    **_under("numpy.core.multiarray numpy._core.multiarray", "scalar", _scalar),
    **_under("numpy.core.numeric numpy._core.numeric", "_frombuffer", _array_from_buffer),
}
"""Of names in a file, "module.name", the functions that stand in for them."""
