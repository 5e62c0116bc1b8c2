"""The one file that turns NNX modules into pure data and back.

Outside it the package sees flat dicts of arrays ("student/layer1/0/conv1/kernel" -> array), so that sharding rules,
weight-decay rules, checkpoints and safetensors all speak of the same paths, and plain `jax.jit` does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax.types import Array, Params


class Memory(nnx.Variable):
    """State that a method carries from step to step and that is checkpointed, such as a memory bank."""


class Fixed(nnx.BatchStat):
    """A parameter that is not trained here, such as those of a detector's first stages; it is checkpointed."""


class Constant(nnx.Variable):
    """An array that a method needs and that never changes, such as a ground cost. It is not checkpointed."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """The static half of a split module. `merge` makes the module again, inside or outside of a trace."""

    graphdef: Any
    paths: dict[str, tuple[Any, ...]]

    def merge(self, *trees: Params) -> Any:
        """Rebuilds the module from flat dicts that together hold exactly its arrays.

        Raises:
          ValueError: If they hold others; names the first that are missing or too many.
        """
        flat = {name: value for tree in trees for name, value in tree.items()}
        if flat.keys() != self.paths.keys():
            missing, extra = sorted(self.paths.keys() - flat.keys()), sorted(flat.keys() - self.paths.keys())
            raise ValueError(f"arrays do not fit the module: missing {missing[:3]}, too many {extra[:3]}")
        return nnx.merge(self.graphdef, nested({self.paths[name]: value for name, value in flat.items()}))


def split(module: nnx.Module) -> tuple[Structure, Params, Params, Params]:
    """Splits a module into its structure and three flat dicts.

    Returns:
      (structure, params, variables, constants): trained arrays; state carried from step to step (`BatchStat`,
      `Memory`); arrays that never change (`Constant`).

    Raises:
      ValueError: If the module holds anything else (a bare array, a stored PRNG key), or two arrays of one name.
    """
    graphdef, params, variables, constants, rest = nnx.split(
        module, nnx.Param, nnx.Any(nnx.BatchStat, Memory), Constant, ...
    )
    if left := [_name(path) for path in _flat_paths(rest)]:
        raise ValueError(
            f"neither Param, BatchStat, Memory nor Constant: {', '.join(left)}. Wrap arrays in one of these; "
            "randomness enters at call time"
        )
    states = (params, variables, constants)
    every = [path for state in states for path in _flat_paths(state)]
    paths = {_name(path): path for path in every}
    if len(paths) < len(every):
        twice = next(_name(path) for path in every if paths[_name(path)] != path)
        raise ValueError(f"two arrays are called {twice!r}: avoid '/' in the keys of a Dict")
    return Structure(graphdef, paths), *(_flatten(state) for state in states)


def variables(module: nnx.Module) -> Params:
    """The carried state (`BatchStat`, `Memory`) of a module after it was called."""
    return _flatten(nnx.state(module, nnx.Any(nnx.BatchStat, Memory)))


def value(module: nnx.Module, name: str) -> Array:
    """One array of a module by its name, such as "fc/kernel".

    Raises:
      ValueError: If it has none of that name.
    """
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if _name(path) == name:
            return variable.get_value()
    raise ValueError(f"the module has no array {name!r}")


def update(module: nnx.Module, arrays: Params) -> None:
    """Replaces arrays of a module, by name; the others stay.

    Raises:
      ValueError: If it has no array of such a name, or one of another shape.
    """
    own = {_name(path): (path, value) for path, value in nnx.to_flat_state(nnx.state(module))}
    for name, array in arrays.items():
        shape = own[name][1].get_value().shape if name in own else None
        if shape != array.shape:
            raise ValueError(f"{name}: the module has {shape or 'no such array'} and was given {array.shape}")
    nnx.update(module, nnx.from_flat_state({own[name][0]: jnp.asarray(array) for name, array in arrays.items()}))


def under(tree: Params, prefix: str) -> Params:
    """The entries below `prefix`, with it removed.

    Example:
      >>> under({"student/fc/bias": 1, "methods/kd/t": 2}, "student")
      {'fc/bias': 1}
    """
    start = prefix.rstrip("/") + "/"
    return {name[len(start) :]: value for name, value in tree.items() if name.startswith(start)}


def _flat_paths(state: Any) -> Iterable[tuple[Any, ...]]:
    return [path for path, _ in nnx.to_flat_state(state)]


def _flatten(state: Any) -> Params:
    return {_name(path): _strong(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def _strong(value: Any) -> Any:
    """A plain number as an array; a weak dtype, which the first update would change and compile anew, made strong."""
    if isinstance(value, float | int):
        value = jnp.asarray(value)
    weak = isinstance(value, jax.Array) and value.weak_type
    return jax.lax.convert_element_type(value, value.dtype) if weak else value


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(part) for part in path)


def nested(flat: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """Nested dicts of a flat one by paths.

    Example:
      >>> nested({("layer1", 0, "kernel"): 1, ("fc", "bias"): 2})
      {'layer1': {0: {'kernel': 1}}, 'fc': {'bias': 2}}
    """
    tree: dict[Any, Any] = {}
    for (*path, leaf), value in flat.items():
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree
