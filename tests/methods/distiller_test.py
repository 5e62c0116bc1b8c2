"""The method `distiller`: its settings reach the loss, and bad ones are refused when it is built."""

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
    factory = registry.get("methods", "distiller")
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), types.SimpleNamespace(epochs=40), rngs=nnx.Rngs(0))


def test_terms():
    chosen = {"temperature": 2.0, "weight": 5.0}
    wiring = [
        method(**chosen),
        method(transformations=("mask_target", "softmax"), distance="l1", **chosen),
        method(transformations=("softmax", "standardize_batch"), distance="l2", **chosen),
    ]
    valid = np.array([True, True, False, True])

    @jax.jit
    def run(student, teacher):
        progress = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(40))
        outputs = {"student": Outputs(student), "teacher": Outputs(teacher)}
        batch = types.SimpleNamespace(valid=valid)
        context = types.SimpleNamespace(**outputs, labels=LABELS, batch=batch, progress=progress)
        return [each.terms(context)["distance"] for each in wiring]

    terms = run(STUDENT, TEACHER)
    q, p = (softmax(x / 2, -1) for x in (STUDENT, TEACHER))
    np.testing.assert_allclose(terms[0].value, 4 * np.sum(p * np.log(p / q), -1), rtol=1e-4)
    for row, label in enumerate(LABELS):
        others = [np.delete(x[row], label) for x in (p, q)]
        expected = 4 * np.abs(others[0] / others[0].sum() - others[1] / others[1].sum()).mean()
        np.testing.assert_allclose(terms[1].value[row], expected, rtol=1e-4)
    p, q = ((x - x[valid].mean(0)) / x[valid].std(0) for x in (p, q))
    np.testing.assert_allclose(terms[2].value, 4 * np.square(p - q).mean(-1), rtol=1e-3)
    assert all(float(term.weight) == 5.0 for term in terms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformations": ("softmax",)}, "methods.distiller: distance 'kl' needs a chain that ends"),
        ({"transformations": ("sigmoid",)}, "methods.distiller: unknown transformation 'sigmoid'"),
        ({"distance": "js"}, "methods.distiller: unknown distance 'js'"),
        ({"temperature": 0.0}, "methods.distiller.temperature=0.0"),
        ({"weight": -1.0}, "methods.distiller.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
