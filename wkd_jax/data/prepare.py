"""Prepares a TFDS set as ArrayRecord files: TFDS builds it, a TFRecord copy is converted, or idx files are.

TensorFlow is needed to build, and for nothing else: not to convert, not to train. `tensorflow_datasets` and
`array_record` are imported when something is asked for.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from wkd_jax import extras
from wkd_jax.data import convert, idx, labels

ARCHIVES = {"imagenet2012": {"ILSVRC2012_img_train.tar": 147_897_477_120, "ILSVRC2012_img_val.tar": 6_744_924_160}}
"""Archives that people must fetch themselves, by set: file -> bytes."""

STEPS = {
    "imagenet2012": """\
  1. Sign in at https://image-net.org/download-images and accept the terms.
  2. Of ILSVRC2012, download "Training images (Task 1 & 2)", 138 GiB, and "Validation images (all tasks)", 6.3 GiB:
     the files ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Do not unpack them."""
}
"""How to come by them, as steps that a last one, where to put them and what to repeat, is added to."""


def prepare(
    dataset: str,
    *,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    sources: Sequence[str] = (),
    label_key: str = "label",
) -> Iterator[str]:
    """Makes a set readable for training, doing only what is not done yet, and says what it does.

    Args:
      dataset: As TFDS writes it, "name[/config][:version]".
      data_dir: Where prepared sets are. None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      manual_dir: Where archives are that people must fetch themselves. None: `downloads/manual` in `data_dir`.
      sources: The idx files of a set of `idx.SETS`, or folders that hold them, to write it from; else TFDS builds it.
      label_key: Feature that holds the class label, for the label index.

    Yields:
      Lines for people.

    Raises:
      ValueError: If there is no such set, if files are given for one that does not come as such files, if an archive
        must be fetched first or is not whole, if TensorFlow is missing where it is needed, if TFDS fails, or if a file
        to convert is damaged.
      OSError: If the disk is too small, or cannot be written.
    """
    builder = open_builder(dataset, data_dir)
    if sources and builder.name not in idx.SETS:
        raise ValueError(
            f"--from: {builder.name} does not come as idx files, as {', '.join(idx.SETS)} do; archives that TFDS "
            "builds a set from go to --manual_dir"
        )
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    ready = builder.info.splits and "array_record" in formats
    if not ready and "://" in os.fspath(builder.data_path):
        raise ValueError(f"{builder.data_path}: prepare the set on a disk, and copy the folder there")
    if ready:
        yield f"{builder.info.full_name} is prepared already, in {builder.data_dir}"
    elif not builder.info.splits and sources:
        yield from idx.write(builder, sources)
    elif not builder.info.splits:
        yield from _build(builder, dataset, data_dir, manual_dir)
    elif "tfrecord" in formats:
        yield f"{builder.info.full_name} is there as TFRecord files; they are converted, and nothing is downloaded"
        yield from _convert_in_place(builder)
    else:
        raise ValueError(
            f"{builder.data_dir} holds {', '.join(sorted(formats))} files, which are neither read nor converted: "
            "prepare the set in another --data_dir"
        )
    builder = open_builder(dataset, data_dir)
    for split, info in builder.info.splits.items():
        yield f"  {split}: {info.num_examples:,} examples in {info.num_shards} files"
    yield from _index(builder, label_key)


def open_builder(dataset: str, data_dir: str | None) -> Any:
    """The TFDS builder of a set, prepared or not.

    Args:
      dataset: As TFDS writes it, "name[/config][:version]".
      data_dir: Where prepared sets are. None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      ValueError: If TFDS has no code for it, or not for that version or config, and there are no files of it either;
        the message gives the nearest names. If `data_dir` cannot be read.
    """
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=data_dir)
    except tensorflow_datasets.core.DatasetNotFoundError:
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(re.split("[/:]", dataset)[0], known, n=3)
        where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        raise ValueError(
            f"{dataset!r}: there are no files of such a set in {where}, and TFDS has no code for one"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        ) from None
    except Exception as error:  # no such version, no such config, no answer from afar: each raises another kind
        raise ValueError(f"{dataset!r}: {error}") from error
    # Builders that TFDS has code for do not notice that a prepared set has a second format; those of the files do.
    return tensorflow_datasets.builder_from_directory(builder.data_dir) if builder.info.splits else builder


def _build(builder: Any, dataset: str, data_dir: str | None, manual_dir: str | None) -> Iterator[str]:
    """Has TFDS download and build a set that is not there at all."""
    if others := _other_versions(builder):
        yield f"note: {others} of it is there already; to use that, write the version: {builder.name}:VERSION"
    options = [*(["--data_dir", data_dir] if data_dir else []), *(["--manual_dir", manual_dir] if manual_dir else [])]
    repeat = shlex.join(["python", "-m", "wkd_jax.data", "prepare", dataset, *options])
    root = pathlib.Path(builder.data_path).parents[len(pathlib.PurePath(builder.info.full_name).parts) - 1]
    manual = pathlib.Path(manual_dir or root / "downloads" / "manual").expanduser()
    _check_archives(builder, manual, repeat)
    if not _can_build():
        raise ValueError(
            f"TFDS needs TensorFlow to build {builder.info.full_name}; training does not. Here, or where --data_dir "
            f"can be reached too: {extras.install('prepare')}, and then repeat: {repeat}"
        )
    # The archives' images are copied as they are, so that the set is about as large as they are.
    archives = sum(ARCHIVES.get(builder.name, {}).values())
    needed = archives or (builder.info.dataset_size or 0) + (builder.info.download_size or 0)
    yield check_space(builder.data_path, needed)

    import tensorflow_datasets

    config = tensorflow_datasets.download.DownloadConfig(manual_dir=os.fspath(manual), try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except Exception as error:  # any code of anybody's runs here, and it raises what it likes
        raise ValueError(
            f"TFDS could not build {builder.info.full_name}: {type(error).__name__}: {error}"
            + (f"\nIts instructions:\n{text}" if (text := builder.MANUAL_DOWNLOAD_INSTRUCTIONS) else "")
        ) from error
    yield f"{builder.info.full_name} is prepared, in {builder.data_dir}"


def _can_build() -> bool:
    # The second is one that TFDS 4.9 needs and does not declare.
    return all(importlib.util.find_spec(name) for name in ("tensorflow", "importlib_resources"))


def _other_versions(builder: Any) -> str:
    folder = pathlib.Path(builder.data_path).parent
    return ", ".join(sorted(path.parent.name for path in folder.glob("*/dataset_info.json")))


def _check_archives(builder: Any, manual: pathlib.Path, repeat: str) -> None:
    """Refuses to start without the archives that people must fetch themselves."""
    if not (instructions := builder.MANUAL_DOWNLOAD_INSTRUCTIONS):
        return
    wanted = ARCHIVES.get(builder.name, {})
    missing = [name for name in wanted if not (manual / name).is_file()]
    if missing or not manual.is_dir() or not any(manual.iterdir()):
        steps = STEPS.get(builder.name, "  1. " + " ".join(instructions.split()))
        last = 1 + len(re.findall(r"^  \d", steps, re.MULTILINE))
        raise ValueError(
            f"{builder.info.full_name} must be downloaded by hand:\n{steps}\n"
            f"  {last}. Put what you downloaded into {manual}"
            + (f" (missing there: {', '.join(missing)})" if missing else "")
            + f".\n  {last + 1}. Repeat: {repeat}"
        )
    for name, size in wanted.items():
        check_archive(manual / name, size)


def check_archive(path: pathlib.Path, size: int) -> None:
    """Refuses an archive that has not as many bytes as the whole one."""
    if (found := path.stat().st_size) != size:
        raise ValueError(
            f"{path} has {found:,} bytes, and the whole archive {size:,}: download it again, or let your program "
            "go on where it stopped"
        )


def check_space(folder: Any, needed: int) -> str:
    """How much of a disk is needed (bytes; 0: not known) and free, in words.

    Raises:
      OSError: If it is too little.
    """
    path = pathlib.Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed / 2**30:.1f} GiB are needed, and {free / 2**30:.1f} GiB are free on that disk: make "
            "room, or take another --data_dir"
        )
    return (
        f"disk: about {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
        if needed
        else f"disk: TFDS does not know how much is needed; {free / 2**30:.1f} GiB are free"
    )


def _convert_in_place(builder: Any) -> Iterator[str]:
    """Adds ArrayRecord files to the TFRecord files of a set, in its folder, as one more format of the same set.

    `tfds convert_format` does this too, but needs TensorFlow and Apache Beam for it. What is done already is not done
    again, so that a conversion which was stopped goes on.
    """
    from tensorflow_datasets.core import dataset_info, file_adapters

    folder = pathlib.Path(builder.data_path)
    shards = []
    for split in builder.info.splits.values():
        source = split.filename_template.replace(filetype_suffix="tfrecord")
        target = split.filename_template.replace(filetype_suffix="array_record")
        count = len(split.shard_lengths)
        for old, new, records in zip(
            source.sharded_filepaths(count), target.sharded_filepaths(count), split.shard_lengths, strict=True
        ):
            shards.append(convert.Shard(os.fspath(old), os.fspath(new), records))
    if missing := [shard.source for shard in shards if not os.path.isfile(shard.source)]:
        raise ValueError(f"{len(missing)} of {len(shards)} files are missing, the first {missing[0]}: copy them again")
    waiting = [shard for shard in shards if not os.path.isfile(shard.target)]
    yield check_space(folder, sum(os.path.getsize(shard.source) for shard in waiting))
    convert.convert(waiting, f"{builder.info.full_name}: TFRecord to ArrayRecord")

    # In this order: while the set does not say that it has the format, nobody reads the files.
    info = dataset_info.read_proto_from_builder_dir(folder)
    info.alternative_file_formats.append(file_adapters.FileFormat.ARRAY_RECORD.value)
    dataset_info.write_dataset_info_proto(info, dataset_info_dir=folder)
    yield f"{builder.info.full_name} is converted, in {folder}; its *.tfrecord-* files are not needed any more for this"


def _index(builder: Any, label_key: str) -> Iterator[str]:
    try:
        labels.feature(builder, label_key)
    except ValueError as error:  # a set may have none
        yield f"  no label index: {error}"
        return
    for split in builder.info.splits:
        there = labels.load(builder, split, label_key) is not None
        labels.read(builder, split, label_key)
        yield f"  {split}: label index {'is there already' if there else 'written'}"
