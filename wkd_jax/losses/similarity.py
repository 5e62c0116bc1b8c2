"""How alike classes are, and the ground cost of a transport between classes that follows from it."""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
_Stats = TypeVar("_Stats")

_WORKSPACE = 2**28  # bytes that one block of features, or of kernel values, may take
_ROUNDING = 16 * float(np.finfo(np.float32).eps)  # relative to a vector: what float32 leaves of one that should be zero
_ROWS = 128  # samples a block; below it batched products are slow (measured: 13 GFLOP/s at 64, 43 at 128)


def cka(features: Array, *, kernel: str = "linear", degree: int | None = None, bandwidth: float | None = None) -> Array:
    r"""Centred kernel alignment between classes: sum(Kc_i * Kc_j) / (|Kc_i|_F |Kc_j|_F), Kc_i = H K_i H.

    K_i [N, N] is the kernel between the N samples of class i and H subtracts the mean of rows and columns. Sample n of
    one class is paired with sample n of every other, so the order of samples matters. The rbf kernel's median includes
    the zero distances of samples to themselves.

    | kernel | K(x, y) |
    | --- | --- |
    | linear | x . y |
    | polynomial | (x . y + 1)^degree |
    | rbf | exp(-|x - y|^2 / (2 bandwidth^2 Med)), Med the class's median of its N * N squared distances |

    The product of all pairs of classes is a sum of matrix products [C, n] [n, C] over blocks of the Gram matrices, of
    which the upper triangle is enough. Where it takes fewer operations, which is when D^2 is below about N, the linear
    kernel uses |X_i^T X_j|_F^2 with centred X instead, blocks of classes at a time.

    Memory besides `features` on the device: about 0.2 GB and 64 kB a class; in the second form 0.6 GB, or twice one
    class's features where that is more. Other kernels than linear also hold a few [N, N] matrices.

    Args:
      features: [C, N, D], any float dtype; computed in float32.
      kernel: "linear", "polynomial" or "rbf".
      degree: Of the polynomial kernel, an integer of at least 1. Default 2; refused with another kernel.
      bandwidth: Of the rbf kernel, above 0, without unit. Default 0.4; refused with another kernel.

    Returns:
      [C, C] float32 in [0, 1], symmetric, exactly 1 on the diagonal. A class whose samples are all the same has no
      direction to align: 0 to every other class.

    Raises:
      ValueError: For an unknown kernel, an argument that the kernel does not have, one out of range, or a wrong shape.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5]])
      >>> print(np.asarray(cka(jnp.stack([x, 2 * x + 1, x[::-1]]))).round(4))
      [[1.     1.     0.3741]
       [1.     1.     0.3741]
       [0.3741 0.3741 1.    ]]

    References:
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414.
      Lv et al., arXiv 2412.08139 (its use between classes).
    """
    _check_features(features)
    if kernel not in ("linear", "polynomial", "rbf"):
        raise ValueError(f"kernel={kernel!r}: valid are linear, polynomial and rbf")
    for name, value, owner in (("degree", degree, "polynomial"), ("bandwidth", bandwidth, "rbf")):
        if value is not None and kernel != owner:
            raise ValueError(f"{name}={value}: the {kernel} kernel has no {name}, only the {owner} kernel has one")
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: must be above 0")
    if degree is not None and degree != int(degree):
        raise ValueError(f"degree={degree}: must be an integer")
    parameter = {"linear": 0.0, "polynomial": degree or 2, "rbf": bandwidth or 0.4}[kernel]
    similarity: Array = _cka(jnp.asarray(features), kernel=kernel, parameter=parameter)
    return similarity


