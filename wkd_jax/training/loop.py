"""The one training loop, read from top to bottom: build, resume, step, watch, evaluate, save, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from wkd_jax import interrelation
from wkd_jax.data.base import DataSet
from wkd_jax.training import build, preemption, processes, sharding, workdir
from wkd_jax.training import teacher as teacher_lib
from wkd_jax.training.checkpoint import Checkpoints
from wkd_jax.training.metrics import MetricWriter
from wkd_jax.training.preemption import Notice, Preempted
from wkd_jax.training.progress import Progress, number
from wkd_jax.training.trace import WARM_UP, Trace
from wkd_jax.types import TrainState

PACKAGES = ("wkd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ott-jax", "numpy")


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says what happened, at which step, and what to do."""


class ProcessLostError(TrainingError):
    """Another process of the run is gone. The same command, given to all of them, goes on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
      evaluation: The last evaluation, as the task summarised it.
      best: The task's metric and the step of the best evaluation.
      seconds: Wall time over all sessions of the run.
    """

    evaluation: dict[str, Any]
    best: dict[str, float]
    seconds: float


def run(config: Mapping[str, Any], directory: pathlib.Path, teacher_directory: pathlib.Path | None) -> dict[str, Any]:
    """Trains the student of a resolved config, or goes on where an earlier call was stopped.

    Args:
      config: Resolved.
      directory: The work directory; made, or recognised as this run's own.
      teacher_directory: The finished run whose student is the teacher; None where the teacher's weights come from
        elsewhere, or there is no teacher.

    Returns:
      What `result.json` holds.

    Raises:
      ValueError: For anything in the config that cannot work, before compilation; or if the directory holds, or the
        teacher is, something else than when the run began.
      OSError: If the work directory cannot be written.
      TrainingError: If a loss term or the gradient is no longer finite, or the devices' memory does not suffice.
      Preempted: If the run was told to stop, and what it had done is saved.
    """
    with workdir.claim(directory, config), preemption.watch() as notice:
        data, teacher = processes.everywhere(lambda: build.data_set(config["data"])), None
        content = processes.everywhere(lambda: data.fingerprint)
        processes.agree("the data set", f"{data.num_examples} training images, content {content[:12]}")
        if processes.first(lambda: workdir.finished(directory)):
            result = processes.everywhere(lambda: workdir.read_json(directory / workdir.RESULT))
            _same_run(result["identity"], {"data": content}, directory)
            return result
        if config["teacher"]:
            teacher = teacher_lib.load(config, teacher_directory, data)
        identity = {"data": content, "teacher": teacher.fingerprint if teacher else None, "similarity": None}

        def similarity() -> np.ndarray:
            found = teacher.similarity(config, data, directory, between_batches=notice.check)
            identity["similarity"] = interrelation.hash_arrays({"similarity": found})
            return found

        built = build.run(config, data, teacher.network if teacher else None, similarity)
        notes = [f"data: {note}" for note in data.notes]
        notes += [f"teacher: {note}" for note in (teacher.notes if teacher else ())]
        notes += [f"student: {note}" for note in built.notes]
        with jax.transfer_guard("disallow"):
            outcome = _train(config, directory, data, built, identity, notes, notice)
        result = _result(config, data, built, teacher, outcome) | {"identity": identity}

        def write() -> None:
            for name, content in built.program.task.files(outcome.evaluation).items():
                workdir.write_json(directory / name, content)
            workdir.write_json(directory / workdir.RESULT, result)

        processes.first(write)
        return result


def explained(error: jax.errors.JaxRuntimeError, config: Mapping[str, Any]) -> TrainingError:
    """What a failure of the devices means for the person who started the run."""
    first_line = str(error).splitlines()[0][:300]
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
        return TrainingError(
            f"the devices' memory does not suffice ({first_line}). Of these, the first three leave the results as they "
            f"are: more devices along mesh.data; remat=True (now {config['remat']}); sharding rules over mesh.model "
            f"for large networks; dtype='bfloat16' (now {config['dtype']}); accumulation (now "
            f"{config['accumulation']}: BatchNorm sees one microbatch at a time); a smaller global_batch_size (now "
            f"{config['global_batch_size']}). `--check` shows what a setting needs"
        )
    if jax.process_count() > 1:
        return ProcessLostError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one: {first_line}. What was saved "
            "is whole: the same command, on all of them, goes on from there"
        )
    return TrainingError(f"the devices failed: {first_line}")


