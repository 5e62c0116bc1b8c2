"""The wheel: what it needs, what is in it, and that the losses work where nothing else is installed."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = ("jax", "numpy", "ott-jax")


def requirements(name):
    """Of a requirements file and those it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    included = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    own = [str(Requirement(line)) for line in lines if line and not line.startswith("-r ")]
    return [*own, *(line for file in included for line in requirements(file))]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory):
    """Built from a copy, since building leaves files behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("wkd_jax", "configs", "requirements"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", name="light")
def _light(wheel, tmp_path_factory):
    """A fresh environment of the wheel and what it needs without extras: its Python, and how to call it."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    wanted, seen = [Requirement(line) for line in requirements("requirements/losses.txt")], set()
    while wanted:
        distribution = importlib.metadata.distribution(wanted.pop().name)
        if normal(distribution.name) in seen:
            continue
        seen.add(normal(distribution.name))
        for top in {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}:
            (site / top).exists() or (site / top).symlink_to(distribution.locate_file(top))
        needs = map(Requirement, distribution.requires or ())
        wanted += [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}

    def run(*words):
        command = [place / "bin" / "python", *words]
        return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=300)

    return run


def test_the_root_files_install_what_the_extras_do():
    everything = [requirements(f"requirements/{name}.txt") for name in ("losses", "train", "detection")]
    assert requirements("requirements.txt") == sum(everything, [])
    assert requirements("requirements-test.txt") == requirements("requirements/test.txt")
    assert [normal(Requirement(line).name) for line in everything[0]] == [*CORE]


def test_every_package_is_in_the_list():
    """setuptools takes the list as it is, since it cannot look for packages and map one folder."""
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "wkd_jax").rglob("__init__.py")}
    assert {*PYPROJECT["tool"]["setuptools"]["packages"]} == there | {"wkd_jax.builtin.configs"}


def test_what_the_wheel_says_and_holds(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {*file.namelist()}
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{about.partition('/')[0]}/")).metadata
        entry = file.read(about.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == importlib.import_module("wkd_jax").__version__
    assert "wkd-jax = wkd_jax.__main__:main" in entry
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    extras = {
        "": ("losses",),
        "train": ("losses", "train"),
        "detection": ("losses", "train", "detection"),
        "prepare": ("losses", "train", "prepare"),
        "test": ("losses", "train", "detection", "test"),
    }
    assert {*metadata.get_all("Provides-Extra")} == {*extras} - {""}
    for extra, files in extras.items():
        chosen = {normal(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": extra})}
        listed = [line for file in files for line in requirements(f"requirements/{file}.txt")]
        assert chosen == {normal(Requirement(line).name) for line in listed}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "wkd_jax").rglob("*.py")}
    code |= {f"wkd_jax/builtin/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    pages = {f"wkd_jax/report/{path.name}" for path in (ROOT / "wkd_jax/report").glob("*.html")}
    assert pages and {"wkd_jax/py.typed", *pages} <= names
    assert {name.split("/")[0] for name in names} == {"wkd_jax", about.split("/")[0]}


def test_the_losses_work_alone(light):
    program = """
import json, sys
import jax, jax.numpy as jnp
import wkd_jax
from wkd_jax import losses
assert "site-packages" in wkd_jax.__file__

student, teacher = jnp.array([[1.0, 0.0, -1.0], [0.5, 0.2, 0.1]]), jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
cost = losses.ground_cost(losses.cosine_similarity(jnp.eye(3) + 0.1), sharpness=1.0)

def wkd_l(student):
    target, transport = losses.wkd_logit(student, teacher, jnp.array([0, 1]), cost)
    return (target + transport).sum()

def wkd_f(student):
    mean, covariance = losses.wkd_feature(student, jnp.ones((2, 2, 2, 3)), grid=1)
    return (mean + covariance).sum()

maps = jnp.arange(24.0).reshape(2, 2, 2, 3) / 24
found = []
for loss, x in ((wkd_l, student), (wkd_f, maps)):
    value, gradient = jax.value_and_grad(loss)(x)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and (gradient != 0).any(), (loss, value, gradient)
    found.append(float(value))
absent = ("flax", "optax", "ml_collections", "grain", "matplotlib", "tensorflow_datasets")
print(json.dumps([found, [name for name in absent if __import__("importlib.util").util.find_spec(name)]]))
"""
    done = light("-c", program)
    assert done.returncode == 0, done.stderr
    (logit, feature), present = json.loads(done.stdout)
    assert logit > 0 and feature > 0
    assert "flax" not in present and "grain" not in present and "ml_collections" not in present


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "wkd_jax.main", "--config", "digits_wkd"),
        ("-m", "wkd_jax", "--config", "digits_wkd"),
        ("-m", "wkd_jax.weights", "list"),
        ("-m", "wkd_jax.data", "prepare", "cifar100"),
        ("-c", "import sys; from wkd_jax.__main__ import main; sys.exit(main(['models']))"),
    ],
    ids=" ".join,
)
def test_a_command_says_what_to_install(light, words):
    done = light(*words)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"error: \w+ is not installed, which wkd_jax\S+ needs: pip install 'wkd-jax\[train\]' \(in .*", line
    )


def test_other_failures_keep_their_traceback(light):
    """Those of whoever imports the losses are none of our business."""
    done = light("-c", "import wkd_jax.losses, flax_of_mine")
    assert done.returncode == 1 and "Traceback" in done.stderr and "wkd-jax[" not in done.stderr
    done = light("-m", "wkd_jax", "--help")
    assert done.returncode == 0 and "commands:" in done.stdout
