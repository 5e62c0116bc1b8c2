"""The method `dist`: groups, both weights, and the rows that count in the term of the whole batch."""

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
STUDENT, TEACHER = 2 * rng.normal(size=(2, 8, 5)).astype(np.float32)


def method(batch_size=8, **changes):
    factory = registry.get("methods", "dist")
    setup = types.SimpleNamespace(epochs=40, global_batch_size=batch_size)
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def run(wiring, rows_valid, images_valid):
    def terms(student, teacher):
        progress = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(40))
        outputs = {"student": Outputs(student, valid=rows_valid), "teacher": Outputs(teacher)}
        batch = types.SimpleNamespace(valid=images_valid)
        return wiring.terms(types.SimpleNamespace(**outputs, batch=batch, progress=progress))

    shape = np.shape(images_valid if rows_valid is None else rows_valid)
    return jax.jit(terms)(STUDENT.reshape(*shape, 5), TEACHER.reshape(*shape, 5))


def correlation(a, b):
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def test_terms():
    valid = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
    wiring = method(weight=3.0, beta=0.5, gamma=2.0, temperature=2.0, group_size=4)
    images = run(wiring, None, valid)
    regions = run(wiring, valid.reshape(4, 2), np.ones(4, bool))  # groups are of images: here all four
    p, q = (softmax(x / 2, -1) for x in (TEACHER, STUDENT))
    for terms, groups in ((images, (slice(0, 4), slice(4, 8))), (regions, (slice(0, 8),))):
        np.testing.assert_allclose(terms["inter"].value.reshape(8), 4 * (1 - correlation(p, q)), rtol=1e-3, atol=1e-5)
        each = [1 - correlation(p[rows][valid[rows]].T, q[rows][valid[rows]].T).mean() for rows in groups]
        np.testing.assert_allclose(terms["intra"].value, 4 * np.mean(each), rtol=1e-3)
        assert (terms["inter"].weight, terms["intra"].weight) == pytest.approx((1.5, 6.0))
    assert images["inter"].where is None and (regions["inter"].where == valid.reshape(4, 2)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 3}, "methods.dist.group_size=3: must be 0 .* or divide the 8"),
        ({"group_size": 1}, "methods.dist.gamma=1.0: correlates examples"),
        ({"batch_size": 1}, "methods.dist.gamma=1.0: correlates examples"),
        ({"temperature": 0.0}, "methods.dist.temperature=0.0"),
        ({"beta": -1.0}, "methods.dist.beta=-1.0"),
        ({"gamma": -1.0}, "methods.dist.gamma=-1.0"),
        ({"weight": -1.0}, "methods.dist.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
    method(batch_size=1, gamma=0.0)  # single examples are served without that term
