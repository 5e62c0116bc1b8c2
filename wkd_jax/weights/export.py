"""A trained network for others: in PyTorch's keys, as Flax's nested dicts, or as a function that serves.

All take a network (abstract or not) and its arrays by our names.
"""

from __future__ import annotations

import dataclasses
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
from wkd_jax.models.base import Network
from wkd_jax.types import Array, Normalisation
from wkd_jax.weights import keys
from wkd_jax.weights.load import IMAGE_SIZE, NORMALISATION, replacing, write_file

PLATFORMS = ("cpu", "cuda", "tpu")


def to_torch(
    path: str | os.PathLike[str],
    model: Network,
    arrays: Mapping[str, Any],
    *,
    style: str | None = None,
    normalisation: Normalisation | None = None,
) -> list[str]:
    """Writes a safetensors file that the same network in PyTorch loads with `load_state_dict(..., strict=True)`.

    Reading it back gives the same bits. BatchNorm's counters of batches are not written: PyTorch starts them at 0.

    Args:
      path: Of the file; replaced if it exists.
      model: The network.
      arrays: Its arrays.
      style: Whose keys, one of the network's `KEY_STYLES`; None: the first.
      normalisation: How the network wants its images, for those who read the file's metadata; None: not said.

    Returns:
      What the network in PyTorch must be told beside the arrays, a sentence each.

    Raises:
      ValueError: If the network has no such style.
    """
    styles = type(model).KEY_STYLES
    style = next(iter(styles)) if style is None else style
    if style not in styles:
        raise ValueError(registry.unknown(f"key style of {model.info.name}", style, styles))
    entries = keys.layout({name: tuple(array.shape) for name, array in arrays.items()}, styles[style])
    tensors = {
        entry.key: keys.to_torch(name, np.asarray(arrays[name]), entry.shape, entry.steps)
        for name, entry in entries.items()
    }
    metadata = {"format": "pt"}  # loaders look for it
    if size := model.info.image_size:
        metadata[IMAGE_SIZE] = json.dumps(size)
    if normalisation:
        metadata[NORMALISATION] = json.dumps(dataclasses.asdict(normalisation))
    write_file(path, {**tensors, **model.buffers(style)}, metadata)
    return _to_tell(model, style, normalisation)


def _to_tell(model: Network, style: str, normalisation: Normalisation | None) -> list[str]:
    """Of a detector: the eps of its normalisation, and how detectron2 is to feed it."""
    lines = []
    if model.norm_eps not in (None, 1e-5):
        lines.append(f"its normalisation layers have eps={model.norm_eps}")
    if style.startswith("detectron2") and normalisation:
        order = "RGB" if style == "detectron2_rgb" else "BGR"
        turn = 1 if order == "RGB" else -1
        mean, std = (
            [round(255 * value, 6) for value in row[::turn]] for row in (normalisation.mean, normalisation.std)
        )
        lines.append(f"detectron2: INPUT.FORMAT {order!r}, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}")
    return [*lines, *model.remarks(style, "", {})]


def to_orbax(path: str | os.PathLike[str], model: Network, arrays: Mapping[str, Any]) -> None:
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
    model: Network,
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

    Raises:
      ValueError: If the network is a detector: what it finds is more than logits.
    """
    if model.info.task != "classification":
        raise ValueError(
            f"{model.info.name}: the function that serves gives logits, and a {model.info.task} network "
            "has more to say: write --to torch, flax or orbax"
        )
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
