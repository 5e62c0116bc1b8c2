"""Class similarity of a teacher: what a spec may say, and how its features or its classifier become a matrix.

A spec is the `interrelation` section of a config:

| key | value |
| --- | --- |
| kind | "cka" of class features, "cosine" of class means, "classifier": cosine of the classifier's rows |
| kernel | of cka: "linear", "polynomial" or "rbf" |
| degree | of the polynomial kernel |
| bandwidth | of the rbf kernel, the alpha of exp(-d^2 / (2 alpha^2 median d^2)) |
| features | "logits", "pooled", or the name of a tap: every position is a sample |
| samples_per_class | the first so many training images of each class; 0: as many as the smallest class has |
| file | a matrix made elsewhere; it replaces everything above |

The released ImageNet matrices are linear CKA of logits, 732 images a class; those of CIFAR-100 are linear CKA of the
last tap, all 500.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wkd_jax import registry
from wkd_jax.losses.similarity import cka, cosine_similarity

DEFAULTS: dict[str, Any] = {
    "kind": "cka",
    "kernel": "linear",
    "degree": 2,
    "bandwidth": 0.4,
    "features": "logits",
    "samples_per_class": 0,
    "file": "",
}
_KINDS = ("cka", "cosine", "classifier")
_KERNELS = {"linear": (), "polynomial": ("degree",), "rbf": ("bandwidth",)}


def relevant(spec: Mapping[str, Any], samples_per_class: int) -> dict[str, Any]:
    """The settings that the matrix depends on, and no others: changing the degree does not outdate a linear kernel.

    Args:
      spec: Any subset of `DEFAULTS`' keys.
      samples_per_class: The number itself, where the spec says 0. Not used by kind "classifier".

    Raises:
      ValueError: For an unknown key, kind or kernel, or a value out of range.

    Example:
      >>> relevant({"kind": "cosine", "features": "pooled"}, 500)
      {'kind': 'cosine', 'features': 'pooled', 'samples_per_class': 500}
    """
    spec = check(spec)
    if spec["kind"] == "classifier":
        return {"kind": "classifier"}
    kernel = {key: spec[key] for key in ("kernel", *_KERNELS[spec["kernel"]])} if spec["kind"] == "cka" else {}
    return {"kind": spec["kind"], **kernel, "features": spec["features"], "samples_per_class": samples_per_class}


def check(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with every default filled in.

    Raises:
      ValueError: For an unknown key, kind or kernel, or a value out of range.
    """
    for key in spec:
        if key not in DEFAULTS:
            raise ValueError(f"interrelation.{key}: {registry.unknown('key', key, DEFAULTS)}")
    full = {**DEFAULTS, **spec}
    for key, known in (("kind", _KINDS), ("kernel", tuple(_KERNELS))):
        if full[key] not in known:
            raise ValueError(f"interrelation.{key}: {registry.unknown(key, full[key], known)}")
    for key in ("degree", "bandwidth"):
        if not full[key] > 0:
            raise ValueError(f"interrelation.{key}={full[key]}: must be above 0")
    if full["samples_per_class"] != 0 and not full["samples_per_class"] >= 2:
        raise ValueError(f"interrelation.samples_per_class={full['samples_per_class']}: must be 0 or at least 2")
    return full


def from_features(spec: Mapping[str, Any], features: np.ndarray) -> np.ndarray:
    """Class similarity from class features.

    Args:
      spec: Of kind "cka" or "cosine".
      features: [C, N, D], see `wkd_jax.interrelation.collect`.

    Returns:
      [C, C] float32, symmetric, 1 on the diagonal.

    Raises:
      ValueError: If the spec is not valid, or of kind "classifier".

    Example:
      >>> x = np.array([[[1.0, 0.0], [3.0, 2.0]], [[1.0, 0.0], [1.0, 2.0]]])
      >>> from_features({"kind": "cosine"}, x).round(4)
      array([[1.    , 0.9487],
             [0.9487, 1.    ]], dtype=float32)
    """
    spec = check(spec)
    if spec["kind"] == "classifier":
        raise ValueError("interrelation.kind='classifier' is made from the classifier's kernel, not from features")
    if spec["kind"] == "cosine":
        return _cosine(features.mean(axis=1, dtype=np.float64))
    kernel = spec["kernel"]
    arguments = {key: spec[key] for key in _KERNELS[kernel]}
    return jax.device_get(cka(jax.device_put(features), kernel=kernel, **arguments))


def from_classifier(kernel: np.ndarray) -> np.ndarray:
    """Class similarity from the rows of a classifier, one a class.

    Args:
      kernel: [D, C], as Flax keeps it (`ModelInfo.classifier` is its path).

    Returns:
      [C, C] float32, symmetric, 1 on the diagonal.

    Example:
      >>> from_classifier(np.array([[1.0, 3.0], [0.0, 4.0]])).round(4)
      array([[1. , 0.6],
             [0.6, 1. ]], dtype=float32)
    """
    return _cosine(np.asarray(jax.device_get(kernel)).T)


def _cosine(prototypes: np.ndarray) -> np.ndarray:
    return jax.device_get(jax.jit(cosine_similarity)(jax.device_put(prototypes.astype(np.float32))))
