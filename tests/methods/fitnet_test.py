"""FitNet against the formula, for maps and tokens, and what its connector cannot map."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.methods.fitnet import FitNet
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B = 2
rng = np.random.default_rng(0)
MAP, TOKENS = Tap(3, 4), Tap(5, 4, "tokens", signed=True, prefix_tokens=1)
FEATURES = {
    MAP: rng.normal(size=(B, 4, 4, 3)).astype(np.float32),
    TOKENS: rng.normal(size=(B, 17, 5)).astype(np.float32),
}


def method(student, teacher, **changes):
    infos = [
        ModelInfo(n, 7, {"stage1": Tap(1, 2), "stage2": t}, 9, "fc/kernel") for n, t in (("s", student), ("t", teacher))
    ]
    setup = Setup(*infos, (16, 16), B, 10, labels=None, similarity=None)
    return FitNet({**FitNet.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(student, teacher):
    outputs = [Outputs(None, {"stage2": jnp.asarray(FEATURES[tap])}) for tap in (student, teacher)]
    progress = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10))
    return types.SimpleNamespace(student=outputs[0], teacher=outputs[1], progress=progress)


def as_map(tap):
    return FEATURES[tap] if tap is MAP else FEATURES[tap][:, 1:].reshape(B, 4, 4, 5)


@pytest.mark.parametrize(("student", "teacher"), [(MAP, TOKENS), (TOKENS, MAP)], ids=["map", "tokens"])
def test_the_hint(student, teacher):
    wiring = method(student, teacher)
    (conv,), bn = wiring.connector.convs, wiring.connector.bn
    (term,) = wiring.terms(context(student, teacher)).values()
    y = as_map(student) @ np.asarray(conv.kernel[...])[0, 0] + np.asarray(conv.bias[...])
    y = np.maximum((y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5), 0)
    np.testing.assert_allclose(term.value, np.square(y - as_map(teacher)).mean((1, 2, 3)), rtol=1e-4)
    assert float(term.weight) == 100 and term.where is None
    assert np.any(np.asarray(bn.mean[...]) != 0)
    channels = student.channels, teacher.channels
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(wiring, nnx.Param)))
    assert parameters == channels[0] * channels[1] + 3 * channels[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_tap": "stage3"}, "methods.fitnet.student_tap: unknown tap of s 'stage3'"),
        ({"teacher_tap": "stem"}, "methods.fitnet.teacher_tap: unknown tap of t 'stem'"),
        ({"weight": -1.0}, "methods.fitnet.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(MAP, MAP, **changes)


def test_sizes_that_the_connector_cannot_map():
    with pytest.raises(ValueError, match="student_tap=stage2, teacher_tap=stage2: .* 4 x 4 and the teacher's 16 x 16"):
        method(MAP, Tap(3, 1))
