"""Mixup, cutmix and random erasing on the device: pure, traced inside the train step, on whole (global) batches.

Mixing is drawn once a group of consecutive images, which are mixed with the group in reverse order. Groups that lie
within devices need no communication; wider ones exchange images pairwise. Erasing is drawn once an image, and done on
the normalised images of each network. A group's randomness comes from `fold_in(key, index)` of its first example, an
erased image's from its own: neither depends on how a step is cut into devices and microbatches.

A box is (top, left, bottom, right) in pixels, the last two exclusive; an empty one has no area.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from wkd_jax.types import Array, Batch

_TRIES = 10  # to find a box that fits, before an image is left as it is
_AREA = (0.02, 1 / 3)  # of the image, what an erased box wants to cover
_LOG_ASPECT = math.log(0.3)  # height / width lies between this and its negative
ERASE_NUMBERS = 1 + 2 * _TRIES + 2  # what `erase_box` takes


def mix(
    batch: Batch,
    key: Array,
    *,
    num_classes: int,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    cutmix_share: float = 0.5,
    group_size: int = 0,
) -> Batch:
    """Mixes every image with its partner: image i of a group of S with image S - 1 - i.

    A group is mixed with `probability`: by cutmix in `cutmix_share` of the cases if both are on, else by the one that
    is. With lam ~ Beta(alpha, alpha), mixup gives `lam * image + (1 - lam) * partner`, rounded to the nearest integer.
    Cutmix pastes a box of the partner, see `cut_box`, and lam becomes the share of pixels that stay. Labels are mixed
    in the same proportion; smoothing them afterwards equals mixing smoothed ones.

    An image with `valid=False` and its partner stay as they are, and so do their labels.

    Args:
      batch: Images uint8, labels integers.
      key: Typed PRNG key of this step.
      num_classes: C.
      mixup: Alpha of mixup; 0: none.
      cutmix: Alpha of cutmix; 0: none.
      probability: Of mixing a group at all.
      cutmix_share: Of cutmix among the mixed groups, where both alphas are above 0.
      group_size: S, even, a divisor of B. 0: the whole batch. The recipe drew once a GPU, for 128 images.

    Returns:
      The batch with mixed images, uint8, and labels [B, C] float32, whose rows sum to 1.

    Raises:
      ValueError: If `images` are not uint8, both alphas are 0, or the batch does not consist of even groups.

    Example:
      >>> images = jnp.array([0, 100], jnp.uint8)[:, None, None, None] * jnp.ones((2, 4, 4, 3), jnp.uint8)
      >>> batch = Batch(images, label=jnp.array([0, 1]), index=jnp.array([8, 5]), valid=jnp.ones(2, bool))
      >>> mixup = jax.jit(lambda batch, key: mix(batch, key, num_classes=2, mixup=0.8, cutmix=0.0))
      >>> mixed = mixup(batch, jax.random.key(0))
      >>> print(mixed.image[:, 0, 0, 0], jnp.round(100 * mixed.label).tolist())
      [22 78] [[78.0, 22.0], [22.0, 78.0]]

    References:
      Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018; Yun et al., "CutMix: Regularization Strategy to
      Train Strong Classifiers with Localizable Features", 2019. Batch mode, rounding and boxes are those of timm 1.0.
    """
    count, *image_size, _ = batch.image.shape
    if batch.image.dtype != jnp.uint8:
        raise ValueError(f"images: need uint8 as loaded, got {batch.image.dtype}")
    if not (mixup or cutmix):
        raise ValueError(f"mixup={mixup}, cutmix={cutmix}: one must be above 0")
    size = group_size or count
    if size % 2 or count % size:
        named = f"mix_group_size={group_size}" if group_size else "mix_group_size=0, the whole batch"
        raise ValueError(f"{named}: must be even and divide the batch of {count} images that are mixed")
    share, box = draw_mix(
        batch.index[::size],
        key,
        image_size,
        mixup=mixup,
        cutmix=cutmix,
        probability=probability,
        cutmix_share=cutmix_share,
    )
    image, label = apply_mix(batch.image, batch.label, batch.valid, share, box, num_classes=num_classes)
    return dataclasses.replace(batch, image=image, label=label)


def draw_mix(
    index: Array,
    key: Array,
    image_size: tuple[int, int],
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    cutmix_share: float,
) -> tuple[Array, Array]:
    """What `apply_mix` does to each group.

    Args:
      index: [G] integers, the position of each group's first example in the data set.
      key: See `mix`.
      image_size: (H, W), pixels.
      mixup: See `mix`.
      cutmix: See `mix`.
      probability: See `mix`.
      cutmix_share: See `mix`.

    Returns:
      (share, box): [G] float32, an image's own share of its pixels outside the box; [G, 4] int32, the box that is the
      partner's alone. Mixup has an empty box, cutmix a share of 1, a group that is not mixed both.

    Example:
      >>> settings = dict(mixup=0.0, cutmix=1.0, probability=1.0, cutmix_share=0.5)
      >>> share, box = jax.jit(lambda key: draw_mix(jnp.array([8, 2]), key, (8, 8), **settings))(jax.random.key(0))
      >>> print(share, box.tolist())
      [1. 1.] [[0, 1, 2, 4], [3, 2, 7, 6]]
    """
    numbers = jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(key, index), (6,)))(index)
    chance, kind, radius, angle, row, column = numbers.T
    cut = kind < (cutmix_share if mixup and cutmix else float(cutmix > 0))
    lam = symmetric_beta(radius, angle, jnp.where(cut, cutmix, mixup))
    # 16 bits of lam and 8 of a pixel: float32 is exact, and the pixels do not depend on how a compiler fuses.
    lam = jnp.where(chance < probability, jnp.round(lam * 2**16) / 2**16, 1)
    box = cut_box(jnp.where(cut, lam, 1), _integer(row, image_size[0]), _integer(column, image_size[1]), image_size)
    return jnp.where(cut, 1, lam), box


def symmetric_beta(radius: Array, angle: Array, alpha: Array) -> Array:
    """Beta(alpha, alpha) from two uniform numbers, exactly and without rejection.

    Rejection, as in `jax.random.beta`, is a loop with a reduction over all groups in every turn: over all devices.

    Args:
      radius: [...] uniform in [0, 1).
      angle: [...] likewise, independent.
      alpha: [...] above 0.

    Returns:
      [...] float32 from 0 to 1.

    References:
      Bailey, "Polar generation of random variates with the t-distribution", 1994: t with 2 alpha degrees of freedom is
      sqrt(2 alpha (1 / s - 1)) cos(2 pi angle) with s = radius^(1 / alpha); 1/2 + t / (2 sqrt(2 alpha + t^2)) is beta.

    Example:
      >>> print(symmetric_beta(jnp.array([0.0, 0.75, 0.75]), jnp.array([0.0, 0.0, 0.5]), jnp.ones(3)))
      [1.   0.75 0.25]
    """
    s, cos = radius ** (1 / alpha), jnp.cos(2 * jnp.pi * angle)
    signed = cos * jnp.sqrt(1 - s)
    centred = signed / jnp.sqrt(jnp.maximum(s + signed * signed, jnp.finfo(jnp.float32).tiny))
    return 0.5 + 0.5 * jnp.clip(centred, -1, 1)  # past the ends by rounding alone


def cut_box(lam: Array, row: Array, column: Array, image_size: tuple[int, int]) -> Array:
    """Cutmix's box around a pixel: sides floor(side * sqrt(1 - lam)), clipped to the image.

    Args:
      lam: [...] floats, the share of the image that is to stay.
      row: [...] integers, the centre; of a box of even height the pixel after it.
      column: [...] likewise.
      image_size: (H, W), pixels.

    Returns:
      [..., 4] int32. Earlier versions of timm made odd sides a pixel shorter.

    Example:
      >>> print(cut_box(jnp.array([0.75, 0.0, 1.0]), jnp.array([4, 0, 3]), jnp.array([4, 7, 3]), (8, 8)))
      [[2 2 6 6]
       [0 3 4 8]
       [3 3 3 3]]
    """
    low, high = [], []
    for centre, side in zip((row, column), image_size, strict=True):
        cut = jnp.floor(side * jnp.sqrt(1 - lam)).astype(jnp.int32)
        low.append(jnp.maximum(centre - cut // 2, 0))
        high.append(jnp.minimum(centre + (cut + 1) // 2, side))
    return jnp.stack(low + high, axis=-1).astype(jnp.int32)


def apply_mix(
    images: Array, labels: Array, valid: Array, share: Array, box: Array, *, num_classes: int
) -> tuple[Array, Array]:
    """Mixes as drawn, see `mix` and `draw_mix`.

    Args:
      images: [B, H, W, 3] uint8.
      labels: [B] integers.
      valid: [B] bool.
      share: [G] float32, G a divisor of B.
      box: [G, 4] int32.
      num_classes: C.

    Returns:
      (images, labels): [B, H, W, 3] uint8, [B, C] float32.

    Example:
      >>> images = jnp.array([[[[10]], [[20]]], [[[30]], [[40]]]], jnp.uint8)  # B=2, H=2, W=1
      >>> box = jnp.array([[1, 0, 2, 1]])  # the lower pixel
      >>> apply = jax.jit(apply_mix, static_argnames="num_classes")
      >>> mixed, soft = apply(images, jnp.array([0, 1]), jnp.ones(2, bool), jnp.ones(1), box, num_classes=2)
      >>> print(mixed.ravel(), soft.tolist())
      [10 40 30 20] [[0.5, 0.5], [0.5, 0.5]]
    """
    height, width = images.shape[1:3]
    x, y, valid = (leaf.reshape(len(share), -1, *leaf.shape[1:]) for leaf in (images, labels, valid))
    both = valid & valid[:, ::-1]  # [G, S]

    own = jnp.where(_inside(box, height, width), 0, share[:, None, None, None])  # [G, H, W, 1]
    own = jnp.where(both[..., None, None, None], own[:, None], 1)
    image, partner = (pixels.astype(jnp.float32) for pixels in (x, x[:, ::-1]))  # what may travel is uint8
    mixed = jnp.round(partner + own * (image - partner)).astype(jnp.uint8)

    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    lam = share * (1 - area / (height * width))  # [G]
    lam = jnp.where(both, lam[:, None], 1)[..., None]
    label, partner = (jax.nn.one_hot(classes, num_classes, dtype=jnp.float32) for classes in (y, y[:, ::-1]))
    soft = lam * label + (1 - lam) * partner
    return mixed.reshape(images.shape), soft.reshape(len(images), num_classes)


def draw_erase(index: Array, key: Array, image_size: tuple[int, int], *, probability: float) -> tuple[Array, Array]:
    """What `erase` does to each image: a function of (key, the example's position), on any number of devices.

    Args:
      index: [B] integers, the examples' positions in their data set.
      key: Typed PRNG key of this step.
      image_size: (H, W), pixels.
      probability: Of erasing an image; see `erase_box`.

    Returns:
      (box, keys): [B, 4] int32; [B] typed PRNG keys of the noise.

    Example:
      >>> draw = jax.jit(lambda index, key: draw_erase(index, key, (8, 8), probability=0.5))
      >>> box, keys = draw(jnp.arange(3), jax.random.key(1))
      >>> print(box.tolist(), keys.shape)
      [[6, 4, 8, 7], [5, 1, 7, 8], [0, 0, 0, 0]] (3,)
    """

    def one(index: Array) -> tuple[Array, Array]:
        box_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        return erase_box(jax.random.uniform(box_key, (ERASE_NUMBERS,)), image_size, probability=probability), noise_key

    return jax.vmap(one)(index)


def erase_box(numbers: Array, image_size: tuple[int, int], *, probability: float) -> Array:
    """One image's box: the first of ten tries that is smaller than the image along both sides.

    A try's area is uniform in 2 % to 1/3 of the image, and log(height / width) in log(0.3) to -log(0.3); its sides are
    rounded to the nearest integer, its place is uniform.

    Args:
      numbers: [ERASE_NUMBERS] uniform in [0, 1): whether to erase, the tries' areas, their aspects, row, column.
      image_size: (H, W), pixels.
      probability: Of erasing.

    Returns:
      [4] int32; empty where nothing is erased, or no try fits.

    Example:
      >>> box = jax.jit(lambda numbers: erase_box(numbers, (8, 8), probability=0.6))
      >>> print(box(jnp.full(ERASE_NUMBERS, 0.5)))  # 17.7 % of 64 pixels: 3 x 3
      [3 3 6 6]

    References:
      Zhong et al., "Random Erasing Data Augmentation", 2017; ranges and rounding are those of timm.
    """
    chance, area, aspect, place = jnp.split(numbers, [1, 1 + _TRIES, 1 + 2 * _TRIES])
    area = (_AREA[0] + area * (_AREA[1] - _AREA[0])) * math.prod(image_size)
    aspect = jnp.exp(_LOG_ASPECT * (1 - 2 * aspect))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect]))).astype(jnp.int32)  # [2, tries]
    size = jnp.array(image_size)
    fits = jnp.all(sides < size[:, None], axis=0)
    side = sides[:, jnp.argmax(fits)]
    corner = _integer(place, size - side + 1)
    return jnp.where((chance < probability) & jnp.any(fits), jnp.concatenate([corner, corner + side]), 0)


def erase(images: Array, box: Array, keys: Array) -> Array:
    """Fills each image's box with normal noise, mean 0 and variance 1, drawn for each pixel and channel.

    Args:
      images: [B, H, W, 3] floats, normalised.
      box: [B, 4] int32.
      keys: [B] typed PRNG keys: equal keys give equal noise, so networks that are fed differently see the same.

    Returns:
      Of `images`' shape and dtype.

    Raises:
      ValueError: If `images` are not floats.

    Example:
      >>> box, keys = jnp.array([[0, 1, 1, 2]]), jax.random.split(jax.random.key(0), 1)
      >>> print(jax.jit(erase)(jnp.full((1, 2, 2, 1), 9.0), box, keys)[0, :, :, 0])
      [[ 9.        -0.9063372]
       [ 9.         9.       ]]
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images: need normalised floats, got {images.dtype}")
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
    return jnp.where(_inside(box, *images.shape[1:3]), noise, images)


def _inside(box: Array, height: int, width: int) -> Array:
    """[N, 4] -> [N, H, W, 1] bool, the pixels of each box."""
    top, left, bottom, right = (box[:, i, None] for i in range(4))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    return inside[..., None]


def _integer(number: Array, count: Array | int) -> Array:
    """Uniform in [0, 1) -> uniform in {0..count - 1}."""
    return jnp.floor(number * count).astype(jnp.int32)