def cosine_similarity(prototypes: Array, *, centred: bool = False) -> Array:
    """Cosine of the angle between the classes' prototypes: class means, or rows of a classifier.

    Args:
      prototypes: [C, D], any float dtype; computed in float32.
      centred: Subtract the mean of the prototypes first: what all classes have in common makes none of them alike. The
        cosine of two classes is then always -1, and that of C unrelated ones -1 / (C - 1) on average. What is left
        below 2e-6 of the largest prototype is rounding and counts as zero.

    Returns:
      [C, C] float32 in [-1, 1], symmetric, exactly 1 on the diagonal; 0 between a zero prototype and any other.

    Raises:
      ValueError: If the shape is another.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
      >>> print(np.asarray(cosine_similarity(x)).round(4))
      [[1.  0.6 0. ]
       [0.6 1.  0. ]
       [0.  0.  1. ]]
      >>> print(np.asarray(cosine_similarity(x, centred=True)).round(4))
      [[ 1.     -0.9512  0.8575]
       [-0.9512  1.     -0.9744]
       [ 0.8575 -0.9744  1.    ]]
    """
    if jnp.ndim(prototypes) != 2:
        raise ValueError(f"prototypes must be [C, D], got {jnp.shape(prototypes)}")
    x = jnp.asarray(prototypes, jnp.float32)
    if centred:
        x = x / _largest(x)
        noise = _ROUNDING * jnp.max(jnp.linalg.norm(x, axis=1))
        x = x - _mean(x)
        x = jnp.where(jnp.linalg.norm(x, axis=1, keepdims=True) > noise, x, 0.0)
    x = x * _reciprocal(jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0.0))  # squares stay within float32
    return _normalised(jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST), lowest=-1.0)


def gaussian_similarity(features: Array) -> Array:
    r"""1 - W_ij / max W, W the 2-Wasserstein distance between diagonal Gaussians of the classes' features.

    W_ij^2 = |mu_i - mu_j|^2 + |sigma_i - sigma_j|^2, with each class's mean and standard deviation (divided by N) of
    every channel. 1 - similarity is W over its largest value, hence a metric. It takes differences of D numbers for
    each pair of classes, C^2 D operations, a class at a time.

    Args:
      features: [C, N, D], any float dtype; computed in float32. The order of samples does not matter.

    Returns:
      [C, C] float32 in [0, 1], symmetric, exactly 1 on the diagonal and between classes of equal mean and deviation
      (closer than 2e-6 of the largest |(mu, sigma)|, which is rounding); 0 between the two that are furthest apart.

    Raises:
      ValueError: If the shape is another, or empty.

    Example:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> print(np.asarray(gaussian_similarity(jnp.stack([x, x + 4, 4 * x]))).round(4))
      [[1.     0.0572 0.    ]
       [0.0572 1.     0.2546]
       [0.     0.2546 1.    ]]

    References:
      Dowson and Landau, "The Frechet distance between multivariate normal distributions", 1982.
    """
    _check_features(features)
    features = jnp.asarray(features)
    largest = _largest(features)
    moments: Array = lax.map(lambda x: _moments(x.astype(jnp.float32) / largest), features)  # [C, 2, D]
    noise = _ROUNDING * jnp.sqrt(jnp.max(jnp.sum(moments**2, axis=(1, 2))))
    moments = moments - jnp.mean(moments, axis=0)  # leaves distances as they are
    squared = lax.map(lambda one: jnp.sum((moments - one) ** 2, axis=(1, 2)), moments)
    distance = jnp.sqrt((squared + squared.T) / 2)
    distance = jnp.where(distance > noise, distance, 0.0)
    furthest = _largest(distance)
    return jnp.where(distance < furthest, 1 - distance / furthest, 0.0)  # x / x may be below 1 in XLA


