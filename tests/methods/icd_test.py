"""ICD: what the decoder is asked about, its pass in float64 NumPy, and where gradients go."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_expit, softmax

from wkd_jax.methods import icd
from wkd_jax.methods.icd import ICD
from wkd_jax.models import functional
from wkd_jax.types import Batch, ModelInfo, Outputs, Progress, Setup, Tap

B, M, CLASSES, CANVAS = 3, 4, 3, (64, 96)
STRIDES = {f"p{level}": 2**level for level in range(2, 7)}
SIZE = np.array([[64, 96], [60, 70], [33, 96]], np.int32)
BOXES = np.full((B, M, 4), np.nan, np.float32)
BOXES[0, :2] = [[4, 8, 24, 22], [10, 6, 90, 60]]
BOXES[1, :2] = [[0, 0, 70, 60], [5, 5, 5, 20]]  # the second has no width
LABELS = np.array([[0, 2, -1, -1], [1, 0, -1, -1], [-1, -1, -1, -1]], np.int32)
VALID = LABELS >= 0
REAL = np.array([[True, True, False, False], [True, False, False, False], [False] * 4])
SMALL = {"width": 16, "heads": 2, "instances": 9}
rng = np.random.default_rng(0)


def maps(channels, canvas=CANVAS):
    shapes = {name: (B, -(-canvas[0] // s), -(-canvas[1] // s), channels) for name, s in STRIDES.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


STUDENT, TEACHER = maps(3), maps(5)


def info(channels, classes=CLASSES + 1):
    taps = {name: Tap(channels, stride, signed=True) for name, stride in STRIDES.items()}
    return ModelInfo("d", classes, taps, 8, "cls_score/kernel", task="detection")


def method(**changes):
    setup = Setup(info(3), info(5), None, B, 10, labels=None, similarity=None)
    return ICD({**ICD.DEFAULTS, **SMALL, **changes}, setup, rngs=nnx.Rngs(0))


def context(student=STUDENT, teacher=TEACHER, *, box_valid=VALID, size=SIZE, step=1000, seed=0):
    extra = {"boxes": jnp.asarray(BOXES), "box_valid": jnp.asarray(box_valid), "size": jnp.asarray(size)}
    batch = Batch(None, jnp.asarray(LABELS), None, jnp.ones(B, bool), extra)
    progress = Progress(jnp.asarray(step, jnp.int32), jnp.int32(1), jnp.int32(10))
    outputs = {"student": Outputs(None, student), "teacher": Outputs(None, teacher)}
    return types.SimpleNamespace(batch=batch, progress=progress, key=jax.random.key(seed), **outputs)


def asked(seed=0, boxes=BOXES, labels=LABELS, valid=VALID, size=SIZE, **changes):
    settings = {"slots": 9, "fakes": 5, "jitter": 0.3, **changes}
    arrays = map(jnp.asarray, (boxes, labels, valid, size))
    return jax.tree.map(np.asarray, icd.instances(jax.random.key(seed), *arrays, **settings))


def test_instances():
    found = asked()
    assert all(np.all(np.isfinite(x)) for x in found)
    real = np.pad(REAL, ((0, 0), (0, 5)))
    np.testing.assert_array_equal(found.real, real)
    assert found.present.sum(1).tolist() == [9, 6, 0]  # 2 + min(10, 7), 1 + 5, none without a box
    assert np.all(found.present >= found.real)
    size = SIZE[:, [1, 0, 1, 0]]
    for image, slot in np.argwhere(REAL):
        np.testing.assert_allclose(found.box[image, slot], BOXES[image, slot] / size[image], rtol=1e-6)
        assert found.label[image, slot] == LABELS[image, slot]
    assert np.all(
        (found.box >= 0) & (found.box <= 1) & (found.box[..., [2, 3]] > found.box[..., [0, 1]]).all(-1)[..., None]
    )


def test_more_boxes_than_slots():
    found = asked(slots=1)
    assert found.real.shape == (B, M)
    np.testing.assert_array_equal(found.present, REAL)


def test_where_made_up_instances_come_from():
    """Class and sides are together those of a box of the batch, each as often as it is there; points are within."""
    pairs = {0: (20 / 96, 14 / 64), 2: (0.7, 54 / 64), 1: (0.7, 0.7)}  # by class; sides are limited to 0.7
    pairs = {label: np.minimum(sides, 0.7) for label, sides in pairs.items()}
    counts, places, shifts = np.zeros(CLASSES), [], []
    for seed in range(40):
        found = asked(seed, slots=100, fakes=20)
        sides = found.box[..., 2:] - found.box[..., :2]
        shifts.append(((found.point - (found.box[..., :2] + found.box[..., 2:]) / 2) / sides)[found.present])
        fake = found.present & ~found.real
        assert fake.sum(1).tolist() == [40, 20, 0]
        label, box = found.label[fake], found.box[fake]
        counts += np.bincount(label, minlength=CLASSES)
        expected = np.array([pairs[x] for x in label])
        inside = np.all((box > 0) & (box < 1), axis=1)  # others are cut off at the border
        np.testing.assert_allclose((box[:, 2:] - box[:, :2])[inside], expected[inside], rtol=1e-4)
        assert np.all(box[:, 2:] - box[:, :2] < expected + 1e-5)
        small = label == 0
        places.append((box[small, :2] + box[small, 2:])[inside[small]] / 2)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.03)  # 2400 draws: 3 standard deviations
    places, shifts = np.concatenate(places), np.concatenate(shifts)
    assert abs(places.mean() - 0.5) < 0.02 and 0.1 < places.min() < 0.13 and 0.87 < places.max() < 0.9
    assert abs(shifts.mean()) < 0.01 and 0.29 < np.abs(shifts).max() <= 0.3001
    np.testing.assert_allclose(shifts.std(), 0.3 / np.sqrt(3), rtol=0.03)


def embed(x, count):
    """[..., count]: sines of 2 pi x / 10000^(2 k / count), then cosines."""
    angles = 2 * np.pi * x[..., None] / 10000.0 ** (2 * np.arange(count // 2) / count)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def oracle(params, found, teacher=TEACHER, width=16, heads=2):
    """(outputs [B, Q, 5], values [B, N, heads, d], weights [B, heads, N]) of the decoder."""

    def linear(x, name):
        return x @ params[f"{name}/kernel"].reshape(x.shape[-1], -1) + params.get(f"{name}/bias", 0)

    def perceptron(x, name):
        for number in range(3):
            x = linear(x, f"{name}/layers/{number}")
            x = np.maximum(x, 0) if number < 2 else x
        return x

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * params[f"{name}/scale"] + params[f"{name}/bias"]

    keys, values, hidden = [], [], []
    for name, stride in STRIDES.items():
        x = np.asarray(teacher[name], float)
        height, width_ = x.shape[1:3]
        mask = np.ones((B, height, width_), bool)
        row, column = np.zeros((2, B, height, width_))
        for b in range(B):
            shown = np.ceil(SIZE[b] / stride).astype(int)
            mask[b, : shown[0], : shown[1]] = False
            row[b] = (np.arange(height) + 1)[:, None] / shown[0]
            column[b] = (np.arange(width_) + 1) / shown[1]
        position = linear(embed(row, width // 2), "row") + linear(embed(column, width // 2), "column")
        for collected, of in ((keys, linear(x + position, "key")), (values, linear(x, "value")), (hidden, mask)):
            collected.append(of.reshape(B, height * width_, *of.shape[3:]))
    key, value, hidden = (np.concatenate(x, axis=1) for x in (keys, values, hidden))
    pixels = (found.box[..., 2:] - found.box[..., :2]).astype(float) * SIZE[:, None, ::-1]
    scale = np.floor(np.clip(1.44 * np.log(pixels) - 5, 0, 4)).astype(int)
    place = embed(found.point.astype(float), width // 2)
    one_hot = np.eye(CLASSES)[found.label], np.concatenate([place[..., 0, :], place[..., 1, :]], -1)
    description = np.concatenate([*one_hot, np.eye(5)[scale[..., 0]], np.eye(5)[scale[..., 1]]], -1)
    assert description.shape[-1] == CLASSES + width + 10
    description = perceptron(description, "encoder")
    query, key, value = (x.reshape(B, -1, heads, width // heads) for x in (linear(description, "query"), key, value))
    scores = np.einsum("bqhd,bnhd->bhqn", query, key) / np.sqrt(width // heads)
    attention = softmax(np.where(hidden[:, None, None], -np.inf, scores), axis=-1)
    attended = np.einsum("bhqn,bnhd->bqhd", attention, value).reshape(description.shape)
    x = norm(description + linear(attended, "out"), "norm1")
    x = norm(x + linear(np.maximum(linear(x, "fc1"), 0), "fc2"), "norm2")
    weights = np.where(found.real[:, None, :, None], attention, 0).sum(2)
    return perceptron(x, "head"), value, weights


def arrays(wiring):
    return {name: np.asarray(x, float) for name, x in functional.split(wiring)[1].items()}


def test_terms():
    wiring = method(weight=2.0, auxiliary_weight=0.5)
    query = wiring.decoder.query.kernel
    query.set_value(30 * query[...])  # attention as pronounced as learned, not uniform as at the start
    terms = jax.jit(lambda: wiring.terms(context()))()
    params = arrays(wiring)
    found = asked()
    decoder = functional.under(params, "decoder")
    outputs, value, weights = oracle(decoder, found)
    projected = [
        (np.asarray(x, float) @ params["student_value/kernel"][0, 0] + params["student_value/bias"]).reshape(
            B, -1, 2, 8
        )
        for x in STUDENT.values()
    ]
    projected = np.concatenate(projected, axis=1)
    normalised = [
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) for x in (projected, value)
    ]
    squares = np.square(normalised[0] - normalised[1]).mean(-1).transpose(0, 2, 1)
    expected = ((squares * weights).sum(-1) / np.maximum(weights.sum(-1), 1e-6)).mean(1)
    np.testing.assert_allclose(terms["distillation"].value, expected, rtol=1e-4)
    assert expected[2] == 0 and np.all(expected[:2] > 0.1)
    assert terms["distillation"].where is None
    sign = np.where(found.real, 1, -1)
    np.testing.assert_allclose(terms["identification"].value, -log_expit(sign * outputs[..., 0]), rtol=1e-4)
    np.testing.assert_array_equal(terms["identification"].where, found.present)
    low, high = found.point - found.box[..., :2], found.box[..., 2:] - found.point
    distances, sides = np.concatenate([low, high], -1), np.tile(found.box[..., 2:] - found.box[..., :2], 2)
    assert np.all(distances[found.present] > 0)
    error = np.abs(1 / (1 + np.exp(-outputs[..., 1:])) - distances) / sides
    np.testing.assert_allclose(terms["localisation"].value, error.sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(terms["localisation"].where, found.real)
    assert [float(term.weight) for term in terms.values()] == [2.0, 0.5, 0.5]


def test_parameters_at_full_size():
    setup = Setup(info(256, 81), info(256, 81), None, B, 10, labels=None, similarity=None)
    made = nnx.eval_shape(lambda: ICD(dict(ICD.DEFAULTS), setup, rngs=nnx.Rngs(0)))
    sizes = {name: x.size for name, x in functional.split(made)[1].items()}
    square = 256 * 256 + 256
    # Queries' and heads' perceptrons; position, query, key, value and output; both norms; the feed-forward layers.
    decoder = (
        (346 * 256 + 256 + 2 * square) + (2 * square + 256 * 5 + 5) + 5 * square + 4 * 256 + 8 * 256 * 256 + 5 * 256
    )
    assert sum(sizes.values()) == decoder + square
    bound = np.sqrt(6 / (4 * 256))
    kernel = functional.value(ICD(dict(ICD.DEFAULTS), setup, rngs=nnx.Rngs(0)), "decoder/key/kernel")
    assert 0.99 * bound < np.abs(kernel).max() <= bound


@pytest.fixture(name="slopes", scope="module")
def _slopes():
    """A function: derivatives of each of the three terms' sums by the parameters, the student's and teacher's maps."""
    structure, params, _, _ = functional.split(method())

    @jax.jit
    def run(student, teacher, box_valid, size, step):
        def totals(params, student, teacher):
            terms = structure.merge(params).terms(context(student, teacher, box_valid=box_valid, size=size, step=step))
            counted = [x.value if x.where is None else jnp.where(x.where, x.value, 0) for x in terms.values()]
            return jnp.stack([jnp.sum(x) for x in counted])

        # One after the other: a derivative of all at once (jacrev) is wrong on CPU with jaxlib 0.10.2.
        _, pull = jax.vjp(totals, params, student, teacher)
        return jax.tree.map(lambda *x: jnp.stack(x), *(pull(one) for one in jnp.eye(3)))

    def of(student=STUDENT, teacher=TEACHER, box_valid=VALID, size=SIZE, step=1000):
        return jax.tree.map(np.asarray, run(student, teacher, box_valid, size, step))

    return of


