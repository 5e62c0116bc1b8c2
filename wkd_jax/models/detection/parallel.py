"""Functions of one image, over a batch that several devices share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

DATA = "data"  # the axis of the mesh that batches are cut over


def over_images(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one image, over the leading axis of its arguments and results.

    `jax.vmap`, in which each device does its own images where a mesh with the axis "data" is in use
    (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`); its size must divide the batch. Left to the compiler, `top_k`
    gathers the batch of all devices on each, and a loop that ends when an image has converged asks all of them in every
    round.

    Args:
      function: Of arrays, or trees of arrays, of one image.

    Example:
      >>> import jax.numpy as jnp
      >>> print(over_images(jnp.max)(jnp.arange(6).reshape(2, 3)))
      [2 5]
    """
    mapped = jax.vmap(function)

    def run(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.shape.get(DATA, 1) == 1:
            return mapped(*arguments)
        spec = PartitionSpec(DATA)
        return jax.shard_map(mapped, in_specs=spec, out_specs=spec, check_vma=False)(*arguments)

    return run