def confusion_similarity(logits: Array, *, temperature: float | Array = 1.0) -> Array:
    """Bhattacharyya coefficient of the classes' mean predictions, sum_k sqrt(P_ik P_jk).

    P_i is the mean over the class's samples of softmax(logits / temperature): two classes are alike where the network
    spreads its belief over the same classes.

    Args:
      logits: [C, N, K], N samples of each class; any float dtype, computed in float32. Their order does not matter.
      temperature: Above 0, a scalar, may be traced.

    Returns:
      [C, C] float32 in [0, 1], symmetric, exactly 1 on the diagonal.

    Raises:
      ValueError: If the shape is another, or empty; if the temperature is not above 0 (checked where it is not traced).

    Example:
      >>> logits = jnp.log(jnp.array([[[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]]]))
      >>> print(np.asarray(confusion_similarity(logits)).round(4))
      [[1.  1.  0.5]
       [1.  1.  0.5]
       [0.5 0.5 1. ]]

    References:
      Bhattacharyya, "On a measure of divergence between two statistical populations", 1943.
    """
    _check_features(logits)
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")

    def root(x: Array) -> Array:
        return jnp.sqrt(jnp.mean(jax.nn.softmax(x.astype(jnp.float32) / temperature, axis=1), axis=0))

    roots: Array = lax.map(root, jnp.asarray(logits))
    return _normalised(jnp.matmul(roots, roots.T, precision=lax.Precision.HIGHEST), lowest=0.0)


def logit_correlation(logits: Array) -> Array:
    """Pearson correlation of two classes' logits over the same samples, all samples of all classes.

    Of each sample's logits their mean is subtracted first, since softmax does not see it: what is correlated are
    log-probabilities around their own mean. Unlike in `cka`, both sides are of the same image, so that it says which
    classes the network's belief rises for together. Its square is the linear CKA of the two columns.

    Args:
      logits: [..., C], any float dtype; computed in float32.

    Returns:
      [C, C] float32 in [-1, 1], symmetric, exactly 1 on the diagonal; 0 between a class whose logit never changes
      around the mean of its sample, by more than 2e-6 of the sample's largest logit, which is rounding, and any other.

    Raises:
      ValueError: If the shape is another, or empty.

    Example:
      >>> logits = jnp.array([[3.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 4.0]])
      >>> print(np.asarray(logit_correlation(logits)).round(4))
      [[ 1.      0.4857 -0.8619]
       [ 0.4857  1.     -0.8619]
       [-0.8619 -0.8619  1.    ]]
    """
    if jnp.ndim(logits) < 2 or 0 in jnp.shape(logits):
        raise ValueError(f"logits must be [..., C], none of them 0; got {jnp.shape(logits)}")
    x = jnp.asarray(logits)
    x = x.reshape(-1, *x.shape[-2:])

    largest = _largest(x)  # squares stay within float32

    def shifted(part: Array) -> Array:  # a part at a time: a shifted copy of everything would double the memory
        part = part.astype(jnp.float32) / largest
        return part - _mean(part, axis=1)

    origin = shifted(x[0, :1])
    mean = jnp.mean(lax.map(lambda part: jnp.mean(shifted(part) - origin, axis=0), x), axis=0)

    def add(total: tuple[Array, Array], part: Array) -> tuple[tuple[Array, Array], None]:
        y = shifted(part) - origin - mean
        size = jnp.max(jnp.abs(part.astype(jnp.float32) / largest), axis=1)
        products = jnp.matmul(y.T, y, precision=lax.Precision.HIGHEST)
        return (total[0] + products, total[1] + jnp.sum(size**2)), None

    (products, sizes), _ = lax.scan(add, (jnp.zeros((x.shape[2],) * 2), jnp.zeros(())), x)
    changes = jnp.diagonal(products) > _ROUNDING**2 * sizes
    return _normalised(jnp.where(changes[:, None] & changes, products, 0.0), lowest=-1.0)


