"""Zipf's label smoothing: who votes, terms from raw outputs, refusals."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.special import log_softmax

from wkd_jax import losses
from wkd_jax.methods.zipf import Zipf
from wkd_jax.models.layers import Linear
from wkd_jax.types import Batch, ModelInfo, Outputs, Progress, Tap

rng = np.random.default_rng(0)
LOGITS = 2 * rng.normal(size=(4, 5))
POSITIONS, EARLIER = rng.normal(size=(4, 2, 3, 6)), rng.normal(size=(4, 4, 6, 3))
LABELS = np.array([0, 3, 1, 4], np.int32)


class Student(nnx.Module):
    def __init__(self):
        self.fc = Linear(6, 5, rngs=nnx.Rngs(1))


STUDENT = Student()
KERNEL, BIAS = (np.asarray(x[...]) for x in (STUDENT.fc.kernel, STUDENT.fc.bias))


def method(mean_pooled=True, **changes):
    info = ModelInfo("s", 5, {"early": Tap(3, 2), "last": Tap(6, 4)}, 6, "fc/kernel", mean_pooled=mean_pooled)
    setup = types.SimpleNamespace(student=info, epochs=10, image_size=(8, 12))
    return Zipf({**Zipf.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(positions=POSITIONS, earlier=EARLIER):
    return types.SimpleNamespace(
        batch=Batch(None, jnp.asarray(LABELS), None, None),
        labels=jnp.asarray(LABELS),
        student=Outputs(
            jnp.asarray(LOGITS),
            {"early": jnp.asarray(earlier, jnp.float32)},
            positions=jnp.asarray(positions, jnp.float32),
        ),
        student_model=lambda: STUDENT,
        progress=Progress(0, 1, 10),
    )


def counted(logits):
    return np.stack([np.bincount(x.argmax(-1).ravel(), minlength=5) for x in logits])


def test_dense_votes():
    wiring = method(power=2.0, weight=0.3)
    (term,) = wiring.terms(context()).values()
    expected = losses.zipf(LOGITS, counted(POSITIONS @ KERNEL + BIAS), LABELS, power=2.0)
    np.testing.assert_allclose(term.value, expected, rtol=1e-5)
    assert float(term.weight) == pytest.approx(0.3)
    assert jax.tree.leaves(nnx.state(wiring)) == []


def test_enlarged_maps_are_torchs_bilinear():
    (term,) = method(upsample=True).terms(context()).values()
    enlarged = torch.nn.functional.interpolate(
        torch.tensor(POSITIONS).permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
    )
    votes = counted(enlarged.permute(0, 2, 3, 1).numpy() @ KERNEL + BIAS)
    assert votes.sum() == 4 * 24
    np.testing.assert_allclose(term.value, losses.zipf(LOGITS, votes, LABELS), rtol=1e-5)


def test_last_layer():
    (term,) = method(mean_pooled=False, form="last_layer").terms(context()).values()
    np.testing.assert_allclose(term.value, losses.zipf(LOGITS, LOGITS, LABELS), rtol=1e-5)


def test_auxiliary_head():
    wiring = method(auxiliary_tap="early", auxiliary_weight=0.5)
    kernel, bias = (np.asarray(x[...]) for x in (wiring.head.kernel, wiring.head.bias))
    terms = wiring.terms(context())
    votes = counted(POSITIONS @ KERNEL + BIAS) + counted(EARLIER @ kernel + bias)
    assert (votes.sum(-1) == 6 + 24).all()
    np.testing.assert_allclose(terms["kl"].value, losses.zipf(LOGITS, votes, LABELS), rtol=1e-5)
    own = -log_softmax(EARLIER.mean((1, 2)) @ kernel + bias, -1)[np.arange(4), LABELS]
    np.testing.assert_allclose(terms["auxiliary"].value, own, rtol=1e-5)
    assert float(terms["auxiliary"].weight) == 0.5


def test_only_the_auxiliary_head_learns_from_maps():
    wiring = method(auxiliary_tap="early")

    def sums(positions, earlier):
        terms = wiring.terms(context(positions, earlier))
        return jnp.stack([terms["kl"].value.sum(), terms["auxiliary"].value.sum()])

    positions, earlier = jax.jit(jax.jacrev(sums, argnums=(0, 1)))(POSITIONS, EARLIER)
    assert not np.any(positions) and not np.any(earlier[0]) and np.all(np.any(earlier[1], axis=(1, 2, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_pooled": False}, "methods.zipf.form='dense': needs a student whose classifier .* 'last_layer'"),
        ({"form": "sparse"}, "methods.zipf.form: unknown value 'sparse'"),
        ({"form": "last_layer", "upsample": True}, "methods.zipf.upsample=True: only form 'dense'"),
        ({"form": "last_layer", "auxiliary_tap": "early"}, "methods.zipf.auxiliary_tap=early: only form 'dense'"),
        ({"auxiliary_tap": "erly"}, "methods.zipf.auxiliary_tap: unknown tap of s 'erly'"),
        ({"power": -1.0}, "methods.zipf.power=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
