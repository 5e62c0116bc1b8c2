"""Detection data sets in COCO's form: a folder of images and a JSON file of instances for each split."""

from __future__ import annotations

import pathlib

import numpy as np

from wkd_jax.data import coco_json, detection_split
from wkd_jax.data.batches import IMAGENET_MEAN, IMAGENET_STD
from wkd_jax.data.coco_json import Instances
from wkd_jax.data.detection import DetectionDataSet
from wkd_jax.data.detection_split import Options
from wkd_jax.data.image_folder import Files


def coco(
    *,
    data_dir: str,
    train_folder: str = "train2017",
    test_folder: str = "val2017",
    train_json: str = "annotations/instances_train2017.json",
    test_json: str = "annotations/instances_val2017.json",
    canvases: tuple[tuple[int, int], ...] = detection_split.CANVASES,
    train_short: tuple[int, ...] = detection_split.TRAIN_SHORT,
    test_short: int = 800,
    max_side: int = 1333,
    flip: bool = True,
    max_boxes: int = 100,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    workers: int = -1,
    max_bad_images: int = 0,
) -> DetectionDataSet:
    """COCO, or any set in its form, with any number of classes, streamed. The defaults are COCO 2017's names.

    Args:
      data_dir: Holds all that follows.
      train_folder: Folder of the training images.
      test_folder: Folder of the images that are evaluated.
      train_json: Annotations of the training images.
      test_json: Annotations of those that are evaluated: the ground truth.
      canvases: See `wkd_jax.data.detection_split.Options`, as for all that follow.
      train_short: Likewise.
      test_short: Likewise.
      max_side: Likewise.
      flip: Likewise.
      max_boxes: Likewise.
      mean: Likewise.
      std: Likewise.
      workers: Likewise.
      max_bad_images: Likewise.

    Raises:
      ValueError: If an annotation file is missing or wrong (`coco_json.read`), if more images are missing than
        `max_bad_images` allows, or any to evaluate, if an image has too many objects or fits in no canvas, or if an
        argument is out of range.
    """
    options = Options(
        canvases=canvases,
        train_short=train_short,
        test_short=test_short,
        max_side=max_side,
        flip=flip,
        max_boxes=max_boxes,
        mean=mean,
        std=std,
        workers=workers,
        max_bad_images=max_bad_images,
    )
    root = pathlib.Path(data_dir).expanduser()
    train, test = (
        coco_json.read(root / path, f"data.{argument}={path!r}")
        for argument, path in (("train_json", train_json), ("test_json", test_json))
    )
    train_split = detection_split.training_split(_Images(root / train_folder, train), train, options)
    test_split = detection_split.evaluation_split(_Images(root / test_folder, test), test, options)
    _check_files(f"data.train_folder={train_folder!r}", root / train_folder, train, train_split.kept, max_bad_images)
    _check_files(f"data.test_folder={test_folder!r}", root / test_folder, test, test_split.kept, 0)
    names = tuple(name for _, name in train.categories)
    return DetectionDataSet(root.name, names, train_split, test_split, options)


class _Images(Files):
    """The images of one split, in the order of its annotations; their ids are the labels."""

    def __init__(self, folder: pathlib.Path, instances: Instances) -> None:
        super().__init__(folder, (), instances.file_names, instances.image_ids)

    def name(self, row: int) -> str:
        """The file's path."""
        return str(self.folder / self.names[row].decode())


def _check_files(argument: str, folder: pathlib.Path, instances: Instances, kept: np.ndarray, allowed: int) -> None:
    """Raises if more than the allowed number of images are not there. Each folder is listed once."""
    if not folder.is_dir():
        raise ValueError(f"{argument}: there is no folder {folder}; correct it, or data.data_dir")
    wanted = [folder / name.decode() for name in instances.file_names[kept].tolist()]
    there = {path for parent in {path.parent for path in wanted} if parent.is_dir() for path in parent.iterdir()}
    absent = [path for path in wanted if path not in there]
    if len(absent) > allowed:
        raise ValueError(
            f"{argument}: {len(absent)} of {len(wanted)} images that {instances.source} names are missing, the first "
            f"{absent[0]}: complete the copy, or correct the folder"
        )


REGISTER = {"coco": coco}
