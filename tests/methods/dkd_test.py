"""The method `dkd`: both terms at the configured temperature, with their weights, warm-up and mask."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.types import Outputs, Progress

rng = np.random.default_rng(0)
STUDENT, TEACHER = 2 * rng.normal(size=(2, 4, 5)).astype(np.float32)
LABELS = np.array([0, 3, 1, 4], np.int32)


def method(**changes):
    factory = registry.get("methods", "dkd")
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), types.SimpleNamespace(epochs=40), rngs=nnx.Rngs(0))


def test_terms():
    wiring = method(alpha=2.0, beta=8.0, temperature=4.0, schedule={"warmup": 20})
    valid = np.array([True, True, False, True])

    @jax.jit
    def run(student, teacher):
        progress = Progress(jnp.int32(0), jnp.int32(5), jnp.int32(40))
        outputs = {"student": Outputs(student, valid=valid), "teacher": Outputs(teacher)}
        return wiring.terms(types.SimpleNamespace(**outputs, labels=LABELS, progress=progress))

    terms = run(STUDENT, TEACHER)
    for row, label in enumerate(LABELS):
        q, p = (softmax(x[row] / 4.0) for x in (STUDENT, TEACHER))
        binary = [np.array([x[label], 1 - x[label]]) for x in (p, q)]
        others = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
        for name, (p, q) in (("target", binary), ("nontarget", others)):
            np.testing.assert_allclose(terms[name].value[row], 16 * np.sum(p * np.log(p / q)), rtol=1e-4, atol=1e-5)
    assert (terms["target"].weight, terms["nontarget"].weight) == pytest.approx((0.5, 2.0))  # a quarter
    assert all(term.where is not None and (term.where == valid).all() for term in terms.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "methods.dkd.temperature=0.0: must be above 0"),
        ({"alpha": -1.0}, "methods.dkd.alpha=-1.0: must be 0 or more"),
        ({"beta": -1.0}, "methods.dkd.beta=-1.0: must be 0 or more"),
        ({"schedule": {"warmup": -1}}, "methods.dkd.schedule.warmup=-1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
