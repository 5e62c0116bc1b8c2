"""The method `nkd`: the temperature belongs to the non-target term alone, and so does gamma."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.types import Outputs, Progress

rng = np.random.default_rng(0)
STUDENT, TEACHER = 2 * rng.normal(size=(2, 4, 5)).astype(np.float32)
LABELS = np.array([0, 3, 1, 4], np.int32)


def method(**changes):
    factory = registry.get("methods", "nkd")
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), types.SimpleNamespace(epochs=40), rngs=nnx.Rngs(0))


def test_terms():
    wiring = method(gamma=3.5, temperature=3.0, schedule={"name": "cosine"})
    valid = np.array([True, True, False, True])

    @jax.jit
    def run(student, teacher):
        progress = Progress(jnp.int32(0), jnp.int32(20), jnp.int32(40))
        outputs = {"student": Outputs(student, valid=valid), "teacher": Outputs(teacher)}
        return wiring.terms(types.SimpleNamespace(**outputs, labels=LABELS, progress=progress))

    terms = run(STUDENT, TEACHER)
    for row, label in enumerate(LABELS):
        target = -softmax(TEACHER[row])[label] * log_softmax(STUDENT[row])[label]
        np.testing.assert_allclose(terms["target"].value[row], target, rtol=1e-4)
        student, teacher = (np.delete(x[row], label) / 3.0 for x in (STUDENT, TEACHER))
        nontarget = -9 * np.sum(softmax(teacher) * log_softmax(student))
        np.testing.assert_allclose(terms["nontarget"].value[row], nontarget, rtol=1e-4)
    assert (terms["target"].weight, terms["nontarget"].weight) == pytest.approx((0.5, 1.75))  # half way
    assert all((term.where == valid).all() for term in terms.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "methods.nkd.temperature=0.0: must be above 0"),
        ({"gamma": -1.0}, "methods.nkd.gamma=-1.0: must be 0 or more"),
        ({"schedule": {"name": "linear"}}, "methods.nkd.schedule.name"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
