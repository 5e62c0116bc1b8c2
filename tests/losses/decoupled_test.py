"""DKD and NKD against the authors' numbers, float64 formulas with the target deleted, and the extremes of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from wkd_jax.losses.decoupled import dkd, nkd, nontarget_log_softmax

STUDENT = np.array([[1.0, 0.5, -0.5, 2.0, 0.0], [0.2, 1.5, 0.3, -1.0, 0.8]])
TEACHER = np.array([[2.0, 1.0, -1.0, 3.0, 0.5], [0.0, 2.5, 1.0, -2.0, 1.0]])
LABELS = np.array([3, 2], np.int32)
rng = np.random.default_rng(0)


def terms(student, teacher, labels, temperature):
    """[4, ...], DKD's two terms and NKD's."""
    options = {"temperature": temperature}
    return jnp.stack([*dkd(student, teacher, labels, **options), *nkd(student, teacher, labels, **options)])


@jax.jit
def differentiated(student, teacher, labels, temperature, weights):
    """The terms, and the gradients of their weighted sum by student, teacher and temperature."""

    def total(student, teacher, temperature):
        values = terms(student, teacher, labels, temperature)
        return jnp.sum(weights * values), values

    (value, values), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(student, teacher, temperature)
    return value, values, gradients


def run(*arguments):
    with jax.enable_x64(True):
        value, values, gradients = jax.device_get(differentiated(*arguments))
    assert values.dtype == np.float64
    return value, values, gradients


def oracle(student, teacher, label, temperature):
    """The four terms of one row, from probabilities without the target."""
    binary = [np.array([p := softmax(x / temperature)[label], 1 - p]) for x in (teacher, student)]
    p, log_q = softmax(np.delete(teacher, label) / temperature), log_softmax(np.delete(student, label) / temperature)
    values = [
        np.sum(binary[0] * np.log(binary[0] / binary[1])),
        np.sum(p * (np.log(p) - log_q)),
        -softmax(teacher)[label] * log_softmax(student)[label] / temperature**2,
        -np.sum(p * log_q),
    ]
    return temperature**2 * np.array(values)


def test_values_and_gradients():
    """Rows, in the shape [2, 6], each with its temperature: the authors' two at 1, 4 and 3, and six drawn."""
    student, teacher = (np.concatenate([x, x, x, 3 * rng.normal(size=(6, 5))]) for x in (STUDENT, TEACHER))
    labels = np.concatenate([LABELS, LABELS, LABELS, rng.integers(0, 5, 6)]).astype(np.int32)
    temperature = np.array([1, 1, 4, 4, 3, 3, *rng.uniform(0.5, 5, 6)])
    weights = rng.normal(size=(4, 12))
    weights[:, :4] = np.array([[0, 0, 1, 1.5], [0, 0, 1, 1.5], [1, 8, 0, 0], [1, 8, 0, 0]]).T / 2
    rows = [x.reshape(*x.shape[:-1], 2, 6) for x in (labels, temperature, weights)]
    rows = [student.reshape(2, 6, 5), teacher.reshape(2, 6, 5), *rows]

    value, values, (by_student, by_teacher, by_temperature) = run(*rows)
    values, by_student = values.reshape(4, 12), by_student.reshape(12, 5)
    expected = np.array([oracle(*row) for row in zip(student, teacher, labels, temperature, strict=True)]).T
    np.testing.assert_allclose(values, expected, rtol=1e-10)

    means = values[:, :6].reshape(4, 3, 2).mean(-1)
    goldens = {  # at temperatures 1, 4
        0: [0.005165, 0.023695],
        1: [0.090109, 0.182318],
        2: [0.327245, 0.327245],
    }
    for term, golden in goldens.items():
        np.testing.assert_allclose(means[term, :2], golden, atol=1e-6)
    np.testing.assert_allclose(means[3, [0, 2]], [0.958802, 11.813606], atol=1e-6)
    np.testing.assert_allclose(by_student[0], [-0.052377, 0.077318, 0.067547, -0.139383, 0.046896], atol=1e-6)
    np.testing.assert_allclose(by_student[2], [-0.650821, -0.009719, 0.722959, -0.053843, -0.008577], atol=1e-6)
    np.testing.assert_array_equal(by_teacher, 0)

    # DKD's terms add up to KD.
    p = softmax(teacher / temperature[:, None], -1)
    kl = np.sum(p * (np.log(p) - log_softmax(student / temperature[:, None], -1)), -1)
    np.testing.assert_allclose(values[0] + (1 - p[np.arange(12), labels]) * values[1], temperature**2 * kl, rtol=1e-8)

    # Central differences along one direction, of the student's logits and of the temperature.
    steps = 1e-5 * rng.normal(size=(12, 5)), 1e-5 * rng.normal(size=12)
    ends = [
        run(rows[0] + s * steps[0].reshape(2, 6, 5), *rows[1:3], rows[3] + s * steps[1].reshape(2, 6), rows[4])[0]
        for s in (1, -1)
    ]
    slope = np.sum(by_student * steps[0]) + np.sum(by_temperature.reshape(12) * steps[1])
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=1e-6)

    # In half precision, the same from float32 of what came in.
    half = [jnp.asarray(x, jnp.bfloat16) for x in rows[:2]]
    got = jax.jit(terms)(*half, *rows[2:3], rows[3].astype(np.float32))
    assert got.dtype == jnp.float32
    wide = run(*(np.asarray(x, np.float64) for x in half), *rows[2:])[1]
    np.testing.assert_allclose(got, wide, rtol=1e-4, atol=1e-5)


