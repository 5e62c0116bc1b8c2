"""Vision Transformers of Google's `augreg` collection (arXiv 2106.10270): .npz files with the names of a Flax module.

Their arrays are split by head and by query, key and value; here they become the state dict of the same network in
timm's keys and PyTorch's layouts, so that one description of a network's keys serves all sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

_BLOCK = "Transformer/encoderblock_"
_PREFIX = "opt/target/"  # of files that hold the state of an optimizer


def is_google(keys: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the arrays of such a file."""
    return any(key.removeprefix(_PREFIX).startswith(_BLOCK) for key in keys)


def to_timm(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict. What is not known keeps its own key, so that it is reported as left over.

    Example:
      >>> arrays = {"Transformer/encoder_norm/scale": np.ones(4), "head/kernel": np.ones((4, 10))}
      >>> {key: value.shape for key, value in to_timm(arrays).items()}
      {'norm.weight': (4,), 'head.weight': (10, 4)}
    """
    arrays = {key.removeprefix(_PREFIX): value for key, value in arrays.items()}
    state: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        if block := re.fullmatch(rf"{_BLOCK}(\d+)/(.+)", key):
            state |= _in_block(f"blocks.{block[1]}", block[2], value, arrays, key)
        elif key in _OUTSIDE:
            name, transposed = _OUTSIDE[key]
            state[name] = value.transpose(_REVERSED[value.ndim]) if transposed else value
        else:
            state[key] = value
    return state


_REVERSED = {2: (1, 0), 4: (3, 2, 0, 1)}
_OUTSIDE = {
    "cls": ("cls_token", False),
    "embedding/kernel": ("patch_embed.proj.weight", True),
    "embedding/bias": ("patch_embed.proj.bias", False),
    "Transformer/posembed_input/pos_embedding": ("pos_embed", False),
    "Transformer/encoder_norm/scale": ("norm.weight", False),
    "Transformer/encoder_norm/bias": ("norm.bias", False),
    "head/kernel": ("head.weight", True),
    "head/bias": ("head.bias", False),
}
_INSIDE = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_2/scale": "norm2.weight",
    "LayerNorm_2/bias": "norm2.bias",
    "MlpBlock_3/Dense_0/kernel": "mlp.fc1.weight",
    "MlpBlock_3/Dense_0/bias": "mlp.fc1.bias",
    "MlpBlock_3/Dense_1/kernel": "mlp.fc2.weight",
    "MlpBlock_3/Dense_1/bias": "mlp.fc2.bias",
}
_ATTENTION = "MultiHeadDotProductAttention_1"


def _in_block(
    block: str, name: str, value: np.ndarray, arrays: Mapping[str, np.ndarray], key: str
) -> dict[str, np.ndarray]:
    """The entry, or none, that one array of a transformer block gives."""
    if name in _INSIDE:
        return {f"{block}.{_INSIDE[name]}": value.T}  # .T leaves a vector as it is
    if name == f"{_ATTENTION}/out/kernel":  # [heads, hd, D]
        return {f"{block}.attn.proj.weight": value.reshape(-1, value.shape[-1]).T}
    if name == f"{_ATTENTION}/out/bias":
        return {f"{block}.attn.proj.bias": value}
    part = re.fullmatch(rf"{_ATTENTION}/(query|key|value)/(kernel|bias)", name)
    three = [key.replace(f"/{part[1]}/", f"/{other}/") for other in ("query", "key", "value")] if part else []
    if not part or not all(other in arrays for other in three):
        return {key: value}
    if part[1] != "query":
        return {}  # the entry of its query holds it
    if part[2] == "bias":  # [heads, hd] each
        return {f"{block}.attn.qkv.bias": np.concatenate([arrays[other].ravel() for other in three])}
    rows = [arrays[other].reshape(len(arrays[other]), -1).T for other in three]  # [D, heads, hd] -> [heads * hd, D]
    return {f"{block}.attn.qkv.weight": np.concatenate(rows)}