def ground_cost(similarity: Array, *, sharpness: float | Array) -> Array:
    """Cost of moving mass between classes: 1 - exp(-sharpness (1 - similarity)), or 1 - similarity where it is 0.

    Args:
      similarity: [C, C], 1 for a class and itself. Values above 1, which rounding leaves, count as 1.
      sharpness: At least 0, a scalar, may be traced.

    Returns:
      [C, C] float32, at least 0, and exactly 0 where the similarity is 1.

    Raises:
      ValueError: If `similarity` is not square, or `sharpness` is negative (checked where it is not traced).

    Example:
      >>> print(ground_cost(jnp.array([[1.0, 0.25], [0.25, 1.0]]), sharpness=2.0))
      [[0.         0.77686983]
       [0.77686983 0.        ]]

    References:
      Lv et al., arXiv 2412.08139. The authors' code calls 1 - similarity the distance, and the factor "sharpen".
    """
    if jnp.ndim(similarity) != 2 or jnp.shape(similarity)[0] != jnp.shape(similarity)[1]:
        raise ValueError(f"similarity must be [C, C], got {jnp.shape(similarity)}")
    if not isinstance(sharpness, jax.core.Tracer) and not np.all(np.asarray(sharpness) >= 0):
        raise ValueError(f"sharpness={sharpness}: must be 0 or more")
    distance = jnp.maximum(1 - jnp.asarray(similarity, jnp.float32), 0)
    sharpness = jnp.asarray(sharpness, jnp.float32)
    return jnp.where(sharpness > 0, -jnp.expm1(-sharpness * distance), distance)


def _check_features(features: Array) -> None:
    if jnp.ndim(features) != 3 or 0 in jnp.shape(features):
        raise ValueError(f"features must be [C, N, D], none of them 0; got {jnp.shape(features)}")


def _largest(x: Array) -> Array:
    """What x is divided by so that squares stay within float32: the largest size in it, without a copy of x.

    1 if all are 0; at most 2^125, since XLA multiplies by the reciprocal, and that of more is not a normal float.
    """
    largest = jnp.max(lax.map(lambda part: jnp.max(jnp.abs(part)), x)).astype(jnp.float32)
    return jnp.where(largest == 0, 1.0, jnp.minimum(largest, 2.0**125))


def _mean(x: Array, axis: int = 0) -> Array:
    """Mean along an axis, which is kept; its error is a few eps times the root mean square, however many numbers.

    One pass over N numbers may leave sqrt(N) eps. The mean of numbers that are all the same is exactly that number.
    """
    mean = lax.slice_in_dim(x, 0, 1, axis=axis)
    for _ in range(2):
        mean = mean + jnp.mean(x - mean, axis=axis, keepdims=True)
    return mean


def _moments(x: Array) -> Array:
    """Mean and standard deviation of each channel of one class's samples [N, D]: [2, D]."""
    mean = _mean(x)
    return jnp.concatenate([mean, jnp.sqrt(_mean((x - mean) ** 2))])


def _normalised(products: Array, *, lowest: float) -> Array:
    """Inner products [C, C] divided by their norms; what rounding does beyond [lowest, 1] is cut."""
    root = _reciprocal(jnp.sqrt(jnp.diagonal(products)))
    ratio = jnp.clip((products + products.T) / 2 * (root[:, None] * root), lowest, 1.0)
    return jnp.where(jnp.eye(len(ratio), dtype=bool), 1.0, ratio)


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x == 0, 0.0, 1 / jnp.where(x == 0, 1.0, x))


class _Shift(NamedTuple):
    """What turns one block of a class's samples into the kernel's input, (x - origin - mean) * factor. [C, ...].

    Subtracting a sample before the mean makes samples that are all the same exactly zero.
    """

    origin: Array  # [C, 1, D]
    mean: Array  # [C, 1, D]
    factor: Array  # [C, 1, 1]
    offset: Array  # [C, 1, 1], of the polynomial kernel: 1 / (1 + largest |x|^2), so that values are at most 1


class _Centre(NamedTuple):
    """What turns a block of kernel values into one of the centred Gram matrix. [C, ...]."""

    width: Array  # [C, 1, 1], of the rbf kernel: 2 bandwidth^2 Med
    row: Array  # [C, N], mean over the other sample
    total: Array  # [C, 1, 1], mean over both


