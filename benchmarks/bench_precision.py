"""What the precision of the solver's products does to WKD-L: value and gradient against float64.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_precision [--distance FILE.npy --sharpness 1]

The tensor cores of GPUs and TPUs multiply float32 in pieces. Here their products are emulated on any device by rounding
the operands, and multiplying and adding the pieces in float32: bfloat16 (8 bits), TF32 (11 bits), and both in three
passes (high x high + high x low + low x high). FILE holds distances between classes, such as those that the authors
released; without it they come from random points.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from wkd_jax import losses

solver = importlib.import_module("wkd_jax.losses.sinkhorn")  # the name in the package is the function's
Round = Callable[[jax.Array], jax.Array]


def to_bfloat16(x: jax.Array) -> jax.Array:
    """The nearest bfloat16 number."""
    return jax.lax.reduce_precision(x, 8, 7)


def to_tf32(x: jax.Array) -> jax.Array:
    """The nearest TF32 number."""
    return jax.lax.reduce_precision(x, 8, 10)


def once(nearest: Round, product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product of rounded operands."""
    return lambda x, kernel, axis: product(nearest(x), nearest(kernel), axis)


def three_passes(nearest: Round, product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product of operands in two pieces, without that of the two low ones."""

    def run(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
        high_x, high_kernel = nearest(x), nearest(kernel)
        low_x, low_kernel = nearest(x - high_x), nearest(kernel - high_kernel)
        small = product(high_x, low_kernel, axis) + product(low_x, high_kernel, axis)
        return small + product(high_x, high_kernel, axis)

    return run


def value_and_gradient(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, cost: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The Wasserstein term [B] and the gradient [B, C] of its sum, in float64."""

    def total(student: jax.Array) -> tuple[jax.Array, jax.Array]:
        arrays = (jnp.asarray(x, dtype) for x in (teacher, cost))
        term = losses.wkd_logit(student, next(arrays), jnp.asarray(labels), next(arrays))[1]
        return term.sum(), term

    (_, term), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(student, dtype))
    return np.asarray(term, np.float64), np.asarray(gradient, np.float64)


def main() -> None:
    """Prints and writes the largest relative errors, over a student far from its teacher and one near to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distance", type=pathlib.Path, help="[C, C], of the classes; default: of random points")
    parser.add_argument("--sharpness", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, default=timing.RESULTS / "precision.json")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.distance:
        distance = np.load(options.distance).astype(np.float64)
    else:
        points = rng.normal(size=(1000, 8))
        distance = 1 - np.exp(-0.1 * np.square(points[:, None] - points).sum(-1))
    cost, classes = 1 - np.exp(-options.sharpness * distance), len(distance)
    labels = rng.integers(0, classes, options.batch)
    teacher = 2 * rng.normal(size=(options.batch, classes))
    teacher[np.arange(options.batch), labels] += 6
    students = {
        "far": 0.7 * teacher + 1.4 * rng.normal(size=teacher.shape),
        "near": teacher + 0.1 * rng.normal(size=teacher.shape),
    }
    exact = solver._times
    products = {
        "float32": exact,
        "TF32 in three passes": three_passes(to_tf32, exact),
        "bfloat16 in three passes": three_passes(to_bfloat16, exact),
        "TF32": once(to_tf32, exact),
        "bfloat16": once(to_bfloat16, exact),
    }
    rows: dict[str, dict[str, float]] = {name: {} for name in products}
    for which, student in students.items():
        with jax.enable_x64(True):
            value, gradient = value_and_gradient(student, teacher, labels, cost, "float64")
        for name, product in products.items():
            solver._times = product
            got_value, got_gradient = value_and_gradient(student, teacher, labels, cost, "float32")
            solver._times = exact
            error = np.abs(got_gradient - gradient).max(1) / np.abs(gradient).max(1)
            rows[name] |= {
                f"value, {which}": float(np.max(np.abs(got_value / value - 1))),
                f"gradient, {which}": float(error.max()),
            }
    print(f"| products in | {' | '.join(rows['float32'])} |\n|{'---|' * 5}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{error:.0e}' for error in row.values())} |")
    settings = {"classes": classes, "batch": options.batch, "sharpness": options.sharpness}
    settings["distance"] = options.distance.name if options.distance else "random points"
    timing.write({"benchmark": "precision of the solver", **settings, "errors": rows}, options.out)


if __name__ == "__main__":
    main()
