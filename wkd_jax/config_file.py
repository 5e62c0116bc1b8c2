"""Config files: found by path, or by the name of one that comes with the package, and loaded.

config = load_config("digits_wkd:method=kd", ["optimizer.learning_rate=0.1"])
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import ml_collections

from wkd_jax import config as config_lib

_PACKAGE = pathlib.Path(__file__).parent
_INSTALLED = _PACKAGE / "builtin" / "configs"  # where a wheel has the folder that a checkout has at its root
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def load_config(argument: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Loads and resolves a config file.

    Args:
      argument: "path/to/file.py", or the name of a built-in config, and perhaps ":arguments", which go to the file's
        `get_config`.
      overrides: "optimizer.learning_rate=0.1" and the like, applied to what the file returned. Values are Python
        literals; what is not a literal is a string.

    Raises:
      ValueError: If there is no such file, or anything in it or in an override is not valid.

    Example:
      >>> load_config("digits_wkd:method=kd", ["optimizer.learning_rate=0.1"]).optimizer.learning_rate
      0.1
    """
    config = read_config(argument)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--config.{override}: write --config.{key}=VALUE")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *sections, leaf = key.split(".")
        node = config
        if sections[:1] == ["methods"] and len(sections) > 1 and sections[1] not in config.get("methods", {}):
            raise ValueError(f"--config.{override}: this run does not use {sections[1]}; choose it as a method first")
        for section in sections:
            if not isinstance(node.setdefault(section, {}), dict):
                raise ValueError(f"--config.{override}: {section} is {node[section]!r}, not a section")
            node = node[section]
        node[leaf] = value
    return config_lib.resolve(config)


def read_config(argument: str) -> dict[str, Any]:
    """What a config file's `get_config` returns, as plain dicts: before overrides and defaults.

    Args:
      argument: As of `load_config`.

    Raises:
      ValueError: If there is no such file, it cannot be loaded, or it refuses the arguments.
    """
    name, _, arguments = argument.partition(":")
    path = find(name)
    # Config files import what they share from beside them; copies of ours, from where ours are.
    before = sys.path[:]
    sys.path[:] = [str(path.absolute().parent.parent), *before, str(FOLDER.parent)]
    try:
        spec = importlib.util.spec_from_file_location("wkd_jax_config", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:  # anybody's code runs here, and raises what it likes
        raise ValueError(f"--config {name}: cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {name}: has no get_config(argument) that returns the config")
    try:
        config = module.get_config(arguments)
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)
    except ValueError:  # an argument that it refuses
        raise
    except Exception as error:
        raise ValueError(f"--config {name}: get_config fails: {type(error).__name__}: {error}") from error


def find(name: str) -> pathlib.Path:
    """The file of a config.

    Args:
      name: A path that ends in .py, or the name of a built-in config.

    Raises:
      ValueError: If there is no such config; the message gives the nearest name and all of them.

    Example:
      >>> find("digits_wkd").name
      'digits_wkd.py'
    """
    path, known = pathlib.Path(name), builtin()
    if path.suffix == ".py" and path.is_file():
        return path
    if name in known:
        return known[name]
    if path.is_file():
        raise ValueError(f"--config {name}: the name of a config file ends in .py")
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"--config {name}: there is no such file, nor a built-in config: {hint}Built in:\n{listing()}")


def builtin() -> dict[str, pathlib.Path]:
    """The configs that come with the package: name to file.

    Example:
      >>> "imagenet_wkd" in builtin(), "common" in builtin()
      (True, False)
    """
    return {path.stem: path for path in sorted(FOLDER.glob("*.py")) if "def get_config(" in path.read_text()}


def listing() -> str:
    """The built-in configs: the name and the first line of its file.

    Example:
      >>> "  imagenet_selfkd     ImageNet: ResNet-18 without a larger teacher" in listing()
      True
    """
    known = builtin()
    width = max(map(len, known), default=0) + 4
    lines = [f"  {name}".ljust(width) + about(path).splitlines()[0] for name, path in known.items()]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent=" " * width) for line in lines)


def about(path: pathlib.Path) -> str:
    """What a config file's head says of it, without loading it.

    Raises:
      ValueError: If the file is not Python, or says nothing.
    """
    try:
        text = ast.get_docstring(ast.parse(path.read_text()))
    except SyntaxError as error:
        raise ValueError(f"--config {path}: cannot be loaded: {error}") from error
    if not text:
        raise ValueError(f"--config {path}: has no docstring at its head that says what it is")
    return text
