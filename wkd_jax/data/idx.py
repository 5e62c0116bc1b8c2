"""MNIST's kind of set (MNIST, Fashion-MNIST, KMNIST) out of its four idx files, without TensorFlow or a download.

TFDS has code for these sets, which needs TensorFlow to encode their images. Here Pillow encodes them, and TFDS's own
writer does the rest: name, version, features, order and shards are those of TFDS.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

SETS = ("mnist", "fashion_mnist", "kmnist")
"""Sets of TFDS that come as such files."""

PREFIXES = {"train": "train", "test": "t10k"}  # split -> how the names of its files begin
_UNSIGNED_BYTE = 8  # its code in an idx file


def files(sources: Sequence[str | os.PathLike[str]]) -> dict[tuple[str, str], pathlib.Path]:
    """The four files of a set, by (split, "images" or "labels").

    Args:
      sources: The files, or folders that hold them: train-images-idx3-ubyte, t10k-labels-idx1-ubyte and so on, as they
        are published (.gz) or unpacked.

    Raises:
      ValueError: If one is missing; names it.
    """
    found = {}
    for split, prefix in PREFIXES.items():
        for kind, dimensions in (("images", 3), ("labels", 1)):
            name = f"{prefix}-{kind}-idx{dimensions}-ubyte"
            for source in map(pathlib.Path, sources):
                for path in (source / f"{name}.gz", source / name) if source.is_dir() else (source,):
                    if path.name.removesuffix(".gz") == name and path.is_file():
                        found[split, kind] = path
            if (split, kind) not in found:
                raise ValueError(f"--from {' '.join(map(str, sources))}: {name}.gz is not there")
    return found


def read(path: pathlib.Path) -> np.ndarray:
    """The array of an idx file of unsigned bytes: two zeros, a type, the number of axes, their sizes, the values.

    Args:
      path: Ending in .gz where it is compressed.

    Returns:
      uint8, of any shape.

    Raises:
      ValueError: If it is damaged, or is another kind of file.

    References:
      http://yann.lecun.com/exdb/mnist, "the IDX file format"; integers are big-endian.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is not an idx file of unsigned bytes: fetch it again")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else [0]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} has {len(content):,} bytes, which do not fit its sizes {shape}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def write(builder: Any, sources: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Prepares a set of TFDS from such files, as ArrayRecord.

    Args:
      builder: TFDS's builder of the set, not prepared.
      sources: As in `files`.

    Yields:
      Lines for people.

    Raises:
      ValueError: If a file is missing, damaged or of another set.
      OSError: If the disk cannot be written.
    """
    import tensorflow_datasets as tfds

    found = files(sources)
    arrays = {key: read(path) for key, path in found.items()}
    image, label = builder.info.features["image"], builder.info.features["label"]
    for split in PREFIXES:
        images, labels = arrays[split, "images"], arrays[split, "labels"]
        if images.shape[1:] != image.shape[:2] or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{found[split, 'images']} and {found[split, 'labels']} hold {images.shape} and {labels.shape}: "
                f"{builder.name} has {image.shape[0]} x {image.shape[1]} pixels, and a label an image"
            )
        if labels.max(initial=0) >= label.num_classes:
            raise ValueError(f"{found[split, 'labels']}: label {labels.max()}; {builder.name} has {label.num_classes}")

    class FromFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = builder.version

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=builder.info.description,
                features=builder.info.features,
                supervised_keys=builder.info.supervised_keys,
                homepage=builder.info.homepage,
                citation=builder.info.citation,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            return {split: self._generate_examples(split) for split in PREFIXES}

        def _generate_examples(self, split: str) -> Iterator[Any]:
            for i, (pixels, number) in enumerate(zip(arrays[split, "images"], arrays[split, "labels"], strict=True)):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "png")
                file.seek(0)
                yield i, {"image": file, "label": int(number)}

    FromFiles.name = builder.name
    yield f"{builder.info.full_name} is written from {len(found)} idx files; nothing is downloaded"
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS calls it a download
        FromFiles(data_dir=builder.data_dir_root, file_format="array_record").download_and_prepare()
    yield f"{builder.info.full_name} is prepared, in {builder.data_dir}"
