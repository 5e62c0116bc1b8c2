"""From a spec and features, or a classifier, to a similarity matrix."""

import numpy as np
import pytest

from wkd_jax import config
from wkd_jax.interrelation import DEFAULTS, check, from_classifier, from_features, relevant
from wkd_jax.losses.similarity import cka


def test_defaults_are_those_of_the_config():
    assert config.DEFAULTS["interrelation"] == DEFAULTS


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ({}, {"kernel": "linear"}),
        ({"degree": 5, "bandwidth": 9.0}, {"kernel": "linear"}),
        ({"kernel": "polynomial", "degree": 3}, {"kernel": "polynomial", "degree": 3}),
        ({"kernel": "rbf", "bandwidth": 0.2}, {"kernel": "rbf", "bandwidth": 0.2}),
    ],
)
def test_cka_spec(spec, arguments):
    x = np.random.default_rng(0).normal(size=(3, 10, 4)).astype(np.float32)
    result = from_features(spec, x)
    assert isinstance(result, np.ndarray) and result.dtype == np.float32
    np.testing.assert_array_equal(result, cka(x, **arguments))


def test_cosine_of_class_means():
    x = np.random.default_rng(0).normal(size=(4, 10, 5)).astype(np.float32) + 1
    means = x.astype(np.float64).mean(axis=1)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(from_features({"kind": "cosine"}, x), unit @ unit.T, atol=1e-6)


def test_cosine_of_classifier_rows():
    kernel = np.random.default_rng(0).normal(size=(7, 3))
    unit = kernel / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(from_classifier(kernel), unit.T @ unit, atol=1e-6)
    with pytest.raises(ValueError, match="kind='classifier'"):
        from_features({"kind": "classifier"}, kernel)


def test_only_what_matters_is_relevant():
    base = {"kind": "cka", "kernel": "linear", "features": "logits", "samples_per_class": 7}
    assert relevant({"degree": 9, "bandwidth": 0.1}, 7) == base
    assert relevant({"kernel": "polynomial"}, 7) == {**base, "kernel": "polynomial", "degree": 2}
    assert relevant({"kernel": "rbf"}, 7) == {**base, "kernel": "rbf", "bandwidth": 0.4}
    assert relevant({"kind": "cosine", "kernel": "rbf"}, 7) == {
        "kind": "cosine",
        "features": "logits",
        "samples_per_class": 7,
    }
    assert relevant({"kind": "classifier", "features": "pooled"}, 0) == {"kind": "classifier"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kernal": "rbf"}, "interrelation.kernal: unknown key 'kernal': did you mean 'kernel'"),
        ({"kind": "cca"}, "unknown kind 'cca': did you mean 'cka'"),
        ({"kernel": "rbff"}, "did you mean 'rbf'"),
        ({"degree": 0}, "degree=0: must be above 0"),
        ({"samples_per_class": 1}, "samples_per_class=1: must be 0 or at least 2"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        check(spec)
