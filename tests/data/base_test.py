"""Checks of `MemoryDataSet`, its fingerprint, its channel statistics, and what every factory owes."""

import dataclasses
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest

from wkd_jax import registry
from wkd_jax.data.base import channel_statistics
from wkd_jax.data.memory import MemoryDataSet, Split


def _split(n, seed=0, size=4):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8), rng.integers(0, 3, n, dtype=np.int32))


def _data(**changes):
    values = {
        "name": "drawn",
        "class_names": ("a", "b", "c"),
        "train": _split(5),
        "test": _split(2, seed=1),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    return MemoryDataSet(**(values | changes))


def test_statistics_equal_float64():
    images = np.random.default_rng(0).integers(0, 256, (1500, 3, 5, 3), dtype=np.uint8)  # more than one chunk
    mean, std = channel_statistics(images)
    pixels = images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-12)


def test_statistics_do_not_cancel():
    images = np.full((64, 8, 8, 3), 255, np.uint8)
    images[0, 0, 0] = 254  # a variance of 2.4e-4 beside squares of 65025
    _, std = channel_statistics(images)
    p = 1 / images[..., 0].size
    np.testing.assert_allclose(std, np.sqrt(p * (1 - p)) / 255, rtol=1e-12)


def test_fingerprint_is_stable_across_processes_and_memory_layouts():
    code = (
        "import numpy as np; from wkd_jax.data.memory import MemoryDataSet, Split;"
        "s = Split(np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), np.array([0, 1], np.int32));"
        "print(MemoryDataSet('n', ('a', 'b'), s, s, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)).fingerprint)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    other = run.stdout.strip()
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    split = Split(np.asfortranarray(images), np.array([0, 1], np.int32))
    here = MemoryDataSet("another name", ("a", "b"), split, split, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert here.fingerprint == other
    assert len(other) == 64


@pytest.mark.parametrize("what", ["pixel", "label", "order", "split", "class_names", "mean", "std"])
def test_fingerprint_changes_with_content(what):
    data = _data()
    images, labels = data.train.images.copy(), data.train.labels.copy()
    if what == "pixel":
        images[3, 1, 1, 0] ^= 1
    elif what == "label":
        labels[4] = (labels[4] + 1) % 3
    elif what == "order":
        images, labels = images[::-1], labels[::-1]
    changed = {
        "split": {"train": data.test, "test": data.train},
        "class_names": {"class_names": ("a", "b", "d")},
        "mean": {"mean": (0.5, 0.5, 0.51)},
        "std": {"std": (0.25, 0.25, 0.26)},
    }.get(what, {"train": Split(images, labels)})
    assert dataclasses.replace(data, **changed).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int32), r"images: need .* uint8, got .*float32"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32), r"images: need \[N, H, W, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64), r"labels: need \[2\] int32, got \[2\] int64"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32), r"labels: need \[2\] int32, got \[3\] int32"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int32), "at least one image"),
    ],
)
def test_split_refuses(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


def test_data_set_refuses():
    with pytest.raises(ValueError, match="training images are .4, 4. pixels, test images .6, 6."):
        _data(test=_split(2, size=6))
    unlabelled = Split(_split(2).images, np.array([0, -1], np.int32))
    with pytest.raises(ValueError, match=r"label -1 of test example 1 is not in 0\.\.2"):
        _data(test=unlabelled)
    with pytest.raises(ValueError, match="std=.*must be positive"):
        _data(std=(0.25, 0.0, 0.25))


@pytest.mark.parametrize("name", registry.entries("data"))
def test_factories_can_be_called_from_a_config(name):
    """A config's `data.name` picks the factory, its other keys are the arguments."""
    parameters = inspect.signature(registry.get("data", name)).parameters
    assert "name" not in parameters
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