def _train(
    config: Mapping[str, Any],
    directory: pathlib.Path,
    data: DataSet,
    built: build.Run,
    identity: Mapping[str, Any],
    notes: list[str],
    notice: Notice,
) -> Outcome:
    """Trains to the end, or until `notice`. `notes` are sentences to show when there is something to show them on."""
    program, clock = built.program, built.program.clock
    replicated = NamedSharding(built.mesh, PartitionSpec())
    train_step = build.train_step(built)
    eval_step = jax.jit(sharding.on(built.mesh, program.eval_step), out_shardings=replicated)
    inputs = data.training(
        global_batch_size=config["global_batch_size"] // config["accumulation"],
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    eval_steps = {clock.steps(epoch) for epoch in range(config["eval_every"], clock.epochs, config["eval_every"])}
    eval_steps.add(clock.total_steps)
    metric = program.task.METRIC
    record: dict[str, Any] = {
        "step": 0,
        "evaluated": 0,
        "best": {},
        "seconds": 0.0,
        "unreadable": {},
        "identity": identity,
    }
    state, evaluation, started = built.state, None, time.monotonic()

    with contextlib.ExitStack() as stack:
        stack.callback(inputs.close)
        checkpoints = stack.enter_context(
            Checkpoints(directory / workdir.CHECKPOINTS, keep=config["keep"], report=notes.append)
        )
        if restored := checkpoints.restore_latest(built.abstract_state):
            state, saved = restored
            record |= saved
            _same_run(record["identity"], identity, directory)
            inputs.set_state(record["input"])
            data.note(record["unreadable"])
            notes.append(f"continuing from step {record['step']}")
        earlier = record["seconds"]
        writer = stack.enter_context(MetricWriter(directory, resume_step=record["step"]))
        progress = stack.enter_context(
            Progress(clock.total_steps, description=config["name"], start_step=record["step"])
        )
        trace = stack.enter_context(
            Trace(directory / workdir.PROFILE, first_step=record["step"] + 1, steps=config["profile"])
        )
        if config["profile"] and clock.total_steps - record["step"] <= WARM_UP:
            notes.append(f"no step is traced: fewer than {WARM_UP + 1} are left, and the first {WARM_UP} never are")
        watch = Watch(clock, writer, progress, log_every=config["log_every"], last_good=record["step"])

        def show_notes() -> None:
            while notes:
                progress.note(notes.pop(0))

        def evaluate(step: int) -> dict[str, Any] | None:
            """Metrics of the test split, written down; None if the run was told to stop before they were complete."""
            evaluation = _evaluate(eval_step, state, config, data, built, notice)
            if evaluation is None:
                return None
            scalars = _scalars(evaluation)
            watch.finite(step, {f"evaluation {name}": value for name, value in scalars.items()})
            writer.write(step, "eval", {"epoch": clock.epochs_done(step), **scalars})
            progress.note(f"step {step}: " + ", ".join(f"{name} {number(value)}" for name, value in scalars.items()))
            if not record["best"] or evaluation[metric] > record["best"][metric]:
                record["best"] = {metric: evaluation[metric], "step": step}
            record["evaluated"] = step
            return evaluation

        def save(step: int, *, replace: bool = False) -> None:
            nonlocal record
            writer.flush()
            record["unreadable"] = _unreadable(data)
            seconds = earlier + time.monotonic() - started
            record |= {"step": step, "input": inputs.get_state(), "seconds": seconds}
            measured = evaluation[metric] if evaluation and record["evaluated"] == step else None
            checkpoints.save(step, state, record, metric=measured, replace=replace)
            watch.last_good = step
            show_notes()

        def stop(step: int) -> None:
            checkpoints.wait()
            raise Preempted(f"stopped after step {step} of {clock.total_steps}, which is saved")

        show_notes()
        if record["step"] in eval_steps and record["evaluated"] < record["step"]:  # stopped before it was evaluated
            evaluation = evaluate(record["step"]) or stop(record["step"])
            save(record["step"], replace=True)
        for step in range(record["step"] + 1, clock.total_steps + 1):
            with trace.start(step):
                batch = sharding.microbatches(inputs, config["accumulation"], built.mesh)
                state, metrics = train_step(state, built.frozen, batch)
            trace.stop(step, metrics)
            watch.add(step, metrics)
            told = notice.received()
            due = step in eval_steps or step % config["checkpoint_every"] == 0
            if told or due:
                watch.check()
            elif (step - 1) % config["log_every"] == 0:
                watch.check(newest=False)  # the devices work on this step while the host writes down the one before
            if step in eval_steps and not told:
                evaluation = evaluate(step)
                told = evaluation is None
            if told or due:
                save(step)
            if told:
                stop(step)
        checkpoints.wait()  # a last write that failed is an error here, not a traceback on the way out
        if evaluation is None:  # Stopped after the last checkpoint and before the result: only this is left.
            evaluation = _evaluate(eval_step, state, config, data, built, notice) or stop(record["step"])
    return Outcome(evaluation, record["best"], earlier + time.monotonic() - started)


class Watch:
    """Keeps the steps' metrics on the device until they are wanted, so that the host does not wait for every step.

    Attributes:
      last_good: The last step that was saved, for the message of a run that has to stop.
    """

    def __init__(self, clock: Any, writer: MetricWriter, progress: Progress, *, log_every: int, last_good: int) -> None:
        self.clock, self.writer, self.progress, self.log_every = clock, writer, progress, log_every
        self.last_good = last_good
        self.pending: list[tuple[int, Any]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of one step."""
        self.pending.append((step, metrics))

    def check(self, *, newest: bool = True) -> None:
        """Fetches what is pending, with or without the newest step; logs every `log_every`-th, shows the last one.

        Raises:
          TrainingError: If any value of any step is not finite; names the first such step and its terms.
        """
        cut = len(self.pending) - (not newest)
        pending, self.pending = jax.device_get(self.pending[:cut]), self.pending[cut:]
        if not pending:
            return
        for step, values in pending:
            values = {name: float(value) for name, value in values.items()}
            self.finite(step, values)
            if step % self.log_every == 0:
                self.writer.write(step, "train", {"epoch": self.clock.epochs_done(step), **values})
        self.progress.update(step, {name: value for name, value in values.items() if not name.endswith("/weight")})

    def finite(self, step: int, values: Mapping[str, float]) -> None:
        """Raises TrainingError if any value is not finite; names the step and all such values."""
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            kept = f"the checkpoint of step {self.last_good} is kept" if self.last_good else "no checkpoint was saved"
            raise TrainingError(
                f"step {step}: {bad[0]} is {values[bad[0]]} (not finite: {', '.join(bad)}); {kept}. Lower "
                "optimizer.learning_rate or the term's weight, or set optimizer.clip_norm"
                + (", in a new --workdir" if self.last_good else "")
            )


def _same_run(saved: Mapping[str, Any], now: Mapping[str, Any], directory: pathlib.Path) -> None:
    """Refuses to go on with another teacher, other data or other relations of classes than the run began with."""
    if changed := [name for name in now if saved.get(name) != now[name]]:
        raise ValueError(
            f"{directory}: the {' and the '.join(changed)} of this run changed since it began: restore what it began "
            "with, or start anew in another --workdir"
        )


def _evaluate(
    eval_step: Callable[..., Any],
    state: TrainState,
    config: Mapping[str, Any],
    data: DataSet,
    built: build.Run,
    notice: Notice,
) -> dict[str, Any] | None:
    """Metrics over the test split, each example once; None if the run was told to stop meanwhile."""
    batches = data.evaluation(
        "test",
        global_batch_size=config["global_batch_size"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    parts = []
    for batch in batches:
        if notice.received():
            return None
        parts.append(eval_step(state, built.frozen, sharding.global_batch(batch, built.mesh)))
    return built.program.task.summarise(jax.device_get(parts))


def _unreadable(data: DataSet) -> dict[str, str]:
    """Name and reason of every image that any process could not read; all of them count them alike.

    Raises:
      ValueError: If there are more than the config allows.
    """
    for text in processes.gather(json.dumps(dict(data.unreadable))):
        data.note(json.loads(text))
    return dict(data.unreadable)


def _scalars(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in evaluation.items() if isinstance(value, int | float)}


def _result(
    config: Mapping[str, Any],
    data: DataSet,
    built: build.Run,
    teacher: teacher_lib.Teacher | None,
    outcome: Outcome,
) -> dict[str, Any]:
    return {
        "name": config["name"],
        "methods": list(config["methods"]),
        "student": config["student"]["name"],
        "teacher": teacher.network.info.name if teacher else None,
        # None in a run without a teacher; the evaluation of one with a teacher has it.
        built.program.task.METRIC.replace("student", "teacher"): None,
        **_scalars(outcome.evaluation),
        "best": outcome.best,
        "image_size": data.image_size,
        "mean": data.mean,
        "std": data.std,
        "num_classes": len(built.program.task.class_names),
        "steps": built.program.clock.total_steps,
        "seconds": round(outcome.seconds, 1),
        "student_parameters": built.parameters["student"],
        "method_parameters": built.parameters["methods"],
        "teacher_parameters": built.parameters["teacher"],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "unreadable_images": sorted(_unreadable(data)),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "config": config.to_dict(),
    }


def _version(package: str) -> str:
    if package == "wkd_jax":
        from wkd_jax import __version__

        return __version__
    return importlib.metadata.version(package)
