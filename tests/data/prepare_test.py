"""`python -m wkd_jax.data`: preparing, converting, unpacking and checking. What needs TensorFlow says so."""

import importlib.util
import io
import json
import os
import pathlib
import shutil
import struct
import tarfile

import numpy as np
import pytest
import tensorflow_datasets
import tfds_writer
from tfds_writer import encode

from wkd_jax.data import convert, labels
from wkd_jax.data import prepare as module
from wkd_jax.data.__main__ import main
from wkd_jax.data.image_folder import image_folder

features = tensorflow_datasets.features
has_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="writes TFRecord files with TensorFlow, which is not installed",
)

CLASSES = ["ash", "oak"]
COUNTS = {"train": 9, "test": 4}


def picture(seed, image_format="jpeg"):
    return encode(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), image_format)


class Leaves(tensorflow_datasets.core.GeneratorBasedBuilder):
    """A set that TFDS has code for, once this is imported, as it has for ImageNet."""

    __module__ = "leaves"  # TFDS looks into the package that a builder is in, and needs importlib_resources for it
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        declared = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=features.FeaturesDict(declared))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in COUNTS.items()}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": io.BytesIO(picture(i, "png")), "label": i % 2}  # decoders of JPEG differ


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))
    tensorflow_datasets.disable_progress_bar()


@pytest.fixture
def run(capfd):
    """Runs a command, checks its exit code and returns what it printed: lines, or with code 1 the error."""

    def call(*argv, code=0):
        capfd.readouterr()
        assert main([str(arg) for arg in argv]) == code
        out, err = capfd.readouterr()
        return out.splitlines() if code == 0 else (out, err)

    return call


