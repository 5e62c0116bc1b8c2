"""RKD's terms: which features, weights, groups and mask go where."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.losses import rkd_angle, rkd_distance
from wkd_jax.methods import schedule
from wkd_jax.methods.rkd import RKD
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup

FEATURES = [np.random.default_rng(i).normal(size=(6, width)).astype(np.float32) for i, width in ((0, 3), (1, 5))]
WHERE = np.array([True, True, True, True, False, True])


def method(**changes):
    infos = (ModelInfo(name, 7, {}, width, "fc/kernel") for name, width in (("s", 3), ("t", 5)))
    setup = Setup(*infos, (8, 8), 6, 10, labels=None, similarity=None)
    return RKD({**RKD.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def test_terms():
    context = types.SimpleNamespace(
        student=Outputs(None, pooled=jnp.asarray(FEATURES[0])),
        teacher=Outputs(None, pooled=jnp.asarray(FEATURES[1])),
        batch=types.SimpleNamespace(valid=jnp.asarray(WHERE)),
        progress=Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10)),
    )
    chosen = {"distance_weight": 3.0, "angle_weight": 7.0, "schedule": {**schedule.DEFAULTS, "warmup": 10}}
    wiring = method(group_size=3, **chosen)

    @jax.jit
    def run():
        return wiring.terms(context), [loss(*FEATURES, group_size=3, where=WHERE) for loss in (rkd_distance, rkd_angle)]

    terms, expected = run()
    np.testing.assert_allclose([terms["distance"].value, terms["angle"].value], expected, rtol=1e-6)
    np.testing.assert_allclose([terms["distance"].weight, terms["angle"].weight], [0.3, 0.7], rtol=1e-6)


def test_no_parameters_and_refusals():
    assert not nnx.state(method())
    for key in ("distance_weight", "angle_weight"):
        with pytest.raises(ValueError, match=f"methods.rkd.{key}=-1.0: must be 0 or more"):
            method(**{key: -1.0})
    with pytest.raises(ValueError, match="methods.rkd.group_size=4"):
        method(group_size=4)
