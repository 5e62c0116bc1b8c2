"""Box regression distilled: deltas of all rows, boxes of the rows on objects, against float64 NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from wkd_jax.methods.box_regression import BoxRegression
from wkd_jax.types import ModelInfo, Outputs, Setup

B, R, C = 2, 4, 5
LABELS = np.array([[0, 2, 4, 4], [3, 1, 4, 4]], np.int32)  # 4: background
VALID = np.array([[True, True, True, True], [True, False, True, False]])
rng = np.random.default_rng(0)
CORNER = rng.uniform(0, 50, (B, R, 2))
REGIONS = np.concatenate([CORNER, CORNER + rng.uniform(10, 40, (B, R, 2))], axis=-1).astype(np.float32)
REGIONS[1, 3] = 0  # an empty slot
DELTAS = rng.normal(size=(2, B, R, C - 1, 4)).astype(np.float32)


def method(**changes):
    info = ModelInfo("d", C, {}, 8, "cls_score/kernel", task="detection")
    setup = Setup(info, info, None, B, 10, labels=None, similarity=None)
    return BoxRegression({**BoxRegression.DEFAULTS, **changes}, setup, rngs=None)


def terms(student=DELTAS[0], teacher=DELTAS[1], labels=LABELS, valid=VALID, regions=REGIONS, **changes):
    outputs = [
        Outputs(np.zeros((*labels.shape, C)), valid=jnp.asarray(valid), extra={"deltas": deltas, "regions": regions})
        for deltas in map(jnp.asarray, (student, teacher))
    ]
    context = types.SimpleNamespace(labels=jnp.asarray(labels), student=outputs[0], teacher=outputs[1])
    return method(**changes).terms(context)


def boxes(deltas, regions):
    """Of one row, decoded."""
    deltas, regions = np.asarray(deltas, float) / (10, 10, 5, 5), np.asarray(regions, float)
    sides = regions[2:] - regions[:2]
    centre, half = regions[:2] + sides / 2 + deltas[:2] * sides, np.exp(deltas[2:]) * sides / 2
    return np.concatenate([centre - half, centre + half])


def distance_iou(a, b):
    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    around = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    apart = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    return 1 - inner / union + apart @ apart / (around @ around)


def test_golden():
    """The mean over four regions of FCFD's loss, sin(0.37 k) against cos(0.23 k)."""
    k = np.arange(64.0).reshape(1, 4, 4, 4)
    rows = {"labels": LABELS[:1], "valid": VALID[:1], "regions": REGIONS[:1]}
    term = terms(np.sin(0.37 * k), np.cos(0.23 * k), **rows)["offset"]
    np.testing.assert_allclose(np.mean(term.value), 0.776322, atol=1e-6)


def test_terms():
    found = terms(offset_weight=0.5, distance_iou_weight=3.0)
    np.testing.assert_allclose(found["offset"].value, np.square(DELTAS[0] - DELTAS[1]).mean((2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(found["offset"].where, VALID)
    on_object = np.array([[True, True, False, False], [True, False, False, False]])
    np.testing.assert_array_equal(found["distance_iou"].where, on_object)
    for image, row in np.argwhere(on_object):
        of = [boxes(deltas[image, row, LABELS[image, row]], REGIONS[image, row]) for deltas in DELTAS]
        np.testing.assert_allclose(found["distance_iou"].value[image, row], distance_iou(*of), rtol=1e-4)
    assert (found["offset"].weight, found["distance_iou"].weight) == (0.5, 3.0)
    assert {key: term.weight for key, term in terms().items()} == {"offset": 1.0, "distance_iou": 20.0}


def gradients(student, teacher, regions=REGIONS):
    def total(student, teacher):
        found = terms(student, teacher, regions=regions).values()
        return sum(jnp.sum(jnp.where(term.where, term.value, 0)) for term in found)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(student, teacher)


def test_gradients():
    """On a row, of its own class; the offsets alone reach the rest. None reaches the teacher."""
    value, (ours, theirs) = gradients(*DELTAS)
    assert not np.any(theirs)
    assert np.isfinite(value)
    offsets = np.where(VALID[..., None, None], 2 * (DELTAS[0] - DELTAS[1]) / 16, 0)
    on_object = VALID & (LABELS != 4)
    own = on_object[..., None] & (LABELS[..., None] == np.arange(C - 1))
    np.testing.assert_allclose(np.asarray(ours)[~own], offsets[~own], rtol=1e-5, atol=1e-7)
    assert np.all(np.abs(np.asarray(ours) - offsets)[own] > 1e-5)


def test_regions_without_extent_and_extreme_deltas():
    for regions in (np.zeros_like(REGIONS), REGIONS):
        for scale in (0, 1e3):
            value, (ours, _) = gradients(scale * DELTAS[0], DELTAS[1], regions)
            assert np.isfinite(value) and np.all(np.isfinite(ours))


def test_half_precision():
    half = jnp.asarray(DELTAS, jnp.bfloat16)
    for name, term in terms(*half).items():
        assert term.value.dtype == jnp.float32
        expected = terms(*np.asarray(half, np.float32))[name].value
        np.testing.assert_allclose(term.value, expected, rtol=1e-5)
