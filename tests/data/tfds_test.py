"""Reading TFDS sets that the tests prepare themselves, without TensorFlow."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from tfds_writer import FASHION_MNIST, encode, fashion_mnist, prepare, prepare_fashion_mnist

import wkd_jax.data.tfds as module
from wkd_jax import registry
from wkd_jax.data.tfds import tfds

features = tensorflow_datasets.features
has_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


def _drawn(count, shape, seed):
    """`count` noise images of a shape, and labels 0, 1, 2, 0, ..."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, np.arange(count) % 3


def _examples(images, labels, **extra):
    return [{"image": encode(image), "label": int(label), **extra} for image, label in zip(images, labels, strict=True)]


CLASSES = ["circle", "cross", "line"]
TRAIN, TEST = _drawn(23, (6, 8, 3), 0), _drawn(7, (6, 8, 3), 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Directory of the set "drawn": 23 + 7 RGB images of 6 x 8 pixels in 2 shards a split, and features we ignore."""
    directory = tmp_path_factory.mktemp("tfds")
    extra = {"flag": 1, "mask": encode(np.zeros((6, 8, 1), np.uint8)), "boxes": [{"side": 1.0}, {"side": 2.0}]}
    declared = {
        "image": features.Image(shape=(6, 8, 3)),
        "label": features.ClassLabel(names=CLASSES),
        "flag": np.int64,
        "mask": features.Image(shape=(6, 8, 1)),
        "boxes": features.Sequence({"side": np.float32}),
    }
    prepare(directory, "drawn", {"train": _examples(*TRAIN, **extra), "test": _examples(*TEST, **extra)}, declared)
    return directory


def test_reads_every_pixel_in_order(drawn):
    assert len(list(drawn.glob("drawn/1.0.0/*train.array_record*"))) == 2
    data = tfds(dataset="drawn", data_dir=str(drawn))
    for split, (images, labels) in ((data.train, TRAIN), (data.test, TEST)):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
    assert data.class_names == tuple(CLASSES)
    assert data.name == "drawn/1.0.0"
    np.testing.assert_allclose(data.mean, TRAIN[0].reshape(-1, 3).mean(axis=0) / 255, rtol=1e-12)
    np.testing.assert_allclose(data.std, TRAIN[0].reshape(-1, 3).std(axis=0) / 255, rtol=1e-12)


def test_more_than_one_chunk(drawn, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5)
    data = tfds(dataset="drawn", data_dir=str(drawn), train_images=20)
    order = module.training_subset(TRAIN[1], 20)
    np.testing.assert_array_equal(data.train.images, TRAIN[0][order])
    np.testing.assert_array_equal(data.train.labels, TRAIN[1][order])


def test_split_expressions(drawn):
    data = tfds(dataset="drawn:1.0.0", data_dir=str(drawn), train_split="train[3:10]+test", test_split="train[-2:]")
    np.testing.assert_array_equal(data.train.images, np.concatenate([TRAIN[0][3:10], TEST[0]]))
    np.testing.assert_array_equal(data.test.images, TRAIN[0][-2:])


def test_fingerprint_is_of_the_content(drawn):
    whole = tfds(dataset="drawn", data_dir=str(drawn))
    assert tfds(dataset="drawn", data_dir=str(drawn)).fingerprint == whole.fingerprint
    assert tfds(dataset="drawn", data_dir=str(drawn), train_images=22).fingerprint != whole.fingerprint


def test_resize(drawn):
    data = tfds(dataset="drawn", data_dir=str(drawn), image_size=5)
    expected = [np.asarray(Image.fromarray(i).resize((5, 5), Image.Resampling.BILINEAR)) for i in TRAIN[0]]
    np.testing.assert_array_equal(data.train.images, expected)


def test_varying_sizes_and_modes(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((9, 9), (7, 12), (9, 9))]
    grey = rng.integers(0, 256, (9, 9, 1), dtype=np.uint8)
    examples = _examples(images, [0, 1, 2]) + [{"image": encode(grey), "label": 0}]
    declared = {"image": features.Image(), "label": features.ClassLabel(num_classes=3)}
    prepare(tmp_path, "varying", {"train": examples, "test": examples[:2]}, declared)

    with pytest.raises(ValueError, match="varying/1.0.0 train: image 1 is 7 x 12 pixels.*9 x 9; give image_size"):
        tfds(dataset="varying", data_dir=str(tmp_path))
    data = tfds(dataset="varying", data_dir=str(tmp_path), image_size=9)
    np.testing.assert_array_equal(data.train.images[0], images[0])  # has the size already
    resized = Image.fromarray(images[1]).resize((9, 9), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.train.images[1], resized)
    np.testing.assert_array_equal(data.train.images[3], grey.repeat(3, axis=-1))  # a grey file among colour ones
    assert data.class_names == ("0", "1", "2")


def test_jpeg(tmp_path):
    picture = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    examples = [{"image": encode(picture, "jpeg"), "label": 0}] * 2
    declared = {"image": features.Image(encoding_format="jpeg"), "label": features.ClassLabel(num_classes=1)}
    prepare(tmp_path, "photos", {"train": examples, "test": examples}, declared)
    data = tfds(dataset="photos", data_dir=str(tmp_path))
    assert np.abs(data.train.images.astype(int) - picture).mean() < 8  # lossy


def test_damaged_and_deep_images(tmp_path):
    good = _examples(*_drawn(3, (6, 8, 3), 0))
    declared = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
    damaged = [*good, {"image": b"not an image", "label": 0}]
    deep = [*good, {"image": encode(np.zeros((6, 8), np.uint16)), "label": 0}]
    prepare(tmp_path, "spoiled", {"train": good, "damaged": damaged, "deep": deep}, declared)
    for split, reason in (("damaged", "cannot identify image file"), ("deep", "not 8-bit")):
        with pytest.raises(ValueError, match=f"spoiled/1.0.0 {split}: image 3 cannot be read: .*{reason}"):
            tfds(dataset="spoiled", data_dir=str(tmp_path), test_split=split)


def test_unlabelled_examples_are_refused(tmp_path):
    images, labels = _drawn(4, (6, 8, 3), 0)
    declared = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
    splits = {"train": _examples(images, labels), "test": _examples(images, [0, 1, -1, 2])}
    prepare(tmp_path, "contest", splits, declared)
    with pytest.raises(ValueError, match="label -1 of test example 2"):
        tfds(dataset="contest", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "drwn"}, "dataset='drwn': no prepared files under .*, and TFDS has no code"),
        ({"dataset": "cifar_100"}, r"TFDS has no code for a set of that name; did you mean .*cifar100"),
        (
            {"dataset": "cifar100"},
            r"nothing is prepared in .*cifar100.*`python -m wkd_jax.data prepare cifar100 --data_dir=.*` prepares it",
        ),
        ({"train_split": "trian"}, r"drawn/1\.0\.0: train_split='trian': .*\['train', 'test'\]"),
        ({"test_split": "test[:99]"}, "test_split='test.*': .*7 examples"),
        ({"train_split": "train[:0]"}, "train_split='train.*': it has no examples"),
        ({"image_key": "imgae"}, "image_key: unknown feature 'imgae': did you mean 'image'"),
        ({"label_key": "flag"}, "label_key='flag': need ClassLabel, found"),
        ({"image_key": "label"}, "image_key='label': need Image, found ClassLabel"),
        ({"train_images": 24}, r"train_images=24: must be 0 \(all of them\) or 1\.\.23"),
        ({"train_images": -1}, "train_images=-1"),
        ({"image_size": -1}, "image_size=-1"),
    ],
)
def test_refusals(drawn, arguments, message):
    with pytest.raises(ValueError, match=message):
        tfds(**({"dataset": "drawn", "data_dir": str(drawn)} | arguments))


def test_other_file_formats_are_refused(tmp_path):
    images, labels = _drawn(3, (6, 8, 3), 0)
    declared = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
    directory = prepare(tmp_path, "records", {"train": _examples(images, labels)}, declared)
    info = directory / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="holds tfrecord files.*`python -m wkd_jax.data prepare records .*` converts"):
        tfds(dataset="records", data_dir=str(tmp_path))


def test_deep_image_features_are_refused(tmp_path):
    examples = [{"image": encode(np.zeros((6, 8), np.uint16)), "label": 0}] * 2
    declared = {"image": features.Image(shape=(6, 8, 1), dtype=np.uint16), "label": features.ClassLabel(names=CLASSES)}
    prepare(tmp_path, "deep", {"train": examples, "test": examples}, declared)
    with pytest.raises(ValueError, match="image_key='image': need one or three 8-bit channels, found .* uint16"):
        tfds(dataset="deep", data_dir=str(tmp_path))


def test_sets_too_large_for_memory_are_refused_before_they_are_read(drawn, monkeypatch):
    def read(*_):
        raise AssertionError("images were read")

    monkeypatch.setattr(module, "MEMORY_LIMIT", 30 * 6 * 8 * 3 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(module._Records, "read", read)
        with pytest.raises(ValueError, match="drawn/1.0.0: 30 images of 6 x 8 pixels need .* lower image_size or"):
            tfds(dataset="drawn", data_dir=str(drawn))
    assert len(tfds(dataset="drawn", data_dir=str(drawn), train_images=22).train) == 22


def test_tensorflow_is_neither_needed_nor_imported(drawn, tmp_path):
    """In a fresh interpreter where importing TensorFlow raises."""
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys; from wkd_jax import registry;"
        "data_sets = registry.entries('data');"
        "assert 'tensorflow_datasets' not in sys.modules, 'imported before a set was asked for';"
        f"data = data_sets['tfds'](dataset='drawn', data_dir={str(drawn)!r});"
        "assert 'tensorflow' not in sys.modules;"
        "print(data.fingerprint)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == tfds(dataset="drawn", data_dir=str(drawn)).fingerprint


def test_registry_finds_it_with_an_inspectable_signature():
    assert registry.get("data", "tfds") is tfds
    keywords = [
        "dataset",
        "data_dir",
        "train_split",
        "test_split",
        "image_size",
        "train_images",
        "image_key",
        "label_key",
    ]
    assert list(inspect.signature(tfds).parameters) == keywords


def _check_fashion_mnist(directory, train_count, test_count):
    prepare_fashion_mnist(directory, train_count=train_count, test_count=test_count)
    data = tfds(dataset="fashion_mnist", data_dir=str(directory))
    for split, name, count in ((data.train, "train", train_count), (data.test, "test", test_count)):
        images, labels = fashion_mnist(name, count)
        np.testing.assert_array_equal(split.images, images[..., None].repeat(3, axis=-1))
        np.testing.assert_array_equal(split.labels, labels)
    assert data.class_names[9] == "Ankle boot"
    return data


@has_fashion_mnist
def test_fashion_mnist(tmp_path):
    _check_fashion_mnist(tmp_path, 600, 100)


@has_fashion_mnist
@pytest.mark.slow
def test_whole_fashion_mnist(tmp_path):
    data = _check_fashion_mnist(tmp_path, 60000, 10000)
    np.testing.assert_allclose(data.mean, 0.2860, atol=5e-5)  # the constants that everybody uses
    np.testing.assert_allclose(data.std, 0.3530, atol=5e-5)
