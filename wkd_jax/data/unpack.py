"""ImageNet as a tree of image files, `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, from its archives.

Neither TensorFlow nor the development kit is needed. Also sorts a `val` folder whose 50,000 files lie side by side, as
the archive has them: which class each shows is in a file that comes with TFDS.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from wkd_jax.data.prepare import ARCHIVES, STEPS, check_archive, check_space

_OF_CLASS = re.compile(r"(n\d{8})\.tar")
_TRAINING = re.compile(r"n\d{8}_\d+\.JPEG")


def unpack(data_dir: str | os.PathLike[str], archives: Sequence[str | os.PathLike[str]] = ()) -> Iterator[str]:
    """Unpacks ImageNet's archives into class folders, and sorts a flat `val` folder into them.

    What is there already, with the right size, is not written again, so that a stopped call can be repeated.

    Args:
      data_dir: The folder that has, or gets, `train` and `val`.
      archives: Paths of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, either or both.

    Yields:
      Lines for people.

    Raises:
      ValueError: If an archive is another file or not whole, or if a flat `val` has files that are not ImageNet's.
      OSError: If an archive is missing, or the disk is too small or cannot be written.
    """
    root = pathlib.Path(data_dir).expanduser()
    sizes = ARCHIVES["imagenet2012"]
    paths = [pathlib.Path(path).expanduser() for path in archives]
    for path in paths:
        if path.name not in sizes:
            raise ValueError(f"{path} is neither of {' and '.join(sizes)}. To get these:\n{STEPS['imagenet2012']}")
        check_archive(path, sizes[path.name])
    if paths:
        yield check_space(root, sum(sizes[path.name] for path in paths))
    for path in paths:
        folder = root / ("train" if path.name == "ILSVRC2012_img_train.tar" else "val")
        written = _unpack_one(path, folder)
        yield f"{folder}: {written:,} files written, out of {path.name}"
    if not root.is_dir():
        raise ValueError(
            f"--data_dir={root}: there is no such folder; to make it, give ImageNet's archives with --from"
        )
    moved = _sort(root / "val")
    if moved:
        yield f"{root / 'val'}: {moved:,} files moved into class folders"
    elif not paths:
        yield f"{root}: nothing to do. To unpack ImageNet's archives, give them with --from"


def _classes() -> dict[str, str]:
    """File name -> class (as WordNet numbers it) of the validation images."""
    import tensorflow_datasets

    path = tensorflow_datasets.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return {f"ILSVRC2012_val_{i:08d}.JPEG": name for i, name in enumerate(path.read_text().split(), start=1)}


def _unpack_one(archive: pathlib.Path, folder: pathlib.Path) -> int:
    """Writes an archive's images to `folder/<class>/`; returns how many were not there yet."""
    console = Console(stderr=True)
    columns = TextColumn(archive.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    written = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=archive.stat().st_size)
        try:
            for name, size, file, position in _images(archive):
                written += _write(folder / name, size, file)
                progress.update(task, completed=position)
        except tarfile.TarError as error:
            raise ValueError(f"{archive} is damaged ({error}): download it again") from error
    return written


def _images(archive: pathlib.Path) -> Iterator[tuple[str, int, IO[bytes], int]]:
    """(class/name, bytes, file, position in the archive) of an archive's images."""
    classes = _classes()
    with tarfile.open(archive, "r:") as outer:
        for member in outer:
            file = outer.extractfile(member)
            if file is None:  # a folder
                continue
            if member.name in classes:
                yield f"{classes[member.name]}/{member.name}", member.size, file, member.offset
            elif found := _OF_CLASS.fullmatch(member.name):  # training: an archive a class
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    for image in inner:
                        if not _TRAINING.fullmatch(image.name):
                            raise ValueError(
                                f"{archive}: {member.name} has {image.name!r}, which is none of ImageNet's"
                            )
                        yield (
                            f"{found[1]}/{image.name}",
                            image.size,
                            inner.extractfile(image),
                            member.offset + image.offset,
                        )
            else:
                raise ValueError(f"{archive} has {member.name!r}: not ImageNet's")


def _write(path: pathlib.Path, size: int, file: IO[bytes]) -> bool:
    """Writes a file, which appears under its name when it is whole; False if it is there."""
    if path.is_file() and path.stat().st_size == size:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as target:
            shutil.copyfileobj(file, target)
        if temporary.stat().st_size != size:
            raise ValueError(f"{path.name}: only {temporary.stat().st_size} of {size} bytes are in the archive")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _sort(folder: pathlib.Path) -> int:
    """Moves the images that lie in a folder itself into folders of their classes; returns how many."""
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    classes = _classes() if names else {}
    if strange := [name for name in names if name not in classes]:
        raise ValueError(
            f"{folder} has {len(strange)} files outside of class folders that are not ImageNet's validation images, "
            f"the first {strange[0]}: move them away, or into folders of their classes"
        )
    for name in names:
        (folder / classes[name]).mkdir(exist_ok=True)
        (folder / name).rename(folder / classes[name] / name)
    return len(names)
