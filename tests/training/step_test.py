"""The step's reduction, and the hard cases of the contract: lenses, memories, constants, learned temperatures."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests import contract_test as contract
from wkd_jax import losses, registry
from wkd_jax.models import functional
from wkd_jax.models.functional import Constant, Memory
from wkd_jax.training.step import Frozen, Learner, Program, weigh
from wkd_jax.types import Batch, Outputs, Term


def test_terms_are_averaged_over_what_counts():
    valid = jnp.array([True, True, False])
    terms = {
        "label": {"ce": Term(jnp.array([1.0, 3.0, 100.0]), 0.5)},
        "m": {
            "rows": Term(jnp.arange(6.0).reshape(3, 2), 2.0),  # rows of valid examples: 0, 1, 2, 3
            "masked": Term(jnp.array([5.0, 7.0, 9.0]), 1.0, jnp.array([False, True, True])),
            "nothing": Term(jnp.array([5.0, 7.0, 9.0]), 1.0, jnp.zeros(3, bool)),
            "whole": Term(jnp.float32(4.0), 0.25),
            "logged": Term(jnp.array([jnp.nan, 1.0, 1.0]), None),
        },
    }
    total, metrics = weigh(terms, valid)
    assert float(total) == 0.5 * 2 + 2.0 * 1.5 + 8.0 + 0.0 + 1.0
    assert float(metrics["m/rows"]) == 1.5 and float(metrics["m/rows/weight"]) == 2.0
    assert np.isnan(metrics["m/logged"]) and "m/logged/weight" not in metrics


def test_what_is_masked_cannot_spoil_the_gradient():
    def total(x):
        value = jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), jnp.nan)
        return weigh({"m": {"t": Term(value, 1.0, x > 0)}}, jnp.ones(2, bool))[0]

    np.testing.assert_allclose(jax.grad(total)(jnp.array([2.0, -1.0])), [0.5, 0.0])


def test_half_precision_terms_are_averaged_in_float32():
    value = jnp.full(4096, 1.001, jnp.bfloat16)
    total, _ = weigh({"m": {"t": Term(value)}}, jnp.ones(4096, bool))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, float(value[0]), rtol=1e-6)


class Rows(nnx.Module):
    """A student with two rows an image, as a detector has."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, image, *, train, rngs):
        del train, rngs
        return Outputs(self.scale[...] * image, valid=jnp.array([[True, True], [True, False]]))


class RowTask:
    """Its rows' logits are its loss."""

    def __getattr__(self, name):  # normalise and distilled give back what they are given, inputs are none
        return lambda first, *_, **__: {} if name.endswith("inputs") else first

    def terms(self, context):
        return {"row": Term(context.student.logits, 1.0, context.student.valid)}


def test_rows_of_an_image_that_could_not_be_read_do_not_count():
    structure, params, variables, _ = functional.split(Learner(Rows(), {}))
    settings = {field.name: None for field in dataclasses.fields(Program)}
    program = Program(**{**settings, "learner": structure, "task": RowTask()})
    index = jnp.arange(2)
    for valid, expected in (([True, True], (1 + 2 + 30) / 3), ([False, True], 30.0), ([True, False], 1.5)):
        batch = Batch(jnp.array([[1.0, 2.0], [30.0, 400.0]]), index, index, jnp.array(valid))
        total, _ = program.loss(params, variables, Frozen({}, {}, jnp.int32(0)), batch, None, jax.random.key(0))
        np.testing.assert_allclose(total, expected)


