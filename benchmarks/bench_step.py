"""The full ImageNet training step of every method: time, memory, compilation, utilisation, and the ratio over KD.

    python -m benchmarks.bench_step                                     # an accelerator: batch 256, bfloat16
    JAX_PLATFORMS=cpu python -m benchmarks.bench_step --batch 16 --dtype float32 --rounds 9
    python -m benchmarks.bench_step --classes 100 1000 10000 21841 --methods kd wkd_l

A step is what training does once a batch is on the device: normalisation, both networks, losses, gradients, update (the
recipe's crop and flip are made by the workers that decode); `Program.train_step` as the loop compiles it, with its
donated state. Weights and images are random, which no time depends on. Methods take turns, forwards and backwards, so
that drift of the machine cancels, and a ratio is the median over the rounds. Names joined by "+" are trained together.
Memory is what the compiler reserves on the device; on accelerators the largest that was in use, by all methods
together, is in the JSON. Utilisation (MFU) is that of the networks' multiply-adds (student three times, teacher once),
against the published peak of the chip or, where that is unknown, against a large matrix product.
"""

from __future__ import annotations

import argparse
import pathlib

import jax

from benchmarks import imagenet_step, timing
from benchmarks.scaling_times import CHIPS
from wkd_jax import registry
from wkd_jax.training import preflight

PEAKS = {"NVIDIA H100": "H100 SXM", "NVIDIA H200": "H100 SXM", "TPU v5 lite": "TPU v5e", "TPU v6 lite": "TPU v6e"}

# All but those of detectors, and a sum.
METHODS = [
    *(name for name, method in registry.entries("methods").items() if not hasattr(method, "TASK")),
    "wkd_l+wkd_f",
]


def peak(dtype: str) -> tuple[float, str]:
    """FLOP/s of this device that utilisation refers to, and where the number comes from."""
    kind = jax.devices()[0].device_kind
    chip = next((CHIPS[chip] for name, chip in PEAKS.items() if kind.startswith(name)), None)
    if chip and dtype == "bfloat16":
        return 1e12 * chip.tflops, "published, bfloat16"
    return preflight.matrix_speed(dtype), f"a large {dtype} matrix product, measured"


def case(options: argparse.Namespace, classes: int) -> dict[str, object]:
    """All methods at one number of classes."""
    settings = {"wkd_f": {"grid": 1}} if options.image_size < 193 else {}  # 4 x 4 cells of a 7 x 7 map
    variants, rows = {}, {}
    for name in options.methods:
        step = imagenet_step.variant(
            options.pair,
            name.split("+"),
            batch=options.batch,
            image_size=options.image_size,
            classes=classes,
            dtype=options.dtype,
            settings=settings,
        )
        variants[name] = step.run
        rows[name] = {
            "compile_s": step.compile_s,
            "memory_mb": step.memory_mb,
            "extra_parameters": step.parameters["methods"],
            "teacher": step.parameters["teacher"] > 0,
        }
        print(f"  {name}: compiled in {step.compile_s:.1f} s", flush=True)
    times = timing.interleaved(variants, options.rounds)
    macs = imagenet_step.forward_macs(options.pair, options.image_size, classes)
    speed, source = peak(options.dtype)
    for name, row in rows.items():
        row |= timing.summary(times[name], times[options.reference])
        flops = 2 * options.batch * (3 * macs["student"] + row.pop("teacher") * macs["teacher"])
        row |= {"model_tflop": flops / 1e12, "utilisation": flops / (1e-3 * row["median_ms"]) / speed}
    in_use = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "classes": classes,
        "utilisation_of": {"tflops": speed / 1e12, "source": source},
        "peak_in_use_mb_all_methods": in_use and in_use / 1e6,
        "methods": rows,
    }


def table(rows: dict[str, dict], reference: str) -> str:
    """Markdown."""
    lines = [
        f"| method | ms a step (quartiles) | over {reference} (quartiles) | memory | compiled in | extra parameters "
        "| MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["quartiles_ms"]
        below, above = row["ratio_quartiles"]
        lines.append(
            f"| {name} | {row['median_ms']:.1f} ({low:.1f}-{high:.1f}) | "
            f"{row['ratio']:.3f} ({below:.3f}-{above:.3f}) | {row['memory_mb']:.0f} MB | {row['compile_s']:.1f} s | "
            f"{row['extra_parameters'] / 1e6:.2f} M | {row['utilisation']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=imagenet_step.PAIRS, default="r34_r18")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--reference", default="kd", help="the method that ratios are over")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="JSON (default: results/step_<pair>_<platform>.json)")
    options = parser.parse_args()
    if options.reference not in options.methods:
        parser.error(f"--reference {options.reference}: not among --methods {' '.join(options.methods)}")
    keys = ("pair", "batch", "image_size", "dtype", "rounds", "reference")
    report = {"benchmark": "training step", "machine": timing.machine("jaxlib", "flax", "optax")}
    report |= {key: getattr(options, key) for key in keys} | {"cases": []}
    out = options.out or timing.RESULTS / f"step_{options.pair}_{jax.default_backend()}.json"
    for classes in options.classes:
        print(f"{options.pair}, {classes} classes, batch {options.batch}, {options.image_size} px, {options.dtype}")
        report["cases"].append(case(options, classes))
        print(table(report["cases"][-1]["methods"], options.reference))
        timing.write(report, out)


if __name__ == "__main__":
    main()
