"""The report as a reader and a browser see it: what it says, that it is inert, and that it loads nothing."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from inert_page import HOSTILE, Page, assert_inert

from wkd_jax import report
from wkd_jax.report.__main__ import main

NAMES = ("zebra", "yak", "xerus", "wolf")


def records(steps=3):
    for step in range(10, 10 * steps + 1, 10):
        yield {
            "step": step,
            "epoch": step / 10,
            "kind": "train",
            "total": 4.0 / step,
            "label/cross_entropy": 2.0 / step,
            "label/cross_entropy/weight": 1.0,
            "wkd_l/wasserstein": 0.1 / step,
            "wkd_l/wasserstein/weight": 20.0,
            "wkd_l/marginal_error": 1e-3,
            "learning_rate": 0.1,
        }
        evaluation = {"student_top1": 50.0 + step, "teacher_top1": 91.25, "agreement": 80.0 + step / 10, "examples": 40}
        yield {"step": step, "epoch": step / 10, "kind": "eval", **evaluation}


def fill(directory, names=NAMES, *, lines=None, finished=True, teacher=True, relation=True, name="tiny"):
    """Writes the work directory of a run."""
    classes = len(names)
    rng = np.random.default_rng(0)
    config = {"name": name, "epochs": 3, "student": {"name": "resnet8"}, "teacher": None, "methods": {"wkd_l": {}}}
    config["optimizer"] = {"learning_rate": 0.1, "milestones": [1, 2], "nested": {"depth": "three"}}
    if teacher:
        config["teacher"] = {"run": "", "train": {"student": {"name": "resnet20"}}}
    (directory / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(record) + "\n" for record in records()] if lines is None else lines
    (directory / "metrics.jsonl").write_text("".join(lines))
    if relation:
        similarity = rng.uniform(0.1, 0.9, (classes, classes)).astype(np.float32)
        similarity = np.maximum(similarity, similarity.T)
        np.fill_diagonal(similarity, 1)
        provenance = json.dumps({"kind": "cka", "origin": names[0]})
        np.savez(directory / "interrelation.npz", similarity=similarity, class_names=names, provenance=provenance)
    if not finished:
        return directory
    count = np.full(classes, 10)
    confusion = np.diag(rng.integers(4, 9, classes))
    confusion[np.arange(classes), np.roll(np.arange(classes), 1)] += count - confusion.sum(axis=1)
    by_class = {"count": count.tolist(), "student_correct": np.diag(confusion).tolist()}
    by_class |= {"teacher_correct": (count - 1).tolist(), "agree": (count - 3).tolist()} if teacher else {}
    evaluation = {"class_names": list(names), **by_class, "confusion": confusion.tolist()}
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    result = {
        "name": name,
        "student": "resnet8",
        "teacher": "resnet20" if teacher else None,
        "methods": ["wkd_l"],
        "student_top1": 76.5,
        "student_top5": 99.0,
        "best": {"student_top1": 77.25, "step": 30},
        "teacher_top1": 91.25 if teacher else None,
        "agreement": 70.0 if teacher else None,
        "steps": 30,
        "seconds": 3723.0,
        "student_parameters": 78042,
        "teacher_parameters": 272474 if teacher else None,
        "versions": {"jax": "0.10.2"},
        "devices": "8 x cpu",
        "config": config,
    }
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = fill(tmp_path_factory.mktemp("finished"))
    return directory, read(report.write(directory))


def test_write_returns_the_only_file_it_made(tmp_path):
    before = set(fill(tmp_path).iterdir())
    path = report.write(tmp_path)
    assert path == tmp_path / "report.html"
    assert set(tmp_path.iterdir()) - before == {path}


def test_finished_run_is_inert_and_mentions_no_address(finished):
    assert_inert(finished[1])
    assert "http" not in finished[1].replace("http-equiv", "")


def test_headline(finished):
    words = Page(finished[1]).words
    for expected in ("tiny", "student resnet8 · teacher resnet20 · method wkd_l", "finished"):
        assert expected in words
    for label, value in {
        "Student top-1": "76.50 %",
        "Teacher top-1": "91.25 %",
        "Gap": "−14.75",
        "Agreement": "70.00 %",
        "Steps": "30",
        "Time": "1 h 2 min",
        "Student parameters": "78.04k",
    }.items():
        assert f"{label} {value}" in words, label
    assert "best 77.25 %" in words
    assert "teacher 272.5k" in words


def test_curves_of_every_logged_quantity(finished):
    words = Page(finished[1]).words
    for caption in (
        "total loss",
        "weight × term, all terms",
        "label/cross_entropy: its weight",
        "label/cross_entropy: weight × term",
        "wkd_l/wasserstein: its weight",
        "wkd_l/wasserstein: weight × term",
        "wkd_l/marginal_error",
        "learning_rate",
        "top-1 accuracy in evaluation, %",
        "agreement",
    ):
        assert caption in words, caption
    assert "The same in every evaluation: teacher_top1 91.25, examples 40." in words


def test_classes_config_and_versions(finished):
    words = Page(finished[1]).words
    assert "Student and teacher predict the same class on 70.00 % of them" in words
    for name in NAMES:
        assert re.search(rf"{name} 10 \d+\.0 90\.0 −\d+\.0 70\.0", words), name  # its row in the table of all classes
    svg = re.findall(r'<svg[^>]*aria-label="Heat map of class similarity".*?</svg>', finished[1], re.DOTALL)
    assert all(len(re.findall(rf">{name}<", svg[0])) == 2 for name in NAMES)  # on both axes
    assert "The most similar pairs of classes" in words
    for setting in ("optimizer", "milestones [1, 2]", "nested.depth three", "versions.jax 0.10.2", "devices 8 x cpu"):
        assert setting in words, setting


def test_most_similar_pairs_are_those_of_the_matrix(finished):
    directory, source = finished
    similarity = np.load(directory / "interrelation.npz")["similarity"]
    pairs = sorted(((similarity[i, j], i, j) for i in range(4) for j in range(i + 1, 4)), reverse=True)
    expected = " ".join(f"{NAMES[i]} {NAMES[j]} {value:.4f}" for value, i, j in pairs)
    assert f"class class similarity {expected}" in Page(source).words


def test_what_the_matrix_says_is_said(finished, tmp_path):
    """In words, and in a heat map of what is left: without measures in the file, with them, and with groups."""
    before = Page(finished[1]).words
    assert "One number a class, s_ij = a_i a_j, explains" in before and "What one number a class leaves of it" in before
    assert "Neighbours agree" not in before and "Dots" not in before and "multiplied" not in before
    names = [f"class {i}" for i in range(8)]
    fill(tmp_path, names)
    config = json.loads((tmp_path / "config.json").read_text())
    config["interrelation"] = {"groups": ["x"] * 4 + ["y"] * 4, "mean_distance": 0.75}
    (tmp_path / "config.json").write_text(json.dumps(config))
    similarity = np.full((8, 8), 0.2) + 0.6 * np.kron(np.eye(2), np.ones((4, 4)))
    np.fill_diagonal(similarity, 1)
    measured = {"rank_one_share": 0.625, "stability": {"of": "halves", "all": 0.9876, "rest": 0.5}}
    np.savez(
        tmp_path / "interrelation.npz",
        similarity=similarity,
        class_names=names,
        provenance="{}",
        structure=json.dumps(measured),
    )
    words = assert_inert(read(report.write(tmp_path))).words
    for said in (
        "This matrix mostly says one number a class",
        "explains 62 % of the variance",
        "Neighbours agree with the groups in 8 of 8 classes, by chance in 3.4.",
        "Two halves of the images give matrices that correlate 0.99, and 0.50 in what a_i a_j leaves.",
        f"1 - similarity was multiplied by {0.75 / np.mean(1 - similarity[np.triu_indices(8, 1)]):.3g}",
        "mean over pairs of classes is 0.75",
        "What one number a class leaves of it. Dots: classes of one group",
    ):
        assert said in words, said


def test_same_bytes_again_in_a_fresh_process_without_jax(finished):
    directory, source = finished
    code = "import sys; from wkd_jax import report; report.write(sys.argv[1]); assert 'jax' not in sys.modules"
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, env=environment)
    assert read(directory / "report.html") == source


def test_hostile_names_and_settings_are_inert(tmp_path):
    lines = []
    for record in records(1):
        record = {**record, HOSTILE[0]: 1.0, f"{HOSTILE[1]}/x": 2.0, f"{HOSTILE[1]}/x/weight": 1.0, HOSTILE[5]: 3.0}
        lines.append(json.dumps(record) + "\n")
    fill(tmp_path, HOSTILE, lines=lines, name=HOSTILE[2])
    for file in ("config.json", "result.json"):
        content = json.loads((tmp_path / file).read_text())
        content |= {f"{name}{file}": {name: [name]} for name in HOSTILE} | {"student": HOSTILE[0], "methods": HOSTILE}
        content |= {"versions": {HOSTILE[0]: HOSTILE[1]}, "devices": HOSTILE[2]}
        (tmp_path / file).write_text(json.dumps(content))
    page = assert_inert(read(report.write(tmp_path)))
    for name in HOSTILE[:5]:
        assert name in page.words
    assert "猫" in page.words
    assert {"b", "i"} & set(page.tags) == {"b"}  # only the template's own


@pytest.mark.parametrize("classes", [1, 2, 31, 100])
def test_any_number_of_classes(tmp_path, classes):
    fill(tmp_path, [f"class {i}" for i in range(classes)], lines=[])
    words = assert_inert(read(report.write(tmp_path))).words
    assert "class 0" in words
    assert ("best classes" in words) == (classes > 40)
    assert ("Not every class is named" in words) == (classes > 30)


def test_a_thousand_classes_stay_small(tmp_path):
    fill(tmp_path, [f"class {i}" for i in range(1000)], lines=[])
    source = read(report.write(tmp_path))
    assert len(source) < 1.5e6
    words = Page(source).words
    assert "A pixel is the mean of 2 × 2 classes." in words
    assert "What one number a class leaves of it. A pixel is the mean of 4 × 4 classes" in words
    assert "All 1000 classes, best first" in words


def test_without_teacher_and_without_interrelation(tmp_path):
    lines = [json.dumps({"step": 10, "epoch": 1.0, "kind": "train", "total": 1.0}) + "\n"]
    fill(tmp_path, lines=lines, teacher=False, relation=False)
    words = assert_inert(read(report.write(tmp_path))).words
    assert "no teacher" in words
    for absent in ("Teacher top-1", "Gap", "Agreement", "agree %", "Class interrelations"):
        assert absent not in words, absent
    assert "All 4 classes, best first" in words


def test_evaluation_without_confusions(tmp_path):
    fill(tmp_path, lines=[])
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    del evaluation["confusion"]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    words = Page(read(report.write(tmp_path))).words
    assert "All 4 classes, best first" in words
    assert "confusions" not in words


def test_class_without_examples(tmp_path):
    fill(tmp_path, lines=[])
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for key in ("count", "student_correct", "teacher_correct", "agree"):
        evaluation[key][0] = 0
    evaluation["confusion"][0] = [0, 0, 0, 0]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert "zebra 0 – – – –" in Page(read(report.write(tmp_path))).words


def test_unfinished_run(tmp_path):
    fill(tmp_path, finished=False, relation=False)
    words = assert_inert(read(report.write(tmp_path))).words
    assert "unfinished at step 30" in words
    assert "student resnet8 · teacher resnet20 · method wkd_l" in words  # from the config
    assert "Student top-1 80.00 % at step 30 Teacher top-1 91.25 % Gap −11.25" in words
    assert "Agreement 83.00 %" in words
    assert "Steps 30 3 of 3 epochs" in words
    assert "Time" not in words


def test_run_that_has_logged_nothing(tmp_path):
    fill(tmp_path, finished=False, relation=False, lines=[])
    words = assert_inert(read(report.write(tmp_path))).words
    assert "unfinished at step 0" in words
    assert "Nothing has been logged yet." in words


def test_half_a_last_line_is_left_out_and_said_so(tmp_path):
    lines = [json.dumps(record) + "\n" for record in records(1)] + ['{"step": 20, "ki']
    fill(tmp_path, finished=False, relation=False, lines=lines)
    words = Page(read(report.write(tmp_path))).words
    assert "unfinished at step 10" in words
    assert "The last line of metrics.jsonl is incomplete" in words


@pytest.mark.parametrize("values", [["nan"], [1.0, "inf", 2.0], ["-inf", "nan"], [3e38, -3e38], [0.0], [3.0] * 3])
def test_points_that_are_not_finite_or_few(tmp_path, values):
    lines = [
        json.dumps({"step": i + 1, "kind": "train", "total": value, "a/b": value, "a/b/weight": 2.0}) + "\n"
        for i, value in enumerate(values)
    ]
    fill(tmp_path, finished=False, relation=False, lines=lines)
    words = assert_inert(read(report.write(tmp_path))).words
    broken = sum(isinstance(value, str) for value in values)
    said = f"total loss ({broken} point{'s' * (broken > 1)} not finite, marked in red)"
    assert (said in words) == (broken > 0)
    assert "a/b: weight × term" in words


def test_a_long_run_stays_small_and_says_so(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"step": i, "kind": "train", "total": value}) + "\n"
        for i, value in enumerate(rng.normal(size=40_000))
    ]
    fill(tmp_path, finished=False, relation=False, lines=lines)
    source = read(report.write(tmp_path))
    assert len(source) < 100_000
    assert "up to 40,000 logged points. One of more than 500 is drawn as 500 groups" in Page(source).words


def test_result_numbers_must_be_numbers(tmp_path):
    fill(tmp_path, lines=[])
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | {"student_top1": "good"}))
    with pytest.raises(ValueError, match=r"result\.json: 'student_top1' must be a number, found 'good'"):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "result.json").write_text(json.dumps(result | {"student_top1": "nan", "box_ap": 38.25}))
    words = Page(read(report.write(tmp_path))).words
    assert "Student top-1 – %" in words
    assert "box ap 38.25" in words  # a number that the report does not know is shown all the same


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = report.write(fill(tmp_path, lines=[]))
    before, files = read(path), set(tmp_path.iterdir())

    def full(self, target):
        raise OSError("no space")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path)
    assert read(path) == before
    assert set(tmp_path.iterdir()) == files


def test_command_line(tmp_path, capsys):
    fill(tmp_path, lines=[])
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert main([str(tmp_path / "absent")]) == 1
    assert "absent: no such work directory" in capsys.readouterr().err