class Everything(nnx.Module):
    """Uses the whole contract at once: what FCFD, CRD and CTKD need of it."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"weight": 1.0}
    NEEDS_TEACHER = True

    def __init__(self, config, setup, *, rngs):
        student, teacher = setup.student.taps["stage2"], setup.teacher.taps["stage2"]
        self.bridge = nnx.Conv(student.channels, teacher.channels, (1, 1), rngs=rngs)  # FCFD
        self.bank = Memory(jnp.zeros((len(setup.labels()), setup.student.pooled)))  # CRD
        self.first = Memory(jnp.zeros(()))
        self.labels = Constant(jnp.asarray(setup.labels()))
        self.temperature = nnx.Param(4.0)  # CTKD

    def terms(self, context):
        bridged = context.teacher_model().forward_from(
            "stage2", self.bridge(context.student.taps["stage2"]), train=True
        )
        again = context.student_model()(context.batch.image, train=True)
        step = context.progress.step
        self.first[...] = jnp.where(step == 0, jnp.mean(context.student.pooled), self.first[...])
        rows = jax.lax.stop_gradient(context.student.pooled)
        self.bank[...] = self.bank[...].at[context.batch.index].set(rows)
        # The gradient of the temperature is reversed by arithmetic.
        temperature = -self.temperature[...] + jax.lax.stop_gradient(2 * self.temperature[...])
        same = (self.labels[...][context.batch.index] == context.labels).astype(jnp.float32)
        return {
            "bridged": Term(losses.kd(bridged.logits, context.teacher.logits, temperature=1.0)),
            "kd": Term(losses.kd(context.student.logits, context.teacher.logits, temperature=temperature)),
            "again": Term(jnp.square(again.logits - context.student.logits).sum(-1), None),
            "same": Term(same, None),
            "noise": Term(jax.random.normal(context.key, (len(context.labels),)), None),
        }


@pytest.fixture(name="everything")
def _everything(monkeypatch):
    known = dict(registry.entries("methods"))
    others = registry.entries
    monkeypatch.setattr(
        registry, "entries", lambda kind: {**known, "everything": Everything} if kind == "methods" else others(kind)
    )


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_the_contract_carries_the_hard_cases(everything, devices):
    sharded = [("methods/everything/bank$", ("data",))] if devices > 1 else []
    built = contract.make("everything", devices, sharding=sharded)
    start = {name: np.asarray(value) for name, value in {**built.state.params, **built.state.variables}.items()}
    state, metrics, compilations = contract.steps(built, 2)
    assert compilations == 1
    first, second = metrics
    # The lens saw the same batch with the same parameters, and its pass left no trace in the student's statistics.
    assert first["everything/again"] < 1e-8
    plain, _, _ = contract.steps(contract.make("none", devices), 1)
    once, _, _ = contract.steps(contract.make("everything", devices, sharding=sharded), 1)
    for name, value in plain.variables.items():
        np.testing.assert_allclose(once.variables[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    # Memories: rows of both batches are filled, the constant of the first batch stays.
    bank = np.asarray(state.variables["methods/everything/bank"])
    assert np.all(np.any(bank[:17] != 0, axis=1)) and not bank[17:].any()
    np.testing.assert_array_equal(
        state.variables["methods/everything/first"], once.variables["methods/everything/first"]
    )
    if devices > 1:
        shards = state.variables["methods/everything/bank"].addressable_shards
        assert {shard.data.shape for shard in shards} == {(4, 64)}
    assert first["everything/same"] == 1.0 and first["everything/noise"] != second["everything/noise"]
    # Gradients reached the bridge through the teacher's later stages, and the temperature.
    for name in ("methods/everything/bridge/kernel", "methods/everything/temperature"):
        assert np.any(np.asarray(state.params[name]) != start[name]), name
    assert not any("labels" in name for name in {**state.params, **state.variables})


def test_the_learned_temperature_climbs(everything):
    """Its gradient is reversed, so gradient descent on everything else raises the loss in this direction."""
    built = contract.make("everything", 1)
    batch = contract.batch(built)
    progress = built.program.clock.progress(jnp.zeros((), jnp.int32))

    def total(params):
        return built.program.loss(params, built.state.variables, built.frozen, batch, progress, jax.random.key(0))[0]

    name = "methods/everything/temperature"
    gradient = jax.jit(jax.grad(total))(built.state.params)[name]
    up = jax.jit(total)({**built.state.params, name: built.state.params[name] + 0.3})
    down = jax.jit(total)({**built.state.params, name: built.state.params[name] - 0.3})
    np.testing.assert_allclose(gradient, -(up - down) / 0.6, rtol=0.05)


def test_randomness_is_a_function_of_seed_and_step(everything):
    noise = [
        contract.steps(contract.make("everything", 1, seed=seed), 1)[1][0]["everything/noise"] for seed in (0, 0, 1)
    ]
    assert noise[0] == noise[1] != noise[2]


def test_microbatches_add_up_to_their_step():
    """BatchNorm sees groups of 4 either way, and augmentation depends on the example: the same gradient."""
    changes = {"student": {"name": "resnet8", "norm_group_size": 4}, "task": {"pad": 2, "flip": True}}
    runs = [contract.make("kd", 2, accumulation=parts, **changes) for parts in (1, 4)]
    whole = contract.batch(runs[0])
    cut = jax.tree.map(lambda x: np.asarray(x).reshape(4, 4, *x.shape[1:]), whole)
    place = NamedSharding(runs[1].mesh, PartitionSpec(None, "data"))
    outcomes = []
    for built, batch in zip(runs, (whole, jax.device_put(cut, place)), strict=True):
        outcomes.append(jax.jit(built.program.train_step)(built.state, built.frozen, batch))
    (one, one_metrics), (parts, parts_metrics) = outcomes
    assert one_metrics.keys() == parts_metrics.keys()
    for name, value in one_metrics.items():
        np.testing.assert_allclose(value, parts_metrics[name], rtol=1e-5, atol=1e-7, err_msg=name)
    for name in one.params:
        moved = [np.asarray(state.params[name]) - np.asarray(runs[0].state.params[name]) for state in (one, parts)]
        np.testing.assert_allclose(*moved, atol=1e-4 * np.abs(moved[0]).max() + 1e-9, err_msg=name)
    # Running statistics move once a microbatch: 1 - 0.9^4 of the way instead of 0.1.
    name = "student/bn1/mean"
    assert np.abs(parts.variables[name]).max() > 3 * np.abs(one.variables[name]).max()
