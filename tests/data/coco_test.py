"""Detection data sets in COCO's form: what batches hold, whoever reads them; resuming; faults of data and config."""

import json
import pathlib
import shutil

import drawn_coco
import numpy as np
import pytest
from PIL import Image

from wkd_jax.data import buckets, image
from wkd_jax.data.coco import coco
from wkd_jax.data.randomness import Random

TRAIN, TEST = 24, 10
FIELDS = ("image", "label", "index", "valid")


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory):
    return drawn_coco.write_set(tmp_path_factory.mktemp("drawn"), train=TRAIN, test=TEST)


@pytest.fixture(name="copy")
def _copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def data_set(root, **options):
    return coco(**{"data_dir": str(root), "workers": 0, **drawn_coco.SMALL, **options})


def take(data, count, *, start=0, seed=3, batch=4, **process):
    """Training batches number `start` to `start + count`, by way of the saved position."""
    inputs = data.training(global_batch_size=batch, seed=seed, **process)
    inputs.set_state(json.loads(json.dumps({**inputs.get_state(), "next_batch": start})))
    try:
        return [next(inputs) for _ in range(count)]
    finally:
        inputs.close()


def same(left, right):
    for a, b in zip(left, right, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
        for field in a.extra:
            np.testing.assert_array_equal(a.extra[field], b.extra[field], err_msg=field)


def content(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def rewrite(root, split, changed):
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(changed))


def objects(annotations, image_id):
    """(labels, [n, 4] x, y, w, h) of an image, as the file has them."""
    own = [each for each in annotations["annotations"] if each["image_id"] == image_id and not each["iscrowd"]]
    ids = sorted(each["id"] for each in annotations["categories"])
    return [ids.index(each["category_id"]) for each in own], np.array([each["bbox"] for each in own]).reshape(-1, 4)


def test_training_batches_are_those_of_the_definition(root):
    """Against the JSON and the files: order, short side and flip of each example and epoch, boxes, padding."""
    data, annotations = data_set(root), content(root, "train2017")
    canvases, infos = drawn_coco.SMALL["canvases"], annotations["images"]
    # Of the drawn sizes at short side 80: 72 x 96 gives 80 x 107, 64 x 96 gives 72 x 108, 96 x 96 gives 80 x 80.
    by_proportion = {(72, 96): 1, (96, 72): 2, (96, 96): 0, (64, 96): 1}
    of_image = np.array([by_proportion[info["height"], info["width"]] for info in infos])
    order = buckets.Shuffled(of_image, 3, 4, slice(0, 4))
    seen, flips, shorts = set(), set(), set()
    for number, batch in enumerate(take(data, 13)):  # 52 examples of 24
        bucket, places = order(number)
        assert batch.image.shape == (4, *canvases[bucket], 3) and batch.image.dtype == np.uint8
        np.testing.assert_array_equal(batch.index, places.index)
        assert batch.index.dtype == batch.label.dtype == np.int32 and batch.valid.all()
        for row, (index, epoch) in enumerate(zip(places.index, places.epoch, strict=True)):
            info = infos[index]
            random = Random(3, int(epoch), int(index))
            short = (64, 80)[random.integer(2)]
            flip = random.coin()
            scale = min(short / min(info["height"], info["width"]), 108 / max(info["height"], info["width"]))
            height, width = (int(side * scale + 0.5) for side in (info["height"], info["width"]))
            pixels = np.asarray(Image.open(root / "train2017" / info["file_name"]))
            resized = image.resize(pixels, (height, width), "bilinear")
            resized = resized[:, ::-1] if flip else resized
            np.testing.assert_array_equal(batch.image[row, :height, :width], resized)
            assert not batch.image[row, height:].any() and not batch.image[row, :, width:].any()
            labels, boxes = objects(annotations, info["id"])
            extra = {name: value[row] for name, value in batch.extra.items()}
            assert batch.label[row].tolist() == labels + [-1] * (100 - len(labels))
            assert extra["box_valid"].tolist() == [True] * len(labels) + [False] * (100 - len(labels))
            x, y, w, h = boxes.T
            x1, x2 = x * width / info["width"], (x + w) * width / info["width"]
            y1, y2 = y * height / info["height"], (y + h) * height / info["height"]
            if flip:
                x1, x2 = width - x2, width - x1
            np.testing.assert_allclose(
                extra["boxes"][: len(labels)], np.stack([x1, y1, x2, y2], 1), rtol=1e-6, atol=1e-5
            )
            assert not extra["boxes"][len(labels) :].any() and extra["boxes"].dtype == np.float32
            assert extra["size"].tolist() == [height, width]
            assert extra["original_size"].tolist() == [info["height"], info["width"]]
            assert extra["image_id"] == info["id"]
            seen.add((int(index), int(epoch))), flips.add(flip), shorts.add(short)
    assert len(seen) == 52 and flips == {True, False} and shorts == {64, 80}


def test_boxes_surround_the_shapes(tmp_path):
    """Whatever was done to image and box: what is bright in the image is what the box surrounds, to a pixel."""
    drawn_coco.write_set(tmp_path, train=16, test=4, objects=(1, 1))
    data = data_set(tmp_path)
    checked = 0
    for batch in [*take(data, 8), *data.evaluation("test", global_batch_size=4)]:
        for pixels, boxes, valid in zip(batch.image, batch.extra["boxes"], batch.extra["box_valid"], strict=True):
            if valid.any():
                bright = pixels.max(axis=-1) > 100
                (y, *_, bottom), (x, *_, right) = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
                np.testing.assert_allclose(boxes[valid], [[x, y, right + 1, bottom + 1]], atol=1.6)
                checked += 1
    assert checked >= 34


def test_without_flips_and_at_one_size_training_shows_what_evaluation_does(root):
    data = data_set(root, flip=False, train_short=(72,))
    shown = {}
    for batch in data.evaluation("train", global_batch_size=4):
        shown |= {int(i): boxes for i, boxes in zip(batch.index[batch.valid], batch.extra["boxes"], strict=False)}
    for batch in take(data, 12):
        for index, boxes in zip(batch.index, batch.extra["boxes"], strict=True):
            np.testing.assert_array_equal(boxes, shown[int(index)])


def test_workers_processes_and_restarts_change_nothing(root):
    alone = take(data_set(root), 9)
    same(take(data_set(root, workers=1), 9), alone)
    halves = [take(data_set(root), 9, process_index=p, process_count=2) for p in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        for field in FIELDS:
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field))
        for field in whole.extra:
            joined = np.concatenate([part.extra[field] for part in parts])
            np.testing.assert_array_equal(joined, whole.extra[field])
    same(take(data_set(root), 4, start=5), alone[5:])
    assert not np.array_equal(take(data_set(root), 1, seed=4)[0].index, alone[0].index)


