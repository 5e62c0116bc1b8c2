import contextlib
import os
import pathlib
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wkd_jax.training import checkpoint, snapshot
from wkd_jax.training.checkpoint import CheckpointError, Checkpoints
from wkd_jax.types import TrainState

KILLED_RUN = pathlib.Path(__file__).with_name("killed_run.py")
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


def train_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    kernel, bank = rng.normal(size=(8, width)), rng.normal(size=(16, width))
    params = {
        "student/layer1/0/conv1/kernel": jnp.asarray(kernel, jnp.float32),
        "student/fc/bias": jnp.asarray(kernel[0], jnp.float32),
        "methods/kd/temperature": jnp.float32(rng.normal()),
    }
    variables = {
        "methods/crd/bank": jnp.asarray(bank, jnp.bfloat16),
        "methods/crd/seen": jnp.asarray(bank[:, 0] > 0),
        "methods/crd/cursor": jnp.uint32(4_000_000_000 + seed),
        "student/bn/mean": jnp.array([np.nan, np.inf, -0.0, 1e-45], jnp.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    return TrainState(
        jnp.int32(seed), params, variables, optimizer.init(params), {"student/fc/bias": params["student/fc/bias"]}
    )


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def fail_with(error):
    raise error


def fail(message):
    raise AssertionError(f"unexpected report: {message}")


def save_steps(directory, steps, *, keep=3, metrics=None):
    with Checkpoints(directory, keep=keep, report=fail) as checkpoints:
        for step in steps:
            checkpoints.save(step, train_state(step), {"position": step}, metric=(metrics or {}).get(step))
    return [int(path.name) for path in sorted(directory.iterdir(), key=lambda path: int(path.name))]


def largest_file(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(raw)


def damage_arrays(directory, step):
    """Changes one stored number, with a valid file around it: only a fingerprint can tell."""
    path, reports = directory / str(step), []
    with Checkpoints(directory, keep=9, report=fail) as checkpoints:
        state, record = checkpoints.restore_latest(abstract(train_state()))
        header = snapshot.read_header(path)
    other = directory.with_name("other")
    altered = jax.tree.map(lambda x: x, state)
    altered.params["student/fc/bias"] = state.params["student/fc/bias"].at[3].add(1e-6)
    with Checkpoints(other, report=reports.append) as checkpoints:
        checkpoints.save(step, altered, record, metric=header.metric)
    shutil.rmtree(path / "state")
    shutil.move(other / str(step) / "state", path / "state")


# --- what is saved comes back ---


def test_every_bit_the_record_and_the_structure_come_back(tmp_path):
    state, record = train_state(3), {"input": {"position": [1, 2]}, "best": {"top1": 0.1}, "hash": "ab/ü"}
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        assert checkpoints.restore_latest(abstract(state)) is None
        checkpoints.save(3, state, record)
        restored, found = checkpoints.restore_latest(abstract(state))
    assert_same_bits(restored, state)
    assert found == record
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("before, after", [(1, 8), (8, 1), (8, 4)])
def test_restores_onto_another_number_of_devices(tmp_path, before, after):
    def placed(devices):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        return lambda x: sharded if x.ndim == 2 else replicated

    state = jax.tree.map(lambda x: jax.device_put(x, placed(before)(x)), train_state(1))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(after)(x)), state)
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore_latest(wanted)
    assert_same_bits(restored, state)
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec("data" if devices > 1 else None))
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = step(jax.device_put(np.zeros((512, 1024), np.float32), sharding))
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        for number in (1, 2):
            saved = float(state[0, 0])
            checkpoints.save(number, {"params": {"x": state}}, {})
            for _ in range(5):
                state = step(state)
            restored, _ = checkpoints.restore_latest({"params": {"x": abstract(state)}})
            np.testing.assert_array_equal(restored["params"]["x"], saved)


