"""The detector as a model: sizes, what is fixed, static outputs in training and detection, what a teacher is given."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.models import functional
from wkd_jax.models.detection.faster_rcnn import FasterRCNN
from wkd_jax.tasks.detection import Detection
from wkd_jax.training.step import weigh
from wkd_jax.types import Batch, Context, Normalisation

SMALL = {
    "features": 16, "hidden": 32, "anchor_sizes": (16, 32, 64, 128, 256), "pre_nms": (50, 50), "post_nms": (30, 30),
    "anchor_samples": 32, "region_samples": 24, "detections": 10,
}  # fmt: skip
SIZES = [[64, 96], [60, 70], [64, 40]]


def abstract(name="faster_rcnn_r18", classes=4, **settings):
    return nnx.eval_shape(lambda: FasterRCNN(name, classes, **settings, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "total", "trunk", "fixed"),
    [
        ("faster_rcnn_r18", 28_674_656, 11_166_912, 5 + 80),
        ("faster_rcnn_r50", 41_699_936, 23_454_912, 11 + 212),
        ("faster_rcnn_r101", 60_639_840, 42_394_816, 11 + 416),
        ("faster_rcnn_mobilenetv2", 19_162_976, 1_780_160, 204),
    ],
)
def test_parameter_counts(name, total, trunk, fixed):
    """Of 80 classes and the background; convolutions of fixed parts count, normalisation does not."""
    freeze_at = 0 if name.endswith("v2") else 2
    _, params, variables, _ = functional.split(abstract(name, 81, freeze_at=freeze_at))
    kernels = {n: math.prod(x.shape) for n, x in {**params, **variables}.items() if "/bn" not in n and n[-1] != "r"}
    kernels = {n: size for n, size in kernels.items() if n.endswith("kernel") or not n.startswith("trunk/")}
    assert sum(kernels.values()) == total
    assert sum(size for n, size in kernels.items() if n.startswith("trunk/")) == trunk
    assert len(variables) == fixed
    assert not any(leaf in n for n in params if n.startswith("trunk/") for leaf in ("scale", "bias"))


def truth():
    boxes = np.zeros((3, 2, 4), np.float32)
    boxes[0] = [[4, 4, 40, 40], [30, 20, 90, 60]]
    boxes[1, 0] = [10, 10, 50, 50]
    label = np.array([[2, 0], [1, -1], [-1, -1]], np.int32)
    return {"boxes": boxes, "box_valid": label >= 0}, label


@pytest.fixture(name="made", scope="module")
def _made():
    network = FasterRCNN("faster_rcnn_r18", 4, **SMALL, roi_tap=3, rngs=nnx.Rngs(0))
    structure, params, variables, _ = functional.split(network)
    extra, label = truth()
    size = jnp.array(SIZES)
    image = jax.random.normal(jax.random.key(0), (3, 64, 96, 3))
    batch = Batch(image, jnp.asarray(label), jnp.arange(3), jnp.ones(3, bool), {**extra, "size": size})
    task = Detection(dict(Detection.DEFAULTS), types.SimpleNamespace(class_names=("a", "b", "c")))

    def loss(params, variables, batch):
        student = structure.merge(params, variables)(
            batch.image, train=True, rngs=nnx.Rngs(3), **task.student_inputs(batch, train=True)
        )
        teacher = structure.merge(params, variables)(batch.image, train=False, **task.teacher_inputs(batch, student))
        terms = task.terms(Context(batch, None, task.labels(batch, student), student, None, None, None, None, None))
        total, metrics = weigh({"label": terms}, batch.valid)
        return total, (metrics, student, teacher)

    return structure, params, variables, batch, task, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_training(made):
    _, params, variables, batch, _, step = made
    (total, (metrics, student, teacher)), gradients = step(params, variables, batch)
    assert np.isfinite(total) and all(np.all(np.isfinite(g)) for g in gradients.values())
    silent = [name for name, gradient in gradients.items() if not np.any(gradient)]
    assert silent == []
    assert {name.removeprefix("label/") for name in metrics if "weight" not in name} == {
        "rpn_objectness", "rpn_box", "roi_class", "roi_box"
    }  # fmt: skip
    labels = np.asarray(student.extra["labels"])
    assert set(labels[0]) == {0, 2, 3} and set(labels[1]) == {1, 3} and set(labels[2]) == {3}
    # At the start all anchors are at even odds and all classes about as likely.
    np.testing.assert_allclose(metrics["label/rpn_objectness"], np.log(2), rtol=0.05)
    np.testing.assert_allclose(metrics["label/roi_class"], np.log(4), rtol=0.05)
    # The teacher, here the student itself, classifies the regions that the student sampled, pooled as the student's.
    np.testing.assert_array_equal(teacher.extra["regions"], student.extra["regions"])
    for theirs, own in ((teacher.logits, student.logits), (teacher.taps["roi"], student.taps["roi"])):
        np.testing.assert_allclose(theirs, own, atol=1e-5 * np.abs(own).max())
    assert teacher.logits.shape == student.logits.shape == (3, 24, 4)
    assert student.taps["roi"].shape == (3, 24, 3, 3, 16)


def test_padding_of_ground_truth_changes_nothing(made):
    _, params, variables, batch, _, step = made
    (total, _), gradients = step(params, variables, batch)
    junk = {"boxes": jnp.where(batch.extra["box_valid"][..., None], batch.extra["boxes"], jnp.nan)}
    changed = Batch(batch.image, batch.label, batch.index, batch.valid, batch.extra | junk)
    (again, _), others = step(params, variables, changed)
    np.testing.assert_array_equal(total, again)
    jax.tree.map(np.testing.assert_array_equal, gradients, others)


def test_detection(made):
    structure, params, variables, batch, task, _ = made
    batch = Batch(batch.image, batch.label, batch.index, batch.valid, {
        **batch.extra, "original_size": 2 * batch.extra["size"], "image_id": jnp.array([7, 8, 9])
    })  # fmt: skip

    @jax.jit
    def run(params, variables, batch):
        inputs = task.student_inputs(batch, train=False)
        network = structure.merge(params, variables)
        outputs = network(batch.image, train=False, **inputs)
        pooled = [network.pool(outputs.taps, outputs.extra["regions"], 3, exact=exact) for exact in (True, False)]
        return outputs.extra["detections"], task.evaluate(batch, outputs, None), outputs.taps["roi"], pooled

    loud = {n: x * (100 if "cls_score" in n else 1) for n, x in params.items()}
    found, part, roi, (exact, fast) = run(loud, variables, batch)
    scale = np.abs(roi).max()
    np.testing.assert_allclose(roi, exact, atol=1e-5 * scale)
    assert np.abs(roi - fast).max() > 1e-2 * scale  # what detection is not pooled by
    assert found.boxes.shape == (3, 10, 4) and found.valid.any()
    limits = np.array(SIZES)[:, None, [1, 0, 1, 0]]
    assert np.all(np.asarray(found.boxes) >= 0) and np.all(np.asarray(found.boxes) <= limits)
    assert np.all(np.asarray(found.classes)[np.asarray(found.valid)] < 3)
    assert np.all(np.diff(np.asarray(found.scores), axis=1) <= 0)
    np.testing.assert_allclose(part["student/boxes"], 2 * np.asarray(found.boxes), rtol=1e-6)
    np.testing.assert_array_equal(part["image_id"], [7, 8, 9])


def test_normalisation_is_zero_beyond_the_image(made):
    *_, task, _ = made
    image = jnp.full((3, 64, 96, 3), 255, jnp.uint8)
    batch = Batch(image, jnp.zeros((3, 0), jnp.int32), jnp.arange(3), jnp.ones(3, bool), {"size": jnp.array(SIZES)})
    out = np.asarray(task.normalise(batch, Normalisation((0.5,) * 3, (0.5,) * 3)).image)
    for row, (height, width) in zip(out, SIZES, strict=True):
        assert np.all(row[:height, :width] == 1) and row.sum() == 3 * height * width


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "d3"}, "did you mean 'd2'"),
        ({"pooling": "gathr"}, "did you mean 'gather'"),
        ({"anchor_sizes": (32, 64)}, "needs one for each of p2, p3, p4, p5, p6"),
        ({"freeze_at": 6}, "freeze_at=6: must be from 0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        abstract(**settings)


def test_errors():
    def call(side, **inputs):
        network = FasterRCNN("faster_rcnn_r18", 4, **SMALL, rngs=nnx.Rngs(0))
        return nnx.eval_shape(lambda: network(jnp.zeros((1, 64, side, 3)), **inputs))

    with pytest.raises(ValueError, match="must be multiples of 32"):
        call(90, train=False)
    with pytest.raises(ValueError, match="needs rngs, boxes, labels and box_valid"):
        call(96, train=True)
    with pytest.raises(ValueError, match="did you mean 'pyramid'"):
        abstract(**SMALL).forward_from("pyramids", {}, train=False)
