"""The command that looks at a matrix."""

import json

import numpy as np
import pytest

from wkd_jax.interrelation import Interrelation, save
from wkd_jax.interrelation.__main__ import main

NAMES = ("ant", "bee", "cat", "dog")
SIMILARITY = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.1], [0.1, 0.3, 1, 0.8], [0.2, 0.1, 0.8, 1]], np.float32)


@pytest.fixture(name="path")
def _path(tmp_path):
    path = tmp_path / "interrelation.npz"
    measured = {"rank_one_share": 0.25, "stability": {"of": "pairing", "all": 0.5, "rest": 0.25}}
    save(path, Interrelation(SIMILARITY, NAMES, {}, measured))
    return path


def test_a_run_is_its_file(path, capsys):
    for argument in (path, path.parent):
        assert main([str(argument)]) == 0
    first, second = capsys.readouterr().out.split("One number a class", 2)[1:]
    assert first == second
    path.write_bytes(b"nonsense")
    assert main([str(path.parent)]) == 1
    assert "delete it and it is computed again" in capsys.readouterr().err
    path.unlink()
    assert main([str(path.parent)]) == 1
    assert f"{path.parent} has no interrelation.npz: give the directory of a run" in capsys.readouterr().err


def test_a_file_of_a_run(path, tmp_path, capsys):
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps(["insect", "insect", "mammal", "mammal"]))
    assert main([str(path), "--groups", str(groups)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("One number a class, s_ij = a_i a_j, explains 25 % of")
    assert lines[1] == "Neighbours agree with the groups in 4 of 4 classes, by chance in 1.3."
    assert "correlates 0.50 with this one, and 0.25" in lines[2]
    assert lines[-4:-2] == ["ant: bee 0.9000, dog 0.2000, cat 0.1000", "bee: ant 0.9000, cat 0.3000, dog 0.1000"]


def test_a_distance_matrix(tmp_path, capsys):
    np.save(tmp_path / "distance.npy", 1 - SIMILARITY[:2, :2])
    assert main([str(tmp_path / "distance.npy")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["0: 1 0.9000", "1: 0 0.9000"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ('["a", "b"]', "interrelation.groups has 2 names and there are 4 classes"),
        ('{"ant": "insect"}', "groups.json: needs a list of names, one a class"),
        ("[1, 2, 3, 4]", "groups.json: needs a list of names"),
        ("[", "groups.json is not JSON"),
        (None, "No such file"),
    ],
)
def test_groups_that_do_not_fit(groups, message, path, tmp_path, capsys):
    if groups:
        (tmp_path / "groups.json").write_text(groups)
    assert main([str(path), "--groups", str(tmp_path / "groups.json")]) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_matrix(path, capsys):
    path.write_bytes(b"nonsense")
    assert main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "cannot be read as a class similarity" in said and "give a run's directory" in said and "delete" not in said
