"""A small run that saves after every step, for `checkpoint_test` to kill: `python killed_run.py DIRECTORY STEPS`."""

import functools
import sys

import jax
import jax.numpy as jnp

from wkd_jax.training.checkpoint import Checkpoints


def initial():
    return {"params": {f"layer{i}": jnp.full((400, 300), i + 1, jnp.float32) for i in range(4)}, "step": jnp.int32(0)}


@functools.partial(jax.jit, donate_argnums=0)
def advance(state):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state["step"]), (400, 300))
    params = {name: jnp.sin(value) + 0.1 * noise for name, value in state["params"].items()}
    return {"params": params, "step": state["step"] + 1}


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main(directory, steps):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), initial())
    with Checkpoints(directory, keep=2, report=lambda message: say("report", message)) as checkpoints:
        restored = checkpoints.restore_latest(wanted)
        state, step = (restored[0], restored[1]["step"]) if restored else (initial(), 0)
        while step < steps:
            state, step = advance(state), step + 1
            checkpoints.save(step, state, {"step": step})
            say("finished", max(checkpoints.steps(), default=0))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
