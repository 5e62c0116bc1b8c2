"""ICKD-C: the inter-channel correlations of a student's feature follow the teacher's."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from wkd_jax.losses.feature import widened

Array = jax.Array


def ickd(student: Array, teacher: Array, *, form: Literal["cifar", "imagenet", "paper"] = "cifar") -> Array:
    """Squared difference of the two sides' C x C matrices of products between channels, G = F F^T.

    "cifar": rows of G are scaled to unit norm, and q = |G_s - G_t|_F^2 is divided by C. "imagenet": divided by C B, the
    code of that name being C B^2 for a batch whose mean is still to be taken here: with B examples, the batch's mean is
    1 / B of that of "cifar". "paper": rows as they are, q / C^2. The teacher is a constant.

    No C x C matrix is made where a feature has fewer positions than channels: row c of G_s times row c of G_t is
    f_c^T (F_s^T F_t) h_c, and the matrix in the middle is positions x positions. A q near 0 is therefore exact to
    rounding of the norms it is the difference of, and may come out a few 1e-7 C below 0.

    Args:
      student: [B, ..., C] maps or tokens, any float dtype; computed in float32, or float64 where an input is.
      teacher: [B, ..., C]; its positions may be other in number.
      form: One of the above.

    Returns:
      [B].

    Raises:
      ValueError: If the shapes do not fit, or there is no such form.

    Example:
      >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])  # two positions, two channels: G is the identity
      >>> y = jnp.array([[[1.0, 1.0]]])  # one position: G is all ones
      >>> print(ickd(x, x), ickd(x, y).round(4), ickd(x, y, form="paper"))  # rows at 0 and at 45 degrees; 2 / 4
      [0.] [0.5858] [0.5]

    References:
      Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation", ICCV 2021, arXiv
      2202.03680.
    """
    shapes = jnp.shape(student), jnp.shape(teacher)
    if any(len(shape) < 3 for shape in shapes) or any(shapes[0][axis] != shapes[1][axis] for axis in (0, -1)):
        raise ValueError(
            f"student and teacher must be [B, ..., C] with the same B and C, got {shapes[0]} and {shapes[1]}; a "
            "connector maps the one's channels to the other's"
        )
    if form not in ("cifar", "imagenet", "paper"):
        raise ValueError(f"form={form!r}: must be 'cifar', 'imagenet' or 'paper'")
    batch, channels = shapes[0][0], shapes[0][-1]
    student, teacher = (x.reshape(batch, -1, channels) for x in widened(student, jax.lax.stop_gradient(teacher)))
    own, target, cross = (
        _row_products(student, student),
        _row_products(teacher, teacher),
        _row_products(student, teacher),
    )
    if form == "paper":
        return jnp.sum(own + target - 2 * cross, axis=-1) / channels**2
    (alive_s, scale_s), (alive_t, scale_t) = _inverse_norm(own), _inverse_norm(target)
    rows = alive_s.astype(own.dtype) + alive_t - 2 * cross * scale_s * scale_t
    return jnp.sum(rows, axis=-1) / (channels * (batch if form == "imagenet" else 1))


def _row_products(x: Array, y: Array) -> Array:
    """[B, C]: of row c of x's channel matrix and row c of y's, from [B, positions, C]."""

    def product(subscripts: str, left: Array, right: Array) -> Array:
        return jnp.einsum(subscripts, left, right, precision=jax.lax.Precision.HIGHEST)

    if x.shape[1] * y.shape[1] < x.shape[2] ** 2:
        across = product("bmn,bnc->bmc", product("bmc,bnc->bmn", x, y), y)
        return jnp.sum(x * across, axis=1)
    return jnp.sum(product("bmc,bmd->bcd", x, x) * product("bnc,bnd->bcd", y, y), axis=-1)


def _inverse_norm(squared: Array) -> tuple[Array, Array]:
    """Which rows have a norm, and one over it (0 where they have none)."""
    alive = squared > 0
    return alive, jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, squared, 1)), 0)
