"""USKD: what the weak layer sees, terms from raw outputs, refusals."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods.uskd import USKD
from wkd_jax.types import Batch, ModelInfo, Outputs, Progress, Tap

rng = np.random.default_rng(0)
LOGITS = 2 * rng.normal(size=(4, 5))
MAP, TOKENS = rng.normal(size=(4, 2, 3, 6)), rng.normal(size=(4, 7, 6))
LABELS = np.array([0, 3, 1, 4], np.int32)


def method(middle=None, **changes):
    taps = {"stem": Tap(3, 1), "middle": middle or Tap(6, 2), "last": Tap(8, 4)}
    setup = types.SimpleNamespace(student=ModelInfo("s", 5, taps, 8, "fc/kernel"), epochs=10, global_batch_size=4)
    return USKD({**USKD.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(feature, label=LABELS, valid=(True,) * 4):
    return types.SimpleNamespace(
        batch=Batch(None, jnp.asarray(label), None, jnp.array(valid)),
        student=Outputs(jnp.asarray(LOGITS), {"middle": jnp.asarray(feature, jnp.float32)}),
        progress=Progress(0, 1, 10),
    )


@pytest.mark.parametrize(
    ("tap", "feature", "pooled"),
    [
        (Tap(6, 2), MAP, MAP.mean((1, 2))),
        (Tap(6, 2, "tokens", prefix_tokens=1), TOKENS, TOKENS[:, 0]),
        (Tap(6, 2, "tokens"), TOKENS, TOKENS.mean(1)),
    ],
    ids=["map", "class token", "tokens"],
)
def test_terms(tap, feature, pooled):
    """Of the tap before the last; every setting away from its default."""
    settings = {"weak_smoothing": 0.2, "rank_from_prob": True, "group_size": 2}
    weights = {"target_weight": 0.5, "nontarget_weight": 0.25, "weak_weight": 0.125}
    wiring, valid = method(tap, **settings, **weights), np.array([True, False, True, True])
    weak = pooled @ np.asarray(wiring.weak.kernel[...]) + np.asarray(wiring.weak.bias[...])
    expected = losses.uskd(LOGITS, weak, LABELS, where=valid, **settings)
    terms = wiring.terms(context(feature, valid=valid))
    assert list(terms) == ["target", "nontarget", "weak"]
    for term, value, weight in zip(terms.values(), expected, weights.values(), strict=True):
        np.testing.assert_allclose(term.value, value, rtol=1e-4)
        assert float(term.weight) == weight


def test_defaults_and_parameters():
    wiring = method()
    assert sum(x.size for x in jax.tree.leaves(nnx.state(wiring, nnx.Param))) == 6 * 5 + 5
    mixed = 0.6 * np.eye(5)[LABELS] + 0.4 * np.eye(5)[(LABELS + 2) % 5]
    terms = wiring.terms(context(MAP, label=mixed))
    assert [float(term.weight) for term in terms.values()] == pytest.approx([1.0, 0.1, 0.005])
    weak = MAP.mean((1, 2)) @ np.asarray(wiring.weak.kernel[...]) + np.asarray(wiring.weak.bias[...])
    for term, value in zip(terms.values(), losses.uskd(LOGITS, weak, mixed), strict=True):
        np.testing.assert_allclose(term.value, value, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tap": "midle"}, "methods.uskd.tap: unknown tap of s 'midle': did you mean 'middle'"),
        ({"weak_weight": -1.0}, "methods.uskd.weak_weight=-1.0"),
        ({"target_weight": -1.0}, "methods.uskd.target_weight=-1.0"),
        ({"weak_smoothing": 1.0}, "methods.uskd.weak_smoothing=1.0"),
        ({"group_size": 3}, "methods.uskd.group_size=3"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
