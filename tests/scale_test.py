"""A mini ImageNet from the command line: on 1 and 8 devices, in two processes; killed, preempted, gone on elsewhere."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import mini_imagenet
import numpy as np
import pytest
from flax import nnx

from wkd_jax import registry, weights
from wkd_jax.data import image
from wkd_jax.models import functional
from wkd_jax.training import checkpoint, metrics, workdir
from wkd_jax.types import Normalisation

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 24  # 4 epochs of 48 images

CONFIG = """
from ml_collections import ConfigDict

def get_config(argument):
    teacher, student, size, workers = argument.split(",")
    return ConfigDict(dict(
        name="mini", epochs=4, global_batch_size=8,
        data=dict(name="image_folder", data_dir="tree", image_size=int(size), resize=int(size) + 8, num_classes=4,
                  workers=int(workers)),
        task=dict(mixup=0.2, cutmix=1.0, erase=0.25, label_smoothing=0.1),
        student=dict(name=student), teacher=dict(weights="teacher"),
        methods=dict(
            wkd_l=dict(weight=5.0, schedule=dict(name="constant")),
            wkd_f=dict(weight=0.02, projector="conv1x1", grid=1),
        ),
        optimizer=dict(learning_rate=0.0005, schedule="cosine"),
        log_every=1, eval_every=2, checkpoint_every=5, keep=2,
    ))
"""


def teacher(home, name, dtype=jnp.float32):
    """A teacher with random weights and plausible running statistics, as a directory of weights."""
    model = registry.get("models", name)(4, rngs=nnx.Rngs(0), dtype=dtype)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)), jnp.float32)
    for _ in range(20):
        model(images, train=True)
    _, params, variables, _ = functional.split(model)
    arrays = {key: np.asarray(value) for key, value in {**params, **variables}.items()}
    normalisation = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    weights.write(home / "teacher", arrays, {"name": name}, normalisation)


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory):
    home = tmp_path_factory.mktemp("scale")
    mini_imagenet.write_folder(home / "tree")
    (home / "config.py").write_text(CONFIG)
    teacher(home, "resnet8")
    return home


def environment(home, **more):
    """Compiled programs are shared."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "WKD_JAX_CACHE": str(home / "cache"),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(home / "jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **more,
    }


def start(home, directory, *, devices=1, processes=1, argument="resnet8,resnet8,32,0", extra=()):
    """The run in one process, or in several by way of launch/local.sh."""
    arguments = ["--config", f"config.py:{argument}", "--workdir", directory, *extra]
    if processes == 1:
        words, more = [sys.executable, "-m", "wkd_jax.main", *arguments], {"JAX_NUM_CPU_DEVICES": str(devices)}
    else:
        words = ["bash", str(ROOT / "launch" / "local.sh"), *arguments]
        more = {
            "PROCESSES": str(processes),
            "DEVICES": str(devices),
            "COMMAND": f"{sys.executable} -m wkd_jax.main",
            "LOGS": str(home / f"{directory}.logs"),
        }
    output = (home / f"{directory}.out").open("a")
    return subprocess.Popen(words, env=environment(home, **more), cwd=home, stdout=output, stderr=subprocess.STDOUT)


def output(home, directory):
    logs = sorted((home / f"{directory}.logs").glob("*")) if (home / f"{directory}.logs").exists() else []
    return "\n".join(path.read_text() for path in [home / f"{directory}.out", *logs])


def run(home, directory, **how):
    code = start(home, directory, **how).wait(timeout=600)
    assert code == 0, output(home, directory)
    return home / directory


def trajectory(directory):
    """Every logged number but the clock's, [lines, numbers]; the names of the first line."""
    lines = metrics.read(directory / "metrics.jsonl")
    lines = [{k: v for k, v in line.items() if k not in metrics.TIME_KEYS} for line in lines]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [12, 24]
    return lines


def check_same(left, right, rtol=1e-5):
    for one, other in zip(trajectory(left), trajectory(right), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, str):
                assert value == other[name]
            else:
                # A ReLU turned by rounding moves the gradient by a finite amount; the loss hardly notices.
                within = 100 * rtol if name == "grad_norm" else rtol
                tiny = 1e-7 if rtol else 0  # of a total near 2
                np.testing.assert_allclose(value, other[name], rtol=within, atol=tiny, err_msg=f"{one['step']} {name}")


def logged(directory):
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "it ended, or nothing happened"
        time.sleep(0.02)


@pytest.fixture(scope="module", name="whole")
def _whole(home):
    """The run on one device, uninterrupted."""
    return run(home, "whole")


@pytest.mark.slow  # the run below that is preempted does its first half on eight
def test_eight_devices_follow_one(home, whole):
    check_same(run(home, "eight", devices=8), whole)


