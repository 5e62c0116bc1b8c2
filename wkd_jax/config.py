"""Every setting of a run with its default, and the rules that turn a config file into a resolved config.

A config file is Python (`configs/`), returns an `ml_collections.ConfigDict`, and names only what it changes. `resolve`
fills in the rest, refuses what does not exist, and checks types and ranges, before anything is loaded or compiled.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from wkd_jax import registry

DEFAULTS: dict[str, Any] = {
    "name": "run",  # names the work directory and the report
    "seed": 0,  # of initialisation, data order and augmentation
    "epochs": 1,
    "steps": 0,  # of the whole run, in the place of epochs; 0: as many as epochs take
    "global_batch_size": 64,  # examples a step, over all devices
    "accumulation": 1,  # microbatches that a step is cut into, one after the other; BatchNorm sees one at a time
    "remat": False,  # recompute each stage's activations in the backward pass instead of keeping them
    "dtype": "float32",  # of activations: float32 or bfloat16; parameters and losses are float32
    "data": {"name": ""},  # a registered data set and its arguments
    "task": {"name": "classification"},
    "student": {"name": ""},  # a registered model and its arguments
    "init": {  # where the student starts
        "weights": "",  # a file of weights, as in teacher.weights; "": random values
        "reset_head": False,  # a new random classifier, whatever its class count in the file
    },
    "teacher": None,  # or {"run": directory}, {"train": config of the run that makes it} or {"weights": file}
    "methods": {},  # name -> the method's settings; several add up
    "interrelation": {  # class similarities of the teacher, for the methods that use them
        "kind": "cka",  # or cosine, classifier, gaussian, confusion, logit_correlation, uniform: docs/interrelations.md
        "centred": False,  # of cosine and classifier: subtract what all classes have in common first
        "temperature": 1.0,  # of confusion: softens the teacher's predictions
        "kernel": "linear",  # of cka: linear, polynomial or rbf
        "degree": 2,  # of the polynomial kernel
        "bandwidth": 0.4,  # of the rbf kernel: alpha in exp(-d^2 / (2 alpha^2 median d^2))
        "features": "logits",  # logits, pooled, or the name of a tap (all its positions)
        "samples_per_class": 0,  # 0: as many as the smallest class has
        "file": "",  # an interrelation made elsewhere, instead of computing one
        "mean_distance": 0.0,  # scales 1 - similarity to this mean over pairs of classes; 0: as it is
        "groups": (),  # a name for each class, in their order: which classes belong together, for the report alone
    },
    "optimizer": {
        "name": "sgd",  # sgd or adamw
        "learning_rate": 0.1,
        "momentum": 0.9,  # sgd
        "nesterov": True,  # sgd
        "b1": 0.9,  # adamw
        "b2": 0.999,  # adamw
        "eps": 1e-8,  # adamw
        "weight_decay": 0.0,
        "decay_rules": (),  # ((regex of parameter path, factor), ...): the first match scales weight_decay
        "clip_norm": 0.0,  # global gradient norm; 0: no clipping
        "schedule": "constant",  # constant, step or cosine
        "unit": "epochs",  # of milestones and warmup: epochs or steps
        "milestones": (),  # step: the rate falls after each of these
        "factor": 0.1,  # step: by this factor
        "end_learning_rate": 0.0,  # cosine: the rate it ends with
        "warmup": 0.0,  # length of a linear warm-up, in place of the schedule's beginning
        "warmup_learning_rate": 0.0,  # the rate it starts from
        "per_epoch": False,  # cosine and warm-up: the rate changes from epoch to epoch, not from step to step
    },
    "ema": 0.0,  # decay of the student's moving average; 0: off. Evaluation then uses the average.
    "mesh": {"data": -1, "model": 1},  # devices along each axis; -1: all that are left
    "sharding": (),  # ((regex of path, partition spec as a tuple), ...); what matches nothing is replicated
    "log_every": 10,  # steps between logged training metrics
    "eval_every": 1,  # epochs between evaluations
    "checkpoint_every": 100,  # steps between checkpoints
    "keep": 2,  # recent checkpoints kept, besides the best
    "profile": 0,  # steps of each session that are traced, from the eleventh on, into the run's profile/
}

_TEACHER = {  # exactly one of run, train and weights
    "run": "",  # directory of a finished run
    "train": None,  # config of the run that makes it
    "weights": "",  # path, https or gs URL, or a name of `python -m wkd_jax.weights list`
    "which": "latest",  # of run and train: latest or best checkpoint
    "model": {},  # of weights: a registered model and its arguments; {}: as the file says
    "normalisation": {},  # of weights: {"mean": (r, g, b), "std": ...}; {}: as the file says, or else the data set's
    "perturb_statistics": False,  # shift its BatchNorm statistics once, as the released code does before WKD-F
}

# What may change when a run goes on: where and how it runs, not what it computes. No part of its identity.
OPERATIONAL = (
    "mesh",
    "sharding",
    "remat",
    "log_every",
    "checkpoint_every",
    "keep",
    "profile",
    "interrelation.groups",
    "data.data_dir",
    "data.workers",
    "data.max_bad_images",
)

_KINDS = ("cka", "cosine", "classifier", "gaussian", "confusion", "logit_correlation", "uniform")  # of interrelation
_OF_LOGITS = ("confusion", "logit_correlation")

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda x: re.fullmatch(r"[\w.+-]*\w", x) is not None, "letters, digits and . + - _ alone"),
    "epochs": (lambda x: x > 0, "above 0"),
    "steps": (lambda x: x >= 0, "0 or more"),
    "global_batch_size": (lambda x: x > 0, "above 0"),
    "accumulation": (lambda x: x > 0, "above 0"),
    "seed": (lambda x: 0 <= x < 2**31, "from 0 to 2**31 - 1"),
    "dtype": (lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
    "ema": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "log_every": (lambda x: x > 0, "above 0"),
    "eval_every": (lambda x: x > 0, "above 0"),
    "checkpoint_every": (lambda x: x > 0, "above 0"),
    "keep": (lambda x: x > 0, "above 0"),
    "profile": (lambda x: x >= 0, "0 or more"),
    "optimizer.name": (lambda x: x in ("sgd", "adamw"), "sgd or adamw"),
    "optimizer.learning_rate": (lambda x: x > 0, "above 0"),
    "optimizer.momentum": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "optimizer.b1": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "optimizer.b2": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "optimizer.eps": (lambda x: x > 0, "above 0"),
    "optimizer.weight_decay": (lambda x: x >= 0, "0 or more"),
    "optimizer.clip_norm": (lambda x: x >= 0, "0 or more"),
    "optimizer.schedule": (lambda x: x in ("constant", "step", "cosine"), "constant, step or cosine"),
    "optimizer.factor": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    "optimizer.end_learning_rate": (lambda x: x >= 0, "0 or more"),
    "optimizer.unit": (lambda x: x in ("epochs", "steps"), "epochs or steps"),
    "optimizer.warmup": (lambda x: x >= 0, "0 or more"),
    "optimizer.warmup_learning_rate": (lambda x: x >= 0, "0 or more"),
    "interrelation.kind": (lambda x: x in _KINDS, f"one of {', '.join(_KINDS)}"),
    "interrelation.temperature": (lambda x: x > 0, "above 0"),
    "interrelation.kernel": (lambda x: x in ("linear", "polynomial", "rbf"), "linear, polynomial or rbf"),
    "interrelation.degree": (lambda x: x > 0, "above 0"),
    "interrelation.bandwidth": (lambda x: x > 0, "above 0"),
    "interrelation.samples_per_class": (lambda x: x == 0 or x > 1, "0 or at least 2"),
    "interrelation.mean_distance": (lambda x: 0 <= x < math.inf, "0 or more"),
    "interrelation.groups": (lambda x: all(isinstance(name, str) for name in x), "a name for each class"),
    "mesh.data": (lambda x: x == -1 or x > 0, "-1 or above 0"),
    "mesh.model": (lambda x: x == -1 or x > 0, "-1 or above 0"),
    "teacher.which": (lambda x: x in ("latest", "best"), "latest or best"),
}

# Arguments that the run itself hands to a model's factory.
_MODEL_ARGUMENTS = ("num_classes", "dtype", "rngs")


def resolve(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Fills in every default, refuses unknown keys, checks types and ranges.

    Args:
      config: What a config file returned: any subset of `DEFAULTS`, of the arguments of the chosen data set and
        models, and of the chosen methods' and task's `DEFAULTS`.

    Returns:
      The complete config, locked.

    Raises:
      ValueError: Names the key and its value, and the nearest valid key or the valid range.

    Example:
      >>> config = resolve({"data": {"name": "digits"}, "student": {"name": "resnet8"}, "task": {"pad": 2}})
      >>> config.task.pad, config.task.flip, config.optimizer.momentum
      (2, False, 0.9)
    """
    return ml_collections.ConfigDict(_resolve(_plain(config), ""), type_safe=False).lock()


