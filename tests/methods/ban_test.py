"""BAN's forms: terms from raw outputs, masks, refusals."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax import losses
from wkd_jax.methods.ban import BAN
from wkd_jax.types import Batch, Outputs, Progress

STUDENT, TEACHER = 3 * np.random.default_rng(0).normal(size=(2, 4, 5))
LABELS = np.array([0, 3, 1, 4], np.int32)


def terms(valid=(True,) * 4, label=LABELS, **changes):
    setup = types.SimpleNamespace(epochs=10, global_batch_size=4)
    context = types.SimpleNamespace(
        batch=Batch(None, jnp.asarray(label), None, jnp.array(valid)),
        student=Outputs(jnp.asarray(STUDENT)),
        teacher=Outputs(jnp.asarray(TEACHER)),
        progress=Progress(0, 1, 10),
        key=jax.random.key(3),
    )
    return BAN({**BAN.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0)).terms(context)


def test_soft():
    (term,) = terms(weight=0.5).values()
    np.testing.assert_allclose(term.value, -(softmax(TEACHER, -1) * log_softmax(STUDENT, -1)).sum(-1), rtol=1e-5)
    assert float(term.weight) == 0.5


def test_the_mean_of_cwtm_over_what_counts_is_the_published_sum():
    confidence, loss = softmax(TEACHER, -1).max(-1), -log_softmax(STUDENT, -1)[np.arange(4), LABELS]
    published = lambda rows: (confidence[rows] * loss[rows]).sum() / confidence[rows].sum()  # noqa: E731
    valid = np.array([True, False, True, True])
    value = np.asarray(terms(form="cwtm", valid=valid)["cwtm"].value)
    np.testing.assert_allclose(value[valid].mean(), published(valid), rtol=1e-5)
    grouped = np.asarray(terms(form="cwtm", group_size=2)["cwtm"].value)
    np.testing.assert_allclose(grouped.mean(), (published([0, 1]) + published([2, 3])) / 2, rtol=1e-5)
    mixed = terms(form="cwtm", group_size=2, label=np.eye(5)[LABELS])["cwtm"].value
    np.testing.assert_allclose(mixed, grouped, rtol=1e-5)


def test_dkpp_takes_the_steps_key():
    (value,) = (term.value for term in terms(form="dkpp").values())
    np.testing.assert_allclose(value, losses.dkpp(STUDENT, TEACHER, jax.random.key(3)), rtol=1e-6)
    assert not np.allclose(value, losses.ban(STUDENT, TEACHER))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "hard"}, "methods.ban.form: unknown value 'hard'"),
        ({"group_size": 3}, "methods.ban.group_size=3"),
        ({"weight": -1.0}, "methods.ban.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        terms(**changes)
