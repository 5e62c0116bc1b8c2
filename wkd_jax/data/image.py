"""From an encoded image to the uint8 pixels that training or evaluation sees, on the host, one image at a time.

The arithmetic is Pillow's and torchvision's, with which published weights were trained and scored. Decoding is
OpenCV's. Evaluation is resized by Pillow itself; training by cykooz-resizer, which is four times as fast and differs
by rounding (see `resize`).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from wkd_jax.data import randaugment
from wkd_jax.data.randomness import Random
from wkd_jax.registry import unknown

Interpolation = Literal["bilinear", "bicubic"]

cv2.setNumThreads(0)  # images are many and small: they are what is spread over processes and threads

_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
_TRIES = 10
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in compressed data: 0 follows a byte 255, D0..D7 only restart it

_local = threading.local()


def decode(encoded: bytes) -> np.ndarray:
    """The pixels of an encoded image, as Pillow's `convert("RGB")` gives them.

    JPEG and PNG are equal to Pillow's (other formats are OpenCV's affair) but for two: JPEGs in CMYK differ by at most
    one grey level, and of grey 16-bit PNGs the high byte is taken, where Pillow saturates. Alpha is dropped, palettes
    are looked up, grey is repeated, and orientation in EXIF is ignored, all as Pillow does. What is missing at the end
    is noticed, bytes after the end are allowed; bytes changed within the compressed data are not noticed, by either.

    Args:
      encoded: Contents of an image file.

    Returns:
      [H, W, 3] uint8, RGB.

    Raises:
      ValueError: If it is truncated, or no image.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> Image.new("L", (3, 2), 7).save(file, "JPEG")
      >>> decode(file.getvalue())[0, 0], decode(file.getvalue()).shape
      (array([7, 7, 7], dtype=uint8), (2, 3, 3))
    """
    for name, start, ends in (("JPEG", b"\xff\xd8", _jpeg_ends), ("PNG", b"\x89PNG", _png_ends)):
        if encoded[: len(start)] == start and not ends(encoded):
            raise ValueError(f"truncated: these {len(encoded)} bytes begin a {name} image and do not end it")
    try:
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), _READ)
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot decode these {len(encoded)} bytes: {error.err}") from error
    if pixels is None:
        raise ValueError(
            f"these {len(encoded)} bytes, which begin with {bytes(encoded[:4])!r}, are no image that OpenCV can "
            "decode, or a truncated one"
        )
    return pixels


def _png_ends(encoded: bytes) -> bool:
    return encoded.rfind(b"IEND\xaeB`\x82") >= 0  # the last chunk's name and checksum; it has no data


def _jpeg_ends(encoded: bytes) -> bool:
    """Whether the end of the image follows its compressed data. OpenCV fills in grey what is missing before padding."""
    if encoded[-2:] == b"\xff\xd9":  # as nearly always; it cannot be within compressed data
        return True
    position = 2
    while (marker := _MARKER.search(encoded, position)) is not None:
        if encoded[marker.start() + 1] == 0xD9:
            return True
        # Other segments have a length; the search goes on in what follows, which after SOS is compressed data.
        position = marker.end() + int.from_bytes(encoded[marker.end() : marker.end() + 2], "big")
    return False


def resize(image: np.ndarray, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Resizes with Pillow's antialiased filters: the kernel widens where the image shrinks.

    Horizontally, rounding to 8 bits, then vertically, as Pillow before version 13 did at all sizes (13 turns the order
    round where the height shrinks much more than the width). Coefficients have 16 bits where Pillow's have 32, so of a
    photograph's values two (bilinear) or three (bicubic) in a thousand differ by one grey level; two, of noise, was
    the worst seen. The resizer's scalar, SSE4.1 and AVX2 code give the same pixels.

    Args:
      image: [H, W, 3] uint8.
      size: (height, width) wanted, pixels.
      interpolation: "bilinear" or "bicubic" (Catmull-Rom's, a = -1/2).

    Returns:
      [*size, 3] uint8, read-only.

    Raises:
      ValueError: If the image has no pixels or is not uint8 RGB, or an argument is out of range.

    Example:
      >>> resize(np.array([[[0] * 3, [100] * 3]], np.uint8), (1, 4), "bilinear")[0, :, 0]
      array([  0,  25,  75, 100], dtype=uint8)
    """
    _check_image(image)
    _check_interpolation(interpolation)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size={size}: must be positive numbers of pixels")
    resizer, new, options = _resizer()
    pixels = new(image.shape[1], image.shape[0], image.tobytes())
    # Left to itself it goes vertically first: no faster, and with bicubic overshoots up to ten levels from Pillow.
    for next_size in ((width, image.shape[0]), (width, height)):
        source, pixels = pixels, new(*next_size)
        resizer.resize(source, pixels, options[interpolation])
    return np.frombuffer(pixels.get_buffer(), np.uint8).reshape(height, width, 3)


def _resizer() -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """This thread's own (it works without the interpreter's lock, but behind one of its own), new images, options."""
    try:
        return _local.resizer
    except AttributeError:
        from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

    def new(width: int, height: int, pixels: bytes | None = None) -> ImageData:
        return ImageData(width, height, PixelType.U8x3, pixels)

    filters = {"bilinear": FilterType.bilinear, "bicubic": FilterType.catmull_rom}
    options = {name: ResizeOptions(ResizeAlg.convolution(each)) for name, each in filters.items()}
    _local.resizer = Resizer(), new, options
    return _local.resizer


