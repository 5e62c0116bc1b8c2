"""CC in both forms and RKD against float64 NumPy from the definitions, with masks, groups and degenerate batches.

All batches are padded to one shape, so that each loss is compiled once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.losses.relational import cc_kernel, cc_neighbours, rkd_angle, rkd_distance, unit_norm

LOSSES = {
    "neighbours": cc_neighbours,
    "paper": cc_kernel,
    "root": functools.partial(cc_kernel, form="root"),
    "distance": rkd_distance,
    "angle": rkd_angle,
}
B, D = 6, 5
ALL = np.ones(B, bool)
DRAWN = np.random.default_rng(3).normal(size=(2, B, D))


def _compiled(loss):
    return jax.jit(jax.value_and_grad(lambda s, t, w: loss(s, t, where=w), argnums=(0, 1)))


COMPILED = {name: _compiled(loss) for name, loss in LOSSES.items()}


def evaluate(name, student, teacher, where=ALL):
    """Value and both gradients, in float64, of a batch padded with examples that do not count and empty features."""
    rows, padded = len(student), [np.full((B, D), 7.0) for _ in range(2)]
    for whole, x in zip(padded, (student, teacher), strict=True):
        whole[:rows] = 0
        whole[:rows, : x.shape[1]] = x
    where = np.concatenate([where[:rows], np.zeros(B - rows, bool)])
    with jax.enable_x64(True):
        value, gradients = COMPILED[name](*padded, where)
    return float(value), *(np.asarray(g)[:rows, : student.shape[1]] for g in gradients)


def smooth_l1(x):
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def oracle_neighbours(s, t):
    d = np.abs(s - t)
    return sum(d[i] @ d[i + 1] for i in range(len(d) - 1)) / (len(d) - 1)


def oracle_kernel(s, t):
    def kernel(x, y):
        return math.exp(-0.8) * sum(0.8**p / math.factorial(p) * (x @ y) ** p for p in range(3))

    each = range(len(s))
    return sum((kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i in each for j in each) / len(s) ** 2


def oracle_root(s, t):
    return math.sqrt(oracle_kernel(s, t)) / len(s)


def oracle_distance(s, t):
    def relative(x):
        d = np.array([[max(np.linalg.norm(a - b), 1e-6) for b in x] for a in x])
        np.fill_diagonal(d, 0)
        return d / d[d > 0].mean()

    return smooth_l1(relative(s) - relative(t)).mean()


def oracle_angle(s, t):
    def angles(x):
        v = x[None] - x[:, None]
        u = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
        return np.array([[[u[i, j] @ u[i, k] for k in range(len(x))] for j in range(len(x))] for i in range(len(x))])

    return smooth_l1(angles(s) - angles(t)).mean()


ORACLES = {
    "neighbours": oracle_neighbours,
    "paper": oracle_kernel,
    "root": oracle_root,
    "distance": oracle_distance,
    "angle": oracle_angle,
}


def test_goldens():
    student, teacher, wide = (
        wave(step * np.arange(np.prod(shape))).reshape(shape)
        for wave, step, shape in ((np.sin, 0.37, (4, 3)), (np.cos, 0.23, (4, 3)), (np.cos, 0.23, (4, 5)))
    )
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    np.testing.assert_allclose(evaluate("neighbours", student, teacher)[0], 0.429885, atol=6e-7)
    np.testing.assert_allclose(evaluate("paper", *unit)[0], 0.043272, atol=6e-7)
    np.testing.assert_allclose(evaluate("root", *unit)[0], 0.052005, atol=6e-7)
    distance, angle = (evaluate(name, student, wide)[0] for name in ("distance", "angle"))
    np.testing.assert_allclose([distance, angle], [0.165629, 0.162381], atol=6e-7)
    np.testing.assert_allclose(25 * distance + 50 * angle, 12.259796, atol=1e-6)


def differences(function, x, step=1e-6):
    """Gradient by central differences."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[at] = step
        gradient[at] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name):
    (student, teacher), oracle = DRAWN, ORACLES[name]
    value, gradient, teacher_gradient = evaluate(name, student, teacher)
    np.testing.assert_allclose(value, oracle(student, teacher), rtol=1e-12)
    np.testing.assert_allclose(gradient, differences(lambda s: oracle(s, teacher), student), rtol=1e-5, atol=1e-8)
    if name in ("neighbours", "paper", "root"):  # the teacher's embedding is trained
        expected = differences(lambda t: oracle(student, t), teacher)
        np.testing.assert_allclose(teacher_gradient, expected, rtol=1e-5, atol=1e-8)
    else:
        np.testing.assert_array_equal(teacher_gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_is_dropped(name):
    where = np.array([True, False, True, True, False, True])
    student, teacher = DRAWN
    spoilt = np.where(where[:, None], student, np.nan)  # nothing of a masked example is looked at
    value, *gradients = evaluate(name, spoilt, teacher, where)
    expected = evaluate(name, student[where], teacher[where])
    np.testing.assert_allclose(value, ORACLES[name](student[where], teacher[where]), rtol=1e-12)
    for gradient, dropped in zip(gradients, expected[1:], strict=True):
        np.testing.assert_allclose(gradient[where], dropped, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(gradient[~where], 0)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_the_batch(name):
    student, teacher = DRAWN
    order = np.array([3, 0, 5, 1, 4, 2])
    same = np.isclose(evaluate(name, student[order], teacher[order])[0], evaluate(name, student, teacher)[0], rtol=1e-9)
    assert same == (name != "neighbours")  # the one that pairs neighbours


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches_are_finite(name):
    x, nothing = DRAWN[0], np.zeros(B, bool)
    twins = np.concatenate([x[:2], x[:2], x[:2]])
    equal, none, one = (x, x, ALL), (x, x + 1, nothing), (x[:1], x[:1] + 1, ALL)
    for case in (equal, none, one, (0 * x, x, ALL), (twins, x, ALL), (0 * x, 0 * x, ALL)):
        assert all(np.isfinite(result).all() for result in evaluate(name, *case)), case
    for case in (equal, none, *([one] if name in ("neighbours", "distance", "angle") else [])):
        assert abs(evaluate(name, *case)[0]) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    traced = jax.make_jaxpr(LOSSES[name])(*(jnp.asarray(x, jnp.bfloat16) for x in DRAWN))
    takers = [e.primitive.name for e in traced.eqns if any(x.aval.dtype == jnp.bfloat16 for x in e.invars)]
    assert set(takers) - {"stop_gradient"} == {"convert_element_type"} and len(takers) >= 2
    (value,) = traced.out_avals
    assert (value.dtype, value.shape) == (jnp.float32, ())


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_groups(name):
    student, teacher = DRAWN
    parts = [evaluate(name, student[i : i + 3], teacher[i : i + 3])[0] for i in (0, 3)]
    grouped = jax.jit(lambda w: LOSSES[name](student, teacher, group_size=3, where=w))
    np.testing.assert_allclose(grouped(ALL), np.mean(parts), rtol=1e-5)
    # Where the second group has nothing to say, the first speaks for the batch.
    np.testing.assert_allclose(grouped(np.arange(B) < 3), parts[0], rtol=1e-5)
    for size in (0, 4):
        with pytest.raises(ValueError, match=f"group_size={size}: must be at least 1 and divide the 6"):
            LOSSES[name](student, teacher, group_size=size)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_rkd_ignores_scale_and_place(name):
    student, teacher = DRAWN
    moved = evaluate(name, 3 * student + 1, teacher)[0]
    np.testing.assert_allclose(moved, evaluate(name, student, teacher)[0], rtol=1e-9)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_memory_of_rkd(loss):
    """No array of the value or the gradient has more than B^3 entries: neither all angles twice nor B^2 features."""

    def arrays(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval for variable in equation.outvars)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from arrays(getattr(inner, "jaxpr", inner))

    x = jax.ShapeDtypeStruct((16, 100), jnp.float32)
    sizes = [math.prod(aval.shape) for aval in arrays(jax.make_jaxpr(jax.grad(loss))(x, x).jaxpr)]
    assert 16 * 100 <= max(sizes) <= 16**3 < 16 * 16 * 100


def test_unit_norm():
    x = np.random.default_rng(4).normal(size=(2, 3, 4))
    expected = x / np.sqrt(np.square(x).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(unit_norm(x, axis=(1, 2)), expected, rtol=1e-5)
    derivative = jax.jit(jax.value_and_grad(lambda z: unit_norm(z)[..., 0].sum()))
    with jax.enable_x64(True):
        value, gradient = derivative(x)
        np.testing.assert_array_equal(derivative(0 * x)[1], 0)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(value, (x / norm)[..., 0].sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.eye(4)[0] / norm - x * x[..., :1] / norm**3, rtol=1e-9)


def test_errors():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"one shape \[B, D\], got \(4, 3\) and \(4, 2\)"):
        cc_neighbours(x, x[:, :2])
    for loss in (cc_kernel, rkd_distance, rkd_angle):
        with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 3\)"):
            loss(x, x[:3])
    with pytest.raises(ValueError, match=r"where must be bool of shape .*, got bool \(3,\)"):
        cc_kernel(x, x, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="form='sum': must be 'paper' or 'root'"):
        cc_kernel(x, x, form="sum")
    for settings in ({"gamma": 0.0}, {"degree": 0}):
        with pytest.raises(ValueError, match="gamma must be above 0 and degree at least 1"):
            cc_kernel(x, x, **settings)