def interrelation(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `interrelation` section with every default, checked as `resolve` does.

    Args:
      given: Any subset of its keys.

    Raises:
      ValueError: Names the key and its value, and the nearest valid key or the valid range.

    Example:
      >>> interrelation({"kind": "gaussian", "features": "pooled"})["samples_per_class"]
      0
    """
    merged = _merge(DEFAULTS["interrelation"], _plain(given), "interrelation.")
    for key in _RANGES:
        if key.startswith("interrelation."):
            _check_range({"interrelation": merged}, key, "")
    _check_interrelation(merged, "")
    return merged


def _resolve(given: dict[str, Any], path: str) -> dict[str, Any]:
    sections = {"data", "task", "student", "teacher", "methods"}
    for key in sections & given.keys():
        if given[key] is not None and not isinstance(given[key], Mapping):
            raise ValueError(f"{path}{key}={given[key]!r}: needs a section, such as {path}{key}.name")
    merged = _merge({k: v for k, v in DEFAULTS.items() if k not in sections}, given, path, allow=sections)
    merged["data"] = _plugin("data", given.get("data"), f"{path}data")
    merged["student"] = model_section(given.get("student"), f"{path}student")
    merged["task"] = _plugin("tasks", {**DEFAULTS["task"], **(given.get("task") or {})}, f"{path}task")
    methods = given.get("methods") or {}
    merged["methods"] = {
        name: _merge(registry.get("methods", name).DEFAULTS, settings or {}, f"{path}methods.{name}.")
        for name, settings in sorted(methods.items())
    }
    merged["teacher"] = _teacher(given.get("teacher"), f"{path}teacher.")
    needing = [name for name in methods if registry.get("methods", name).NEEDS_TEACHER]
    if needing and merged["teacher"] is None:
        raise ValueError(
            f"{path}methods: {', '.join(needing)} cannot do without a teacher, and {path}teacher is None: "
            "set teacher.run to a run directory, or teacher.train to the config of a run that makes one"
        )
    _check_ranges(merged, path)
    return {key: merged[key] for key in DEFAULTS}


def _teacher(given: dict[str, Any] | None, path: str) -> dict[str, Any] | None:
    if given is None:
        return None
    merged = _merge(_TEACHER, given, path, allow={"train"})
    sources = {key: merged[key] if key != "train" else given.get(key) for key in ("run", "train", "weights")}
    if sum(map(bool, sources.values())) != 1:
        raise ValueError(
            f"{path}run={merged['run']!r}, {path}weights={merged['weights']!r}: set exactly one of {path}run, "
            f"{path}train and {path}weights (None and '' switch the others off)"
        )
    merged["train"] = _resolve(given["train"], f"{path}train.") if given.get("train") else None
    useless = ("which",) if merged["weights"] else ("model", "normalisation")
    for key in useless:
        if merged[key] != _TEACHER[key]:
            source = "run and train" if merged["weights"] else "weights"
            raise ValueError(f"{path}{key}={merged[key]!r}: has a meaning with {path}{source} alone")
    if merged["model"]:
        if not isinstance(merged["model"], Mapping):
            raise ValueError(f"{path}model={merged['model']!r}: needs a section, such as {{'name': 'resnet34'}}")
        merged["model"] = model_section(merged["model"], f"{path}model")
    if merged["normalisation"]:
        merged["normalisation"] = _normalisation(merged["normalisation"], f"{path}normalisation")
    return merged


def _normalisation(given: Any, path: str) -> dict[str, tuple[float, ...]]:
    names = ("mean", "std")
    valid = isinstance(given, Mapping) and {*given} == {*names}
    if not valid or not all(isinstance(given[k], list | tuple) and len(given[k]) == 3 for k in names):
        raise ValueError(f"{path}={given!r}: needs a mean and a std, each three numbers, in units of the full range")
    numbers = [*given["mean"], *given["std"]]
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers) or min(numbers[3:]) <= 0:
        raise ValueError(f"{path}={given!r}: needs finite numbers, and every std above 0")
    return {name: tuple(float(x) for x in given[name]) for name in names}


def model_section(given: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """A registered model's name and arguments, with every default.

    Args:
      given: {"name": ..., arguments}.
      path: Of the section, for messages.

    Raises:
      ValueError: If there is no such model, or it has no such argument, or not of that type.

    Example:
      >>> model_section({"name": "resnet8", "norm_group_size": None}, "student")
      {'name': 'resnet8', 'norm_group_size': None}
    """
    return _plugin("models", given, path, reserved=_MODEL_ARGUMENTS)


def _plugin(kind: str, given: Mapping[str, Any] | None, path: str, reserved: tuple[str, ...] = ()) -> dict[str, Any]:
    """Defaults of a registered factory: its `DEFAULTS`, or the keyword arguments of its signature."""
    given = given or {}
    name = given.get("name")
    if not name:
        raise ValueError(f"{path}.name is not set. Valid: {', '.join(registry.entries(kind))}")
    factory = registry.get(kind, name)
    defaults = getattr(factory, "DEFAULTS", None)
    if defaults is None:
        parameters = inspect.signature(factory).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.name not in reserved}
        missing = [key for key, value in defaults.items() if value is inspect.Parameter.empty and key not in given]
        if missing:
            raise ValueError(f"{path}.{missing[0]} is not set, and {name} needs it")
        defaults = {key: given[key] if value is inspect.Parameter.empty else value for key, value in defaults.items()}
    return {"name": name, **_merge(defaults, {k: v for k, v in given.items() if k != "name"}, f"{path}.")}


def _merge(defaults: Mapping[str, Any], given: Mapping[str, Any], path: str, allow: set[str] = frozenset()) -> dict:  # type: ignore[assignment]
    """`defaults` with `given` on top. Keys in `allow` are left for the caller."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{path.rstrip('.')}={given!r}: needs a section with keys {', '.join(defaults)}")
    for key in given:
        if key not in defaults and key not in allow:
            known = [*defaults, *sorted(set(allow) - set(defaults))]
            raise ValueError(f"config {path}{key}: {registry.unknown('key', key, known)}")
    merged = {}
    for key, default in defaults.items():
        if key not in given:
            merged[key] = _plain(default)
        elif isinstance(default, Mapping) and default:
            merged[key] = _merge(default, given[key], f"{path}{key}.")
        else:
            merged[key] = _typed(given[key], default, f"{path}{key}")
    return merged