def test_extremes():
    """Rows at temperature 2, where something has no probability or nothing is left."""
    inf, big = -np.inf, 1e4 * np.eye(5)
    cases = {
        "sure and right, both": (big[0], big[0], 0),
        "sure and wrong student": (big[1], big[0], 0),
        "sure and wrong teacher": (big[0], big[1], 0),
        "one-hot teacher": (STUDENT[0], big[0], 0),
        "ruled out": (STUDENT[0], -big[0], 0),
        "nothing known": (np.zeros(5), np.zeros(5), 0),
        "equal": (TEACHER[0], TEACHER[0], 3),
        "q_y rounds to 1": (np.array([120.0, 0, 0, 0, 0]), 2 * np.log([0.8, 0.05, 0.05, 0.05, 0.05]), 0),
        "a class is absent": (np.array([1, 0.5, -0.5, 2, inf]), np.array([2, 1, -1, 3, inf]), 3),
        "two classes": (np.array([1, 0.5, inf, inf, inf]), np.array([2, 1, inf, inf, inf]), 0),
        "padding below": (STUDENT[0], TEACHER[0], -1),
        "padding above": (STUDENT[0], TEACHER[0], 5),
    }
    student, teacher, labels = (np.array(x) for x in zip(*cases.values(), strict=True))
    rows = [x.reshape(2, 6, 5) for x in (student, teacher)]
    _, values, (gradient, _, by_temperature) = run(
        *rows, labels.astype(np.int32).reshape(2, 6), np.full((2, 6), 2.0), np.ones((4, 2, 6))
    )
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    assert np.isfinite(by_temperature[np.isfinite(student).all(-1).reshape(2, 6)]).all()
    got = dict(zip(cases, zip(values.reshape(4, 12).T, gradient.reshape(12, 5), strict=True), strict=True))
    np.testing.assert_array_equal(got["sure and right, both"][0][:3], 0)
    np.testing.assert_allclose(got["equal"][0][:2], 0, atol=1e-12)
    np.testing.assert_allclose(got["sure and wrong student"][0][0], 4 * 5000)
    # 1 - q_y is 4 exp(-60), which 1 - 1 has lost.
    log_rest = np.log(4) - 60
    expected = 4 * (0.8 * np.log(0.8) + 0.2 * (np.log(0.2) - log_rest))
    np.testing.assert_allclose(got["q_y rounds to 1"][0][0], expected, rtol=1e-12)
    for row, kept in (("a class is absent", 4), ("two classes", 2)):
        alone = oracle(*(x[:kept] for x in cases[row][:2]), cases[row][2], 2.0)
        np.testing.assert_allclose(got[row][0], alone, rtol=1e-10, atol=1e-15, err_msg=row)
        np.testing.assert_array_equal(got[row][1][kept:], 0)
    p, log_q = softmax(TEACHER[0] / 2), log_softmax(STUDENT[0] / 2)
    for row in ("padding below", "padding above"):
        everything = [0, 4 * np.sum(p * (np.log(p) - log_q)), 0, -4 * np.sum(p * log_q)]
        np.testing.assert_allclose(got[row][0], everything, atol=1e-12, err_msg=row)


def test_nontarget_log_softmax():
    def twice(x):
        value, vjp = jax.vjp(lambda x: nontarget_log_softmax(x, LABELS), x)
        return value, vjp(jnp.ones_like(value))[0]

    value, gradient = jax.device_get(jax.jit(twice)(jnp.asarray(STUDENT, jnp.bfloat16)))
    assert value.dtype == np.float32
    rounded = np.asarray(jnp.asarray(STUDENT, jnp.bfloat16), np.float64)
    for row, label in enumerate(LABELS):
        kept = np.delete(rounded[row], label)
        np.testing.assert_allclose(np.delete(value[row], label), log_softmax(kept), rtol=1e-5)
        np.testing.assert_allclose(np.delete(gradient[row], label), 1 - 4 * softmax(kept), atol=1e-2)
        assert gradient[row, label] == 0  # whatever arrives there
        assert np.exp(value[row, label]) == 0 and 0 * 100 * value[row, label] == 0  # not NaN


@pytest.mark.parametrize("loss", [dkd, nkd])
@pytest.mark.parametrize(
    ("arguments", "temperature", "message"),
    [
        ((STUDENT, TEACHER[:, :4], LABELS), 1.0, r"\(2, 5\) and \(2, 4\)"),
        ((STUDENT, TEACHER, np.eye(5)[LABELS]), 1.0, "take the argmax"),
        ((STUDENT[:, :1], TEACHER[:, :1], LABELS), 1.0, "at least two classes"),
        ((STUDENT, TEACHER, LABELS), np.ones(3), r"temperature must be a scalar or \(2,\), got \(3,\)"),
        ((STUDENT, TEACHER, LABELS), 0.0, "temperature=0.0: must be above 0"),
    ],
)
def test_errors(loss, arguments, temperature, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: loss(*x, temperature=temperature), *arguments)
