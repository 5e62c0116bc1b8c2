"""Where arrays live: the mesh, the rules that place parameters on it, and host batches made global."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wkd_jax.data.base import Input
from wkd_jax.types import Batch

AXES = ("data", "model")
Rule = tuple[str, tuple[Any, ...]]  # regex of a path, partition spec


def make_mesh(config: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh ("data", "model") of the config's `mesh` section.

    Args:
      config: Devices along each axis; one of them may be -1, "all that are left".
      devices: Defaults to all devices of all processes.

    Returns:
      The mesh, processes in order along "data": rows of a global batch then lie as one process would have them.

    Raises:
      ValueError: If the axes do not multiply to the number of devices, or devices along "model" are of several
        processes, which load different images.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    shape = [config[axis] for axis in AXES]
    fixed = math.prod(size for size in shape if size > 0)
    if shape.count(-1) == 1 and len(devices) % fixed == 0:
        shape = [len(devices) // fixed if size == -1 else size for size in shape]
    if -1 in shape or math.prod(shape) != len(devices):
        raise ValueError(f"mesh.data={config['data']}, mesh.model={config['model']}: do not fit {len(devices)} devices")
    grid = np.asarray(devices).reshape(shape)
    if any(len({device.process_index for device in row}) > 1 for row in grid):
        raise ValueError(
            f"mesh.model={config['model']}: must divide the {jax.local_device_count()} devices of a process, which "
            "loads the images of its own devices alone"
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with the mesh in use: what a network does image by image stays on the image's device."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return run


def check_batch(global_batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError if the microbatches of a step cannot be cut evenly over the data axis."""
    if global_batch_size % (accumulation * mesh.shape["data"]):
        raise ValueError(
            f"global_batch_size={global_batch_size}: must be a multiple of the {mesh.shape['data']} devices along "
            f"mesh.data" + (f" times accumulation={accumulation}" if accumulation > 1 else "")
        )


def place(tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), preferred: Sequence[Rule] = ()) -> Any:
    """Shardings for a state: what a rule matches is placed by it, everything else is replicated.

    Args:
      tree: Arrays or shape structs, in which named arrays sit in flat dicts ("student/fc/kernel" -> array); an
        optimizer's moments carry the name of their parameter and are placed alike. Names in the attribute `teacher` get
        "teacher/" in front.
      mesh: The mesh.
      rules: ((regex, partition spec), ...), the first match of a name decides. Scalars are always replicated.
      preferred: The same for what no rule matches, where the mesh divides the array; else that is replicated.

    Raises:
      ValueError: If a rule matches no array, or its spec does not fit the array it matches.
    """
    compiled = [(re.compile(pattern), PartitionSpec(*spec)) for pattern, spec in rules]
    used: set[str] = set()

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
        if jax.tree_util.GetAttrKey("teacher") in path:
            name = f"teacher/{name}"
        for pattern, spec in compiled:
            if leaf.ndim and pattern.search(name):
                used.add(pattern.pattern)
                if len(spec) > leaf.ndim:
                    raise ValueError(
                        f"sharding: {pattern.pattern!r} places {name} by {spec}, but its shape is {leaf.shape}"
                    )
                try:
                    NamedSharding(mesh, spec).shard_shape(leaf.shape)
                except ValueError as error:
                    raise ValueError(f"sharding: {pattern.pattern!r} places {name} by {spec}: {error}") from error
                return NamedSharding(mesh, spec)
        for pattern, spec in preferred:
            if leaf.ndim == len(spec) and re.search(pattern, name) and _divides(mesh, spec, leaf.shape):
                return NamedSharding(mesh, PartitionSpec(*spec))
        return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(one, tree)
    if unused := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(f"sharding: {unused[0]!r} matches no array of the run")
    return shardings


def _divides(mesh: Mesh, spec: Sequence[Any], shape: Sequence[int]) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True))


def global_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Makes a global batch, cut over the data axis, from each process's own part (NumPy arrays)."""
    return _global(batch, NamedSharding(mesh, PartitionSpec("data")))


def microbatches(inputs: Input, accumulation: int, mesh: Mesh) -> Batch:
    """The next batch of a step: a global batch, or several along a first axis that is not cut."""
    if accumulation == 1:
        return global_batch(next(inputs), mesh)
    parts = [next(inputs) for _ in range(accumulation)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    return _global(stacked, NamedSharding(mesh, PartitionSpec(None, "data")))


def _global(batch: Batch, sharding: NamedSharding) -> Batch:
    axis = len(sharding.spec) - 1  # the one that is cut

    def one(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:axis], x.shape[axis] * jax.process_count(), *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    with jax.transfer_guard_host_to_device("allow"):  # with several processes JAX takes this one for an accident
        return jax.tree.map(one, batch)


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places an array that every process has in full; each fills its own devices.

    `jax.device_put` would first compare the processes' copies, by way of all of them on every device.
    """
    host = np.asarray(jax.device_get(array))
    with jax.transfer_guard_host_to_device("allow"):  # JAX takes what follows for an accident
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
