"""Finds runs by what they compute, whatever their directories are called."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from wkd_jax import config as config_lib
from wkd_jax.training import metrics, workdir


@dataclasses.dataclass(frozen=True)
class Found:
    """A work directory that holds a run.

    Attributes:
      workdir: Where it is.
      config: What the run was made with, as JSON has it.
      result: What `result.json` holds; None while the run is unfinished.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None


def key(config: Mapping[str, Any], *, seeds: bool = True) -> str:
    """What a complete config computes, as text: equal for equal runs. A config read back from JSON gives the same.

    Args:
      config: Resolved, or of a run's `config.json` or `result.json`.
      seeds: False leaves out the seed, and those of the runs that make the teacher.

    Example:
      >>> left, right = (
      ...     config_lib.resolve({"data": {"name": "digits"}, "student": {"name": "resnet8"}, "seed": seed})
      ...     for seed in (0, 1)
      ... )
      >>> key(left) == key(right), key(left, seeds=False) == key(right, seeds=False)
      (False, True)
    """
    return json.dumps(identity(config, seeds=seeds), sort_keys=True)


def identity(config: Mapping[str, Any], *, seeds: bool = True) -> dict[str, Any]:
    """`config.identity`, with or without the seeds; see `key`."""
    kept = config_lib.identity(config)
    node: dict[str, Any] | None = None if seeds else kept
    while node:
        node.pop("seed")
        node = node["teacher"] and node["teacher"]["train"]
    return kept


def read(directory: pathlib.Path) -> Found | None:
    """The run in a directory; None if there is none.

    Raises:
      ValueError: If a file of it is damaged, or not of a run of this version; names the file.
    """
    result, config = directory / workdir.RESULT, directory / workdir.CONFIG
    path = result if result.exists() else config
    if not path.exists():
        return None
    content = workdir.read_json(path)
    try:
        found = Found(directory, content["config"], content) if path == result else Found(directory, content, None)
        key(found.config), found.config["name"], found.config["seed"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not of a run of this version ({error!r})") from error
    return found


def search(roots: Iterable[pathlib.Path], passed_over: Callable[[str], None]) -> list[Found]:
    """The runs in these directories, which may be work directories themselves, and one level below; each once.

    Args:
      roots: Those that do not exist are empty.
      passed_over: Told of every run that cannot be read.

    Returns:
      In the order of the roots, and of names within each.
    """
    places: dict[pathlib.Path, pathlib.Path] = {}
    for root in filter(pathlib.Path.is_dir, roots):
        for place in (root, *sorted(filter(pathlib.Path.is_dir, root.iterdir()))):
            places.setdefault(place.resolve(), place)
    found = []
    for place in places.values():
        try:
            found.append(read(place))
        except (ValueError, OSError) as error:
            passed_over(f"passed over: {error}")
    return [run for run in found if run]


def step_milliseconds(directory: pathlib.Path) -> float | None:
    """How long a training step took, in milliseconds of wall time; None if the log is too short to tell.

    Raises:
      ValueError: If the log is damaged.
    """
    path = directory / metrics.FILE
    return _step_milliseconds(metrics.read(path)) if path.exists() else None


def _step_milliseconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The median over the stretches between logged steps, without those that an evaluation falls into.

    Compilation comes before the first logged step, so no stretch has it.

    Example:
      >>> train = [{"kind": "train", "step": step, "time": time} for step, time in ((10, 60.0), (20, 62.0), (30, 65.0))]
      >>> _step_milliseconds(train), _step_milliseconds([*train, {"kind": "eval", "step": 20, "time": 62.9}])
      (250.0, 200.0)
    """
    train = [line for line in lines if line["kind"] == "train"]
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    stretches = [
        1000 * (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in zip(train, train[1:], strict=False)
        if not any(before["step"] <= step < after["step"] for step in evaluated)
    ]
    return statistics.median(stretches) if stretches else None
