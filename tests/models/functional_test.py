import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.functional import Constant, Memory


class Bank(nnx.Module):
    """One variable of each kind, at depth, in a list and in a dict."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, use_bias=False, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict({"a": nnx.Param(jnp.ones(2))})
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.seen = Memory(jnp.zeros((), jnp.int32))
        self.cost = Constant(jnp.full((2, 2), 3.0))

    def __call__(self, x):
        x = self.linear(x)
        for block in self.blocks:
            x = block(x)
        self.mean.set_value(0.5 * self.mean[...] + 0.5 * jnp.mean(x, 0))
        self.seen.set_value(self.seen[...] + len(x))
        return x * self.heads["a"][...] @ self.cost[...]


@pytest.fixture(scope="module")
def bank():
    return Bank(nnx.Rngs(0))


def test_split_sorts_by_kind_and_names_by_path(bank):
    _, params, variables, constants = functional.split(bank)
    assert {*params} == {"linear/kernel", "linear/bias", "blocks/0/kernel", "blocks/1/kernel", "heads/a"}
    assert {*variables} == {"mean", "seen"}
    assert {*constants} == {"cost"}
    assert all(isinstance(value, jax.Array) for tree in (params, variables, constants) for value in tree.values())
    np.testing.assert_array_equal(params["blocks/1/kernel"], bank.blocks[1].kernel[...])


def test_merge_makes_the_module_again(bank):
    structure, params, variables, constants = functional.split(bank)
    copy = structure.merge(params, variables, constants)
    assert isinstance(copy.seen, Memory)
    assert isinstance(copy.cost, Constant)
    again = functional.split(copy)
    for tree, expected in zip(again[1:], (params, variables, constants), strict=True):
        assert {*tree} == {*expected}
        for name in expected:
            np.testing.assert_array_equal(tree[name], expected[name])
    assert again[0].graphdef == structure.graphdef


def test_merge_takes_any_partition_in_any_order(bank):
    structure, params, variables, constants = functional.split(bank)
    both = {**constants, **variables}
    first = {name: value for name, value in params.items() if name.startswith("blocks")}
    rest = {name: value for name, value in params.items() if name not in first}
    x = jnp.ones((1, 3))
    np.testing.assert_array_equal(
        structure.merge(both, rest, first)(x), structure.merge(params, variables, constants)(x)
    )


def test_carried_state_leaves_a_jitted_step(bank):
    structure, params, variables, constants = functional.split(bank)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)

    @jax.jit
    def step(params, variables):
        def loss(params):
            module = structure.merge(params, variables, constants)
            return jnp.sum(module(x)), functional.variables(module)

        return jax.value_and_grad(loss, has_aux=True)(params)

    state = variables
    for _ in range(2):
        (_, state), gradient = step(params, state)
    assert step._cache_size() == 1
    assert {*state} == {*variables}
    assert state["seen"] == 8
    y = x @ params["linear/kernel"] + params["linear/bias"]
    y = y @ params["blocks/0/kernel"] @ params["blocks/1/kernel"]
    np.testing.assert_allclose(state["mean"], 0.75 * np.mean(y, 0), rtol=1e-5, atol=1e-6)
    assert {*gradient} == {*params}
    np.testing.assert_allclose(gradient["heads/a"], np.sum(y, 0) * 6.0, rtol=1e-5, atol=1e-6)  # rows of cost add to 6
    # The module that was split, and the arrays that went in, are as they were.
    assert bank.seen[...] == variables["seen"] == 0


def test_merged_modules_share_nothing(bank):
    structure, params, variables, constants = functional.split(bank)
    one, two = (structure.merge(params, variables, constants) for _ in range(2))
    one(jnp.ones((5, 3)))
    assert (one.seen[...], two.seen[...]) == (5, 0)


def test_abstract_modules_split_into_shapes():
    _, params, _, _ = functional.split(nnx.eval_shape(lambda: Bank(nnx.Rngs(0))))
    assert params["linear/kernel"] == jax.ShapeDtypeStruct((3, 2), jnp.float32)


def test_stored_keys_are_refused():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(2))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(
        ValueError, match="neither Param, BatchStat, Memory nor Constant: dropout/rngs/count, dropout/rngs/key"
    ):
        functional.split(Noisy(nnx.Rngs(0)))


def test_bare_arrays_and_shared_names_are_refused():
    class Bare(nnx.Module):
        def __init__(self):
            self.table = jnp.ones(2)

    with pytest.raises(ValueError, match="neither Param, BatchStat, Memory nor Constant: table"):
        functional.split(Bare())

    class Twice(nnx.Module):
        def __init__(self):
            self.d = nnx.Dict({"a/b": nnx.Param(jnp.ones(2)), "a": nnx.Dict({"b": nnx.Param(jnp.zeros(2))})})

    with pytest.raises(ValueError, match="two arrays are called 'd/a/b'"):
        functional.split(Twice())


def test_merge_names_what_does_not_fit():
    structure, params, variables, constants = functional.split(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    params["other"] = params.pop("bias")
    with pytest.raises(ValueError, match=r"missing \['bias'\], too many \['other'\]"):
        structure.merge(params, variables, constants)


def test_under():
    tree = {"student/fc/kernel": 1, "student2/fc/kernel": 2, "methods/kd/t": 3}
    assert functional.under(tree, "student") == functional.under(tree, "student/") == {"fc/kernel": 1}
    assert functional.under(tree, "methods/kd") == {"t": 3}
    assert functional.under(tree, "none") == {}


def test_remat_keeps_less_and_changes_nothing():
    """What the backward pass is given: the parts' results alone, instead of everything inside them."""
    image = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    kept, results = [], []
    for remat in (False, True):
        model = registry.get("models", "resnet20")(10, rngs=nnx.Rngs(0))
        model.remat = remat
        structure, params, variables, _ = functional.split(model)

        def loss(params, structure=structure, variables=variables):
            module = structure.merge(params, variables)
            return jnp.sum(jnp.square(module(image, train=True).logits)), functional.variables(module)

        backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params, has_aux=True)[1], params)
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward)))
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    weights = sum(leaf.nbytes for leaf in params.values())
    assert kept[1] - weights < 0.4 * (kept[0] - weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *results)
