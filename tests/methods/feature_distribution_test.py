"""The ablation of WKD-F: its terms against the losses on raw taps, what it refuses, and its projector."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax import losses, registry
from wkd_jax.methods.feature_distribution import FORMS
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B, D = 4, 6
MAPS = np.maximum(np.random.default_rng(0).normal(size=(2, B, 4, 4, D)), 0).astype(np.float32)


def info(name, **last):
    taps = {"signed": Tap(D, 4, signed=True), "wide": Tap(D + 1, 4), "last": Tap(D, **{"stride": 4, **last})}
    return ModelInfo(name, 5, taps, D, "fc/kernel")


def method(student=None, teacher=None, **changes):
    factory = registry.get("methods", "feature_distribution")
    setup = Setup(student or info("s"), teacher or info("t"), (16, 16), B, 10, lambda: None, lambda: None)
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def context(student, teacher, epoch=5, valid=None):
    """Of the one tap that is asked for; the fifth of ten epochs has half the weight."""
    outputs = [Outputs(jnp.zeros((B, 5)), {"last": jnp.asarray(x)}, valid=valid) for x in (student, teacher)]
    progress = Progress(jnp.int32(0), jnp.int32(epoch), jnp.int32(10))
    return types.SimpleNamespace(student=outputs[0], teacher=outputs[1], progress=progress)


# Each setting away from its default, so that none can be left out.
EXPECTED = {
    "gaussian_kl": ({"eps": 0.1}, lambda s, t: losses.feature_gaussian_kl(s, t, eps=0.1)),
    "gaussian_kl_symmetric": ({"eps": 0.1}, lambda s, t: losses.feature_gaussian_kl(s, t, eps=0.1, symmetric=True)),
    "gaussian_kl_full": ({"ridge": 0.2}, lambda s, t: losses.feature_gaussian_kl_full(s, t, ridge=0.2)),
    "laplace_kl": ({"eps": 0.1}, lambda s, t: losses.feature_laplace_kl(s, t, eps=0.1)),
    "exponential_kl": ({"eps": 0.1}, lambda s, t: losses.feature_exponential_kl(s, t, eps=0.1)),
    "sinkhorn": (
        {"epsilon": 0.1, "num_iters": 3},
        lambda s, t: losses.feature_sinkhorn(s, t, epsilon=0.1, num_iters=3),
    ),
    "histogram_w1": ({"bins": 4}, lambda s, t: losses.feature_histogram_w1(s, t, bins=4)),
    "sorted_w2": ({}, losses.feature_sorted_w2),
}


@pytest.mark.parametrize("form", EXPECTED)
def test_distance(form):
    settings, loss = EXPECTED[form]
    wiring = method(form=form, projector="none", weight=3.0, **settings)
    terms, expected = jax.jit(lambda s, t: (wiring.terms(context(s, t)), loss(s, t)))(*MAPS)
    assert list(terms) == ["distance"]
    assert terms["distance"].value.shape == (B,)
    np.testing.assert_allclose(terms["distance"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(terms["distance"].weight, 1.5, rtol=1e-5)


def test_full_covariances_have_the_two_terms_of_wkd_f():
    assert set(FORMS) == {"gaussian_w2_full", *EXPECTED}
    terms = method(form="gaussian_w2_full", projector="none", weight=3.0, mean_cov_ratio=4.0).terms(context(*MAPS))
    mean, covariance = losses.feature_gaussian_w2_full(*MAPS)
    np.testing.assert_allclose(terms["mean"].value, mean, rtol=1e-5)
    np.testing.assert_allclose(terms["covariance"].value, covariance, rtol=1e-5)
    assert (float(terms["mean"].weight), float(terms["covariance"].weight)) == pytest.approx((6.0, 1.5), rel=1e-5)


def test_leading_tokens_and_regions():
    """Tokens lose their prefix; regions [B, R, H, W, D] keep their rows and their mask."""
    expected = losses.feature_gaussian_kl(*MAPS, eps=1e-2)
    tokens = np.concatenate([np.full((B, 1, D), 9, np.float32), MAPS[0].reshape(B, 16, D)], axis=1)
    student = info("s", layout="tokens", prefix_tokens=1)
    value = method(student, projector="none").terms(context(tokens, MAPS[1]))["distance"].value
    np.testing.assert_allclose(value, expected, rtol=1e-5)

    valid = jnp.array([[True, False], [True, True]])
    term = method(projector="none").terms(context(*MAPS.reshape(2, 2, 2, 4, 4, D), valid=valid))["distance"]
    assert term.where is valid
    np.testing.assert_allclose(term.value[valid], expected.reshape(2, 2)[valid], rtol=1e-5)


def test_the_projector_trains():
    wiring = method(projector="conv1x1")
    graph, params, rest = nnx.split(wiring, nnx.Param, ...)
    assert sum(x.size for x in jax.tree.leaves(params)) == D * D + D + 2 * D

    def total(params):
        wiring = nnx.merge(graph, params, rest, copy=True)
        value = wiring.terms(context(*MAPS))["distance"].value.sum()
        return value, nnx.state(wiring, nnx.BatchStat)

    gradients, statistics = jax.jit(jax.grad(total, has_aux=True))(params)
    del gradients["projector"]["convs"][0]["bias"]  # before a BatchNorm: without influence
    assert all(np.any(x) for x in jax.tree.leaves(gradients))
    assert np.any(statistics["projector"]["bn"]["mean"][...])  # of the connector's BatchNorm; 0 at the start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "gaussian"}, r"\.form: unknown value 'gaussian': did you mean 'gaussian_kl"),
        ({"weight": -1.0}, r"\.weight=-1.0: must be 0 or more"),
        ({"mean_cov_ratio": -1.0}, r"\.mean_cov_ratio=-1.0"),
        ({"teacher_tap": "lst"}, r"\.teacher_tap: unknown tap of t 'lst'"),
        ({"projector": "none", "student_tap": "wide"}, r"\.projector: projector 'none'"),
        ({"eps": 0.0}, r": form gaussian_kl: eps=0.0: must be above 0"),
        ({"form": "gaussian_kl_full", "ridge": 0.0}, r": form gaussian_kl_full: ridge=0.0"),
        ({"form": "sinkhorn", "num_iters": 0}, r": form sinkhorn: num_iters"),
        ({"form": "histogram_w1", "bins": 1}, r": form histogram_w1: bins=1"),
        ({"form": "exponential_kl", "teacher_tap": "signed"}, r"\.form=exponential_kl: .* of the teacher may be"),
        ({"form": "exponential_kl", "projector": "linear"}, r"\.form=exponential_kl: .* of the student may be"),
        (
            {"form": "exponential_kl", "projector": "none", "student_tap": "signed"},
            r"\.form=exponential_kl: .* of the student may be",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_built(changes, message):
    with pytest.raises(ValueError, match=r"methods\.feature_distribution" + message):
        method(**changes)


def test_sizes_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="have 1 positions|one alone has no distribution"):
        method(info("s", stride=16), projector="linear")
    with pytest.raises(
        ValueError, match="form sorted_w2: student and teacher must have as many positions, got 4 and 16"
    ):
        method(info("s", stride=8), projector="linear", form="sorted_w2")
    method(info("s", stride=8), projector="conv1x1", form="sorted_w2")  # resizes
    method(projector="none", form="exponential_kl")
