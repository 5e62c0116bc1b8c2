"""What a train step sends between devices, computes and keeps, read from the program compiled for 8 to 1024 devices.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_scaling

The real `Program.train_step` (WKD-L + WKD-F, 224 px, 1000 classes, bfloat16 activations, SGD) is compiled for meshes of
simulated CPU devices; nothing runs, so one laptop core is enough. Collectives are counted twice: as the SPMD
partitioner emits them, before anything that depends on the kind of device (element types, bytes, where each comes
from), and as they are launched after XLA has combined them, which is CPU's choice. FLOPs and memory are those of one
device. `python -m benchmarks.scaling_times` prints the committed numbers with the time they take on named chips.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import re
import tempfile
import time

import jax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import imagenet_step
from benchmarks.scaling_times import RESULTS, sent
from wkd_jax.training import build

SIZES = (8, 64, 256, 1024)

# Settings of WKD-F that the teacher's tap allows; rules that cut the teacher's parameters over four devices.
PAIRS = {
    "resnet34 -> resnet18": ("r34_r18", {}, ((r"^teacher/layer\d/.*conv\d/kernel$", (None, None, None, "model")),)),
    "vit_small -> resnet18": (
        "vits_r18",
        {"grid": 1, "projector": "linear"},
        (
            (r"^teacher/blocks/.*(qkv|fc1)/kernel$", (None, "model")),
            (r"^teacher/blocks/.*(proj|fc2)/kernel$", ("model", None)),
        ),
    ),
}

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) (" + "|".join(KINDS) + r")(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def measure(pair: str, *, devices: int, batch: int, group: int | None, model: int, image_size: int, dtype: str) -> dict:
    """Compiles one case; what it sends, computes and keeps."""
    name, feature, rules = PAIRS[pair]
    methods = {"wkd_l": {}, "wkd_f": feature}
    settings = imagenet_step.config(name, methods, batch=batch, dtype=dtype, student={"norm_group_size": group})
    data = imagenet_step.ImageNet(image_size)
    sizes = {"data": devices // model, "model": model}
    chosen = rules if model > 1 else ()
    plan = imagenet_step.planned(settings, data, jax.devices()[:devices], mesh=sizes, sharding=chosen)
    inputs = build.abstract_batch(batch, data, NamedSharding(plan.mesh, PartitionSpec("data")))
    arrays = plan.state, plan.frozen
    step = build.train_step(plan)
    start = time.perf_counter()
    lowered = step.lower(*arrays, inputs)
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            compiler_options={
                "xla_backend_optimization_level": 0,
                "xla_llvm_disable_expensive_passes": True,
                "xla_dump_to": folder,
                "xla_dump_hlo_pass_re": "spmd.*",
                "xla_dump_hlo_as_text": True,
            }
        )
        (partitioned,) = pathlib.Path(folder).glob("*train_step*after_spmd-partitioning*.txt")
        emitted = collectives(partitioned.read_text())
    launched = collectives(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "pair": pair,
        "devices": devices,
        "mesh": sizes,
        "global_batch_size": batch,
        "norm_group_size": group,
        "image_size": image_size,
        "dtype": dtype,
        "trained_parameters": sum(math.prod(leaf.shape) for leaf in arrays[0].params.values()),
        "emitted": summary(emitted, devices, model),
        "launched": len(launched),
        "launched_elements": sum(c["elements"] for c in launched),
        "emitted_elements": sum(c["elements"] for c in emitted),
        "gflop_a_device": compiled.cost_analysis()["flops"] / 1e9,
        "gflop_an_image": lowered.cost_analysis()["flops"] / batch / 1e9,
        "memory_mb_a_device": {
            "state_and_constants": memory.argument_size_in_bytes / 1e6,
            "temporary_on_cpu": memory.temp_size_in_bytes / 1e6,
        },
        "compile_s": round(time.perf_counter() - start, 1),
    }


def collectives(text: str) -> list[dict]:
    """Every collective of a module's text: kind, types, elements, bytes, devices a group, source, and by which axis.

    Example:
      >>> line = '  %a = (bf16[3,2]{1,0}, f32[]) all-reduce(%x, %y), replica_groups=[2,4]<=[8], to_apply=%add'
      >>> [(c["kind"], c["dtype"], c["elements"], c["bytes"], c["group"]) for c in collectives(line)]
      [('all-reduce', 'bf16+f32', 7, 16, 4)]
    """
    frames, found = _Frames(text), []
    for line in text.splitlines():
        match = _COLLECTIVE.match(line)
        if not match:
            continue
        if match[4]:
            raise ValueError(f"asynchronous {match[3]}: its result type holds more than the result; not handled")
        arrays = [(kind, math.prod(map(int, filter(None, dims.split(","))))) for kind, dims in _ARRAY.findall(match[2])]
        found.append(
            {
                "kind": match[3],
                "arrays": len(arrays),
                "dtype": "+".join(sorted({kind for kind, _ in arrays})),
                "elements": sum(size for _, size in arrays),
                "bytes": sum(BYTES[kind] * size for kind, size in arrays),
                "group": _group_size(line),
                "source": _source(line, max(size for _, size in arrays), frames),
            }
        )
    return found


def _group_size(line: str) -> int:
    """Devices that take part in one collective together, in any of the notations of `replica_groups`."""
    if "source_target_pairs" in line:
        return 2
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([\w]+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    raise ValueError(f"replica_groups in a form that is not known: {line.strip()[:300]}")


class _Frames:
    """The Python functions that an instruction was traced in, from the tables at the head of a module's text."""

    def __init__(self, text: str) -> None:
        self.functions = dict(
            re.findall(r'^(\d+) "(.*)"$', text.partition("FunctionNames")[2].partition("\n\n")[0], re.M)
        )
        self.locations = dict(re.findall(r"^(\d+) \{.*?function_name_id=(\d+)", text, re.M))
        stack = re.findall(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}", text, re.M)
        self.stack = {frame: (location, parent) for frame, location, parent in stack}

    def of(self, line: str) -> list[str]:
        names, match = [], re.search(r"stack_frame_id=(\d+)", line)
        frame = match and match[1]
        while frame in self.stack:
            location, parent = self.stack[frame]
            names.append(self.functions.get(self.locations.get(location, ""), ""))
            frame = parent if parent != frame else None
        return names


