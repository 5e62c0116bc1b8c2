"""TFRecord files to ArrayRecord files, without TensorFlow. Imports little, as each of its processes starts with it."""

from __future__ import annotations

import os
import pathlib
import secrets
import struct
from collections.abc import Iterator, Sequence
from concurrent import futures
from multiprocessing import get_context
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Shard(NamedTuple):
    """A file to convert: paths of the TFRecord file and of the ArrayRecord file to write, and the count of records."""

    source: str
    target: str
    records: int


def convert(shards: Sequence[Shard], title: str) -> None:
    """Converts files, as many at a time as there are cores, with progress.

    Args:
      shards: Which.
      title: Of the progress bar.

    Raises:
      ValueError: If a file is damaged or has another number of records. What was converted by then stays.
      OSError: If a file cannot be read or written.
    """
    if not shards:
        return
    console = Console(stderr=True)
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn()
    # Packing is what takes the time, and it holds Python's lock.
    workers = min(len(shards), os.cpu_count() or 1)
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        futures.ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task("", total=len(shards))
        try:
            for done in futures.as_completed([pool.submit(convert_shard, *shard) for shard in shards]):
                done.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def convert_shard(source: str, target: str, records: int) -> None:
    """Writes the records of a TFRecord file into an ArrayRecord file, which appears under its name when it is whole.

    Args:
      source: The TFRecord file.
      target: The file to write.
      records: How many there must be.

    Raises:
      ValueError: If there are more or fewer, or the file ends within one.
    """
    from array_record.python import array_record_module

    temporary = f"{target}.{secrets.token_hex(8)}.part"
    try:
        writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1")  # one a chunk: read in any order
        count = 0
        for record in _tfrecords(source):
            writer.write(record)
            count += 1
        writer.close()
        if count != records:
            raise ValueError(f"{source} has {count} records, not {records} as the set says: copy the file again")
        os.replace(temporary, target)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _tfrecords(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4), and so on.

    Checksums are not looked at: in Python that is slow, and images that are damaged are found by their decoder.
    """
    with open(path, "rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else None
            # A length that is damaged must not become a buffer.
            if length is None or length + 4 > os.fstat(file.fileno()).st_size - file.tell():
                raise ValueError(f"{path} is damaged or cut off at byte {file.tell() - len(header)}: copy it again")
            yield file.read(length)
            file.read(4)
