"""CRD over steps against NumPy that replays them: negatives, constants, memories, and examples that do not count."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.methods.crd import CRD
from wkd_jax.models import functional
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup

LABELS = np.array([2, 0, 1, 0, 2, 0, 1, 2, 2, 0], np.int32)
N, B, K, D = len(LABELS), 4, 6, 8
FEATURES = [np.random.default_rng(i).normal(size=(B, width)).astype(np.float32) for i, width in ((0, 3), (1, 5))]


def method(labels=LABELS, **changes):
    infos = (ModelInfo(name, 4, {}, width, "fc/kernel") for name, width in (("s", 3), ("t", 5)))
    setup = Setup(*infos, (8, 8), B, 10, labels=lambda: labels, similarity=None)
    return CRD({**CRD.DEFAULTS, "embedding": D, "num_negatives": K, **changes}, setup, rngs=nnx.Rngs(0))


STRUCTURE, PARAMS, START, CONSTANTS = functional.split(method())


@jax.jit
def run(params, variables, index, valid, key):
    """One step as the train step makes it: (terms, gradients of their sum, carried state, the negatives it drew)."""

    def loss(params):
        wiring = STRUCTURE.merge(params, variables, CONSTANTS)
        context = types.SimpleNamespace(
            student=Outputs(None, pooled=jnp.asarray(FEATURES[0])),
            teacher=Outputs(None, pooled=jnp.asarray(FEATURES[1])),
            batch=types.SimpleNamespace(index=index, valid=valid),
            progress=Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10)),
            key=key,
        )
        terms = wiring.terms(context)
        total = sum(jnp.sum(jnp.where(valid, term.value, 0)) for term in terms.values())
        return total, (terms, functional.variables(wiring), wiring.negatives(key, index))

    gradients, (terms, variables, negatives) = jax.grad(loss, has_aux=True)(params)
    return terms, gradients, variables, negatives


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def replay(variables, index, valid, negatives):
    """(value of each term, carried state) from the paper's equations."""
    embeddings = {
        side: unit(x @ np.asarray(PARAMS[f"{side}_embedding/kernel"]) + np.asarray(PARAMS[f"{side}_embedding/bias"]))
        for side, x in zip(("student", "teacher"), FEATURES, strict=True)
    }
    rows = np.concatenate([index[:, None], negatives], axis=1)
    values, new = {}, {name: np.array(value) for name, value in variables.items()}
    for side, other in (("student", "teacher"), ("teacher", "student")):
        bank = np.asarray(variables[f"{other}_bank"])
        o = np.exp(np.einsum("bkd,bd->bk", bank[rows], embeddings[side]) / 0.07)
        if variables[f"{side}_constant"] == 0:
            new[f"{side}_constant"] = o[valid].mean() * N
        o, c = o / new[f"{side}_constant"], K / N
        values[side] = -np.log(o[:, 0] / (o[:, 0] + c)) - np.log(c / (o[:, 1:] + c)).sum(1)
        for i in np.flatnonzero(valid):  # the last one of a row decides
            old = variables[f"{side}_bank"][index[i]]
            new[f"{side}_bank"][index[i]] = unit(0.5 * old + 0.5 * embeddings[side][i])
    return values, new


def test_three_steps():
    """The second has an index twice and an example that does not count."""
    variables, negatives = START, []
    batches = [([0, 1, 2, 3], [1, 1, 1, 1]), ([4, 5, 4, 6], [1, 1, 1, 0]), ([0, 7, 8, 9], [1, 1, 1, 1])]
    for number, (index, valid) in enumerate(batches):
        index, valid = np.array(index), np.array(valid, bool)
        terms, gradients, after, drawn = run(PARAMS, variables, index, valid, jax.random.key(number))
        values, expected = replay(variables, index, valid, np.asarray(drawn))
        for side, value in values.items():
            np.testing.assert_allclose(terms[side].value, value, rtol=2e-4)
            assert float(terms[side].weight) == pytest.approx(0.8)
        assert after.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(after[name], value, rtol=1e-4, err_msg=name)
        assert all(np.any(gradient) for gradient in gradients.values())
        variables, negatives = after, [*negatives, np.asarray(drawn)]
    assert np.any(negatives[0] != negatives[2])


def test_a_batch_in_which_nothing_counts_changes_nothing():
    index, valid = np.arange(B), np.zeros(B, bool)
    _, gradients, after, _ = run(PARAMS, START, index, valid, jax.random.key(0))
    for name, value in START.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


def test_negatives_are_uniform_over_the_other_classes():
    wiring = method(num_negatives=6000)
    index = np.array([0, 1, 2, 5])
    for row, drawn in zip(index, np.asarray(wiring.negatives(jax.random.key(1), index)), strict=True):
        others = np.flatnonzero(LABELS[row] != LABELS)
        counts = np.bincount(drawn, minlength=N)
        assert set(np.flatnonzero(counts)) == set(others)
        expected = 6000 / len(others)
        assert np.abs(counts[others] - expected).max() < 5 * np.sqrt(expected)


def test_memories():
    assert {name: value.shape for name, value in START.items()} == {
        "student_bank": (N, D),
        "teacher_bank": (N, D),
        "student_constant": (),
        "teacher_constant": (),
    }
    bound = np.sqrt(3 / D)
    for name in ("student_bank", "teacher_bank"):
        bank = np.asarray(START[name])
        assert 0.8 * bound < np.abs(bank).max() <= bound and bank.min() < 0
    assert np.any(START["student_bank"] != START["teacher_bank"])
    abstract = nnx.eval_shape(lambda: method(embedding=128))  # how a run is checked before it starts
    assert sum(x.size for x in jax.tree.leaves(nnx.state(abstract, nnx.Param))) == 128 * (3 + 5 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 0}, "methods.crd.num_negatives=0: must be above 0"),
        ({"temperature": 0.0}, "methods.crd.temperature=0.0: must be above 0"),
        ({"momentum": 1.0}, "methods.crd.momentum=1.0: must be from 0 to below 1"),
        ({"weight": -1.0}, "methods.crd.weight=-1.0"),
        ({"labels": np.ones(5, np.int32)}, "methods.crd: all training images are of one class"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
