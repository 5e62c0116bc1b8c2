"""The digits data set against scikit-learn's file and float64 interpolation."""

import inspect

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from wkd_jax import registry
from wkd_jax.data.digits import digits


def _bilinear(image, size):
    """Half-pixel centres, edges repeated, straight from the definition, float64 0..255."""
    out = np.empty((size, size))
    place = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    for i, y in enumerate(place):
        for j, x in enumerate(place):
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 7), min(x0 + 1, 7)
            top = image[y0, x0] * (x0 + 1 - x) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (x0 + 1 - x) + image[y1, x1] * (x - x0)
            out[i, j] = top * (y0 + 1 - y) + bottom * (y - y0)
    return out * 255 / 16


@pytest.mark.parametrize("size", [8, 13, 16, 32])
def test_images_are_interpolated(size):
    source = load_digits()
    data = digits(image_size=size)
    for n in (0, 700, 1296):
        pixels = data.train.images[n]
        np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=-1))
        # 0.5: rounded to the nearest integer; 1e-9: of a tie, either neighbour.
        np.testing.assert_allclose(pixels[..., 0], _bilinear(source.images[n], size), rtol=0, atol=0.5 + 1e-9)


def test_enlarging_agrees_with_jax():
    ours = digits(image_size=24).test.images[:20, ..., 0]
    theirs = jax.image.resize(load_digits().images[1297:1317] * 255 / 16, (20, 24, 24), "linear")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.5 + 1e-3)  # float32 of values up to 255


def test_split_and_labels_are_those_of_the_file():
    data = digits()
    target = load_digits().target
    np.testing.assert_array_equal(data.train.labels, target[:1297])
    np.testing.assert_array_equal(data.test.labels, target[1297:])
    assert data.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert data.image_size == (16, 16)
    assert (len(data.train), len(data.test), len(data.class_names)) == (1297, 500, 10)


def test_validation_never_sees_test_images():
    whole, data = digits(), digits(validation=True)
    np.testing.assert_array_equal(data.train.images, whole.train.images[:1000])
    np.testing.assert_array_equal(data.test.images, whole.train.images[1000:])
    np.testing.assert_array_equal(data.test.labels, whole.train.labels[1000:])


def test_statistics_are_of_the_training_images():
    data = digits(train_images=100)
    pixels = data.train.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std(axis=0), rtol=1e-12)


def test_subset_is_balanced_and_leaves_the_test_split_alone():
    whole, part = digits(), digits(train_images=205)
    counts = np.bincount(part.train.labels, minlength=10)
    assert (counts.sum(), counts.max() - counts.min()) == (205, 1)
    np.testing.assert_array_equal(part.test.images, whole.test.images)
    originals = {image.tobytes(): label for image, label in zip(whole.train.images, whole.train.labels, strict=True)}
    assert [originals[image.tobytes()] for image in part.train.images] == part.train.labels.tolist()


def test_content_is_pinned():
    """A change here changes every published number on this data set, and every cached class similarity."""
    assert digits().fingerprint == "0738b72a3ff1600164a9eb8b017af176e715cf0a018280e43a6fdc0e72084b78"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_images": 1298}, r"train_images=1298: must be 0 \(all of them\) or 1\.\.1297"),
        ({"train_images": -1}, "train_images=-1"),
        ({"image_size": 7}, "image_size=7: must be 8 or more"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        digits(**arguments)


def test_registry_finds_it_with_an_inspectable_signature():
    assert registry.get("data", "digits") is digits
    assert list(inspect.signature(digits).parameters) == ["image_size", "train_images", "validation"]
