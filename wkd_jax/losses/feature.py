"""What losses on feature maps are made of: the mean squared difference, and adaptive average pooling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def mse(student: Array, teacher: Array) -> Array:
    """Mean squared difference over all entries of an example: FitNet's loss, once the student's feature is regressed.

    The teacher's feature is a constant. The mean over a batch is the mean over all of its entries.

    Args:
      student: [B, ...], any float dtype; computed in float32, or float64 where an input is.
      teacher: Same shape.

    Returns:
      [B], feature units squared.

    Raises:
      ValueError: If the shapes differ, or there is no axis besides B.

    Example:
      >>> print(mse(jnp.array([[1.0, 3.0], [0.0, 0.0]]), jnp.array([[1.0, 1.0], [1.0, -1.0]])))
      [2. 1.]

    References:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550, equation 3.
    """
    if jnp.shape(student) != jnp.shape(teacher) or jnp.ndim(student) < 2:
        raise ValueError(
            f"student and teacher must be of one shape [B, ...], got {jnp.shape(student)} and {jnp.shape(teacher)}; a "
            "connector maps the one to the other"
        )
    student, teacher = widened(student, jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.square(student - teacher), axis=tuple(range(1, student.ndim)))


def adaptive_average_pool(x: Array, size: int) -> Array:
    """Means over size x size cells of a map; cell i of n positions covers floor(i n / size) to ceil((i + 1) n / size).

    Cells overlap where `size` does not divide the side, as in PyTorch's layer of that name.

    Args:
      x: [B, H, W, D], floats.
      size: Cells along each side, at least 1.

    Returns:
      [B, size, size, D], dtype of `x`.

    Raises:
      ValueError: If `x` is no map of floats.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> print(adaptive_average_pool(x, 2)[0, :, :, 0])
      [[2. 3.]
       [5. 6.]]
    """
    if jnp.ndim(x) != 4 or size < 1 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"needs a map [B, H, W, D] of floats and size >= 1, got {jnp.result_type(x)} {jnp.shape(x)} and size={size}"
        )
    rows, columns = (_cells(side, size).astype(jnp.result_type(x)) for side in x.shape[1:3])
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return einsum("ih,bhjd->bijd", rows, einsum("jw,bhwd->bhjd", columns, x))


def _cells(side: int, size: int) -> np.ndarray:
    """[size, side] weights that average the positions of each cell."""
    cells = np.zeros((size, side))
    for i in range(size):
        start, stop = i * side // size, -(-(i + 1) * side // size)
        cells[i, start:stop] = 1 / (stop - start)
    return cells


def widened(*arrays: Array) -> list[Array]:
    """The arrays in the dtype that losses compute in: float32, or float64 where one of them is.

    Args:
      *arrays: Of any shapes and float dtypes.

    Returns:
      As many, all of one dtype.

    Example:
      >>> [x.dtype.name for x in widened(jnp.zeros(1, jnp.bfloat16), jnp.zeros(1))]
      ['float32', 'float32']
    """
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return [jnp.asarray(x, dtype) for x in arrays]
