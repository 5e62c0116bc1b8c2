"""The teacher of a run: what it is loaded from, and the class similarity that is computed from it."""

import dataclasses
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from wkd_jax import interrelation
from wkd_jax.models import functional
from wkd_jax.training import sharding, teacher, workdir

torch = pytest.importorskip("torch")

SCRIPT = pathlib.Path(__file__).with_name("small_teacher.py")
SMALL = runpy.run_path(str(SCRIPT))
images, settings, make, MESH = (SMALL[name] for name in ("images", "settings", "make", "MESH"))


@pytest.fixture(autouse=True, name="cache")
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", name="oracle")
def _oracle():
    """Class features [C, n, D] of logits by PyTorch, for any choice of examples."""
    arrays, data = SMALL["network"]().arrays, images()
    tensors = {name: torch.tensor(value) for name, value in arrays.items()}
    x = torch.tensor((data.train.images / 255 - 0.4) / 0.2, dtype=torch.float32).permute(0, 3, 1, 2)
    kernel = tensors["conv/kernel"].permute(3, 2, 0, 1)
    tap = torch.nn.functional.conv2d(x, kernel, tensors["conv/bias"], stride=2, padding=1)
    norm = [tensors[f"norm/{name}"] for name in ("mean", "var", "scale", "bias")]
    tap = torch.nn.functional.batch_norm(tap, *norm)
    logits = tap.relu().mean((2, 3)) @ tensors["fc/kernel"] + tensors["fc/bias"]

    def features(bad=(), samples=None):
        good = [[row for row in np.flatnonzero(data.labels == label) if row not in bad] for label in range(4)]
        return np.stack([logits[own[: samples or 15]].numpy() for own in good])

    return features


def compare(similarity, features):
    """CKA of the same features; the network's arithmetic is rounded otherwise in torch."""
    assert similarity.dtype == np.float32
    np.testing.assert_allclose(similarity, interrelation.from_features({}, features), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "samples"),
    [({}, 0), ({"global_batch_size": 40}, 5), ({"global_batch_size": 32, "accumulation": 4}, 5), (MESH, 0)],
    ids=["all devices", "few samples", "microbatches", "sharded"],
)
def test_similarity_of_all_devices(changes, samples, oracle, tmp_path):
    config, data = settings(**changes, interrelation={"samples_per_class": samples}), images()
    made = make(config)
    with jax.transfer_guard("disallow"):
        similarity = made.similarity(config, data, tmp_path)
    compare(similarity, oracle(samples=samples))
    assert len(data.read) == 4 * (samples or 15) and data.read == sorted(data.read)
    kept = interrelation.load(tmp_path / workdir.INTERRELATION)
    np.testing.assert_array_equal(kept.similarity, similarity)
    assert kept.structure["stability"]["of"] == "pairing" and 0 <= kept.structure["rank_one_share"] <= 1
    assert kept.provenance["dtype"] == "float32" and kept.provenance["spec"]["samples_per_class"] == (samples or 15)


@pytest.mark.parametrize(
    "spec",
    [
        {"features": "pooled", "kind": "cosine", "centred": True},
        {"features": "stage1", "kernel": "rbf"},
        {"features": "stage1", "kind": "gaussian"},
        {"features": "logits", "kind": "confusion"},
        {"features": "logits", "kind": "logit_correlation", "mean_distance": 0.5},
        {"kind": "classifier", "centred": True},
        {"kind": "uniform"},
    ],
    ids=["cosine", "tap", "gaussian", "confusion", "logit_correlation", "classifier", "uniform"],
)
def test_nothing_is_transferred_by_accident(spec, tmp_path):
    config, data = settings(interrelation=spec), images()
    made = make(config)
    with jax.transfer_guard("disallow"):
        similarity = made.similarity(config, data, tmp_path)
    assert similarity.shape == (4, 4) and len(data.read) == (0 if "features" not in spec else 60)


