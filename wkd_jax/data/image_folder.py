"""Images in folders, one a class: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from concurrent import futures

import numpy as np

from wkd_jax.data.batches import IMAGENET_MEAN, IMAGENET_STD, Options
from wkd_jax.data.stream import Split, StreamedDataSet

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
_READERS = 16  # files read side by side in each worker: a file server's latency is hidden, not waited for
_SAMPLED = 1000  # files whose sizes go into the fingerprint


def image_folder(
    *,
    data_dir: str,
    train_split: str = "train",
    test_split: str = "val",
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
    """A tree of images, streamed. Classes are the folders of the training split, sorted; examples sorted within them.

    ImageNet sorted in this way has the labels that published weights expect.

    Args:
      data_dir: Holds one folder a split.
      train_split: Folder of the training images.
      test_split: Folder of the images that are evaluated.
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
      ValueError: If a folder is missing, empty or holds something else, if there are other classes than expected, or
        if an argument is out of range.
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
    root = pathlib.Path(data_dir).expanduser()
    classes = _class_folders(root, "train_split", train_split)
    if num_classes and len(classes) != num_classes:
        raise ValueError(
            f"{root / train_split} has {len(classes)} class folders ({', '.join(classes[:3])}, ...), "
            f"data.num_classes={num_classes}: complete the copy, or correct the number"
        )
    unknown = sorted(set(_class_folders(root, "test_split", test_split)) - set(classes))
    if unknown:
        raise ValueError(f"{root / test_split} has classes that {root / train_split} has not: {', '.join(unknown[:5])}")
    train, test = (_list(root / split, classes) for split in (train_split, test_split))
    for split in (train, test):
        if not len(split):
            raise ValueError(f"{split.folder} holds no images ({', '.join(EXTENSIONS)})")
    counts = np.bincount(train.labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise ValueError(f"{root / train_split}: no images of {', '.join(empty[:5])}: complete the copy")
    return StreamedDataSet(
        root.name,
        classes,
        Split(train, lambda: train.labels).subset(train_images),
        Split(test, lambda: test.labels),
        options,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """The images of one split. A million names as one array of bytes: this goes to every worker."""

    folder: pathlib.Path
    classes: tuple[str, ...]
    names: np.ndarray  # [N] bytes, UTF-8
    labels: np.ndarray  # [N] int32

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        """The file's path."""
        return str(self.folder / self.classes[self.labels[row]] / self.names[row].decode())

    def fetch(self, rows: Sequence[int]) -> list[tuple[bytes, int] | Exception]:
        """(content, label) of each file."""
        with futures.ThreadPoolExecutor(min(_READERS, max(1, len(rows)))) as pool:
            return list(pool.map(self._one, rows))

    def _one(self, row: int) -> tuple[bytes, int] | Exception:
        try:
            return pathlib.Path(self.name(row)).read_bytes(), int(self.labels[row])
        except OSError as error:
            return error

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all names and labels, and of the sizes of a thousand files: a resized copy is another data set."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        digest.update(b"\n".join(self.names.tolist()))
        digest.update(np.ascontiguousarray(self.labels, "<i4"))
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(int))
        with futures.ThreadPoolExecutor(_READERS) as pool:
            sizes = list(pool.map(lambda row: _size(self.name(row)), rows))
        digest.update(np.array(sizes, "<i8"))
        return digest.hexdigest()


def _size(path: str) -> int:
    """Bytes of a file; -1 for one that is not there: that it is missing is found out, and counted, when it is read."""
    try:
        return pathlib.Path(path).stat().st_size
    except OSError:
        return -1


def _class_folders(root: pathlib.Path, argument: str, split: str) -> tuple[str, ...]:
    folder = root / split
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) if root.is_dir() else ""
        raise ValueError(
            f"data.{argument}={split!r}: there is no folder {folder}"
            + (f"; {root} holds {there}" if there else f", and {root} holds none: set data.data_dir")
        )
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    names = tuple(path.name for path in visible if path.is_dir())
    if not names:
        raise ValueError(
            f"{folder} holds {len(visible)} files and no class folders: sort its images into one folder a class "
            f"(for ImageNet, `python -m wkd_jax.data prepare folder --data_dir {root}` does it)"
        )
    return names


def _list(folder: pathlib.Path, classes: tuple[str, ...]) -> Files:
    """All images of a split. Folders are listed side by side, which takes seconds instead of minutes from afar."""

    def one(name: str) -> list[bytes]:
        path = folder / name
        if not path.is_dir():  # a class without test images
            return []
        files = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        if other := [file for file in files if not file.lower().endswith(EXTENSIONS)]:
            raise ValueError(f"{path / other[0]} is no image ({', '.join(EXTENSIONS)}): move it elsewhere")
        return [file.encode() for file in files]

    with futures.ThreadPoolExecutor(_READERS) as pool:
        files = list(pool.map(one, classes))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(names) for names in files])
    return Files(folder, classes, np.array([name for names in files for name in names], np.bytes_), labels)


REGISTER = {"image_folder": image_folder}
