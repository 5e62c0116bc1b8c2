"""What the training step becomes on chips that are not at hand: kernels, their traffic, the two floors of its time.

    pip install --no-deps libtpu nvidia-cuda-nvcc-cu12 jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2  # as jax is
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu python -m benchmarks.bench_compiled --chip h100
    JAX_PLATFORMS=cpu python -m benchmarks.bench_compiled --chip v5e

XLA compiles for a described chip without one (the vendors' plug-ins have to be installed). Nothing runs and nothing is
timed: kernels are not tuned on the device, and what is counted is what the compiler decided.

- operations: of the traced program, by XLA's cost analysis (which leaves out what meets only padding, some 8 % of the
  networks' multiply-adds); the products of WKD-L's solver apart, since their peak is that of float32.
- kernels, traffic: H100: top-level instructions of the compiled program, and what each reads and writes, added up.
  TPU: XLA's own "bytes accessed".
- cycles: TPU: XLA's estimate for each instruction, added up. Good for ratios.
- two times: operations at the chip's peak, which no program beats, and this program's own traffic at the chip's memory
  bandwidth, which one that keeps more on chip could.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import imagenet_step, timing
from benchmarks.bench_scaling import BYTES
from benchmarks.scaling_times import CHIPS, Chip
from wkd_jax.training import build


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip that is compiled for.

    Attributes:
      platform: Of JAX.
      topology: What the compiler is told.
      chip: Its published figures.
      options: Of the compiler.
    """

    platform: str
    topology: dict[str, str]
    chip: Chip
    options: dict[str, str] = dataclasses.field(default_factory=dict)


# Limits of an H100 SXM5 as the CUDA driver reports them.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TARGETS = {
    "h100": Target(
        "cuda",
        {"topology_name": "", "target_config": _H100, "topology": "1x1x1"},
        CHIPS["H100 SXM"],
        {"xla_gpu_autotune_level": "0"},  # there is no device to time candidates on
    ),
    "v5e": Target("tpu", {"topology_name": "v5e:2x2"}, CHIPS["TPU v5e"]),
    "v6e": Target("tpu", {"topology_name": "v6e:2x2"}, CHIPS["TPU v6e"]),
}


def measure(target: Target, pair: str, methods: list[str], *, batch: int, classes: int) -> dict[str, Any]:
    """Compiles one step and counts."""
    data = imagenet_step.ImageNet(classes=classes)
    settings = imagenet_step.config(pair, {name: {} for name in methods}, batch=batch)
    plan = imagenet_step.planned(settings, data)
    where = SingleDeviceSharding(topologies.get_topology_desc(platform=target.platform, **target.topology).devices[0])
    arrays, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        ((plan.state, plan.frozen), build.abstract_batch(batch, data)),
    )
    step = jax.jit(plan.program.train_step, donate_argnums=0)
    here = step.lower(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (*arrays, images)))
    operations = here.cost_analysis()["flops"] / 1e12
    solver = solver_tflop(batch, classes) if "wkd_l" in methods else 0.0
    start = time.perf_counter()
    compiled = step.lower(*arrays, images).compile(compiler_options=target.options)
    text = compiled.as_text()
    row = {
        "tflop": operations,
        "solver_tflop": solver,
        "memory_mb": imagenet_step.needed_mb(compiled),
        "compile_s": round(time.perf_counter() - start, 1),
    }
    if target.platform == "tpu":
        row |= {"traffic_gb": compiled.cost_analysis()["bytes accessed"] / 1e9, "mega_cycles": cycles(text) / 1e6}
    else:
        found = kernels(text)
        row |= {"traffic_gb": sum(size for _, size in found) / 1e9, "kernels": len(found)}
    chip = target.chip
    row["operations_ms"] = 1e3 * ((operations - solver) / chip.tflops + solver / chip.float32_tflops)
    row["traffic_ms"] = 1e12 * row["traffic_gb"] / chip.memory
    return row


def solver_tflop(batch: int, classes: int, num_iters: int = 10) -> float:
    """Operations of WKD-L's products, value, gradient and logged error: 4 num_iters + 2 products of [B, C] with [C, C].

    Example:
      >>> round(solver_tflop(256, 1000), 4)
      0.0215
    """
    return 2 * (4 * num_iters + 2) * batch * classes**2 / 1e12


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w\-]+)\((.*)$")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def kernels(text: str) -> list[tuple[str, int]]:
    """(kind, bytes read and written) of each kernel of a compiled program, those of a loop as often as they run.

    A kernel counts with the whole of its operands and results, also where it reads or writes a part of one.

    Raises:
      ValueError: If a loop's number of rounds is not known, or there is a call or a branch.
    """
    computations: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text):
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(", block)
        if head:
            computations["ENTRY" if head[1] else head[2]] = block.splitlines()[1:]
    return _kernels("ENTRY", computations)


def _kernels(name: str, computations: dict[str, list[str]]) -> list[tuple[str, int]]:
    types: dict[str, str] = {}
    found: list[tuple[str, int]] = []
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        result, kind, kind_of, rest = match.groups()
        types[result] = kind
        if kind_of == "while":
            body, rounds = re.search(r"body=%([\w.\-]+)", rest), re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            if not rounds:
                raise ValueError(f"{result}: a loop of unknown length")
            found += int(rounds[1]) * _kernels(body[1], computations)
        elif kind_of in ("call", "conditional"):
            raise ValueError(f"{result}: a {kind_of} is not counted")
        elif kind_of not in _FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            found.append((_kind(kind_of, rest), _size(kind) + sum(_size(types.get(name, "")) for name in operands)))
    return found


def _kind(kind: str, rest: str) -> str:
    """An instruction's kind; which call or fusion it is, where it is one."""
    more = re.search(r'custom_call_target="([^"]*)"|kind=(\w+)', rest) if kind in ("custom-call", "fusion") else None
    return f"{kind} {more[1] or more[2]}" if more else kind


def _size(kind: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    return sum(BYTES.get(name, 0) * math.prod(map(int, filter(None, dims.split(",")))) for name, dims in arrays)


def cycles(text: str) -> int:
    """XLA's estimate of a TPU program's cycles. Loops count once; the step's only ones are of a few scalars."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def versions() -> dict[str, str]:
    """Of what decides the counts, as far as it is installed."""
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "libtpu")
    installed = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def main() -> None:
    """Compiles every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TARGETS, required=True)
    parser.add_argument("--pair", choices=imagenet_step.PAIRS, default="r34_r18")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000])
    parser.add_argument("--methods", nargs="+", default=["none", "kd", "wkd_l", "wkd_f", "wkd_l+wkd_f"])
    parser.add_argument("--out", type=pathlib.Path, help="JSON (default: results/compiled_<pair>_<chip>.json)")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    target = TARGETS[options.chip]
    report: dict[str, Any] = {"benchmark": "compiled step", "versions": versions()}
    report |= {"chip": options.chip, "pair": options.pair, "batch": options.batch, "cases": []}
    out = options.out or timing.RESULTS / f"compiled_{options.pair}_{options.chip}.json"
    for classes in options.classes:
        for name in options.methods:
            row = measure(target, options.pair, name.split("+"), batch=options.batch, classes=classes)
            report["cases"].append({"classes": classes, "method": name} | row)
            print(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in report["cases"][-1].items()
                ),
                flush=True,
            )
    timing.write(report, out)


if __name__ == "__main__":
    main()
