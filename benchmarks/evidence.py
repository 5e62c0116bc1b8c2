"""Does WKD help? Ten methods, three trials each, five seeds, images that a CPU can train on: docs/evidence.md.

    python -m benchmarks.evidence run fashion_500 fashion_all digits_100 digits_all
    python -m benchmarks.evidence run fashion_500_interrelation fashion_500_why
    python -m benchmarks.evidence table

`run` makes the runs of each setting with the package's own loop, in `runs/`, and goes on where it was stopped. Of each
row, the trials are trained without the test images and evaluated on the validation images, one seed; the trial with the
highest top-1 (the first of equals) is then trained on the whole training split with seeds 0 to 4 and evaluated on the
test images. The result is the last evaluation, not the best. Results go to `benchmarks/results/evidence_*.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from wkd_jax import config as config_lib
from wkd_jax import config_file, interrelation, main
from wkd_jax.report import text
from wkd_jax.report.compare import mean_spread

RESULTS = pathlib.Path(__file__).parent / "results"
SEEDS = range(5)
METHODS = ("none", "kd", "dkd", "nkd", "dist", "fitnet", "rkd", "wkd_l", "wkd_f", "wkd_l+wkd_f")
# One evaluation, at the end.
SHARED = ("eval_every=1000", "checkpoint_every=1000")
# What of a method's settings is its strength.
STRENGTH = {
    "kd": ("weight",),
    "dkd": ("alpha", "beta"),
    "nkd": ("gamma",),
    "dist": ("weight",),
    "fitnet": ("weight",),
    "rkd": ("distance_weight", "angle_weight"),
    "wkd_l": ("weight",),
    "wkd_f": ("weight",),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A data set and how much of it the student gets.

    Attributes:
      title: Of its table.
      config: Of --config, without method, seed and split.
      rows: Name -> (method, overrides).
      baselines: Rows that all others are compared with.
      factors: Of a row's loss weights, as the config file has them, a trial each; of `none`, of its learning rate.
    """

    title: str
    config: str
    rows: Mapping[str, tuple[str, tuple[str, ...]]]
    baselines: tuple[str, ...]
    factors: tuple[float, ...] = (0.3, 1.0, 3.0)


_ROWS = {method: (method, ()) for method in METHODS}
_CONFIGS = {
    "fashion_500": ("Fashion-MNIST, 500 labelled images", "fashion_wkd:train_images=500"),
    "fashion_all": ("Fashion-MNIST, all 60,000 images", "fashion_wkd"),
    "digits_100": ("Digits, 100 labelled images", "digits_wkd:pair=r8_half,train_images=100"),
    "digits_all": ("Digits, all 1,297 images", "digits_wkd:pair=r8_half"),
}
SETTINGS = {name: Setting(title, config, _ROWS, ("none", "kd")) for name, (title, config) in _CONFIGS.items()}

# WKD-L with class similarities of several kinds, at one mean distance of the classes: costs of one size.
_KINDS = {
    "cka (the paper's)": ("kind=cka", "features=logits"),
    "uniform": ("kind=uniform",),
    "cosine, centred": ("kind=cosine", "centred=True", "features=pooled"),
    "gaussian": ("kind=gaussian", "features=pooled"),
    "confusion": ("kind=confusion", "features=logits"),
    "logit_correlation": ("kind=logit_correlation", "features=logits"),
    "classifier, centred": ("kind=classifier", "centred=True"),
    "logit_correlation, shuffled": ("file=shuffled",),  # the same values, between other classes
}
SETTINGS["fashion_500_interrelation"] = Setting(
    f"{_CONFIGS['fashion_500'][0]}: WKD-L by kind of class similarity",
    _CONFIGS["fashion_500"][1],
    {
        row: ("wkd_l", ("interrelation.mean_distance=0.9", *(f"interrelation.{item}" for item in items)))
        for row, items in _KINDS.items()
    },
    ("cka (the paper's)", "uniform"),
)

