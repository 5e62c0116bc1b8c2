"""The profiler's trace of some steps."""

import jax
import jax.numpy as jnp
import pytest

from wkd_jax.training.trace import WARM_UP, Trace


def run(trace, first_step, steps):
    double = jax.jit(lambda x: 2 * x)
    x = jnp.ones(8)
    for step in range(first_step, first_step + steps):
        with trace.start(step):
            x = double(x)
        trace.stop(step, x)


def annotated_steps(directory):
    """Numbers of the steps in the trace."""
    (file,) = directory.glob("**/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


def test_so_many_steps_are_traced_after_the_first_ten(tmp_path):
    with Trace(tmp_path, first_step=5, steps=3) as trace:
        run(trace, 5, WARM_UP + 8)
    assert annotated_steps(tmp_path) == [15, 16, 17]


def test_a_run_that_ends_early_keeps_what_was_traced(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"), Trace(tmp_path, first_step=1, steps=100) as trace:  # noqa: PT012
        run(trace, 1, WARM_UP + 2)
        raise RuntimeError("stopped")
    assert annotated_steps(tmp_path) == [11, 12]


def test_nothing_is_traced_by_default(tmp_path):
    with Trace(tmp_path / "profile", first_step=1, steps=0) as trace:
        run(trace, 1, WARM_UP + 2)
    assert not (tmp_path / "profile").exists()
