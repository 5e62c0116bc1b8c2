"""`--check`: all of a run but the training, so that a mistake costs seconds and not an hour of a pod."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from wkd_jax.data.base import DataSet, Input, cores
from wkd_jax.training import build, processes, workdir
from wkd_jax.training import teacher as teacher_lib
from wkd_jax.training.build import Plan
from wkd_jax.training.progress import duration, number

UTILISATION = 0.4  # assumed share of the speed of a large matrix product that a step reaches
_SECONDS = 15.0  # that the input is measured for, after as long to start its workers


def report(config: Mapping[str, Any], directory: pathlib.Path, teacher_directory: pathlib.Path | None) -> str:
    """What a run would be, for a person. Compiles the train step; trains nothing, and writes to the user's cache alone.

    Args:
      config: Resolved.
      directory: The run's work directory.
      teacher_directory: See `loop.run`. It need not hold a run yet.

    Raises:
      ValueError: For anything in the config that cannot work.
      OSError: If weights or data are not there.
    """
    teacher = None
    if config["teacher"] and config["teacher"]["run"]:
        known = processes.everywhere(lambda: build.data_set(config["data"]))
        teacher = teacher_lib.load(config, teacher_directory, known).network
    plan = processes.everywhere(lambda: build.plan(config, teacher=teacher))
    data, clock = plan.data, plan.program.clock
    processes.agree("the data set", f"{data.num_examples} training images, content {data.fingerprint[:12]}")
    rate = _input_rate(config, plan)
    seconds, compiled = _compile(config, plan)
    memory, flops = compiled.memory_analysis(), compiled.cost_analysis()["flops"]
    flops *= config["accumulation"]  # the compiler counts a loop's body once
    state, frozen = (_device_bytes(tree) for tree in (plan.state, plan.frozen))
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    speed = matrix_speed(config["dtype"])
    compute = flops / (speed * UTILISATION)
    feed = config["global_batch_size"] / (rate * jax.process_count())
    step = max(compute, feed)
    device = jax.local_devices()[0]
    lines = {
        "run": f"{config['name']} in {directory}{_continues(directory)}",
        "devices": f"{jax.device_count()} x {device.device_kind} in {jax.process_count()} process(es), mesh "
        + " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items()),
        "data": f"{data.name}: {data.num_examples:,} training images of {len(data.class_names)} classes, "
        f"{data.image_size[0]} x {data.image_size[1]} pixels{_others(data)}, content {data.fingerprint[:12]}",
        "student": f"{config['student']['name']}, {plan.parameters['student']:,} parameters",
        "methods": f"{' + '.join(config['methods']) or 'none'}, {plan.parameters['methods']:,} parameters"
        + (", class similarity to be computed first" if plan.needs_similarity else ""),
        "teacher": f"{plan.teacher.name}, {plan.parameters['teacher']:,} parameters, {_origin(config)}"
        if plan.teacher
        else "none",
        "batch": f"{config['global_batch_size']} examples a step, "
        f"{config['global_batch_size'] // (plan.mesh.shape['data'] * config['accumulation'])} a device"
        + (f", {config['accumulation']} times a step" if config["accumulation"] > 1 else ""),
        "steps": f"{clock.total_steps:,} in {clock.epochs_done(clock.total_steps):.4g} epochs, {clock.steps(1):,} an "
        "epoch",
        "memory": f"{_gib(needed)} a device: student and optimizer {_gib(state)}, teacher and constants "
        f"{_gib(frozen)}, batch and activations {_gib(needed - state - frozen)}"
        + (f"; it has {_gib(limit)}" if limit else ""),
        "compute": f"{flops / 1e9:,.1f} GFLOP a step and device; compiled in {seconds:.1f} s",
        "input": f"{number(rate)} images/s on this host, {number(rate * jax.process_count())} in all",
        "time": f"about {duration(step * clock.total_steps)} without evaluation, {number(step)} s a step, bound by the "
        f"{'devices' if compute >= feed else 'input'} (devices {number(compute)} s at {UTILISATION:.0%} of this "
        f"device's {number(speed / 1e12)} TFLOP/s in matrix products; input {number(feed)} s)",
    }
    notes = [f"note: {note}" for note in (*data.notes, *plan.notes)]
    if limit and needed > limit:
        notes.append(
            "note: this does not fit. More devices along mesh.data, remat=True, sharding rules, dtype='bfloat16', "
            "accumulation or a smaller global_batch_size make it smaller"
        )
    return "\n".join([*(f"{key:8} {value}" for key, value in lines.items()), *notes, "check passed"]) + "\n"


def _compile(config: Mapping[str, Any], plan: Plan) -> tuple[float, Any]:
    """(seconds, the compiled train step)."""
    size, parts = config["global_batch_size"], config["accumulation"]
    lead, spec = ((size,), ("data",)) if parts == 1 else ((parts, size // parts), (None, "data"))
    batch = build.abstract_batch(lead, plan.data, NamedSharding(plan.mesh, PartitionSpec(*spec)))
    step = build.train_step(plan)
    started = time.monotonic()
    compiled = step.lower(plan.state, plan.frozen, batch).compile()
    return time.monotonic() - started, compiled


def _input_rate(config: Mapping[str, Any], plan: Plan) -> float:
    """Training images a second that this host reads, decodes and augments."""
    inputs = plan.data.training(
        global_batch_size=config["global_batch_size"] // config["accumulation"],
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    try:
        _draw(inputs)  # what workers make ahead while they start says nothing about their speed
        return _draw(inputs)
    finally:
        inputs.close()


def _draw(inputs: Input) -> float:
    """Images a second, over several batches of every core and a few seconds, whichever is over first."""
    started, images, batches = time.monotonic(), 0, 4 * cores()
    while batches and time.monotonic() - started < _SECONDS:
        images, batches = images + len(next(inputs).label), batches - 1
    return images / (time.monotonic() - started)


def matrix_speed(dtype: str) -> float:
    """FLOP/s of a large matrix product on one device, as activations have it."""
    size = 1024 if jax.local_devices()[0].platform == "cpu" else 8192
    matrix = jnp.ones((size, size), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    best = np.inf
    for _ in range(3):
        started = time.monotonic()
        multiply(matrix, matrix).block_until_ready()
        best = min(best, time.monotonic() - started)
    return 2 * size**3 / best


def _device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings that one device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _origin(config: Mapping[str, Any]) -> str:
    section = config["teacher"]
    return f"to be trained as {section['train']['name']}" if section["train"] else section["run"] or section["weights"]


def _continues(directory: pathlib.Path) -> str:
    if workdir.finished(directory):
        return ": it is finished, and the command will only show its report"
    steps = [int(path.name) for path in (directory / workdir.CHECKPOINTS).glob("*") if path.name.isdecimal()]
    return f": it goes on from step {max(steps)}" if steps else ""


def _others(data: DataSet) -> str:
    """What a person should know about memory and compilation where images come in several sizes."""
    count = len(data.canvases) - 1
    return f" (the largest of {count + 1} canvases: memory and compute are of it; each is compiled)" if count else ""


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
