"""Each method's terms and weights against the formula, from the raw outputs of both networks. Catches wrong wiring."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.types import Context, ModelInfo, Outputs, Progress, Setup, Tap

B, C, D = 4, 5, 6
rng = np.random.default_rng(0)
STUDENT, TEACHER = 3 * rng.normal(size=(2, B, C))
MAPS = rng.normal(size=(2, B, 4, 4, D))
LABELS = np.array([0, 3, 1, 4], np.int32)
SIMILARITY = np.where(np.eye(C, dtype=bool), 1.0, 0.3 + 0.4 * (lambda x: (x + x.T) / 2)(rng.random((C, C))))
SIMILARITY = SIMILARITY.astype(np.float32)


def info(name):
    return ModelInfo(name, C, {"early": Tap(3, 1), "last": Tap(D, 4)}, D, "fc/kernel")


def setup(**changes):
    values = {
        "student": info("s"),
        "teacher": info("t"),
        "image_size": (16, 16),
        "global_batch_size": B,
        "epochs": 10,
        "labels": LABELS,
        "similarity": lambda: SIMILARITY,
    }
    return Setup(**{**values, **changes})


def method(name, **changes):
    factory = registry.get("methods", name)
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), setup(), rngs=nnx.Rngs(0))


def context(epoch=1, valid=None):
    outputs = [
        Outputs(jnp.asarray(logits, jnp.float32), {"last": jnp.asarray(maps, jnp.float32)}, valid=valid)
        for logits, maps in zip((STUDENT, TEACHER), MAPS, strict=True)
    ]
    progress = Progress(jnp.int32(0), jnp.int32(epoch), jnp.int32(10))
    rest = {"batch": None, "teacher_batch": None, "student_model": None, "teacher_model": None}
    return Context(
        labels=jnp.asarray(LABELS),
        student=outputs[0],
        teacher=outputs[1],
        progress=progress,
        key=jax.random.key(0),
        **rest,
    )


def test_none_adds_nothing():
    assert method("none").terms(context()) == {}


def test_kd():
    (term,) = method("kd", temperature=3.0, weight=0.9).terms(context()).values()
    p, log_q = softmax(TEACHER / 3, -1), log_softmax(STUDENT / 3, -1)
    expected = 9 * (p * (np.log(p) - log_q)).sum(-1)
    np.testing.assert_allclose(term.value, expected, rtol=1e-5)
    assert float(term.weight) == pytest.approx(0.9)


def sinkhorn(a, b, cost, epsilon, iterations):
    kernel, u = np.exp(-cost / epsilon), np.full(len(a), 1 / len(a))
    for _ in range(iterations):
        v = b / (kernel.T @ u + 1e-8)
        u = a / (kernel @ v + 1e-8)
    return (u[:, None] * kernel * v[None] * cost).sum(), np.abs(v * (kernel.T @ u) - b).sum()


def test_wkd_l():
    """Every setting away from its default, so that none can be left out."""
    chosen = {
        "temperature": 3.0,
        "sharpness": 2.0,
        "epsilon": 0.1,
        "num_iters": 7,
        "weight": 20.0,
        "target_weight": 0.5,
    }
    terms = method("wkd_l", **chosen).terms(context(epoch=5))
    cost = 1 - np.exp(-2.0 * (1 - SIMILARITY.astype(np.float64)))
    for row, label in enumerate(LABELS):
        others = np.delete(np.arange(C), label)
        a, b = (softmax(logits[row, others] / 3) for logits in (STUDENT, TEACHER))
        expected, error = sinkhorn(a, b, cost[np.ix_(others, others)], 0.1, 7)
        np.testing.assert_allclose(terms["wasserstein"].value[row], expected, rtol=1e-4)
        np.testing.assert_allclose(terms["marginal_error"].value[row], error, rtol=1e-3)
        target = -softmax(TEACHER[row])[label] * log_softmax(STUDENT[row])[label]
        np.testing.assert_allclose(terms["target"].value[row], target, rtol=1e-5)
    assert float(terms["wasserstein"].weight) == pytest.approx(20.0 / 2 * (1 + np.cos(np.pi * 0.5)), abs=1e-5)
    assert float(terms["target"].weight) == 0.5  # does not decay
    assert terms["marginal_error"].weight is None


def test_wkd_l_without_separation():
    chosen = {"temperature": 3.0, "sharpness": 2.0, "epsilon": 0.1, "num_iters": 7, "weight": 20.0}
    terms = method("wkd_l", separate_target=False, **chosen).terms(context(epoch=5))
    assert sorted(terms) == ["marginal_error", "wasserstein"]
    cost = 1 - np.exp(-2.0 * (1 - SIMILARITY.astype(np.float64)))
    expected = [sinkhorn(softmax(s / 3), softmax(t / 3), cost, 0.1, 7) for s, t in zip(STUDENT, TEACHER, strict=True)]
    np.testing.assert_allclose(terms["wasserstein"].value, [value for value, _ in expected], rtol=1e-4)
    np.testing.assert_allclose(terms["marginal_error"].value, [error for _, error in expected], rtol=1e-3, atol=1e-6)
    assert float(terms["wasserstein"].weight) == pytest.approx(10.0, abs=1e-4)
    assert terms["marginal_error"].weight is None


def test_wkd_f():
    chosen = {"projector": "none", "grid": 2, "ddof": 0, "eps": 0.01, "weight": 0.1, "mean_cov_ratio": 3.0}
    terms = method("wkd_f", **chosen, schedule={"name": "constant", "start": 0}).terms(context())
    means, covariances = np.zeros(B), np.zeros(B)
    for i in (0, 2):
        for j in (0, 2):
            cells = MAPS[:, :, i : i + 2, j : j + 2].reshape(2, B, 4, D)
            mean, std = cells.mean(2), np.sqrt(cells.var(2) + 0.01)
            means += np.square(mean[0] - mean[1]).sum(-1) / 4
            covariances += np.square(std[0] - std[1]).sum(-1) / 4
    np.testing.assert_allclose(terms["mean"].value, means, rtol=1e-5)
    np.testing.assert_allclose(terms["covariance"].value, covariances, rtol=1e-5)
    assert (float(terms["mean"].weight), float(terms["covariance"].weight)) == pytest.approx((0.3, 0.1))


def test_the_projector_trains_and_meets_the_teacher():
    wiring = method("wkd_f", projector="conv1x1", grid=1)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(wiring, nnx.Param))) == D * D + D + 2 * D
    before = np.asarray(wiring.projector.bn.mean[...])
    assert wiring.terms(context())["mean"].value.shape == (B,)
    assert np.any(np.asarray(wiring.projector.bn.mean[...]) != before)  # running statistics of the connector


def test_rows_of_regions_are_masked_and_keep_their_shape():
    regions = lambda x: jnp.asarray(x, jnp.float32).reshape(2, 2, *x.shape[1:])  # noqa: E731
    valid = jnp.array([[True, False], [True, True]])
    outputs = [
        Outputs(regions(logits), {"last": regions(maps)}, valid=valid)
        for logits, maps in zip((STUDENT, TEACHER), MAPS, strict=True)
    ]
    rows = context()
    grouped = types.SimpleNamespace(
        student=outputs[0], teacher=outputs[1], labels=regions(LABELS).astype(jnp.int32), progress=rows.progress
    )
    for name, changes in (("kd", {}), ("wkd_l", {}), ("wkd_f", {"projector": "none", "grid": 1})):
        wiring = method(name, **changes)
        flat = wiring.terms(rows)
        for key, term in wiring.terms(grouped).items():
            assert term.where is valid, (name, key)
            expected = flat[key].value.reshape(2, 2)
            np.testing.assert_allclose(term.value[valid], expected[valid], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("kd", {"temperature": 0.0}, "methods.kd.temperature=0.0: must be above 0"),
        ("kd", {"weight": -1.0}, "methods.kd.weight=-1.0: must be 0 or more"),
        ("wkd_l", {"epsilon": -1.0}, "methods.wkd_l: epsilon must be one positive number"),
        ("wkd_l", {"gradient": "exact"}, "methods.wkd_l: unknown gradient 'exact'"),
        ("wkd_l", {"num_iters": 0}, "methods.wkd_l: num_iters must be at least 1"),
        ("wkd_l", {"num_iters": 0, "separate_target": False}, "methods.wkd_l: num_iters must be at least 1"),
        ("wkd_l", {"sharpness": -0.5}, "methods.wkd_l.sharpness=-0.5"),
        ("wkd_l", {"target_weight": -0.5}, "methods.wkd_l.target_weight=-0.5"),
        ("wkd_f", {"grid": 9}, "methods.wkd_f.grid=9: must be from 1 to 4"),
        ("wkd_f", {"grid": 4}, r"methods.wkd_f.grid=4: leaves 1 position\(s\) a cell"),
        ("wkd_f", {"teacher_tap": "lst"}, "methods.wkd_f.teacher_tap: unknown tap of t 'lst': did you mean 'last'"),
        ("wkd_f", {"projector": "conv"}, "methods.wkd_f.projector: unknown projector 'conv'"),
        ("wkd_f", {"projector": "none", "student_tap": "early"}, "methods.wkd_f.projector: "),
        ("wkd_f", {"eps": 0.0}, "methods.wkd_f.eps=0.0"),
    ],
)
def test_what_cannot_work_is_refused_when_built(name, changes, message):
    with pytest.raises(ValueError, match=message):
        method(name, **changes)


def test_costs_that_do_not_fit_are_refused():
    factory = registry.get("methods", "wkd_l")
    for similarity, message in (
        (np.eye(7, dtype=np.float32), r"\(7, 7\), the models have 5"),
        (np.ones((C, C)), "all classes are alike"),
    ):
        with pytest.raises(ValueError, match=message):
            factory(dict(factory.DEFAULTS), setup(similarity=lambda s=similarity: s), rngs=nnx.Rngs(0))
