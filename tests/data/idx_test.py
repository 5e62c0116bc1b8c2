"""Sets of MNIST's kind from idx files: what is written is what TFDS's own code would have read."""

import gzip
import struct

import numpy as np
import pytest
from tfds_writer import CLASSES, FASHION_MNIST, fashion_mnist

from wkd_jax.data import idx
from wkd_jax.data.__main__ import main
from wkd_jax.data.prepare import open_builder
from wkd_jax.data.tfds import tfds

COUNTS = {"train": 30, "t10k": 20}


def pack(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def made(tmp_path):
    """A folder of four files, and what is in them."""
    rng, arrays = np.random.default_rng(0), {}
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in COUNTS.items():
        arrays[prefix] = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pack(arrays[prefix][0])))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(pack(arrays[prefix][1]))
    return folder, arrays


def command(folder, data_dir, dataset="fashion_mnist"):
    return main(["prepare", dataset, "--from", *([str(folder)] if folder else []), "--data_dir", str(data_dir)])


def test_prepared_set_is_an_ordinary_one(made, tmp_path, capfd):
    folder, arrays = made
    assert command(folder, tmp_path / "tfds") == 0
    assert "train: 30 examples in 1 files" in capfd.readouterr().out
    data = tfds(dataset="fashion_mnist", data_dir=str(tmp_path / "tfds"))
    assert data.class_names == tuple(CLASSES)
    for prefix, split in (("train", data.train), ("t10k", data.test)):
        images, labels = arrays[prefix]
        # TFDS shuffles by a hash of the position; as a set of examples they are the same.
        order = np.array([np.flatnonzero((images == image[..., 0]).all(axis=(1, 2)))[0] for image in split.images])
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(split.labels, labels[order])
        np.testing.assert_array_equal(split.images, images[order][..., None].repeat(3, axis=-1))
    builder = open_builder("fashion_mnist", str(tmp_path / "tfds"))
    assert builder.info.full_name == "fashion_mnist/3.0.1" and builder.info.supervised_keys == ("image", "label")
    assert command(folder, tmp_path / "tfds") == 0
    assert "is prepared already" in capfd.readouterr().out


def test_wrong_files(made, tmp_path, capfd):
    folder, _ = made
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte"

    def refused(message, dataset="fashion_mnist"):
        assert command(folder, tmp_path / "tfds", dataset) == 1
        assert message in capfd.readouterr().err

    whole = images.read_bytes()
    for content, message in (
        (whole[:-20], "train-images-idx3-ubyte.gz is damaged"),
        (gzip.compress(b"\0\0\x0d\3" + bytes(40)), "is not an idx file of unsigned bytes"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "has 23,535 bytes, which do not fit its sizes [30, 28, 28]"),
        (gzip.compress(pack(np.zeros((30, 20, 20)))), "fashion_mnist has 28 x 28 pixels"),
        (gzip.compress(pack(np.zeros((29, 28, 28)))), "and a label an image"),
    ):
        images.write_bytes(content)
        refused(message)
    images.write_bytes(whole)
    labels.write_bytes(pack(np.full(20, 10)))
    refused("t10k-labels-idx1-ubyte: label 10; fashion_mnist has 10")
    labels.unlink()
    refused("t10k-labels-idx1-ubyte.gz is not there")
    refused("--from: cifar10 does not come as idx files, as mnist, fashion_mnist, kmnist do", "cifar10")
    assert not (tmp_path / "tfds" / "fashion_mnist").exists()


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_reads_published_files():
    found = idx.files([FASHION_MNIST])
    for split, count in (("train", 60000), ("test", 10000)):
        images, labels = (idx.read(found[split, kind]) for kind in ("images", "labels"))
        assert images.shape == (count, 28, 28)
        theirs = fashion_mnist(split)
        np.testing.assert_array_equal(images, theirs[0])
        np.testing.assert_array_equal(labels, theirs[1])
        assert np.bincount(labels).tolist() == [count // 10] * 10
