"""A detector and its student learn drawn shapes from the command line, with and without WKD. Takes half an hour."""

import json
import os
import pathlib
import subprocess
import sys

import drawn_coco
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = range(3)

CONFIG = """
from ml_collections import ConfigDict

WIDTHS = dict(teacher=dict(features=64, hidden=128), student=dict(features=24, hidden=48))

def get_config(argument):
    name, _, methods = argument.partition(",")
    config = dict(
        name=name, epochs=12 if name == "teacher" else 3, global_batch_size=8,
        data=dict(name="coco", data_dir="set", canvases=((96, 96), (96, 128), (128, 96)), train_short=(64, 80),
                  test_short=72, max_side=108, max_boxes=4, workers=0),
        task=dict(name="detection"),
        student=dict(
            name="faster_rcnn_r18", anchor_sizes=(16, 32, 64, 128, 256), pre_nms=(200, 200), post_nms=(100, 100),
            anchor_samples=64, region_samples=64, detections=20, freeze_at=0, roi_tap=7, **WIDTHS[name],
        ),
        optimizer=dict(name="adamw", learning_rate=5e-4, weight_decay=1e-4, clip_norm=5.0, schedule="cosine"),
        log_every=30, eval_every=12, checkpoint_every=1000,
    )
    if methods:
        config["teacher"] = dict(run="teacher")
        config["interrelation"] = dict(features="pooled")
        config["methods"] = dict(
            wkd_l=dict(weight=1.0, temperature=1.0, schedule=dict(name="constant")),
            wkd_f=dict(weight=5e-3, student_tap="roi", teacher_tap="roi", projector="conv3x3", grid=2,
                       schedule=dict(name="constant")),
        )
    return ConfigDict(config)
"""


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory):
    home = pathlib.Path(os.environ.get("WKD_JAX_DRAWN", "") or tmp_path_factory.mktemp("training"))
    drawn_coco.write_set(home / "set", train=240, test=80)
    (home / "config.py").write_text(CONFIG)
    return home


def trained(home, argument, directory, *overrides):
    """The result of a run."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "WKD_JAX_CACHE": str(home / "cache"),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(home / "jax")),
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
    }
    words = ["-m", "wkd_jax.main", "--config", f"config.py:{argument}", "--workdir", directory, *overrides]
    done = subprocess.run([sys.executable, *words], env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((home / directory / "result.json").read_text())


@pytest.mark.slow
def test_a_detector_learns_and_teaches(home):
    teacher = trained(home, "teacher", "teacher")
    sys.stdout.write(f"teacher AP {teacher['student_AP']:.2f}, AP50 {teacher['student_AP50']:.2f}\n")
    assert teacher["student_AP50"] >= 90
    found = {}
    for methods in ("", "wkd"):
        runs = [
            trained(home, f"student,{methods}", f"student_{methods}{seed}", f"--config.seed={seed}") for seed in SEEDS
        ]
        found[methods] = np.array([[run[name] for name in ("student_AP", "student_AP50")] for run in runs])
        sys.stdout.write(f"{methods or 'labels alone'}: AP, AP50 by seed {np.round(found[methods], 2).tolist()}\n")
    gain = found["wkd"][:, 0] - found[""][:, 0]
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    sys.stdout.write(f"gain in AP {gain.mean():.2f}, standard error {error:.2f}\n")
    assert gain.min() > 0 and gain.mean() > 3 * error