def test_gradients(slopes):
    """The student learns from the distillation alone, and the decoder from its own task alone."""
    params, student, teacher = slopes()
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, student, teacher)))
    distillation, *auxiliary = ({name: np.any(x[term]) for name, x in params.items()} for term in range(3))
    assert {name for name, reached in distillation.items() if reached} == {"student_value/kernel", "student_value/bias"}
    reached = {name for name in params if auxiliary[0][name] or auxiliary[1][name]}
    same_everywhere = {"decoder/key/bias", "decoder/row/bias"}  # at all positions, so that no attention changes
    assert params.keys() - reached - same_everywhere == {"student_value/kernel", "student_value/bias"}
    for name, stride in STRIDES.items():
        assert not np.any(teacher[name][0])
        assert not np.any(student[name][1:])
        for image, (height, width) in enumerate(SIZE):
            shown = np.zeros(student[name].shape[2:4], bool)
            shown[: -(-height // stride), : -(-width // stride)] = True
            seen = np.any(student[name][0, image], axis=-1)
            np.testing.assert_array_equal(seen, shown & REAL[image].any())


def test_the_beginning_of_a_run(slopes):
    before, since = slopes(step=999), slopes(step=1000)
    assert not any(map(np.any, before[1].values()))
    np.testing.assert_array_equal(before[0]["student_value/kernel"], since[0]["student_value/kernel"])
    assert np.any(before[0]["student_value/kernel"])


def test_no_objects_at_all(slopes):
    for gradient in jax.tree.leaves(slopes(box_valid=np.zeros_like(VALID))):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("canvas", [(96, 64), (32, 160)])
def test_any_canvas_and_half_precision(canvas):
    student, teacher = ({n: jnp.asarray(x, jnp.bfloat16) for n, x in maps(c, canvas).items()} for c in (3, 5))
    size = np.tile(canvas, (B, 1)).astype(np.int32)
    structure, params, _, _ = functional.split(method())
    found = jax.eval_shape(lambda p: structure.merge(p).terms(context(student, teacher, size=size)), params)
    assert {term.value.dtype for term in found.values()} == {jnp.dtype("float32")}
    assert found["distillation"].value.shape == (B,) and found["identification"].value.shape == (B, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "methods.icd.weight=-1.0"),
        ({"auxiliary_weight": -1.0}, "methods.icd.auxiliary_weight=-1.0"),
        ({"width": 18}, "methods.icd.width=18: must be a multiple of 4 and of heads=2"),
        ({"heads": 3}, "methods.icd.width=16: must be a multiple of 4 and of heads=3"),
        ({"jitter": 0.5}, "methods.icd.jitter=0.5: must be below 0.5"),
        ({"instances": 0}, "methods.icd.instances=0: must be above 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
