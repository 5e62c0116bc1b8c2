"""Looks at a prepared TFDS set or a tree of image files before a run does: what is in it, and whether it is whole."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from wkd_jax.data import image, labels, tfds
from wkd_jax.data.batches import Records
from wkd_jax.data.image_folder import image_folder
from wkd_jax.data.stream import Split
from wkd_jax.data.tfds_stream import tfds_stream

_FIRST = 5  # images whose size is shown
_TOGETHER = 64  # images that a thread reads and decodes at a time


def check(
    source: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "val",
    image_key: str = "image",
    label_key: str = "label",
    decode: bool = False,
) -> Iterator[str]:
    """Says what a data set holds and what is wrong with it.

    Args:
      source: Name of a TFDS set, "name[/config][:version]"; or the folder of one, with its version; or a folder with
        one folder of class folders a split.
      data_dir: Of a TFDS set by its name: where it was prepared. None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_split: Of image folders.
      test_split: Of image folders.
      image_key: Of a TFDS set: feature that holds the image.
      label_key: Of a TFDS set: feature that holds the class label.
      decode: Read and decode every image, and name those that cannot be.

    Yields:
      Lines for people; those about something wrong begin with "WRONG".

    Raises:
      ValueError: At the end, if something is wrong; or if there is no such set.
    """
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir() and not (folder / "dataset_info.json").is_file():
        lines = _image_folder(folder, train_split, test_split, decode)
    else:
        if folder.is_absolute() and not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
        if folder.is_dir():
            source, data_dir = _by_name(folder)
        lines = _prepared(source, data_dir, image_key, label_key, decode)
    wrong = 0
    for line in lines:
        wrong += line.lstrip().startswith("WRONG")
        yield line
    if wrong:
        raise ValueError(f"{source}: {wrong} {'thing is' if wrong == 1 else 'things are'} wrong, see above")


def _by_name(folder: pathlib.Path) -> tuple[str, str]:
    """(name[/config]:version, data_dir) of a TFDS set's folder."""
    import tensorflow_datasets

    full_name = tensorflow_datasets.builder_from_directory(folder).info.full_name
    parts = pathlib.PurePath(full_name).parts
    folder = folder.absolute()
    if folder.parts[-len(parts) :] != parts:
        raise ValueError(f"{folder} holds {full_name}: TFDS finds it only if the folder's path ends so; move it there")
    name, version = full_name.rsplit("/", 1)
    return f"{name}:{version}", os.fspath(folder.parents[len(parts) - 1])


def _image_folder(folder: pathlib.Path, train_split: str, test_split: str, decode: bool) -> Iterator[str]:
    data = image_folder(data_dir=os.fspath(folder), train_split=train_split, test_split=test_split, workers=0)
    yield f"{folder}: files in class folders"
    for name, split in ((train_split, data.train), (test_split, data.test)):
        yield from _split(name, split, data.class_names, decode)
    if absent := set(data.class_names) - {data.class_names[label] for label in np.unique(data.test.labels)}:
        yield f"WRONG {test_split}: no images of {len(absent)} classes, {', '.join(sorted(absent)[:5])}"


def _prepared(name: str, data_dir: str | None, image_key: str, label_key: str, decode: bool) -> Iterator[str]:
    builder = tfds.find(name, data_dir)
    yield f"{builder.info.full_name}: ArrayRecord files, {builder.data_dir}"
    for split in builder.info.splits:
        try:
            data = tfds_stream(
                dataset=name,
                data_dir=data_dir,
                train_split=split,
                test_split=split,
                image_key=image_key,
                label_key=label_key,
                workers=0,
            )
        except ValueError as error:
            yield f"WRONG {error}"
            continue
        shards = tfds.shards(builder, "split", split)
        there = labels.load(builder, split, label_key) is not None
        damaged = [line for line in _map(_damage, [part for part, _ in shards]) if line]
        yield from damaged
        if not damaged:
            yield from _split(split, data.train, data.class_names, decode)
            yield (
                f"    {len(shards)} files, {sum(size for _, size in shards) / 2**30:.2f} GiB; label index "
                + ("there" if there else "written now")
            )


def _damage(part: Any) -> str:
    """What is wrong with an ArrayRecord file as such; "" if nothing is."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(part.filename)
        found = reader.num_records()
        reader.close()
    except Exception as error:  # its own kinds, by the place that noticed
        return f"WRONG {part.filename} cannot be read: {error}"
    if found != part.examples_in_shard:
        return f"WRONG {part.filename} has {found} records, not {part.examples_in_shard} as the set says"
    return ""


def _split(name: str, split: Split, classes: tuple[str, ...], decode: bool) -> Iterator[str]:
    """What one split holds."""
    found = split.labels
    known = found[(found >= 0) & (found < len(classes))]
    counts = np.bincount(known, minlength=len(classes))
    least, most = (counts[counts > 0].min(), counts.max()) if len(known) else (0, 0)
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    yield f"  {name}: {len(split):,} images of {np.count_nonzero(counts):,} classes, {each} a class"
    if not len(known):
        yield "    without labels: of no use for training or evaluation"
    elif len(known) < len(found):
        yield f"WRONG {name}: {len(found) - len(known)} of {len(found)} labels are not from 0 to {len(classes) - 1}"
    first = [_size(split.records, row) for row in range(min(_FIRST, len(split)))]
    yield f"    first {len(first)} images, height x width: {', '.join(dict.fromkeys(first))}"
    if decode:
        yield from _unreadable(name, split.records)


def _size(records: Records, row: int) -> str:
    try:
        found = records.fetch([row])[0]
        if isinstance(found, Exception):
            raise found
        return "{} x {}".format(*image.decode(found[0]).shape)
    except (OSError, ValueError):
        return "unreadable"


def _unreadable(name: str, records: Records) -> Iterator[str]:
    """Decodes every image; a line for each that cannot be."""

    def some(rows: range) -> list[str]:
        lines = []
        for row, found in zip(rows, records.fetch(rows), strict=True):
            try:
                if isinstance(found, Exception):
                    raise found
                image.decode(found[0])
            except (OSError, ValueError) as error:
                lines.append(f"WRONG {records.name(row)} cannot be read: {error}")
        return lines

    chunks = [range(start, min(start + _TOGETHER, len(records))) for start in range(0, len(records), _TOGETHER)]
    console = Console(stderr=True)
    done = track(
        _map(some, chunks),
        description=f"{name}: decoding",
        total=len(chunks),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    count = 0
    for lines in done:
        count += len(lines)
        yield from lines
    yield f"    decoded: {len(records) - count:,} of {len(records):,}"


def _map(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map`, in threads, of which none runs far ahead of what is asked for. Decoders and readers free Python's lock."""
    workers = os.cpu_count() or 1
    with futures.ThreadPoolExecutor(workers) as pool:
        rest = iter(items)
        waiting = [pool.submit(function, item) for item in itertools.islice(rest, 2 * workers)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in itertools.islice(rest, 1)]
