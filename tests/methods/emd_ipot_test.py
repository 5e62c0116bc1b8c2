"""EMD+IPOT: its term from the raw outputs of both networks, what it trains, what it refuses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.distance import cdist

from wkd_jax import config as config_lib
from wkd_jax.methods.emd_ipot import EMDIPOT
from wkd_jax.models import functional
from wkd_jax.types import Batch, ModelInfo, Outputs, Progress, Setup, Tap

B, WIDTHS = 8, (3, 5)
rng = np.random.default_rng(0)
STUDENT, TEACHER = (rng.normal(size=(B, width)).astype(np.float32) for width in WIDTHS)
VALID = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)


def make(widths=WIDTHS, **changes):
    student, teacher = (ModelInfo("net", 4, {"t": Tap(width, 1)}, width, "fc/kernel") for width in widths)
    setup = Setup(student, teacher, (8, 8), B, 10, labels=None, similarity=None)
    return EMDIPOT(config_lib._merge(EMDIPOT.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def context(student=STUDENT, teacher=TEACHER):
    return types.SimpleNamespace(
        student=Outputs(jnp.zeros((B, 4)), pooled=jnp.asarray(student)),
        teacher=Outputs(jnp.zeros((B, 4)), pooled=jnp.asarray(teacher)),
        batch=Batch(None, None, None, jnp.asarray(VALID)),
        progress=Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10)),
    )


def distance(student, teacher, beta, num_iters):
    """Of two sets, by the published products."""
    cost, n = cdist(student, teacher), len(student)
    plan, b = np.ones((n, n)), np.ones(n)
    for _ in range(num_iters):
        q = np.exp(-cost / beta) * plan
        a = 1 / n / (q @ b)
        b = 1 / n / (q.T @ a)
        plan = a[:, None] * q * b
    return (plan * cost).sum()


def test_terms():
    module = make(weight=3.0, cost="euclidean", beta=0.5, num_iters=7, group_size=4)
    (term,) = jax.jit(lambda: module.terms(context()))().values()
    embedded = STUDENT @ np.asarray(module.embed.kernel[...]) + np.asarray(module.embed.bias[...])
    groups = [np.flatnonzero(VALID[:4]), 4 + np.flatnonzero(VALID[4:])]
    expected = np.mean([distance(embedded[rows], TEACHER[rows], 0.5, 7) for rows in groups])
    np.testing.assert_allclose(term.value, expected, rtol=1e-4)
    assert term.value.shape == ()
    assert term.where is None
    assert float(term.weight) == 3.0


def test_parameters_of_resnet34_to_resnet18():
    """0.25 M in units of 2^20; equal widths are embedded too."""
    _, params, variables, _ = functional.split(nnx.eval_shape(lambda: make((512, 512))))
    assert sum(value.size for value in params.values()) == 262_656
    assert not variables


def test_it_trains_the_embedding_and_the_student_towards_the_teachers_set():
    structure, params, *_ = functional.split(make())

    def loss(params, student, teacher):
        return structure.merge(params).terms(context(student, teacher))["distance"].value

    descend = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    first, (gradients, to_student, to_teacher) = descend(params, STUDENT, TEACHER)
    assert all(np.any(gradient) for gradient in gradients.values())
    assert np.all(np.any(np.asarray(to_student) != 0, axis=1) == VALID)
    assert not np.any(to_teacher)
    for _ in range(5):
        params = {name: value - 0.5 * gradients[name] for name, value in params.items()}
        last, (gradients, *_) = descend(params, STUDENT, TEACHER)
    assert last < first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "methods.emd_ipot.weight=-1.0"),
        ({"cost": "cosin"}, "methods.emd_ipot.cost: .*'cosin'.*cosine"),
        ({"beta": 0.0}, "methods.emd_ipot.beta=0.0: must be above 0"),
        ({"num_iters": 0}, "methods.emd_ipot.num_iters=0: must be above 0"),
        ({"group_size": 3}, "methods.emd_ipot.group_size=3: must be 0"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