@functools.partial(jax.jit, static_argnames=("kernel", "parameter"))
def _cka(features: Array, *, kernel: str, parameter: float) -> Array:
    classes, samples, channels = features.shape
    shift = _shift(features, kernel)
    if kernel == "linear" and classes * channels**2 < samples * (classes + channels):
        products = _products_of_features(features, shift)
    else:
        products = _products_of_samples(features, shift, kernel, parameter)
    return _normalised(products, lowest=0.0)


def _shift(features: Array, kernel: str) -> _Shift:
    """The shifts of all classes, one class at a time: a shifted copy of everything would double the memory."""

    def one(x: Array) -> _Shift:
        x = x.astype(jnp.float32)
        origin = x[:1]
        varies = jnp.any(x != origin)
        if kernel == "polynomial":  # not invariant to shifts
            offset = jnp.where(varies, 1 / (1 + jnp.max(jnp.sum(x**2, axis=1))), 0.0)[None, None]
            return _Shift(jnp.zeros_like(origin), jnp.zeros_like(origin), jnp.sqrt(offset), offset)
        mean = jnp.mean(x - origin, axis=0, keepdims=True)
        factor = _reciprocal(jnp.max(jnp.abs(x - origin - mean)))[None, None]
        return _Shift(origin, mean, factor, jnp.zeros_like(factor))

    shift: _Shift = lax.map(one, features)
    return shift


def _block(features: Array, shift: _Shift, start: tuple[Array | int, Array | int], size: tuple[int, int]) -> Array:
    """`size` = (classes, samples) from `start` on, shifted: [c, n, D]."""
    x = lax.dynamic_slice(features, (*start, 0), (*size, features.shape[2])).astype(jnp.float32)
    origin, mean, factor, _ = _classes(shift, start[0], size[0])
    return (x - origin - mean) * factor


def _classes(stats: _Stats, start: Array | int, count: int) -> _Stats:
    """The statistics of `count` classes from `start` on."""
    part: _Stats = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), stats)
    return part


