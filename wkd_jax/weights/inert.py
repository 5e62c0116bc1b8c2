"""What stands for the objects of a pickle while it is read, and how plain data are made of it in the end."""

from __future__ import annotations

from typing import Any

from wkd_jax.weights.errors import WeightsError, refused, short

MAX_DEPTH = 100
"""Deepest nesting of a result, so that recursive walks over it are safe. Checkpoints have less than ten levels."""

SLOT_BYTES, OBJECT_BYTES = 8, 64
"""What a reference, and what a container or an entry of one, is counted as."""

_HEAD_START, _MULTIPLE = 2**25, 16  # a read may take 32 MiB + 16 bytes a byte of the file
_LONGEST_NAME = 300  # characters
_MOST_NUMBERS = 2**16  # that may be keys


class Budget:
    """Bounds the work and memory of a read by the size of its file.

    Args:
      size: Bytes of the file.

    Example:
      >>> budget = Budget(1000)
      >>> budget.charge(2**25)
      >>> budget.charge(16_001)
      Traceback (most recent call last):
      wkd_jax.weights.errors.WeightsError: it unpacks to far more than its 1000 bytes hold...
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._limit = self._left = _HEAD_START + _MULTIPLE * size

    def charge(self, amount: int) -> None:
        """Counts bytes allocated or elements copied."""
        self._left -= amount
        if self._left < 0:
            raise self._exceeded()

    def check(self, amount: int) -> None:
        """Compares the whole, without counting."""
        if amount > self._limit:
            raise self._exceeded()

    def _exceeded(self) -> WeightsError:
        return refused(f"it unpacks to far more than its {self._size} bytes hold, as a pickle bomb does")


class Name:
    """A class or function that a file names. It is never looked up."""

    __slots__ = ("_text",)

    def __init__(self, module: str, name: str) -> None:
        if len(module) + len(name) > _LONGEST_NAME:
            raise refused(f"it names {short(module)}.{short(name)}, longer than {_LONGEST_NAME} characters")
        self._text = f"{module}.{name}"

    def __str__(self) -> str:
        return self._text


class Inert:
    """Stands for an object until the end of a read."""

    def build(self, state: Any, budget: Budget) -> None:
        """Takes the state that follows some objects in a pickle."""
        raise refused(f"it sets the state of a {type(self).__name__.strip('_').lower()}")

    def plain(self, budget: Budget) -> Any:
        """What it is in the result."""
        raise NotImplementedError


class Record(dict):
    """A dict made by a class that behaves like one. It becomes a plain dict.

    Args:
      keep_state: Whether state that follows are its items, as for namespaces. Else it is dropped, as `_metadata` of
        state dicts is.
    """

    def __init__(self, *, keep_state: bool = False) -> None:
        super().__init__()
        self._keep_state = keep_state

    def build(self, state: Any, budget: Budget) -> None:
        """Takes the attributes of the pickled object."""
        if not isinstance(state, dict):
            raise refused(f"it gives a dict-like object a state of type {type(state).__name__}")
        if self._keep_state:
            budget.charge(OBJECT_BYTES * len(state))
            self.update(state)


def hashable(key: Any) -> Any:
    """A dict's key or a set's element, if it is of a kind whose hashes cannot be made to collide.

    Colliding keys take quadratic time. Hashes of text are random; those of numbers are known, so that only as many
    numbers are taken as an optimizer's state has parameters.
    """
    if isinstance(key, int) and not 0 <= key < _MOST_NUMBERS:
        raise refused(f"a key in it is the number {key}, not one from 0 to {_MOST_NUMBERS - 1}")
    if key is None or isinstance(key, (str, bytes, int)):
        return key
    raise refused(f"a key in it is a {type(key).__name__}, neither text nor a number")


def plain(value: Any, budget: Budget) -> Any:
    """A copy of the containers of `value` with every inert object replaced.

    Raises:
      WeightsError: If it contains itself, is deeper than `MAX_DEPTH`, or is far larger than its file when shared parts
        are counted as often as they occur: whoever walks over it meets them so often.
    """
    return _Walk(budget).visit(value, 0)[0]


class _Walk:
    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._done: dict[int, tuple[Any, int, int]] = {}
        self._open: set[int] = set()

    def visit(self, node: Any, depth: int) -> tuple[Any, int, int]:
        """(plain value, levels below it, bytes if nothing were shared) of a node at `depth`."""
        if node is None or isinstance(node, (bool, int, float, complex)):
            return node, 0, SLOT_BYTES
        if isinstance(node, (str, bytes)):
            return node, 0, SLOT_BYTES + len(node)
        if id(node) in self._open:
            raise refused(f"a {type(node).__name__} in it contains itself")
        if id(node) not in self._done:
            if depth > MAX_DEPTH:
                raise refused(f"it is nested more than {MAX_DEPTH} levels deep")
            self._open.add(id(node))
            self._done[id(node)] = self._leaf(node) or self._container(node, depth)
            self._open.remove(id(node))
        result = self._done[id(node)]
        if depth + result[1] > MAX_DEPTH:
            raise refused(f"it is nested more than {MAX_DEPTH} levels deep")
        return result

    def _leaf(self, node: Any) -> tuple[Any, int, int] | None:
        if isinstance(node, bytearray):
            return bytes(node), 0, SLOT_BYTES + len(node)
        if isinstance(node, Name):
            return str(node), 0, SLOT_BYTES
        if isinstance(node, Inert):
            value = node.plain(self._budget)
            return value, 0, SLOT_BYTES + getattr(value, "nbytes", 0)
        return None

    def _container(self, node: Any, depth: int) -> tuple[Any, int, int]:
        values, height, weight = [], 0, OBJECT_BYTES
        for child in [*node, *node.values()] if isinstance(node, dict) else node:
            value, below, size = self.visit(child, depth + 1)
            values.append(value)
            height, weight = max(height, below + 1), weight + size
            self._budget.check(weight)
        if isinstance(node, dict):
            return dict(zip(values[: len(node)], values[len(node) :], strict=True)), height, weight
        return type(node)(values), height, weight
