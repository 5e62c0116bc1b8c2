"""The methods `ttm` and `wttm`: which is which, with their power, weight and mask."""

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


def method(name, **changes):
    factory = registry.get("methods", name)
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), types.SimpleNamespace(epochs=40), rngs=nnx.Rngs(0))


def test_terms():
    wiring = {name: method(name, power=0.3, weight=7.0, schedule={"warmup": 2}) for name in ("ttm", "wttm")}
    valid = np.array([True, True, False, True])

    @jax.jit
    def run(student, teacher):
        progress = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(40))
        outputs = {"student": Outputs(student, valid=valid), "teacher": Outputs(teacher)}
        return {name: each.terms(types.SimpleNamespace(**outputs, progress=progress)) for name, each in wiring.items()}

    terms = run(STUDENT, TEACHER)
    powers = softmax(TEACHER, -1) ** 0.3
    p = powers / powers.sum(-1, keepdims=True)
    kl = np.sum(p * (np.log(p) - log_softmax(STUDENT, -1)), -1)
    for name, expected in (("ttm", kl), ("wttm", powers.sum(-1) * kl)):
        np.testing.assert_allclose(terms[name]["kl"].value, expected, rtol=1e-4)
        assert float(terms[name]["kl"].weight) == pytest.approx(3.5)
        assert (terms[name]["kl"].where == valid).all()


@pytest.mark.parametrize("name", ["ttm", "wttm"])
def test_refusals(name):
    for power in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"methods.{name}.power={power}: must be above 0 and at most 1"):
            method(name, power=power)
    with pytest.raises(ValueError, match=f"methods.{name}.weight=-1.0"):
        method(name, weight=-1.0)
