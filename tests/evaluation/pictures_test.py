"""The images that a report draws: which, and with what boxes."""

import base64
import io
import json

import drawn_coco
import numpy as np
import pytest
from PIL import Image

from wkd_jax.data.coco import coco
from wkd_jax.evaluation import pictures
from wkd_jax.tasks.detection import Detection


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory):
    root = drawn_coco.write_set(tmp_path_factory.mktemp("drawn"), train=4, test=12, empty=2, crowd=1)
    return coco(data_dir=str(root), workers=0, **drawn_coco.SMALL)


def annotations(data):
    return json.loads(open(data.ground_truth.source).read())


def decoded(image):
    file = base64.b64decode(image["jpeg"])
    return np.asarray(Image.open(io.BytesIO(file), formats=["JPEG"]))


def detections(data, seed=0):
    """Two an image, of scores 0.25 to 1."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image_id": image_id,
            "category_id": int(rng.choice([1, 13, 90])),
            "bbox": rng.uniform(1, 30, 4).tolist(),
            "score": float(score),
        }
        for image_id in data.ground_truth.image_ids.tolist()
        for score in rng.uniform(0.25, 1, 2)
    ]


def test_images_are_spread_over_those_with_objects(data):
    truth = data.ground_truth
    with_objects = sorted({entry["image_id"] for entry in annotations(data)["annotations"] if not entry["iscrowd"]})
    assert len(with_objects) == 10
    rows = pictures.spread(truth)
    chosen = truth.image_ids[rows].tolist()
    assert len(set(chosen)) == pictures.COUNT and set(chosen) < set(with_objects)
    assert (chosen[0], chosen[-1]) == (with_objects[0], with_objects[-1])
    assert truth.image_ids[pictures.spread(truth, 50)].tolist() == with_objects
    assert truth.image_ids[pictures.spread(truth, 1)].tolist() == with_objects[:1]
    np.testing.assert_array_equal(rows, pictures.spread(truth))


def test_what_a_run_keeps(data):
    """Boxes as in the annotations' file and in the results, pixels as in the images' files."""
    found = {side: detections(data, seed) for seed, side in enumerate(("student", "teacher"))}
    task = Detection(Detection.DEFAULTS, data)
    evaluation = {f"{side}_detections": results for side, results in found.items()}
    evaluation |= {f"{side}_AP_by_class": np.zeros(3) for side in found}
    written = task.files(evaluation)
    content = json.loads(json.dumps(written["pictures.json"]))
    assert written["student_detections.json"] == found["student"]
    assert content["score"] == pictures.SCORE and len(content["images"]) == pictures.COUNT
    raw = annotations(data)
    names, infos = ({entry["id"]: entry for entry in raw[key]} for key in ("categories", "images"))
    files = {key: np.asarray(Image.open(data.test.records.folder / info["file_name"])) for key, info in infos.items()}
    for image in content["images"]:
        info = infos[image["image_id"]]
        assert (image["height"], image["width"]) == (info["height"], info["width"])
        assert image["truth"] == [
            {"class": names[entry["category_id"]]["name"], "box": entry["bbox"], "crowd": bool(entry["iscrowd"])}
            for entry in raw["annotations"]
            if entry["image_id"] == image["image_id"]
        ]
        for side, results in found.items():
            likely = [each for each in results if each["image_id"] == image["image_id"] and each["score"] >= 0.5]
            assert image[side] == [
                {"class": names[each["category_id"]]["name"], "box": each["bbox"], "score": each["score"]}
                for each in sorted(likely, key=lambda each: -each["score"])
            ]
        shown = decoded(image)
        assert shown.shape == (info["height"], info["width"], 3)  # small enough as it is
        apart = {key: np.abs(shown - files[key].astype(int)).mean() for key in files if files[key].shape == shown.shape}
        own = apart.pop(image["image_id"])
        assert len(apart) > 1 and own < 0.5 * min(apart.values())  # noise loses much when it is compressed
    assert any(box["crowd"] for box in content["images"][0]["truth"])


def test_without_a_teacher_there_is_none(data):
    found = {"student_detections": detections(data), "student_AP_by_class": np.zeros(3)}
    content = Detection(Detection.DEFAULTS, data).files(found)["pictures.json"]
    assert {"teacher", "student"} & {key for image in content["images"] for key in image} == {"student"}


def test_large_images_are_reduced_in_proportion(data):
    truth = data.ground_truth
    image = np.random.default_rng(0).integers(0, 256, (300, 1000, 3)).astype(np.uint8)
    (found,) = pictures.content(truth, np.array([3]), [image], {"student": []})["images"]
    assert decoded(found).shape == (144, 480, 3)
    (found,) = pictures.content(truth, np.array([3]), [image], {"student": []}, long_side=100)["images"]
    assert decoded(found).shape == (30, 100, 3)


def test_an_image_that_cannot_be_read_is_named(data, tmp_path):
    root = drawn_coco.write_set(tmp_path, train=1, test=3, empty=0)
    broken = coco(data_dir=str(root), workers=0, **drawn_coco.SMALL)
    name = broken.test.records.name(1)
    with open(name, "wb") as file:
        file.write(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"00008\.png cannot be read \(truncated.*restore the file"):
        broken.test.pixels(np.array([0, 1]))
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(name)
    with pytest.raises(ValueError, match=r"00008\.png cannot be read \(\(height, width\) is \[5, 5\] pixels"):
        broken.test.pixels(np.array([1]))
