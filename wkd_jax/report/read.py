"""Reads the work directory of a run, finished or not: the files that a report is made of, checked and in NumPy.

Knows nothing of JAX and nothing of how the files were made, so that a report can be rebuilt anywhere.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wkd_jax.report import metric as metric_lib
from wkd_jax.report.metric import Metric

NON_FINITE = {"nan", "inf", "-inf"}  # strict JSON has no such numbers, so they are logged as these strings


@dataclasses.dataclass(frozen=True)
class Curve:
    """One logged quantity.

    Attributes:
      steps: [N] int64, increasing.
      values: [N] float64; not every one needs to be finite.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the student, and the teacher where there is one, do on each class.

    Attributes:
      class_names: C names.
      count: [C] float64, examples of each class.
      student_correct: [C] float64, of these, those whose largest student logit is the label's.
      teacher_correct: The same of the teacher; None in a run without one.
      agree: [C] float64, of these, those on which the two predict the same class; None in a run without a teacher.
      confusion: [C, C] float64, examples by true class (row) and the student's prediction (column); None where the
        run did not keep it.
    """

    class_names: Sequence[str]
    count: np.ndarray
    student_correct: np.ndarray
    teacher_correct: np.ndarray | None
    agree: np.ndarray | None
    confusion: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Precision:
    """How well the student, and the teacher where there is one, detect the objects of each class.

    Attributes:
      class_names: C names.
      student: [C] float64, average precision, percent; NaN for a class of which the evaluated images have no object.
      teacher: The same; None in a run without a teacher.
    """

    class_names: Sequence[str]
    student: np.ndarray
    teacher: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Box:
    """An object, or what was taken for one.

    Attributes:
      name: Of its class.
      place: (x, y, width, height), pixels of the original image, (x, y) its upper left corner.
      score: Of a detection; None for an object of the ground truth.
      crowd: Whether it is a region of many objects.
    """

    name: str
    place: tuple[float, ...]
    score: float | None = None
    crowd: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the test split, and the boxes in it.

    Attributes:
      image_id: As in the annotations.
      size: (width, height) of the original, pixels.
      jpeg: A copy of any size, in base64.
      boxes: "truth", "student" and, in a run with a teacher, "teacher" -> boxes.
    """

    image_id: int
    size: tuple[int, int]
    jpeg: str
    boxes: Mapping[str, Sequence[Box]]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images to draw, and the least score of the detections in them."""

    images: Sequence[Picture]
    score: float


@dataclasses.dataclass(frozen=True)
class Interrelation:
    """The teacher's class interrelations.

    Attributes:
      class_names: C names.
      similarity: [C, C] float64, 1 on the diagonal.
      provenance: What it was computed from.
      structure: How much it says, see `wkd_jax.evaluation.structure`; {} in files of older versions.
    """

    class_names: Sequence[str]
    similarity: np.ndarray
    provenance: Mapping[str, Any]
    structure: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a report may show.

    Attributes:
      workdir: Where it was read.
      config: The resolved config.
      curves: Kind of record ("train", "eval") -> name of the quantity -> its curve, in order of appearance.
      step: The last step logged; 0 where none was.
      epoch: The last epoch logged; None where none was.
      truncated: Whether the log ends in half a line, as that of a killed run may. The half line is left out.
      result: The outcome; None while the run is unfinished.
      evaluation: None where the run has not written one, or classifies nothing.
      precision: None where the run has not written it, or detects nothing.
      pictures: None where the run has not written them.
      interrelation: None where no method asked for one.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Curve]]
    step: int
    epoch: float | None
    truncated: bool
    result: Mapping[str, Any] | None
    evaluation: Evaluation | None
    precision: Precision | None
    pictures: Pictures | None
    interrelation: Interrelation | None

    @property
    def metric(self) -> Metric:
        """What its networks are measured by."""
        return metric_lib.of([*(self.result or {}), *self.curves.get("eval", {})])


def read(workdir: str | pathlib.Path) -> Run:
    """Reads a work directory.

    `config.json` and `metrics.jsonl` must be there; `result.json`, `evaluation.json`, `pictures.json` and
    `interrelation.npz` may be absent.

    Raises:
      FileNotFoundError: If the directory or one of the two files is missing.
      ValueError: If a file is not what it should be; the message names the file and the line or key at fault.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir}: no such work directory; give the one that the run was started with")
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir}: no run in this directory: it has no config.json")
    records, truncated = _records(workdir / "metrics.jsonl")
    last = max(records, key=lambda record: record["step"], default={"step": 0})
    result, evaluation, pictures, interrelation = (
        workdir / name for name in ("result.json", "evaluation.json", "pictures.json", "interrelation.npz")
    )
    by_class = _json_object(evaluation) if evaluation.exists() else {}
    detects = "student_AP_by_class" in by_class
    return Run(
        workdir=workdir,
        config=_json_object(workdir / "config.json"),
        curves=_curves(records),
        step=last["step"],
        epoch=number(last.get("epoch")),
        truncated=truncated,
        result=_json_object(result) if result.exists() else None,
        evaluation=_evaluation(evaluation, by_class) if evaluation.exists() and not detects else None,
        precision=_precision(evaluation, by_class) if detects else None,
        pictures=_pictures(pictures) if pictures.exists() else None,
        interrelation=_interrelation(interrelation) if interrelation.exists() else None,
    )


