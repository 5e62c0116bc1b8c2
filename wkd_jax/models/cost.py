"""What a network costs, counted from its program without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from wkd_jax.models import functional
from wkd_jax.models.base import Network


def parameters(model: Network) -> int:
    """Trained parameters. The network may be abstract."""
    return sum(math.prod(array.shape) for array in functional.split(model)[1].values())


def macs(model: Network, image_size: tuple[int, int]) -> int:
    """Multiply-adds of convolutions and matrix products, attention's included, for one image in evaluation.

    Products within loops are left out: those are a detector's RoIAlign, which nobody counts.

    Args:
      model: The network, abstract or not.
      image_size: (height, width), pixels.

    Example:
      >>> from flax import nnx
      >>> from wkd_jax.models.resnet import ResNet
      >>> model = nnx.eval_shape(lambda: ResNet("resnet18", 1000, rngs=nnx.Rngs(0)))
      >>> print(f"{macs(model, (224, 224)) / 1e9:.3f} G")
      1.814 G
    """
    structure, params, variables, _ = functional.split(model)
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    program = jax.make_jaxpr(lambda arrays, x: structure.merge(arrays)(x, train=False).logits)(
        {**params, **variables}, image
    )
    return sum(_macs(equation) for equation in _equations(program.jaxpr))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs included, but of loops."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in ("scan", "while"):
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _macs(equation: Any) -> int:
    out = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return out * math.prod(kernel) // out_features
    return 0
