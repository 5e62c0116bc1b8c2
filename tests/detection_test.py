"""Detection from the command line: a drawn COCO set, a detector as teacher, its student with WKD-L and WKD-F."""

import json

import drawn_coco
import jax
import numpy as np
import pytest
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax import config_file, main, registry, weights
from wkd_jax.models import functional
from wkd_jax.training import build, checkpoint, metrics, preemption, teacher, workdir
from wkd_jax.types import Normalisation

CLASSES = 4  # three shapes and the background
NET = {
    "features": 16, "hidden": 32, "anchor_sizes": (16, 32, 64, 128, 256), "pre_nms": (60, 60), "post_nms": (40, 40),
    "anchor_samples": 32, "region_samples": 16, "detections": 10, "freeze_at": 0, "roi_tap": 7,
}  # fmt: skip

CONFIG = """
from ml_collections import ConfigDict

NET = {net}

def get_config(argument):
    config = dict(
        name="drawn", steps=6, global_batch_size=8,
        data=dict(name="coco", data_dir="{home}/set", canvases=((64, 64), (64, 96)), train_short=(48, 64),
                  test_short=64, max_side=96, max_boxes=4, workers=0),
        task=dict(name="detection"),
        student=dict(name="faster_rcnn_r18", **NET),
        teacher=dict(weights="{home}/teacher"),
        methods=dict(
            wkd_l=dict(weight=1.0, temperature=1.0, schedule=dict(name="constant")),
            wkd_f=dict(weight=5e-3, student_tap="roi", teacher_tap="roi", projector="conv1x1", grid=2,
                       schedule=dict(name="constant")),
        ),
        interrelation=dict(features="pooled", samples_per_class=3),
        optimizer=dict(learning_rate=0.002, nesterov=False, schedule="step", unit="steps", milestones=(4,), warmup=2.0),
        log_every=1, eval_every=1, checkpoint_every=100,
    )
    if argument == "alone":
        config["teacher"], config["methods"] = None, dict()
    return ConfigDict(config)
"""


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory):
    home = tmp_path_factory.mktemp("detection")
    drawn_coco.write_set(home / "set", train=24, test=6, sizes=((64, 64), (64, 96)), sides=(16, 40))
    (home / "config.py").write_text(CONFIG.format(home=home, net=NET))
    network = registry.get("models", "faster_rcnn_r18")(CLASSES, **NET, rngs=nnx.Rngs(1))
    _, params, variables, _ = functional.split(network)
    arrays = {name: np.asarray(value) for name, value in {**params, **variables}.items()}
    arrays["box_head/cls_score/kernel"] = 30 * arrays["box_head/cls_score/kernel"]  # that it has something to say
    weights.write(home / "teacher", arrays, {"name": "faster_rcnn_r18", **NET}, Normalisation((0.3,) * 3, (0.2,) * 3))
    return home


def run(home, directory, *overrides, argument=""):
    return main.main(["--config", f"{home / 'config.py'}:{argument}", "--workdir", str(directory), *overrides])


def test_a_short_run_without_a_teacher(home, tmp_path):
    overrides = ["--config.data.canvases=((64, 96),)", "--config.steps=3", "--config.optimizer.milestones=(2,)"]
    assert run(home, tmp_path / "run", *overrides, argument="alone") == 0
    result = json.loads((tmp_path / "run" / workdir.RESULT).read_text())
    assert result["steps"] == 3 and 0 <= result["student_AP"] <= 100 and result["teacher_AP"] is None
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in report and all(f">{name}" in report for name in ("AP50", "rectangle", "ellipse", "triangle"))


@pytest.fixture(scope="module", name="whole")
def _whole(home):
    """An undisturbed run, and how often each step was compiled."""
    steps, make = [], build.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "train_step", lambda made: steps.append(make(made)) or steps[-1])
        assert run(home, home / "whole") == 0
    return home / "whole", [step._cache_size() for step in steps]


