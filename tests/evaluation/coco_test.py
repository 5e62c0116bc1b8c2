"""COCO's numbers against a float64 oracle and between both evaluators; what is refused; that order does not matter."""

import dataclasses
import json
import sys

import drawn_coco
import numpy as np
import pytest

from wkd_jax.data import coco_json
from wkd_jax.evaluation import coco
from wkd_jax.tasks.detection import Detection

IMAGES, SLOTS, CLASSES = 40, 150, len(drawn_coco.CATEGORIES)


@pytest.fixture(scope="module", name="truth")
def _truth(tmp_path_factory):
    """Small, medium and large objects; crowds, an image without objects."""
    sizes, options = ((240, 320), (320, 240)), {"empty": 5, "crowd": 6, "objects": (1, 9)}
    _, content = drawn_coco.draw(IMAGES, seed=4, sizes=sizes, sides=(12, 150), **options)
    path = tmp_path_factory.mktemp("drawn") / "instances.json"
    path.write_text(json.dumps(content))
    return coco_json.read(path, "data.test_json")


def one_batch(truth, boxes, scores, classes, images):
    """All images as one batch, in the order of the file, of detections that are each in `images`; xyxy."""
    batch = {
        "boxes": np.zeros((IMAGES, SLOTS, 4), np.float32),
        "scores": np.zeros((IMAGES, SLOTS), np.float32),
        "classes": np.full((IMAGES, SLOTS), -1, np.int32),
        "valid": np.zeros((IMAGES, SLOTS), bool),
        "image_id": truth.image_ids.copy(),
        "image_valid": np.ones(IMAGES, bool),
    }
    filled = np.zeros(IMAGES, int)
    for box, score, label, image in zip(boxes, scores, classes, images, strict=True):
        slot = filled[image]
        batch["boxes"][image, slot], batch["scores"][image, slot], batch["classes"][image, slot] = box, score, label
        batch["valid"][image, slot] = True
        filled[image] += 1
    return batch


def corners(truth):
    return np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]], axis=1)


@pytest.fixture(scope="module", name="detections")
def _detections(truth):
    """A detector that misses, doubles, shifts, confuses and invents; ties; over 100 boxes of an image and class."""
    rng = np.random.default_rng(7)
    boxes, sides = np.repeat(corners(truth), 2, axis=0), np.repeat(truth.boxes[:, 2:], 2, axis=0)
    boxes = boxes + np.tile(sides, 2) * rng.normal(0, 0.08, boxes.shape)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    classes = np.where(rng.random(len(boxes)) < 0.1, rng.integers(0, CLASSES, len(boxes)), np.repeat(truth.labels, 2))
    images = np.repeat(truth.images, 2)
    false = rng.uniform(0, 200, (400, 2))
    false = np.concatenate([false, false + rng.uniform(5, 100, (400, 2))], axis=1)
    false_images = np.where(np.arange(400) < 110, 3, rng.integers(0, IMAGES, 400))
    boxes, images = np.concatenate([boxes, false]), np.concatenate([images, false_images])
    false_classes = np.where(np.arange(400) < 110, 0, rng.integers(0, CLASSES, 400))
    classes = np.concatenate([classes, false_classes])
    scores = np.round(rng.random(len(boxes)), 2)  # with ties
    kept = (rng.random(len(boxes)) < 0.8) | (images == 3)
    return one_batch(truth, boxes[kept], scores[kept], classes[kept], images[kept])


def perfect(truth, shift=0.0):
    own = ~truth.crowd
    boxes = corners(truth)[own]
    boxes[:, ::2] += shift * truth.boxes[own, 2:3]
    return one_batch(truth, boxes, np.full(own.sum(), 0.7), truth.labels[own], truth.images[own])


def same(left, right):
    for name in coco.METRICS:
        assert left[name] == pytest.approx(right[name], abs=1e-9), name
    np.testing.assert_allclose(left["AP_by_class"], right["AP_by_class"], atol=1e-9)


# --- the oracle: the definition, one threshold, class and area range at a time


def overlap(detection, truth, crowd):
    """IoU of two (x, y, w, h); over the detection's own area for a crowd."""
    sides = [
        max(0.0, min(detection[i] + detection[i + 2], truth[i] + truth[i + 2]) - max(detection[i], truth[i]))
        for i in (0, 1)
    ]
    shared, area, other = sides[0] * sides[1], detection[2] * detection[3], truth[2] * truth[3]
    union = area if crowd else area + other - shared
    return shared / union if union > 0 else 0.0


