"""Both forms of Tf-KD: terms from raw outputs, weights, refusals."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax.methods.tf_kd import TfKDReg, TfKDSelf
from wkd_jax.types import Outputs, Progress

STUDENT, TEACHER = 3 * np.random.default_rng(0).normal(size=(2, 4, 5))
LABELS = np.array([0, 3, 1, 4], np.int32)


def method(factory, **changes):
    return factory({**factory.DEFAULTS, **changes}, types.SimpleNamespace(epochs=10), rngs=nnx.Rngs(0))


def context(teacher=None, valid=None):
    return types.SimpleNamespace(
        student=Outputs(jnp.asarray(STUDENT), valid=valid),
        teacher=teacher,
        labels=LABELS,
        progress=Progress(0, 1, 10),
    )


def test_self_training():
    (term,) = method(TfKDSelf, temperature=3.0, weight=9.0).terms(context(Outputs(jnp.asarray(TEACHER)))).values()
    p, log_q = softmax(TEACHER / 3, -1), log_softmax(STUDENT / 3, -1)
    expected = 9 * (p * (np.log(p) - log_q)).sum(-1)
    np.testing.assert_allclose(term.value, expected / 5, rtol=1e-5)
    assert float(term.weight) == 9.0 and term.where is None
    (summed,) = (
        method(TfKDSelf, temperature=3.0, reduction="sum").terms(context(Outputs(jnp.asarray(TEACHER)))).values()
    )
    np.testing.assert_allclose(summed.value, expected, rtol=1e-5)
    assert float(summed.weight) == pytest.approx(0.95 * 50)


@pytest.mark.parametrize("soften_student", [False, True])
def test_regularisation(soften_student):
    chosen = {"temperature": 5.0, "correct_probability": 0.9, "soften_student": soften_student, "weight": 2.0}
    valid = np.array([True, False, True, True])
    (term,) = method(TfKDReg, **chosen).terms(context(valid=valid)).values()
    u = softmax(np.where(np.eye(5)[LABELS] == 1, 0.9, 0.025) / 5, -1)
    log_q = log_softmax(STUDENT / 5 if soften_student else STUDENT, -1)
    np.testing.assert_allclose(term.value, (u * (np.log(u) - log_q)).mean(-1), rtol=1e-5)
    assert float(term.weight) == 2.0 and term.where is valid


def test_who_needs_a_teacher():
    assert (TfKDSelf.NEEDS_TEACHER, TfKDReg.NEEDS_TEACHER) == (True, False)


@pytest.mark.parametrize(
    ("factory", "changes", "message"),
    [
        (TfKDSelf, {"temperature": 0.0}, "methods.tf_kd_self.temperature=0.0"),
        (TfKDSelf, {"reduction": "batchmean"}, "methods.tf_kd_self.reduction: unknown value 'batchmean'"),
        (TfKDSelf, {"weight": -1.0}, "methods.tf_kd_self.weight=-1.0"),
        (TfKDReg, {"temperature": -1.0}, "methods.tf_kd_reg.temperature=-1.0"),
        (TfKDReg, {"correct_probability": 1.1}, "methods.tf_kd_reg.correct_probability=1.1"),
    ],
)
def test_refusals(factory, changes, message):
    with pytest.raises(ValueError, match=message):
        method(factory, **changes)