def test_the_position_continues_where_it_was_taken(root):
    inputs = data_set(root).training(global_batch_size=4, seed=3)
    for _ in range(5):
        next(inputs)
    state = inputs.get_state()
    expected = [next(inputs) for _ in range(3)]
    inputs.set_state(state)
    same([next(inputs) for _ in range(3)], expected)
    inputs.close()


def test_position_of_another_stream_is_refused(root):
    state = data_set(root).training(global_batch_size=4, seed=3).get_state()
    for changes in ({"seed": 4}, {"num_examples": 23}, {"global_batch_size": 8}):
        with pytest.raises(ValueError, match="of another training stream"):
            data_set(root).training(global_batch_size=4, seed=3).set_state(state | changes)
    other = data_set(root, canvases=((128, 128),))
    with pytest.raises(ValueError, match="of another training stream"):
        other.training(global_batch_size=4, seed=3).set_state(state)


def test_images_keep_their_canvas_and_shapes_are_those_of_canvases(root):
    data = data_set(root)
    shapes = {}
    for batch in take(data, 40):
        for index in batch.index:
            assert shapes.setdefault(int(index), batch.image.shape[1:3]) == batch.image.shape[1:3]
    assert set(shapes.values()) <= set(data.canvases) and len(shapes) == TRAIN
    assert data.image_size == (96, 128)  # the first of the largest


