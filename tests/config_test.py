"""Defaults, unknown keys, types and ranges."""

import json
import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from tests import contract_test as contract
from wkd_jax import config as config_lib
from wkd_jax import config_file, main, registry
from wkd_jax.training import build

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*_*.py"))


def small(**changes):
    config = {"data": {"name": "digits"}, "student": {"name": "resnet8"}}
    config.update(changes)
    return config


def test_everything_has_a_default():
    config = config_lib.resolve(small())
    assert set(config) == set(config_lib.DEFAULTS)
    assert config.optimizer.momentum == 0.9
    assert config.teacher is None


def test_resolving_twice_changes_nothing():
    once = config_lib.resolve(small(methods={"kd": {"weight": 2}}, teacher={"run": "somewhere"}))
    assert once.methods.kd.weight == 2.0 and isinstance(once.methods.kd.weight, float)
    assert config_lib.differences(once, config_lib.resolve(once)) == []
    assert config_lib.differences(once, json.loads(config_lib.to_json(once))) == []
    assert config_lib.digest(once) == config_lib.digest(json.loads(config_lib.to_json(once)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, r"config epoch: unknown key 'epoch': did you mean 'epochs'"),
        ({"optimizer": {"learning_rte": 0.1}}, r"optimizer.learning_rte.*did you mean 'learning_rate'"),
        ({"student": {"name": "resnet9"}}, r"unknown models name 'resnet9': did you mean"),
        ({"student": {"name": "resnet8", "width": 3}}, r"config student.width: unknown key"),
        ({"student": {}}, r"student.name is not set. Valid: .*resnet20"),
        ({"data": {"name": "digit"}}, r"unknown data name 'digit': did you mean 'digits'"),
        ({"data": {"name": "digits", "size": 3}}, r"config data.size"),
        ({"methods": {"wkd_k": {}}, "teacher": {"run": "x"}}, r"unknown methods name 'wkd_k': did you mean 'wkd_"),
        ({"methods": {"kd": {"temprature": 1.0}}, "teacher": {"run": "x"}}, r"methods.kd.temprature.*'temperature'"),
        ({"methods": {"kd": {"schedule": {"begin": 1}}}, "teacher": {"run": "x"}}, r"methods.kd.schedule.begin"),
        ({"methods": {"kd": {}}}, r"methods: kd cannot do without a teacher, and teacher is None"),
        ({"init": {"reset_head": True}}, r"init.reset_head=True: has a meaning with init.weights alone"),
        ({"init": {"weight": "x"}}, r"init.weight: .*did you mean 'weights'"),
        (
            {"teacher": {"weights": "x", "run": "y"}},
            r"set exactly one of teacher.run, teacher.train and teacher.weights",
        ),
        ({"teacher": {}}, r"teacher.run='', teacher.weights='': set exactly one of"),
        ({"teacher": {"train": {"student": {"name": "resnet8"}}}}, r"teacher.train.data.name is not set"),
        ({"epochs": 0}, r"epochs=0: must be above 0"),
        ({"epochs": "3"}, r"epochs='3': needs int, not str"),
        ({"epochs": True}, r"epochs=True: needs int, not bool"),
        ({"ema": 1.0}, r"ema=1.0: must be from 0 to below 1"),
        ({"optimizer": {"learning_rate": -1}}, r"optimizer.learning_rate=-1.0: must be above 0"),
        ({"optimizer": {"name": "adam"}}, r"optimizer.name='adam': must be sgd or adamw"),
        ({"optimizer": {"decay_rules": [("(", 0.0)]}}, r"'\(' is not a regular expression"),
        ({"optimizer": 3}, r"optimizer=3: needs a section"),
        ({"methods": "kd"}, r"methods='kd': needs a section"),
        ({"name": "../../x"}, r"name='../../x': must be letters"),
        ({"optimizer": {"milestones": ("a",)}}, r"milestones=\('a',\): needs numbers"),
        ({"optimizer": {"decay_rules": ("bias", 0.0)}}, r"decay_rules=\('bias', 0.0\): needs pairs"),
        ({"dtype": "float16"}, r"dtype='float16': must be float32 or bfloat16"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_lib.resolve(small(**changes))


def test_the_resolved_config_is_locked():
    config = config_lib.resolve(small())
    with pytest.raises((AttributeError, KeyError)):
        config.epoch = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_resolves(path):
    assert main.load_config(str(path)).data.name


@pytest.mark.parametrize("method", sorted({*registry.entries("methods")} - {*contract.DETECTORS}))
def test_digits_offers_every_method(method):
    """But those of detectors alone."""
    config = main.load_config(f"configs/digits_wkd.py:method={method},train_images=300")
    assert list(config.methods) == [method]
    assert config.data.train_images == 300
    assert (config.teacher is not None) == registry.get("methods", method).NEEDS_TEACHER
    build.check(config)


def test_overrides_reach_every_depth():
    config = main.load_config(
        "configs/digits_wkd.py", ["epochs=3", "optimizer.momentum=0.5", "teacher.train.epochs=2", "name=abc"]
    )
    assert (config.epochs, config.optimizer.momentum, config.teacher.train.epochs, config.name) == (3, 0.5, 2, "abc")


@pytest.mark.parametrize("file", ["digits_wkd", "fashion_wkd"])
def test_validation_is_kept_from_test_images(file):
    test, validation = (main.load_config(f"configs/{file}.py:split={split}") for split in ("test", "validation"))
    for config in (test, test.teacher.train):
        assert config.data.get("test_split", "test") == "test" and not config.data.get("validation")
    for config in (validation, validation.teacher.train):  # a teacher that has seen an image must not be judged on it
        assert config.data.get("test_split", "train[54000:]") == "train[54000:]"
        assert config.data.get("train_split", "train[:54000]") == "train[:54000]"
        assert config.data.get("validation", True)
    assert test.name != validation.name and test.teacher.train.student.name == "resnet8" + "x4" * (file[0] == "d")


@pytest.mark.parametrize(
    ("argument", "overrides", "message"),
    [
        (
            "configs/nowhere.py",
            [],
            r"configs/nowhere.py: there is no such file, nor a built-in config: Built in:\n  cifar100_c",
        ),
        ("nowhere/digits_wkd.py", [], r"nowhere/digits_wkd.py: there is no such file, .*: did you mean 'digits_wkd'\?"),
        (
            "imagenet_wdk:method=kd",
            [],
            r"imagenet_wdk: there is no such file, .*: did you mean 'imagenet_wkd'\? Built in:\n",
        ),
        ("common", [], r"common: there is no such file"),
        ("digits_wkd:methd=kd", [], r"'methd': did you mean 'method'"),
        ("configs/digits_wkd.py:methd=kd", [], r"'methd': did you mean 'method'"),
        ("configs/digits_wkd.py:method=wkd_k", [], r"method=wkd_k: did you mean 'wkd_"),
        ("configs/digits_wkd.py:seed=1,seed=2", [], r"'seed=2': seed is given twice, 1 before"),
        ("configs/digits_wkd.py:method=kd+kd", [], r"method=kd\+kd: names a method twice"),
        ("configs/digits_wkd.py:seed=x", [], r"'seed=x': needs seed=<int>"),
        ("configs/digits_wkd.py", ["epochs"], r"--config.epochs: write --config.epochs=VALUE"),
        ("configs/digits_wkd.py", ["epochs.x=1"], r"epochs is 20, not a section"),
        ("configs/digits_wkd.py", ["epoch=1"], r"did you mean 'epochs'"),
    ],
)
def test_bad_command_lines(argument, overrides, message):
    with pytest.raises(ValueError, match=message):
        main.load_config(argument, overrides)


def test_built_in_configs_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [*config_file.builtin().values()] == CONFIGS
    named = config_file.load_config("digits_wkd:method=kd", ["seed=5"])
    assert named == config_file.load_config(f"{CONFIGS[0].parent / 'digits_wkd.py'}:method=kd", ["seed=5"])
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="--config mine: the name of a config file ends in .py"):
        config_file.read_config("mine:x")


def test_a_copy_of_a_built_in_config_works_anywhere(tmp_path):
    """It finds what the original imports; a folder called configs that holds it, without more, is not in the way."""
    (tmp_path / "configs").mkdir()
    copy = tmp_path / "configs" / "mine.py"
    copy.write_text(CONFIGS[-1].read_text())
    root = str(CONFIGS[0].parents[1])
    program = (
        f"import sys\nsys.path.insert(0, {root!r})\nfrom wkd_jax import config_file\nsys.path.remove({root!r})\n"
        "before = sys.path[:]\nprint(config_file.read_config('configs/mine.py')['name'])\nassert sys.path == before"
    )
    environment = {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], **run)
    assert done.returncode == 0 and done.stdout.startswith("imagenet_"), done.stderr


def test_differences_name_the_keys():
    left, right = config_lib.resolve(small()), config_lib.resolve(small(epochs=5, task={"pad": 4}))
    lines = config_lib.differences(left, right)
    assert lines == ["epochs: 1 -> 5", "task.pad: 0 -> 4"]
    assert isinstance(left, ml_collections.ConfigDict)
