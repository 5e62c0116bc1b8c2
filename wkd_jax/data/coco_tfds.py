"""COCO prepared by TensorFlow Datasets (TFDS) as ArrayRecord files. No TensorFlow here.

The records do not say what they hold until they are read, so the first use of a split reads it once, without decoding
pixels, and keeps an index of ids, sizes and boxes in the user's cache (`wkd_jax.cache`).

Records give the images, and the boxes to train on. The ground truth of evaluation is read from COCO's own JSON file:
TFDS rounds areas, which the numbers by size depend on, to integers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import secrets
import sys
import zipfile
from typing import Any, cast

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from wkd_jax import cache
from wkd_jax.data import coco_json, detection_split, tfds
from wkd_jax.data.batches import IMAGENET_MEAN, IMAGENET_STD
from wkd_jax.data.coco_json import Instances
from wkd_jax.data.detection import DetectionDataSet
from wkd_jax.data.detection_split import Options
from wkd_jax.data.tfds_stream import TfdsRecords

_COLUMNS = ("image_ids", "sizes", "images", "labels", "boxes", "crowd")
_Annotated = tuple[int, tuple[int, int], dict[str, np.ndarray]]
_CHUNK = 64  # records read at a time


def coco_tfds(
    *,
    test_json: str,
    dataset: str = "coco/2017",
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "validation",
    canvases: tuple[tuple[int, int], ...] = detection_split.CANVASES,
    train_short: tuple[int, ...] = detection_split.TRAIN_SHORT,
    test_short: int = 800,
    max_side: int = 1333,
    flip: bool = True,
    max_boxes: int = 100,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    workers: int = -1,
    max_bad_images: int = 0,
) -> DetectionDataSet:
    """COCO as TFDS prepares it, or another TFDS set with the same features, streamed. Nothing is downloaded.

    Args:
      test_json: COCO's annotations of the images that are evaluated, the ground truth, such as
        "annotations/instances_val2017.json". A relative path is of `data_dir`, where that is given.
      dataset: As TFDS writes it, "name[/config][:version]".
      data_dir: The directory it was prepared in. None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_split: TFDS split expression, such as "train" or "train[:90%]".
      test_split: Likewise: what is evaluated. Must be the images of `test_json`.
      canvases: See `wkd_jax.data.detection_split.Options`, as for all that follow.
      train_short: Likewise.
      test_short: Likewise.
      max_side: Likewise.
      flip: Likewise.
      max_boxes: Likewise.
      mean: Likewise.
      std: Likewise.
      workers: Likewise.
      max_bad_images: Likewise.

    Raises:
      ValueError: If the set is unknown, not prepared, not in ArrayRecord files or without boxes, if a record is damaged
        when it is read for the first time, if classes or images are not those of `test_json`, or as `coco` does.
    """
    options = Options(
        canvases=canvases,
        train_short=train_short,
        test_short=test_short,
        max_side=max_side,
        flip=flip,
        max_boxes=max_boxes,
        mean=mean,
        std=std,
        workers=workers,
        max_bad_images=max_bad_images,
    )
    truth = coco_json.read(pathlib.Path(data_dir or "", test_json).expanduser(), f"data.test_json={test_json!r}")
    builder = tfds.find(dataset, data_dir)
    features = _Features(builder.info)
    _check_classes(builder.info.full_name, features.class_names, truth)

    def split(argument: str, expression: str) -> tuple[TfdsRecords, Instances]:
        name = f"{builder.info.full_name} {expression}"
        records = TfdsRecords(name, tfds.shards(builder, argument, expression), features)  # type: ignore[arg-type]
        return records, _index(records, features, truth.categories)

    records, instances = split("train_split", train_split)
    train = detection_split.training_split(records, instances, options)
    records, instances = split("test_split", test_split)
    test = detection_split.evaluation_split(records, _in_order(truth, instances), options)
    return DetectionDataSet(builder.info.full_name, features.class_names, train, test, options)


class _Features:
    """The features of TFDS's COCO that are read, checked to be there."""

    def __init__(self, info: Any) -> None:
        from tensorflow_datasets import decode, features

        try:
            kinds = info.features["image"], info.features["image/id"], info.features["objects"]
            objects = kinds[2].feature
            self.class_names = tuple(objects["label"].names)
            if not isinstance(kinds[0], features.Image) or not {"bbox", "label", "is_crowd"} <= set(objects):
                raise TypeError("objects need bbox, label and is_crowd")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{info.full_name} has not the features image, image/id and objects (bbox, label, is_crowd) of "
                f"coco/2017 ({error}): set data.dataset"
            ) from error
        self._image = features.FeaturesDict({"image": kinds[0], "image/id": kinds[1]})
        self.all = features.FeaturesDict({"image": kinds[0], "image/id": kinds[1], "objects": kinds[2]})
        self.decoders = {"image": decode.SkipDecoding()}

    def parse(self, record: bytes) -> tuple[bytes, int]:
        """(encoded image, its id) of a serialized example."""
        example = self._image.deserialize_example_np(record, decoders=self.decoders)
        return example["image"], int(example["image/id"])


