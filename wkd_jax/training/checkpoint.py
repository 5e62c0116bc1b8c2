"""Checkpoints of a run: written in the background, committed atomically, verified when read.

A directory of checkpoints holds one folder a step, named by the number. Each is written under a temporary name and
renamed when it is complete, so a run killed at any moment leaves whole checkpoints and at most one temporary folder,
which the next start removes. Reading compares every array with its fingerprint; a checkpoint that fails is renamed to
`<step>.damaged`, never deleted.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np

from wkd_jax.training import processes, sharding, snapshot
from wkd_jax.training.snapshot import DamagedError, Spec

_DELETING = ".deleting"
_DAMAGED = ".damaged"
_REPLACED = ".replaced"
_READABLE = ("params/", "variables/", "ema/")  # the flat dicts of a TrainState


class CheckpointError(OSError):
    """A checkpoint could not be written, or none of those on disk is whole. The message names directory and remedy."""


class Checkpoints:
    """The checkpoints of one run.

    With several processes, all of them construct it and call its methods in the same order, on a shared directory.

    Args:
      directory: Where they are; made if it does not exist. A path of a mounted file system.
      keep: How many of the last checkpoints stay. The best by metric stays besides.
      report: Called with one sentence when something is found wrong: a damaged or half-written checkpoint.

    Raises:
      CheckpointError: If the directory cannot be made or written.
      ValueError: If `keep` is below 1 or `directory` is a URL.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> state = {"params": {"fc/bias": jnp.arange(3.0)}, "step": jnp.int32(1)}
      >>> abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with Checkpoints(directory, report=print) as checkpoints:
      ...         checkpoints.save(1, state, {"input": {"position": 128}}, metric=71.5)
      ...     with Checkpoints(directory, report=print) as checkpoints:
      ...         restored, record = checkpoints.restore_latest(abstract)
      >>> restored["params"]["fc/bias"].tolist(), record
      ([0.0, 1.0, 2.0], {'input': {'position': 128}})
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 3, report: Callable[[str], None]) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint has to stay, or no run could be resumed")
        if "://" in str(directory):
            raise ValueError(f"{directory}: checkpoints need a path; mount the bucket (gcsfuse) and give its folder")
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._report = report
        self._metrics: dict[int, float | None] = {}  # of every finished checkpoint, by step
        self._pending: tuple[int, float | None, Any] | None = None
        self._open()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending. One still being written is not among them."""
        return sorted(self._metrics)

    def save(
        self,
        step: int,
        state: Any,
        record: dict[str, Any],
        *,
        metric: float | None = None,
        replace: bool = False,
    ) -> None:
        """Starts to save; waits for the save before it first. `state` may be donated as soon as this returns.

        Args:
          step: Steps done; later than every checkpoint in the directory.
          state: Pytree of non-empty `jax.Array`s, sharded in any way. No PRNG keys: store `jax.random.key_data`.
          record: JSON-able: position of the input, hash of the config, whatever else a resumed run needs. Process 0's
            is stored.
          metric: By which the best is chosen, higher is better, the earlier on ties. None or NaN is never best.
          replace: Whether it takes the place of the latest checkpoint, which is of this step: it was saved in haste,
            without its metric. That one stays until the new one is whole.

        Raises:
          CheckpointError: If this save could not start or the one before it failed: a full disk, missing permission.
            Finished checkpoints are untouched by that.
          ValueError: If there is a checkpoint of this step or a later one, or an array is empty.
          TypeError: If the state holds something else than arrays, or the record something that JSON has not.
        """
        self.wait()
        if replace:
            self._step_aside(step)
        if self._metrics and step <= max(self._metrics):
            raise ValueError(
                f"cannot save step {step}: {self._directory} already has step {max(self._metrics)}; "
                "resume from it, or use another work directory"
            )
        metric = None if metric is None else float(metric)
        try:
            response = snapshot.start_saving(self._directory / str(step), _named(state), record, metric)
        except OSError as error:
            raise self._failed(step, error) from error
        self._pending = (step, metric, response)

    def wait(self) -> None:
        """Waits for the save that runs in the background, then deletes the checkpoints that need not stay.

        Raises:
          CheckpointError: If that save failed.
        """
        if self._pending is None:
            return
        (step, metric, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:  # a full disk is a ValueError in TensorStore's words
            raise self._failed(step, error) from error
        self._metrics[step] = metric
        replaced = self._directory / f"{step}{_REPLACED}"
        if jax.process_index() == 0 and replaced.exists():
            shutil.rmtree(replaced)
        self._prune()

    def close(self) -> None:
        """Waits like `wait`. Leaving the `with` block does the same."""
        self.wait()

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest whole checkpoint. Damaged ones before it are reported and put aside.

        Args:
          abstract_state: Pytree of `jax.ShapeDtypeStruct` with shardings, of any number of devices: where each array
            goes.

        Returns:
          (state, record) as saved, bit for bit, or None if the directory never had a checkpoint.

        Raises:
          ValueError: If a checkpoint's arrays are not those of `abstract_state` (another config), naming them.
          CheckpointError: If there are checkpoints and all are damaged.
        """
        self.wait()
        return self._restore(sorted(self._metrics, reverse=True), abstract_state)

    def _open(self) -> None:
        """Makes the directory, shows that it can be written, clears what a killed run left, and reads the records."""

        def prepare() -> list[int]:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                pass
            self._clear()
            return _steps_on_disk(self._directory)

        try:
            steps = processes.first(prepare)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self._directory}: {error}. Make it writable, free space on its disk, "
                "or choose another work directory"
            ) from error
        for step in steps:  # as process 0 sees them: a file server shows others a new folder later
            _wait_for(self._directory / str(step))
            header, problem = _attempt(snapshot.read_header, self._directory / str(step))
            if problem:
                self._put_aside(step, problem)
            else:
                self._metrics[step] = header.metric

    def _clear(self) -> None:
        for path in sorted(self._directory.iterdir()):
            if snapshot.TEMPORARY in path.name:
                self._report(f"removed half-written checkpoint {path}: the run was stopped while it was being saved")
                shutil.rmtree(path)
            elif path.name.endswith(_REPLACED) and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))
            elif path.name.endswith((_DELETING, _REPLACED)):
                shutil.rmtree(path)

    def _restore(self, order: Iterable[int], abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        wanted = _named(abstract_state)
        if missing := [name for name, leaf in wanted.items() if getattr(leaf, "sharding", None) is None]:
            raise ValueError(f"abstract_state needs a sharding at every array; {missing[0]} has none")
        for step in order:
            path = self._directory / str(step)
            header, problem = _attempt(snapshot.read_header, path)
            if not problem:
                _check_fits(header.specs, {name: Spec.of(leaf) for name, leaf in wanted.items()}, path)
                arrays, problem = _attempt(snapshot.read_arrays, path, header)
            if problem:
                self._put_aside(step, problem)
                continue
            processes.agree(f"the content of checkpoint {step}", json.dumps(header.fingerprints, sort_keys=True))
            placed = [sharding.put(arrays[name], leaf.sharding) for name, leaf in wanted.items()]
            return jax.tree.unflatten(jax.tree.structure(abstract_state), placed), header.record
        if not self._metrics and (damaged := sorted(self._directory.glob(f"*{_DAMAGED}*"))):
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged: {', '.join(path.name for path in damaged)}. Put "
                "a good copy there under its step number, or move these away to start from the beginning"
            )
        return None

    def _put_aside(self, step: int, problem: str) -> None:
        path = self._directory / str(step)
        aside = path.with_name(path.name + _DAMAGED)
        while aside.exists():
            aside = aside.with_name(aside.name + "+")
        self._report(f"checkpoint {path} is damaged and not used: {problem}. It is kept as {aside.name}")
        self._metrics.pop(step, None)
        if jax.process_index() == 0:
            path.rename(aside)

    def _step_aside(self, step: int) -> None:
        """Makes room for another checkpoint of a step; `_clear` brings this one back if the other never comes."""
        self._metrics.pop(step)
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(self._directory / f"{step}{_REPLACED}")
        processes.gather(f"{step} has stepped aside")

    def _prune(self) -> None:
        stay = {*sorted(self._metrics)[-self._keep :], *_ranked(self._metrics)[:1]}
        for step in sorted(set(self._metrics) - stay):
            del self._metrics[step]
            if jax.process_index() != 0:
                continue
            path = self._directory / str(step)
            try:  # renamed first: a run killed while deleting leaves nothing that looks like a checkpoint
                shutil.rmtree(path.rename(path.with_name(path.name + _DELETING)))
            except OSError as error:  # the run can go on without the space
                self._report(f"could not delete the old checkpoint {path}: {error}")

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        left = f"the last good checkpoint is step {max(self._metrics)}" if self._metrics else "there is no earlier one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {snapshot.root_cause(error)}. "
            f"Nothing saved before is lost: {left}. Check free space and permissions there, then run the same command "
            "again"
        )