@pytest.mark.slow
def test_a_run_and_what_it_leaves(whole):
    directory, compilations = whole
    assert compilations == [2]  # one a canvas
    result = json.loads((directory / workdir.RESULT).read_text())
    assert result["steps"] == 6 and result["num_classes"] == CLASSES
    assert 0 <= result["student_AP"] <= 100 and result["best"].keys() == {"student_AP", "step"}
    lines = list(metrics.read(directory / "metrics.jsonl"))
    train = [line for line in lines if line["kind"] == "train"]
    assert [round(line["learning_rate"], 6) for line in train] == [0.0, 0.001, 0.002, 0.002, 0.0002, 0.0002]
    terms = ("rpn_objectness", "rpn_box", "roi_class", "roi_box")
    assert all(line[f"label/{name}"] > 0 for line in train for name in terms)
    assert all(line["wkd_l/wasserstein"] > 0 and line["wkd_f/mean"] > 0 for line in train)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6]
    evaluation = json.loads((directory / workdir.EVALUATION).read_text())
    assert len(evaluation["student_AP_by_class"]) == len(evaluation["class_names"]) == CLASSES - 1
    with np.load(directory / workdir.INTERRELATION) as file:
        assert file["similarity"].shape == (CLASSES, CLASSES) and file["class_names"][-1] == "background"
        assert np.all(file["similarity"] > 0) and np.allclose(np.diag(file["similarity"]), 1)
    report = (directory / "report.html").read_text()
    assert "<svg" in report and all(f">{name}" in report for name in ("AP50", "rectangle", "ellipse", "triangle"))
    assert json.loads((directory / "pictures.json").read_text())
    detections = json.loads((directory / "teacher_detections.json").read_text())
    assert detections and {found["category_id"] for found in detections} <= {key for key, _ in drawn_coco.CATEGORIES}


@pytest.mark.slow
def test_stopped_and_continued_it_ends_with_the_same_bits(home, whole, tmp_path, monkeypatch, capsys):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(preemption.Notice, "received", lambda notice: bool(asked.append(None)) or len(asked) >= 8)
        assert run(home, tmp_path / "run") == 75
    assert "which is saved" in capsys.readouterr().err
    assert run(home, tmp_path / "run") == 0
    (left, _), (right, _) = (
        checkpoint.read(path / workdir.CHECKPOINTS, which="latest") for path in (whole[0], tmp_path / "run")
    )
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "gaussian"},
        {"kind": "confusion", "features": "logits"},
        {"kind": "logit_correlation", "features": "logits", "mean_distance": 0.5},
        {"kind": "classifier", "centred": True},
        {"kind": "uniform"},
    ],
    ids=lambda spec: spec["kind"],
)
def test_similarities_of_classes_and_background(home, tmp_path, monkeypatch, spec):
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))
    groups = ("corners", "round", "corners", "nothing")
    overrides = {**spec, "groups": groups}
    config = main.load_config(
        str(home / "config.py"), [f"interrelation.{key}={value}" for key, value in overrides.items()]
    )
    data, notes = build.data_set(config["data"]), []
    found = teacher.load(config, None, data)
    similarity = found.similarity(config, data, tmp_path, report=notes.append)
    assert similarity.shape == (CLASSES, CLASSES) and np.isfinite(similarity).all()
    np.testing.assert_array_equal(np.diag(similarity), 1)
    assert any("Neighbours agree with the groups in" in note and "of 4 classes" in note for note in notes)
    pairs = similarity[~np.eye(CLASSES, dtype=bool)]
    if "mean_distance" in spec:
        np.testing.assert_allclose(np.mean(1 - pairs), 0.5, rtol=1e-5)
    assert (np.ptp(pairs) > 1e-4) == (spec["kind"] != "uniform")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--config.interrelation.kind=confusion"],
            "features='pooled': kind='confusion' is of the teacher's predictions",
        ),
        (["--config.interrelation.groups=('a',)"], "interrelation.groups has 1 names and there are 4 classes"),
        (["--config.accumulation=2", "--config.global_batch_size=16"], "one of 2 canvases"),
        (["--config.task.name=classification"], "is for detection"),
        (["--config.data.max_boxes=1"], "set data.max_boxes="),
        (["--config.optimizer.milestones=(6,)"], "increasing steps between 0 and 6"),
        (["--config.epochs=2"], "both are the run's length"),
    ],
)
def test_what_is_wrong_is_said_before_anything_compiles(home, tmp_path, capsys, overrides, message):
    assert run(home, tmp_path / "run", *overrides) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_does_not_detect(home):
    config = config_file.read_config(f"{home / 'config.py'}:alone")
    config["student"] = {"name": "resnet8"}
    with pytest.raises(ValueError, match="the student resnet8 is a network for classification"):
        build.plan(config_lib.resolve(config))
