"""Weights over epochs against the released code's formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.methods import schedule
from wkd_jax.types import Progress


def weights(epochs, **config):
    def one(epoch):
        progress = Progress(step=epoch, epoch=epoch, epochs=jnp.asarray(epochs))
        return schedule.weight(30.0, {**schedule.DEFAULTS, **config}, progress)

    return jax.vmap(one)(jnp.arange(1, epochs + 1))


@pytest.mark.parametrize(("start", "epochs"), [(0, 100), (30, 100), (150, 240)])
def test_cosine(start, epochs):
    e = np.arange(1, epochs + 1)
    expected = np.where(e <= start, 30.0, 15.0 * (1 + np.cos(np.pi * (e - start) / (epochs - start))))
    got = weights(epochs, name="cosine", start=start)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert abs(got[-1]) < 1e-5


def test_constant():
    np.testing.assert_array_equal(weights(5, name="constant"), 30.0)


@pytest.mark.parametrize("warmup", [1, 4, 20])
def test_warmup(warmup):
    """DKD's min(e / W, 1), of either schedule; one epoch is none, and a run may end before its warm-up does."""
    rise = np.minimum(np.arange(1, 11) / warmup, 1)
    np.testing.assert_allclose(weights(10, warmup=warmup), 30 * rise, rtol=1e-6)
    cosine = weights(10, name="cosine", start=2)
    np.testing.assert_allclose(weights(10, name="cosine", start=2, warmup=warmup), rise * cosine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cosin"}, "methods.m.schedule.name: .*did you mean 'cosine'"),
        ({"name": "cosine", "start": -1}, "methods.m.schedule.start=-1"),
        ({"name": "cosine", "start": 5}, "below the run's epochs, 5"),
        ({"warmup": -1}, "methods.m.schedule.warmup=-1: must be 0 or more epochs"),
    ],
)
def test_bad_schedules(config, message):
    with pytest.raises(ValueError, match=message):
        schedule.check("m", 1.0, {**schedule.DEFAULTS, **config}, 5)


def test_weights_that_cannot_be_meant():
    with pytest.raises(ValueError, match="methods.m.weight=-1.0"):
        schedule.check("m", -1.0, schedule.DEFAULTS, 5)
    with pytest.raises(ValueError, match="only one"):
        schedule.check("m", 1.0, {**schedule.DEFAULTS, "name": "cosine"}, 1)