class _Annotations:
    """What the index is made of, in place of the image."""

    def __init__(self, features: _Features) -> None:
        self._features = features

    def parse(self, record: bytes) -> _Annotated:
        """(image's id, its (height, width), its objects) of a serialized example."""
        example = self._features.all.deserialize_example_np(record, decoders=self._features.decoders)
        with Image.open(io.BytesIO(example["image"])) as image:  # reads the header alone
            width, height = image.size
        return int(example["image/id"]), (height, width), example["objects"]


def _index(records: TfdsRecords, features: _Features, categories: tuple[tuple[int, str], ...]) -> Instances:
    """All annotations of a split: out of the cache, or by a pass over its records."""
    # Files of ArrayRecord are padded, so other contents may well have the same size: an index is of one place and time.
    files = [os.path.abspath(shard.filename) for shard, _ in records.shards]
    made = [os.stat(file).st_mtime_ns for file in files]
    key = hashlib.sha256(f"{os.path.dirname(files[0])}\n{made}\n{records.fingerprint}".encode()).hexdigest()
    path = cache.folder() / "coco" / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in _COLUMNS}
    except FileNotFoundError:
        columns = _read_all(records, features)
        _write(path, columns)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        sys.stderr.write(f"{path} cannot be read and is made again: {error}\n")
        columns = _read_all(records, features)
        _write(path, columns)
    names = np.array([f"{records.split} record {row}".encode() for row in range(len(records))], np.bytes_)
    areas = columns["boxes"][:, 2:].prod(axis=1)  # nobody asks for those of training
    return Instances(source=records.split, categories=categories, file_names=names, areas=areas, **columns)


def _read_all(records: TfdsRecords, features: _Features) -> dict[str, np.ndarray]:
    """The arrays of `Instances` from every record, in their order."""
    reader = dataclasses.replace(records, features=_Annotations(features))  # type: ignore[arg-type]
    console = Console(stderr=True)
    starts = track(
        range(0, len(records), _CHUNK),
        description=f"{records.split}: sizes and boxes",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    ids, sizes, images, labels, boxes, crowd = ([] for _ in range(6))
    for start in starts:
        rows = range(start, min(start + _CHUNK, len(records)))
        for row, found in zip(rows, reader.fetch(rows), strict=True):
            if isinstance(found, Exception):
                raise ValueError(f"{records.name(row)} cannot be read ({found}): prepare the set again") from found
            image_id, size, objects = cast(_Annotated, found)
            top, left, bottom, right = np.asarray(objects["bbox"], np.float64).reshape(-1, 4).T
            corner = np.stack([left, top], axis=1) * size[::-1]
            ids.append(image_id)
            sizes.append(size)
            images.append(np.full(len(top), row))
            labels.append(objects["label"])
            boxes.append(np.concatenate([corner, np.stack([right, bottom], axis=1) * size[::-1] - corner], axis=1))
            crowd.append(objects["is_crowd"])
    columns: dict[str, np.ndarray] = {
        "image_ids": np.array(ids, np.int32),
        "sizes": np.array(sizes, np.int32),
        "images": np.concatenate(images).astype(np.int64),
        "labels": np.concatenate(labels).astype(np.int32),
        "boxes": np.concatenate(boxes),
        "crowd": np.concatenate(crowd).astype(bool),
    }
    wrong = ~(np.isfinite(columns["boxes"]).all(axis=1) & (columns["boxes"][:, 2:] >= 0).all(axis=1))
    wrong |= (columns["labels"] < 0) | (columns["labels"] >= len(features.class_names))
    if wrong.any():
        first = int(columns["images"][wrong.argmax()])
        raise ValueError(f"{records.name(first)} has a box or label that is none ({wrong.sum()} in all)")
    if len(np.unique(columns["image_ids"])) < len(ids):
        raise ValueError(f"{records.split} has an image id twice: prepare the set again")
    return columns


def _write(path: pathlib.Path, columns: dict[str, np.ndarray]) -> None:
    """It appears under its name when it is whole. Without it, the next run reads all records again."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **columns)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        sys.stderr.write(f"{path} cannot be written, so the next run reads all records again: {error}\n")
    finally:
        temporary.unlink(missing_ok=True)


def _check_classes(name: str, class_names: tuple[str, ...], truth: Instances) -> None:
    """TFDS's label i must be the category of the i-th smallest id, by its name."""
    for label, (known, found) in enumerate(zip((name for _, name in truth.categories), class_names, strict=False)):
        if known != found:
            raise ValueError(f"class {label} of {name} is {found!r}, of {truth.source} {known!r}: take one data set's")
    if len(class_names) != len(truth.categories):
        raise ValueError(f"{name} has {len(class_names)} classes, {truth.source} has {len(truth.categories)}")


def _in_order(truth: Instances, records: Instances) -> Instances:
    """The ground truth with its images in the order of the records."""
    if differing := sorted(set(truth.image_ids.tolist()) ^ set(records.image_ids.tolist())):
        raise ValueError(
            f"{records.source} and {truth.source} have different images: {len(differing)} ids are in one of them, "
            f"such as {differing[0]}: set data.test_split and data.test_json to the same split"
        )
    by_id = np.argsort(truth.image_ids)
    return truth.reordered(by_id[np.searchsorted(truth.image_ids, records.image_ids, sorter=by_id)])


REGISTER = {"coco_tfds": coco_tfds}