def test_the_scaled_matrix_is_for_the_method_and_what_is_kept_is_not_scaled(cache, tmp_path):
    config, data = settings(interrelation={"kind": "gaussian", "features": "pooled"}), images()
    scaled = settings(interrelation={"kind": "gaussian", "features": "pooled", "mean_distance": 0.9})
    folders = [tmp_path / name for name in ("plain", "cached", "file")]
    for folder in folders:
        folder.mkdir()
    plain = make(config).similarity(config, data, folders[0])
    for _ in range(2):  # out of the cache, and when the run goes on
        found = make(scaled).similarity(scaled, data, folders[1], report=lambda message: None)
        np.testing.assert_allclose(1 - found, (1 - plain) * 0.9 / np.sum(1 - plain) * 12, atol=1e-6)
    kept = folders[1] / workdir.INTERRELATION
    np.testing.assert_array_equal(interrelation.load(kept).similarity, plain)
    named = settings(interrelation={"file": str(kept), "mean_distance": 0.9})
    np.testing.assert_array_equal(make(named).similarity(named, data, folders[2]), found)
    assert len(data.read) == 60 and len(list((cache / "interrelation").iterdir())) == 1


def test_a_large_teacher_is_cut_by_the_rules_of_its_run():
    config = settings(**MESH)
    mesh = sharding.make_mesh(config["mesh"])
    placed = teacher._placed(SMALL["network"]().arrays, mesh, config["sharding"])
    assert placed["fc/kernel"].sharding.spec == P(None, "model")
    assert placed["conv/kernel"].sharding.spec == P()
    shadowed = [("teacher/fc", (None,)), ("fc/bias", ("model",)), ("conv/kernel$", (None, None, None, "model"))]
    placed = teacher._placed(SMALL["network"]().arrays, mesh, shadowed)
    assert placed["fc/bias"].sharding.spec == P(None)  # the first rule decides; the second is of the student's
    assert placed["conv/kernel"].addressable_shards[0].data.shape == (3, 3, 3, 3)


def test_images_that_cannot_be_read(oracle, cache, tmp_path, capsys):
    bad = tuple(np.flatnonzero(images().labels == 2)[[0, 3]])
    config = settings(interrelation={"samples_per_class": 13})
    data = images(bad=bad)
    similarity = make(config).similarity(config, data, tmp_path)
    # A replacement takes its place in the row of samples, and the order of samples matters.
    features = oracle(samples=13)
    features[2, [0, 3]] = oracle()[2, [13, 14]]
    compare(similarity, features)
    assert "2 training samples cannot be read" in capsys.readouterr().err
    assert (tmp_path / workdir.INTERRELATION).exists() and not cache.exists()  # others may be able to read them
    config = settings(interrelation={"samples_per_class": 14})
    with pytest.raises(ValueError, match=r"class 'cat' \(label 2\) has 15 .* fewer than 14 of them can be read"):
        make(config).similarity(config, images(bad=bad), tmp_path / "other")


def test_another_run_finds_it_in_the_cache(cache, tmp_path):
    config, notes = settings(), []
    folders = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    for folder in folders:
        folder.mkdir()
    first = make(config).similarity(config, images(), folders[0], report=notes.append)
    said = [note[:45] for note in notes]
    notes.clear()
    data = images()
    again = make(config).similarity(config, data, folders[1], report=notes.append)
    np.testing.assert_array_equal(again, first)
    assert interrelation.load(folders[1] / workdir.INTERRELATION).structure["stability"]
    assert not data.read and "found in the cache" in notes[0]
    assert [note[:45] for note in notes[1:]] == said and notes[2].startswith("class similarity: The images paired")
    np.testing.assert_array_equal(interrelation.load(folders[1] / workdir.INTERRELATION).similarity, first)
    (file,) = (cache / "interrelation").iterdir()
    file.write_bytes(b"nonsense")
    again = make(config).similarity(config, data, folders[2], report=notes.append)
    np.testing.assert_array_equal(again, first)
    assert len(data.read) == 60 and str(file) in notes[3] and "computed again" in notes[3]
    other = settings(dtype="bfloat16")
    make(other).similarity(other, data, folders[3])  # the same teacher in other arithmetic is not the same
    assert len(data.read) == 120 and len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize("kind", ["cka", "gaussian"])