def records(data_dir, name, split):
    raw = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
    source = module.open_builder(name, str(data_dir)).as_data_source(
        split, deserialize_method=raw, file_format="array_record"
    )
    return list(source)


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Directory of the set "leaves" as ArrayRecord, 3 files a split."""
    directory = tmp_path_factory.mktemp("array_record")
    declared = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
    splits = {split: [{"image": picture(i), "label": i % 2} for i in range(count)] for split, count in COUNTS.items()}
    tfds_writer.prepare(directory, "leaves", splits, declared, num_shards=3)
    return directory


@pytest.fixture
def old_leaves(leaves, tmp_path):
    """The same set as TFRecord; returns the folder of its files."""
    shutil.copytree(leaves, tmp_path / "sets")
    folder = tmp_path / "sets" / "leaves" / "1.0.0"
    for path in folder.glob("*array_record*"):
        reader = convert_reader(path)
        content = [struct.pack("<QI", len(record), 0) + record + b"crc." for record in reader]
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(content))
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    return folder


def convert_reader(path):
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    return reader.read(list(range(reader.num_records())))


# Building


def test_builds_a_set_and_then_finds_it_there(tmp_path, run, monkeypatch):
    # So small a set TFDS builds without TensorFlow: it is enough not to look for it.
    monkeypatch.setattr(module, "_can_build", lambda: True)
    lines = run("prepare", "leaves", "--data_dir", tmp_path)
    assert f"leaves/1.0.0 is prepared, in {tmp_path}/leaves/1.0.0" in lines
    assert lines[-4:] == [
        "  train: 9 examples in 1 files",
        "  test: 4 examples in 1 files",
        "  train: label index written",
        "  test: label index written",
    ]
    assert len(records(tmp_path, "leaves", "train")) == 9

    lines = run("prepare", "leaves", "--data_dir", tmp_path)
    assert lines[0] == f"leaves/1.0.0 is prepared already, in {tmp_path}/leaves/1.0.0"
    assert lines[-1] == "  test: label index is there already"
    assert "unknown class label 'tree'" in run("prepare", "leaves", "--data_dir", tmp_path, "--label_key", "tree")[-1]


def test_what_tfds_raises_becomes_one_error(tmp_path, run, monkeypatch):
    monkeypatch.setattr(module, "_can_build", lambda: True)
    monkeypatch.setattr(Leaves, "_generate_examples", lambda self, count: 1 / 0)
    _, error = run("prepare", "leaves", "--data_dir", tmp_path, code=1)
    assert "TFDS could not build leaves/1.0.0: ZeroDivisionError" in error


def test_imagenet_without_archives_says_what_to_do(tmp_path, run):
    _, error = run("prepare", "imagenet2012", "--data_dir", tmp_path, code=1)
    assert "https://image-net.org/download-images" in error
    assert "Training images (Task 1 & 2)" in error
    assert (
        f"3. Put what you downloaded into {tmp_path}/downloads/manual "
        "(missing there: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar)" in error
    )
    assert f"4. Repeat: python -m wkd_jax.data prepare imagenet2012 --data_dir {tmp_path}\n" in error

    manual = tmp_path / "my archives"
    manual.mkdir()
    (manual / "ILSVRC2012_img_train.tar").write_bytes(b"")
    argv = ("prepare", "imagenet2012", "--data_dir", tmp_path, "--manual_dir", manual)
    _, error = run(*argv, code=1)
    assert f"into {manual} (missing there: ILSVRC2012_img_val.tar)" in error
    assert f"--manual_dir '{manual}'\n" in error
    (manual / "ILSVRC2012_img_val.tar").write_bytes(b"")
    _, error = run(*argv, code=1)
    assert f"{manual}/ILSVRC2012_img_train.tar has 0 bytes, and the whole archive 147,897,477,120" in error


def test_without_tensorflow(tmp_path, run, monkeypatch):
    monkeypatch.setattr(module, "ARCHIVES", {"imagenet2012": {"train.tar": 3}})
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "train.tar").write_bytes(b"abc")
    monkeypatch.setattr(module, "_can_build", lambda: False)
    _, error = run("prepare", "imagenet2012", "--data_dir", tmp_path, code=1)
    assert "TFDS needs TensorFlow to build imagenet2012/5.1.0; training does not" in error
    assert "pip install 'wkd-jax[prepare]'" in error
    assert f"repeat: python -m wkd_jax.data prepare imagenet2012 --data_dir {tmp_path}\n" in error


def test_other_archives_fetched_by_hand(tmp_path, run):
    _, error = run("prepare", "diabetic_retinopathy_detection", "--data_dir", tmp_path, code=1)
    assert "diabetic_retinopathy_detection/original/3.0.0 must be downloaded by hand:\n  1. You have to" in error
    assert f"  2. Put what you downloaded into {tmp_path}/downloads/manual.\n  3. Repeat: " in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("prepare", "imagent2012"), "did you mean imagenet2012 or"),
        (("prepare", "imagenet2012:9.0.0"), "only: 5.1.0, 5.0.0"),
        (("prepare", "imagenet_resized/65x64"), "BuilderConfig 65x64 not found"),
        (("prepare", "leaves", "--from", "x.tar"), "--from: leaves does not come as idx files"),
        (("prepare", "folder", "--manual_dir", "x"), "--manual_dir has a meaning with TFDS sets alone"),
        (("check", "leafs"), "dataset='leafs': no prepared files under"),
    ],
)
def test_refusals(tmp_path, run, argv, message):
    _, error = run(*argv, "--data_dir", tmp_path, code=1)
    assert error.startswith("error: ") and message in error


def test_folder_needs_a_directory(run):
    assert "give --data_dir" in run("prepare", "folder", code=1)[1]


def test_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="7.0 GiB are needed, and 5.0 GiB are free on that disk"):
        module.check_space(tmp_path / "not" / "there", 7 * 2**30)
    assert module.check_space(tmp_path, 2**30) == "disk: about 1.0 GiB are needed, 5.0 GiB are free"
    assert "does not know" in module.check_space(tmp_path, 0)


# Converting


def test_converts_tfrecord(leaves, old_leaves, run):
    data_dir = old_leaves.parents[1]
    lines = run("prepare", "leaves", "--data_dir", data_dir)
    assert lines[0].startswith("leaves/1.0.0 is there as TFRecord files; they are converted")
    assert lines[-1] == "  test: label index written"
    for split in COUNTS:
        assert records(data_dir, "leaves", split) == records(leaves, "leaves", split)
    assert len(list(old_leaves.glob("*.tfrecord-*"))) == 6
    assert not list(old_leaves.glob("*.part"))
    assert run("prepare", "leaves", "--data_dir", data_dir)[0].startswith("leaves/1.0.0 is prepared already")
    assert "  train: 9 images of 2 classes, 4 to 5 a class" in run("check", "leaves", "--data_dir", data_dir)


@has_tensorflow
def test_converts_what_tensorflow_wrote(tmp_path, run):
    Leaves(data_dir=str(tmp_path / "old"), file_format="tfrecord").download_and_prepare()
    Leaves(data_dir=str(tmp_path / "new"), file_format="array_record").download_and_prepare()
    lines = run("prepare", "leaves", "--data_dir", tmp_path / "old")
    assert lines[0].startswith("leaves/1.0.0 is there as TFRecord files")
    for split in COUNTS:
        expected = records(tmp_path / "new", "leaves", split)
        assert sorted(map(len, records(tmp_path / "old", "leaves", split))) == sorted(map(len, expected))
    old = tensorflow_datasets.builder("leaves", data_dir=str(tmp_path / "old"))
    theirs = tensorflow_datasets.as_numpy(old.as_dataset(split="train"))  # TFDS still finds its files
    new = module.open_builder("leaves", str(tmp_path / "old"))
    for mine, its in zip(new.as_data_source("train", file_format="array_record"), theirs, strict=True):
        assert mine["label"] == its["label"]
        np.testing.assert_array_equal(mine["image"], its["image"])


def one_by_one(monkeypatch):
    """Converting in this process, which is faster for a few small files."""

    def convert_all(shards, title):
        done.extend(pathlib.Path(shard.target).name for shard in shards)
        for shard in shards:
            convert.convert_shard(*shard)

    done = []
    monkeypatch.setattr(convert, "convert", convert_all)
    return done


def test_a_conversion_goes_on_where_it_stopped(old_leaves, run, monkeypatch):
    done = one_by_one(monkeypatch)
    paths = sorted(old_leaves.glob("*train.tfrecord*"))
    convert.convert_shard(str(paths[0]), str(paths[0]).replace("tfrecord", "array_record"), 3)
    run("prepare", "leaves", "--data_dir", old_leaves.parents[1])
    assert len(done) == 5 and paths[0].name.replace("tfrecord", "array_record") not in done


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-30], "is damaged or cut off at byte"),
        (lambda content: content[:5], "is damaged or cut off at byte 0"),
        (lambda content: b"\xff" * 8 + content[8:], "is damaged or cut off at byte 0"),
        (lambda content: content * 2, "has 6 records, not 3 as the set says"),
        (lambda content: b"", "has 0 records, not 3"),
    ],
)
def test_damaged_tfrecords(old_leaves, run, monkeypatch, damage, message):
    one_by_one(monkeypatch)
    path = sorted(old_leaves.glob("*train.tfrecord*"))[1]
    path.write_bytes(damage(path.read_bytes()))
    _, error = run("prepare", "leaves", "--data_dir", old_leaves.parents[1], code=1)
    assert f"{path} {message}" in error
    assert not list(old_leaves.glob("*.part"))
    assert "array_record" not in (old_leaves / "dataset_info.json").read_text()
    path.unlink()
    _, error = run("prepare", "leaves", "--data_dir", old_leaves.parents[1], code=1)
    assert f"1 of 6 files are missing, the first {path}" in error


def test_other_formats_are_refused(leaves, tmp_path, run):
    shutil.copytree(leaves, tmp_path / "sets")
    info = tmp_path / "sets" / "leaves" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "riegeli"}))
    _, error = run("prepare", "leaves", "--data_dir", tmp_path / "sets", code=1)
    assert "holds riegeli files, which are neither read nor converted" in error


# Unpacking ImageNet's archives


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet's two archives with two classes, and three validation images: of n01751748, n09193705 and n02105855."""
    for name in ("n01751748", "n09193705"):
        images = {f"{name}_{i}.JPEG": picture(i) for i in (3, 12)}
        tar(tmp_path / f"{name}.tar", images)
    members = {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in ("n01751748", "n09193705")}
    paths = [
        tar(tmp_path / "ILSVRC2012_img_train.tar", members),
        tar(
            tmp_path / "ILSVRC2012_img_val.tar",
            {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i, "jpeg") for i in (1, 2)},
        ),
    ]
    monkeypatch.setitem(module.ARCHIVES, "imagenet2012", {path.name: path.stat().st_size for path in paths})
    return paths


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {
    **{f"train/{name}/{name}_{i}.JPEG": picture(i) for name in ("n01751748", "n09193705") for i in (3, 12)},
    "val/n01751748/ILSVRC2012_val_00000001.JPEG": picture(1),
    "val/n09193705/ILSVRC2012_val_00000002.JPEG": picture(2),
}


