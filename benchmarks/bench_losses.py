"""Time and memory of the two WKD losses, value and gradient, against the forms one would write without this package.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_losses

WKD-L, 10 iterations: against (plain) a batched loop of [B, C] x [C, C] products differentiated by JAX, and (direct) the
form of the reference, in which every example has its own [C-1, C-1] cost without the target class. WKD-F: against plain
means and variances of each cell. Variants of a case take turns, so that a busy machine slows all of them; the ratios
are what to look at. Prints a table and writes JSON with hardware and versions.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from wkd_jax import losses

TEMPERATURE, EPSILON, ITERATIONS, STABILIZER, WEIGHT = 2.0, 0.05, 10, 1e-8, 30.0


def wkd_logit_plain(student, teacher, labels, cost):
    """Masks the target; JAX differentiates the loop."""
    target = labels[:, None] == jnp.arange(student.shape[-1])
    a, b = (jax.nn.softmax(jnp.where(target, -jnp.inf, x / TEMPERATURE)) for x in (student, teacher))
    kernel, u = jnp.exp(-cost / EPSILON), ~target / (student.shape[-1] - 1)
    for _ in range(ITERATIONS):
        v = b / (u @ kernel + STABILIZER)
        u = a / (v @ kernel.T + STABILIZER)
    target_term = -jnp.where(target, jax.nn.softmax(teacher) * jax.nn.log_softmax(student), 0).sum(-1)
    return target_term, (u * (v @ (kernel * cost).T)).sum(-1)


def wkd_logit_direct(student, teacher, labels, cost):
    """Deletes the target from logits and cost, one cost matrix an example."""
    batch, classes = student.shape
    rows = jnp.arange(batch)
    others = jnp.arange(classes - 1) + (jnp.arange(classes - 1) >= labels[:, None])
    a, b = (jax.nn.softmax(x[rows[:, None], others] / TEMPERATURE) for x in (student, teacher))
    costs = cost[others[:, :, None], others[:, None, :]]
    kernels, u = jnp.exp(-costs / EPSILON), jnp.full_like(a, 1 / (classes - 1))
    for _ in range(ITERATIONS):
        v = b / (jnp.einsum("bij,bi->bj", kernels, u) + STABILIZER)
        u = a / (jnp.einsum("bij,bj->bi", kernels, v) + STABILIZER)
    plan = u[:, :, None] * kernels * v[:, None, :]
    target_term = -(jax.nn.softmax(teacher)[rows, labels] * jax.nn.log_softmax(student)[rows, labels])
    return target_term, (plan * costs).sum((1, 2))


def wkd_feature_plain(student, teacher, grid):
    """Mean and standard deviation of each cell, as jnp.mean and jnp.var."""
    sides = [slice(i * student.shape[1] // grid, -(-(i + 1) * student.shape[1] // grid)) for i in range(grid)]
    mean_term = cov_term = 0.0
    for i in sides:
        for j in sides:
            cells = student[:, i, j], teacher[:, i, j]
            means = [x.mean((1, 2)) for x in cells]
            stds = [jnp.sqrt(jnp.var(x, (1, 2), ddof=1) + 1e-5) for x in cells]
            mean_term += jnp.square(means[0] - means[1]).sum(-1)
            cov_term += jnp.square(stds[0] - stds[1]).sum(-1)
    return mean_term / grid**2, cov_term / grid**2


def logit_case(batch, classes):
    """Random logits and a symmetric cost in [0, 1]; `{variant: function}`, arguments."""
    keys = jax.random.split(jax.random.key(0), 4)
    student, noise = 3 * jax.random.normal(keys[0], (batch, classes)), jax.random.normal(keys[1], (batch, classes))
    points = jax.random.normal(keys[2], (classes, 8))
    similarity = jnp.exp(-0.1 * jnp.square(points[:, None] - points).sum(-1))
    cost = losses.ground_cost(similarity, sharpness=1.0)
    labels = jax.random.randint(keys[3], (batch,), 0, classes)
    variants = {"wkd_jax": losses.wkd_logit, "plain": wkd_logit_plain, "direct": wkd_logit_direct}
    return variants, (student, student + noise, labels, cost)


def feature_case(grid, shape=(256, 7, 7, 512)):
    """Random maps; `{variant: function}`, arguments."""
    keys = jax.random.split(jax.random.key(0))
    variants = {
        "wkd_jax": lambda s, t: losses.wkd_feature(s, t, grid=grid),
        "plain": lambda s, t: wkd_feature_plain(s, t, grid),
    }
    return variants, tuple(1 + jax.random.normal(key, shape) for key in keys)


def measure(variants, arguments, rounds):
    """Compiles value and gradient of every variant, checks that they agree, then times them in turns."""
    compiled, results = {}, {}
    for name, function in variants.items():

        def loss(student, *rest, function=function):
            first, second = function(student, *rest)
            return (first + WEIGHT * second).mean()

        start = time.perf_counter()
        compiled[name] = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        memory = compiled[name].memory_analysis()
        results[name] = {
            "compile_s": time.perf_counter() - start,
            "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
        }
    outputs = {name: jax.block_until_ready(run(*arguments)) for name, run in compiled.items()}
    value, grad = outputs["wkd_jax"]
    for other_value, other_grad in outputs.values():
        np.testing.assert_allclose(value, other_value, rtol=1e-4)
        np.testing.assert_allclose(grad, other_grad, atol=1e-3 * float(jnp.abs(other_grad).max()))

    def until_done(run):
        return lambda: jax.block_until_ready(run(*arguments))

    times = timing.interleaved({name: until_done(run) for name, run in compiled.items()}, rounds, settle=True)
    for name, sample in times.items():
        results[name] |= timing.summary(sample, times["wkd_jax"])
    return results


def main():
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="JSON (default: results/losses_<platform>.json)")
    options = parser.parse_args()
    report = {
        "benchmark": "losses, value and gradient",
        "rounds": options.rounds,
        "machine": timing.machine(),
        "cases": {},
    }
    cases = {f"WKD-L B=64 C={classes}": logit_case(64, classes) for classes in (100, 1000)}
    cases |= {f"WKD-F 256x7x7x512 grid={grid}": feature_case(grid) for grid in (1, 4)}
    print(f"{'case':30} {'variant':9} {'median':>10} {'quartiles':>19} {'ratio':>7} {'temporary':>11} {'compile':>8}")
    for case, (variants, arguments) in cases.items():
        report["cases"][case] = results = measure(variants, arguments, options.rounds)
        for name, r in results.items():
            low, high = r["quartiles_ms"]
            memory = "-" if r["temporary_mb"] is None else f"{r['temporary_mb']:.1f}"
            print(
                f"{case:30} {name:9} {r['median_ms']:7.1f} ms {low:8.1f}-{high:7.1f} ms {r['ratio']:7.2f} "
                f"{memory:>8} MB {r['compile_s']:6.1f} s"
            )
    timing.write(report, options.out or timing.RESULTS / f"losses_{jax.default_backend()}.json")


if __name__ == "__main__":
    main()
