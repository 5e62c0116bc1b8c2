"""Reads pickles as data: nothing that a file names is imported, looked up or called.

`pickletools`, of the standard library, takes a pickle apart into opcodes and executes nothing. `load` follows them on a
stack of its own. A class or function in the file is only a `Name`; where the file wants it called, a function of *ours*
listed under that name makes the object, or the file is refused. `inert.plain` turns what stands for objects on the way
into dicts, lists, tuples, numbers, strings and NumPy arrays.

Python's `pickle.Unpickler` is not used, not even with a `find_class` of our own: it calls what it finds, and opcodes
with huge lengths or indices make its C version allocate gigabytes for a file of a few bytes.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any

from wkd_jax.weights.errors import WeightsError, damaged, refused, short
from wkd_jax.weights.inert import OBJECT_BYTES, SLOT_BYTES, Budget, Inert, Name, Record, hashable

_LARGEST_INT = 1024  # bits; states of random generators have 128

Builder = Callable[[tuple, Budget], Any]
"""(arguments in the file, budget) -> object."""


def load(
    data: bytes,
    start: int,
    budget: Budget,
    builders: Mapping[str, Builder],
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Follows one pickle in `data`.

    Args:
      data: The file, or the part of it that holds the pickle.
      start: Where the pickle begins.
      budget: Of the file.
      builders: What may be called, by "module.name".
      persistent: Makes objects that are stored outside the pickle from their ids. None: there are none.

    Returns:
      (value, end): the value may hold inert objects, see `inert.plain`; `end` is where the pickle ended.

    Raises:
      WeightsError: If the pickle is broken, wants a call that is not listed, or unpacks to far more than its size.
    """
    return _Machine(data, start, budget, builders, persistent).run()


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, data: bytes, start: int, budget: Budget, builders: Mapping, persistent: Callable | None) -> None:
        self._stream = io.BytesIO(data)  # shares `data`, and no read allocates more than what is left
        self._stream.seek(start)
        self._size = len(data)
        self._position = start
        self._budget = budget
        self._builders = builders
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        while True:
            name, argument = self._next()
            self._budget.charge(SLOT_BYTES)
            if name == "STOP":
                return self._pop(), self._stream.tell()
            _OPERATIONS[name](self, argument)

    def _next(self) -> tuple[str, Any]:
        """The next opcode's name and argument."""
        self._position = self._stream.tell()
        opcode = pickletools.code2op.get(self._stream.read(1).decode("latin-1"))
        if opcode is None:
            raise self._broken("no opcode of pickles")
        if opcode.name not in _OPERATIONS and opcode.name != "STOP":
            raise refused(f"the opcode {opcode.name} at byte {self._position} of its pickle is not for plain data")
        reader = _READERS.get(opcode.name) or (opcode.arg.reader if opcode.arg else lambda stream: None)
        try:
            argument = reader(self._stream)
        except WeightsError:
            raise
        except ValueError as error:  # pickletools' word for anything that is not as it should be
            raise self._broken(str(error)[:200]) from error
        if isinstance(argument, int) and argument.bit_length() > _LARGEST_INT:
            raise refused(f"it holds an integer of {argument.bit_length()} bits, more than {_LARGEST_INT}")
        return opcode.name, argument

    def _broken(self, why: str) -> WeightsError:
        return damaged(f"it is no pickle at byte {self._position}: {why}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _make(self, value: Any) -> None:
        self._budget.charge(OBJECT_BYTES)
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise self._broken("the stack is empty")
        return self._stack.pop()

    def _top(self) -> Any:
        self._push(value := self._pop())
        return value

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise self._broken("no mark on the stack")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self, _: None) -> None:
        self._budget.charge(OBJECT_BYTES)
        self._marks.append(len(self._stack))

    def _drop(self, _: None) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._make(tuple(reversed(items)))

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise self._broken(f"appends to a {type(target).__name__}")
        target.extend(items)

    def _add(self, _: None) -> None:
        items, target = self._pop_mark(), self._top()
        if type(target) is not set:
            raise self._broken(f"adds to a {type(target).__name__}")
        target.update(map(hashable, items))

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict):
            raise self._broken(f"sets items of a {type(target).__name__}")
        if len(items) % 2:
            raise self._broken("a key without a value")
        for i in range(0, len(items), 2):
            target[hashable(items[i])] = items[i + 1]

    def _make_dict(self, items: list[Any]) -> None:
        self._make({})
        self._set_items(items)

    def _make_set(self, _: None) -> None:
        self._budget.charge(3 * OBJECT_BYTES)  # what an empty set takes beyond an empty list
        self._make(set())

    def _put(self, index: int | None) -> None:
        index = len(self._memo) if index is None else index
        if not 0 <= index < 2**32:
            raise self._broken("the memo index is out of range")
        self._budget.charge(OBJECT_BYTES)
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._broken("it refers to an object that is not there")
        self._push(self._memo[index])

    def _stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._broken("a name that is not text")
        self._make(Name(module, name))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise refused(f"it calls a {type(function).__name__} with a {type(arguments).__name__} of arguments")
        if str(function) not in self._builders:
            raise refused(f"it calls {short(str(function))}")
        self._make(self._builders[str(function)](arguments, self._budget))

    def _reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def _object(self, _: None) -> None:
        items = self._pop_mark()
        if not items:
            raise self._broken("an object without a class")
        self._call(items[0], tuple(items[1:]))

    def _build(self, _: None) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, (Inert, Record)):
            what = short(str(target)) if isinstance(target, Name) else f"a {type(target).__name__}"
            raise refused(f"it sets the state of {what}")
        target.build(state, self._budget)

    def _persistent_id(self, _: None) -> None:
        key = self._pop()
        if self._persistent is None:
            raise refused("it refers to objects outside of it (opcode BINPERSID), which only files of torch.save do")
        self._make(self._persistent(key))

    def _frame(self, length: int) -> None:
        if length > self._size - self._stream.tell():
            raise self._broken(f"a frame of {length} bytes ends beyond it")


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[\\'\"nrt]|)")
_ESCAPED = {b"\\": b"\\", b"'": b"'", b'"': b'"', b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def _unescape(match: re.Match[bytes]) -> bytes:
    if not match[1]:
        raise ValueError("unknown escape in a string")
    return _ESCAPED.get(match[1]) or bytes([int(match[1][1:], 16)])


def _read_string(stream: io.BytesIO) -> str:
    """A byte string as Python 2 wrote it in text pickles, quoted."""
    return _ESCAPE.sub(_unescape, pickletools.read_stringnl(stream, decode=False)).decode("latin-1")


def _read_name(stream: io.BytesIO) -> Name:
    """Two lines, module and name."""
    lines = [pickletools.read_stringnl(stream, decode=False, stripquotes=False) for _ in range(2)]
    return Name(*(line.decode() for line in lines))


_READERS = {"STRING": _read_string, "GLOBAL": _read_name, "INST": _read_name}
"""For arguments that pickletools decodes otherwise than pickle does."""


_LITERALS = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE
BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""

_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS.split(), _Machine._push),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"], _Machine._put),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], _Machine._get),
    **dict.fromkeys(["REDUCE", "NEWOBJ"], _Machine._reduce),
    "PROTO": lambda m, _: None,  # every protocol's opcodes are understood in every pickle
    "FRAME": _Machine._frame,
    "NONE": lambda m, _: m._push(None),
    "NEWTRUE": lambda m, _: m._push(True),
    "NEWFALSE": lambda m, _: m._push(False),
    "MARK": _Machine._mark,
    "POP": _Machine._drop,
    "POP_MARK": lambda m, _: m._pop_mark(),
    "DUP": lambda m, _: m._push(m._top()),
    "EMPTY_TUPLE": lambda m, _: m._push(()),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "TUPLE": lambda m, _: m._make(tuple(m._pop_mark())),
    "EMPTY_LIST": lambda m, _: m._make([]),
    "LIST": lambda m, _: m._make(m._pop_mark()),
    "APPEND": lambda m, _: m._extend([m._pop()]),
    "APPENDS": lambda m, _: m._extend(m._pop_mark()),
    "EMPTY_DICT": lambda m, _: m._make({}),
    "DICT": lambda m, _: m._make_dict(m._pop_mark()),
    "SETITEM": lambda m, _: m._set_items([m._pop(), m._pop()][::-1]),
    "SETITEMS": lambda m, _: m._set_items(m._pop_mark()),
    "EMPTY_SET": _Machine._make_set,
    "ADDITEMS": _Machine._add,
    "FROZENSET": lambda m, _: m._make(frozenset(map(hashable, m._pop_mark()))),
    "GLOBAL": _Machine._make,
    "STACK_GLOBAL": _Machine._stack_global,
    "INST": lambda m, argument: m._call(argument, tuple(m._pop_mark())),
    "OBJ": _Machine._object,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
}
