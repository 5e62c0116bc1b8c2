"""FCFD on detectors: its four passes and terms against the formula with fake box heads, goldens, what it refuses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax import config as config_lib
from wkd_jax.methods.fcfd_detection import FCFDDetection
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B, R, C, T = 2, 3, 5, 2.0
LEVELS = ("p2", "p3", "p4", "p5", "p6")
WIDTHS = (2, 3)  # channels of the student's levels and of the teacher's
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


class Head:
    """Linear layers of the mean over all levels that regions are pooled from, and of the regions."""

    def __init__(self, width):
        self.logits, self.deltas = normal(4 * width + 4, C), normal(4 * width + 4, 4 * (C - 1))

    def forward_from(self, tap, x, *, train, regions, region_valid):
        assert tap == "pyramid" and train and region_valid is VALID
        mean = jnp.concatenate([x[level].mean((1, 2)) for level in LEVELS[:4]], axis=-1)
        rows = jnp.concatenate([jnp.tile(mean[:, None], (1, R, 1)), regions], axis=-1)
        return Outputs(rows @ self.logits, dict(x), extra={"deltas": (rows @ self.deltas).reshape(B, R, C - 1, 4)})


VALID = jnp.array([[True, True, False], [True, True, True]])
REGIONS = normal(B, R, 4)
HEADS = [Head(width) for width in WIDTHS]
MAPS = [{level: normal(B, 16 >> i, 32 >> i, width) for i, level in enumerate(LEVELS)} for width in WIDTHS]
OUTPUTS = [
    Outputs(normal(B, R, C), maps, valid=VALID, extra={"deltas": normal(B, R, C - 1, 4), "regions": REGIONS})
    for maps in MAPS
]


def detector(name, width):
    taps = {level: Tap(width, 4 << i, signed=True) for i, level in enumerate(LEVELS)}
    return ModelInfo(name, C, taps, 7, "box_head/cls_score/kernel", task="detection")


def method(student=None, **changes):
    setup = Setup(student or detector("s", WIDTHS[0]), detector("t", WIDTHS[1]), (64, 128), B, 10, None, None)
    return FCFDDetection(config_lib._merge(FCFDDetection.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def context(outputs, heads):
    return types.SimpleNamespace(
        student=outputs[0],
        teacher=outputs[1],
        student_model=lambda: heads[0],
        teacher_model=lambda: heads[1],
        progress=Progress(jnp.int32(0), jnp.int32(2), jnp.int32(10)),
    )


def kd(logits):
    p = softmax(np.float64(OUTPUTS[1].logits) / T, -1)
    return T**2 * (p * (np.log(p) - log_softmax(np.float64(logits) / T, -1))).sum(-1)


def box(deltas):
    return np.square(np.float64(deltas) - OUTPUTS[1].extra["deltas"]).mean((2, 3))


def test_terms():
    @nnx.jit
    def run():
        chosen = {"feature_weight": 0.5, "kd_weight": 0.7, "box_weight": 0.6, "mixed_weight": 0.3}
        wiring = method(temperature=T, schedule={"warmup": 4}, **chosen)
        bridged = [
            {level: bridge(outputs.taps[level], train=True) for level, bridge in bridges.items()}
            for outputs, bridges in zip(OUTPUTS, (wiring.to_teacher, wiring.to_student), strict=True)
        ]
        return wiring.terms(context(OUTPUTS, HEADS)), *bridged

    terms, in_teacher, in_student = run()
    assert {*in_teacher} == {*LEVELS} and {*in_student} == {*LEVELS[:4]}
    feature = sum(np.square(in_teacher[level] - MAPS[1][level]).mean((1, 2, 3)) for level in LEVELS)
    np.testing.assert_allclose(terms["feature"].value, feature, rtol=1e-4)
    np.testing.assert_allclose(terms["kd"].value, kd(OUTPUTS[0].logits), rtol=1e-4)
    np.testing.assert_allclose(terms["box"].value, box(OUTPUTS[0].extra["deltas"]), rtol=1e-4)
    mixed = 0.0
    for head, maps in ((HEADS[1], in_teacher), (HEADS[0], in_student)):  # each behind the bridges into its own space
        rest = head.forward_from("pyramid", maps, train=True, regions=REGIONS, region_valid=VALID)
        mixed = mixed + kd(rest.logits) + box(rest.extra["deltas"])
    np.testing.assert_allclose(terms["mixed"].value, mixed, rtol=1e-4)
    weights = {name: float(term.weight) for name, term in terms.items()}
    assert weights == pytest.approx({"feature": 0.25, "kd": 0.7, "box": 0.6, "mixed": 0.3})
    assert terms["feature"].where is None
    assert all(np.array_equal(terms[name].where, VALID) for name in ("kd", "box", "mixed"))


def test_bridges():
    """Convolutions of 3 x 3 without a bias and BatchNorm; the result has either sign."""
    wiring = method()
    for bridges, (source, target) in ((wiring.to_teacher, WIDTHS), (wiring.to_student, WIDTHS[::-1])):
        for bridge in bridges.values():
            parameters = sum(x.size for x in jax.tree.leaves(nnx.state(bridge, nnx.Param)))
            assert parameters == 9 * source * target + 2 * target
    y = wiring.to_teacher["p2"](MAPS[0]["p2"], train=True)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_weight": -1.0}, "methods.fcfd_detection.feature_weight=-1.0: must be 0 or more"),
        ({"box_weight": -1.0}, "methods.fcfd_detection.box_weight=-1.0"),
        ({"temperature": 0.0}, "methods.fcfd_detection.temperature=0.0: must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