def curve(results, truth, label, area_range, limit, threshold):
    """(mean precision over 101 recalls, last recall); None without such objects."""
    low, high = area_range
    flags, scores, total = [], [], 0
    for image in np.argsort(truth.image_ids):
        rows = np.flatnonzero((truth.images == image) & (truth.labels == label))
        ignored = {r: truth.crowd[r] or not low <= truth.areas[r] <= high for r in rows}
        rows = sorted(rows, key=lambda r: ignored[r])
        total += sum(not ignored[r] for r in rows)
        key, image_id = truth.categories[label][0], truth.image_ids[image]
        own = [r for r in results if r["image_id"] == image_id and r["category_id"] == key]
        taken = set()
        for found in sorted(own, key=lambda r: -r["score"])[:100][:limit]:
            best, match = threshold - 1e-10, None
            for r in rows:
                if r in taken and not truth.crowd[r]:
                    continue
                if match is not None and not ignored[match] and ignored[r]:
                    break
                iou = overlap(found["bbox"], truth.boxes[r], truth.crowd[r])
                if iou >= best:
                    best, match = iou, r
            taken.add(match)
            area = found["bbox"][2] * found["bbox"][3]
            if (match is not None and ignored[match]) or (match is None and not low <= area <= high):
                continue
            flags.append(match is not None)
            scores.append(found["score"])
    if total == 0:
        return None
    right = np.cumsum(np.array(flags, float)[np.argsort(-np.array(scores), kind="stable")])
    recall, precision = right / total, right / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, np.linspace(0, 1, 101))
    return np.append(envelope, 0.0)[at].mean(), recall[-1] if len(recall) else 0.0


def oracle(results, truth):
    ranges = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    thresholds = np.linspace(0.5, 0.95, 10)

    def mean(part, area="", limit=100, only=thresholds, labels=range(CLASSES)):
        values = [curve(results, truth, label, ranges[area], limit, t) for label in labels for t in only]
        values = [value[part] for value in values if value is not None]
        return 100 * np.mean(values) if values else -1.0

    expected = {"AP": mean(0), "AP50": mean(0, only=[0.5]), "AP75": mean(0, only=[0.75])}
    expected |= {f"AP{area}": mean(0, area) for area in "sml"}
    expected |= {f"AR{limit}": mean(1, limit=limit) for limit in (1, 10, 100)}
    expected |= {f"AR{area}": mean(1, area) for area in "sml"}
    return {**expected, "AP_by_class": np.array([mean(0, labels=[label]) for label in range(CLASSES)])}


def test_numbers_equal_the_definition_and_evaluators_agree(truth, detections):
    results = coco.results([detections], truth)
    got, other = (coco.evaluate(results, truth, backend=backend) for backend in coco.BACKENDS)
    same(got, other)
    same(got, oracle(results, truth))
    assert list(got) == [*coco.METRICS, "AP_by_class"]
    assert 20 < got["AP"] < 80 and got["AR1"] < got["AR10"] < got["AR100"]  # nothing is degenerate
    assert len({round(got[f"AP{area}"], 6) for area in "sml"}) == 3
    assert got["AP"] == pytest.approx(got["AP_by_class"].mean())


@pytest.mark.parametrize("backend", coco.BACKENDS)
def test_a_perfect_detector_a_shifted_one_and_none(truth, backend, capfd):
    def numbers(batch):
        return coco.evaluate(coco.results([batch], truth), truth, backend=backend)

    got = numbers(perfect(truth))
    for name in set(coco.METRICS) - {"AR1"}:  # one detection an image and class finds one of several
        assert got[name] == pytest.approx(100, abs=1e-9), name
    np.testing.assert_allclose(got["AP_by_class"], 100)
    assert numbers(perfect(truth, shift=0.5))["AP"] < 1
    nothing = one_batch(truth, [], [], [], [])
    assert coco.results([nothing], truth) == []
    got = numbers(nothing)
    assert [got[name] for name in coco.METRICS] == [0.0] * 12 and got["AP_by_class"].tolist() == [0.0] * CLASSES
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


@pytest.mark.parametrize("backend", coco.BACKENDS)
def test_a_class_without_objects_is_marked_and_not_averaged(truth, backend):
    kept = truth.labels != 1
    fields = {name: getattr(truth, name)[kept] for name in ("images", "labels", "boxes", "areas", "crowd")}
    fewer = dataclasses.replace(truth, **fields)
    got = coco.evaluate(coco.results([perfect(truth)], fewer), fewer, backend=backend)
    assert got["AP"] == pytest.approx(100)
    np.testing.assert_allclose(got["AP_by_class"], [100, -1, 100])
    small = dataclasses.replace(truth, areas=np.minimum(truth.areas, 900.0))
    got = coco.evaluate(coco.results([perfect(truth)], small), small, backend=backend)
    assert got["APl"] == got["ARl"] == got["APm"] == -1.0 and got["APs"] == pytest.approx(100)


