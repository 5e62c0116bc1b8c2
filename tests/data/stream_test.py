"""Streamed data sets: what batches hold, whoever reads them; resuming; images that cannot be read; other faults."""

import io
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import mini_imagenet
import numpy as np
import pytest
from PIL import Image

from wkd_jax.data import image
from wkd_jax.data.image_folder import image_folder
from wkd_jax.data.order import stream
from wkd_jax.data.randomness import Random
from wkd_jax.data.tfds_stream import tfds_stream

SIZE = {"image_size": 24, "resize": 28}
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", name="tree")
def _tree(tmp_path_factory):
    return mini_imagenet.write_folder(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module", name="prepared")
def _prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    mini_imagenet.write_tfds(directory)
    return directory


@pytest.fixture(name="copy")
def _copy(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "copy")


def folder(root, **options):
    return image_folder(**{"data_dir": str(root), "workers": 0, **SIZE, **options})


def take(data, count, *, start=0, seed=3, batch=8, **process):
    """Training batches number `start` to `start + count`, by way of the saved position."""
    inputs = data.training(global_batch_size=batch, seed=seed, **process)
    inputs.set_state({**inputs.get_state(), "next_batch": start})
    try:
        return [next(inputs) for _ in range(count)]
    finally:
        inputs.close()


def same(left, right):
    for a, b in zip(left, right, strict=True):
        for field in ("image", "label", "index", "valid"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


def test_batches_are_the_stream_of_examples_augmented_by_seed_epoch_and_index(tree):
    """Against the definition: files in sorted order, permuted epochs end to end, one generator an example and epoch."""
    files = sorted((tree / "train").glob("*/*.JPEG"))
    data = folder(tree, train_interpolation="random", rand_augment=9.0)
    batches = take(data, 14, batch=7)  # 98 examples of 48: two epochs and a border within a batch
    places = np.arange(14 * 7)
    expected = stream(0, 14 * 7, size=48, seed=3)
    np.testing.assert_array_equal(np.concatenate([b.index for b in batches]), expected)
    np.testing.assert_array_equal(np.sort(expected[:48]), np.arange(48))
    np.testing.assert_array_equal(np.concatenate([b.label for b in batches]), data.labels[expected])
    pixels = np.concatenate([b.image for b in batches])
    for place in (0, 47, 48, 97):
        content = files[expected[place]].read_bytes()
        wanted = image.training_image(
            image.decode(content),
            Random(3, places[place] // 48, expected[place]),
            image_size=24,
            interpolation="random",
            rand_augment=9.0,
            fill=(124, 116, 104),
        )
        np.testing.assert_array_equal(pixels[place], wanted)
    twice = [np.flatnonzero(expected == 5)[:2]]
    assert np.any(pixels[twice[0][0]] != pixels[twice[0][1]])  # the next epoch looks different


def test_workers_processes_formats_and_restarts_change_nothing(tree, prepared):
    alone = take(folder(tree), 9)
    same(take(folder(tree, workers=2), 9), alone)
    same(take(tfds_stream(dataset="mini_imagenet", data_dir=str(prepared), workers=1, **SIZE), 9), alone)
    halves = [take(folder(tree), 9, process_index=p, process_count=2) for p in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.image for part in parts]), whole.image)
    same(take(folder(tree), 4, start=5), alone[5:])
    assert not np.array_equal(take(folder(tree), 1, seed=4)[0].index, alone[0].index)


def test_position_of_another_stream_is_refused(tree):
    state = folder(tree).training(global_batch_size=8, seed=3).get_state()
    for changes in ({"seed": 4}, {"num_examples": 47}, {"global_batch_size": 4}):
        with pytest.raises(ValueError, match="of another training stream"):
            folder(tree).training(global_batch_size=8, seed=3).set_state(state | changes)


@pytest.mark.parametrize("workers", [0, -1])
def test_evaluation_sees_every_example_once(tree, workers):
    files = sorted((tree / "val").glob("*/*.JPEG"))
    data = folder(tree, workers=workers, interpolation="bicubic")
    batches = list(data.evaluation("test", global_batch_size=8))
    assert [batch.valid.sum() for batch in batches] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate([b.index[b.valid] for b in batches]), np.arange(20))
    for batch in batches:
        assert not batch.image[~batch.valid].any() and not batch.label[~batch.valid].any()
    pixels = np.concatenate([batch.image for batch in batches])
    for row in (0, 19):
        wanted = image.evaluation_image(files[row].read_bytes(), interpolation="bicubic", **SIZE)
        np.testing.assert_array_equal(pixels[row], wanted)


