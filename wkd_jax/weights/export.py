"""A trained network for others: in PyTorch's keys, as Flax's nested dicts, or as a function that serves.

All take a network (abstract or not) and its arrays by our names.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.base import Staged
from wkd_jax.types import Array, Normalisation
from wkd_jax.weights import keys
from wkd_jax.weights.load import IMAGE_SIZE, replacing, write_file

PLATFORMS = ("cpu", "cuda", "tpu")


def to_torch(
    path: str | os.PathLike[str], model: Staged, arrays: Mapping[str, Any], *, style: str | None = None
) -> None:
    """Writes a safetensors file that the same network in PyTorch loads with `load_state_dict(..., strict=True)`.

    Reading it back gives the same bits. BatchNorm's counters of batches are not written: PyTorch starts them at 0.

    Args:
      path: Of the file; replaced if it exists.
      model: The network.
      arrays: Its arrays.
      style: Whose keys, one of the network's `KEY_STYLES`; None: the first.

    Raises:
      ValueError: If the network has no such style.
    """
    styles = type(model).KEY_STYLES
    style = next(iter(styles)) if style is None else style
    if style not in styles:
        raise ValueError(registry.unknown(f"key style of {model.info.name}", style, styles))
    entries = keys.layout({name: tuple(array.shape) for name, array in arrays.items()}, styles[style])
    tensors = {entry.key: keys.to_torch(name, np.asarray(arrays[name]), entry.shape) for name, entry in entries.items()}
    size = model.info.image_size
    metadata = {"format": "pt", **({IMAGE_SIZE: json.dumps(size)} if size else {})}  # "pt": loaders look for it
    write_file(path, {**tensors, **model.buffers(style)}, metadata)


def to_orbax(path: str | os.PathLike[str], model: Staged, arrays: Mapping[str, Any]) -> None:
    """Writes an Orbax checkpoint of nested dicts, {"params": ..., "batch_stats": ...}, as Flax users keep them.

    Read it with `orbax.checkpoint.v1.load(path)`.

    Args:
      path: Of the folder; must not exist.
      model: The network.
      arrays: Its arrays.

    Raises:
      ValueError: If the folder exists.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path}: exists already: give another --out, or remove it")
    _, params, variables, _ = functional.split(model)
    parts = {"params": params, "batch_stats": variables}
    tree = {
        name: functional.nested({tuple(key.split("/")): jnp.asarray(arrays[key]) for key in part})
        for name, part in parts.items()
        if part
    }
    ocp.save(path, tree)


def to_serving(
    path: str | os.PathLike[str],
    model: Staged,
    arrays: Mapping[str, Any],
    normalisation: Normalisation,
    image_size: tuple[int, int],
) -> None:
    """Writes a serialised function from images to logits, for any batch size, that needs JAX alone.

    uint8 [B, height, width, 3] -> float32 [B, C]; normalisation and weights are inside. Read it with
    `jax.export.deserialize(bytearray(file.read())).call(images)`. Lowered for `PLATFORMS`.

    Args:
      path: Of the file; replaced if it exists.
      model: The network.
      arrays: Its arrays.
      normalisation: Of its images.
      image_size: (height, width).
    """
    structure = functional.split(model)[0]
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    mean, std = (jnp.asarray(value, jnp.float32) for value in (normalisation.mean, normalisation.std))

    def forward(image: Array) -> Array:
        return structure.merge(arrays)((image / 255.0 - mean) / std, train=False).logits

    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *image_size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(forward), platforms=PLATFORMS)(shape)
    with replacing(path) as temporary:
        temporary.write_bytes(exported.serialize())
