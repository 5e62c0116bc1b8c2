"""Large image classification sets prepared by TensorFlow Datasets (TFDS) as ArrayRecord files. No TensorFlow here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from wkd_jax.data import labels as label_index
from wkd_jax.data import tfds
from wkd_jax.data.batches import IMAGENET_MEAN, IMAGENET_STD, Options
from wkd_jax.data.stream import Split, StreamedDataSet


def tfds_stream(
    *,
    dataset: str = "imagenet2012",
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "validation",
    image_key: str = "image",
    label_key: str = "label",
    num_classes: int = 0,
    train_images: int = 0,
    image_size: int = 224,
    resize: int = 256,
    interpolation: str = "bilinear",
    train_interpolation: str = "bilinear",
    crop_scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    rand_augment: float = 0.0,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    workers: int = -1,
    max_bad_images: int = 0,
) -> StreamedDataSet:
    """A TFDS image classification set that was prepared as ArrayRecord files, streamed. Nothing is downloaded.

    Args:
      dataset: As TFDS writes it, "name[/config][:version]". A set that TFDS has no code for is found by its files.
      data_dir: The directory it was prepared in. None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_split: TFDS split expression, such as "train" or "train[:90%]".
      test_split: Likewise: what is evaluated.
      image_key: Feature that holds the image.
      label_key: Feature that holds the class label.
      num_classes: How many classes there must be; 0: as many as there are.
      train_images: How many training images to keep, balanced over the classes (`order.training_subset`). 0: all.
      image_size: See `wkd_jax.data.batches.Options`, as for all that follow.
      resize: Likewise.
      interpolation: Likewise.
      train_interpolation: Likewise.
      crop_scale: Likewise.
      flip: Likewise.
      rand_augment: Likewise.
      mean: Likewise.
      std: Likewise.
      workers: Likewise.
      max_bad_images: Likewise.

    Raises:
      ValueError: If the set is unknown, not prepared or not in ArrayRecord files, if a split or feature is missing, if
        it has another number of classes, or if an argument is out of range.
    """
    options = Options(
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        train_interpolation=train_interpolation,
        crop_scale=crop_scale,
        flip=flip,
        rand_augment=rand_augment,
        mean=mean,
        std=std,
        workers=workers,
        max_bad_images=max_bad_images,
    )
    builder = tfds.find(dataset, data_dir)
    features = tfds.Features(builder.info, image_key, label_key)
    name, classes = builder.info.full_name, features.class_names
    if num_classes and len(classes) != num_classes:
        raise ValueError(f"{name} has {len(classes)} classes, data.num_classes={num_classes}: correct the number")

    def split(argument: str, expression: str) -> Split:
        records = TfdsRecords(f"{name} {expression}", tfds.shards(builder, argument, expression), features)
        return Split(records, functools.partial(label_index.read, builder, expression, label_key))

    train, test = split("train_split", train_split), split("test_split", test_split)
    return StreamedDataSet(name, classes, train.subset(train_images), test, options)


@dataclasses.dataclass(eq=False)
class TfdsRecords:
    """One split of a prepared set. Its files are opened where they are read: in each worker."""

    split: str
    shards: Sequence[tuple[Any, int]]  # TFDS's FileInstruction (file, records to skip and to take), bytes of the file
    features: tfds.Features

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_source"}

    @functools.cached_property
    def _source(self) -> Any:
        from array_record.python import array_record_data_source

        return array_record_data_source.ArrayRecordDataSource([shard for shard, _ in self.shards])

    def __len__(self) -> int:
        return sum(shard.take for shard, _ in self.shards)

    def name(self, row: int) -> str:
        """The set, the split and the position in it."""
        return f"{self.split} record {row}"

    def fetch(self, rows: Sequence[int]) -> list[tuple[bytes, int] | Exception]:
        """(encoded image, label) of each record."""
        try:
            return [self.features.parse(record) for record in self._source.__getitems__(list(rows))]
        except Exception:  # a damaged file fails as a whole: find out which of its records are whole
            return [self._one(row) for row in rows]

    def _one(self, row: int) -> tuple[bytes, int] | Exception:
        try:
            return self.features.parse(self._source[row])
        except Exception as error:  # whatever a decoder raises on broken bytes
            return OSError(f"{type(error).__name__}: {error}")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the set's version and split, and of names, sizes and record counts of its files."""
        digest = hashlib.sha256(f"{self.split}\n{self.features.class_names}\n".encode())
        for shard, size in self.shards:
            parts = (os.path.basename(shard.filename), size, shard.skip, shard.take, shard.examples_in_shard)
            digest.update(f"{parts}\n".encode())
        return digest.hexdigest()


REGISTER = {"tfds_stream": tfds_stream}