def test_evaluation_of_chosen_rows(tree):
    rows = np.array([40, 3, 3, 17])
    halves = [
        list(folder(tree).evaluation("train", global_batch_size=6, process_index=p, process_count=2, rows=rows))
        for p in range(2)
    ]
    assert [b.index.tolist() for b in halves[0]] == [[40, 3, 3]]
    assert [b.valid.tolist() for b in halves[1]] == [[True, False, False]]
    assert halves[1][0].index[0] == 17 and halves[1][0].label[0] == folder(tree).labels[17]


def test_a_subset_is_balanced_and_the_beginning_of_a_larger_one(tree, prepared):
    small, large = folder(tree, train_images=8), folder(tree, train_images=12)
    assert small.num_examples == 8 and np.bincount(small.labels).tolist() == [2, 2, 2, 2]
    np.testing.assert_array_equal(large.labels[:8], small.labels)
    assert small.fingerprint != large.fingerprint != folder(tree).fingerprint
    batch = take(small, 1)[0]
    assert set(batch.index) == set(range(8))
    np.testing.assert_array_equal(batch.label, small.labels[batch.index])
    other = tfds_stream(dataset="mini_imagenet", data_dir=str(prepared), train_images=8, workers=0, **SIZE)
    same(take(other, 2), take(small, 2))


# --- images that cannot be read


def spoil(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-300], "empty": b"", "text": b"<html>404</html>"}[how])


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "text"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_stops_the_run_and_is_named(copy, how, split):
    bad = sorted((copy / split).glob("*/*.JPEG"))[7]
    data = folder(copy)  # a file that vanishes later
    spoil(bad, how)
    with pytest.raises(ValueError, match=rf"1 image\(s\) cannot be read, data.max_bad_images=0 allowed: .*{bad.name}"):
        if split == "train":
            take(data, 6)
        else:
            list(data.evaluation("test", global_batch_size=8))


@pytest.mark.parametrize("workers", [0, 1])
def test_as_many_as_allowed_are_masked_named_and_counted(copy, workers, capfd):
    data = folder(copy, workers=workers, max_bad_images=2)
    whole = take(folder(copy), 12)
    bad = sorted((copy / "train").glob("*/*.JPEG"))
    for row, how in ((7, "cut"), (30, "missing")):
        spoil(bad[row], how)
    batches = take(data, 12)  # two epochs: each is met twice and counted once
    assert sorted(pathlib.Path(name).name for name in data.unreadable) == [bad[7].name, bad[30].name]
    for batch, before in zip(batches, whole, strict=True):
        np.testing.assert_array_equal(batch.valid, ~np.isin(batch.index, (7, 30)))
        np.testing.assert_array_equal(batch.index, before.index)
        np.testing.assert_array_equal(batch.image[batch.valid], before.image[batch.valid])
        assert np.all(batch.image[~batch.valid] == (124, 116, 104))  # normalises to 0
    said = capfd.readouterr().err
    assert said.count(bad[7].name) == 1 and "2 of at most 2" in said
    data.note(dict(data.unreadable))  # what others met too is counted once
    spoil(sorted((copy / "val").glob("*/*.JPEG"))[0], "text")
    with pytest.raises(ValueError, match=r"3 image\(s\) cannot be read, data.max_bad_images=2"):
        list(data.evaluation("test", global_batch_size=8))
    with pytest.raises(ValueError, match="elsewhere.jpg: it is empty"):
        folder(copy, max_bad_images=0).note({"elsewhere.jpg": "it is empty"})


def test_a_damaged_record_is_named(tmp_path):
    import tensorflow_datasets as tfds
    import tfds_writer

    declared = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=list(mini_imagenet.CLASSES)),
    }
    examples = [{"image": content, "label": label} for content, label in mini_imagenet.examples("validation")]
    examples[5]["image"] = examples[5]["image"][:-200]
    tfds_writer.prepare(tmp_path, "spoiled", {"train": examples, "validation": examples}, declared)
    data = tfds_stream(dataset="spoiled", data_dir=str(tmp_path), workers=0, **SIZE)
    with pytest.raises(ValueError, match="spoiled/1.0.0 train record 5: "):
        take(data, 4)


