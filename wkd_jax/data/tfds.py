"""Small image classification sets prepared by TensorFlow Datasets (TFDS), read whole into host memory.

Reading needs `tensorflow-datasets` and Pillow, not TensorFlow; TensorFlow only *prepares* most sets, once, in whatever
environment has it (docs/data.md). `tensorflow_datasets` is imported when a set is loaded: it takes a second.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from wkd_jax.data.base import channel_statistics
from wkd_jax.data.memory import MemoryDataSet, Split
from wkd_jax.data.order import training_subset
from wkd_jax.registry import unknown

MEMORY_LIMIT = 8 * 2**30
"""Largest set that is read: bytes of uint8 RGB pixels, training and test images together, in each process."""

_CHUNK = 1024  # records read at a time; one by one is twenty times slower


def tfds(
    *,
    dataset: str,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_size: int = 0,
    train_images: int = 0,
    image_key: str = "image",
    label_key: str = "label",
) -> MemoryDataSet:
    """A TFDS image classification set that was prepared as ArrayRecord files.

    Examples are in the order of the files. Grey images are repeated to three channels. Nothing is downloaded.

    Args:
      dataset: As TFDS writes it, "name[/config][:version]". A set that TFDS has no code for is found by its files.
      data_dir: The directory it was prepared in. None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_split: TFDS split expression, such as "train" or "train[:90%]".
      test_split: Likewise: what is evaluated.
      image_size: Resize every image to a square of so many pixels (Pillow, bilinear, antialiased; the aspect ratio is
        not kept). 0: leave them as they are, which needs images of one size.
      train_images: How many training images to keep, balanced over the classes (`order.training_subset`). 0: all.
      image_key: Feature that holds the image.
      label_key: Feature that holds the class label.

    Raises:
      ValueError: If the set is unknown, not prepared or not in ArrayRecord files, if a split or feature is missing, if
        it is larger than `MEMORY_LIMIT`, if its images differ in size while `image_size` is 0, or if an argument is
        out of range.
    """
    if image_size < 0:
        raise ValueError(f"image_size={image_size}: must be 0 (leave images as they are) or a number of pixels")
    builder = find(dataset, data_dir)
    full_name = builder.info.full_name
    features = Features(builder.info, image_key, label_key)
    train = _Records(builder, "train_split", train_split, features, image_size)
    test = _Records(builder, "test_split", test_split, features, image_size)

    height, width = train.first_size()
    num_images = min(train_images or len(train), len(train)) + len(test)
    if num_images * height * width * 3 > MEMORY_LIMIT:
        raise ValueError(
            f"{full_name}: {num_images} images of {height} x {width} pixels need "
            f"{num_images * height * width * 3 / 2**30:.1f} GiB of host memory, more than the limit of "
            f"{MEMORY_LIMIT / 2**30:g} GiB; lower image_size or train_images"
        )
    train_rows = training_subset(train.labels(), train_images) if train_images else np.arange(len(train))
    train_data = train.read(train_rows, (height, width))
    test_data = test.read(np.arange(len(test)), (height, width))
    return MemoryDataSet(full_name, features.class_names, train_data, test_data, *channel_statistics(train_data.images))


class Features:
    """The two features that are read of each record, checked to be an 8-bit image and a class label.

    Others are not decoded.
    """

    def __init__(self, info: Any, image_key: str, label_key: str) -> None:
        from tensorflow_datasets import decode, features

        for argument, key, kind in (
            ("image_key", image_key, features.Image),
            ("label_key", label_key, features.ClassLabel),
        ):
            if key not in info.features:
                raise ValueError(f"{info.full_name}: {argument}: {unknown('feature', key, info.features)}")
            if not isinstance(info.features[key], kind):
                found = type(info.features[key]).__name__
                raise ValueError(f"{info.full_name}: {argument}={key!r}: need {kind.__name__}, found {found}")
        image, label = info.features[image_key], info.features[label_key]
        if image.np_dtype != np.uint8 or len(image.shape) != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(
                f"{info.full_name}: image_key={image_key!r}: need one or three 8-bit channels, found shape "
                f"{image.shape} {np.dtype(image.np_dtype)}"
            )
        if not label.names:
            raise ValueError(f"{info.full_name}: label_key={label_key!r} declares no classes")
        self.class_names = tuple(label.names)
        self._keys = image_key, label_key
        self._features = features.FeaturesDict({image_key: image, label_key: label})
        self._decoders = {image_key: decode.SkipDecoding()}

    def parse(self, record: bytes) -> tuple[bytes, int]:
        """(encoded image, label) of a serialized example."""
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        return example[self._keys[0]], example[self._keys[1]]


class _Records:
    """One split of a prepared set."""

    def __init__(self, builder: Any, argument: str, split: str, features: Features, image_size: int) -> None:
        import tensorflow_datasets

        self._name = f"{builder.info.full_name} {split}"
        try:
            if not builder.info.splits[split].num_examples:
                raise ValueError("it has no examples")
            self._source = builder.as_data_source(
                split,
                deserialize_method=tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
        except ValueError as error:
            raise ValueError(f"{builder.info.full_name}: {argument}={split!r}: {error}") from error
        self._features = features
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._source)

    def first_size(self) -> tuple[int, int]:
        """(height, width) of the first image as it will be read."""
        encoded, _ = self._features.parse(self._source[0])
        return self._pixels(0, encoded).shape[:2]

    def labels(self) -> np.ndarray:
        """[N] int64: a pass over all records that decodes no image."""
        return np.array([label for _, label in self._examples(np.arange(len(self)), "labels")])

    def read(self, rows: np.ndarray, size: tuple[int, int]) -> Split:
        """The records at `rows`, in that order, whose images all have `size` (height, width)."""
        images = np.empty((len(rows), *size, 3), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for i, (encoded, label) in enumerate(self._examples(rows, "images")):
            pixels = self._pixels(rows[i], encoded)
            if pixels.shape[:2] != size:
                raise ValueError(
                    f"{self._name}: image {rows[i]} is {pixels.shape[0]} x {pixels.shape[1]} pixels, the first "
                    f"training image {size[0]} x {size[1]}; give image_size to resize them all"
                )
            images[i], labels[i] = pixels, label
        return Split(images, labels)

    def _examples(self, rows: np.ndarray, what: str) -> Iterator[tuple[bytes, int]]:
        console = Console(stderr=True)
        starts = track(
            range(0, len(rows), _CHUNK),
            description=f"{self._name}: {what}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for start in starts:
            for record in self._source.__getitems__(rows[start : start + _CHUNK].tolist()):
                yield self._features.parse(record)

    def _pixels(self, row: int, encoded: bytes) -> np.ndarray:
        """[H, W, 1 or 3] uint8."""
        try:
            with Image.open(io.BytesIO(encoded)) as opened:
                if opened.mode[0] in "IF":
                    raise ValueError(f"pixels are not 8-bit (Pillow mode {opened.mode})")
                image = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
                if self._image_size and image.size != (self._image_size, self._image_size):
                    image = image.resize((self._image_size, self._image_size), Image.Resampling.BILINEAR)
                pixels = np.asarray(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._name}: image {row} cannot be read: {error}") from error
        return pixels.reshape(*pixels.shape[:2], -1)


def find(dataset: str, data_dir: str | None) -> Any:
    """The TFDS builder of a prepared set, checked to have ArrayRecord files.

    Raises:
      ValueError: If the set is unknown, not prepared, or in other files; says how to prepare it.
    """
    import tensorflow_datasets

    option = f" --data_dir={data_dir}" if data_dir else ""
    prepare = (
        f"`python -m wkd_jax.data prepare {dataset}{option}` prepares it, once, where TensorFlow is installed"
        " (docs/data.md)"
    )
    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=data_dir)
    except tensorflow_datasets.core.DatasetNotFoundError:
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(re.split("[/:]", dataset)[0], known, n=3)
        where = data_dir or "$TFDS_DATA_DIR or ~/tensorflow_datasets"
        raise ValueError(
            f"dataset={dataset!r}: no prepared files under {where}, and TFDS has no code for a set of that name"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        ) from None
    if not builder.info.splits:
        raise ValueError(f"dataset={dataset!r}: nothing is prepared in {builder.data_dir}: {prepare}")
    # A builder that TFDS has code for does not notice that a prepared set has a second format; that of its files does.
    builder = tensorflow_datasets.builder_from_directory(builder.data_dir)
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"dataset={dataset!r}: {builder.data_dir} holds {', '.join(formats)} files, but only ArrayRecord "
            f"files are read: `python -m wkd_jax.data prepare {dataset}{option}` converts TFRecord, without a download"
        )
    return builder


def shards(builder: Any, argument: str, split: str) -> list[tuple[Any, int]]:
    """The ArrayRecord files of a split, in order.

    Args:
      builder: As `find` gives it.
      argument: What the config calls the split, for messages.
      split: TFDS split expression.

    Returns:
      (TFDS's `FileInstruction`, bytes of the file) of each.

    Raises:
      ValueError: If there is no such split, it is empty, or a file of it is missing.
    """
    import tensorflow_datasets
    from etils import epath

    array_record = tensorflow_datasets.core.file_adapters.FileFormat.ARRAY_RECORD
    if builder.info.file_format != array_record:  # the set was prepared in another format, and converted
        builder.info.set_file_format(array_record, override=True, override_if_initialized=True)
    try:
        instructions = builder.info.splits[split].file_instructions
    except ValueError as error:
        raise ValueError(f"{builder.info.full_name}: {argument}={split!r}: {error}") from error
    if not sum(instruction.take for instruction in instructions):
        raise ValueError(f"{builder.info.full_name}: {argument}={split!r}: it has no examples")
    try:
        with futures.ThreadPoolExecutor(16) as pool:  # a thousand files, perhaps far away
            sizes = list(pool.map(lambda part: epath.Path(part.filename).stat().length, instructions))
    except OSError as error:
        raise ValueError(f"{builder.info.full_name} {split}: a file is missing: {error}; complete the copy") from error
    return list(zip(instructions, sizes, strict=True))


REGISTER = {"tfds": tfds}
