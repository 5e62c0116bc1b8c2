"""The classification task's training inputs: what is drawn once, in which order, and what stays off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from wkd_jax import losses
from wkd_jax.data import augment
from wkd_jax.data.memory import MemoryDataSet, Split
from wkd_jax.models import functional
from wkd_jax.tasks.classification import Classification
from wkd_jax.training import sharding
from wkd_jax.training.clock import Clock
from wkd_jax.training.step import Frozen, Learner, Program
from wkd_jax.types import Batch, Context, Normalisation, Outputs, Term, TrainState

BATCH, CLASSES = 16, 5
STUDENT = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
TEACHER = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EVERYTHING = {"pad": 2, "flip": True, "mixup": 0.8, "cutmix": 1.0, "mix_group_size": 2, "erase": 0.5}


def _data():
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (32, 16, 16, 3), dtype=np.uint8), np.arange(32, dtype=np.int32) % CLASSES)
    return MemoryDataSet("drawn", tuple("abcde"), split, split, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


DATA = _data()


def _task(**changes):
    return Classification({**Classification.DEFAULTS, **changes}, DATA)


def _batch():
    split = DATA.train
    index = np.arange(7, 7 + BATCH, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(split.images[index], split.labels[index], index, np.ones(BATCH, bool)))


@pytest.mark.parametrize("changes", [{}, {"pad": 2, "flip": True}, {"mix_group_size": 6, "cutmix_share": 0.1}])
def test_what_is_off_adds_nothing_to_the_program(changes):
    task = _task(**changes)

    def bare(batch, key):
        pad, flip = changes.get("pad", 0), changes.get("flip", False)
        batch = dataclasses.replace(batch, image=augment.augment(batch.image, batch.index, key, pad=pad, flip=flip))
        return dataclasses.replace(batch, image=augment.normalise(batch.image, STUDENT.mean, STUDENT.std))

    def ours(batch, key):
        return task.normalise(task.augment(batch, key), STUDENT)

    arguments = _batch(), jax.random.key(0)
    assert str(jax.make_jaxpr(ours)(*arguments)) == str(jax.make_jaxpr(bare)(*arguments))
    assert jax.tree.structure(jax.eval_shape(ours, *arguments)) == jax.tree.structure(arguments[0])


def _everything(batch, key):
    """Augmented, and as student and teacher are fed."""
    task = _task(**EVERYTHING)
    augmented = task.augment(batch, key)
    return augmented, *(task.normalise(augmented, side).image for side in (STUDENT, TEACHER))


@pytest.fixture(scope="module")
def everything():
    """(batch, key, what `_everything` makes of it on one device); an image could not be read."""
    batch, key = dataclasses.replace(_batch(), valid=jnp.arange(BATCH) != 2), jax.random.key(3)
    return batch, key, jax.jit(_everything)(batch, key)


def test_order_is_crop_mix_normalise_erase(everything):
    batch, key, (augmented, *outputs) = everything
    cropped = jax.jit(_task(pad=2, flip=True).augment)(batch, key)
    assert augmented.image.dtype == jnp.uint8 and augmented.label.shape == (BATCH, CLASSES)

    # Crop and flip come first and do not change when the rest is on: the images that are not mixed show it.
    np.testing.assert_array_equal(augmented.image[2:4], cropped.image[2:4])
    np.testing.assert_array_equal(augmented.label[2:4], np.eye(CLASSES)[np.asarray(batch.label[2:4])])
    # The label says how much of the partner was mixed in, mixup's at least: all pixels keep to it.
    shares = []
    for i in range(0, BATCH, 2):
        own, partner = cropped.image[i].astype(jnp.float32), cropped.image[i + 1].astype(jnp.float32)
        if i == 2 or batch.label[i] == batch.label[i + 1]:
            continue
        lam = augmented.label[i, batch.label[i]]
        shares.append(float(lam))
        mixed = jnp.abs(lam * own + (1 - lam) * partner - augmented.image[i]) <= 0.501
        kept = (augmented.image[i] == own) | (augmented.image[i] == partner)
        assert bool(mixed.all() | kept.all()), i
    assert len(set(shares)) == len(shares) >= 6  # groups draw independently

    # Student and teacher see their own normalisation of the same pixels, and the same noise in the same place.
    box = np.asarray(augmented.extra["erase_box"])
    inside = np.zeros((BATCH, 16, 16), bool)
    for i, (top, left, bottom, right) in enumerate(box):
        inside[i, top:bottom, left:right] = True
    assert 3 <= inside.any(axis=(1, 2)).sum() <= 13
    outputs = [np.asarray(image) for image in outputs]
    np.testing.assert_array_equal(outputs[0][inside], outputs[1][inside])
    assert abs(outputs[0][inside].std() - 1) < 0.2
    for image, side in zip(outputs, (STUDENT, TEACHER), strict=True):
        clean = augment.normalise(augmented.image, side.mean, side.std)
        np.testing.assert_allclose(image[~inside], np.asarray(clean)[~inside], atol=1e-6)  # fused or not
    # A loaded batch, as in evaluation, is never erased.
    clean = augment.normalise(batch.image, STUDENT.mean, STUDENT.std)
    np.testing.assert_array_equal(_task(**EVERYTHING).normalise(batch, STUDENT).image, clean)


def test_probability_zero_gives_soft_labels_of_unmixed_images():
    batch = _batch()
    augmented = jax.jit(_task(mixup=0.8, mix_probability=0.0).augment)(batch, jax.random.key(0))
    np.testing.assert_array_equal(augmented.image, batch.image)
    np.testing.assert_array_equal(augmented.label, np.eye(CLASSES)[np.asarray(batch.label)])


def test_smoothing_mixed_labels_equals_mixing_smoothed_labels():
    task = _task(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    batch = jax.jit(task.augment)(_batch(), jax.random.key(2))
    logits = np.random.default_rng(0).normal(size=(BATCH, CLASSES))
    student = Outputs(jnp.asarray(logits, jnp.float32))
    labels = task.labels(batch, student)
    assert labels.shape == (BATCH,) and jnp.issubdtype(labels.dtype, jnp.integer)
    np.testing.assert_array_equal(labels, np.argmax(np.asarray(batch.label), axis=1))
    context = Context(batch, None, labels, student, None, lambda: None, None, None, None)
    hard = np.asarray(_batch().label)
    smoothed = 0.9 * np.eye(CLASSES)[hard] + 0.1 / CLASSES
    differ = np.flatnonzero(hard != hard[::-1])
    lam = float(batch.label[differ[0], hard[differ[0]]])
    assert 0 < lam < 1
    target = lam * smoothed + (1 - lam) * smoothed[::-1]
    expected = -np.sum(target * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))), axis=1)
    np.testing.assert_allclose(task.terms(context)["cross_entropy"].value, expected, rtol=1e-5)  # float32


def test_eight_devices_equal_one_without_communication(everything):
    batch, key, alone = everything
    mesh = sharding.make_mesh({"data": -1, "model": 1})
    rows = jax.NamedSharding(mesh, jax.P("data"))
    placed = sharding.global_batch(jax.tree.map(np.asarray, batch), mesh)
    compiled = jax.jit(_everything, out_shardings=rows).lower(placed, key).compile()
    (augmented, *outputs), (expected, *expected_outputs) = compiled(placed, key), alone
    for found, wanted in zip(
        (augmented.image, augmented.label, *outputs), (expected.image, expected.label, *expected_outputs), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    text = compiled.as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if op in text]


class Flat(nnx.Module):
    """The smallest classifier."""

    def __init__(self, seed):
        self.fc = nnx.Linear(16 * 16 * 3, CLASSES, rngs=nnx.Rngs(seed))

    def __call__(self, image, *, train, rngs=None):
        del train, rngs
        return Outputs(self.fc(image.reshape(len(image), -1)))


class Mimic(nnx.Module):
    """The smallest method."""

    def terms(self, context):
        return {"kd": Term(losses.kd(context.student.logits, context.teacher.logits, temperature=2.0))}


def _step(devices, accumulation):
    learner, params, variables, constants = functional.split(Learner(Flat(0), {"mimic": Mimic()}))
    teacher, arrays, _, _ = functional.split(Flat(1))
    program = Program(
        learner=learner,
        teacher=teacher,
        student_input=STUDENT,
        teacher_input=TEACHER,
        task=_task(**EVERYTHING, label_smoothing=0.1),
        optimizer=optax.sgd(0.1),
        learning_rate=lambda step: 0.1,
        clock=Clock(32, BATCH, 10),
        ema=0.0,
        accumulation=accumulation,
    )
    mesh = sharding.make_mesh({"data": devices, "model": 1}, jax.devices()[:devices])
    state = TrainState(jnp.zeros((), jnp.int32), params, variables, program.optimizer.init(params), {})
    state, frozen = jax.device_put((state, Frozen(constants, arrays, jnp.int32(0))), jax.NamedSharding(mesh, jax.P()))
    batch = jax.tree.map(np.asarray, _batch())
    parts = [jax.tree.map(lambda leaf, i=i: np.split(leaf, accumulation)[i], batch) for i in range(accumulation)]
    placed = sharding.microbatches(iter(parts), accumulation, mesh)
    return jax.device_get(jax.jit(program.train_step)(state, frozen, placed))


def test_a_distillation_step_is_the_same_however_it_is_cut():
    (state, metrics), (other_state, other) = _step(1, 1), _step(4, 2)
    assert metrics["label/cross_entropy"] > 0 and metrics["mimic/kd"] > 0
    # Sums of 768 products in float32, added up in another order.
    for name in metrics:
        np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5, err_msg=name)
    for name in state.params:
        np.testing.assert_allclose(other_state.params[name], state.params[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": -0.1}, "task.mixup=-0.1: must be 0 \\(off\\) or a finite number above it"),
        ({"cutmix": float("inf")}, "task.cutmix=inf"),
        ({"mixup": float("nan")}, "task.mixup=nan"),
        ({"mix_probability": 1.5}, "task.mix_probability=1.5: must be from 0 to 1"),
        ({"cutmix_share": -0.5}, "task.cutmix_share=-0.5: must be from 0 to 1"),
        ({"erase": 1.01}, "task.erase=1.01: must be from 0 to 1"),
        ({"mix_group_size": 3}, "task.mix_group_size=3: must be 0 \\(the whole batch\\) or an even number"),
        ({"mix_group_size": -2}, "task.mix_group_size=-2"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        _task(**changes)


def test_a_group_that_does_not_divide_the_batch():
    with pytest.raises(ValueError, match="mix_group_size=6: must be even and divide the batch of 16 images"):
        jax.eval_shape(_task(mixup=0.8, mix_group_size=6).augment, _batch(), jax.random.key(0))
