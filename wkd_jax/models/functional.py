"""The one file that turns NNX modules into pure data and back.

Outside it the package sees flat dicts of arrays ("student/layer1/0/conv1/kernel" -> array), so that sharding rules,
weight-decay rules, checkpoints and safetensors all speak of the same paths, and plain `jax.jit` does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax import nnx

from wkd_jax.types import Params


class Memory(nnx.Variable):
    """State that a method carries from step to step and that is checkpointed, such as a memory bank."""


class Constant(nnx.Variable):
    """An array that a method needs and that never changes, such as a ground cost. It is not checkpointed."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """The static half of a split module. `merge` makes the module again, inside or outside of a trace."""

    graphdef: Any
    paths: dict[str, tuple[Any, ...]]

    def merge(self, *trees: Params) -> Any:
        """Rebuilds the module from flat dicts that together hold exactly its arrays."""
        flat = {self.paths[name]: value for tree in trees for name, value in tree.items()}
        return nnx.merge(self.graphdef, _nest(flat))


def split(module: nnx.Module) -> tuple[Structure, Params, Params, Params]:
    """Splits a module into its structure and three flat dicts.

    Returns:
      (structure, params, variables, constants): trained arrays; state carried from step to step (`BatchStat`,
      `Memory`); arrays that never change (`Constant`).

    Raises:
      ValueError: If the module holds a variable of another kind (a stored PRNG key, say): randomness enters at call
        time, as `rngs`.
    """
    graphdef, params, variables, constants, rest = nnx.split(
        module, nnx.Param, nnx.Any(nnx.BatchStat, Memory), Constant, ...
    )
    if left := _flatten(rest):
        raise ValueError(f"variables of a kind that cannot be carried: {', '.join(left)}")
    flats = [_flatten(state) for state in (params, variables, constants)]
    paths = {_name(path): path for state in (params, variables, constants) for path in _flat_paths(state)}
    return Structure(graphdef, paths), flats[0], flats[1], flats[2]


def variables(module: nnx.Module) -> Params:
    """The carried state (`BatchStat`, `Memory`) of a module after it was called."""
    return _flatten(nnx.state(module, nnx.Any(nnx.BatchStat, Memory)))


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
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(part) for part in path)


def _nest(flat: dict[tuple[Any, ...], Any]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for path, value in flat.items():
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return nested
