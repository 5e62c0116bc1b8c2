"""COCO's JSON: what is read, in which order, and every fault that is refused."""

import copy
import json

import numpy as np
import pytest

from wkd_jax.data import coco_json

CONTENT = {
    "images": [
        {"id": 9, "file_name": "b.png", "height": 40, "width": 50},
        {"id": 4, "file_name": "a.png", "height": 60, "width": 30},
        {"id": 5, "file_name": "c.png", "height": 10, "width": 10},
    ],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 11.5, "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [5.25, 6, 7, 8], "area": 50, "iscrowd": 1},
        {"id": 3, "image_id": 4, "category_id": 3, "bbox": [0, 0, 0, 9], "area": 0, "iscrowd": 0},
    ],
    "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}],
}


def read(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return coco_json.read(path, "data.train_json='instances.json'")


def changed(section, place, **values):
    content = copy.deepcopy(CONTENT)
    content[section][place] |= values
    return content


def without(section, place, key):
    content = copy.deepcopy(CONTENT)
    del content[section][place][key]
    return content


def test_arrays(tmp_path):
    got = read(tmp_path, CONTENT)
    assert got.categories == ((3, "dog"), (90, "cat"))
    np.testing.assert_array_equal(got.image_ids, [9, 4, 5])
    assert got.file_names.tolist() == [b"b.png", b"a.png", b"c.png"]
    np.testing.assert_array_equal(got.sizes, [[40, 50], [60, 30], [10, 10]])
    np.testing.assert_array_equal(got.images, [0, 1, 1])
    np.testing.assert_array_equal(got.labels, [0, 1, 0])
    np.testing.assert_array_equal(got.boxes, [[5.25, 6, 7, 8], [1, 2, 3, 4], [0, 0, 0, 9]])
    np.testing.assert_array_equal(got.areas, [50, 11.5, 0])
    np.testing.assert_array_equal(got.crowd, [True, False, False])
    assert got.notes == () and len(got) == 3


def test_another_order_of_images(tmp_path):
    first = read(tmp_path, CONTENT)
    content = copy.deepcopy(CONTENT)
    content["images"] = [content["images"][i] for i in (2, 0, 1)]
    wanted, got = read(tmp_path, content), first.reordered(np.array([2, 0, 1]))
    assert got.fingerprint == wanted.fingerprint != first.fingerprint
    np.testing.assert_array_equal(got.images, [1, 2, 2])


def test_missing_areas_and_crowd_flags_are_filled_in_and_noted(tmp_path):
    content = copy.deepcopy(CONTENT)
    for annotation in content["annotations"][:2]:
        del annotation["area"], annotation["iscrowd"]
    got = read(tmp_path, content)
    np.testing.assert_array_equal(got.areas, [56, 12, 0])
    assert not got.crowd.any()
    assert got.notes == ("instances.json: 2 objects have no area; width times height is taken",)


def test_fingerprint_is_of_everything(tmp_path):
    whole = read(tmp_path, CONTENT).fingerprint
    for change in (
        changed("images", 0, file_name="d.png"),
        changed("images", 0, height=41),
        changed("annotations", 0, bbox=[1, 2, 3, 4.5]),
        changed("annotations", 0, category_id=3),
        changed("annotations", 0, area=12),
        changed("annotations", 1, iscrowd=0),
        changed("categories", 0, name="cow"),
        changed("categories", 0, id=91) | {"annotations": CONTENT["annotations"][1:]},
    ):
        assert read(tmp_path, change).fingerprint != whole
    assert read(tmp_path, changed("annotations", 0, id=77)).fingerprint == whole  # a name, and no content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "data.train_json='instances.json': .*instances.json is no JSON"),
        ("[]", "has not the three lists images, annotations, categories"),
        ({"images": [], "annotations": []}, "has not the three lists"),
        (CONTENT | {"images": [], "annotations": []}, "has 0 images and 2 categories"),
        (CONTENT | {"categories": []}, "3 images and 0 categories"),
        (CONTENT | {"annotations": [7]}, r"annotations\[0\]: it must be an object.*: 7"),
        (without("annotations", 1, "bbox"), r"instances.json: annotations\[1\]: 'bbox' must be a list of 4 numbers"),
        (without("images", 2, "width"), r"images\[2\]: 'width' must be an integer"),
        (without("annotations", 0, "id"), r"annotations\[0\]: 'id' must be an integer"),
        (changed("images", 1, id="4"), r"images\[1\]: 'id' must be an integer"),
        (changed("images", 1, id=True), r"images\[1\]: 'id' must be an integer"),
        (changed("annotations", 0, id=2**64), r"annotations\[0\]: 'id' must have at most 63 bits"),
        (changed("annotations", 0, id=1.0), r"annotations\[0\]: 'id' must be an integer"),
        (changed("annotations", 0, bbox=[0, 0, True, 1]), r"annotations\[0\]: 'bbox' must be a list of 4 numbers"),
        (changed("annotations", 0, bbox=None), r"annotations\[0\]: 'bbox' must be a list of 4 numbers"),
        (changed("images", 1, id=9), r"images\[1\]: an earlier entry has the same id"),
        (changed("images", 1, id=2**31), r"images\[1\]: its id must be from 0 to 2\^31 - 1"),
        (changed("images", 1, id=-4), r"images\[1\]: its id must be from 0"),
        (changed("images", 1, file_name="b.png"), r"images\[1\]: an earlier entry has the same file_name"),
        (changed("images", 1, file_name=""), r"images\[1\]: 'file_name' must be a text"),
        (changed("images", 1, height=0), r"images\[1\]: height and width must be positive"),
        (changed("images", 1, height=60.0), r"images\[1\]: 'height' must be an integer"),
        (changed("annotations", 2, id=1), r"annotations\[2\]: an earlier entry has the same id"),
        (
            changed("annotations", 2, image_id=6),
            r"annotations\[2\]: no image .* has this image_id.*: .*\"image_id\": 6",
        ),
        (changed("annotations", 2, category_id=4), r"annotations\[2\]: no category has this category_id"),
        (changed("annotations", 2, category_id=2000), r"annotations\[2\]: no category has this category_id"),
        (
            changed("annotations", 2, bbox=[0, 0, float("nan"), 1]),
            r"annotations\[2\]: bbox must be four finite numbers",
        ),
        (
            changed("annotations", 2, bbox=[0, float("inf"), 1, 1]),
            r"annotations\[2\]: bbox must be four finite numbers",
        ),
        (changed("annotations", 2, bbox=[0, 0, -1, 1]), r"annotations\[2\]: width and height of bbox must not be neg"),
        (changed("annotations", 2, bbox=[0, 0, 1]), r"annotations\[2\]: 'bbox' must be a list of 4 numbers"),
        (changed("annotations", 2, bbox=[0, 0, 1, "1"]), r"annotations\[2\]: 'bbox' must be a list of 4 numbers"),
        (changed("annotations", 2, area=-1), r"annotations\[2\]: area must be a finite number of 0 or more"),
        (changed("annotations", 2, area=None), r"annotations\[2\]: 'area' must be a number"),
        (changed("annotations", 2, iscrowd=2), r"annotations\[2\]: iscrowd must be 0 or 1"),
        (changed("categories", 1, id=90), r"categories\[1\]: an earlier entry has the same id"),
        (changed("categories", 1, name="cat"), r"categories\[1\]: an earlier entry has the same name"),
    ],
)
def test_refusals(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_a_missing_file_and_the_number_of_faults(tmp_path):
    with pytest.raises(ValueError, match=r"data.test_json='x': .*nowhere.json cannot be read \(No such file"):
        coco_json.read(tmp_path / "nowhere.json", "data.test_json='x'")
    content = copy.deepcopy(CONTENT)
    for annotation in content["annotations"]:
        annotation["bbox"][2] = -1
    with pytest.raises(ValueError, match=r"annotations\[0\]: .* \(3 entries are so\); correct the file"):
        read(tmp_path, content)
