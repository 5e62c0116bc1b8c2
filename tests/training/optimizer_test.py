"""Schedules against closed forms, updates against PyTorch's rules in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wkd_jax import config as config_lib
from wkd_jax.training import optimizer
from wkd_jax.training.clock import Clock

CLOCK = Clock(num_examples=100, global_batch_size=10, epochs=10)  # 10 steps an epoch


def settings(**changes):
    return {**config_lib.DEFAULTS["optimizer"], "learning_rate": 0.1, **changes}


def rates(**changes):
    schedule = optimizer.learning_rate(settings(**changes), CLOCK)
    return np.array([schedule(jnp.asarray(step)) for step in range(CLOCK.total_steps)])


def test_step_falls_after_the_milestones():
    got = rates(schedule="step", milestones=(3, 6), factor=0.1)
    expected = np.repeat([0.1] * 3 + [0.01] * 3 + [0.001] * 4, 10)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_cosine_ends_at_its_end():
    got = rates(schedule="cosine", end_learning_rate=0.01)
    expected = 0.01 + 0.09 * 0.5 * (1 + np.cos(np.pi * np.arange(100) / 100))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_warmup_takes_the_place_of_the_beginning():
    got, plain = rates(schedule="cosine", warmup=2, warmup_learning_rate=0.02), rates(schedule="cosine")
    np.testing.assert_allclose(got[:20], 0.02 + 0.08 * np.arange(20) / 20, rtol=1e-6)
    np.testing.assert_array_equal(got[20:], plain[20:])


def test_per_epoch_the_rate_is_constant_within_one():
    """timm's: warm-up w0 + t (lr - w0) / W, cosine of t / E, at the epoch t = 0, 1, ..."""
    got = rates(schedule="cosine", per_epoch=True, warmup=3, warmup_learning_rate=0.01, end_learning_rate=0.001)
    epoch = np.arange(10)
    cosine = 0.001 + 0.099 * 0.5 * (1 + np.cos(np.pi * epoch / 10))
    np.testing.assert_allclose(got, np.repeat(np.where(epoch < 3, 0.01 + 0.09 * epoch / 3, cosine), 10), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "give the epochs"),
        ({"schedule": "step", "milestones": (6, 3)}, "increasing"),
        ({"schedule": "step", "milestones": (3, 10)}, "between 0 and 10"),
        ({"schedule": "cosine", "milestones": (3,)}, "only schedule='step'"),
        ({"warmup": 10}, "less than the run.s 10 epochs"),
    ],
)
def test_bad_schedules(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizer.learning_rate(settings(**changes), CLOCK)


def run(config, gradients, start):
    """Five updates with our optimizer."""
    schedule = optimizer.learning_rate(config, CLOCK)
    tx = optimizer.build(config, schedule, start)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update({k: jnp.asarray(v, jnp.float32) for k, v in gradient.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture(name="problem")
def _problem():
    rng = np.random.default_rng(0)
    start = {"student/conv/kernel": rng.normal(size=(3, 2)), "student/conv/bias": rng.normal(size=2)}
    return start, [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(5)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_pytorch_sgd(problem, nesterov):
    start, gradients = problem
    config = settings(weight_decay=0.01, nesterov=nesterov, decay_rules=(("bias$", 0.0),))
    got = run(config, gradients, start)
    for name, value in start.items():
        p, v = value.copy(), 0.0
        for gradient in gradients:
            g = gradient[name] + (0.0 if name.endswith("bias") else 0.01) * p
            v = 0.9 * v + g
            p = p - 0.1 * (g + 0.9 * v if nesterov else v)
        np.testing.assert_allclose(got[name], p, rtol=2e-6, atol=1e-7)


def test_adamw_is_pytorch_adamw(problem):
    start, gradients = problem
    got = run(settings(name="adamw", weight_decay=0.05), gradients, start)
    for name, value in start.items():
        p, m, v = value.copy(), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            g = gradient[name]
            p = p * (1 - 0.1 * 0.05)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(got[name], p, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_whole_gradient(problem):
    start, gradients = problem
    config = settings(momentum=0.0, nesterov=False, clip_norm=0.5)
    got = run(config, gradients[:1], start)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients[0].values()))
    for name in start:
        expected = start[name] - 0.1 * gradients[0][name] * min(1, 0.5 / norm)
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-7)


def test_a_rule_that_matches_nothing_is_an_error():
    config = settings(decay_rules=(("bais$", 0.0),))
    with pytest.raises(ValueError, match=r"'bais\$' matches no parameter"):
        optimizer.build(config, optimizer.learning_rate(config, CLOCK), ["student/fc/bias"])


def test_milestones_and_warm_up_in_steps():
    """detectron2's schedule: the rate of step t is base * (start + (1 - start) t / warmup), then falls at its steps."""
    clock = Clock.of_steps(num_examples=100, global_batch_size=8, steps=30)
    assert (clock.total_steps, clock.epochs) == (30, 3)
    changes = {"unit": "steps", "schedule": "step", "milestones": (20, 25), "warmup": 10, "warmup_learning_rate": 1e-4}
    schedule = optimizer.learning_rate(settings(**changes), clock)
    got = [schedule(jnp.asarray(step)) for step in range(30)]
    expected = [1e-4 + (0.1 - 1e-4) * step / 10 for step in range(10)] + [0.1] * 10 + [0.01] * 5 + [0.001] * 5
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for wrong, words in (
        ({"milestones": (20, 30)}, "increasing steps between 0 and 30"),
        ({"warmup": 30}, "less than the run's 30 steps"),
        ({"per_epoch": True}, "unit='epochs'"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.learning_rate(settings(**{**changes, **wrong}), clock)
