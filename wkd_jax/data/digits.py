"""Handwritten digits that come with scikit-learn: a real data set in every installation, for tests and first runs."""

from __future__ import annotations

import numpy as np

from wkd_jax.data.base import channel_statistics
from wkd_jax.data.memory import MemoryDataSet, Split
from wkd_jax.data.order import training_subset

_SIDE = 8  # of the original images, pixels
_WHITE = 16  # their brightest value
_NUM_TRAIN = 1297
_NUM_VALIDATION = 297


def digits(*, image_size: int = 16, train_images: int = 0, validation: bool = False) -> MemoryDataSet:
    """1797 grey images of ten classes, 8 x 8 pixels, enlarged: the first 1297 in file order train, the last 500 test.

    The file is not shuffled: neighbours in it often come from one writer, so the test split is a little harder than a
    random one would be.

    Args:
      image_size: Side of the images, pixels, >= 8. Bilinear, half-pixel centres, edges repeated; exact arithmetic,
        so the pixels are the same on every machine.
      train_images: How many training images to keep, balanced over the classes (`order.training_subset`). 0: all.
      validation: For choosing hyper-parameters: the first 1000 train, and the other 297 training images are evaluated.

    Raises:
      ValueError: If an argument is out of range.

    References:
      E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998; the
      file is its test set, https://scikit-learn.org/stable/datasets/toy_dataset.html

    Example:
      >>> data = digits(train_images=20)
      >>> data.train.images.shape, data.test.images.shape
      ((20, 16, 16, 3), (500, 16, 16, 3))
    """
    if image_size < _SIDE:
        raise ValueError(f"image_size={image_size}: must be {_SIDE} or more pixels")
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    source = load_digits()
    labels = source.target.astype(np.int32)
    images = _enlarge(source.images.astype(np.int64), image_size)
    if validation:
        images, labels = images[:_NUM_TRAIN], labels[:_NUM_TRAIN]
    first = _NUM_TRAIN - _NUM_VALIDATION if validation else _NUM_TRAIN
    kept = training_subset(labels[:first], train_images)
    train = Split(images[:first][kept], labels[:first][kept])
    test = Split(images[first:], labels[first:])
    mean, std = channel_statistics(train.images)
    return MemoryDataSet("digits", tuple("0123456789"), train, test, mean, std)


def _enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """[N, 8, 8] integers 0..16 -> [N, size, size, 3] uint8, rounded half up."""
    # Output pixel i lies at (i + 1/2) * 8 / size - 1/2 of the input, in units of 1 / (2 * size) this integer:
    place = np.clip((2 * np.arange(size) + 1) * _SIDE - size, 0, 2 * size * (_SIDE - 1))
    low, part = np.divmod(place, 2 * size)
    weights = np.zeros((size, _SIDE), np.int64)  # times 2 * size
    weights[np.arange(size), low] = 2 * size - part
    weights[np.arange(size), np.minimum(low + 1, _SIDE - 1)] += part
    scaled = weights @ images @ weights.T  # times (2 * size)^2
    unit = _WHITE * (2 * size) ** 2
    grey = (2 * 255 * scaled + unit) // (2 * unit)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


REGISTER = {"digits": digits}
