"""A small ImageNet: JPEGs of several sizes whose classes can be told apart, as a folder tree and as a TFDS set."""

import io
import pathlib

import numpy as np
import tfds_writer
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361")
TRAIN, VALIDATION = 48, 20


def examples(split):
    """(JPEG bytes, label) of a split, ordered by class, as a folder lists them."""
    count = {"train": TRAIN, "validation": VALIDATION}[split]
    rng = np.random.default_rng(len(split))
    made = []
    for i in range(count):
        label = i * len(CLASSES) // count
        height, width = rng.integers(60, 130, 2)
        y, x = np.mgrid[:height, :width] / 20
        wave = np.sin((label + 1) * (y if label % 2 else x) + rng.uniform(0, 6))
        colour = np.roll([1.0, 0.5, 0.2], label)
        noise = rng.normal(0, 12, (height, width, 3))
        pixels = np.clip(128 + 90 * wave[..., None] * colour + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=90)
        made.append((file.getvalue(), label))
    return made


def write_folder(root):
    """train/<class>/<class>_<number>.JPEG and val/..."""
    for split, folder in (("train", "train"), ("validation", "val")):
        for number, (content, label) in enumerate(examples(split)):
            path = pathlib.Path(root) / folder / CLASSES[label] / f"{CLASSES[label]}_{number:05}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return pathlib.Path(root)


def write_tfds(data_dir, name="mini_imagenet"):
    """The same examples in the same order as ArrayRecord files."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=list(CLASSES)),
        "file_name": tfds.features.Text(),
    }
    splits = {
        split: [
            {"image": content, "label": label, "file_name": f"{CLASSES[label]}_{number}.JPEG"}
            for number, (content, label) in enumerate(examples(split))
        ]
        for split in ("train", "validation")
    }
    return tfds_writer.prepare(data_dir, name, splits, features, num_shards=3)
