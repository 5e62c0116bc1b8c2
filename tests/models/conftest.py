"""Modules with values from NumPy, and convolutions from their definition in float64 as oracles."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.models import functional


def _conv(x, kernel, *, stride=1, padding=0, groups=1, bias=0.0):
    """y[b, i, j] = sum over (a, c) of x[b, i * stride + a - padding, j * stride + c - padding] @ kernel[a, c]."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    parts = zip(np.split(windows, groups, axis=3), np.split(kernel, groups, axis=3), strict=True)
    return np.concatenate([np.einsum("bijkac,acko->bijo", w, k) for w, k in parts], axis=-1) + np.asarray(bias)


def _conv_transpose(x, weight, *, stride, padding, bias=0.0):
    """Each input position adds x * weight to the patch it came from; then `padding` rows and columns are cut off.

    `weight` is [kh, kw, in, out], not flipped: weight[a, c] goes to row i * stride + a, column j * stride + c.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    batch, height, width, _ = x.shape
    size = weight.shape[0]
    full = np.zeros((batch, (height - 1) * stride + size, (width - 1) * stride + size, weight.shape[-1]))
    for i in range(height):
        for j in range(width):
            patch = np.einsum("bk,acko->baco", x[:, i, j], weight)
            full[:, i * stride : i * stride + size, j * stride : j * stride + size] += patch
    return full[:, padding : full.shape[1] - padding, padding : full.shape[2] - padding] + np.asarray(bias)


@pytest.fixture
def numpy_conv():
    return _conv


@pytest.fixture
def numpy_conv_transpose():
    return _conv_transpose


def _filled(make, seed=0):
    """The module that `make` builds, with random values from NumPy: no compilation, and no value is a special one."""
    structure, params, variables, constants = functional.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)
    params = {
        name: jnp.asarray(
            rng.normal(1.0 if name.endswith("scale") else 0.0, _spread(value.shape), value.shape), jnp.float32
        )
        for name, value in params.items()
    }
    variables = {
        name: jnp.asarray(
            rng.uniform(0.5, 1.5, value.shape) if name.endswith("var") else rng.normal(0, 0.1, value.shape), jnp.float32
        )
        for name, value in variables.items()
    }
    return structure.merge(params, variables, constants)


def _spread(shape):
    return np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.1


@pytest.fixture
def filled():
    return _filled
