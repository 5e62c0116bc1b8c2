"""Steps and epochs against plain integer arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.training.clock import Clock


@pytest.mark.parametrize(
    ("examples", "batch", "epochs"), [(100, 64, 3), (1297, 64, 40), (20, 64, 5), (64, 64, 2), (7, 3, 4)]
)
def test_epoch_of_every_step(examples, batch, epochs):
    clock = Clock(examples, batch, epochs)
    steps = np.arange(clock.total_steps)
    expected = steps * batch // examples + 1
    progress = jax.vmap(clock.progress)(jnp.asarray(steps, jnp.int32))
    np.testing.assert_array_equal(progress.epoch, np.minimum(expected, epochs))
    assert expected[0] == 1 and clock.total_steps * batch >= epochs * examples > (clock.total_steps - 1) * batch


def test_long_runs_do_not_overflow():
    clock = Clock(num_examples=1_281_167, global_batch_size=4096, epochs=3_000)
    step = clock.total_steps - 1
    assert step * 4096 > 2**31
    assert int(clock.progress(jnp.asarray(step, jnp.int32)).epoch) == step * 4096 // 1_281_167 + 1


def test_evaluation_comes_after_the_epoch():
    clock = Clock(num_examples=100, global_batch_size=64, epochs=3)
    assert [clock.steps(epoch) for epoch in (1, 2, 3, 9)] == [2, 4, 5, 5]
