"""The label index, against labels that the test gave the set."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets
from etils import epath
from tfds_writer import encode, prepare

from wkd_jax.data import labels

features = tensorflow_datasets.features

CLASSES = ["circle", "cross", "line"]
GIVEN = {"train": np.arange(23) * 7 % 3, "test": np.arange(8) * 2 % 3}
PIXELS = encode(np.zeros((4, 4, 3), np.uint8))


def write(directory, given, classes=CLASSES):
    declared = {
        "image": features.Image(shape=(4, 4, 3)),
        "label": features.ClassLabel(names=classes),
        "flag": np.int64,
    }
    splits = {
        split: [{"image": PIXELS, "label": int(label), "flag": 1} for label in values]
        for split, values in given.items()
    }
    return prepare(directory, "drawn", splits, declared, num_shards=3)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    write(directory, GIVEN)
    return directory


@pytest.fixture
def builder(original, tmp_path, monkeypatch):
    """Of a copy of the set, without any index. The cache is `tmp_path / "cache"`."""
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(original, tmp_path / "sets")
    return tensorflow_datasets.builder("drawn", data_dir=str(tmp_path / "sets"))


def no_pass(*_):
    raise AssertionError("the records were read")


def test_read_once_then_from_the_file(builder, monkeypatch):
    folder = epath.Path(builder.data_dir)
    assert labels.load(builder, "train", "label") is None
    found = labels.read(builder, "train", "label")
    np.testing.assert_array_equal(found, GIVEN["train"])
    assert found.dtype == np.int32
    assert [path.name for path in folder.glob("*.npz")] == ["labels-train-label.npz"]
    monkeypatch.setattr(labels, "compute", no_pass)
    np.testing.assert_array_equal(labels.read(builder, "train", "label"), GIVEN["train"])
    # TFDS is not irritated by the file.
    assert len(tensorflow_datasets.builder_from_directory(folder).as_data_source("train")) == 23


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("train[5:20]", GIVEN["train"][5:20]),
        ("train[-2:]+test", np.concatenate([GIVEN["train"][-2:], GIVEN["test"]])),
        ("test[:3]+train[10:11]", np.concatenate([GIVEN["test"][:3], GIVEN["train"][10:11]])),
        ("train[:50%]", GIVEN["train"][:12]),
    ],
)
def test_expressions_are_cut_out_of_the_named_splits(builder, monkeypatch, expression, expected):
    monkeypatch.setattr(labels, "_CHUNK", 5)
    np.testing.assert_array_equal(labels.compute(builder, expression, "label"), expected)
    np.testing.assert_array_equal(labels.read(builder, expression, "label"), expected)
    monkeypatch.setattr(labels, "compute", no_pass)
    np.testing.assert_array_equal(labels.load(builder, expression, "label"), expected)


def test_an_index_goes_with_a_copy_of_the_set(builder, tmp_path, monkeypatch):
    labels.read(builder, "test", "label")
    shutil.copytree(tmp_path / "sets", tmp_path / "copy")
    copy = tensorflow_datasets.builder("drawn", data_dir=str(tmp_path / "copy"))
    monkeypatch.setattr(labels, "compute", no_pass)
    np.testing.assert_array_equal(labels.read(copy, "test", "label"), GIVEN["test"])


@pytest.mark.parametrize(
    ("other", "classes"),
    [
        ({"train": np.arange(24) % 3}, CLASSES),  # more records
        ({"train": GIVEN["train"]}, [*CLASSES, "dot"]),  # the same files, other classes
    ],
)
def test_an_index_of_other_files_is_made_again(builder, tmp_path, capsys, other, classes):
    labels.read(builder, "train", "label")
    write(tmp_path / "other", other, classes)
    changed = tensorflow_datasets.builder("drawn", data_dir=str(tmp_path / "other"))
    shutil.copy(epath.Path(builder.data_dir) / "labels-train-label.npz", changed.data_dir)
    assert labels.load(changed, "train", "label") is None
    assert "labels-train-label.npz is of other files" in capsys.readouterr().err
    np.testing.assert_array_equal(labels.read(changed, "train", "label"), other["train"])
    np.testing.assert_array_equal(labels.load(changed, "train", "label"), other["train"])


def test_a_file_of_another_size_is_noticed(builder):
    labels.read(builder, "train", "label")
    shard = next(epath.Path(builder.data_dir).glob("*train.array_record-00001*"))
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert labels.load(builder, "train", "label") is None
    shard.unlink()
    with pytest.raises(ValueError, match="drawn/1.0.0 train: a file is missing"):
        labels.load(builder, "train", "label")


def test_a_damaged_index_is_not_used(builder, capsys):
    labels.read(builder, "test", "label")
    path = epath.Path(builder.data_dir) / "labels-test-label.npz"
    for content in (b"", b"junk", path.read_bytes()[:100]):
        path.write_bytes(content)
        assert labels.load(builder, "test", "label") is None
        assert "labels-test-label.npz cannot be read" in capsys.readouterr().err
    np.testing.assert_array_equal(labels.read(builder, "test", "label"), GIVEN["test"])


def test_the_cache_serves_a_set_that_cannot_be_written(builder, tmp_path, monkeypatch):
    write_file = labels._write

    def read_only(path, content):
        if path.parent == epath.Path(builder.data_dir):
            raise PermissionError(f"{path}: read-only")
        return write_file(path, content)

    monkeypatch.setattr(labels, "_write", read_only)
    np.testing.assert_array_equal(labels.read(builder, "test", "label"), GIVEN["test"])
    assert len(list((tmp_path / "cache" / "labels").iterdir())) == 1
    monkeypatch.setattr(labels, "compute", no_pass)
    np.testing.assert_array_equal(labels.read(builder, "test", "label"), GIVEN["test"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="neither beside drawn/1.0.0 nor as .*file/labels.*: set WKD_JAX_CACHE"):
        labels.save(builder, "test", "label", GIVEN["test"], cache=tmp_path / "file")


def test_refusals(builder):
    with pytest.raises(ValueError, match="unknown class label 'lable': did you mean 'label'"):
        labels.load(builder, "train", "lable")
    with pytest.raises(ValueError, match="unknown class label 'flag'"):
        labels.compute(builder, "train", "flag")
    with pytest.raises(ValueError, match="split='trian'"):
        labels.read(builder, "trian", "label")
    with pytest.raises(ValueError, match=r"'train\[:3\]' is no named split: train, test"):
        labels.save(builder, "train[:3]", "label", np.zeros(3, int))
    with pytest.raises(ValueError, match=r"train: need 23 integer labels, found int64 of shape \(22,\)"):
        labels.save(builder, "train", "label", np.zeros(22, int))


def test_what_a_converted_set_has(builder):
    """Its first format is another, and ArrayRecord an alternative."""
    info = epath.Path(builder.data_dir) / "dataset_info.json"
    changed = json.loads(info.read_text()) | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    info.write_text(json.dumps(changed))
    converted = tensorflow_datasets.builder_from_directory(builder.data_dir)
    np.testing.assert_array_equal(labels.read(converted, "train[3:]", "label"), GIVEN["train"][3:])
