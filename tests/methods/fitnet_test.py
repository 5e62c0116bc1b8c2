"""FitNet against the formula, for maps, tokens and several pairs, and what its projectors cannot map."""

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
    """Of two taps, or of two dicts of them."""
    taps = [t if isinstance(t, dict) else {"stage1": Tap(1, 2), "stage2": t} for t in (student, teacher)]
    infos = [ModelInfo(name, 7, t, 9, "fc/kernel") for name, t in zip("st", taps, strict=True)]
    setup = Setup(*infos, (16, 16), B, 10, labels=None, similarity=None)
    return FitNet({**FitNet.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(student, teacher):
    return given(*({"stage2": jnp.asarray(FEATURES[tap])} for tap in (student, teacher)))


def given(student, teacher):
    progress = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10))
    return types.SimpleNamespace(student=Outputs(None, student), teacher=Outputs(None, teacher), progress=progress)


def as_map(tap):
    return FEATURES[tap] if tap is MAP else FEATURES[tap][:, 1:].reshape(B, 4, 4, 5)


@pytest.mark.parametrize(("student", "teacher"), [(MAP, TOKENS), (TOKENS, MAP)], ids=["map", "tokens"])
def test_the_hint(student, teacher):
    wiring = method(student, teacher)
    (projector,) = wiring.projectors
    (conv,), bn = projector.convs, projector.bn
    (term,) = wiring.terms(context(student, teacher)).values()
    y = as_map(student) @ np.asarray(conv.kernel[...])[0, 0] + np.asarray(conv.bias[...])
    y = np.maximum((y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5), 0)
    np.testing.assert_allclose(term.value, np.square(y - as_map(teacher)).mean((1, 2, 3)), rtol=1e-4)
    assert float(term.weight) == 100 and term.where is None
    assert np.any(np.asarray(bn.mean[...]) != 0)
    channels = student.channels, teacher.channels
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(wiring, nnx.Param)))
    assert parameters == channels[0] * channels[1] + 3 * channels[1]


def test_levels_of_a_pyramid():
    """Maps of either sign, summed over the levels, each with a 1 x 1 convolution of its own and nothing behind it."""
    names = ("p2", "p3", "p4")
    shapes = {name: (B, 8 >> i, 12 >> i) for i, name in enumerate(names)}
    maps = [{name: rng.normal(size=(*shape, d)).astype(np.float32) for name, shape in shapes.items()} for d in (3, 5)]
    taps = [{n: Tap(d, 4 << i, signed=True) for i, n in enumerate(names)} for d in (3, 5)]
    chosen = {"student_taps": names, "teacher_taps": names, "projector": "linear", "weight": 1.0}
    wiring = method(*taps, **chosen)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(wiring, nnx.Param))) == 3 * (3 * 5 + 5)
    (term,) = wiring.terms(given(*maps)).values()
    expected = 0.0
    for projector, name in zip(wiring.projectors, names, strict=True):
        kernel, bias = (np.asarray(x[...], np.float64) for x in (projector.linear.kernel, projector.linear.bias))
        y = maps[0][name] @ kernel + bias
        assert y.min() < 0
        expected = expected + np.square(y - maps[1][name]).mean((1, 2, 3))
    np.testing.assert_allclose(term.value, expected, rtol=1e-5)
    assert float(term.weight) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_taps": ("stage3",)}, "methods.fitnet.student_taps: unknown tap of s 'stage3'"),
        ({"teacher_taps": ("stem",)}, "methods.fitnet.teacher_taps: unknown tap of t 'stem'"),
        ({"teacher_taps": ("stage1", "stage2")}, r"student_taps=\('stage2',\), .*: name as many of each, at least one"),
        ({"student_taps": (), "teacher_taps": ()}, r"student_taps=\(\), teacher_taps=\(\): name as many"),
        ({"projector": "conv1"}, "projector=conv1, from stage2 .*: unknown projector 'conv1': did you mean 'conv1x1'"),
        ({"weight": -1.0}, "methods.fitnet.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(MAP, MAP, **changes)


def test_sizes_that_a_projector_cannot_map():
    with pytest.raises(ValueError, match="from stage2 of the student to stage2 .* 4 x 4 and the teacher's 16 x 16"):
        method(MAP, Tap(3, 1))
    with pytest.raises(ValueError, match=r"projector=linear, .* got \(1, 4, 4, 3\) and \(1, 2, 2, 3\)"):
        method(MAP, Tap(3, 8), projector="linear")