def test_works_where_implicit_transfers_are_forbidden(tmp_path):
    state = train_state(1)
    with jax.transfer_guard("disallow"), Checkpoints(tmp_path, report=fail) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore_latest(abstract(state))
    assert_same_bits(restored, state)


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    waited, real = [], snapshot.start_saving

    def start_saving(*inputs):
        response = real(*inputs)
        monkeypatch.setattr(response, "result", lambda inner=response.result: (waited.append(inputs[0].name), inner()))
        return response

    monkeypatch.setattr(snapshot, "start_saving", start_saving)
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        checkpoints.save(1, train_state(1), {})
        assert waited == [] and checkpoints.steps() == []
        checkpoints.save(2, train_state(2), {})
        assert waited == ["1"] and checkpoints.steps() == [1]
    assert waited == ["1", "2"]


# --- which checkpoints stay ---


@pytest.mark.parametrize(
    "metrics, left, best",
    [
        ({}, [4, 5, 6], None),
        ({1: 0.5, 2: 0.9, 3: 0.9, 6: 0.1}, [2, 4, 5, 6], 2),  # a tie: the earlier one
        ({2: float("nan"), 3: 0.1, 5: float("nan")}, [3, 4, 5, 6], 3),
        ({5: 0.5}, [4, 5, 6], 5),
        ({1: -3, 2: -1.0, 3: -2}, [2, 4, 5, 6], 2),
    ],
)
def test_the_last_and_the_best_stay(tmp_path, metrics, left, best):
    assert save_steps(tmp_path, range(1, 7), metrics=metrics) == left
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        assert checkpoints.steps() == left
        assert checkpoints.restore_latest(abstract(train_state()))[1] == {"position": 6}
    if best is None:
        with pytest.raises(ValueError, match="no checkpoint in .* has a metric"):
            checkpoint.read(tmp_path, which="best")
    else:
        assert checkpoint.read(tmp_path, which="best")[1] == {"position": best}


