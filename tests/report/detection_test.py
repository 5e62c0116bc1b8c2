"""The report of a detection run: average precision, classes, and the detections that are drawn."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from inert_page import HOSTILE, assert_inert
from PIL import Image

from wkd_jax import report
from wkd_jax.report import classes, pictures
from wkd_jax.report.read import Box, Picture, Precision
from wkd_jax.report.read import read as read_run

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
STUDENT = dict(zip(NUMBERS, (33.26, 53.61, 35.26, -1.0, 36.5, 43.25, 28.0, 45.5, 48.0, -1.0, 52.0, 60.5), strict=True))
TEACHER = dict(zip(NUMBERS, (42.04, 62.48, 45.88, -1.0, 46.0, 54.0, 34.0, 54.0, 57.0, -1.0, 61.0, 70.0), strict=True))
LOSSES = ("rpn_objectness", "rpn_box", "roi_class", "roi_box")
NAMES = ("zebra", "yak", "xerus", "wolf")


def jpeg(height, width):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def image(names=NAMES, image_id=139, *, teacher=True):
    """A picture of 720 x 540 pixels, kept at a third: drawn at half of the original's size, 360 x 270."""
    boxes = {
        "truth": [
            {"class": names[0], "box": [10.0, 100.0, 200.0, 300.0], "crowd": False},
            {"class": names[1], "box": [0.0, 0.0, 720.0, 540.0], "crowd": True},
        ],
        "student": [{"class": names[0], "box": [20.5, 110.0, 190.0, 280.0], "score": 0.625}],
        "teacher": [
            {"class": names[0], "box": [11.0, 101.0, 200.0, 300.0], "score": 0.96875},
            {"class": names[2], "box": [600.0, 30.0, 110.0, 60.0], "score": 0.5},
        ],
    }
    if not teacher:
        del boxes["teacher"]
    return {"image_id": image_id, "height": 540, "width": 720, "jpeg": jpeg(180, 240), **boxes}


def records():
    """Two logged steps, each evaluated: AP 11.0 and then 33.26."""
    for step, early in ((10, {"student_AP": 11.0, "student_AP50": 22.0}), (20, {})):
        terms = {f"label/{name}": 2.0 / step for name in LOSSES} | {f"label/{name}/weight": 1.0 for name in LOSSES}
        yield {"step": step, "kind": "train", "epoch": 0.5, "total": 8.0 / step, **terms}
        numbers = {f"student_{key}": value for key, value in STUDENT.items()} | early
        numbers |= {f"teacher_{key}": value for key, value in TEACHER.items()}
        yield {"step": step, "kind": "eval", "epoch": 0.5, **numbers}


def fill(directory, names=NAMES, *, finished=True, teacher=True, drawn=True, lines=()):
    """Writes the work directory of a detection run."""
    config = {"name": "drawn", "epochs": 1, "steps": 40, "student": {"name": "faster_rcnn_r18"}, "teacher": None}
    config |= {"methods": {"fitnet": {}}, "task": {"name": "detection"}}
    if teacher:
        config["teacher"] = {"model": "faster_rcnn_r101", "weights": "d2"}
    (directory / "config.json").write_text(json.dumps(config))
    numbers = {f"student_{key}": value for key, value in STUDENT.items()} | {"student_overflows": 2}
    if teacher:
        numbers |= {f"teacher_{key}": value for key, value in TEACHER.items()} | {"teacher_overflows": 0}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return directory
    count = len(names)
    by_class = {"class_names": names, "student_AP_by_class": np.linspace(20, 60, count).tolist()}
    by_class["student_AP_by_class"][-1] = -1.0
    if teacher:
        by_class["teacher_AP_by_class"] = np.linspace(75, 35, count).tolist()
        by_class["teacher_AP_by_class"][-1] = -1.0
    (directory / "evaluation.json").write_text(json.dumps(by_class))
    if drawn:
        content = {"score": 0.5, "images": [image(names, 139, teacher=teacher), image(names, 285, teacher=teacher)]}
        (directory / "pictures.json").write_text(json.dumps(content))
    result = {"name": "drawn", "student": "faster_rcnn_r18", "teacher": "faster_rcnn_r101" if teacher else None}
    result |= {"methods": ["fitnet"], "teacher_AP": None, **numbers, "best": {"student_AP": 34.5, "step": 10}}
    result |= {"steps": 40, "seconds": 60.0, "student_parameters": 28_000_000, "config": config}
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def page(directory):
    source = report.write(directory).read_text(encoding="utf-8")
    return source, assert_inert(source).words


@pytest.fixture(name="finished", scope="module")
def _finished(tmp_path_factory):
    return page(fill(tmp_path_factory.mktemp("finished"), lines=records()))


def drawings(source):
    """What is drawn in the panels, in the order of the page."""
    return [ET.fromstring(text) for text in re.findall(r'<svg class="picture".*?</svg>', source, re.DOTALL)]


