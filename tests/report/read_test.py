"""What is read from a work directory, and what is refused."""

import json

import numpy as np
import pytest

from wkd_jax.report.read import read

EVALUATION = {"class_names": ["a", "b"], "count": [4, 2], "student_correct": [3, 1], "teacher_correct": None}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "x"}')
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


def log(workdir, *records):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_by_kind_with_non_finite_values(workdir):
    log(
        workdir,
        {"step": 1, "epoch": 0.5, "kind": "train", "total": 2, "note": "text", "flag": True, "list": [1]},
        {"step": 2, "epoch": 1.0, "kind": "train", "total": "nan"},
        {"step": 2, "epoch": 1.0, "kind": "eval", "time": 1.5e9, "student_top1": 50.0},
        {"step": 3, "epoch": 1.5, "kind": "train", "total": "-inf"},
    )
    run = read(workdir)
    assert {kind: list(curves) for kind, curves in run.curves.items()} == {"train": ["total"], "eval": ["student_top1"]}
    np.testing.assert_array_equal(run.curves["train"]["total"].steps, [1, 2, 3])
    np.testing.assert_array_equal(run.curves["train"]["total"].values, [2.0, np.nan, -np.inf])
    assert (run.step, run.epoch, run.truncated) == (3, 1.5, False)
    assert (run.result, run.evaluation, run.interrelation) == (None, None, None)


def test_infinities_of_lax_json(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "total": Infinity}\n')
    assert read(workdir).curves["train"]["total"].values == [np.inf]


def test_a_resumed_run_replaces_what_it_repeats(workdir):
    log(
        workdir,
        {"step": 10, "kind": "train", "total": 1.0},
        {"step": 20, "kind": "train", "total": 2.0},
        {"step": 20, "kind": "eval", "student_top1": 9.0},
        {"step": 30, "kind": "train", "total": 3.0},
        {"step": 20, "kind": "train", "total": 2.5},  # resumed from a checkpoint of step 10
        {"step": 20, "kind": "eval", "student_top1": 9.5},
    )
    run = read(workdir)
    np.testing.assert_array_equal(run.curves["train"]["total"].steps, [10, 20])
    np.testing.assert_array_equal(run.curves["train"]["total"].values, [1.0, 2.5])
    assert run.curves["eval"]["student_top1"].values == [9.5]
    assert run.step == 20


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_missing_files_are_named(workdir, name):
    (workdir / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(workdir)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere: no such work directory"):
        read(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["config.json", "result.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00"])
def test_garbled_json_is_named(workdir, name, content):
    (workdir / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read(workdir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1, "ki', "line 1: not valid JSON"),
        ("[]", "line 1: expected a JSON object"),
        ('{"kind": "train"}', "line 1: 'step' must be an integer, found None"),
        ('{"step": 1.5, "kind": "train"}', "line 1: 'step' must be an integer, found 1.5"),
        ('{"step": true, "kind": "train"}', "line 1: 'step' must be an integer, found True"),
        ('{"step": 1}', "line 1: 'kind' must be a string"),
    ],
)
def test_garbled_log_lines_are_named(workdir, line, message):
    (workdir / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "kind": "train"}}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, {message}"):
        read(workdir)


def test_evaluation(workdir):
    (workdir / "evaluation.json").write_text(json.dumps(EVALUATION | {"confusion": [[3, 1], [1, 1]]}))
    evaluation = read(workdir).evaluation
    assert evaluation.class_names == ["a", "b"]
    np.testing.assert_array_equal(evaluation.confusion, [[3, 1], [1, 1]])
    assert evaluation.teacher_correct is None
    assert evaluation.agree is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": []}, "'class_names' must be a list of names"),
        ({"count": None}, "has no 'count'"),
        ({"student_correct": [3]}, r"'student_correct' has shape \(1,\); by 'class_names' it must be \(2,\)"),
        ({"agree": [5, 0]}, "'agree' must lie between 0 and 'count'"),
        ({"count": [-4, 2]}, "'count' must lie between 0"),
        ({"student_correct": ["x", 1]}, "'student_correct' is not an array of numbers"),
        ({"teacher_correct": [float("nan"), 1]}, "'teacher_correct' has entries that are not finite"),
        ({"confusion": [[1, 2]]}, "'confusion' has shape"),
        ({"confusion": [[3, -1], [1, 1]]}, "'confusion' must lie between 0"),
    ],
)
def test_garbled_evaluation_is_named(workdir, change, message):
    (workdir / "evaluation.json").write_text(json.dumps(EVALUATION | change))
    with pytest.raises(ValueError, match=rf"evaluation\.json: {message}"):
        read(workdir)


def test_interrelation(workdir):
    similarity = np.array([[1, 0.5], [0.5, 1]], np.float32)
    path = workdir / "interrelation.npz"
    np.savez(path, similarity=similarity, class_names=["a", "b"], provenance='{"kind": "cka"}')
    relation = read(workdir).interrelation
    np.testing.assert_array_equal(relation.similarity, similarity)
    assert (relation.class_names, relation.provenance) == (["a", "b"], {"kind": "cka"})
    assert relation.structure == {}  # a file of an older version
    arrays = {"similarity": similarity, "class_names": ["a", "b"], "provenance": "{}"}
    np.savez(path, structure='{"rank_one_share": 0.5}', **arrays)
    assert read(workdir).interrelation.structure == {"rank_one_share": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"similarity": np.ones((2, 3))},
        {"similarity": np.full((2, 2), np.nan)},
        {"similarity": None},
        {"provenance": "{"},
        {"provenance": "[]"},
        {"structure": "{"},
        {"structure": "[]"},
        {"class_names": np.array(["a", None], object)},  # pickled
        {"class_names": []},
    ],
)
def test_garbled_interrelation_is_named(workdir, change):
    arrays = {"similarity": np.eye(2), "class_names": ["a", "b"], "provenance": "{}"} | change
    arrays = {key: value for key, value in arrays.items() if value is not None}
    np.savez(workdir / "interrelation.npz", **arrays)
    with pytest.raises(ValueError, match=r"interrelation\.npz: "):
        read(workdir)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off"])
def test_damaged_interrelation_is_named(workdir, content):
    (workdir / "interrelation.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"interrelation\.npz: cannot be read"):
        read(workdir)