@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), MemoryError()])
def test_a_measure_that_fails_costs_no_matrix(kind, error, cache, tmp_path, monkeypatch):
    config, notes, seen = settings(interrelation={"kind": kind}), [], []
    path = tmp_path / workdir.INTERRELATION

    def fail(*args, **kwargs):
        seen.append(interrelation.load(path))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(interrelation.structure, "stability", fail)
        similarity = make(config).similarity(config, images(), tmp_path, report=notes.append)
    (file,) = (cache / "interrelation").iterdir()
    for kept in (*seen, interrelation.load(path), interrelation.load(file)):
        np.testing.assert_array_equal(kept.similarity, similarity)
        assert list(kept.structure) == ["rank_one_share"]
    why = str(error).split("\n")[0] or "MemoryError"
    (said,) = [note for note in notes if "is not measured" in note]
    assert said == f"class similarity: its stability is not measured ({why}); the matrix itself is kept and used"
    path.unlink()
    data = images()
    np.testing.assert_array_equal(make(config).similarity(config, data, tmp_path, report=notes.append), similarity)
    assert not data.read


def test_groups_are_for_people(cache, tmp_path):
    """What they say is said again where a matrix is found, and they make no other matrix of it."""
    plain, notes = settings(interrelation={"kind": "gaussian"}), []
    grouped = settings(interrelation={"kind": "gaussian", "groups": ("insect", "insect", "mammal", "mammal")})
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    make(plain).similarity(plain, images(), folders[0], report=notes.append)
    assert not any("groups" in note for note in notes) and any("Two halves" in note for note in notes)
    make(grouped).similarity(grouped, images(), folders[1], report=notes.append)
    assert any("Neighbours agree with the groups in" in note for note in notes)
    assert len(list((cache / "interrelation").iterdir())) == 1
    wrong = settings(interrelation={"groups": ("insect",)})
    with pytest.raises(
        ValueError, match=r"interrelation.groups has 1 names and there are 4 classes \('ant' to 'dog'\)"
    ):
        make(wrong).similarity(wrong, images(), folders[1])


def test_a_run_that_is_stopped_leaves_nothing(cache, tmp_path):
    config, calls = settings(), []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError("stop")

    with pytest.raises(InterruptedError):
        make(config).similarity(config, images(), tmp_path, between_batches=stop)
    assert not list(tmp_path.iterdir()) and not cache.exists()


def test_where_the_teachers_images_lie_is_this_machines_business(monkeypatch):
    config = settings()
    own = {"name": "stored", "data_dir": "/old", "workers": 3, "train_images": 10}
    now = {"name": "stored", "data_dir": "/new", "workers": 8, "train_images": 10}
    data, asked = images(), []
    monkeypatch.setattr(teacher.build, "data_set", lambda section: asked.append(section) or "made")
    made = teacher.Teacher(SMALL["network"](), {**config.to_dict(), "data": own}, "")
    assert made._training_data({**config.to_dict(), "data": now}, data) is data and not asked
    fewer = {**now, "train_images": 5}
    assert made._training_data({**config.to_dict(), "data": fewer}, data) == "made"
    assert asked == [{**now, "train_images": 10}]
    assert made._training_data(config.to_dict(), data) == "made"
    assert asked[1] == own