def test_headline_numbers_and_curves(finished):
    source, words = finished
    assert "student faster_rcnn_r18 · teacher faster_rcnn_r101 · method fitnet" in words
    assert "Student AP 33.26 % AP50 53.61 % · AP75 35.26 % · best 34.50 % at step 10" in words
    assert "Teacher AP 42.04 % Gap −8.78" in words
    assert "top-1" not in words and "Agreement" not in words
    assert "student overflows" not in words  # it has its place
    assert "detections may be missing: student 2." in words
    for caption in (
        "AP in evaluation, %",
        "AP50 in evaluation, %",
        *(f"label/{name}: weight × term" for name in LOSSES),
    ):
        assert caption in words, caption
    levels = re.findall(r'<svg[^>]*aria-label="Curves over the steps: student".*?</svg>', source, re.DOTALL)
    assert len(levels) == 2 and all(">teacher<" in level for level in levels)


def test_the_twelve_numbers(finished):
    _, words = finished
    assert "AP average precision, IoU 0.50 to 0.95 33.26 42.04 −8.78 AP50 at IoU 0.50 53.61 62.48 −8.87" in words
    assert "APs of small objects, below 32² pixels – – – APm of medium objects 36.50 46.00 −9.50" in words
    assert "ARl of large objects 60.50 70.00 −9.50" in words


def test_classes_are_sorted_and_those_without_objects_named(finished):
    source, words = finished
    assert "left out below: wolf." in words
    table = words[words.index("All 3 classes with objects, best first") :]
    assert "xerus 46.7 48.3 −1.7 yak 33.3 61.7 −28.3 zebra 20.0 75.0 −55.0" in table
    (figure,) = re.findall(r'<svg[^>]*aria-label="AP by class".*?</svg>', source, re.DOTALL)
    texts = [element.text for element in ET.fromstring(figure).iter("text")]
    assert [text for text in texts if text in NAMES] == ["xerus", "yak", "zebra"]


def test_many_classes_are_all_named_and_the_extremes_shown(tmp_path):
    names = [f"class {i}" for i in range(80)]
    source, words = page(fill(tmp_path, names))
    (figure,) = re.findall(r'<svg[^>]*aria-label="AP by class".*?</svg>', source, re.DOTALL)
    assert all(f">{name}<" in figure for name in names[:-1]) and ">class 79<" not in figure
    assert "The student's 10 best classes class student % teacher % gap class 78 59.5" in words
    assert "All 79 classes with objects, best first" in words


def test_no_class_has_objects():
    found = classes.precision(Precision(["a", "b"], np.full(2, np.nan), None))
    assert (found["absent"], found["figure"], found["everything"].rows) == (["a", "b"], None, [])


def test_boxes_are_drawn_in_the_scale_of_the_drawing(finished):
    """Half of the original's size, whatever the size of the copy."""
    source, words = finished
    found = drawings(source)
    assert len(found) == 6
    truth, teacher, student = found[:3]
    assert {each.get("viewBox") for each in found} == {"0 0 360.0 270.0"}

    def boxes(drawing):
        keys = ("x", "y", "width", "height")
        return [
            (group.find("title").text, [float(group.find("rect[@class='edge']").get(key)) for key in keys])
            for group in drawing.findall("g")
        ]

    assert boxes(truth) == [("zebra", [5, 50, 100, 150]), ("yak (crowd)", [0, 0, 360, 270])]
    assert boxes(student) == [("zebra 0.62", [10.2, 55, 95, 140])]  # 10.25, rounded to even
    assert boxes(teacher) == [("xerus 0.50", [300, 15, 55, 30]), ("zebra 0.97", [5.5, 50.5, 100, 150])]  # likely on top
    dashed = [rect.get("stroke-dasharray") is not None for rect in truth.iter("rect")]
    assert dashed == [False, False, True, True]
    assert truth.get("aria-label") == "Ground truth of image 139: 1 zebra, 1 yak"
    assert student.get("aria-label") == "The student's detections in image 139: 1 zebra"
    assert "Ground truth (2)" in words and "Teacher (2)" in words and "Student (1)" in words
    assert "zebra: truth 1, teacher 1, student 1" in words and "xerus: teacher 1" in words
    assert "score of at least 0.5" in words and "Dashed" in words


def test_a_class_has_one_colour_in_the_three_panels_and_in_the_legend(finished):
    source, _ = finished
    colours = {}
    for drawing in drawings(source)[:3]:
        for group in drawing.findall("g"):
            name = group.find("title").text.split()[0]
            colours.setdefault(name, set()).add(group.find("rect[@class='edge']").get("stroke"))
    assert all(len(each) == 1 for each in colours.values()) and len(set().union(*colours.values())) == 3
    for name, (colour,) in colours.items():
        assert re.search(rf'<span style="color: {colour}"[^>]*>■</span> {name}:', source)


def test_an_image_is_embedded_once(finished):
    source, _ = finished
    assert source.count(jpeg(180, 240)) == 2  # of two images with the same pixels
    for row in range(2):
        of_row = drawings(source)[3 * row : 3 * row + 3]
        assert [each.find("image") is not None for each in of_row] == [True, False, False]
        assert of_row[0].find("image").get("id") == f"picture-{row}"
        assert [each.find("use").get("href") for each in of_row[1:]] == [f"#picture-{row}"] * 2