# --- other faults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "/nowhere"}, "train_split='train': there is no folder /nowhere/train.*set data.data_dir"),
        ({"test_split": "validation"}, "test_split='validation': there is no folder .*; .* holds train, val"),
        ({"num_classes": 1000}, "has 4 class folders .*data.num_classes=1000: complete the copy"),
        ({"resize": 20}, "data.resize=20: must be at least image_size=24"),
        ({"interpolation": "lanczos"}, "data.interpolation='lanczos': must be bilinear or bicubic"),
        ({"train_interpolation": "any"}, "data.train_interpolation='any'"),
        ({"crop_scale": (0.5, 0.2)}, "data.crop_scale"),
        ({"rand_augment": 11.0}, "data.rand_augment=11.0: must be from 0"),
        ({"std": (1.0, 0.0, 1.0)}, "data.std"),
        ({"workers": -2}, "data.workers=-2"),
        ({"max_bad_images": -1}, "data.max_bad_images=-1"),
        ({"train_images": 49}, "train_images=49: must be 0"),
    ],
)
def test_refusals_of_a_folder(tree, options, message):
    with pytest.raises(ValueError, match=message):
        folder(tree, **options)


def test_folders_that_are_no_image_tree(copy):
    (copy / "val" / "n99999999").mkdir()
    with pytest.raises(ValueError, match="val has classes that .*train has not: n99999999"):
        folder(copy)
    (copy / "val" / "n99999999").rmdir()
    stray = copy / "train" / mini_imagenet.CLASSES[0] / "notes.txt"
    stray.write_text("")
    with pytest.raises(ValueError, match=r"notes.txt is no image \(.jpeg"):
        folder(copy)
    stray.unlink()
    (copy / "train" / mini_imagenet.CLASSES[1]).rename(copy / "kept")
    (copy / "train" / mini_imagenet.CLASSES[1]).mkdir()
    with pytest.raises(ValueError, match=f"train: no images of {mini_imagenet.CLASSES[1]}"):
        folder(copy)
    shutil.rmtree(copy / "val")
    (copy / "val").mkdir()
    (copy / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match="val holds 1 files and no class folders: .*wkd_jax.data prepare folder"):
        folder(copy)


def test_a_missing_shard_and_a_wrong_count_of_a_tfds_set(prepared, tmp_path):
    options = {"dataset": "mini_imagenet", "workers": 0, **SIZE}
    with pytest.raises(ValueError, match="has 4 classes, data.num_classes=10"):
        tfds_stream(data_dir=str(prepared), num_classes=10, **options)
    with pytest.raises(ValueError, match="test_split='test'"):
        tfds_stream(data_dir=str(prepared), test_split="test", **options)
    copy = shutil.copytree(prepared, tmp_path / "copy")
    next(copy.rglob("*train*00001-of-00003")).unlink()
    with pytest.raises(ValueError, match="a file is missing: .*00001-of-00003.*complete the copy"):
        tfds_stream(data_dir=str(copy), **options)


def test_fingerprint_names_content_and_not_place(tree, copy, prepared):
    whole = folder(tree).fingerprint
    assert folder(copy).fingerprint == whole
    assert folder(tree, workers=3, flip=False).fingerprint == whole  # not what evaluation sees
    assert folder(tree, resize=30).fingerprint != whole
    file = next((copy / "train").rglob("*.JPEG"))
    buffer = io.BytesIO()
    Image.open(file).resize((20, 20)).save(buffer, "jpeg")
    file.write_bytes(buffer.getvalue())
    resized = folder(copy).fingerprint
    assert resized != whole
    file.unlink()
    assert folder(copy).fingerprint not in (whole, resized)
    data = tfds_stream(dataset="mini_imagenet", data_dir=str(prepared), workers=0, **SIZE)
    part = tfds_stream(dataset="mini_imagenet", data_dir=str(prepared), train_split="train[:30]", workers=0, **SIZE)
    assert data.fingerprint != part.fingerprint and part.num_examples == 30


def test_a_killed_worker_is_an_error_that_says_so(tree):
    inputs = folder(tree, workers=1).training(global_batch_size=8, seed=0)
    next(inputs)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="a process that decodes images died.*lower data.workers"):
        for _ in range(8):
            next(inputs)


def test_workers_ignore_the_signal_that_stops_a_run_and_end_with_it(tree):
    """SIGTERM to all processes of a job must leave the input whole; SIGKILL to the run must not leave orphans."""
    program = f"""
import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
from wkd_jax.data.image_folder import image_folder

def main():
    inputs = image_folder(data_dir={str(tree)!r}, image_size=24, resize=28, workers=1).training(
        global_batch_size=8, seed=0)
    next(inputs)
    print(multiprocessing.active_children()[0].pid, flush=True)
    sys.stdin.readline()
    print(next(inputs).valid.sum(), flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    main()
"""
    # From a file: workers import the main module again.
    path = tree.parent / "orphans.py"
    path.write_text(program)
    run = subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    os.kill(worker, signal.SIGTERM)
    run.stdin.write("\n")
    run.stdin.flush()
    assert run.stdout.readline().strip() == "8"
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not pathlib.Path(f"/proc/{worker}").exists()
