"""`wkd_jax.losses` must stay light: a foreign training loop imports it and nothing else."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("flax", "grain", "tensorflow", "tensorflow_datasets", "torch", "ott", "optax", "orbax")


def loaded_by(statement):
    """Which of the heavy packages a fresh interpreter has loaded after `statement`."""
    program = f"import json, sys\n{statement}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_losses_loads_nothing_heavy():
    assert loaded_by("import wkd_jax.losses") == []


def test_the_check_sees_a_heavy_import():
    assert "ott" in loaded_by("import wkd_jax.losses, ott.geometry.geometry")


def test_a_first_solve_inside_a_trace_leaves_no_tracer_behind():
    program = """
import jax, jax.numpy as jnp
from wkd_jax import losses
cost = 1 - jnp.eye(3)
mass = jnp.full((2, 3), 1 / 3)
with jax.checking_leaks():
    traced = jax.jit(lambda a: losses.sinkhorn(a, a, cost, epsilon=0.1, num_iters=3).cost)(mass)
eager = losses.sinkhorn(mass, mass, cost, epsilon=0.1, num_iters=3).cost
assert jnp.allclose(traced, eager)
"""
    assert "ott" in loaded_by(program)


@pytest.mark.parametrize("name", ["wkd_logit", "wkd_feature", "sinkhorn", "gaussian_w2", "ground_cost", "cka", "kd"])
def test_public_names_are_functions_with_doctests(name):
    from wkd_jax import losses

    assert name in losses.__all__
    assert ">>>" in getattr(losses, name).__doc__