def pieces(batch, rng, *, size):
    """The rows in random order, in padded batches."""
    order = rng.permutation(IMAGES)
    for start in range(0, IMAGES, size):
        rows = order[start : start + size]
        part = {name: values[np.resize(rows, size)] for name, values in batch.items()}  # padding repeats rows
        part["image_valid"] = np.arange(size) < len(rows)
        yield part


@pytest.mark.parametrize("size", [1, 7, 64])
def test_order_and_division_do_not_matter(truth, detections, size):
    whole = coco.results([detections], truth)
    divided = list(pieces(detections, np.random.default_rng(size), size=size))
    for hosts in (1, 3):
        gathered = [part for host in range(hosts) for part in divided[host::hosts]]
        assert coco.results(gathered, truth) == whole
    annotations = coco.evaluate(json.loads(json.dumps(whole)), truth)  # kept in a file, and counted again
    same(annotations, coco.evaluate(whole, truth))


def test_results_are_cocos_form(truth, detections):
    results = coco.results([detections], truth)
    assert len(results) == detections["valid"].sum()
    assert [each["image_id"] for each in results] == sorted(each["image_id"] for each in results)
    row, slot = np.argwhere(detections["valid"])[-1]
    x1, y1, x2, y2 = detections["boxes"][row, slot].astype(float)
    assert results[-1] == {
        "image_id": int(truth.image_ids[row]),
        "category_id": drawn_coco.CATEGORIES[detections["classes"][row, slot]][0],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": float(detections["scores"][row, slot]),
    }


def test_every_image_must_occur_exactly_once(truth, detections):
    padding = {name: values[:2].copy() for name, values in detections.items()} | {"image_valid": np.zeros(2, bool)}
    assert coco.results([detections, padding], truth) == coco.results([detections], truth)
    twice = padding | {"image_valid": np.array([False, True])}
    with pytest.raises(ValueError, match="1 image ids occur more than once, such as 8: each image"):
        coco.results([detections, twice], truth)
    lacking = detections | {"image_valid": np.arange(IMAGES) > 1}
    with pytest.raises(ValueError, match="2 image ids of .*instances.json are missing, such as 1: each image"):
        coco.results([lacking], truth)
    with pytest.raises(ValueError, match="40 image ids of .* are missing"):
        coco.results([], truth)
    unknown = padding | {"image_valid": np.array([True, False]), "image_id": np.array([4, 4])}
    with pytest.raises(ValueError, match="1 image ids are not in .*instances.json, such as 4"):
        coco.results([detections, unknown], truth)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores", np.nan, "image 22 has a score that is not finite among its detections .1 in all.: box"),
        ("boxes", [0, 0, np.inf, 1], "image 22 has a box that is not finite"),
        ("boxes", [5, 0, 4, 1], "image 22 has a box whose right or lower side comes before"),
        ("classes", CLASSES, r"image 22 has a class that is not in 0\.\.2"),
        ("classes", -1, r"image 22 has a class that is not in 0\.\.2"),
    ],
)
def test_detections_that_are_none_are_refused(truth, detections, name, value, message):
    changed = {key: values.copy() for key, values in detections.items()}
    changed[name][3, 1] = value
    with pytest.raises(ValueError, match=message):
        coco.results([changed], truth)
    changed["valid"][3, 1] = False  # padding may hold anything
    assert len(coco.results([changed], truth)) == detections["valid"].sum() - 1


def test_evaluate_refuses_results_of_another_set_and_unknown_evaluators(truth):
    result = {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5}
    for changes in ({"image_id": 2}, {"category_id": 2}):
        with pytest.raises(ValueError, match="has not the image or not the category of the result"):
            coco.evaluate([result | changes], truth)
    with pytest.raises(ValueError, match="unknown backend 'cocotools': did you mean 'pycocotools'"):
        coco.evaluate([result], truth, backend="cocotools")


def test_a_missing_evaluator_is_named_with_the_remedy(truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(
        ValueError, match=r"needs faster_coco_eval, which is not installed .*pip install 'wkd-jax\[detection\]'"
    ):
        coco.evaluate([], truth)
    with pytest.raises(ValueError, match="needs faster_coco_eval"):  # before anything is trained
        Detection(Detection.DEFAULTS, truth)
