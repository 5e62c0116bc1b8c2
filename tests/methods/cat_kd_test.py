"""CAT-KD against the formula: maps, gradients into the student's classifier alone, networks without such maps."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.methods.cat_kd import CATKD
from wkd_jax.models.layers import Linear
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup

POSITIONS = [
    np.random.default_rng(i).normal(size=(2, *shape)).astype(np.float32)
    for i, shape in ((0, (4, 4, 3)), (1, (2, 2, 5)))
]


class Net(nnx.Module):
    def __init__(self, width):
        self.fc = Linear(width, 7, rngs=nnx.Rngs(width))


NETS = Net(3), Net(5)
INFOS = [ModelInfo(name, 7, {}, width, "fc/kernel", mean_pooled=True) for name, width in (("s", 3), ("t", 5))]


def method(student=INFOS[0], teacher=INFOS[1], **changes):
    setup = Setup(student, teacher, (8, 8), 2, 10, labels=None, similarity=None)
    return CATKD({**CATKD.DEFAULTS, "size": 2, **changes}, setup, rngs=nnx.Rngs(0))


def context(nets=NETS):
    outputs = [Outputs(None, positions=jnp.asarray(x)) for x in POSITIONS]
    return types.SimpleNamespace(
        student=outputs[0],
        teacher=outputs[1],
        student_model=lambda: nets[0],
        teacher_model=lambda: nets[1],
        progress=Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10)),
    )


@pytest.mark.parametrize("normalise", [False, True])
def test_terms(normalise):
    (term,) = method(normalise=normalise, weight=3.0).terms(context()).values()
    kernels = [np.asarray(net.fc.kernel[...]) for net in NETS]
    student, teacher = (x @ kernel for x, kernel in zip(POSITIONS, kernels, strict=True))
    student = student.reshape(2, 2, 2, 2, 2, 7).mean((2, 4))
    if normalise:
        student, teacher = (x / np.sqrt(np.square(x).sum((1, 2), keepdims=True)) for x in (student, teacher))
    np.testing.assert_allclose(term.value, np.square(student - teacher).mean((1, 2, 3)), rtol=1e-4)
    assert float(term.weight) == 3
    assert not nnx.state(method())


def test_the_students_classifier_learns():
    wiring = method()

    def loss(nets):
        return wiring.terms(context(nets))["maps"].value.sum()

    student, teacher = nnx.grad(loss)(NETS)
    assert np.any(student["fc"]["kernel"][...])
    for leaf in (student["fc"]["bias"], *jax.tree.leaves(teacher)):
        assert not np.any(leaf[...])


def test_refusals():
    for side, info in zip(("student", "teacher"), INFOS, strict=True):
        with pytest.raises(ValueError, match=f"methods.cat_kd: the {side} {info.name} has no class maps"):
            method(**{side: dataclasses.replace(info, mean_pooled=False)})
    with pytest.raises(ValueError, match="methods.cat_kd.size=0: must be above 0"):
        method(size=0)
