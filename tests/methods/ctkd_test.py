"""The method `ctkd`: both forms with both losses, the curriculum, and what trains the temperature."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.types import Outputs, Progress

C = 5
rng = np.random.default_rng(0)
STUDENT, TEACHER = 2 * rng.normal(size=(2, 4, C)).astype(np.float32)
LABELS = np.array([0, 3, 1, 4], np.int32)


def method(**changes):
    factory = registry.get("methods", "ctkd")
    setup = types.SimpleNamespace(epochs=40, student=types.SimpleNamespace(num_classes=C))
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def differentiated(wiring, *, epochs=(1,), valid=None):
    """At each epoch: the terms, and gradients of their weighted sum by the method's parameters and the student."""
    structure, params, *rest = functional.split(wiring)

    @jax.jit
    def run(params, student, epoch):
        def total(params, student):
            outputs = {"student": Outputs(student, valid=valid), "teacher": Outputs(jnp.asarray(TEACHER))}
            progress = Progress(jnp.int32(0), epoch, jnp.int32(40))
            context = types.SimpleNamespace(**outputs, labels=LABELS, progress=progress)
            terms = structure.merge(params, *rest).terms(context)
            return sum(t.weight * t.value.mean() for t in terms.values() if t.weight is not None), terms

        return jax.grad(total, (0, 1), has_aux=True)(params, student)

    return params, [run(params, STUDENT, jnp.int32(epoch)) for epoch in epochs]


def kl(p, q):
    return np.sum(p * np.log(p / q), -1)


def test_global():
    """g is 1, T 15.62; the gradient of g is reversed little by little, that of the student is not."""
    params, runs = differentiated(method(weight=0.9, curriculum_epochs=10), epochs=(1, 5, 10, 30))
    assert params == {"parameter": 1.0}
    temperature = 1 + 20 / (1 + np.exp(-1.0))
    q, p = (softmax(x / temperature, -1) for x in (STUDENT, TEACHER))
    reversed_by = []
    for (by_params, by_student), terms in runs:
        assert terms.keys() == {"kl", "temperature"}
        np.testing.assert_allclose(terms["kl"].value, temperature**2 * kl(p, q), rtol=1e-3)
        np.testing.assert_allclose(terms["temperature"].value, temperature, rtol=1e-6)
        assert terms["temperature"].weight is None and float(terms["kl"].weight) == pytest.approx(0.9)
        np.testing.assert_allclose(by_student, 0.9 * temperature * (q - p) / 4, atol=1e-5)
        reversed_by.append(float(by_params["parameter"]))
    ratios = np.array(reversed_by) / reversed_by[-1]
    np.testing.assert_allclose(ratios, [0.024472, 0.5, 1, 1], rtol=1e-3)
    step = 1e-4  # the true slope, by float64 differences
    ends = []
    for g in (1 + step, 1 - step):
        t = 1 + 20 / (1 + np.exp(-g))
        wide = [softmax(x.astype(np.float64) / t, -1) for x in (TEACHER, STUDENT)]
        ends.append(0.9 * t**2 * kl(*wide).mean())
    np.testing.assert_allclose(reversed_by[-1], -(ends[0] - ends[1]) / (2 * step), atol=1e-4)


def test_instance():
    """A temperature for each example, from a network that is trained; the student is not reached through it."""
    valid = np.array([True, True, False, True])
    wiring = method(form="instance", hidden=7, loss="dkd", alpha=2.0, beta=6.0)
    params, [((by_params, by_student), terms)] = differentiated(wiring, epochs=(5,), valid=valid)
    assert {name: value.shape for name, value in params.items()} == {
        "hidden/kernel": (2 * C, 7),
        "hidden/bias": (7,),
        "output/kernel": (7, 1),
        "output/bias": (1,),
    }
    hidden = np.maximum(np.concatenate([STUDENT, TEACHER], -1) @ params["hidden/kernel"] + params["hidden/bias"], 0)
    g = (hidden @ params["output/kernel"] + params["output/bias"])[:, 0]
    temperature = 1 + 20 / (1 + np.exp(-g))
    np.testing.assert_allclose(terms["temperature"].value, temperature, rtol=1e-5)
    assert terms.keys() == {"target", "nontarget", "temperature"}
    q, p = (softmax(x / temperature[:, None], -1) for x in (STUDENT, TEACHER))
    p_y, q_y = (x[np.arange(4), LABELS] for x in (p, q))
    target = kl(np.stack([p_y, 1 - p_y], -1), np.stack([q_y, 1 - q_y], -1))
    np.testing.assert_allclose(terms["target"].value, temperature**2 * target, rtol=1e-3, atol=1e-3)
    nontarget = temperature**2 * (kl(p, q) - target) / (1 - p_y)
    np.testing.assert_allclose(terms["nontarget"].value, nontarget, rtol=1e-3, atol=1e-3)
    assert (terms["target"].weight, terms["nontarget"].weight) == pytest.approx((2.0, 6.0))
    assert all((term.where == valid).all() for term in terms.values())
    assert np.abs(by_params["hidden/kernel"]).max() > 0
    np.testing.assert_allclose(by_student.sum(-1), 0, atol=1e-4)  # as of any function of softmaxes


def test_hidden_units_are_as_many_as_classes_by_default():
    wiring = nnx.eval_shape(lambda: method(form="instance"))
    assert wiring.hidden.kernel.shape == (2 * C, C)


def test_instance_with_kd():
    wiring = method(form="instance", hidden=7)
    _, [(_, terms)] = differentiated(wiring)
    temperature = np.asarray(terms["temperature"].value, np.float64)
    q, p = (softmax(x / temperature[:, None], -1) for x in (STUDENT, TEACHER))
    np.testing.assert_allclose(terms["kl"].value, temperature**2 * kl(p + 1e-7, q), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "local"}, "methods.ctkd.form: unknown value 'local'"),
        ({"loss": "nkd"}, "methods.ctkd.loss: unknown value 'nkd'"),
        ({"hidden": -1}, "methods.ctkd.hidden=-1"),
        ({"beta": -1.0}, "methods.ctkd.beta=-1.0"),
        ({"curriculum_epochs": 0}, "methods.ctkd.curriculum_epochs=0: must be above 0"),
        ({"weight": -1.0}, "methods.ctkd.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