def test_two_processes_follow_one_also_when_one_is_killed(home, whole):
    """Through the launcher, which starts both again. The last checkpoint's steps are repeated, to the same numbers."""
    process = start(home, "killed", devices=4, processes=2)
    directory = home / "killed"
    wait_for(lambda: logged(directory) >= 8, process)
    started = time.monotonic()
    os.kill(member(home, directory, 1), signal.SIGKILL)
    assert process.wait(timeout=600) == 0, output(home, "killed")
    said = output(home, "killed")
    assert re.search(r"process 1 ended with exit code 137", said), said
    assert re.search(r"continuing from step \d+", said) and time.monotonic() - started < 600
    check_same(directory, whole)
    assert workdir.read_json(directory / workdir.RESULT)["processes"] == 2


def member(home, directory, index):
    """Process id of one of the run's processes."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = {b"wkd_jax.main", b"--distributed", directory.name.encode()} <= set(words)
        if mine and pathlib.Path(os.readlink(path / "cwd")) == home and f"JAX_PROCESS_ID={index}".encode() in variables:
            return int(path.name)
    raise AssertionError(f"no process {index} of {directory}")


def test_preempted_in_the_middle_of_an_epoch_it_goes_on_on_other_devices(home, whole):
    process = start(home, "preempted", devices=8)
    directory = home / "preempted"
    wait_for(lambda: logged(directory) >= 14, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, output(home, "preempted")
    said = output(home, "preempted")
    stopped = int(re.search(r"preempted: stopped after step (\d+) of 24, which is saved", said).group(1))
    assert 13 <= stopped < STEPS
    assert str(stopped) in [path.name for path in (directory / workdir.CHECKPOINTS).iterdir()]
    run(home, "preempted", devices=2, extra=("--config.checkpoint_every=6", "--config.mesh.model=2"))
    assert f"continuing from step {stopped}" in output(home, "preempted")
    check_same(directory, whole)


def test_a_run_of_another_config_is_refused(home, whole):
    process = start(home, "whole", extra=("--config.optimizer.learning_rate=0.5", "--config.keep=3"))
    assert process.wait(timeout=120) == 1
    assert "holds a run of another config (optimizer.learning_rate: 0.0005 -> 0.5): choose" in output(home, "whole")


def test_check_says_what_a_run_would_be(home):
    process = start(home, "checked", devices=4, extra=("--check", "--config.accumulation=2"))
    assert process.wait(timeout=300) == 0, output(home, "checked")
    said = output(home, "checked")
    for words in (
        r"devices +4 x cpu in 1 process",
        r"data +tree: 48 training images of 4 classes, 32 x 32 pixels",
        r"student +resnet8, [\d,]+ parameters",
        r"class similarity to be computed first",
        r"batch +8 examples a step, 1 a device, 2 times a step",
        r"steps +24 in 4 epochs",
        r"memory +0\.\d\d GiB a device",
        r"check passed",
    ):
        assert re.search(words, said), (words, said)
    assert not (home / "checked").exists()
    process = start(home, "unchecked", extra=("--check", "--config.teacher.weights=nowhere"))
    assert process.wait(timeout=120) == 1 and "nowhere" in output(home, "unchecked")


@pytest.mark.slow
def test_resnet34_to_resnet18_resumes_exactly_and_evaluates_exactly(home, tmp_path):
    """At 64 pixels with Grain workers: killed and gone on to the same bits; accuracy counted again by hand."""
    mini_imagenet.write_folder(tmp_path / "tree")
    (tmp_path / "config.py").write_text(CONFIG)
    teacher(tmp_path, "resnet34")
    argument = "resnet34,resnet18,64,2"
    whole = run(tmp_path, "whole", argument=argument)
    process = start(tmp_path, "resumed", argument=argument)
    wait_for(lambda: logged(tmp_path / "resumed") >= 13, process, 900)
    process.kill()
    process.wait()
    resumed = run(tmp_path, "resumed", argument=argument)
    check_same(resumed, whole, rtol=0)
    trees = [checkpoint.read(path / workdir.CHECKPOINTS, which="latest")[0] for path in (whole, resumed)]
    for group in ("params", "variables"):
        for name, value in trees[0][group].items():
            np.testing.assert_array_equal(value, trees[1][group][name], err_msg=name)

    model = registry.get("models", "resnet18")(4, rngs=nnx.Rngs(0))
    functional.update(model, functional.under({**trees[0]["params"], **trees[0]["variables"]}, "student"))
    files = sorted((tmp_path / "tree" / "val").glob("*/*.JPEG"))
    pixels = np.stack([image.evaluation_image(f.read_bytes(), image_size=64, resize=72) for f in files])
    inputs = (pixels / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    logits = np.asarray(model(jnp.asarray(inputs, jnp.float32), train=False).logits)
    classes = sorted({f.parent.name for f in files})
    correct = logits.argmax(-1) == [classes.index(f.parent.name) for f in files]
    result = json.loads((whole / "result.json").read_text())
    assert result["examples"] == len(files) == mini_imagenet.VALIDATION
    assert result["student_top1"] == 100.0 * correct.sum() / len(files)
