"""Distances between distributions of features: goldens, float64 oracles of the formulas, gradients, degenerate maps.

Each form is compiled once, on one batch that has a row for every case.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import linear_sum_assignment

from wkd_jax import losses

FORMS = {
    "gaussian_w2_full": lambda s, t: sum(losses.feature_gaussian_w2_full(s, t)),
    "gaussian_kl": losses.feature_gaussian_kl,
    "gaussian_kl_symmetric": functools.partial(losses.feature_gaussian_kl, symmetric=True),
    "gaussian_kl_full": functools.partial(losses.feature_gaussian_kl_full, ridge=0.1),
    "gaussian_kl_full_symmetric": functools.partial(losses.feature_gaussian_kl_full, ridge=0.1, symmetric=True),
    "laplace_kl": losses.feature_laplace_kl,
    "exponential_kl": losses.feature_exponential_kl,
    "sinkhorn": functools.partial(losses.feature_sinkhorn, num_iters=10),
    "histogram_w1": functools.partial(losses.feature_histogram_w1, bins=5),
    "sorted_w2": losses.feature_sorted_w2,
}
every_form = pytest.mark.parametrize("form", FORMS)


def waves():
    """The student's and teacher's map [1, 9, 3] of the goldens: sin(0.37 k) and cos(0.23 k), k along positions."""
    k = np.arange(27.0).reshape(3, 9).T[None]
    return np.sin(0.37 * k), np.cos(0.23 * k)


def centred(values):
    """Each value moved to the centre of its bin, of 8 on [-1, 1]: where triangular bins are hard."""
    return (jnp.clip(jnp.floor((values + 1) * 4), 0, 7) + 0.5) / 4 - 1


GOLDENS = {
    "gaussian_w2_full, means": 0.145380,
    "gaussian_w2_full, covariances": 0.379671,
    "gaussian_kl_full": 10.056160,
    "gaussian_kl_full, reversed": 11.032146,
    "gaussian_kl": 1.084264,
    "gaussian_kl, reversed": 2.159710,
    "gaussian_kl, symmetric": 3.243974,
    "laplace_kl": 1.006449,
    "exponential_kl": 3.435400,
    "sorted_w2": 0.210487,
    "sinkhorn": 0.379689,
    "histogram_w1": 0.638889,
    "wkd_feature, covariances": 0.055882,
}


def test_goldens():
    def run(s, t):
        return [
            *losses.feature_gaussian_w2_full(s, t),
            losses.feature_gaussian_kl_full(s, t),
            losses.feature_gaussian_kl_full(t, s),
            losses.feature_gaussian_kl(s, t),
            losses.feature_gaussian_kl(t, s),
            losses.feature_gaussian_kl(s, t, symmetric=True),
            losses.feature_laplace_kl(s, t),
            losses.feature_exponential_kl(jnp.maximum(s, 0), jnp.maximum(t, 0)),
            losses.feature_sorted_w2(s, t),
            losses.feature_sinkhorn(s[:, :6], t[:, :6]),
            losses.feature_histogram_w1(centred(s), centred(t), bins=8, limits=(-1, 1)),
            losses.wkd_feature(s, t, ddof=0, eps=0.0)[1],
        ], losses.feature_sinkhorn(s[:, :6], t[:, :6], epsilon=0.0125, num_iters=1000, stabilizer=0.0)

    student, teacher = waves()
    values, nearly_unregularized = jax.jit(run)(student, teacher)
    for (name, expected), value in zip(GOLDENS.items(), values, strict=True):
        np.testing.assert_allclose(value, [expected], rtol=3e-6, atol=6e-7, err_msg=name)
    # 0.946025 is the cost of the best assignment of these positions, to which the plan tends.
    cost = np.square(student[0, :6, None] - teacher[0, :6]).sum(-1)
    assert cost[linear_sum_assignment(cost)].mean() == pytest.approx(0.946025, abs=1e-6)
    np.testing.assert_allclose(cost.max() * nearly_unregularized, 0.946025, rtol=2e-2)


# --- the batch: rows of students [4, 6] and teachers, which have each position twice or, where none is doubled, others

ROWS = [
    "drawn",
    "other",
    "near",
    "offset",
    "shuffled",
    "equal",
    "equal constants",
    "zero student",
    "zero teacher",
    "zero",
]
MINIMA = ["equal", "equal constants", "zero"]


def rows(form):
    """Student [10, 4, 6] and teacher [10, 8, 6] (4 of sorted_w2), non-negative float64 that float32 holds exactly."""
    rng = np.random.default_rng(0)
    twice = 1 if form == "sorted_w2" else 2
    x, y = (np.round(1024 * np.maximum(rng.normal(0.3, 1, (2, n, 6)), 0)) / 1024 + 1 / 64 for n in (4, 4 * twice))
    repeated, constant = np.concatenate([x[0]] * twice), np.full_like(x[0], 3.0)
    near = repeated + np.round(rng.uniform(0, 8, repeated.shape)) / 1024
    none, nothing = np.zeros_like(x[0]), np.zeros_like(y[0])
    pairs = {
        "drawn": (x[0], y[0]),
        "other": (x[1], y[1]),
        "near": (x[0], near),
        "offset": (x[0] + 512, y[0] + 512),
        "shuffled": (x[0][[2, 0, 3, 1]], y[0]),
        "equal": (x[0], repeated),
        "equal constants": (constant, np.concatenate([constant] * twice)),
        "zero student": (none, y[0]),
        "zero teacher": (x[0], nothing),
        "zero": (none, nothing),
    }
    assert list(pairs) == ROWS
    return [np.stack(side) for side in zip(*pairs.values(), strict=True)]


@functools.cache
def results(form):
    """Row -> (value, gradient of the student's feature, gradient of the teacher's), float32."""

    def run(student, teacher):
        def total(student, teacher):
            value = FORMS[form](student, teacher)
            return value.sum(), value

        (_, value), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(student, teacher)
        return value, *gradients

    student, teacher = (x.astype(np.float32) for x in rows(form))
    values = jax.device_get(jax.jit(run)(student, teacher))
    return dict(zip(ROWS, zip(*values, strict=True), strict=True))


def normal_kl(p, q):
    (mean_p, cov_p), (mean_q, cov_q) = p, q
    difference, inverse = mean_q - mean_p, np.linalg.inv(cov_q)
    log_det = np.linalg.slogdet(cov_q)[1] - np.linalg.slogdet(cov_p)[1]
    return (np.trace(inverse @ cov_p) + difference @ inverse @ difference - len(mean_p) + log_det) / 2


def ridged(x):
    return x.mean(0), np.cov(x, rowvar=False, ddof=0) + 0.1 * np.eye(x.shape[1])


def diagonal(x):
    return x.mean(0), np.diag(x.var(0) + 1e-5)


def symmetric(fitted, s, t):
    return normal_kl(fitted(t), fitted(s)) + normal_kl(fitted(s), fitted(t))


def w2_full(s, t):
    x, y = ((z - z.mean(0)) / np.sqrt(len(z)) for z in (s, t))
    overlap = np.linalg.norm(x @ y.T, "nuc")
    return np.square(s.mean(0) - t.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * overlap


def laplace(s, t):
    (loc_s, b_s), (loc_t, b_t) = ((x.mean(0), np.abs(x - x.mean(0)).mean(0) + 1e-5) for x in (s, t))
    d = np.abs(loc_s - loc_t)
    return (np.log(b_s / b_t) + (b_t * np.exp(-d / b_t) + d) / b_s - 1).sum()


def exponential(s, t):
    s, t = s.mean(0) + 1e-5, t.mean(0) + 1e-5
    return (np.log(s / t) + t / s - 1).sum()


def entropic(s, t, fixed):
    """Of `fixed`, the student at which derivatives are taken, is the largest cost, a constant."""
    cost, largest = (np.square(x[:, None] - t).sum(-1) for x in (s, fixed))
    cost /= largest.max()
    kernel, u = np.exp(-cost / 0.05), np.full(len(s), 1 / len(s))
    for _ in range(10):
        v = 1 / len(t) / (kernel.T @ u + 1e-8)
        u = 1 / len(s) / (kernel @ v + 1e-8)
    return (u[:, None] * kernel * v * cost).sum()


def binned(s, t, fixed):
    total = 0.0
    for x, y, z in zip(s.T, t.T, fixed.T, strict=True):
        centres = np.linspace(min(z.min(), y.min()), max(z.max(), y.max()), 5)
        width = centres[1] - centres[0]
        positions = [np.clip(values, centres[0], centres[-1]) for values in (x, y)]
        masses = [np.maximum(1 - np.abs(p[:, None] - centres) / width, 0).mean(0) for p in positions]
        total += width * np.abs(np.cumsum(masses[0]) - np.cumsum(masses[1])).sum()
    return total


ORACLES = {
    "gaussian_w2_full": lambda s, t, _: w2_full(s, t),
    "gaussian_kl": lambda s, t, _: normal_kl(diagonal(t), diagonal(s)),
    "gaussian_kl_symmetric": lambda s, t, _: symmetric(diagonal, s, t),
    "gaussian_kl_full": lambda s, t, _: normal_kl(ridged(t), ridged(s)),
    "gaussian_kl_full_symmetric": lambda s, t, _: symmetric(ridged, s, t),
    "laplace_kl": lambda s, t, _: laplace(s, t),
    "exponential_kl": lambda s, t, _: exponential(s, t),
    "sinkhorn": entropic,
    "histogram_w1": binned,
    "sorted_w2": lambda s, t, _: np.square(np.sort(s, 0) - np.sort(t, 0)).mean(0).sum(),
}


@every_form
def test_values(form):
    """Row by row, so that nothing depends on the batch; near maps and large offsets do not cancel in float32."""
    for name, student, teacher in zip(ROWS, *rows(form), strict=True):
        if name in ("drawn", "other", "near", "offset", "shuffled"):
            expected = ORACLES[form](student, teacher, student)
            np.testing.assert_allclose(
                results(form)[name][0], expected, rtol=2e-3 if name in ("near", "offset") else 2e-5
            )
    np.testing.assert_allclose(results(form)["shuffled"][0], results(form)["drawn"][0], rtol=1e-5)


@every_form
def test_gradients(form):
    """Along a random direction, against the difference quotient of the oracle."""
    for name, student, teacher in zip(ROWS, *rows(form), strict=True):
        if name in ("drawn", "other"):
            direction, step = np.random.default_rng(1).uniform(0.5, 1, student.shape), 1e-6
            direction *= (student > 1 / 64) & (student < teacher.max(0))  # zeros are ties, and ends of the bins
            plus, minus = (ORACLES[form](student + h * direction, teacher, student) for h in (step, -step))
            value = (results(form)[name][1] * direction).sum()
            np.testing.assert_allclose(value, (plus - minus) / (2 * step), rtol=1e-4, atol=1e-6)


@every_form
def test_degenerate_maps_and_minima(form):
    for name in ROWS:
        value, gradient, of_teacher = results(form)[name]
        assert np.isfinite(value) and np.isfinite(gradient).all(), name
        assert not of_teacher.any(), name
        if name in MINIMA and form != "sinkhorn":  # whose plan of equal maps is spread by entropy
            assert abs(value) < 1e-5, name
            # That of first order is not smooth at its minimum: there, the sign of a rounding error decides.
            assert np.abs(gradient).max() < 1e-3 or form == "histogram_w1", name


def test_full_covariances_move_to_the_teachers_best_rotation():
    """For a rank-deficient pair: the polar factor, on the directions of overlap."""
    student, teacher = (x[0] for x in rows("gaussian_w2_full"))
    x, y = ((z - z.mean(0)) / np.sqrt(len(z)) for z in (student, teacher))
    U, sigma, Vt = np.linalg.svd(x @ y.T, full_matrices=False)
    assert sigma[-1] < 1e-12 * sigma[0]  # centring
    means = (student.mean(0) - teacher.mean(0)) / 4
    gradient = results("gaussian_w2_full")["drawn"][1]
    np.testing.assert_allclose(gradient, 2 * means + (x - U[:, :-1] @ Vt[:-1] @ y), atol=1e-5)


def test_full_covariances_meet_those_of_given_moments():
    """Value, and the gradient through to the features, with more positions than channels: nothing is degenerate."""
    student, teacher = (np.swapaxes(x[:2], 1, 2).astype(np.float32) for x in rows("sorted_w2"))

    def given(student):
        centred = [x - x.mean(1, keepdims=True) for x in (student, teacher)]
        covariances = [jnp.einsum("bmd,bme->bde", x, x, precision="highest") / 6 for x in centred]
        return sum(losses.gaussian_w2(student.mean(1), covariances[0], teacher.mean(1), covariances[1])).sum()

    def ours(student):
        return FORMS["gaussian_w2_full"](student, teacher).sum()

    values, gradients = zip(*(jax.jit(jax.value_and_grad(f))(student) for f in (ours, given)), strict=True)
    np.testing.assert_allclose(*values, rtol=1e-5)
    np.testing.assert_allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize("form", ["gaussian_w2_full", "gaussian_kl_full"])
def test_gradients_in_float64(form):
    student, teacher = (x[:1] for x in rows(form))
    with jax.enable_x64(True):
        loss = jax.jit(lambda s: FORMS[form](s, teacher).sum())
        check_grads(loss, (jnp.asarray(student),), order=1, modes=["rev"], rtol=1e-6)


def test_histogram_limits():
    """Beyond the outermost centres values count as there, without gradient; finer bins tend to the exact distance."""
    student, teacher = (x[:1, :, :1].astype(np.float32) for x in rows("sorted_w2"))

    def run(student, held, teacher, held_teacher):
        value = functools.partial(losses.feature_histogram_w1, bins=4, limits=(0, 1))
        first, gradient = jax.value_and_grad(lambda s: value(s, teacher).sum())(student)
        return first, value(held, held_teacher)[0], gradient, losses.feature_histogram_w1(student, teacher, bins=400)[0]

    held = [np.clip(x, 0.125, 0.875) for x in (student, teacher)]
    run = jax.jit(run)
    value, of_held, gradient, fine = jax.device_get(run(student, held[0], teacher, held[1]))
    np.testing.assert_allclose(value, of_held, rtol=1e-6)
    outside = (student < 0.125) | (student > 0.875)
    assert outside.any() and not gradient[outside].any()
    np.testing.assert_allclose(fine, np.abs(np.sort(student, 1) - np.sort(teacher, 1)).mean(), rtol=1e-2)


@every_form
def test_float32_inside_and_maps_as_tokens(form):
    narrow, wide = (jax.ShapeDtypeStruct((3, 2, 4, 5), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert jax.eval_shape(FORMS[form], narrow, narrow) == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert jax.eval_shape(FORMS[form], narrow, wide) == jax.ShapeDtypeStruct((3,), jnp.float32)
    if form == "gaussian_kl":
        student, teacher = (jnp.asarray(x[:2], jnp.bfloat16) for x in rows(form))
        in_float32 = FORMS[form](student.astype(jnp.float32), teacher.astype(jnp.float32))
        np.testing.assert_array_equal(FORMS[form](student, teacher), in_float32)
        maps = FORMS[form](student.reshape(2, 2, 2, 6), teacher.reshape(2, 4, 2, 6))
        np.testing.assert_array_equal(maps, in_float32)


@pytest.mark.parametrize("form", ["gaussian_w2_full", "gaussian_kl_full", "sinkhorn"])
def test_products_are_in_full_float32_and_nothing_is_channels_by_channels(form):
    student, teacher = (jax.ShapeDtypeStruct((2, 5, 17), jnp.float32) for _ in range(2))
    gradient = jax.jit(jax.grad(lambda s, t: FORMS[form](s, t).sum()))
    text = gradient.trace(student, teacher).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert not re.search(r"17x17x", text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.feature_gaussian_kl(np.ones((2, 4, 3)), np.ones((2, 4, 5))), "agree in B and D; a connector"),
        (lambda: losses.feature_gaussian_kl(np.ones((2, 3)), np.ones((2, 3))), r"student must be a map .* \(2, 3\)"),
        (lambda: losses.feature_laplace_kl(np.ones((2, 4, 3)), np.ones((2, 0, 3))), "teacher must be a map"),
        (lambda: losses.feature_sorted_w2(np.ones((1, 4, 3)), np.ones((1, 5, 3))), "as many positions, got 4 and 5"),
        (lambda: losses.feature_gaussian_kl(*np.ones((2, 1, 4, 3)), eps=0.0), "eps=0.0: must be above 0"),
        (lambda: losses.feature_laplace_kl(*np.ones((2, 1, 4, 3)), eps=-1.0), "eps=-1.0"),
        (lambda: losses.feature_exponential_kl(*np.ones((2, 1, 4, 3)), eps=0.0), "eps=0.0"),
        (lambda: losses.feature_gaussian_kl_full(*np.ones((2, 1, 4, 3)), ridge=0.0), "ridge=0.0"),
        (lambda: losses.feature_sinkhorn(*np.ones((2, 1, 4, 3)), num_iters=0), "num_iters must be at least 1"),
        (lambda: losses.feature_histogram_w1(*np.ones((2, 1, 4, 3)), bins=1), "bins=1: must be at least 2"),
        (lambda: losses.feature_histogram_w1(*np.ones((2, 1, 4, 3)), limits=(1, 1)), r"limits=\(1, 1\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
