"""COCO as TFDS prepares it, written by the tests: the same batches as from folders, its index, its faults."""

import copy
import json
import os
import shutil
import subprocess
import sys

import drawn_coco
import numpy as np
import pytest
import tfds_writer
from tensorflow_datasets import features

from wkd_jax.data import coco_tfds as module
from wkd_jax.data.coco import coco
from wkd_jax.data.coco_tfds import coco_tfds

SPLITS = {"train": "train2017", "validation": "val2017"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))


def examples(root, split, *, reverse=False):
    """TFDS's form of a split, in reverse order where wanted, as TFDS shuffles what it writes."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    categories = dict(drawn_coco.CATEGORIES)
    made = []
    for info in content["images"]:
        own = [each for each in content["annotations"] if each["image_id"] == info["id"]]

        def box(bbox, height=info["height"], width=info["width"]):
            x, y, w, h = bbox
            return features.BBox(ymin=y / height, xmin=x / width, ymax=(y + h) / height, xmax=(x + w) / width)

        made.append(
            {
                "image": (root / split / info["file_name"]).read_bytes(),
                "image/filename": info["file_name"],
                "image/id": info["id"],
                "objects": [
                    {
                        "id": each["id"],
                        "area": int(each["area"]),
                        "bbox": box(each["bbox"]),
                        "label": categories[each["category_id"]],
                        "is_crowd": bool(each["iscrowd"]),
                    }
                    for each in own
                ],
            }
        )
    return made[::-1] if reverse else made


def prepare(data_dir, splits, names=tuple(name for _, name in drawn_coco.CATEGORIES)):
    declared = {
        "image": features.Image(encoding_format="png"),
        "image/filename": features.Text(),
        "image/id": np.int64,
        "objects": features.Sequence(
            {
                "id": np.int64,
                "area": np.int64,
                "bbox": features.BBoxFeature(),
                "label": features.ClassLabel(names=list(names)),
                "is_crowd": np.bool_,
            }
        ),
    }
    return tfds_writer.prepare(data_dir, "drawn_coco", splits, declared)


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory):
    """Both forms: the folders, and a TFDS set whose validation split is in another order."""
    root = drawn_coco.write_set(tmp_path_factory.mktemp("drawn"), train=16, test=8)
    splits = {split: examples(root, folder, reverse=split == "validation") for split, folder in SPLITS.items()}
    prepare(root, splits)
    return root


def data_set(root, **options):
    defaults = {"data_dir": str(root), "dataset": "drawn_coco", "test_json": "annotations/instances_val2017.json"}
    return coco_tfds(**{**defaults, "workers": 0, **drawn_coco.SMALL, **options})


def test_batches_are_those_of_the_folders(root):
    data, folders = data_set(root), coco(data_dir=str(root), workers=0, **drawn_coco.SMALL)
    assert data.class_names == folders.class_names and data.num_examples == folders.num_examples == 16
    inputs, expected = (each.training(global_batch_size=4, seed=5) for each in (data, folders))
    for _ in range(6):
        got, wanted = next(inputs), next(expected)
        for name in ("image", "label", "index", "valid"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
        for name in ("box_valid", "size", "original_size", "image_id"):
            np.testing.assert_array_equal(got.extra[name], wanted.extra[name])
        # Normalised to float32 and back: a few units in the last place of 1, times 100 pixels.
        np.testing.assert_allclose(got.extra["boxes"], wanted.extra["boxes"], atol=1e-4)
    inputs.close(), expected.close()


def test_evaluation_is_against_the_json(root):
    data, folders = data_set(root), coco(data_dir=str(root), workers=0, **drawn_coco.SMALL)
    truth = data.ground_truth
    assert truth.fingerprint == folders.ground_truth.reordered(np.arange(8)[::-1]).fingerprint
    images = {}
    for batch in folders.evaluation("test", global_batch_size=4):
        for row in np.flatnonzero(batch.valid):
            images[int(batch.extra["image_id"][row])] = batch.image[row], batch.extra["boxes"][row]
    seen = []
    for batch in data.evaluation("test", global_batch_size=4):
        for row in np.flatnonzero(batch.valid):
            image_id = int(batch.extra["image_id"][row])
            np.testing.assert_array_equal(batch.image[row], images[image_id][0])
            np.testing.assert_array_equal(batch.extra["boxes"][row], images[image_id][1])
            assert truth.image_ids[batch.index[row]] == image_id
            seen.append(image_id)
    assert sorted(seen) == sorted(images)


def test_records_are_read_once_for_the_index(root, monkeypatch, capfd):
    first = data_set(root)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read_all", None)
        assert data_set(root).fingerprint == first.fingerprint
        with pytest.raises(TypeError):  # another part of the set has an index of its own
            data_set(root, train_split="train[:10]")
    assert data_set(root, train_split="train[:10]").num_examples == 10
    for path in (module.cache.folder() / "coco").iterdir():
        path.write_bytes(b"spoiled")
    assert data_set(root).fingerprint == first.fingerprint
    assert "cannot be read and is made again" in capfd.readouterr().err
    monkeypatch.setenv("WKD_JAX_CACHE", "/proc/nowhere")
    assert data_set(root).fingerprint == first.fingerprint
    assert "cannot be written" in capfd.readouterr().err


def test_other_images_or_classes_than_the_json_has_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"different images: 4 ids .*, such as \d+: set data.test_split"):
        data_set(root, test_split="validation[:4]")
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())

    def refused(changed, message):
        path = tmp_path / "other.json"
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            data_set(root, test_json=str(path))

    other = copy.deepcopy(content)
    other["categories"][0]["name"] = "star"
    refused(other, "class 2 of drawn_coco/1.0.0 is 'triangle', of .*other.json 'star'")
    other = copy.deepcopy(content)
    other["categories"].append({"id": 91, "name": "star"})
    refused(other, "has 3 classes, .*other.json has 4")


def test_sets_without_boxes_and_wrong_options_are_refused(root, tmp_path):
    declared = {"image": features.Image(), "label": features.ClassLabel(names=["a"])}
    encoded = examples(root, "val2017")[0]["image"]
    tfds_writer.prepare(root, "plain", {"train": [{"image": encoded, "label": 0}] * 2}, declared)
    with pytest.raises(ValueError, match="plain/1.0.0 has not the features image, image/id and objects"):
        data_set(root, dataset="plain")
    with pytest.raises(ValueError, match="test_split='test'"):
        data_set(root, test_split="test")
    with pytest.raises(ValueError, match="data.test_json='annotations/x.json': .*cannot be read"):
        data_set(root, test_json="annotations/x.json")
    with pytest.raises(ValueError, match="data.max_boxes=0"):
        data_set(root, max_boxes=0)


def test_damaged_records_are_named(root, tmp_path):
    train = examples(root, "train2017")
    train[5]["image"] = train[5]["image"][:-200]  # the header is whole: noticed when it is shown
    prepare(tmp_path, {"train": train, "validation": examples(root, "val2017")})
    options = {"data_dir": str(tmp_path), "test_json": str(root / "annotations" / "instances_val2017.json")}
    inputs = data_set(root, **options).training(global_batch_size=4, seed=0)
    with pytest.raises(ValueError, match="drawn_coco/1.0.0 train record 5: truncated"):
        for _ in range(6):
            next(inputs)
    train[5]["image"] = b"nothing"
    prepare(tmp_path / "again", {"train": train, "validation": examples(root, "val2017")})
    with pytest.raises(ValueError, match="drawn_coco/1.0.0 train record 5 cannot be read .*prepare the set again"):
        data_set(root, **options | {"data_dir": str(tmp_path / "again")})


def test_an_index_of_other_records_is_noticed(root, tmp_path):
    """The set was prepared again, in another order, and its files have the same names and (padded) sizes.

    Files of another time are indexed anew. Were the time the same too, records would not fit their annotations.
    """
    test_json = str(root / "annotations" / "instances_val2017.json")
    train, test = examples(root, "train2017"), examples(root, "val2017")
    prepare(tmp_path, {"train": train, "validation": test})
    data_set(root, data_dir=str(tmp_path), test_json=test_json)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*array_record*")}
    assert times
    shutil.rmtree(tmp_path / "drawn_coco")
    prepare(tmp_path, {"train": train[::-1], "validation": test})
    next(data_set(root, data_dir=str(tmp_path), test_json=test_json).training(global_batch_size=4, seed=0))
    for path in tmp_path.rglob("*array_record*"):
        os.utime(path, ns=(times[path.name], times[path.name]))
    data = data_set(root, data_dir=str(tmp_path), test_json=test_json)
    with pytest.raises(ValueError, match=r"train record \d+: it is image \d+, its annotations are of image \d+"):
        next(data.training(global_batch_size=4, seed=0))


def test_tensorflow_is_not_imported(root, tmp_path):
    """In a fresh interpreter where importing TensorFlow raises."""
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys; from wkd_jax.data.coco_tfds import coco_tfds;"
        f"data = coco_tfds(data_dir={str(root)!r}, dataset='drawn_coco', workers=0,"
        f" test_json='annotations/instances_val2017.json', **{drawn_coco.SMALL!r});"
        "next(data.training(global_batch_size=4, seed=0)); print(data.fingerprint)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == data_set(root).fingerprint
