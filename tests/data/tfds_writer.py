"""Prepares data sets with TFDS's own writer, and reads Fashion-MNIST for it. TensorFlow is not needed.

TFDS asks TensorFlow to encode arrays as PNG, and for nothing else that ArrayRecord files of images need; so images are
given to it encoded by Pillow.
"""

import gzip
import io
import pathlib

import numpy as np
from PIL import Image

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FASHION_MNIST_SPLITS = {"train": "train", "test": "t10k"}


def encode(pixels, image_format="png"):
    """[H, W], [H, W, 1] or [H, W, 3] uint8 -> bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, image_format)
    return file.getvalue()


def prepare(data_dir, name, splits, features, *, version="1.0.0", num_shards=2):
    """Writes `data_dir/name/version` in ArrayRecord shards, examples in the given order; returns that directory.

    Args:
      data_dir: What `data_dir` of `tfds.builder` will be.
      name: Of the data set. TFDS may or may not have code for it.
      splits: Split name -> list of examples, dicts from feature name to value, images as encoded bytes.
      features: Feature name -> TFDS feature.
      version: Of the data set.
      num_shards: Files a split.
    """
    import tensorflow_datasets as tfds

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            for i, example in enumerate(examples):
                yield i, {k: io.BytesIO(v) if isinstance(v, bytes) else v for k, v in example.items()}

    Prepared.name = name
    tfds.disable_progress_bar()
    Prepared(data_dir=data_dir, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=num_shards)
    )
    return pathlib.Path(data_dir) / name / version


def fashion_mnist(split, count=None):
    """(images [N, 28, 28], labels [N]), uint8, from the idx files of Debian's package."""
    prefix = FASHION_MNIST_SPLITS[split]
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        with gzip.open(FASHION_MNIST / f"{prefix}-{kind}-ubyte.gz") as file:
            magic = file.read(4)
            shape = np.frombuffer(file.read(4 * magic[3]), ">i4")
            shape = (min(count or shape[0], shape[0]), *shape[1:])
            arrays.append(np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape))
    return tuple(arrays)


def prepare_fashion_mnist(data_dir, *, train_count=None, test_count=None, num_shards=2):
    """Prepares (the first examples of) Fashion-MNIST as TFDS itself would name it: fashion_mnist 3.0.1."""
    import tensorflow_datasets as tfds

    splits = {}
    for split, count in (("train", train_count), ("test", test_count)):
        images, labels = fashion_mnist(split, count)
        splits[split] = [{"image": encode(i), "label": int(n)} for i, n in zip(images, labels, strict=True)]
    features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(names=CLASSES)}
    return prepare(data_dir, "fashion_mnist", splits, features, version="3.0.1", num_shards=num_shards)
