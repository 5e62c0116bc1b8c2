"""CC against the formula: both forms, both embeddings trained, examples that do not count."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.methods.cc import CC
from wkd_jax.models import functional
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup

STUDENT, TEACHER = (
    np.random.default_rng(i).normal(size=(4, width)).astype(np.float32) for i, width in ((0, 3), (1, 5))
)
VALID = np.array([True, True, False, True])


def method(**changes):
    infos = (ModelInfo(name, 7, {}, width, "fc/kernel") for name, width in (("s", 3), ("t", 5)))
    setup = Setup(*infos, (8, 8), 4, 10, labels=None, similarity=None)
    return CC({**CC.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


CONTEXT = types.SimpleNamespace(
    student=Outputs(None, pooled=jnp.asarray(STUDENT)),
    teacher=Outputs(None, pooled=jnp.asarray(TEACHER)),
    batch=types.SimpleNamespace(valid=jnp.asarray(VALID)),
    progress=Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10)),
)


@pytest.mark.parametrize("form", ["neighbours", "kernel"])
def test_terms(form):
    wiring = method(form=form, embedding=6, weight=0.5)
    structure, params, *rest = functional.split(wiring)

    @jax.jit
    def run(params):
        (term,) = structure.merge(params, *rest).terms(CONTEXT).values()
        return term.value, term.weight

    (value, weight), gradients = jax.value_and_grad(run, has_aux=True)(params)
    layers = wiring.student_embedding, wiring.teacher_embedding
    s, t = (
        (x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]))[VALID]
        for x, layer in zip((STUDENT, TEACHER), layers, strict=True)
    )
    if form == "neighbours":
        difference = np.abs(s - t)
        expected = (difference[0] @ difference[1] + difference[1] @ difference[2]) / 2
    else:
        s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
        kernels = [sum(0.8**p / math.factorial(p) * (x @ x.T) ** p for p in range(3)) for x in (s, t)]
        expected = math.exp(-1.6) * np.square(kernels[0] - kernels[1]).sum() / 9
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert float(weight) == 0.5
    assert all(np.any(gradient) for gradient in gradients.values())  # of both embeddings


def test_parameters_and_refusals():
    assert sum(x.size for x in jax.tree.leaves(nnx.state(method(), nnx.Param))) == 128 * (3 + 5 + 2)
    with pytest.raises(ValueError, match="methods.cc.form: unknown value 'kernl': did you mean 'kernel'"):
        method(form="kernl")
    with pytest.raises(ValueError, match="methods.cc.embedding=0: must be above 0"):
        method(embedding=0)