def random_box(
    height: int, width: int, random: Random, *, scale: tuple[float, float] = (0.08, 1.0)
) -> tuple[int, int, int, int]:
    """The part of an image that a random resized crop takes: torchvision's `RandomResizedCrop.get_params`.

    A box of a random share of the area and of random proportions, log-uniform from 3:4 to 4:3, anywhere in the image.
    If ten of them do not fit: the largest central box whose proportions are in that range.

    Args:
      height: Of the image, pixels.
      width: Likewise.
      random: Draws three numbers or more.
      scale: Least and largest share of the image's area.

    Returns:
      (top, left, height, width), pixels.

    Raises:
      ValueError: If `scale` is not 0 < least <= largest <= 1.

    Example:
      >>> random_box(375, 500, Random(seed=0, epoch=0, index=0))
      (138, 341, 143, 154)
    """
    if not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise ValueError(f"scale={scale}: must be (least, largest) share of the area, 0 < least <= largest <= 1")
    for _ in range(_TRIES):
        area = random.uniform(*scale) * (height * width)
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return (
                random.integer(height - box_height + 1),
                random.integer(width - box_width + 1),
                box_height,
                box_width,
            )
    if width < height * _RATIO[0]:
        box_height, box_width = round(width / _RATIO[0]), width
    elif width > height * _RATIO[1]:
        box_height, box_width = height, round(height * _RATIO[1])
    else:
        box_height, box_width = height, width
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(
    image: np.ndarray,
    size: int,
    random: Random,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: Interpolation | Literal["random"] = "bilinear",
) -> np.ndarray:
    """A random box of the image (`random_box`), resized to a square.

    Args:
      image: [H, W, 3] uint8.
      size: Side of the result, pixels.
      random: Of this example.
      scale: Least and largest share of the image's area.
      interpolation: "random" takes one of the two for each image.

    Returns:
      [size, size, 3] uint8, read-only.

    Raises:
      ValueError: As `resize` and `random_box`.
    """
    _check_image(image)
    top, left, height, width = random_box(*image.shape[:2], random, scale=scale)
    if interpolation == "random":
        interpolation = "bicubic" if random.coin() else "bilinear"
    return resize(image[top : top + height, left : left + width], (size, size), interpolation)


def training_image(
    image: np.ndarray | bytes,
    random: Random,
    *,
    image_size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: Interpolation | Literal["random"] = "bilinear",
    flip: bool = True,
    rand_augment: float = 0.0,
    fill: tuple[int, int, int] = (124, 116, 104),
) -> np.ndarray:
    """Decodes if need be, crops at random, flips left-right with probability 0.5, and applies RandAugment.

    Args:
      image: [H, W, 3] uint8, or encoded.
      random: Of this example and epoch.
      image_size: Side of the result, pixels.
      scale: Least and largest share of the image's area that a crop has.
      interpolation: Of the crop and of RandAugment. "random": one of the two, for each image and each operation.
      flip: Whether to flip at random.
      rand_augment: Magnitude, see `randaugment.rand_augment`. 0: not applied.
      fill: RGB of what RandAugment's shifts uncover: the data set's mean, of 255.

    Returns:
      [image_size, image_size, 3] uint8, perhaps read-only.

    Raises:
      ValueError: If the image is broken, or an argument is out of range.

    Example:
      >>> image = np.zeros((375, 500, 3), np.uint8)
      >>> training_image(image, Random(seed=0, epoch=0, index=7), image_size=64, rand_augment=9.0).shape
      (64, 64, 3)
    """
    if isinstance(image, bytes):
        image = decode(image)
    image = random_resized_crop(image, image_size, random, scale=scale, interpolation=interpolation)
    if flip and random.coin():
        image = cv2.flip(image, 1)  # thirty times as fast as copying [:, ::-1]
    if rand_augment:
        image = randaugment.rand_augment(image, random, magnitude=rand_augment, interpolation=interpolation, fill=fill)
    return image


def evaluation_image(
    image: np.ndarray | bytes,
    *,
    image_size: int = 224,
    resize: int = 256,
    interpolation: Interpolation = "bilinear",
) -> np.ndarray:
    """Decodes if need be, resizes to a short side, and takes the centre: torchvision's on Pillow images, bit by bit.

    The long side is what keeps the proportions, rounded down. Small images are enlarged.

    Args:
      image: [H, W, 3] uint8, or encoded.
      image_size: Side of the result, pixels.
      resize: Short side before the crop, at least `image_size`.
      interpolation: As the weights want it.

    Returns:
      [image_size, image_size, 3] uint8, perhaps read-only.

    Raises:
      ValueError: If the image is broken, or an argument is out of range.

    Example:
      >>> evaluation_image(np.zeros((375, 500, 3), np.uint8)).shape
      (224, 224, 3)
    """
    if isinstance(image, bytes):
        image = decode(image)
    _check_image(image)
    _check_interpolation(interpolation)
    if not 1 <= image_size <= resize:
        raise ValueError(f"image_size={image_size}, resize={resize}: the crop must fit in the short side")
    height, width = image.shape[:2]
    short = min(height, width)
    size = int(resize * width / short), int(resize * height / short)
    left, top = (round((side - image_size) / 2) for side in size)
    resized = Image.fromarray(image).resize(size, _PILLOW[interpolation])
    return np.asarray(resized.crop((left, top, left + image_size, top + image_size)))


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image: need [H, W, 3] uint8 with at least one pixel, got {image.shape} {image.dtype}")


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in _PILLOW:
        raise ValueError(unknown("interpolation", interpolation, _PILLOW))