# --- evaluation


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_image_once(root, processes):
    data, annotations = data_set(root), content(root, "val2017")
    parts = [
        list(data.evaluation("test", global_batch_size=4, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for batches in zip(*parts, strict=True):
        assert len({batch.image.shape for batch in batches}) == 1
        for batch in batches:
            assert len(batch.index) == 4 // processes
            seen += batch.extra["image_id"][batch.valid].tolist()
            out = ~batch.valid
            assert not batch.image[out].any() and not batch.extra["boxes"][out].any() and not batch.index[out].any()
            assert (batch.label[out] == -1).all() and (batch.extra["image_id"][out] == -1).all()
            assert (batch.extra["size"][out] == batch.image.shape[1:3]).all()
            for row in np.flatnonzero(batch.valid):
                info = annotations["images"][batch.index[row]]
                assert info["id"] == batch.extra["image_id"][row]
                height, width = batch.extra["size"][row]
                assert min(height, width) == 72 or max(height, width) == 108
                pixels = Image.open(root / "val2017" / info["file_name"]).resize((width, height), Image.BILINEAR)
                np.testing.assert_array_equal(batch.image[row, :height, :width], np.asarray(pixels))
                labels, _ = objects(annotations, info["id"])
                assert batch.label[row][batch.extra["box_valid"][row]].tolist() == labels
    assert sorted(seen) == sorted(info["id"] for info in annotations["images"])
    assert any(not objects(annotations, image_id)[0] for image_id in seen)  # one without objects is among them


def test_evaluation_of_chosen_rows(root):
    data = data_set(root)
    rows = np.array([20, 3, 7, 17])
    batches = list(data.evaluation("train", global_batch_size=2, rows=rows))
    assert sorted(np.concatenate([batch.index[batch.valid] for batch in batches]).tolist()) == [3, 7, 17, 20]
    (batch,) = data.evaluation("train", global_batch_size=2, rows=np.array([5]))
    assert batch.index.tolist() == [5, 0] and batch.valid.tolist() == [True, False]


# --- annotations that are not used as they are


def test_what_is_left_out_and_changed_is_counted(copy):
    annotations = content(copy, "train2017")
    first, second, third = (info["id"] for info in annotations["images"][:3])
    kept = [each for each in annotations["annotations"] if each["image_id"] not in (first, second, third)]
    number = 1000

    def add(image_id, box, iscrowd=0):
        nonlocal number
        number += 1
        kept.append(
            {"id": number, "image_id": image_id, "category_id": 1, "bbox": box, "area": 1.0, "iscrowd": iscrowd}
        )

    add(first, [10.0, 10.0, 20.0, 20.0], iscrowd=1)  # a crowd alone: nothing to train on
    add(second, [10.0, 10.0, 20.0, 0.0])  # no extent
    add(second, [200.0, 10.0, 20.0, 20.0])  # beyond the right side
    add(third, [-4.0, 30.0, 20.0, 200.0])  # leaves it at the left and below
    add(third, [0.0, 0.0, 96.0000001, 10.0])  # rounding alone
    rewrite(copy, "train2017", annotations | {"annotations": kept})
    data = data_set(copy)
    assert data.num_examples == TRAIN - 2
    words = [note.split("instances_train2017.json: ")[1] for note in data.notes if "train2017" in note]
    assert words == [
        "1 crowd regions are left out of the batches",
        "2 boxes without extent within their image are left out of the batches",
        "1 boxes that leave their image are clipped to it",
        "2 images without a usable object are left out of training",
    ]
    batches = take(data, 12)
    assert {first, second}.isdisjoint(np.concatenate([batch.extra["image_id"] for batch in batches]))
    for batch in batches:
        assert batch.extra["box_valid"].any(axis=1).all()
        boxes, (height, width) = batch.extra["boxes"], batch.extra["size"].T[..., None]
        sides = (boxes[..., 2:] - boxes[..., :2])[batch.extra["box_valid"]]
        assert (sides > 1e-5).all() and boxes.min() >= 0
        assert (boxes[..., 2] <= width).all() and (boxes[..., 3] <= height).all()
        for row in np.flatnonzero(batch.extra["image_id"] == third):
            clipped = boxes[row, 0]
            assert clipped[0] == 0 or clipped[2] == width[row, 0]
            assert clipped[3] == height[row, 0]
    assert len(data.ground_truth) == TEST
    assert data.ground_truth.crowd.sum() == 1  # evaluation is against all annotations


def test_an_image_with_too_many_objects_is_named_with_the_remedy(root):
    data = data_set(root, max_boxes=3)
    assert take(data, 1)[0].label.shape == (4, 3)
    counts = [len(objects(content(root, "train2017"), info["id"])[0]) for info in content(root, "train2017")["images"]]
    first = content(root, "train2017")["images"][counts.index(max(counts))]["file_name"]
    wanted = rf"{first} has 3 objects, more than data.max_boxes=2 \({counts.count(3)} images .*: set data.max_boxes=3"
    with pytest.raises(ValueError, match=wanted):
        data_set(root, max_boxes=2)


def test_an_image_that_fits_no_canvas_is_named_with_the_remedy(root):
    first = next(info for info in content(root, "train2017")["images"] if info["height"] > info["width"])
    message = (
        rf"{first['file_name']} has 107 x 80 pixels when its short side is resized to 80, .* "
        r"\(\d images of the split are so\): add a canvas, here \(128, 96\), or lower data.max_side=108"
    )
    with pytest.raises(ValueError, match=message):
        data_set(root, canvases=((96, 128),))
    assert data_set(root, canvases=((96, 128), (128, 96))).num_examples == TRAIN


def test_splits_with_other_categories_or_nothing_to_train_on_are_refused(copy):
    annotations = content(copy, "val2017")
    changed = json.loads(json.dumps(annotations).replace("ellipse", "oval"))
    rewrite(copy, "val2017", changed)
    with pytest.raises(ValueError, match=r"different categories: \[\(13, 'ellipse'\), \(13, 'oval'\)\] are in one"):
        data_set(copy)
    rewrite(copy, "train2017", content(copy, "train2017") | {"annotations": []})
    with pytest.raises(ValueError, match=f"none of its {TRAIN} images has a usable object"):
        data_set(copy)


# --- images that are missing, broken or others


def test_missing_images_are_found_before_training(copy):
    for split, argument in (("train2017", "train_folder"), ("val2017", "test_folder")):
        gone = sorted((copy / split).iterdir())[2]
        pixels = gone.read_bytes()
        gone.unlink()
        with pytest.raises(ValueError, match=rf"data.{argument}='{split}': 1 of \d+ images .* first .*{gone.name}"):
            data_set(copy)
        if split == "val2017":
            with pytest.raises(ValueError, match="are missing"):
                data_set(copy, max_bad_images=1)
        gone.write_bytes(pixels)
    with pytest.raises(ValueError, match="data.train_folder='images': there is no folder .*images; correct it"):
        data_set(copy, train_folder="images")


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "resized":
        Image.open(path).resize((20, 30)).save(path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-300], "text": b"<html>404</html>"}[how])


@pytest.mark.parametrize("how", ["missing", "cut", "text", "resized"])
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_an_unreadable_image_stops_the_run_and_is_named(copy, how, split):
    bad = sorted((copy / split).iterdir())[7]
    data = data_set(copy)  # a file that vanishes later
    spoil(bad, how)
    words = r".*is \[30, 20\] pixels, its annotations say" if how == "resized" else ""
    with pytest.raises(ValueError, match=rf"cannot be read, data.max_bad_images=0 allowed: .*{bad.name}{words}"):
        if split == "train2017":
            take(data, 12)
        else:
            list(data.evaluation("test", global_batch_size=4))


def test_as_many_training_images_as_allowed_are_masked(copy, capfd):
    whole = take(data_set(copy), 8)
    bad = sorted((copy / "train2017").iterdir())
    for row, how in ((7, "cut"), (11, "missing")):
        spoil(bad[row], how)
    data = data_set(copy, max_bad_images=2)
    batches = take(data, 8)
    assert sorted(pathlib.Path(name).name for name in data.unreadable) == [bad[7].name, bad[11].name]
    masked = 0
    for batch, before in zip(batches, whole, strict=True):
        np.testing.assert_array_equal(batch.valid, ~np.isin(batch.index, (7, 11)))
        np.testing.assert_array_equal(batch.index, before.index)
        np.testing.assert_array_equal(batch.image[batch.valid], before.image[batch.valid])
        assert np.all(batch.image[~batch.valid] == (124, 116, 104))  # normalises to 0
        assert not batch.extra["box_valid"][~batch.valid].any() and (batch.label[~batch.valid] == -1).all()
        masked += (~batch.valid).sum()
    assert masked >= 2
    assert capfd.readouterr().err.count(bad[7].name) == 1


def test_evaluation_allows_no_bad_image(copy):
    data = data_set(copy, max_bad_images=3)
    bad = sorted((copy / "val2017").iterdir())[4]
    spoil(bad, "cut")
    with pytest.raises(ValueError, match=rf"{bad.name} cannot be read .*truncated.*evaluation is over all images"):
        list(data.evaluation("test", global_batch_size=4))


# --- config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "/nowhere"}, "data.train_json='annotations/.*: /nowhere/.*No such file.*set data.data_dir"),
        ({"test_json": "annotations/x.json"}, "data.test_json='annotations/x.json': .*No such file"),
        ({"canvases": ()}, r"data.canvases=\(\): must be different pairs"),
        ({"canvases": ((96, 100),)}, "data.canvases=.*multiples of 32"),
        ({"canvases": ((96, 96), (96, 96))}, "data.canvases"),
        ({"canvases": (96, 96)}, "data.canvases"),
        ({"canvases": ((96.0, 96),)}, "data.canvases"),
        ({"train_short": ()}, "data.train_short"),
        ({"train_short": (64, 64)}, "data.train_short=.*must be different"),
        ({"train_short": (0,)}, "data.train_short"),
        ({"test_short": 0}, "data.test_short=0: must be above 0"),
        ({"max_side": 79}, "data.max_side=79: must be at least the largest"),
        ({"max_boxes": 0}, "data.max_boxes=0"),
        ({"mean": (0.5,)}, "data.mean"),
        ({"std": (1.0, 0.0, 1.0)}, "data.std"),
        ({"workers": -2}, "data.workers=-2"),
        ({"max_bad_images": -1}, "data.max_bad_images=-1"),
    ],
)
def test_refusals(root, options, message):
    with pytest.raises(ValueError, match=message):
        data_set(root, **options)


