"""RoIAlign on a feature pyramid: which level a box is pooled from, and the pooling in two forms of equal values.

All functions are for one image; `jax.vmap` makes them a batch's. Gradients reach the features; boxes are constants.
Imports jax and numpy only.

Along one axis, a box from lo to hi on a map of stride s has start = lo / s - o and length = (hi - lo) / s, with o = 0.5
where maps are aligned and 0 otherwise, where besides the length is at least 1. Each of P cells has n samples, cell i's
at start + (i + (a + 0.5) / n) length / P for a < n. A sample below -1 or above the map's size counts as 0; any other is
moved into [0, size - 1] and interpolated between its two neighbours. A cell's value is the mean of its samples, over
both axes: a matrix for each axis does it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax.models.detection.boxes import box_area

Array = jax.Array
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # a box of that side, an ImageNet crop's, is pooled from that level
STRIDES = (4, 8, 16, 32)
_HIGHEST = jax.lax.Precision.HIGHEST


def assign_levels(boxes: Array, *, preset: Literal["d2", "tv"] = "d2", min_level: int = 2, max_level: int = 5) -> Array:
    """The pyramid level that each box is pooled from: floor(4 + log2(sqrt(area) / 224)), within the levels there are.

    Areas are compared with where that rule, evaluated in float32, goes one up, so that every device decides alike for
    boxes at the border of two levels.

    Args:
      boxes: [..., 4] xyxy, pixels.
      preset: The small number that keeps such boxes on the upper level. "d2": 1e-8 within the logarithm, as in
        detectron2; "tv": 1e-6 outside of it, as in torchvision.
      min_level: The finest level, of stride 2^min_level.
      max_level: The coarsest.

    Returns:
      [...] int32, counted from the finest level: 0 to max_level - min_level. Empty boxes are on level 0.

    Raises:
      ValueError: If the preset is unknown or the levels are out of order.

    Example:
      >>> print(assign_levels(jnp.array([[0.0, 0.0, 50.0, 50.0], [0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 900.0, 900.0]])))
      [0 2 3]

    References:
      Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv 1612.03144, equation 1.
    """
    if preset not in ("d2", "tv"):
        raise ValueError(f"preset={preset!r}: must be 'd2' or 'tv'")
    if min_level > max_level:
        raise ValueError(f"min_level={min_level}, max_level={max_level}: the finest level has the smallest number")
    area = jax.lax.stop_gradient(box_area(boxes))
    steps = [_first_area(level, preset) for level in range(min_level + 1, max_level + 1)]
    return jnp.sum(area[..., None] >= jnp.array(steps, area.dtype), axis=-1, dtype=jnp.int32)


def roi_align_einsum(
    features: Sequence[Array],
    boxes: Array,
    levels: Array,
    *,
    strides: Sequence[int] = STRIDES,
    output_size: int = 7,
    sampling_ratio: int = 0,
    aligned: bool = True,
    chunk: int = 32,
) -> Array:
    """RoIAlign as two matrix products for each box and level: exact, also with a number of samples that fits the box.

    Each box meets all levels, with weights 0 on those that are not its own, and the longer side of a map goes first.
    It costs two orders of magnitude more operations than `roi_align_gather`, all of them in matrix products, and its
    gradient has no scattered sums: it is the same in every run.

    Args:
      features: [H, W, D] maps, from fine to coarse, of one dtype, which the weights, computed in float32, take too.
      boxes: [R, 4] xyxy, pixels; the time grows with the longest side.
      levels: [R] integers, positions in `features`, as from `assign_levels`; other values give 0.
      strides: Pixels from one position to the next, of each map.
      output_size: Cells along each side, P.
      sampling_ratio: Samples along each side of a cell. 0: one for each position of the map that a cell is long,
        rounded up, as detectron2 has it.
      aligned: Whether a position's centre is at half its stride, as in detectron2; torchvision's detectors have False.
      chunk: Boxes at a time, which bounds memory: about chunk * P * (longest map's positions / its longer side) * D.

    Returns:
      [R, P, P, D], dtype of the features. An empty box gives 0 where `sampling_ratio` is 0 and `aligned` True.

    Raises:
      ValueError: If shapes, dtypes or settings do not fit.

    Example:
      >>> ramp = jnp.tile(jnp.arange(8.0)[:, None], (8, 1, 1))  # the value is the horizontal position
      >>> pooled = roi_align_einsum(
      ...     [ramp], jnp.array([[8.0, 8.0, 24.0, 24.0]]), jnp.array([0]), strides=(4,), output_size=2)
      >>> print(pooled[0, :, :, 0])
      [[2.5 4.5]
       [2.5 4.5]]

    References:
      He et al., "Mask R-CNN", ICCV 2017, arXiv 1703.06870, section 3.
    """
    _check(features, boxes, levels, strides, output_size, chunk)
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio={sampling_ratio}: must be at least 1, or 0 for as many as fit the box")

    def pool(box: Array, level: Array) -> Array:
        total = jnp.zeros((), jnp.promote_types(features[0].dtype, jnp.float32))
        for number, (x, stride) in enumerate(zip(features, strides, strict=True)):
            height, width, _ = x.shape
            across, down = (
                _matrix(axis._replace(samples=jnp.where(level == number, axis.samples, 0)), output_size, size)
                for axis, size in zip(
                    _axes(box, 1 / stride, output_size, sampling_ratio, aligned), (width, height), strict=True
                )
            )
            if width >= height:
                total += _product("ph,qhc->pqc", down, _product("qw,hwc->qhc", across, x).astype(x.dtype))
            else:
                total += _product("qw,pwc->pqc", across, _product("ph,hwc->pwc", down, x).astype(x.dtype))
        return total.astype(features[0].dtype)

    return _in_chunks(pool, boxes, levels, chunk)


def roi_align_gather(
    features: Sequence[Array],
    boxes: Array,
    levels: Array,
    *,
    strides: Sequence[int] = STRIDES,
    output_size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = True,
    chunk: int = 128,
) -> Array:
    """RoIAlign with a fixed number of samples, read one by one from the pyramid laid out as a single table.

    The level of a box costs nothing here. The gradient is a scattered sum: on a GPU its order, and so the last digits,
    change from run to run.

    Args:
      features: [H, W, D] maps, from fine to coarse, of one dtype, which the weights, computed in float32, take too.
      boxes: [R, 4] xyxy, pixels.
      levels: [R] integers, positions in `features`, as from `assign_levels`.
      strides: Pixels from one position to the next, of each map.
      output_size: Cells along each side, P.
      sampling_ratio: Samples along each side of a cell, at least 1.
      aligned: As in `roi_align_einsum`.
      chunk: Boxes at a time, which bounds memory: chunk * (2 P * sampling_ratio)^2 * D.

    Returns:
      [R, P, P, D], dtype of the features.

    Raises:
      ValueError: If shapes, dtypes or settings do not fit.

    Example:
      >>> ramp = jnp.tile(jnp.arange(8.0)[:, None], (8, 1, 1))
      >>> pooled = roi_align_gather(
      ...     [ramp], jnp.array([[8.0, 8.0, 24.0, 24.0]]), jnp.array([0]), strides=(4,), output_size=2)
      >>> print(pooled[0, :, :, 0])
      [[2.5 4.5]
       [2.5 4.5]]

    References:
      He et al., "Mask R-CNN", ICCV 2017, arXiv 1703.06870, section 3.
    """
    _check(features, boxes, levels, strides, output_size, chunk)
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio={sampling_ratio}: must be at least 1; roi_align_einsum fits it to the box")
    heights, widths = (np.array([x.shape[side] for x in features], np.int32) for side in (0, 1))
    offsets = np.cumsum([0, *heights * widths])[:-1].astype(np.int32)
    scales = 1 / np.array(strides, np.float32)
    table = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in features])

    def pool(box: Array, level: Array) -> Array:
        height, width, offset, scale = (jnp.asarray(of)[level] for of in (heights, widths, offsets, scales))
        (column, across), (row, down) = (
            _taps(axis, output_size, sampling_ratio, size)
            for axis, size in zip(_axes(box, scale, output_size, sampling_ratio, aligned), (width, height), strict=True)
        )
        values = table[offset + row[:, :, None, None] * width + column]  # [P, taps, P, taps, D]
        down, across = down.astype(table.dtype), across.astype(table.dtype)
        rows = _product("pi,piqjc->pqjc", down, values).astype(table.dtype)
        return _product("qj,pqjc->pqc", across, rows).astype(table.dtype)

    return _in_chunks(pool, boxes, levels, chunk)


class _Axis(NamedTuple):
    """A box along one axis, in positions of the map: its start, the length of a cell, and a cell's samples."""

    start: Array
    length: Array
    samples: Array


def _axes(box: Array, scale: float | Array, cells: int, ratio: int, aligned: bool) -> tuple[_Axis, _Axis]:
    """Horizontal and vertical."""
    shift = 0.5 if aligned else 0.0
    start, end = box[:2] * scale - shift, box[2:] * scale - shift
    length = end - start if aligned else jnp.maximum(end - start, 1)
    if ratio:
        samples = jnp.full(2, ratio, jnp.int32)
    else:
        # Compiled programs multiply by the inverse of a constant: 21 / 7 may exceed 3. Products of whole numbers are
        # exact and put it right. A box without end would be a loop without end.
        number = jnp.ceil(length / cells)
        number += (number * cells < length).astype(length.dtype) - ((number - 1) * cells >= length)
        samples = jnp.where(jnp.isfinite(length), number, 0).astype(jnp.int32)
    horizontal, vertical = (_Axis(start[i], length[i] / cells, samples[i]) for i in (0, 1))
    return horizontal, vertical


def _positions(axis: _Axis, cells: int, number: Array, size: int | Array) -> tuple[Array, Array]:
    """Where the samples `number` ([n], or one) of all cells read the map, and whether they count: [cells, n] each."""
    samples = jnp.maximum(axis.samples, 1)
    y = axis.start + jnp.arange(cells)[:, None] * axis.length + (number + 0.5) * (axis.length / samples)
    return jnp.clip(y, 0, size - 1), (y >= -1) & (y <= size)


def _matrix(axis: _Axis, cells: int, size: int) -> Array:
    """[cells, size] weights of a map's positions in the cells; float32."""

    def add(number: Array, total: Array) -> Array:
        y, inside = _positions(axis, cells, number, size)
        return total + jnp.where(inside, jnp.maximum(1 - jnp.abs(y - jnp.arange(size)), 0), 0)

    total = jax.lax.fori_loop(0, axis.samples, add, jnp.zeros((cells, size), axis.start.dtype))
    return total / jnp.maximum(axis.samples, 1)


def _taps(axis: _Axis, cells: int, ratio: int, size: Array) -> tuple[Array, Array]:
    """The two neighbours of each sample and their weights in a cell, [cells, 2 * ratio] each: int32, float32."""
    y, inside = _positions(axis, cells, jnp.arange(ratio), size)
    low = jnp.floor(y).astype(jnp.int32)
    index = jnp.concatenate([low, jnp.minimum(low + 1, size - 1)], axis=1)
    fraction = y - low
    weight = jnp.where(jnp.tile(inside, 2), jnp.concatenate([1 - fraction, fraction], axis=1), 0)
    return index, weight / ratio


def _product(subscripts: str, weights: Array, x: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, weights.astype(x.dtype), x, precision=_HIGHEST, preferred_element_type=wide)


def _in_chunks(pool: Callable[[Array, Array], Array], boxes: Array, levels: Array, chunk: int) -> Array:
    """`pool` of every box, in chunks of one size, which the last is padded to: one loop and nothing after it."""
    boxes, count = jax.lax.stop_gradient(jnp.asarray(boxes, jnp.float32)), len(boxes)
    chunks = max(-(-count // chunk), 1)
    missing = -count % chunks
    boxes, levels = jnp.pad(boxes, ((0, missing), (0, 0))), jnp.pad(levels, (0, missing))
    pooled = jax.lax.map(
        lambda x: jax.vmap(pool)(*x), (boxes.reshape(chunks, -1, 4), levels.reshape(chunks, boxes.shape[0] // chunks))
    )
    return pooled.reshape(-1, *pooled.shape[2:])[:count]


@functools.cache
def _first_area(level: int, preset: str) -> float:
    """The smallest float32 area that the rule puts on that level or above: the exact one but for a few roundings."""
    nominal = np.float32((CANONICAL_SIDE * 2.0 ** (level - CANONICAL_LEVEL)) ** 2)
    areas = (nominal.view(np.int32) + np.arange(-64, 64, dtype=np.int32)).view(np.float32)
    ratio = np.sqrt(areas) / np.float32(CANONICAL_SIDE)
    inside, outside = (np.float32(1e-8), np.float32(0)) if preset == "d2" else (np.float32(0), np.float32(1e-6))
    rule = np.float32(CANONICAL_LEVEL) + np.log2(ratio + inside) + outside
    return float(areas[np.argmax(rule >= level)])


def _check(
    features: Sequence[Array], boxes: Array, levels: Array, strides: Sequence[int], output_size: int, chunk: int
) -> None:
    if len(features) != len(strides) or not len(features):
        raise ValueError(f"{len(features)} maps and strides={tuple(strides)}: need one stride for each map")
    shapes = [(x.shape, str(x.dtype)) for x in features]
    if any(len(shape) != 3 for shape, _ in shapes) or len({(shape[-1], dtype) for shape, dtype in shapes}) > 1:
        raise ValueError(f"features must be [H, W, D] maps of one image, one D and one dtype, got {shapes}")
    if jnp.ndim(boxes) != 2 or jnp.shape(boxes) != (*jnp.shape(levels), 4):
        raise ValueError(f"need boxes [R, 4] and levels [R], got {jnp.shape(boxes)} and {jnp.shape(levels)}")
    if output_size < 1 or chunk < 1:
        raise ValueError(f"output_size={output_size}, chunk={chunk}: must be at least 1")
