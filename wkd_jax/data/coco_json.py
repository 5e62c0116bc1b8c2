"""Images and objects of a split as flat arrays, and COCO's JSON files, read into them and checked. No pixels here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_ID_LIMIT = 2**31  # image ids are int32 in a batch


@dataclasses.dataclass(frozen=True, eq=False)
class Instances:
    """Images and the annotated objects in them. A (annotations) is over all images, in the images' order.

    Attributes:
      source: For people: where they were read.
      categories: (id, name) of each class, ids ascending; a label is a position in it.
      image_ids: [N] int32.
      file_names: [N] bytes, UTF-8.
      sizes: [N, 2] int32, (height, width), pixels.
      images: [A] int64, ascending: position of the image that an object is in.
      labels: [A] int32.
      boxes: [A, 4] float64, COCO's (x, y, width, height), pixels, as they were read.
      areas: [A] float64, of the object's mask, pixels squared.
      crowd: [A] bool, regions of many objects, which evaluation ignores.
      notes: Sentences on what was not as it should be.
    """

    source: str
    categories: tuple[tuple[int, str], ...]
    image_ids: np.ndarray
    file_names: np.ndarray
    sizes: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all but `source` and `notes`."""
        digest = hashlib.sha256(json.dumps(self.categories).encode())
        digest.update(b"\n".join(self.file_names.tolist()))
        for array in (self.image_ids, self.sizes, self.images, self.labels, self.boxes, self.areas, self.crowd):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
        return digest.hexdigest()

    def reordered(self, order: np.ndarray) -> Instances:
        """The same with the images in another order, [N]: what is at `order[i]` comes to i."""
        place = np.argsort(order, kind="stable")[self.images]
        by_image = np.argsort(place, kind="stable")
        annotations = {name: getattr(self, name)[by_image] for name in ("labels", "boxes", "areas", "crowd")}
        images = {name: getattr(self, name)[order] for name in ("image_ids", "file_names", "sizes")}
        return dataclasses.replace(self, images=place[by_image], **images, **annotations)