def _products_of_features(features: Array, shift: _Shift) -> Array:
    """|X_i^T X_j|_F^2 for all pairs of classes, upper triangle mirrored."""
    classes, samples, channels = features.shape
    size = min(classes, max(1, _WORKSPACE // (4 * samples * channels)))
    first, second = np.triu_indices(-(-classes // size))

    def add(k: Array, products: Array) -> Array:
        # The last block begins early enough to be whole; what it repeats is written twice.
        i, j = (jnp.minimum(jnp.asarray(index)[k] * size, classes - size) for index in (first, second))
        x, y = (_block(features, shift, (start, 0), (size, samples)) for start in (i, j))
        cross = jnp.einsum("ind,jne->ijde", x, y, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice(products, jnp.sum(cross**2, axis=(2, 3)), (i, j))

    upper = lax.fori_loop(0, len(first), add, _zeros(features, classes, classes))
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def _products_of_samples(features: Array, shift: _Shift, kernel: str, parameter: float) -> Array:
    """sum(Kc_i * Kc_j) for all pairs of classes, over blocks of the Gram matrices' upper triangle."""
    classes, samples, channels = features.shape
    rows = min(samples, _ROWS)
    size = min(classes, max(1, _WORKSPACE // (16 * rows * max(rows, channels))))
    centre = _centre(features, shift, kernel, parameter)
    first, second = np.triu_indices(-(-samples // rows))

    def add(k: Array, products: Array) -> Array:
        p, q = jnp.asarray(first)[k], jnp.asarray(second)[k]
        a, b = (jnp.minimum(index * rows, samples - rows) for index in (p, q))
        # The last block begins early enough to be whole; what an earlier one has counted is left out.
        new_a, new_b = (start + jnp.arange(rows) >= index * rows for start, index in ((a, p), (b, q)))

        def fill(chunk: Array, values: Array) -> Array:
            start = jnp.minimum(chunk * size, classes - size)
            x, y = (_block(features, shift, (start, row), (size, rows)) for row in (a, b))
            part, shifted = _classes(centre, start, size), _classes(shift, start, size)
            gram = _kernel(x, y, shifted.offset, part.width, kernel, parameter)
            row_x, row_y = (lax.dynamic_slice_in_dim(part.row, row, rows, axis=1) for row in (a, b))
            gram = gram - row_x[:, :, None] - row_y[:, None, :] + part.total
            gram = jnp.where(new_a[:, None] & new_b, gram, 0.0)
            return lax.dynamic_update_slice(values, gram.reshape(size, rows * rows), (start, 0))

        values = lax.fori_loop(0, -(-classes // size), fill, _zeros(features, classes, rows * rows))
        weight = jnp.where(p == q, 1.0, 2.0)  # blocks off the diagonal stand for their mirror images too
        return products + weight * jnp.matmul(values, values.T, precision=lax.Precision.HIGHEST)

    products: Array = lax.fori_loop(0, len(first), add, _zeros(features, classes, classes))
    return products


def _zeros(features: Array, *shape: int) -> Array:
    """float32 zeros that under `shard_map` differ between devices as the features do: a loop's carry keeps its type."""
    return jnp.zeros(shape, jnp.float32) + jnp.sum(features[:0], dtype=jnp.float32)


def _centre(features: Array, shift: _Shift, kernel: str, parameter: float) -> _Centre:
    """Means of each class's Gram matrix (0 where X is centred and K is linear) and its median distance."""
    classes, samples, _ = features.shape
    if kernel == "linear":
        zero = jnp.zeros((classes, 1, 1), jnp.float32)
        return _Centre(zero, jnp.zeros((classes, samples), jnp.float32), zero)

    def one(index: Array) -> _Centre:
        x = _block(features, shift, (index, 0), (1, samples))
        width = jnp.zeros((), jnp.float32)
        if kernel == "rbf":
            width = 2 * parameter**2 * _median(_squared_distances(x, x))
        gram = _kernel(x, x, _classes(shift, index, 1).offset, width, kernel, parameter)
        row = jnp.mean(gram[0], axis=1)
        return _Centre(width[None, None], row, jnp.mean(row)[None, None])

    centre: _Centre = lax.map(one, jnp.arange(classes))
    return centre


def _kernel(x: Array, y: Array, offset: Array, width: Array, kernel: str, parameter: float) -> Array:
    """Kernel values between [c, n, D] and [c, m, D]: [c, n, m], up to a factor and a constant, which CKA ignores."""
    if kernel == "rbf":
        distance = _squared_distances(x, y)
        return jnp.expm1(-jnp.where(distance > 0, distance / width, 0.0))  # width 0: distinct samples get K = 0
    inner = jnp.einsum("ind,imd->inm", x, y, precision=lax.Precision.HIGHEST)
    return inner if kernel == "linear" else (inner + offset) ** parameter


def _squared_distances(x: Array, y: Array) -> Array:
    """|x - y|^2; exactly 0 where it is below what float32 resolves, as between a sample and itself."""
    norms = jnp.sum(x**2, axis=-1)[..., :, None] + jnp.sum(y**2, axis=-1)[..., None, :]
    distance = norms - 2 * jnp.einsum("ind,imd->inm", x, y, precision=lax.Precision.HIGHEST)
    return jnp.where(distance > 16 * np.finfo(jnp.float32).eps * norms, distance, 0.0)


def _median(x: Array) -> Array:
    """Median of non-negative numbers: the mean of the middle two.

    The bits of such floats order like integers, so 31 counting passes find a rank exactly. On CPU, sorting is slower.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)

    def at(rank: int) -> Array:
        def decide(k: Array, found: Array) -> Array:
            candidate = found | (1 << (30 - k))
            return jnp.where(jnp.sum(bits < candidate) <= rank, candidate, found)

        zero = jnp.sum(bits.ravel()[:0])  # of a type that `shard_map` takes for one that differs as `x` does
        return lax.bitcast_convert_type(lax.fori_loop(0, 31, decide, zero), jnp.float32)

    return (at((x.size - 1) // 2) + at(x.size // 2)) / 2