def _typed(value: Any, default: Any, path: str) -> Any:
    """`value` in the type of `default`. An int serves as a float; nothing else is converted."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is None or isinstance(default, Mapping):
        return value
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if type(value) is not type(default):
        raise ValueError(f"{path}={value!r}: needs {type(default).__name__}, not {type(value).__name__}")
    return value


def _check_range(config: Mapping[str, Any], key: str, path: str) -> None:
    valid, text = _RANGES[key]
    value: Any = config
    for part in key.split("."):
        value = value[part] if value is not None else None
    if value is not None and not valid(value):
        raise ValueError(f"{path}{key}={value!r}: must be {text}")


def _check_ranges(config: Mapping[str, Any], path: str) -> None:
    for key in _RANGES:
        _check_range(config, key, path)
    _check_interrelation(config["interrelation"], path)
    rules = {"optimizer.decay_rules": config["optimizer"]["decay_rules"], "sharding": config["sharding"]}
    for key, pairs in rules.items():
        if any(not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) for pair in pairs):
            raise ValueError(f"{path}{key}={pairs!r}: needs pairs of a regular expression and its value")
        for pattern, _ in pairs:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path}{key}: {pattern!r} is not a regular expression: {error}") from error
    if config["init"]["reset_head"] and not config["init"]["weights"]:
        raise ValueError(f"{path}init.reset_head=True: has a meaning with {path}init.weights alone")
    if config["global_batch_size"] % config["accumulation"]:
        raise ValueError(
            f"{path}accumulation={config['accumulation']}: must divide {path}global_batch_size="
            f"{config['global_batch_size']}"
        )
    if config["steps"] and config["epochs"] != DEFAULTS["epochs"]:
        raise ValueError(
            f"{path}steps={config['steps']}, {path}epochs={config['epochs']}: both are the run's length; leave one out"
        )
    milestones = config["optimizer"]["milestones"]
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in milestones):
        raise ValueError(f"{path}optimizer.milestones={milestones!r}: needs numbers of {config['optimizer']['unit']}")


def _check_interrelation(section: Mapping[str, Any], path: str) -> None:
    if section["kind"] in _OF_LOGITS and section["features"] != "logits" and not section["file"]:
        raise ValueError(
            f"{path}interrelation.features={section['features']!r}: kind={section['kind']!r} is of the teacher's "
            "predictions: set it to 'logits', or choose another kind"
        )


def _plain(value: Any) -> Any:
    """Nested plain dicts and tuples out of ConfigDicts, lists and mappings."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def to_json(config: Mapping[str, Any]) -> str:
    """The config as JSON, keys in their own order: what is written next to every run."""
    return json.dumps(_plain(config), indent=2) + "\n"


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without its `OPERATIONAL` keys, its teacher's included: what a run computes.

    Example:
      >>> config = resolve({"data": {"name": "digits"}, "student": {"name": "resnet8"}})
      >>> "seed" in identity(config), "mesh" in identity(config)
      (True, False)
    """
    kept = _plain(config)
    for key in OPERATIONAL:
        *sections, leaf = key.split(".")
        node = kept
        for section in sections:
            node = node[section]
        node.pop(leaf, None)
    if kept["teacher"] and kept["teacher"]["train"]:
        kept["teacher"]["train"] = identity(kept["teacher"]["train"])
    return kept


def digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits that name what a resolved config computes."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def default_workdir(config: Mapping[str, Any], root: str = "runs") -> pathlib.Path:
    """Where a run lives when no directory is given: the same config finds its own earlier work."""
    return pathlib.Path(root) / f"{config['name']}-{digest(config)}"


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """The keys on which two resolved configs differ, as "key: left -> right".

    Example:
      >>> differences({"seed": 0, "mesh": {"data": 1}}, {"seed": 1, "mesh": {"data": 1}})
      ['seed: 0 -> 1']
    """
    left, right = _plain(left), _plain(right)
    if isinstance(left, dict) and isinstance(right, dict):
        return [
            line
            for key in [*left, *(k for k in right if k not in left)]
            for line in differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if left == right else [f"{path}: {left!r} -> {right!r}"]
