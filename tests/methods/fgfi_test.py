"""FGFI on a pyramid: adaptors, which positions count at which level, and when the term is on."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.methods.fgfi import FGFI
from wkd_jax.models.detection import pyramid_anchors
from wkd_jax.types import Batch, ModelInfo, Outputs, Progress, Setup, Tap

B, M, CANVAS, SIZES = 2, 3, (64, 96), (16, 32, 64, 128, 256)
STRIDES = {f"p{level}": 2**level for level in range(2, 7)}
rng = np.random.default_rng(0)
BOXES = np.full((B, M, 4), np.nan, np.float32)
BOXES[0, :2] = [[4, 8, 24, 22], [10, 6, 90, 60]]
VALID = np.array([[True, True, False], [False, False, False]])


def maps(channels, canvas=CANVAS):
    shapes = {name: (B, -(-canvas[0] // s), -(-canvas[1] // s), channels) for name, s in STRIDES.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


STUDENT, TEACHER = maps(3), maps(4)


def info(channels):
    taps = {name: Tap(channels, stride, signed=True) for name, stride in STRIDES.items()}
    return ModelInfo("d", 5, taps, 8, "cls_score/kernel", task="detection")


def method(**changes):
    setup = Setup(info(3), info(4), None, B, 10, labels=None, similarity=None)
    return FGFI({**FGFI.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(student=STUDENT, teacher=TEACHER, valid=VALID, canvas=CANVAS, step=400):
    detector = types.SimpleNamespace(anchors=lambda canvas: pyramid_anchors(canvas, sizes=SIZES))
    image = jnp.zeros((B, *canvas, 3))
    batch = Batch(image, None, None, None, {"boxes": jnp.asarray(BOXES), "box_valid": jnp.asarray(valid)})
    return types.SimpleNamespace(
        batch=batch,
        student=Outputs(None, student),
        teacher=Outputs(None, teacher),
        student_model=lambda: detector,
        progress=Progress(jnp.int32(step), jnp.int32(1), jnp.int32(10)),
    )


def iou(box, anchors):
    sides = np.maximum(np.minimum(box[2:], anchors[:, 2:]) - np.maximum(box[:2], anchors[:, :2]), 0)
    inner = sides.prod(-1)
    return inner / ((box[2:] - box[:2]).prod() + (anchors[:, 2:] - anchors[:, :2]).prod(-1) - inner)


def near(share=0.5):
    """[H, W] of each level of the first image: the largest overlap is sought among the anchors of all levels."""
    levels = [anchors.astype(float) for anchors in pyramid_anchors(CANVAS, sizes=SIZES)]
    every = np.zeros(sum(map(len, levels)), bool)
    for box in BOXES[0, :2].astype(float):
        overlap = iou(box, np.concatenate(levels))
        every |= overlap > share * overlap.max()
    parts = np.split(every, np.cumsum([len(level) for level in levels])[:-1])
    return [part.reshape(*STUDENT[name].shape[1:3], 3).any(-1) for part, name in zip(parts, STRIDES, strict=True)]


def adapted(wiring, student):
    return [np.asarray(conv(student[name]), float) for conv, name in zip(wiring.adaptors, STRIDES, strict=True)]


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_term(share):
    wiring = method(share=share, weight=0.5)
    for conv in wiring.adaptors:  # as large as what is learned
        conv.kernel.set_value(1e4 * conv.kernel[...])
    (term,) = wiring.terms(context()).values()
    total, count = 0.0, 0
    for x, name, mask in zip(adapted(wiring, STUDENT), STRIDES, near(share), strict=True):
        total += np.square(x[0] - TEACHER[name][0])[mask].sum()
        count += mask.sum()
    np.testing.assert_allclose(term.value, total / (2 * count), rtol=1e-5)
    assert float(term.weight) == 0.5
    assert [mask.any() for mask in near()] == [True, False, True, False, False]  # those that fit one of the boxes


def test_adaptors():
    """As in the original: kernels within 2e-4, spread like a normal distribution cut into remainders by 2."""
    wiring = nnx.state(method(), nnx.Param)
    kernels = [x for x in jax.tree.leaves(wiring) if x.ndim == 4]
    biases = [x for x in jax.tree.leaves(wiring) if x.ndim == 1]
    assert [x.shape for x in kernels] == [(3, 3, 3, 4)] * 5 and [x.shape for x in biases] == [(4,)] * 5
    kernels = np.concatenate([np.ravel(x) for x in kernels])
    assert np.abs(kernels).max() < 2e-4
    np.testing.assert_allclose(kernels.std(), 0.9e-4, rtol=0.1)  # of the remainder: 0.88
    assert np.abs(np.concatenate(biases)).max() > 0.01  # those are torch's


def test_gradients_and_images_without_objects():
    wiring, state = nnx.split(method())

    def total(state, student, teacher, valid):
        (term,) = nnx.merge(wiring, state).terms(context(student, teacher, valid)).values()
        return term.value

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    value, (of_adaptors, ours, theirs) = run(state, STUDENT, TEACHER, VALID)
    assert value > 0
    assert not any(map(np.any, jax.tree.leaves(theirs)))
    assert [bool(np.any(ours[name])) for name in STRIDES] == [mask.any() for mask in near()]
    assert not any(np.any(x[1]) for x in ours.values())  # the second image has no object
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(of_adaptors))
    value, gradients = run(state, STUDENT, TEACHER, np.zeros_like(VALID))
    assert value == 0 and not any(map(np.any, jax.tree.leaves(gradients)))


def test_the_beginning_of_a_run():
    wiring = method()
    before, since = (wiring.terms(context(step=step))["imitation"].weight for step in (399, 400))
    assert float(before) == 0 and float(since) == pytest.approx(0.01)


@pytest.mark.parametrize("canvas", [(96, 64), (32, 160)])
def test_any_canvas_and_half_precision(canvas):
    student, teacher = ({n: jnp.asarray(x, jnp.bfloat16) for n, x in maps(c, canvas).items()} for c in (3, 4))
    graph, state = nnx.split(method())
    found = jax.eval_shape(lambda s: nnx.merge(graph, s).terms(context(student, teacher, canvas=canvas)), state)
    assert (found["imitation"].value.shape, found["imitation"].value.dtype) == ((), jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "methods.fgfi.weight=-1.0"),
        ({"share": 1.0}, "methods.fgfi.share=1.0: must be below 1"),
        ({"delay": -1}, "methods.fgfi.delay=-1: must be 0 or more"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
