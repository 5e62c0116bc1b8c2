"""How long the devices wait for the host between training steps, from a profiler's trace of the real loop.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_gap
    python -m benchmarks.bench_gap --trace runs/NAME/profile          # of any run with --config.profile=50

The first form trains CIFAR's resnet8x4 -> resnet8 with WKD-L + WKD-F on digits, logging as usual, and traces steps
between two checkpoints. The gap is the time between the first program's start and the last one's end in which the first
device executes no program.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import jax

from benchmarks import timing
from wkd_jax import config as config_lib
from wkd_jax.training import loop, workdir

Interval = tuple[float, float]
WHOLE_PROGRAM = "ThunkExecutor::Execute (wait for completion)"  # what JAX's CPU client calls one execution


def train(directory: pathlib.Path, steps: int) -> pathlib.Path:
    """A short run that leaves a trace; where."""
    model = {"name": "resnet8x4"}
    base = {"data": {"name": "digits"}, "global_batch_size": 128, "eval_every": 1000, "checkpoint_every": 10_000}
    teacher = config_lib.resolve({**base, "epochs": 1, "student": model})
    loop.run(teacher, directory / "teacher", None)
    student = {
        **base,
        "epochs": 8,
        "student": {"name": "resnet8"},
        "teacher": {"run": str(directory / "teacher")},
        "methods": {"wkd_l": {}, "wkd_f": {"grid": 1, "student_tap": "stage2", "teacher_tap": "stage2"}},
        "profile": steps,
    }
    loop.run(config_lib.resolve(student), directory / "student", directory / "teacher")
    return directory / "student" / workdir.PROFILE


def programs(trace: pathlib.Path) -> tuple[list[Interval], int]:
    """Executions of programs in a trace, (start, end) in nanoseconds each, and how many training steps it holds.

    Raises:
      ValueError: If there is no trace, more than one (of several sessions or processes), or no program in it.
    """
    files = sorted(trace.glob("**/*.xplane.pb"))
    if len(files) != 1:
        raise ValueError(f"{trace}: holds {len(files)} traces (*.xplane.pb): name the directory of one")
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(files[0])).planes}
    accelerators = sorted(name for name in planes if name.startswith("/device:") and list(planes[name].lines))
    lines = planes[accelerators[0] if accelerators else "/host:CPU"].lines
    found = [
        (event.start_ns, event.end_ns)
        for line in lines
        for event in line.events
        if line.name == "XLA Modules" or (not accelerators and event.name == WHOLE_PROGRAM)
    ]
    if not found:
        raise ValueError(f"{files[0]}: no program of a device in it")
    steps = [event for line in planes["/host:CPU"].lines for event in line.events if event.name == "train"]
    return found, len(steps)


def busy(intervals: list[Interval]) -> float:
    """Length of the union.

    Example:
      >>> busy([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
      4.0
    """
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def main() -> None:
    """Trains, unless given a trace; prints and writes the gap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=pathlib.Path, help="a run's profile directory; default: of a run of its own")
    parser.add_argument("--steps", type=int, default=60, help="to trace, without --trace")
    parser.add_argument("--out", type=pathlib.Path, help="JSON (default: results/gap_<platform>.json)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, steps = programs(options.trace or train(pathlib.Path(folder), options.steps))
    span = max(end for _, end in found) - min(start for start, _ in found)
    report = {
        "benchmark": "host gap",
        "machine": timing.machine("jaxlib"),
        "steps": steps,
        "programs": len(found),
        "step_ms": span / steps / 1e6,
        "gap_ms_a_step": (span - busy(found)) / steps / 1e6,
        "gap": 1 - busy(found) / span,
    }
    print(f"{report['step_ms']:.2f} ms a step, of which {report['gap']:.2%} without a program")
    timing.write(report, options.out or timing.RESULTS / f"gap_{jax.default_backend()}.json")


if __name__ == "__main__":
    main()
