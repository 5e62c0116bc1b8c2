"""Methods for detectors on a small pair of them: outputs as in a step, what is reached, canvases, and refusals."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.detection.faster_rcnn import LEVELS, FasterRCNN
from wkd_jax.tasks.detection import Detection
from wkd_jax.training.step import weigh
from wkd_jax.types import Batch, Context, Progress, Setup

SMALL = {
    "features": 16, "hidden": 32, "anchor_sizes": (16, 32, 64, 128, 256), "pre_nms": (50, 50), "post_nms": (30, 30),
    "anchor_samples": 32, "region_samples": 24, "detections": 10,
}  # fmt: skip
SIZES = [[64, 96], [60, 70], [64, 40]]
CLASSES = ("a", "b", "c")
# Settings for so small a pair, and the student's outputs that the method teaches.
METHODS = {
    "fgfi": ({"delay": 0}, LEVELS),
    "icd": ({"width": 16, "heads": 2, "instances": 6, "delay": 0}, LEVELS),
    "box_regression": ({}, ("deltas",)),
}


def batch(canvas=(64, 96)):
    boxes = np.zeros((3, 2, 4), np.float32)
    boxes[0] = [[4, 4, 40, 40], [30, 20, 90, 60]]
    boxes[1, 0] = [10, 10, 50, 50]
    label = np.array([[2, 0], [1, -1], [-1, -1]], np.int32)
    extra = {"boxes": boxes, "box_valid": label >= 0, "size": np.minimum(SIZES, canvas).astype(np.int32)}
    image = jax.random.normal(jax.random.key(0), (3, *canvas, 3))
    return jax.tree.map(jnp.asarray, Batch(image, label, np.arange(3), np.ones(3, bool), extra))


@functools.cache
def pair():
    """(the networks' structure, arrays of the student, arrays of the teacher)."""
    structure, params, variables, _ = functional.split(FasterRCNN("faster_rcnn_r18", 4, **SMALL, rngs=nnx.Rngs(0)))
    arrays = {**params, **variables}
    return structure, arrays, {name: 0.9 * x for name, x in arrays.items()}


def run(student_arrays, teacher_arrays, batch):
    """The outputs of both networks, as a step has them, and the rows' labels."""
    structure, task = pair()[0], Detection(dict(Detection.DEFAULTS), types.SimpleNamespace(class_names=CLASSES))
    student = structure.merge(student_arrays)(
        batch.image, train=True, rngs=nnx.Rngs(3), **task.student_inputs(batch, train=True)
    )
    teacher = structure.merge(teacher_arrays)(batch.image, train=False, **task.teacher_inputs(batch, student))
    return student, teacher, task.labels(batch, student)


@functools.cache
def outputs():
    return jax.jit(run)(*pair()[1:], batch())


@functools.cache
def method(name):
    """(its structure, its parameters)."""
    info = nnx.eval_shape(lambda: FasterRCNN("faster_rcnn_r18", 4, **SMALL, rngs=nnx.Rngs(0))).info
    factory = registry.get("methods", name)
    setup = Setup(info, info, None, 3, 10, labels=None, similarity=None)
    made = factory({**factory.DEFAULTS, **METHODS[name][0]}, setup, rngs=nnx.Rngs(0))
    return functional.split(made)[:2]


def total(name, params, student, teacher, labels, batch):
    structure, arrays, _ = pair()
    context = Context(
        batch=batch,
        teacher_batch=batch,
        labels=labels,
        student=student,
        teacher=jax.lax.stop_gradient(teacher),
        student_model=lambda: structure.merge(arrays),
        teacher_model=lambda: structure.merge(arrays),
        progress=Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10)),
        key=jax.random.key(0),
    )
    return weigh({name: method(name)[0].merge(params).terms(context)}, batch.valid)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_what_the_method_teaches(name):
    student, teacher, labels = outputs()
    of = jax.jit(jax.value_and_grad(functools.partial(total, name), argnums=(0, 1), has_aux=True, allow_int=True))
    (value, metrics), (params, gradient) = of(method(name)[1], student, teacher, labels, batch())
    assert value > 0 and all(map(np.isfinite, metrics.values()))
    assert all(np.all(np.isfinite(x)) for x in params.values())
    found = {**gradient.taps, "logits": gradient.logits, "pooled": gradient.pooled, "deltas": gradient.extra["deltas"]}
    assert all(np.all(np.isfinite(x)) for x in found.values())
    reached = {key for key, x in found.items() if np.any(x)}
    assert reached and reached <= set(METHODS[name][1])


@pytest.mark.parametrize("name", METHODS)
def test_any_canvas(name):
    """Nothing depends on the canvas that the method was built with: it is built without one."""
    other = batch((96, 64))
    found = jax.eval_shape(run, *pair()[1:], other)
    value, _ = jax.eval_shape(lambda *x: total(name, method(name)[1], *x, other), *found)
    assert (value.shape, value.dtype) == ((), jnp.float32)
