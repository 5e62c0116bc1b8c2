"""RandAugment as timm's `rand-m9-mstd0.5-inc1`, by Pillow, which is what defines the operations' arithmetic."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from wkd_jax.data.randomness import Random
from wkd_jax.registry import unknown

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)

_APPLIED = 2  # operations drawn for an image
_STD = 0.5  # of the magnitude
_LARGEST = 10.0
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def rand_augment(
    image: np.ndarray,
    random: Random,
    *,
    magnitude: float = 9.0,
    interpolation: Literal["bilinear", "bicubic", "random"] = "random",
    fill: tuple[int, int, int] = (124, 116, 104),
) -> np.ndarray:
    """Two operations, drawn with replacement, each applied with probability 0.5.

    The magnitude of each is drawn anew, from a normal distribution of standard deviation 0.5, clipped to 0..10.

    Args:
      image: [H, W, 3] uint8.
      random: Of this example.
      magnitude: Mean of the magnitudes, in (0, 10].
      interpolation: Of what is turned, sheared or moved. "random": one of the two for each operation.
      fill: RGB of the pixels that these uncover.

    Returns:
      [H, W, 3] uint8, perhaps read-only or the argument itself.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
      >>> rand_augment(image, Random(seed=0, epoch=0, index=22))[0, :, 0]  # drawn: 95 is added to dark pixels
      array([ 95,  98, 101, 104], dtype=uint8)

    References:
      Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search space, arXiv 1909.13719;
      the operations with "increasing" severity and random magnitude are those of timm.
    """
    if not 0.0 < magnitude <= _LARGEST:
        raise ValueError(f"magnitude={magnitude}: must be above 0 and at most {_LARGEST:g}")
    if interpolation != "random" and interpolation not in _RESAMPLING:
        raise ValueError(unknown("interpolation", interpolation, [*_RESAMPLING, "random"]))
    names = [OPERATIONS[random.integer(len(OPERATIONS))] for _ in range(_APPLIED)]
    picture = None
    for name in names:
        if not random.coin():
            continue
        level = min(max(random.normal(magnitude, _STD), 0.0), _LARGEST)
        sign = -1 if random.coin() else 1
        resampling = ("bicubic" if random.coin() else "bilinear") if interpolation == "random" else interpolation
        picture = picture or Image.fromarray(image)
        picture = apply(name, picture, argument(name, level, sign), resampling=_RESAMPLING[resampling], fill=fill)
    return image if picture is None else np.asarray(picture)


def argument(name: str, level: float, sign: int) -> float | int | None:
    """What an operation is given at a magnitude.

    Args:
      name: One of `OPERATIONS`.
      level: In 0..10.
      sign: 1 or -1, for the operations that go either way.

    Returns:
      Degrees, bits kept, threshold, addend, factor, or share of a side; None for operations without argument.

    Example:
      >>> argument("Rotate", 9.0, -1), argument("Posterize", 9.0, 1), argument("TranslateX", 10.0, 1)
      (-27.0, 1, 0.45)
    """
    share = level / _LARGEST
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return None
        case "Rotate":
            return sign * share * 30.0
        case "Posterize":
            return 4 - int(share * 4)
        case "Solarize":
            return 256 - int(share * 256)
        case "SolarizeAdd":
            return int(share * 110)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return max(0.1, 1.0 + sign * share * 0.9)
        case "ShearX" | "ShearY":
            return sign * share * 0.3
        case "TranslateX" | "TranslateY":
            return sign * share * 0.45
    raise ValueError(unknown("operation", name, OPERATIONS))


def apply(
    name: str, image: Image.Image, value: Any, *, resampling: Image.Resampling, fill: tuple[int, int, int]
) -> Image.Image:
    """One operation.

    Args:
      name: One of `OPERATIONS`.
      image: In Pillow's mode "RGB".
      value: Of `argument`.
      resampling: Of what is turned, sheared or moved.
      fill: RGB of the pixels that these uncover.

    Example:
      >>> image = Image.new("RGB", (1, 1), (10, 100, 200))
      >>> apply("SolarizeAdd", image, 99, resampling=Image.Resampling.BILINEAR, fill=(0, 0, 0)).getpixel((0, 0))
      (109, 199, 200)
    """

    def affine(*matrix: float) -> Image.Image:  # from where each pixel comes
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resampling, fillcolor=fill)

    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(value, resample=resampling, fillcolor=fill)
        case "Posterize":
            # Not ImageOps.posterize: since Pillow 13 it refuses to keep 0 bits, which is black.
            return image.point([i >> 8 - value << 8 - value for i in range(256)] * 3)
        case "Solarize":
            return ImageOps.solarize(image, value)
        case "SolarizeAdd":
            return image.point([min(255, i + value) if i < 128 else i for i in range(256)] * 3)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(ImageEnhance, name)(image).enhance(value)
        case "ShearX":
            return affine(1, value, 0, 0, 1, 0)
        case "ShearY":
            return affine(1, 0, 0, value, 1, 0)
        case "TranslateX":
            return affine(1, 0, value * image.width, 0, 1, 0)
        case "TranslateY":
            return affine(1, 0, 0, 0, 1, value * image.height)
    raise ValueError(unknown("operation", name, OPERATIONS))