# Exploratory, after the first table: the largest weight won, it falls to 0, ten iterations forgive small gaps.
SETTINGS["fashion_500_why"] = Setting(
    f"{_CONFIGS['fashion_500'][0]}: what holds WKD-L back",
    _CONFIGS["fashion_500"][1],
    {
        "wkd_l": ("wkd_l", ()),
        "wkd_l, constant weight": ("wkd_l", ("methods.wkd_l.schedule.name=constant",)),
        "wkd_l, 50 iterations": ("wkd_l", ("methods.wkd_l.num_iters=50",)),
        "wkd_l, temperature 2": ("wkd_l", ("methods.wkd_l.temperature=2.0",)),
        "kd, falling weight": ("kd", ("methods.kd.schedule.name=cosine", "methods.kd.schedule.start=0")),
    },
    ("wkd_l",),
    factors=(1.0, 3.0, 10.0),
)
# Named after the table above and before it was made: whether that holds on another data set.
SETTINGS["digits_100_why"] = Setting(
    f"{_CONFIGS['digits_100'][0]}: what holds WKD-L back",
    _CONFIGS["digits_100"][1],
    {
        "wkd_l": ("wkd_l", ()),
        "wkd_l, 50 iterations": ("wkd_l", ("methods.wkd_l.num_iters=50",)),
        "wkd_l, 50 iterations, constant weight": (
            "wkd_l",
            ("methods.wkd_l.num_iters=50", "methods.wkd_l.schedule.name=constant"),
        ),
    },
    ("wkd_l",),
)


def trials(setting: Setting, row: str) -> list[tuple[str, ...]]:
    """The overrides of each trial of a row."""
    method, shared = setting.rows[row]
    raw = config_file.read_config(_argument(setting, method, 0, "test"))
    out = []
    for factor in setting.factors:
        if method == "none":
            changed = {"optimizer.learning_rate": raw["optimizer"]["learning_rate"] * factor}
        else:
            weights = {(name, key): raw["methods"][name][key] for name in method.split("+") for key in STRENGTH[name]}
            changed = {f"methods.{name}.{key}": value * factor for (name, key), value in weights.items()}
        out.append((*shared, *(f"{key}={value:.6g}" for key, value in changed.items())))
    return out


def run(name: str) -> None:
    """Makes all runs of a setting, and writes its results down after each row."""
    setting, path = SETTINGS[name], RESULTS / f"evidence_{name}.json"
    done = json.loads(path.read_text())["rows"] if path.exists() else {}
    for row, (method, _) in setting.rows.items():
        tries = {"; ".join(trial): trial for trial in trials(setting, row)}
        if row in done and [*done[row]["validation"]] == [*tries]:
            continue
        tried = {name: _top1(setting, method, 0, "validation", trial) for name, trial in tries.items()}
        chosen = max(tried, key=tried.__getitem__)
        results = [_result(setting, method, seed, "test", chosen.split("; ")) for seed in SEEDS]
        done[row] = {
            "validation": tried,
            "chosen": chosen,
            "test": [result["student_top1"] for result in results],
            "agreement": [result.get("agreement") for result in results],
            "teacher": results[0].get("teacher_top1"),
            "made_with": _made_with(),
        }
        record = {"title": setting.title, "config": setting.config, "rows": done}
        path.write_text(json.dumps(record, indent=1) + "\n")