def test_global_batches_that_cannot_be_divided_are_refused(root):
    with pytest.raises(ValueError, match="global_batch_size=5: must be a positive multiple"):
        data_set(root).training(global_batch_size=5, seed=0, process_count=2)
    with pytest.raises(ValueError, match="global_batch_size=5: must be a positive multiple"):
        next(data_set(root).evaluation("test", global_batch_size=5, process_count=2))


def test_there_are_no_labels_an_image(root):
    with pytest.raises(ValueError, match="a detection data set has no label an image"):
        _ = data_set(root).labels


def test_fingerprint_names_content_and_not_place(root, copy):
    whole = data_set(root).fingerprint
    assert data_set(copy).fingerprint == whole
    assert data_set(copy, workers=3, flip=False, train_short=(64,)).fingerprint == whole  # not what evaluation sees
    assert data_set(copy, test_short=70).fingerprint != whole
    assert data_set(copy, canvases=((128, 128),)).fingerprint != whole
    annotations = content(copy, "train2017")
    annotations["annotations"][3]["bbox"][0] += 0.5
    rewrite(copy, "train2017", annotations)
    assert data_set(copy).fingerprint != whole
    data = data_set(root)
    assert data.class_names == ("rectangle", "ellipse", "triangle") and data.num_examples == TRAIN
    assert data.mean == (0.485, 0.456, 0.406)