def _source(line: str, largest: int, frames: _Frames) -> str:
    """What a collective is for."""
    names = frames.of(line)
    backward = "transpose(" in line.partition("metadata=")[2]
    if any(name.startswith(("BatchNorm.", "_normalise")) for name in names):
        return "BatchNorm, backward" if backward else "BatchNorm, forward"
    if largest == 1:
        return "losses and metrics"
    if "Program.run_teacher" in names:
        return "teacher"
    return "gradients" if backward else "other"


def summary(found: list[dict], devices: int, model: int) -> list[dict]:
    """Rows of (kind, axis, source, dtype) with their number, payload and what a ring sends for it."""
    axes = {devices: "all", devices // model: "data", model: "model"} if model > 1 else {devices: "data"}
    rows: dict[tuple, dict] = {}
    for c in found:
        axis = axes.get(c["group"], f"{c['group']} devices")
        row = rows.setdefault((c["kind"], axis, c["source"], c["dtype"]), {"count": 0, "bytes": 0, "sent_bytes": 0.0})
        row["count"] += 1
        row["bytes"] += c["bytes"]
        row["sent_bytes"] += sent(c["kind"], c["bytes"], c["group"])
    keys = ("kind", "axis", "source", "dtype")
    return [dict(zip(keys, key, strict=True)) | row for key, row in sorted(rows.items())]


def cases() -> list[dict]:
    """What is compiled."""
    plain, rows = {"group": None, "model": 1, "dtype": "bfloat16"}, []
    for pair in PAIRS:
        for devices in SIZES:
            weak = plain | {"pair": pair, "devices": devices, "batch": 32 * devices}
            rows += [weak, weak | {"group": 32}]
        rows += [plain | {"pair": pair, "devices": devices, "batch": 1024} for devices in SIZES]
        rows.append(plain | {"pair": pair, "devices": 64, "batch": 2048, "model": 4})
    first = plain | {"pair": next(iter(PAIRS))}
    rows.append(first | {"devices": 256, "batch": 1024, "group": 32})  # groups that span eight devices
    rows.append(first | {"devices": 64, "batch": 2048, "dtype": "float32"})
    return rows


def main() -> None:
    """Compiles every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to compile; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(SIZES))
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program would leave no dump to read
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    report = {"benchmark": "one train step, compiled for simulated devices", "versions": versions, "cases": []}
    todo = cases()
    for number in options.only or range(len(todo)):
        row = measure(**todo[number], image_size=options.image_size)
        report["cases"].append(row)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{number + 1}/{len(todo)}: {row['pair']}, {row['devices']} devices: {row['compile_s']} s", flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