def test_statistics_move_as_in_torch():
    """One training pass of one image: momentum 0.1, unbiased variance; parameters stay."""
    small, size, seed = SMALL["network"](), (8, 8), 3
    moved = teacher._perturbed(small, seed, size)
    other = teacher._perturbed(small, seed + 1, size)
    key = teacher.named_key(jax.random.key(seed), "teacher/perturb_statistics")
    image = jax.random.normal(key, (1, *size, 3))
    arrays = {name: torch.tensor(value) for name, value in small.arrays.items()}
    norm = torch.nn.BatchNorm2d(6)
    norm.load_state_dict(
        {
            "weight": arrays["norm/scale"],
            "bias": arrays["norm/bias"],
            "running_mean": arrays["norm/mean"],
            "running_var": arrays["norm/var"],
            "num_batches_tracked": torch.tensor(0),
        }
    )
    x = torch.tensor(np.asarray(image)).permute(0, 3, 1, 2)
    kernel = arrays["conv/kernel"].permute(3, 2, 0, 1)
    norm.train()(torch.nn.functional.conv2d(x, kernel, arrays["conv/bias"], stride=2, padding=1))
    np.testing.assert_allclose(moved.arrays["norm/mean"], norm.running_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved.arrays["norm/var"], norm.running_var, rtol=1e-5)
    for name, value in small.arrays.items():
        if name.startswith("norm/") and name.endswith(("mean", "var")):
            assert np.abs(moved.arrays[name] - value).max() > 1e-3
            assert np.abs(moved.arrays[name] - other.arrays[name]).max() > 1e-4
        else:
            assert moved.arrays[name] is value


def test_statistics_that_cannot_move(monkeypatch):
    small = SMALL["network"]()
    with pytest.raises(ValueError, match=r"teacher.perturb_statistics: .*has no variance"):
        teacher._perturbed(small, 0, (1, 2))
    plain = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    monkeypatch.setattr(nnx.Linear, "__call__", lambda self, image, train, rngs: image)
    structure, arrays, _, _ = functional.split(plain)
    with pytest.raises(ValueError, match="net has no running statistics that could move: leave it out"):
        teacher._perturbed(dataclasses.replace(small, structure=structure, arrays=arrays), 0, (8, 8))


def test_perturbed_is_another_teacher(monkeypatch):
    small = SMALL["network"]()
    monkeypatch.setattr(teacher.build, "pretrained", lambda config, data: (small, ["as they came"]))
    loaded = {
        (flag, seed): teacher.load(
            settings(teacher={"weights": "file", "perturb_statistics": flag}, seed=seed), None, images()
        )
        for flag, seed in [(False, 0), (True, 0), (True, 1)]
    }
    assert len({found.fingerprint for found in loaded.values()}) == 3
    clean, moved = loaded[False, 0], loaded[True, 0]
    assert clean.network is small and clean.notes == ("as they came",)
    assert "running statistics were moved once" in moved.notes[1]
    assert clean.fingerprint == teacher.load(settings(teacher={"weights": "file"}), None, images()).fingerprint


def together(arguments, timeout=120):
    """Results of two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "WKD_JAX_CACHE": f"{arguments[0]}/cache",
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs[0][1] + outputs[1][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs], [error for _, error in outputs]


def test_two_processes(tmp_path):
    """The same matrices as of one process with as many devices; what fails on one fails on both."""
    alone = {}
    for name, bad in SMALL["BAD"].items():
        (tmp_path / name).mkdir()
        alone[name] = make(SMALL["CONFIG"]).similarity(SMALL["CONFIG"], images(bad=bad), tmp_path / name)
    (tmp_path / "two").mkdir()
    (first, second), (said, unsaid) = together([str(tmp_path / "two")])
    for result in (first, second):
        assert result["whole"] == result["cached"] == alone["whole"].tolist()
        assert result["unreadable"] == alone["unreadable"].tolist()
        assert result["broken on one"].endswith("Error: process 1: a disk broke")
        assert result["stopped"] == "KeyboardInterrupt: stop"
        assert (
            result["cannot be written"].startswith("OSError: ") and "cannot be written" in result["cannot be written"]
        )
        assert not result["cached: read"]
        assert result["perturbed"] == first["perturbed"]
    read = [set(result["whole: read"]) for result in (first, second)]
    assert all(read) and not read[0] & read[1]  # each reads its part
    for note in ("class features: step 48/48", "3 training samples cannot be read", "found in the cache"):
        assert note in said and note not in unsaid
    assert interrelation.load(tmp_path / "two" / "whole" / workdir.INTERRELATION).similarity.shape == (4, 4)
