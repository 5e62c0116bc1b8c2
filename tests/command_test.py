"""Every command's help, the one name for all of them, and the listing of configs."""

import argparse
import importlib
import importlib.machinery
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from wkd_jax import __main__, command, config_file, configs, extras
from wkd_jax.report.published import TABLES

PACKAGE = pathlib.Path(__file__).parents[1] / "wkd_jax"


@pytest.fixture(name="parsers")
def _parsers(monkeypatch):
    """All parsers, sub-commands' too, as the commands themselves make them, by how they are called."""
    made = {}
    start = command.Parser.parse_known_args

    def parse(parser, args=None, namespace=None):
        made[parser.prog] = parser
        return start(parser, args, namespace)

    monkeypatch.setattr(command.Parser, "parse_known_args", parse)
    monkeypatch.setenv("COLUMNS", "120")
    return made


def called(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(argv)
    return stopped.value.code, capsys.readouterr().out


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_is_enough(name, parsers, capsys):
    code, text = called([name, "--help"], capsys)
    parser = parsers[f"wkd-jax {name}"]
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    pages = {parser: (code, text)}
    for sub in subs[0].choices if subs else ():
        pages[subs[0].choices[sub]] = called([name, sub, "--help"], capsys)
    for page, (code, text) in pages.items():
        assert code == 0
        assert text.startswith(f"usage: {page.prog} ")
        assert f"\n    {page.prog}" in text, "no example"
        assert "python -m" not in text, "commands are written as they were called"
        assert [line for line in text.splitlines() if len(line) > 120] == []
        for action in page._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action
        if page is parser:
            assert "Exit codes: 0 " in text
    assert all(choice.help for action in subs for choice in action._choices_actions)


def test_examples_of_the_help_are_real(capsys):
    """The configs, tables and keys that they name exist."""
    for name in command.COMMANDS:
        text = called([name, "--help"], capsys)[1]
        for config in re.findall(r"--config ([\w]+_[\w]+)|configs (\w+_\w+)", text):
            assert (config[0] or config[1]) in config_file.builtin()
        for table in re.findall(r"--table (\w+_\w+)", text):
            assert table in TABLES
        for key in re.findall(r"--config\.([\w.]+)=0", text):
            assert config_file.load_config("digits_wkd", [f"{key}=0.5"])


def test_every_command_has_a_name():
    modules = {f"wkd_jax.{path.parent.name}" for path in PACKAGE.glob("*/__main__.py")}
    modules |= {
        f"wkd_jax.{path.stem}" for path in PACKAGE.glob("[a-z]*.py") if '__name__ == "__main__"' in path.read_text()
    }
    assert modules == {module for module, _ in command.COMMANDS.values()}


def test_one_name_for_all(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        importlib.import_module("wkd_jax.main"), "main", lambda argv, prog: seen.append((argv, prog)) or 7
    )
    assert __main__.main(["train", "--config", "x"]) == __main__.main(["--config", "x"]) == 7
    assert seen == [(["--config", "x"], "wkd-jax train")] * 2
    assert called(["--version"], capsys) == (0, "0.1.0\n")
    code, text = called(["-h"], capsys)
    assert code == 0 and all(f"\n  {name} " in text for name in command.COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["trian"])
    assert "did you mean 'train'" in capsys.readouterr().err
    assert __main__.main([]) == 2
    assert capsys.readouterr().out == text


def test_the_help_of_all_commands_loads_nothing_heavy():
    program = (
        "import json, sys\nfrom wkd_jax import __main__\n"
        "try:\n    __main__.main(['-h'])\nexcept SystemExit:\n    print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"jax", "numpy", "ml_collections"} & {*json.loads(done.stdout.splitlines()[-1])} == set()


def test_called_as_a_module_the_help_says_so(capsys):
    with pytest.raises(SystemExit, match="0"):
        configs.main(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m wkd_jax.configs ") and "wkd-jax" not in out


def test_configs_are_listed_and_shown(tmp_path, capsys):
    assert configs.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in config_file.builtin())
    assert configs.main(["imagenet_wkd"], prog="wkd-jax configs") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{config_file.FOLDER / 'imagenet_wkd.py'}\n\nImageNet: ResNet-34 -> ResNet-18")
    assert (
        "\nArguments:\n  pair      r34_r18 (the default) or r50_mv1\n" in out
        and "    wkd-jax train --config imagenet_wkd\n" in out
    )
    (tmp_path / "silent.py").write_text("def get_config(argument): return {}")
    (tmp_path / "broken.py").write_text("def get_config(")
    for argv, message in (
        (["imagenet_wdk"], "did you mean 'imagenet_wkd'"),
        ([str(tmp_path / "silent.py")], "has no docstring"),
        ([str(tmp_path / "broken.py")], "broken.py: cannot be loaded: '(' was never closed"),
        (["digits_wkd:method=wkd_k", "--keys"], "method=wkd_k: did you mean"),
        (["digits_wkd", "--keys", "--config.epoch=1"], "did you mean 'epochs'"),
    ):
        assert configs.main(argv) == 1
        assert message in capsys.readouterr().err
    for argv in (["--keys"], ["digits_wkd", "--config.seed=1"]):
        with pytest.raises(SystemExit, match="2"):
            configs.main(argv)


@pytest.mark.parametrize("argument", ["digits_wkd:method=wkd_l", "coco_wkd", "cifar100_cross:pair=vit_s_r18"])
def test_the_printed_keys_are_overrides_that_give_the_same_run(argument, capsys):
    assert configs.main([argument, "--keys", "--config.seed=3"]) == 0
    out = capsys.readouterr().out
    words = [word for line in out.splitlines() for word in shlex.split(line, comments=True)]
    overrides = [word.removeprefix("--config.") for word in words]
    assert len(overrides) > 60 and "seed=3" in overrides
    config = config_file.load_config(argument, ["seed=3"])
    assert config_file.load_config(argument, overrides) == config
    assert config_file.load_config(argument, [*overrides, "keep=5"]) != config


def test_keys_say_what_they_mean(capsys):
    assert configs.main(["digits_wkd:method=wkd_l", "--keys"]) == 0
    out = capsys.readouterr().out
    for key, meaning in (
        ("seed=0 ", "of initialisation, data order and augmentation"),  # behind a default
        ("interrelation.kernel=linear ", "of cka: linear, polynomial or rbf"),  # in a section
        ("teacher.which=latest ", "of run and train: latest or best checkpoint"),
        ("methods.wkd_l.epsilon=0.05 ", "entropic regularisation"),  # of a method
        ("methods.wkd_l.schedule.name=cosine ", "constant or cosine"),
        ("task.flip=False ", "mirror half of the images"),
        ("data.train_images=0 ", "How many training images to keep, balanced over the classes"),  # a factory's argument
        ("student.name=resnet8 ", "a registered model and its arguments"),
    ):
        assert re.search(rf"^--config\.{re.escape(key)} *# {re.escape(meaning)}", out, re.MULTILINE), key


def failure(package, importer, monkeypatch):
    """What importing a package that is not there raises, in a module of that name."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        exec(f"import {package}", {"__spec__": importlib.machinery.ModuleSpec(importer, None)})
    return raised.value


@pytest.mark.parametrize(
    ("package", "importer", "extra"),
    [
        ("optax", "wkd_jax.training.optimizer", "train"),
        ("optax", "wkd_jax.models.__main__", "train"),
        ("faster_coco_eval", "wkd_jax.evaluation.coco", "detection"),
        ("tensorflow", "wkd_jax.data.prepare", "prepare"),
        ("optax", "ott.solvers", None),  # another package that does not find its own
        ("optax", "wkd_jaxes", None),
        ("wkd_jax.nowhere", "wkd_jax.main", None),  # our own mistake
    ],
)
def test_what_is_missing_names_its_extra(package, importer, extra, monkeypatch):
    sentence = extras.missing(failure(package, importer, monkeypatch))
    if extra:
        module = importer.removesuffix(".__main__")
        assert sentence.startswith(f"{package} is not installed, which {module} needs: pip install 'wkd-jax[{extra}]'")
    else:
        assert sentence is None
    assert extras.missing(ImportError("cannot import name")) is None