def read(
    directory: str | pathlib.Path, *, which: Literal["best", "latest"] = "best"
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Reads the arrays of another run (a teacher's) without its optimizer state. Changes nothing on disk.

    Args:
      directory: What that run gave to `Checkpoints`.
      which: The best by metric, or the latest.

    Returns:
      (tree, record): "params", "variables" and "ema", each a flat dict from name ("student/fc/bias") to host array,
      empty where the run had none.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      ValueError: If `which` is something else, or is "best" and no checkpoint has a metric.
      CheckpointError: If the chosen checkpoint is damaged. No other is taken instead: a run must know its teacher.
    """
    directory = pathlib.Path(directory).absolute()
    if which not in ("best", "latest"):
        raise ValueError(f'which={which!r}: "best" or "latest"')
    steps = _steps_on_disk(directory) if directory.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    try:
        if which == "best":
            ranked = _ranked({step: snapshot.read_header(directory / str(step)).metric for step in steps})
            if not ranked:
                raise ValueError(f'no checkpoint in {directory} has a metric: ask for "latest" instead of "best"')
            steps = ranked[:1]
        path = directory / str(steps[-1])
        header = snapshot.read_header(path)
        arrays = snapshot.read_arrays(path, header, [name for name in header.specs if name.startswith(_READABLE)])
    except DamagedError as damage:
        raise CheckpointError(f"{damage}. Choose another checkpoint of {directory}, or train again") from damage
    tree = {
        start[:-1]: {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
        for start in _READABLE
    }
    return tree, header.record


def _attempt(read_: Callable[..., Any], *inputs: Any) -> tuple[Any, str | None]:
    """(result, None), or (None, what is damaged). All processes come to one verdict, or they would part here."""
    result, problem = None, ""
    try:
        result = read_(*inputs)
    except DamagedError as damage:
        problem = str(damage) or "it is damaged"
    told = [(index, text) for index, text in enumerate(processes.gather(problem)) if text]
    if told and not problem:
        problem = f"process {told[0][0]} could not read it: {told[0][1]}"
    return (None, problem) if problem else (result, None)


def _wait_for(path: pathlib.Path, seconds: float = 60.0) -> None:
    """Until a folder that is there is seen here too."""
    end = time.monotonic() + seconds
    while not path.is_dir() and time.monotonic() < end:
        time.sleep(1)


def _steps_on_disk(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _ranked(metrics: dict[int, float | None]) -> list[int]:
    """Steps that have a metric, best first, the earlier first among equals."""
    known = {step: metric for step, metric in metrics.items() if metric is not None and not math.isnan(metric)}
    return sorted(known, key=lambda step: (-known[step], step))


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, "params/student/fc/bias", in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of the state have the same path once its parts are joined with '/'")
    return named


def _check_fits(stored: dict[str, Spec], wanted: dict[str, Spec], path: pathlib.Path) -> None:
    changed = [name for name, spec in wanted.items() if name in stored and stored[name] != spec]
    differences = {
        "missing from the checkpoint": [name for name in wanted if name not in stored],
        "unexpected in the checkpoint": [name for name in stored if name not in wanted],
        "of another shape or dtype": [
            f"{name} (saved {_words(stored[name])}, now {_words(wanted[name])})" for name in changed
        ],
    }
    if any(differences.values()):
        found = "; ".join(
            f"{len(names)} {what}: {snapshot.some(names)}" for what, names in differences.items() if names
        )
        raise ValueError(
            f"checkpoint {path} is of another config. Arrays {found}. Go back to the config it was made with, or use "
            "another work directory"
        )


def _words(spec: Spec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
