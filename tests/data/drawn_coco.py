"""Draws detection sets in COCO's form: rectangles, ellipses and triangles on dark noise, one category each."""

import json
import pathlib

import numpy as np
from PIL import Image

CATEGORIES = ((1, "rectangle"), (13, "ellipse"), (90, "triangle"))  # ids with gaps, as COCO's
SIZES = ((72, 96), (96, 72), (96, 96), (64, 96))  # (height, width)


def shape(category, height, width):
    """[height, width] bool, the pixels of a shape that fills its box."""
    y, x = np.mgrid[:height, :width]
    y, x = (y + 0.5) / height, (x + 0.5) / width
    return {
        "rectangle": np.ones((height, width), bool),
        "ellipse": (2 * y - 1) ** 2 + (2 * x - 1) ** 2 <= 1,
        "triangle": np.abs(2 * x - 1) <= y + 0.5 / height,
    }[category]


def draw(count, *, seed=0, sizes=SIZES, sides=(20, 48), objects=(1, 3), empty=0, crowd=0, first_id=1):
    """Images and their annotations. The same arguments give the same.

    Args:
      count: Number of images.
      seed: Of everything that is random.
      sizes: (height, width) of images, taken in turn.
      sides: Least side of a shape, and one more than the largest, pixels.
      objects: Least and largest number of shapes an image, as far as they fit without touching.
      empty: The last so many images have no object.
      crowd: The first so many images have one region, of their whole right half, that is a crowd of rectangles.
      first_id: Image ids go up from here in steps of 7.

    Returns:
      (images, each [H, W, 3] uint8; the content of the JSON file).
    """
    rng = np.random.default_rng(seed)
    images, infos, annotations = [], [], []

    def annotate(info, category_id, box, area, iscrowd=0):
        number = len(annotations) + 1
        annotations.append(
            {
                "id": number,
                "image_id": info["id"],
                "category_id": category_id,
                "bbox": [float(x) for x in box],
                "area": float(area),
                "iscrowd": iscrowd,
            }
        )

    for i in range(count):
        height, width = sizes[i % len(sizes)]
        image = rng.integers(0, 64, (height, width, 3)).astype(np.uint8)
        info = {"id": first_id + 7 * i, "file_name": f"{first_id + 7 * i:012}.png", "height": height, "width": width}
        taken = np.zeros((height, width), bool)
        wanted = 0 if i >= count - empty else rng.integers(objects[0], objects[1] + 1)
        for _ in range(20 * wanted):
            if wanted == 0:
                break
            category_id, category = CATEGORIES[rng.integers(len(CATEGORIES))]
            h, w = np.minimum(rng.integers(*sides, 2), (height, width))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            place = slice(top, top + h), slice(left, left + w)
            if taken[place].any():
                continue
            taken[place] = True
            mask = shape(category, h, w)
            image[place][mask] = rng.integers(128, 256, 3)
            (x, *_, right), (y, *_, bottom) = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
            annotate(info, category_id, (left + x, top + y, right - x + 1, bottom - y + 1), mask.sum())
            wanted -= 1
        if i < crowd:
            annotate(info, 1, (width // 2, 0, width - width // 2, height), height * width / 3, iscrowd=1)
        images.append(image)
        infos.append(info)
    categories = [{"id": key, "name": name} for key, name in reversed(CATEGORIES)]
    return images, {"images": infos, "annotations": annotations, "categories": categories}


def write(root, split, images, content):
    """`root/<split>/*.png` and `root/annotations/instances_<split>.json`."""
    folder, annotations = pathlib.Path(root) / split, pathlib.Path(root) / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    for info, image in zip(content["images"], images, strict=True):
        Image.fromarray(image).save(folder / info["file_name"])
    (annotations / f"instances_{split}.json").write_text(json.dumps(content))


def write_set(root, *, train=24, test=10, seed=0, **options):
    """Both splits, under COCO 2017's names; the test split also has a crowd and an image without objects."""
    write(root, "train2017", *draw(train, seed=seed, **options))
    write(root, "val2017", *draw(test, seed=seed + 1, **{"empty": 1, "crowd": 1, **options}))
    return pathlib.Path(root)


SMALL = {"canvases": ((96, 96), (96, 128), (128, 96)), "train_short": (64, 80), "test_short": 72, "max_side": 108}
"""Arguments of the `coco` data set that fit the sizes drawn here."""