def test_the_best_of_an_earlier_session_is_known(tmp_path):
    save_steps(tmp_path, [1, 2], metrics={1: 0.9, 2: 0.1})
    assert save_steps(tmp_path, [3, 4], keep=1, metrics={3: 0.2, 4: 0.3}) == [1, 4]
    assert save_steps(tmp_path, [5], keep=1, metrics={5: 1.0}) == [5]


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch):
    reports = []
    with Checkpoints(tmp_path, keep=1, report=reports.append) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(f"busy: {path}")))
        for step in (1, 2):
            checkpoints.save(step, train_state(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2]
    assert len(reports) == 1 and "busy" in reports[0] and str(tmp_path / "1") in reports[0]
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1, report=fail) as checkpoints:
        assert checkpoints.steps() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_takes_the_place_of_one_saved_in_haste(tmp_path, killed, monkeypatch):
    """The new one has the metric; killed before it is whole, the old one is there again."""
    save_steps(tmp_path, [1, 2], metrics={1: 0.5})
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        if killed:
            monkeypatch.setattr(
                checkpoint.snapshot, "start_saving", lambda *inputs: (_ for _ in ()).throw(OSError("x"))
            )
            with pytest.raises(checkpoint.CheckpointError):
                checkpoints.save(2, train_state(7), {"position": "new"}, metric=0.9, replace=True)
        else:
            checkpoints.save(2, train_state(7), {"position": "new"}, metric=0.9, replace=True)
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore_latest(abstract(train_state()))[1] == {"position": 2 if killed else "new"}
    assert checkpoint.read(tmp_path, which="best")[1]["position"] == (1 if killed else "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# --- wrong use ---


@pytest.mark.parametrize("step", [2, 3])
def test_refuses_a_step_that_is_not_after_the_last(tmp_path, step):
    save_steps(tmp_path, [1, 3])
    with Checkpoints(tmp_path, report=fail) as checkpoints, pytest.raises(ValueError, match=f"step {step}.*has step 3"):
        checkpoints.save(step, train_state(), {})


@pytest.mark.parametrize(
    "leaf, error, message",
    [
        (np.zeros(3), TypeError, "params/x: it is ndarray"),
        (1, TypeError, "params/x: it is int"),
        (jnp.zeros((0, 3)), ValueError, r"params/x: it is empty, shape \(0, 3\)"),
    ],
)
def test_refuses_what_it_cannot_save(tmp_path, leaf, error, message):
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        with pytest.raises(error, match=message):
            checkpoints.save(1, {"params": {"x": leaf}}, {})
        with pytest.raises(TypeError, match="PRNG|not a jax.Array of numbers"):
            checkpoints.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, {"x": jnp.ones(1)}, {"bad": object()})
        with pytest.raises(ValueError, match="same path"):
            checkpoints.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})
        checkpoints.save(1, train_state(1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_refuses_keep_0_and_urls(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0, report=fail)
    with pytest.raises(ValueError, match="mount the bucket"):
        Checkpoints("gs://bucket/run", report=fail)


def test_another_config_is_named_and_nothing_is_put_aside(tmp_path):
    save_steps(tmp_path, [1, 2])
    wanted = abstract(train_state(width=12))
    del wanted.params["methods/kd/temperature"]
    wanted.variables["methods/at/memory"] = wanted.variables["methods/crd/bank"]
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        with pytest.raises(ValueError) as caught:
            checkpoints.restore_latest(wanted)
        assert checkpoints.steps() == [1, 2]
    message = str(caught.value)
    assert "1 missing from the checkpoint: variables/methods/at/memory;" in message
    assert "1 unexpected in the checkpoint: params/methods/kd/temperature;" in message
    assert "params/student/fc/bias (saved float32 [8], now float32 [12])" in message
    assert str(tmp_path / "2") in message


def test_an_abstract_state_needs_shardings(tmp_path):
    save_steps(tmp_path, [1])
    with Checkpoints(tmp_path, report=fail) as checkpoints, pytest.raises(ValueError, match="sharding.*step has none"):
        checkpoints.restore_latest(jax.eval_shape(lambda: train_state()))


# --- damage ---


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one bit": lambda file: flip_bit(file),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_harmless_or_found(tmp_path, kind):
    """Each file of the newest checkpoint in turn: its state bit for bit, or a report and the one before."""
    whole, case, fallbacks = tmp_path / "whole", tmp_path / "case", 0
    save_steps(whole, [1, 2])
    files = [file.relative_to(whole) for file in (whole / "2").rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) >= 8
    for file in files:
        shutil.copytree(whole, case)
        DAMAGES[kind](case / file)
        reports = []
        with Checkpoints(case, report=reports.append) as checkpoints:
            state, record = checkpoints.restore_latest(abstract(train_state()))
        assert_same_bits(state, train_state(record["position"]))
        if record["position"] == 1:
            fallbacks += 1
            assert len(reports) == 1 and str(case / "2") in reports[0] and (case / "2.damaged").is_dir()
        else:
            assert (record["position"], reports) == (2, [])
        shutil.rmtree(case)
    assert fallbacks >= 4  # arrays, their index, its manifest, the record


def test_a_changed_number_in_a_valid_file_is_found(tmp_path):
    save_steps(tmp_path / "run", [1, 2], metrics={1: 0.1, 2: 0.2})
    damage_arrays(tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match="params/student/fc/bias"):
        checkpoint.read(tmp_path / "run", which="best")
    reports = []
    with Checkpoints(tmp_path / "run", report=reports.append) as checkpoints:
        state, record = checkpoints.restore_latest(abstract(train_state()))
    assert_same_bits(state, train_state(1))
    assert record == {"position": 1}
    assert len(reports) == 1
    assert "1 of 12 arrays" in reports[0] and "params/student/fc/bias" in reports[0] and "2.damaged" in reports[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"content": 3}', '{"content": "{}", "sha256": "0"}'])
def test_a_broken_record_is_found(tmp_path, text):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2" / "record" / "data.json").write_text(text)
    reports = []
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore_latest(abstract(train_state()))[1] == {"position": 1}
    assert len(reports) == 1 and str(tmp_path / "2") in reports[0]


def test_a_tampered_record_is_found(tmp_path):
    save_steps(tmp_path, [1, 2])
    file = tmp_path / "2" / "record" / "data.json"
    file.write_text(file.read_text().replace('position\\": 2', 'position\\": 3'))
    reports = []
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        assert checkpoints.restore_latest(abstract(train_state()))[1] == {"position": 1}
    assert "SHA-256" in reports[0]


def test_goes_on_after_damage_and_keeps_what_was_damaged(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    for step in (2, 3):
        flip_bit(largest_file(tmp_path / str(step)))
    reports = []
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        assert checkpoints.restore_latest(abstract(train_state()))[1] == {"position": 1}
        for step in (2, 3, 4):
            checkpoints.save(step, train_state(step), {"position": step})
    assert len(reports) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.damaged", "3", "3.damaged", "4"]
    flip_bit(largest_file(tmp_path / "4"))
    flip_bit(largest_file(tmp_path / "3"))
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        assert checkpoints.restore_latest(abstract(train_state()))[1] == {"position": 2}
    assert (tmp_path / "3.damaged+").is_dir()


def test_no_silent_restart_when_all_are_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        flip_bit(largest_file(tmp_path / str(step)))
    for reported in (2, 0):  # the second start does not find them under their names any more
        reports = []
        checkpoints = Checkpoints(tmp_path, report=reports.append)
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: 1.damaged, 2.damaged"):
            checkpoints.restore_latest(abstract(train_state()))
        assert len(reports) == reported


def test_half_written_folders_are_removed_and_reported(tmp_path):
    save_steps(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / f"2{snapshot.TEMPORARY}")
    shutil.copytree(tmp_path / "1", tmp_path / "0.deleting")
    reports = []
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        assert checkpoints.steps() == [1]
    assert len(reports) == 1 and "half-written" in reports[0] and f"2{snapshot.TEMPORARY}" in reports[0]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_trouble_that_is_not_damage_puts_nothing_aside(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    with Checkpoints(tmp_path, report=fail) as checkpoints:
        for error in (PermissionError("no"), MemoryError("no"), ValueError("PERMISSION_DENIED: no")):

            def load(*_, error=error):
                try:
                    raise error
                except Exception as inner:
                    raise KeyError("something else") from inner

            monkeypatch.setattr(snapshot.ocp, "load_checkpointables", load)
            with pytest.raises(OSError, match="could not be read, damaged or not"):
                checkpoints.restore_latest(abstract(train_state()))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# --- reading another run ---


def test_read_gives_a_teacher_without_its_optimizer(tmp_path):
    save_steps(tmp_path, [1, 2, 3], metrics={2: 0.9, 3: 0.3})
    before = sorted(tmp_path.rglob("*"))
    for which, step in (("best", 2), ("latest", 3)):
        tree, record = checkpoint.read(tmp_path, which=which)
        state = train_state(step)
        assert record == {"position": step}
        assert set(tree) == {"params", "variables", "ema"}
        for field, arrays in tree.items():
            assert_same_bits(arrays, getattr(state, field))
            assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert sorted(tmp_path.rglob("*")) == before


def test_read_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.read(tmp_path / "nowhere")
    save_steps(tmp_path, [1, 2])
    with pytest.raises(ValueError, match='"latest" instead of "best"'):
        checkpoint.read(tmp_path)
    with pytest.raises(ValueError, match="which='newest'"):
        checkpoint.read(tmp_path, which="newest")
    flip_bit(largest_file(tmp_path / "2"))
    with pytest.raises(CheckpointError, match="Choose another"):
        checkpoint.read(tmp_path, which="latest")
    assert (tmp_path / "2").is_dir()


# --- disks ---


@contextlib.contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB; only root can make one."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def big_state(step):
    return {"params": {"x": jax.random.normal(jax.random.key(step), (1000, 500))}}


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(tiny_disk):
    with Checkpoints(tiny_disk, report=fail) as checkpoints:
        checkpoints.save(1, train_state(1), {"position": 1})
        checkpoints.save(2, big_state(2), {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
    message = str(caught.value)
    assert "No space left on device" in message and str(tiny_disk) in message
    assert "step 2 could not be written" in message and "last good checkpoint is step 1" in message
    reports = []
    with Checkpoints(tiny_disk, report=reports.append) as checkpoints:
        state, _ = checkpoints.restore_latest(abstract(train_state()))
        assert_same_bits(state, train_state(1))
        checkpoints.save(2, train_state(2), {})  # the half-written one gave its space back
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert len(reports) == 1 and "half-written" in reports[0]


@pytest.mark.parametrize("surface", ["save", "wait", "close"])
def test_a_failed_write_surfaces_once_at_the_next_call(tmp_path, surface):
    checkpoints = Checkpoints(tmp_path, report=fail)
    call = {
        "save": lambda: checkpoints.save(3, train_state(3), {}),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
    }
    checkpoints.save(1, train_state(1), {})
    checkpoints.wait()
    with file_size_limit(100_000):
        checkpoints.save(2, big_state(2), {})
        with pytest.raises(CheckpointError, match="File too large"):
            call[surface]()
    assert checkpoints.steps() == [1]
    checkpoints.save(4, train_state(4), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


@pytest.mark.parametrize("where", ["run", "run/deeper"])
def test_an_unwritable_directory_is_an_error_at_the_start(tmp_path, where):
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match=f"cannot write checkpoints to .*{where}.*choose another work directory"):
        Checkpoints(tmp_path / where, report=fail)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_an_error_at_the_start(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoints(tmp_path, report=fail)


def test_a_save_that_cannot_start_is_an_error(tmp_path):
    with Checkpoints(tmp_path / "run", report=fail) as checkpoints:
        (tmp_path / "run").rmdir()
        (tmp_path / "run").write_text("")
        with pytest.raises(CheckpointError, match="step 1 could not be written.*no earlier one"):
            checkpoints.save(1, train_state(1), {})


# --- kill -9 ---


def run_child(directory, steps):
    command = [sys.executable, KILLED_RUN, directory, str(steps)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def numbered(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path):
    killed_run = runpy.run_path(str(KILLED_RUN))
    directory, rng, last, while_writing = tmp_path / "run", random.Random(0), 0, 0
    for moment in ("writing", "any", "any"):
        child = run_child(directory, 1_000_000)
        lines = []
        for line in child.stdout:
            lines.append(line.split())
            if lines[-1][0] == "finished" and int(lines[-1][1]) > last:  # this session got somewhere
                break
        time.sleep(rng.uniform(0, 0.15))
        while moment == "writing" and not list(directory.glob(f"*{snapshot.TEMPORARY}*")):
            time.sleep(0.0005)
        child.kill()
        lines += [line.split() for line in child.stdout]
        assert child.wait() == -signal.SIGKILL
        assert not any("damaged" in line for line in lines)
        while_writing += bool(list(directory.glob(f"*{snapshot.TEMPORARY}*")))
        finished = max(int(line[1]) for line in lines if line[0] == "finished")
        assert numbered(directory)[-1] >= finished > last
        last = finished
    assert while_writing >= 1

    end = numbered(directory)[-1] + 2
    child = run_child(directory, end)
    child.communicate()
    assert child.returncode == 0
    with Checkpoints(directory, report=fail) as checkpoints:
        state, record = checkpoints.restore_latest(abstract(killed_run["initial"]()))
        assert checkpoints.steps() == [end - 1, end]
    straight = killed_run["initial"]()
    for _ in range(end):
        straight = killed_run["advance"](straight)
    assert record == {"step": end}
    assert_same_bits(state, straight)


# --- several processes ---

PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, directory, flips = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "flip"
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from wkd_jax.training import checkpoint

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
def put(value, *axes):
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda i: value[i])
reports = []
with checkpoint.Checkpoints(directory, keep=2, report=reports.append) as checkpoints:
    state = {"params": {"sharded": put(x, "data"), "replicated": put(x)}}
    if not flips:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state, {"step": step}, metric=-step)
        checkpoints.wait()
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored, record = checkpoints.restore_latest(abstract)
    for name, array in restored["params"].items():
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), x[shard.index]), name
    assert (checkpoints.steps(), record["step"], len(reports)) == (([1, 3], 3, 1) if flips else ([1, 3, 4], 4, 0))
    if index == 1:  # one process alone
        assert np.array_equal(checkpoint.read(directory, which="best")[0]["params"]["sharded"], x)
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_agree_on_damage(tmp_path):
    for flips in ("", "flip"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments = [[sys.executable, "-c", PROCESS, str(port), str(index), str(tmp_path), flips] for index in (0, 1)]
        processes = [subprocess.Popen(each, env=ENVIRONMENT) for each in arguments]
        try:
            assert [process.wait(timeout=120) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
        if not flips:
            flip_bit(largest_file(tmp_path / "4" / "state"))
