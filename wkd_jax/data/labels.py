"""The label index: all labels of a prepared TFDS split in one small file, so that a run need not read the images.

Training wants every label before its first step (balanced subsets, class counts, checks), and in a TFDS set a label
lies beside its image: a pass over ImageNet reads 150 GB. The index is made once, by `python -m wkd_jax.data prepare` or
by the first run, and is used only while it fits the files it was made of.

There is one index a named split ("train"); those of expressions such as "train[:90%]+validation" are cut out of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import sys
import zipfile
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import track

from wkd_jax.cache import folder
from wkd_jax.data import tfds
from wkd_jax.registry import unknown

_CHUNK = 1024  # records read at a time


def read(builder: Any, split: str, label_key: str, *, cache: str | os.PathLike[str] | None = None) -> np.ndarray:
    """The labels of a split: from the index, or from a pass over the records whose result is kept as an index.

    Args:
      builder: `tfds.builder(...)` of a set that has ArrayRecord files.
      split: TFDS split expression, such as "train" or "train[:90%]".
      label_key: Feature that holds the class label.
      cache: Where an index goes that cannot be written beside the set. None: see `wkd_jax.cache`.

    Returns:
      [N] int32, in the order of the files.

    Raises:
      ValueError: If there is no such split or feature, or a file of the set is missing.
      OSError: If an index can be written neither beside the set nor in the cache.
    """
    for name in _named(builder, split):
        if load(builder, name, label_key, cache=cache) is None:
            save(builder, name, label_key, compute(builder, name, label_key), cache=cache)
    labels = load(builder, split, label_key, cache=cache)
    if labels is None:
        raise OSError(f"{builder.info.full_name} {split}: its files or its label index changed while they were read")
    return labels


def load(builder: Any, split: str, label_key: str, *, cache: str | os.PathLike[str] | None = None) -> np.ndarray | None:
    """The labels of a split from its index.

    An index of other files is not used: names, sizes and record counts of the shards, the label feature, its number of
    classes and the name and version of the set must be what they were when it was made.

    Args:
      builder: As in `read`.
      split: TFDS split expression.
      label_key: Feature that holds the class label.
      cache: As in `read`.

    Returns:
      [N] int32, in the order of the files; None if an index that is needed is missing or does not fit.

    Raises:
      ValueError: If there is no such split, or a file of the set is missing.
    """
    whole: dict[str, tuple[np.ndarray, int]] = {}  # file -> (labels of its split, position of its first record)
    for name in _named(builder, split):
        labels = _read_file(builder, name, label_key, cache)
        if labels is None:
            return None
        start = 0
        for shard in builder.info.splits[name].file_instructions:
            whole[shard.filename] = labels, start
            start += shard.take
    parts = []
    for part in builder.info.splits[split].file_instructions:
        labels, start = whole[part.filename]
        parts.append(labels[start + part.skip : start + part.skip + part.take])
    return np.concatenate(parts)


def compute(builder: Any, split: str, label_key: str) -> np.ndarray:
    """The labels of a split from its records: one pass over them that decodes no image, with progress.

    Args:
      builder: As in `read`.
      split: TFDS split expression.
      label_key: Feature that holds the class label.

    Returns:
      [N] int32, in the order of the files.

    Raises:
      ValueError: If there is no such split, or no such feature that is a class label.
    """
    from tensorflow_datasets import decode, features

    parser = features.FeaturesDict({label_key: feature(builder, label_key)})
    source = builder.as_data_source(
        split, deserialize_method=decode.DeserializeMethod.RAW_BYTES, file_format="array_record"
    )
    labels = np.empty(len(source), np.int32)
    console = Console(stderr=True)
    starts = track(
        range(0, len(source), _CHUNK),
        description=f"{builder.info.full_name} {split}: labels",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for start in starts:
        rows = range(start, min(start + _CHUNK, len(source)))
        for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            labels[row] = parser.deserialize_example_np(record)[label_key]
    return labels


def save(
    builder: Any, split: str, label_key: str, labels: np.ndarray, *, cache: str | os.PathLike[str] | None = None
) -> epath.Path:
    """Writes the index of a named split, beside the set if that can be written, else into the cache.

    It appears under its name when it is whole. Several processes may write it at once.

    Args:
      builder: As in `read`.
      split: A named split, "train", and no expression.
      label_key: Feature that holds the class label.
      labels: [N] integers, in the order of the files.
      cache: As in `read`.

    Returns:
      The file.

    Raises:
      ValueError: If `split` is an expression, `labels` has not one label a record, or a file of the set is missing.
      OSError: If the index can be written in neither place.
    """
    if split not in builder.info.splits:
        raise ValueError(f"{builder.info.full_name}: {split!r} is no named split: {', '.join(builder.info.splits)}")
    record = _record(builder, split, label_key)
    count = sum(shard["records"] for shard in record["shards"])
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{split}: need {count} integer labels, found {labels.dtype} of shape {labels.shape}")
    buffer = io.BytesIO()
    np.savez(buffer, record=np.array(json.dumps(record)), labels=labels.astype(np.int32))
    *others, last = _places(builder, split, label_key, cache)
    for path in others:
        try:
            return _write(path, buffer.getvalue())
        except OSError:  # read-only, or no space: the cache is for that
            continue
    try:
        return _write(last, buffer.getvalue())
    except OSError as error:
        raise OSError(
            f"the label index can be written neither beside {builder.info.full_name} nor as {last} ({error}): set "
            "WKD_JAX_CACHE to a folder that can be written"
        ) from error


def feature(builder: Any, label_key: str) -> Any:
    """The feature that holds the class label, a TFDS `ClassLabel`.

    Raises:
      ValueError: If there is none of that name.
    """
    from tensorflow_datasets import features

    known = {key: kind for key, kind in builder.info.features.items() if isinstance(kind, features.ClassLabel)}
    if label_key not in known:
        raise ValueError(f"{builder.info.full_name}: {unknown('class label', label_key, known)}")
    return known[label_key]


def _named(builder: Any, split: str) -> list[str]:
    """The named splits whose files an expression reads."""
    files = {part.filename for part, _ in tfds.shards(builder, "split", split)}
    splits = builder.info.splits
    return [name for name in splits if files & {part.filename for part in splits[name].file_instructions}]


def _record(builder: Any, split: str, label_key: str) -> dict[str, Any]:
    """What an index must have been made of."""
    shards = [
        {"file": epath.Path(part.filename).name, "bytes": size, "records": part.examples_in_shard}
        for part, size in tfds.shards(builder, "split", split)
    ]
    return {
        "format": 1,
        "dataset": builder.info.full_name,
        "split": split,
        "label_key": label_key,
        "num_classes": feature(builder, label_key).num_classes,
        "shards": shards,
    }


def _places(
    builder: Any, split: str, label_key: str, cache: str | os.PathLike[str] | None
) -> tuple[epath.Path, epath.Path]:
    """Files that may hold an index, the preferred one first."""
    beside = epath.Path(builder.data_dir)
    name = f"labels-{split}-{label_key}.npz"
    where = hashlib.sha256(os.fspath(beside.expanduser().absolute()).encode()).hexdigest()[:12]
    return beside / name, epath.Path(cache or folder()).expanduser() / "labels" / f"{where}-{name}"


def _read_file(builder: Any, split: str, label_key: str, cache: str | os.PathLike[str] | None) -> np.ndarray | None:
    record = _record(builder, split, label_key)
    for path in _places(builder, split, label_key, cache):
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                made_of, labels = json.loads(str(file["record"])), file["labels"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            sys.stderr.write(f"{path} cannot be read and is not used: {error}\n")
            continue
        if made_of == record:
            return labels
        sys.stderr.write(f"{path} is of other files than those that are there now, and is not used\n")
    return None


def _write(path: epath.Path, content: bytes) -> epath.Path:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