def test_labels_stay_within_the_image():
    picture = Picture(1, (360, 180), jpeg(18, 36), {})
    boxes = [
        Box("hippopotamus", (330.0, 60.0, 25.0, 20.0), 0.9),  # no room to its right
        Box("a", (10.0, 3.0, 5.0, 5.0)),  # none above it
        Box("b", (-20.0, 90.0, 50.0, 20.0)),  # it begins outside
    ]
    drawing = ET.fromstring(
        pictures.draw("p", picture, boxes, dict.fromkeys(("hippopotamus", "a", "b"), "#fff"), label="")
    )
    places = {
        text.text: (text.get("text-anchor"), float(text.get("x")), float(text.get("y")))
        for text in drawing.iter("text")
    }
    assert places["hippopotamus 0.90"] == ("end", 355.0, 56.0)
    assert places["a"][0] == "start" and places["a"][2] > 10
    assert places["b"][1] >= 0


def test_without_a_teacher(tmp_path):
    source, words = page(fill(tmp_path, teacher=False))
    assert "no teacher" in words
    for absent in ("Teacher", "Gap", "difference", "teacher %"):
        assert absent not in words, absent
    assert "AP average precision, IoU 0.50 to 0.95 33.26 AP50" in words
    assert len(drawings(source)) == 4 and "zebra: truth 1, student 1" in words


@pytest.mark.parametrize("content", [None, {"score": 0.5, "images": []}])
def test_without_pictures(tmp_path, content):
    fill(tmp_path, drawn=False)
    if content:
        (tmp_path / "pictures.json").write_text(json.dumps(content))
    source, words = page(tmp_path)
    assert "Detections" not in words and not drawings(source)
    assert "All 3 classes with objects, best first" in words


def test_an_unfinished_run_shows_its_last_evaluation(tmp_path):
    _, words = page(fill(tmp_path, finished=False, lines=records()))
    assert "Student AP 33.26 % at step 20 Teacher AP 42.04 % Gap −8.78" in words
    assert "Steps 20 of 40 · 0.5 epochs" in words
    assert "AR100 100 detections 48.00 57.00 −9.00" in words
    assert "classes with objects" not in words
    _, words = page(fill(tmp_path, finished=False))
    assert "Nothing has been logged yet." in words and "Average precision" not in words


def test_hostile_class_names_are_inert(tmp_path):
    fill(tmp_path, HOSTILE)
    source, words = page(tmp_path)  # inert
    for name in HOSTILE[:3]:
        assert f"{name}: truth 1" in words or f"{name}: teacher 1" in words
    assert "alert(1)" not in source.replace("alert(1)&lt;", "").replace("onerror=alert(1)&gt;", "")
    assert len(drawings(source)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "needs 'score', a number, and 'images', a list"),
        ({"images": {}}, "needs 'score', a number"),
        ({"images": [[]]}, r"images\[0\]: not an image with its boxes"),
        ({"images": [image() | {"width": 0}]}, r"images\[0\]: 'image_id', 'width' and 'height' must be integers"),
        ({"images": [image() | {"image_id": "x"}]}, r"images\[0\]: 'image_id'"),
        ({"images": [image() | {"jpeg": '"/><script>'}]}, r"images\[0\]: not an image"),
        ({"images": [image() | {"jpeg": base64.b64encode(b"<svg/>").decode()}]}, r"images\[0\]: 'jpeg' is no JPEG"),
        ({"images": [image(), image() | {"student": None}]}, r"images\[1\].student: expected a list of boxes"),
        ({"images": [image() | {"truth": [{"class": "a"}]}]}, r"images\[0\].truth\[0\]: not a box with its class"),
        (
            {"images": [image() | {"truth": [{"class": "a", "box": [1, 2, -3, 4]}]}]},
            r"images\[0\].truth\[0\]: 'box' must be finite",
        ),
        ({"images": [image() | {"truth": [{"class": "a", "box": [1, 2, 3]}]}]}, r"truth\[0\]: 'box' must be finite"),
    ],
)
def test_garbled_pictures_are_named(tmp_path, change, message):
    fill(tmp_path)
    content = json.loads((tmp_path / "pictures.json").read_text())
    (tmp_path / "pictures.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"pictures\.json.*{message}"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": []}, "'class_names' must be a list of names"),
        ({"student_AP_by_class": None}, "has no 'student_AP_by_class'"),
        ({"student_AP_by_class": [1, 2]}, r"'student_AP_by_class' has shape \(2,\)"),
        ({"teacher_AP_by_class": [1, 2, 3, 101]}, "'teacher_AP_by_class' must lie between 0 and 100, or be -1"),
        ({"teacher_AP_by_class": [1, 2, 3, -0.5]}, "'teacher_AP_by_class' must lie between 0 and 100, or be -1"),
    ],
)
def test_garbled_precision_is_named(tmp_path, change, message):
    fill(tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"evaluation\.json: {message}"):
        read_run(tmp_path)
