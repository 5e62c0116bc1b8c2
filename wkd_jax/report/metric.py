"""What the networks of a run are measured by, as logs and results tell: top-1, or COCO's average precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Metric:
    """The headline number of a task, in percent.

    Attributes:
      key: What follows `student_` and `teacher_` in logs and results.
      name: As pages and tables call it.
      time: What the last and the best number are of.
      more: Keys of further numbers of the kind -> their names.
      beside: What a comparison shows besides: key of the result -> column.
      explained: A sentence on `beside`.
    """

    key: str
    name: str
    time: str
    more: Mapping[str, str]
    beside: Mapping[str, str]
    explained: str

    @property
    def student(self) -> str:
        """Its key of the student."""
        return f"student_{self.key}"

    @property
    def teacher(self) -> str:
        """Its key of the teacher."""
        return f"teacher_{self.key}"


TOP1 = Metric(
    key="top1",
    name="top-1",
    time="epoch",
    more={"top5": "top-5"},
    beside={"agreement": "agreement, %"},
    explained="Agreement: images on which student and teacher predict the same class.",
)
AP = Metric(
    key="AP",
    name="AP",
    time="evaluation",
    more={"AP50": "AP50", "AP75": "AP75"},
    beside={"student_AP50": "AP50, %", "student_AP75": "AP75, %"},
    explained="AP: COCO's average precision of boxes over the IoU thresholds 0.50 to 0.95; AP50, AP75: at one of them.",
)

# COCO's twelve numbers, in their usual order, and what they are of.
COCO = {
    "AP": "average precision, IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "of small objects, below 32² pixels",
    "APm": "of medium objects",
    "APl": "of large objects, above 96² pixels",
    "AR1": "average recall, 1 detection an image and class",
    "AR10": "10 detections",
    "AR100": "100 detections",
    "ARs": "of small objects",
    "ARm": "of medium objects",
    "ARl": "of large objects",
}


def of(names: Iterable[str]) -> Metric:
    """The metric that a result or a log with these names has; top-1 where it has none.

    Example:
      >>> of({"student_AP": 38.2, "student_AP50": 58.1}).name, of({}).name
      ('AP', 'top-1')
    """
    names = set(names)
    return next((metric for metric in (TOP1, AP) if metric.student in names), TOP1)