def test_unpacks_imagenet(tmp_path, archives, run):
    root = tmp_path / "imagenet"
    lines = run("prepare", "folder", "--data_dir", root, "--from", *archives)
    assert lines[1:] == [
        f"{root}/train: 4 files written, out of ILSVRC2012_img_train.tar",
        f"{root}/val: 2 files written, out of ILSVRC2012_img_val.tar",
    ]
    assert tree(root) == EXPECTED
    data = image_folder(data_dir=str(root), workers=0)
    assert data.class_names == ("n01751748", "n09193705") and len(data.train) == 4

    # Again: only what is missing or not whole.
    (root / "val/n01751748/ILSVRC2012_val_00000001.JPEG").write_bytes(b"half")
    lines = run("prepare", "folder", "--data_dir", root, "--from", *archives)
    assert [line.split(": ")[1].split(",")[0] for line in lines[1:]] == ["0 files written", "1 files written"]
    assert tree(root) == EXPECTED


@has_tensorflow
def test_builds_imagenet(tmp_path, archives, run):
    lines = run("prepare", "imagenet2012", "--data_dir", tmp_path / "sets", "--manual_dir", tmp_path)
    assert lines[-4:] == [
        "  train: 4 examples in 1 files",
        "  validation: 2 examples in 1 files",
        "  train: label index written",
        "  validation: label index written",
    ]
    builder = tensorflow_datasets.builder("imagenet2012", data_dir=str(tmp_path / "sets"))
    name = builder.info.features["label"].int2str
    assert [name(int(label)) for label in labels.load(builder, "train", "label")].count("n09193705") == 2
    found = {example["file_name"]: name(example["label"]) for example in builder.as_data_source("validation")}
    assert found == {b"ILSVRC2012_val_00000001.JPEG": "n01751748", b"ILSVRC2012_val_00000002.JPEG": "n09193705"}