def table(name: str) -> str:
    """A setting's table: mean and standard error over seeds, and differences paired by seed."""
    record = json.loads((RESULTS / f"evidence_{name}.json").read_text())
    rows, baselines = record["rows"], [row for row in SETTINGS[name].baselines if row in record["rows"]]
    head = ["row", "test top-1, %", *(f"minus {row}" for row in baselines), "agreement, %", "chosen", "validation, %"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, found in rows.items():
        differences = [
            _mean_error([a - b for a, b in zip(found["test"], rows[other]["test"], strict=True)], signed=True)
            if row != other
            else "-"
            for other in baselines
        ]
        agreement = "-" if None in found["agreement"] else f"{statistics.fmean(found['agreement']):.1f}"
        tried = " / ".join(f"{value:.1f}" for value in found["validation"].values())
        cells = [
            f"`{row}`",
            _mean_error(found["test"]),
            *differences,
            agreement,
            f"`{_short(found['chosen'], SETTINGS[name].rows[row][1])}`{_edge(found)}",
            tried,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    teachers = {found["teacher"] for found in rows.values() if found["teacher"] is not None}
    teacher = ", ".join(f"{value:.2f}" for value in sorted(teachers))
    made_with = " ".join(dict.fromkeys(found["made_with"] for found in rows.values()))
    return f"### {record['title']}\n\nTeacher {teacher} %. {made_with}\n\n" + "\n".join(lines) + "\n"


def _mean_error(values: Sequence[float], *, signed: bool = False) -> str:
    mean, spread = mean_spread(values)
    assert mean is not None and spread is not None
    error = f" ± {spread / math.sqrt(len(values)):.2f}"
    return (text.signed(mean) if signed else text.fixed(mean)) + error


def _edge(found: Mapping[str, Any]) -> str:
    """Says that the best trial was the weakest or the strongest, so that the optimum may lie beyond."""
    where = [*found["validation"]].index(found["chosen"])
    return {0: " (lowest)", len(found["validation"]) - 1: " (highest)"}.get(where, "")


def _short(overrides: str, shared: Sequence[str]) -> str:
    """What a trial sets, without what all trials of its row have and without the sections that the row's name says."""
    own = "; ".join(item for item in overrides.split("; ") if item not in shared)
    return own.replace("methods.", "").replace("optimizer.", "")


def _top1(setting: Setting, method: str, seed: int, split: str, overrides: Sequence[str]) -> float:
    return float(_result(setting, method, seed, split, overrides)["student_top1"])


def _result(setting: Setting, method: str, seed: int, split: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The result of a run, which is made if it is not there."""
    if "interrelation.file=shuffled" in overrides:
        shuffled = _shuffled(split)
        overrides = [f"interrelation.file={shuffled}" if item.endswith("=shuffled") else item for item in overrides]
    config = config_file.load_config(_argument(setting, method, seed, split), (*overrides, *SHARED))
    directory = config_lib.default_workdir(config)
    if not (directory / "result.json").exists():
        started = time.monotonic()
        main.make(config, directory)
        sys.stderr.write(f"{setting.title}: {method} {seed} {split} {overrides}: {time.monotonic() - started:.0f} s\n")
        jax.clear_caches()  # hundreds of runs in one process
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


def _shuffled(split: str) -> pathlib.Path:
    """A file of distances: those of the row before it, with the classes exchanged.

    They are of the split's teacher, whatever the trial, so they are taken from a run that the row has made already.
    """
    name, row = "fashion_500_interrelation", "logit_correlation"
    setting = SETTINGS[name]
    found = json.loads((RESULTS / f"evidence_{name}.json").read_text())["rows"][row]
    trial = found["chosen"].split("; ")
    config = config_file.load_config(_argument(setting, "wkd_l", 0, split), (*trial, *SHARED))
    run, path = config_lib.default_workdir(config), pathlib.Path("runs") / f"shuffled_{split}.npy"
    order = np.array([2, 4, 7, 1, 3, 0, 9, 5, 6, 8])  # tops, shoes, trousers and bags change places
    np.save(path, 1 - interrelation.load(run / "interrelation.npz").similarity[np.ix_(order, order)])
    return path


def _argument(setting: Setting, method: str, seed: int, split: str) -> str:
    path, _, given = setting.config.partition(":")
    return f"{path}:{','.join(filter(None, (given, f'method={method},seed={seed},split={split}')))}"


def _made_with() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    return f"{len(os.sched_getaffinity(0))} core(s), {jax.devices()[0].platform}, {versions}."


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    running = commands.add_parser("run", help="make the runs of some settings")
    running.add_argument("settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    commands.add_parser("table", help="print the tables of all settings that have results")
    args = parser.parse_args()
    if args.command == "run":
        for name in args.settings:
            run(name)
        return
    for name in SETTINGS:
        if (RESULTS / f"evidence_{name}.json").exists():
            print(table(name))


if __name__ == "__main__":
    _main()
