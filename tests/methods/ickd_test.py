"""ICKD-C: connector, forms and weights against the formula; maps of other sizes, and tokens."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.losses import ickd
from wkd_jax.methods.ickd import ICKDC
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B = 2
MAP, TOKENS = Tap(3, 4), Tap(5, 8, "tokens", signed=True, prefix_tokens=1)
rng = np.random.default_rng(0)
FEATURES = {
    MAP: rng.normal(size=(B, 4, 4, 3)).astype(np.float32),
    TOKENS: rng.normal(size=(B, 5, 5)).astype(np.float32),
}


def method(student, teacher, **changes):
    infos = (ModelInfo(name, 7, {"last": tap}, 9, "fc/kernel") for name, tap in (("s", student), ("t", teacher)))
    setup = Setup(*infos, (16, 16), B, 10, labels=None, similarity=None)
    return ICKDC({**ICKDC.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(student, teacher):
    outputs = [Outputs(None, {"last": jnp.asarray(FEATURES[tap])}) for tap in (student, teacher)]
    progress = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10))
    return types.SimpleNamespace(student=outputs[0], teacher=outputs[1], progress=progress)


def as_map(tap):
    return FEATURES[tap] if tap is MAP else FEATURES[tap][:, 1:].reshape(B, 2, 2, 5)


@pytest.mark.parametrize(("student", "teacher"), [(MAP, TOKENS), (TOKENS, MAP)], ids=["map", "tokens"])
@pytest.mark.parametrize("form", ["cifar", "imagenet"])
def test_terms(student, teacher, form):
    wiring = method(student, teacher, form=form)
    x, kernel = as_map(student), np.asarray(wiring.conv.kernel[...])
    border = kernel.shape[0] // 2
    assert kernel.shape[:2] == ((1, 1) if form == "cifar" else (3, 3)) and wiring.conv.bias is None
    padded = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    rows, columns = x.shape[1:3]
    y = sum(
        padded[:, i : i + rows, j : j + columns] @ kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    (term,) = wiring.terms(context(student, teacher)).values()
    np.testing.assert_allclose(term.value, ickd(y, as_map(teacher), form=form), rtol=1e-4)
    assert float(term.weight) == 500
    assert np.any(np.asarray(wiring.bn.mean[...]) != 0)


@pytest.mark.parametrize(("form", "count"), [("imagenet", 2_360_320), ("cifar", 263_168)])
def test_parameters_of_resnet34_to_resnet18(form, count):
    wide = Tap(512, 32)
    wiring = nnx.eval_shape(lambda: method(wide, wide, form=form))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(wiring, nnx.Param))) == count


def test_refusals():
    with pytest.raises(ValueError, match="methods.ickd_c.form: unknown value 'cifer': did you mean 'cifar'"):
        method(MAP, MAP, form="cifer")
    with pytest.raises(ValueError, match="methods.ickd_c.student_tap: unknown tap of s 'stage9'"):
        method(MAP, MAP, student_tap="stage9")