def test_sorts_a_flat_folder(tmp_path, archives, run):
    root = tmp_path / "imagenet"
    run("prepare", "folder", "--data_dir", root, "--from", archives[0])
    with tarfile.open(archives[1]) as file:
        file.extractall(root / "val", filter="data")
    with pytest.raises(ValueError, match="holds 2 files and no class folders"):
        image_folder(data_dir=str(root))
    assert run("prepare", "folder", "--data_dir", root) == [f"{root}/val: 2 files moved into class folders"]
    assert tree(root) == EXPECTED
    assert run("prepare", "folder", "--data_dir", root)[0].startswith(f"{root}: nothing to do")

    (root / "val" / "cat.jpg").write_bytes(b"")
    _, error = run("prepare", "folder", "--data_dir", root, code=1)
    assert "val has 1 files outside of class folders that are not ImageNet's validation images" in error


def test_wrong_archives(tmp_path, archives, run):
    other = tar(tmp_path / "other.tar", {"x": b"y"})
    argv = ("prepare", "folder", "--data_dir", tmp_path / "f", "--from")
    _, error = run(*argv, other, code=1)
    assert "other.tar is neither of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. To get these:" in error
    _, error = run(*argv, tmp_path / "gone" / archives[0].name, code=1)
    assert "No such file" in error

    content = archives[0].read_bytes()
    archives[0].write_bytes(b"\1" * 2000 + content[2000:])
    _, error = run(*argv, archives[0], code=1)
    assert f"{archives[0]} is damaged" in error
    tar(archives[0], {"../n01751748_1.JPEG": b"y"})
    archives[0].write_bytes(archives[0].read_bytes().ljust(len(content), b"\0"))
    _, error = run(*argv, archives[0], code=1)
    assert "has '../n01751748_1.JPEG': not ImageNet's" in error
    archives[0].write_bytes(content[:-1])
    _, error = run(*argv, archives[0], code=1)
    assert f"has {len(content) - 1:,} bytes, and the whole archive {len(content):,}" in error
    assert not (tmp_path / "f").exists()


# Checking


