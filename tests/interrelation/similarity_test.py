"""From a spec and features, or a classifier, to a similarity matrix."""

import numpy as np
import pytest

from wkd_jax import config, losses
from wkd_jax.interrelation import from_classifier, from_features, relevant, rescaled, uses_features
from wkd_jax.losses.similarity import cka

LOGITS = np.random.default_rng(3).normal(size=(5, 10, 5)).astype(np.float32) + np.arange(5)


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


@pytest.mark.parametrize(
    ("spec", "of"),
    [
        ({"kind": "cosine", "centred": True}, lambda x: losses.cosine_similarity(x.mean(axis=1), centred=True)),
        ({"kind": "gaussian"}, losses.gaussian_similarity),
        ({"kind": "confusion"}, losses.confusion_similarity),
        ({"kind": "confusion", "temperature": 3}, lambda x: losses.confusion_similarity(x, temperature=3.0)),
        ({"kind": "logit_correlation"}, losses.logit_correlation),
    ],
)
def test_kinds_beside_those_of_the_paper(spec, of):
    result = from_features(spec, LOGITS)
    assert isinstance(result, np.ndarray) and result.dtype == np.float32
    np.testing.assert_allclose(result, of(LOGITS), atol=1e-6)


def test_classes_of_one_group_are_the_most_alike():
    """20 classes, a group of 4 with means that share a part. All kinds see it, but not the one that pairs images."""
    rng = np.random.default_rng(0)
    group = np.arange(20) // 4
    means = 2 * rng.normal(size=(5, 30))[group] + rng.normal(size=(20, 30))
    x = (means[:, None] + rng.normal(size=(20, 40, 30))).astype(np.float32)
    logits = (x @ means.T - np.sum(means**2, axis=1) / 2).astype(np.float32)

    def agreement(similarity):
        return np.mean(group[np.argmax(similarity - 9 * np.eye(20), axis=1)] == group)

    for spec in ({"kind": "cosine", "centred": True}, {"kind": "gaussian"}):
        assert agreement(from_features(spec, x)) == 1
    for spec in ({"kind": "confusion", "temperature": 10.0}, {"kind": "logit_correlation"}):
        assert agreement(from_features(spec, logits)) == 1
    assert agreement(from_features({}, x)) < 0.5
    assert agreement(from_classifier(means.T, centred=True)) == 1


def test_cosine_of_classifier_rows():
    kernel = np.random.default_rng(0).normal(size=(7, 3))
    unit = kernel / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(from_classifier(kernel), unit.T @ unit, atol=1e-6)
    unit = kernel - kernel.mean(axis=1, keepdims=True)
    unit = unit / np.linalg.norm(unit, axis=0)
    np.testing.assert_allclose(from_classifier(kernel, centred=True), unit.T @ unit, atol=1e-6)
    for kind in ("classifier", "uniform"):
        assert not uses_features({"kind": kind})
        with pytest.raises(ValueError, match=f"kind='{kind}' is not made from features"):
            from_features({"kind": kind}, LOGITS)


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
    assert relevant({"kind": "cosine", "centred": True}, 7)["centred"] is True
    assert relevant({"kind": "classifier", "features": "pooled"}, 0) == {"kind": "classifier"}
    assert relevant({"kind": "classifier", "centred": True}, 0) == {"kind": "classifier", "centred": True}
    assert relevant({"kind": "uniform", "centred": True}, 0) == {"kind": "uniform"}
    sampled = {"features": "logits", "samples_per_class": 7}
    assert relevant({"kind": "confusion"}, 7) == {"kind": "confusion", "temperature": 1.0, **sampled}
    for kind in ("gaussian", "logit_correlation"):
        assert relevant({"kind": kind, "temperature": 2.0, "centred": True}, 7) == {"kind": kind, **sampled}
    for unscaled in ({"mean_distance": 0.5}, {"groups": ("a", "b")}):
        assert relevant(unscaled, 7) == base


def test_mean_distance():
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, (6, 6))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1)
    pairs = ~np.eye(6, dtype=bool)
    for mean in (0.1, 1.0, 7.0):
        result = rescaled(similarity.astype(np.float32), mean)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(np.diag(result), 1)
        np.testing.assert_allclose((1 - result[pairs]).mean(), mean, rtol=1e-6)
        factor = mean / (1 - similarity[pairs]).mean()
        np.testing.assert_allclose(1 - result, factor * (1 - similarity), rtol=1e-5, atol=1e-7)
    assert rescaled(similarity, 0.0) is similarity
    above = np.array([[1, 1 + 1e-6, 0.5], [1 + 1e-6, 1, 0.5], [0.5, 0.5, 1]])
    np.testing.assert_allclose(rescaled(above, 0.5), [[1, 1, 0.25], [1, 1, 0.25], [0.25, 0.25, 1]])
    for alike in (np.ones((3, 3)), np.ones((1, 1)), 1 - 1e-7 * (1 - np.eye(3))):
        with pytest.raises(ValueError, match=r"interrelation.mean_distance=0.5: all classes are alike"):
            rescaled(alike, 0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kernal": "rbf"}, "interrelation.kernal: unknown key 'kernal': did you mean 'kernel'"),
        ({"kind": "cca"}, "interrelation.kind='cca': must be one of cka, cosine, .*, uniform"),
        ({"kernel": "rbff"}, "interrelation.kernel='rbff': must be linear, polynomial or rbf"),
        ({"temperature": 0}, "interrelation.temperature=0.0: must be above 0"),
        ({"mean_distance": -1.0}, "interrelation.mean_distance=-1.0: must be 0 or more"),
        ({"groups": (1, 2)}, "interrelation.groups=.*a name for each class"),
        ({"kind": "confusion", "features": "pooled"}, "features='pooled': kind='confusion' is of the teacher's pred"),
        ({"kind": "logit_correlation", "features": "stage1"}, "features='stage1': .*set it to 'logits'"),
        ({"degree": 0}, "degree=0: must be above 0"),
        ({"samples_per_class": 1}, "samples_per_class=1: must be 0 or at least 2"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        config.interrelation(spec)
        relevant(spec, 7)
