"""Class similarity of a teacher: what a spec may say, and how its features or its classifier become a matrix.

A spec is the `interrelation` section of a config:

| key | value |
| --- | --- |
| kind | see below |
| centred | of cosine and classifier: subtract the mean of all classes first |
| temperature | of confusion: of the softmax |
| kernel | of cka: "linear", "polynomial" or "rbf" |
| degree | of the polynomial kernel |
| bandwidth | of the rbf kernel, the alpha of exp(-d^2 / (2 alpha^2 median d^2)) |
| features | "logits", "pooled", or the name of a tap: every position is a sample |
| samples_per_class | the first so many training images of each class; 0: as many as the smallest class has |
| file | a matrix made elsewhere; it replaces everything above |
| mean_distance | scales 1 - similarity to this mean over pairs of classes, whatever it was made from; 0: as it is |
| groups | a name for each class: which belong together, for the report alone |

| kind | similarity of two classes |
| --- | --- |
| cka | alignment of their features, sample k of one paired with sample k of the other |
| cosine | of their mean features |
| classifier | cosine of their rows of the classifier |
| gaussian | 1 - the 2-Wasserstein distance of diagonal Gaussians of their features, over the largest |
| confusion | Bhattacharyya coefficient of the teacher's mean predictions on their images; of logits |
| logit_correlation | correlation of their two logits over the same images, those of all classes; of logits |
| uniform | 0: all classes equally far, the control without any meaning |

The released ImageNet matrices are linear CKA of logits, 732 images a class; those of CIFAR-100 are linear CKA of the
last tap, all 500. What each kind can and cannot see: docs/interrelations.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wkd_jax import config
from wkd_jax.losses.similarity import (
    cka,
    confusion_similarity,
    cosine_similarity,
    gaussian_similarity,
    logit_correlation,
)

_KERNELS = {"linear": (), "polynomial": ("degree",), "rbf": ("bandwidth",)}
_ALIKE = 1e-6  # distances that rounding leaves between equal classes
_OWN = {"confusion": ("temperature",)}  # kind -> what it depends on besides the features


def uses_features(spec: Mapping[str, Any]) -> bool:
    """Whether the matrix is made from features, so that a pass over training images is needed.

    Example:
      >>> uses_features({}), uses_features({"kind": "classifier"}), uses_features({"file": "distance.npy"})
      (True, False, False)
    """
    spec = config.interrelation(spec)
    return spec["kind"] not in ("classifier", "uniform") and not spec["file"]


def relevant(spec: Mapping[str, Any], samples_per_class: int) -> dict[str, Any]:
    """The settings that the matrix depends on, and no others: changing the degree does not outdate a linear kernel.

    Args:
      spec: Any subset of its keys.
      samples_per_class: The number itself, where the spec says 0. Of no use to kinds without features.

    Raises:
      ValueError: For an unknown key, kind or kernel, or a value out of range.

    Example:
      >>> relevant({"kind": "cosine", "features": "pooled"}, 500)
      {'kind': 'cosine', 'features': 'pooled', 'samples_per_class': 500}
    """
    spec = config.interrelation(spec)
    kind = spec["kind"]
    keys = ["kind"]
    if kind == "cka":
        keys += ["kernel", *_KERNELS[spec["kernel"]]]
    if kind in ("cosine", "classifier") and spec["centred"]:  # records of older versions do not have it
        keys += ["centred"]
    keys += _OWN.get(kind, ())
    found = {key: spec[key] for key in keys}
    if kind in ("classifier", "uniform"):
        return found
    return found | {"features": spec["features"], "samples_per_class": samples_per_class}


def from_features(spec: Mapping[str, Any], features: np.ndarray) -> np.ndarray:
    """Class similarity from class features.

    Args:
      spec: Of a kind that is made from features.
      features: [C, N, D], see `wkd_jax.interrelation.collect`.

    Returns:
      [C, C] float32, symmetric, 1 on the diagonal.

    Raises:
      ValueError: If the spec is not valid, or of a kind that is not made from features.

    Example:
      >>> x = np.array([[[1.0, 0.0], [3.0, 2.0]], [[1.0, 0.0], [1.0, 2.0]]])
      >>> from_features({"kind": "cosine"}, x).round(4)
      array([[1.    , 0.9487],
             [0.9487, 1.    ]], dtype=float32)
    """
    spec = config.interrelation(spec)
    kind = spec["kind"]
    if kind == "cosine":
        return _cosine(features.mean(axis=1, dtype=np.float64), spec["centred"])
    if kind == "cka":
        of = functools.partial(cka, **{key: spec[key] for key in ("kernel", *_KERNELS[spec["kernel"]])})
    elif kind == "gaussian":
        of = jax.jit(gaussian_similarity)
    elif kind == "confusion":
        of = jax.jit(functools.partial(confusion_similarity, temperature=spec["temperature"]))
    elif kind == "logit_correlation":
        of = jax.jit(logit_correlation)
    else:
        raise ValueError(f"interrelation.kind={kind!r} is not made from features")
    return jax.device_get(of(jax.device_put(features)))


def from_classifier(kernel: np.ndarray, *, centred: bool = False) -> np.ndarray:
    """Class similarity from the rows of a classifier, one a class.

    Args:
      kernel: [D, C], as Flax keeps it (`ModelInfo.classifier` is its path).
      centred: See `losses.cosine_similarity`.

    Returns:
      [C, C] float32, symmetric, 1 on the diagonal.

    Example:
      >>> from_classifier(np.array([[1.0, 3.0], [0.0, 4.0]])).round(4)
      array([[1. , 0.6],
             [0.6, 1. ]], dtype=float32)
    """
    return _cosine(np.asarray(jax.device_get(kernel)).T, centred)


def rescaled(similarity: np.ndarray, mean_distance: float) -> np.ndarray:
    """A similarity of which 1 - similarity has this mean over pairs of different classes; what is most alike stays so.

    Args:
      similarity: [C, C], 1 on the diagonal. Values above 1, which rounding leaves, count as 1.
      mean_distance: At least 0; 0: nothing is changed.

    Returns:
      [C, C] float32.

    Raises:
      ValueError: If all distances are 0, so that no factor changes them.

    Example:
      >>> rescaled(np.array([[1.0, 0.9, 0.8], [0.9, 1.0, 0.7], [0.8, 0.7, 1.0]]), 0.5)
      array([[1.  , 0.75, 0.5 ],
             [0.75, 1.  , 0.25],
             [0.5 , 0.25, 1.  ]], dtype=float32)
    """
    if not mean_distance:
        return similarity
    distance = np.maximum(1 - np.asarray(similarity, np.float64), 0)
    np.fill_diagonal(distance, 0)
    if distance.max(initial=0) <= _ALIKE:
        raise ValueError(
            f"interrelation.mean_distance={mean_distance}: all classes are alike, and no factor gives distances of 0 a "
            "mean: leave it out, use more samples a class (two always look alike to CKA), or another interrelation.kind"
        )
    classes = len(distance)
    return (1 - distance * (mean_distance * classes * (classes - 1) / distance.sum())).astype(np.float32)


def _cosine(prototypes: np.ndarray, centred: bool) -> np.ndarray:
    of = jax.jit(functools.partial(cosine_similarity, centred=centred))
    return jax.device_get(of(jax.device_put(prototypes.astype(np.float32))))