@pytest.fixture
def folder(tmp_path):
    """Six good images in class folders."""
    for split, count in (("train", 2), ("val", 1)):
        for i, name in enumerate(CLASSES):
            (tmp_path / "trees" / split / name).mkdir(parents=True)
            for j in range(count):
                (tmp_path / "trees" / split / name / f"{j}.jpg").write_bytes(picture(2 * i + j))
    return tmp_path / "trees"


def test_check_of_a_folder(folder, run):
    assert run("check", folder, "--decode") == [
        f"{folder}: files in class folders",
        "  train: 4 images of 2 classes, 2 a class",
        "    first 4 images, height x width: 6 x 8",
        "    decoded: 4 of 4",
        "  val: 2 images of 2 classes, 1 a class",
        "    first 2 images, height x width: 6 x 8",
        "    decoded: 2 of 2",
    ]

    (folder / "train" / "oak" / "1.jpg").write_bytes(picture(0)[:-40])
    (folder / "val" / "ash" / "0.jpg").unlink()
    out, error = run("check", folder, "--decode", code=1)
    assert f"WRONG {folder}/train/oak/1.jpg cannot be read: " in out
    assert "    decoded: 3 of 4\n" in out
    assert "WRONG val: no images of 1 classes, ash\n" in out
    assert f"{folder}: 2 things are wrong" in error
    assert run("check", folder, code=1)[1].count("1 thing is wrong") == 1
    assert "there is no folder" in run("check", folder, "--test_split", "test", code=1)[1]


def test_check_of_a_prepared_set(leaves, tmp_path, run):
    shutil.copytree(leaves, tmp_path / "sets")
    prepared = tmp_path / "sets" / "leaves" / "1.0.0"
    expected = [
        f"leaves/1.0.0: ArrayRecord files, {prepared}",
        "  train: 9 images of 2 classes, 4 to 5 a class",
        "    first 5 images, height x width: 6 x 8",
        "    3 files, 0.00 GiB; label index written now",
        "  test: 4 images of 2 classes, 2 a class",
        "    first 4 images, height x width: 6 x 8",
        "    3 files, 0.00 GiB; label index written now",
    ]
    assert run("check", "leaves", "--data_dir", tmp_path / "sets") == expected
    there = [line.replace("written now", "there") for line in expected]
    assert run("check", prepared) == there

    shard = sorted(prepared.glob("*train.array_record*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    out, error = run("check", "leaves", "--data_dir", tmp_path / "sets", code=1)
    assert f"WRONG {shard} cannot be read" in out
    shutil.copy(sorted(prepared.glob("*test.array_record*"))[0], shard)
    out, _ = run("check", "leaves", "--data_dir", tmp_path / "sets", code=1)
    assert f"WRONG {shard} has 1 records, not 3 as the set says" in out
    shard.unlink()
    out, error = run("check", "leaves", "--data_dir", tmp_path / "sets", code=1)
    assert "WRONG leaves/1.0.0 train: a file is missing" in out and "1 thing is wrong" in error

    shutil.move(prepared, tmp_path / "moved")
    assert "holds leaves/1.0.0: TFDS finds it only if" in run("check", tmp_path / "moved", code=1)[1]


def test_check_finds_bad_images_and_labels(tmp_path, run):
    declared = {"image": features.Image(), "label": features.ClassLabel(names=CLASSES)}
    good = [{"image": picture(i), "label": i % 2} for i in range(3)]
    splits = {
        "train": [*good, {"image": b"no image", "label": 1}],
        "val": [*good, {"image": picture(9), "label": -1}],
        "contest": [{"image": picture(i), "label": -1} for i in range(3)],
    }
    tfds_writer.prepare(tmp_path, "spoiled", splits, declared)
    out, error = run("check", "spoiled", "--data_dir", tmp_path, "--decode", code=1)
    assert "WRONG spoiled/1.0.0 train record 3 cannot be read: " in out
    assert "decoded: 3 of 4\n" in out
    assert "WRONG val: 1 of 4 labels are not from 0 to 1\n" in out
    assert "  contest: 3 images of 0 classes, 0 a class\n    without labels" in out
    assert "spoiled: 2 things are wrong" in error
    assert os.path.exists(tmp_path / "spoiled" / "1.0.0" / "labels-contest-label.npz")
