"""What the loop does with metrics: the first step that is not finite is named, with its terms."""

import re

import jax
import jax.numpy as jnp
import pytest

from wkd_jax import config as config_lib
from wkd_jax.training import loop, metrics
from wkd_jax.training.clock import Clock
from wkd_jax.training.loop import TrainingError, Watch
from wkd_jax.training.metrics import MetricWriter
from wkd_jax.training.progress import Progress


@pytest.fixture(name="watch")
def _watch(tmp_path):
    with MetricWriter(tmp_path, resume_step=0) as writer, Progress(10, description="x") as progress:
        yield Watch(Clock(64, 32, 5), writer, progress, log_every=2, last_good=0)


def values(kl=1.0, total=2.0):
    return {"kd/kl": jnp.float32(kl), "kd/kl/weight": jnp.float32(1), "total": jnp.float32(total)}


def test_every_second_step_is_logged(watch, tmp_path):
    for step in range(1, 6):
        watch.add(step, values(kl=step))
    watch.check()
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["kd/kl"], line["epoch"]) for line in lines] == [(2, 2.0, 1.0), (4, 4.0, 2.0)]


def test_the_newest_step_can_be_left_to_the_devices(watch, tmp_path):
    watch.add(1, values())
    watch.check(newest=False)
    watch.add(2, values(kl=2))
    watch.check(newest=False)
    assert metrics.read(tmp_path / "metrics.jsonl") == []
    watch.add(3, values())
    watch.check(newest=False)
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [2]
    assert [step for step, _ in watch.pending] == [3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("last_good", [0, 2])
def test_the_step_and_the_term_are_named(watch, tmp_path, bad, last_good):
    watch.last_good = last_good
    watch.add(1, values())
    watch.add(2, values())
    watch.add(3, values(kl=bad, total=bad))  # not a logged step
    watch.add(4, values(total=bad))
    with pytest.raises(TrainingError, match=rf"step 3: kd/kl is {bad} \(not finite: kd/kl, total\)") as error:
        watch.check()
    assert ("checkpoint of step 2 is kept" if last_good else "no checkpoint was saved") in str(error.value)
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [2]


def test_a_device_without_memory_is_explained_with_what_can_be_done():
    config = {"remat": False, "dtype": "float32", "accumulation": 1, "global_batch_size": 256}
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9000000000 bytes.\nmore lines")
    text = str(loop.explained(error, config))
    for words in (
        "9000000000 bytes",
        "remat=True",
        "mesh.data",
        "bfloat16",
        "accumulation",
        "global_batch_size (now 256)",
    ):
        assert words in text, words
    assert "more lines" not in text
    other = loop.explained(jax.errors.JaxRuntimeError("INTERNAL: fire"), config)
    assert str(other) == "the devices failed: INTERNAL: fire"


def test_a_run_compiles_one_train_step_and_one_evaluation_step(tmp_path, caplog):
    """Over several epochs, evaluations and checkpoints."""
    settings = {
        "epochs": 2,
        "global_batch_size": 512,
        "data": {"name": "digits"},
        "student": {"name": "resnet8"},
        "checkpoint_every": 2,
        "log_every": 1,
    }
    with jax.log_compiles(), caplog.at_level("WARNING"):
        result = loop.run(config_lib.resolve(settings), tmp_path / "run", None)
    assert result["steps"] == 6
    compiled = re.findall(r"Compiling jit\((train_step|eval_step)\)", caplog.text)
    assert sorted(compiled) == ["eval_step", "train_step"]
