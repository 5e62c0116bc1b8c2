"""Similarities on disk: round trip, provenance, damage, and released distance matrices."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import wkd_jax
from wkd_jax.interrelation import Interrelation, digest, hash_arrays, load, load_distance, load_file, provenance, save
from wkd_jax.interrelation.store import load_named

SHARED = pathlib.Path(__file__).parents[2] / "../shared"
NAMES = ("ant", "bee", "süß")
SIMILARITY = np.array([[1, 0.2, 0.3], [0.2, 1, 0.4], [0.3, 0.4, 1]], np.float32)


def record(**changes):
    spec = {"kind": "cka", "kernel": "linear", "features": "logits", "samples_per_class": 7}
    arguments = {
        "teacher": "resnet20",
        "weights_hash": "aa",
        "data": "digits",
        "data_fingerprint": "bb",
        "num_classes": 3,
        "dtype": "float32",
        "spec": spec,
    }
    return provenance(**{**arguments, **changes})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "interrelation.npz"
    save(path, Interrelation(SIMILARITY, NAMES, record()))
    return path


def test_round_trip(path):
    for found in (load(path), load(path, record())):
        np.testing.assert_array_equal(found.similarity, SIMILARITY)
        assert found.similarity.dtype == np.float32
        assert found.class_names == NAMES
        assert found.provenance == record() and found.provenance["version"] == wkd_jax.__version__
        assert found.structure == {}
    assert [item.name for item in path.parent.iterdir()] == ["interrelation.npz"]


def test_the_structure_is_kept_and_files_without_it_load(path):
    measured = {"rank_one_share": None, "stability": {"of": "halves", "all": 0.9, "rest": 0.1}}
    save(path, Interrelation(SIMILARITY, NAMES, record(), measured))
    assert load(path, record()).structure == measured
    with np.load(path) as file:
        arrays = {key: file[key] for key in file if key != "structure"}
    np.savez(path, **arrays)
    assert load(path, record()).structure == {}
    np.savez(path, structure="[]", **arrays)
    with pytest.raises(ValueError, match="is damaged"):
        load(path)


def test_one_error_names_every_field_that_differs(path):
    other = record(weights_hash="cc", spec={"kind": "cka", "kernel": "rbf", "bandwidth": 0.4, "features": "logits"})
    with pytest.raises(ValueError) as caught:
        load(path, other)
    message = str(caught.value)
    for part in (
        str(path),
        "weights_hash: the file has 'aa', this run has 'cc'",
        "spec.kernel: the file has 'linear', this run has 'rbf'",
        "spec.bandwidth: the file has None, this run has 0.4",
        "spec.samples_per_class: the file has 7, this run has None",
        "To go on, delete it and it is computed again",
    ):
        assert part in message
    assert "teacher" not in message and "fingerprint" not in message


def test_what_is_only_for_people_is_not_compared(path, monkeypatch):
    monkeypatch.setattr(wkd_jax, "__version__", "9.9")
    load(path, record(data="the same pixels under another name"))


def test_digest():
    assert digest(record()) == digest(record(data="a copy")) == digest({**record(), "version": "9.9"})
    for changed in ({"weights_hash": "cc"}, {"dtype": "bfloat16"}, {"spec": {**record()["spec"], "kernel": "rbf"}}):
        assert digest(record(**changed)) != digest(record())


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
def test_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"interrelation\.npz cannot be read .*delete it"):
        load(path)


def test_files_that_are_something_else(path):
    for wrong in ({"a": SIMILARITY}, {"similarity": SIMILARITY, "class_names": NAMES, "provenance": "no json"}):
        np.savez(path, **wrong)
        with pytest.raises(ValueError, match=r"interrelation\.npz cannot be read"):
            load(path)
    for similarity, origin in ((SIMILARITY[:2], "{}"), (SIMILARITY * np.nan, "{}"), (SIMILARITY, "[]")):
        np.savez(path, similarity=similarity, class_names=NAMES, provenance=origin)
        with pytest.raises(ValueError, match=r"interrelation\.npz is damaged"):
            load(path)
    with path.open("wb") as file:
        np.save(file, SIMILARITY)
    with pytest.raises(ValueError, match=r"interrelation\.npz cannot be read"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(path.with_name("missing.npz"))


def test_failed_save_keeps_the_old_file(path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"interrelation\.npz cannot be written: No space left on device"):
        save(path, Interrelation(SIMILARITY, NAMES, record()))
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_hash():
    arrays = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "a/bias": np.zeros(3, np.float32)}
    digest = hash_arrays(arrays)
    assert digest == hash_arrays({name: jnp.asarray(value) for name, value in reversed(arrays.items())})
    assert digest == hash_arrays({name: value.astype(">f4") for name, value in arrays.items()})
    assert digest == hash_arrays({name: np.asfortranarray(value) for name, value in arrays.items()})
    for changed in (
        {**arrays, "a/bias": np.array([0, 0, 1e-30], np.float32)},
        {**arrays, "a/bias": np.zeros(3, np.float16)},
        {**arrays, "a/kernel": arrays["a/kernel"].reshape(3, 2)},
        {"b/kernel": arrays["a/kernel"], "a/bias": arrays["a/bias"]},
        {"a/kernel": arrays["a/kernel"]},
    ):
        assert hash_arrays(changed) != digest
    assert hash_arrays({"x": jnp.ones(2, jnp.bfloat16), "y": jnp.float32(1)})


def test_load_file(path, tmp_path):
    np.testing.assert_array_equal(load_file(path, NAMES), SIMILARITY)
    with pytest.raises(ValueError, match="class 1 is 'bee', the data set's 'bat'"):
        load_file(path, ("ant", "bat", "süß"))
    with pytest.raises(ValueError, match="class 2 is 'süß', the data set's None"):
        load_file(path, NAMES[:2])
    distance = tmp_path / "distance.npy"
    np.save(distance, 1 - SIMILARITY)
    np.testing.assert_allclose(load_file(distance, NAMES), SIMILARITY, rtol=1e-6)
    with pytest.raises(ValueError, match="has 3 classes, this run's data set 2"):
        load_file(distance, NAMES[:2])
    (tmp_path / "distance.txt").write_text("0")
    with pytest.raises(ValueError, match=r"must end in \.npz .* or \.npy"):
        load_file(tmp_path / "distance.txt", NAMES)
    with pytest.raises(FileNotFoundError, match=r"interrelation.file=.*nowhere.npy: there is no such file"):
        load_file(tmp_path / "nowhere.npy", NAMES)


def test_a_named_file_is_of_the_runs_teacher_and_is_the_users(path):
    found = load_named(path, NAMES, record(dtype="bfloat16", spec={"kind": "uniform"}))
    assert found.provenance == record()
    with pytest.raises(ValueError, match="weights_hash: .* To go on, point interrelation.file at") as caught:
        load_named(path, NAMES, record(weights_hash="cc", dtype="bfloat16"))
    assert "delete" not in str(caught.value).lower() and "dtype" not in str(caught.value)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read .*point interrelation.file at"):
        load_file(path, NAMES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (SIMILARITY, r"diagonal reaches 1.0: it looks like a similarity, save 1 - it"),
        (1 - SIMILARITY + 0.1 * np.eye(3), "must be 0, the diagonal reaches 0.1"),
        ((1 - SIMILARITY)[:2], r"is \[C, C\], this is \(2, 3\)"),
        (np.triu(1 - SIMILARITY), r"not symmetric at \[0, 1\]"),
        (SIMILARITY - 1, r"negative at \[0, 1\]"),
        (np.where(np.eye(3, dtype=bool), 0, np.nan), "6 entries are not finite"),
        (np.zeros((3, 3), int), "holds floats, this int64"),
        (np.array([[None]]), "cannot be read as a .npy array"),
    ],
)
def test_distances_that_are_refused(tmp_path, array, message):
    path = tmp_path / "distance.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as caught:
        load_distance(path)
    assert str(path) in str(caught.value)


def test_truncated_distance(tmp_path):
    path = tmp_path / "distance.npy"
    np.save(path, 1 - SIMILARITY)
    for keep in (0, 20, -4):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"distance\.npy cannot be read"):
            load_distance(path)


@pytest.mark.parametrize("name", ["imagenet_resnet34", "cifar100_wrn_40_2"])
def test_released_matrices(name):
    path = SHARED / f"interrelations/{name}_linear_cka_distance.npy"
    if not path.exists():
        pytest.skip("reference documents are not here")
    similarity = load_distance(path)
    np.testing.assert_array_equal(np.diag(similarity), 1)
    np.testing.assert_array_equal(similarity, similarity.T)
    np.testing.assert_allclose(1 - similarity, np.load(path), atol=1e-7)