def read(path: str | os.PathLike[str], argument: str) -> Instances:
    """Reads a file of COCO's `instances` form: what has `images`, `annotations` and `categories`.

    Images stay in the file's order. `iscrowd` may be missing (0) and `area` too (width times height; noted).

    Args:
      path: The file.
      argument: The config key that names it, for messages.

    Raises:
      ValueError: If the file is missing or of another form; if an id is used twice, is unknown or no int32 of 0 or
        more; if an image has no pixels; if a box or an area is not finite or negative.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{argument}: {path} cannot be read ({error.strerror}); set data.data_dir") from error
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is no JSON ({error}): download or write it again") from error
    sections = ("images", "annotations", "categories")
    if not isinstance(content, Mapping) or not all(isinstance(content.get(name), list) for name in sections):
        raise ValueError(
            f"{argument}: {path} has not the three lists {', '.join(sections)}: need COCO's instances form, such as "
            "instances_train2017.json"
        )
    images, annotations, classes = (_Table(path, name, content[name]) for name in sections)
    if not len(images) or not len(classes):
        raise ValueError(f"{argument}: {path} has {len(images)} images and {len(classes)} categories: none to use")

    category_ids, names = classes.integers("id"), classes.texts("name")
    for key, values in (("id", category_ids), ("name", names)):
        classes.refuse_repeated(key, values)
    categories = tuple(sorted(zip(category_ids.tolist(), names, strict=True)))

    image_ids, file_names = images.integers("id"), images.texts("file_name")
    images.refuse_repeated("id", image_ids)
    images.refuse_repeated("file_name", file_names)
    images.refuse((image_ids < 0) | (image_ids >= _ID_LIMIT), "its id must be from 0 to 2^31 - 1")
    sizes = np.stack([images.integers(side) for side in ("height", "width")], axis=1)
    images.refuse((sizes < 1).any(axis=1), "height and width must be positive numbers of pixels")

    annotations.refuse_repeated("id", annotations.integers("id"))
    image = _positions(annotations, "image_id", image_ids, "no image of the file has this image_id")
    label = _positions(
        annotations, "category_id", np.array([key for key, _ in categories]), "no category has this category_id"
    )
    boxes = annotations.boxes("bbox")
    annotations.refuse(~np.isfinite(boxes).all(axis=1), "bbox must be four finite numbers: x, y, width, height")
    annotations.refuse((boxes[:, 2:] < 0).any(axis=1), "width and height of bbox must not be negative")
    lacking = np.array(["area" not in entry for entry in annotations.entries], bool)
    annotations.fill("area", boxes[:, 2:].prod(axis=1).tolist())
    areas = annotations.numbers("area")
    annotations.refuse(~(np.isfinite(areas) & (areas >= 0)), "area must be a finite number of 0 or more")
    annotations.fill("iscrowd", [0] * len(annotations))
    crowd = annotations.integers("iscrowd")
    annotations.refuse((crowd != 0) & (crowd != 1), "iscrowd must be 0 or 1")

    order = np.argsort(image, kind="stable")
    notes = (f"{path.name}: {lacking.sum():,} objects have no area; width times height is taken",)
    return Instances(
        source=str(path),
        categories=categories,
        image_ids=image_ids.astype(np.int32),
        file_names=np.array([name.encode() for name in file_names], np.bytes_),
        sizes=sizes.astype(np.int32),
        images=image[order],
        labels=label[order].astype(np.int32),
        boxes=boxes[order],
        areas=areas[order],
        crowd=crowd[order].astype(bool),
        notes=notes if lacking.any() else (),
    )


class _Table:
    """One list of the file, by columns. Messages name the file, the list and the entry."""

    def __init__(self, path: pathlib.Path, name: str, entries: list[Any]) -> None:
        self.entries = entries
        self._where = f"{path}: {name}"
        self.refuse([not isinstance(entry, dict) for entry in entries], "it must be an object with named values")

    def __len__(self) -> int:
        return len(self.entries)

    def fill(self, key: str, values: Sequence[Any]) -> None:
        """Gives the entries without this key the values at their places."""
        for entry, value in zip(self.entries, values, strict=True):
            entry.setdefault(key, value)

    def integers(self, key: str) -> np.ndarray:
        """[entries] int64."""
        values = self._column(key, (int,), "an integer")
        try:
            return np.array(values, np.int64)
        except OverflowError:
            self.refuse([abs(value) >= 2**63 for value in values], f"{key!r} must have at most 63 bits")
            raise

    def texts(self, key: str) -> list[str]:
        """Strings that are not empty."""
        values = self._column(key, (str,), "a text")
        self.refuse([value == "" for value in values], f"{key!r} must be a text")
        return values

    def numbers(self, key: str) -> np.ndarray:
        """[entries] float64."""
        return np.array(self._column(key, (int, float), "a number"), np.float64)

    def boxes(self, key: str) -> np.ndarray:
        """[entries, 4] float64."""
        values = self._column(key, (list,), "a list of 4 numbers")
        if not (set(map(len, values)) <= {4} and set(map(type, itertools.chain(*values))) <= {int, float}):
            wrong = [len(value) != 4 or not set(map(type, value)) <= {int, float} for value in values]
            self.refuse(wrong, f"{key!r} must be a list of 4 numbers")
        return np.array(values, np.float64).reshape(-1, 4)

    def refuse(self, wrong: Any, rule: str) -> None:
        """Raises for the first entry where `wrong` [entries] is True."""
        places = np.flatnonzero(wrong)
        if len(places):
            entry = json.dumps(self.entries[places[0]], default=str)
            shown = entry if len(entry) < 200 else f"{entry[:200]}..."
            more = f" ({len(places)} entries are so)" if len(places) > 1 else ""
            raise ValueError(f"{self._where}[{places[0]}]: {rule}{more}; correct the file: {shown}")

    def refuse_repeated(self, key: str, values: Any) -> None:
        """Raises for the first entry whose value an earlier one has."""
        _, first = np.unique(np.asarray(values), return_index=True)
        repeated = np.ones(len(self), bool)
        repeated[first] = False
        self.refuse(repeated, f"an earlier entry has the same {key}")

    def _column(self, key: str, types: tuple[type, ...], words: str) -> list[Any]:
        values = [entry.get(key) for entry in self.entries]
        if not set(map(type, values)) <= set(types):
            self.refuse([type(value) not in types for value in values], f"{key!r} must be {words}")
        return values


def _positions(annotations: _Table, key: str, known: np.ndarray, words: str) -> np.ndarray:
    """[A] int64: where each annotation's `key` is in `known`."""
    values = annotations.integers(key)
    order = np.argsort(known)
    place = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
    annotations.refuse(known[place] != values, words)
    return place
