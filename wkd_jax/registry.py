"""Finds models, methods, tasks and data sets by name. There is no central list to edit.

A plug-in is a module inside `wkd_jax/models`, `methods`, `tasks` or `data` that has `REGISTER`, a dict from public
name to factory. Methods and tasks are classes with `DEFAULTS`; models and data sets are functions, whose keyword
arguments are their settings. Dropping a file in is all it takes.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

KINDS = ("models", "methods", "tasks", "data")


@functools.cache
def entries(kind: str) -> dict[str, Callable[..., Any]]:
    """All registered factories of a kind, by name.

    Args:
      kind: "models", "methods", "tasks" or "data".

    Raises:
      ValueError: If two modules register the same name.

    Example:
      >>> [name for name in entries("methods") if name.startswith("wkd")]
      ['wkd_f', 'wkd_l']
    """
    package = importlib.import_module(f"wkd_jax.{kind}")
    found: dict[str, Callable[..., Any]] = {}
    owner: dict[str, str] = {}
    for module_info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for name, factory in getattr(module, "REGISTER", {}).items():
            if name in found:
                raise ValueError(f"{kind}: {name!r} is registered by {owner[name]} and again by {module_info.name}")
            found[name], owner[name] = factory, module_info.name
    return dict(sorted(found.items()))


def get(kind: str, name: str) -> Callable[..., Any]:
    """The factory registered under `name`.

    Raises:
      ValueError: If there is none; the message gives the nearest valid name and all of them.

    Example:
      >>> get("methods", "wkd_l").__name__
      'WKDLogit'
    """
    known = entries(kind)
    if name not in known:
        raise ValueError(unknown(f"{kind} name", name, known))
    return known[name]


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: what it is, the nearest valid one, and all valid ones.

    Example:
      >>> unknown("tap", "stage5", ["stage3", "stage4"])
      "unknown tap 'stage5': did you mean 'stage4'? Valid: stage3, stage4"
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}Valid: {', '.join(known) if known else '(none)'}"
