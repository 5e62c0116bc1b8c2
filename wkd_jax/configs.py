"""Command line: shows configs, those that come with the package and your own.

    python -m wkd_jax.configs                                 the built-in ones, a line each
    python -m wkd_jax.configs imagenet_wkd                    what one is: its arguments, published numbers, its file
    python -m wkd_jax.configs digits_wkd:method=kd --keys     every key of that run, as an override sets it

Arguments after the colon choose a row of the file. An override changes any key of what that gives:
`--config.optimizer.learning_rate=0.1`, and so on into sections; values are Python literals, and what is not one is a
string. To change more than a few keys, copy the file and give its path.

Exit codes: 0 done; 1 if there is no such config, or it or an override is not valid.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import shlex
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wkd_jax import config as config_lib
from wkd_jax import config_file, registry
from wkd_jax.command import Parser, overrides_of, spelt
from wkd_jax.methods import schedule


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.configs") -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "config", nargs="?", metavar="NAME-or-FILE", help="with its arguments after a colon; default: list the built-in"
    )
    parser.add_argument("--keys", action="store_true", help="print every key and its value, and what it means")
    args, rest = parser.parse_known_args(argv)
    overrides = overrides_of(parser, rest)
    if args.keys and not args.config:
        parser.error("--keys needs a config")
    if overrides and not args.keys:
        parser.error(f"--config.{overrides[0]}: has a meaning with --keys alone")
    try:
        if args.keys:
            text = "\n".join(_keys(config_file.load_config(args.config, overrides).to_dict()))
        elif args.config:
            path = config_file.find(args.config.partition(":")[0])
            text = f"{path}\n\n{spelt(config_file.about(path), prog)}"
        else:
            text = config_file.listing()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{text}\n")
    return 0


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    meanings = _meanings(config)
    for key, value in _flat(config, ""):
        line = f"--config.{key}={shlex.quote(_literal(value))}"
        meaning = textwrap.wrap(meanings.get(key, ""), 72) or [""]
        if meaning[0] and len(line) > 44:
            yield line
            line = ""
        yield f"{line:<45} # {meaning[0]}" if meaning[0] else line
        yield from (f"{'':<45} # {more}" for more in meaning[1:])


def _flat(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a config, and its empty sections, by dotted key."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _literal(value: Any) -> str:
    """A value as an override gives it: a string without quotes, unless it would be read as something else."""
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)


def _meanings(config: Mapping[str, Any]) -> dict[str, str]:
    """What the code says of each key: behind its default, or where a factory describes its arguments."""
    found: dict[str, str] = {}
    factories = {"data": ("data", config["data"]), "student": ("models", config["student"])}
    if config["teacher"] and config["teacher"]["model"]:
        factories["teacher.model"] = ("models", config["teacher"]["model"])
    for section, (kind, settings) in factories.items():
        found |= _under(section, _arguments(inspect.getdoc(registry.get(kind, settings["name"])) or ""))
    classes = {f"methods.{name}": registry.get("methods", name) for name in config["methods"]}
    classes["task"] = registry.get("tasks", config["task"]["name"])
    for section, owner in classes.items():
        found |= _under(f"{section}.schedule", _comments(inspect.getsource(schedule), "DEFAULTS"))
        found |= _under(section, _comments(inspect.getsource(owner), "DEFAULTS"))
    # Last, since what it says of a section's name is of more use than a factory's own word.
    source = inspect.getsource(config_lib)
    return found | _comments(source, "DEFAULTS") | _under("teacher", _comments(source, "_TEACHER"))


def _under(section: str, meanings: Mapping[str, str]) -> dict[str, str]:
    return {f"{section}.{key}": meaning for key, meaning in meanings.items()}


def _comments(source: str, name: str) -> dict[str, str]:
    """The comments behind the keys of the dict that a source assigns to a name, by dotted key."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}

    def walk(node: ast.Dict, path: str) -> Iterator[tuple[str, str]]:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                if key.lineno in behind:
                    yield f"{path}{key.value}", behind[key.lineno]
                if isinstance(value, ast.Dict):
                    yield from walk(value, f"{path}{key.value}.")

    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if [getattr(target, "id", None) for target in targets] == [name] and isinstance(node.value, ast.Dict):
            return dict(walk(node.value, ""))
    return {}


def _arguments(doc: str) -> dict[str, str]:
    """The arguments that a docstring describes."""
    section = re.search(r"^Args:\n((?:  .*\n|\n)*)", f"{doc}\n", re.MULTILINE)
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


if __name__ == "__main__":
    sys.exit(main())