def number(value: Any) -> float | None:
    """`value` as a float where it is a number or the name of a non-finite one; None where it is anything else.

    Example:
      >>> number(3), number("-inf"), number("three"), number(True)
      (3.0, -inf, None, None)
    """
    if isinstance(value, str) and value.lower() in NON_FINITE:
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(path: pathlib.Path) -> str:
    """The file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; every run writes it before its first step") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error


def _json_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _records(path: pathlib.Path) -> tuple[list[dict[str, Any]], bool]:
    """The log's records in order of steps, and whether the last line was cut off.

    A resumed run goes again over the steps since its last checkpoint: of records of the same kind, one that is
    followed by another of the same or an earlier step is dropped.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    truncated = False
    lines = _text(path).split("\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if i == len(lines) - 1:  # no newline after it: the writer was stopped in the middle of the line
                truncated = True
                continue
            raise ValueError(f"{path}, line {i + 1}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {i + 1}: expected a JSON object, found {type(record).__name__}")
        if type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {i + 1}: 'step' must be an integer, found {record.get('step')!r}")
        if not isinstance(record.get("kind"), str):
            raise ValueError(f"{path}, line {i + 1}: 'kind' must be a string, found {record.get('kind')!r}")
        same_kind = kept.setdefault(record["kind"], [])
        while same_kind and same_kind[-1]["step"] >= record["step"]:
            same_kind.pop()
        same_kind.append(record)
    return [record for same_kind in kept.values() for record in same_kind], truncated


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """The numbers of the records, by kind and name. What is not a number is no curve and is left out."""
    points: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in records:
        for key, value in record.items():
            if key in ("step", "epoch", "kind", "time") or (y := number(value)) is None:
                continue
            steps, values = points.setdefault(record["kind"], {}).setdefault(key, ([], []))
            steps.append(record["step"])
            values.append(y)
    return {
        kind: {key: Curve(np.array(steps, np.int64), np.array(values)) for key, (steps, values) in curves.items()}
        for kind, curves in points.items()
    }


def _array(path: pathlib.Path, key: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as a finite float64 array of this shape."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {key!r} is not an array of numbers ({error})") from error
    if array.shape != shape:
        raise ValueError(f"{path}: {key!r} has shape {array.shape}; by 'class_names' it must be {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {key!r} has entries that are not finite")
    return array


def _class_names(path: pathlib.Path, data: Mapping[str, Any]) -> list[str]:
    names = data.get("class_names")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: 'class_names' must be a list of names, one a class")
    return [str(name) for name in names]


def _evaluation(path: pathlib.Path, data: Mapping[str, Any]) -> Evaluation:
    """What evaluation.json says of a classification run. What a run has no numbers for is null or absent."""
    names = _class_names(path, data)
    if missing := [key for key in ("count", "student_correct") if data.get(key) is None]:
        raise ValueError(f"{path}: has no {' and no '.join(map(repr, missing))}")
    by_class = (len(names),)
    shapes = {"count": by_class, "student_correct": by_class, "teacher_correct": by_class, "agree": by_class}
    shapes["confusion"] = by_class * 2
    arrays = {
        key: None if data.get(key) is None else _array(path, key, data[key], shape) for key, shape in shapes.items()
    }
    for key, array in arrays.items():
        most = np.inf if key == "count" else arrays["count"][:, None] if key == "confusion" else arrays["count"]
        if array is not None and not ((array >= 0) & (array <= most)).all():
            raise ValueError(f"{path}: {key!r} must lie between 0 and 'count' for every class")
    return Evaluation(class_names=names, **arrays)


def _precision(path: pathlib.Path, data: Mapping[str, Any]) -> Precision:
    """What evaluation.json says of a detection run. A class without objects has -1."""
    names = _class_names(path, data)

    def percent(key: str) -> np.ndarray | None:
        if data.get(key) is None:
            return None
        values = _array(path, key, data[key], (len(names),))
        if not ((values == -1) | (values >= 0) & (values <= 100)).all():
            raise ValueError(f"{path}: {key!r} must lie between 0 and 100, or be -1 for a class without objects")
        return np.where(values < 0, np.nan, values)

    student = percent("student_AP_by_class")
    if student is None:
        raise ValueError(f"{path}: has no 'student_AP_by_class'")
    return Precision(names, student, percent("teacher_AP_by_class"))


def _pictures(path: pathlib.Path) -> Pictures:
    """Reads pictures.json."""
    data = _json_object(path)
    if (score := number(data.get("score"))) is None or not isinstance(data.get("images"), list):
        raise ValueError(f"{path}: needs 'score', a number, and 'images', a list")
    return Pictures([_picture(f"{path}: images[{i}]", image) for i, image in enumerate(data["images"])], score)


def _picture(where: str, image: Any) -> Picture:
    """One of its images. `where` is what messages begin with."""
    try:
        identity, size = image["image_id"], (image["width"], image["height"])
        sides = {side: image[side] for side in ("truth", "teacher", "student") if side != "teacher" or side in image}
        jpeg = image["jpeg"]
        begins = base64.b64decode(jpeg, validate=True)[:3]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{where}: not an image with its boxes ({error!r})") from error
    if not all(type(value) is int for value in (identity, *size)) or min(size) < 1:
        raise ValueError(f"{where}: 'image_id', 'width' and 'height' must be integers, the sides above 0")
    if begins != b"\xff\xd8\xff":
        raise ValueError(f"{where}: 'jpeg' is no JPEG in base64")
    return Picture(identity, size, jpeg, {side: _boxes(f"{where}.{side}", boxes) for side, boxes in sides.items()})


def _boxes(where: str, boxes: Any) -> list[Box]:
    """The boxes of one side of an image."""
    if not isinstance(boxes, list):
        raise ValueError(f"{where}: expected a list of boxes, found {type(boxes).__name__}")
    found = []
    for i, box in enumerate(boxes):
        try:
            place = tuple(float(value) for value in box["box"])
            score = None if box.get("score") is None else float(box["score"])
            found.append(Box(str(box["class"]), place, score, bool(box.get("crowd"))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}[{i}]: not a box with its class ({error!r})") from error
        if len(place) != 4 or not np.isfinite(place).all() or min(place[2:]) < 0:
            raise ValueError(f"{where}[{i}]: 'box' must be finite x, y, width and height, the latter two 0 or more")
    return found


def _interrelation(path: pathlib.Path) -> Interrelation:
    """Reads interrelation.npz."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names, similarity, provenance = file["class_names"], file["similarity"], file["provenance"]
            measured = file.get("structure", "{}")
        names = [str(name) for name in names.tolist()]
        origin, structure = json.loads(str(provenance)), json.loads(str(measured))
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}") from error
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as an interrelation file ({error})") from error
    for key, value in (("provenance", origin), ("structure", structure)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key!r} must be a JSON object, found {type(value).__name__}")
    if not names:
        raise ValueError(f"{path}: 'class_names' is empty")
    matrix = _array(path, "similarity", similarity, (len(names), len(names)))
    return Interrelation(names, matrix, origin, structure)
