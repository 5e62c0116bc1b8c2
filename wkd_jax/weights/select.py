"""What may stand behind # in the name of a file of weights: which of the things in it are meant.

Words, with & between them: `teacher`, the teacher's part of a file that holds two networks; `coco80`, of torchvision's
detectors the 80 classes that COCO has; `style=NAME`, whose keys it has, where two code bases have the same.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re

import numpy as np

from wkd_jax import registry
from wkd_jax.weights.errors import WeightsError
from wkd_jax.weights.state import State

COCO_ROWS = 91
"""Classes of torchvision's detectors, the background at 0 included. The others are COCO's category ids, with gaps."""
_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_STYLE = "style="
# A bundle of ReviewKD or DKD: beside the student, which has no prefix, its teacher and the transform of its features.
_BESIDE = re.compile(r"^((?:module|_orig_mod|model)\.)*(teacher|kd_trans)\.")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The words behind #.

    Attributes:
      teacher: Whether the teacher's part is meant.
      coco80: Whether 80 of torchvision's 91 classes are.
      style: Whose keys; "" if that is to be found out.
    """

    teacher: bool = False
    coco80: bool = False
    style: str = ""

    def apply(self, found: State, source: str) -> State:
        """What is meant of what a file holds.

        Args:
          found: All of it.
          source: Of the file, for messages.

        Raises:
          WeightsError: If it does not hold that.
        """
        found = _part(found, source, teacher=self.teacher)
        return _coco80(found, source) if self.coco80 else found


def split(source: str) -> tuple[str, Selection]:
    """The address in a source, and the words behind its #. `sha256=` of a URL stays with it.

    Raises:
      ValueError: For a word that says nothing here.

    Example:
      >>> split("r18-r101.pth#teacher&style=detectron2")
      ('r18-r101.pth', Selection(teacher=True, coco80=False, style='detectron2'))
    """
    address, _, fragment = source.partition("#")
    if not fragment or pathlib.Path(source).expanduser().exists():
        return source, Selection()
    words = fragment.split("&")
    of_url = [word for word in words if "://" in address and word.lower().startswith("sha256=")]
    style = [word.removeprefix(_STYLE) for word in words if word.startswith(_STYLE)]
    unknown = [word for word in words if word not in (*of_url, "teacher", "coco80") and not word.startswith(_STYLE)]
    if unknown or len(style) > 1 or style == [""]:
        valid = ["teacher", "coco80", f"{_STYLE}NAME", *(["sha256=DIGITS"] if "://" in address else [])]
        raise ValueError(f"{source}: {registry.unknown('word after #', (unknown or [_STYLE])[0], valid)}")
    return "#".join([address, *of_url]), Selection("teacher" in words, "coco80" in words, *style)


def _part(found: State, source: str, *, teacher: bool) -> State:
    """The teacher's arrays without their prefix, or the student's; a note says what was left out."""
    wanted = "teacher" if teacher else "student"
    parts = {key: match[2] if (match := _BESIDE.match(key)) else "student" for key in found.arrays}
    kept = {key: value for key, value in found.arrays.items() if parts[key] == wanted}
    if not kept and teacher:
        raise WeightsError(f"{source}: holds no teacher: no key in it begins with teacher.")
    others = collections.Counter(part for part in parts.values() if part != wanted)
    if not kept or not (others or teacher):
        return found
    left = ", ".join(f"{part} ({count})" for part, count in others.items()) or "nothing"
    note = f"read the arrays of the {wanted} and left out: {left}"
    kept = {_BESIDE.sub("", key): value for key, value in kept.items()}
    return dataclasses.replace(found, arrays=kept, notes=(*found.notes, note))


def _coco80(found: State, source: str) -> State:
    """Of a torchvision detector's 91 classes COCO's 80 and the background, which stays the first."""
    rows = np.array([row for row in range(COCO_ROWS) if row not in _GAPS])
    changed = {}
    for key, array in found.arrays.items():
        layer = re.search(r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.", key)
        each = {"cls_score": 1, "bbox_pred": 4}[layer[1]] if layer else 0
        if layer and array.shape[:1] == (each * COCO_ROWS,):
            by_class = array.reshape(COCO_ROWS, each, *array.shape[1:])
            changed[key] = by_class[rows].reshape(-1, *array.shape[1:])
    if len(changed) != 4 or not any("backbone.body." in key for key in found.arrays):
        raise WeightsError(f"{source}: has no classifier of torchvision's {COCO_ROWS} classes to take COCO's 80 from")
    note = (
        f"kept COCO's 80 classes and the background of {COCO_ROWS}: probabilities are shares among these, and not "
        "among the ten ids without a class too"
    )
    return dataclasses.replace(found, arrays={**found.arrays, **changed}, notes=(*found.notes, note))
