"""Weights over epochs against the released code's formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.methods import schedule
from wkd_jax.types import Progress


def weights(config, epochs):
    def one(epoch):
        return schedule.weight(30.0, config, Progress(step=epoch, epoch=epoch, epochs=jnp.asarray(epochs)))

    return jax.vmap(one)(jnp.arange(1, epochs + 1))


@pytest.mark.parametrize(("start", "epochs"), [(0, 100), (30, 100), (150, 240)])
def test_cosine(start, epochs):
    e = np.arange(1, epochs + 1)
    expected = np.where(e <= start, 30.0, 15.0 * (1 + np.cos(np.pi * (e - start) / (epochs - start))))
    got = weights({"name": "cosine", "start": start}, epochs)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert abs(got[-1]) < 1e-5


def test_constant():
    np.testing.assert_array_equal(weights({"name": "constant", "start": 0}, 5), 30.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cosin", "start": 0}, "methods.m.schedule.name: .*did you mean 'cosine'"),
        ({"name": "cosine", "start": -1}, "methods.m.schedule.start=-1"),
        ({"name": "cosine", "start": 5}, "below the run's epochs, 5"),
    ],
)
def test_bad_schedules(config, message):
    with pytest.raises(ValueError, match=message):
        schedule.check("m", 1.0, config, 5)


def test_weights_that_cannot_be_meant():
    with pytest.raises(ValueError, match="methods.m.weight=-1.0"):
        schedule.check("m", -1.0, {"name": "constant", "start": 0}, 5)
    with pytest.raises(ValueError, match="only one"):
        schedule.check("m", 1.0, {"name": "cosine", "start": 0}, 1)
