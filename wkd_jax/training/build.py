"""Builds a run from its config: data set, teacher, student, methods, optimizer, and where every array lives."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wkd_jax import config as config_lib
from wkd_jax import interrelation, registry, weights
from wkd_jax.data.base import DataSet
from wkd_jax.models import functional
from wkd_jax.models.functional import Structure
from wkd_jax.training import optimizer, sharding
from wkd_jax.training.clock import Clock
from wkd_jax.training.step import Frozen, Learner, Program, named_key
from wkd_jax.types import Batch, ModelInfo, Normalisation, Params, Setup, Task, TrainState


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that is only run: structure, arrays, what it publishes, and how it wants its images."""

    structure: Structure
    arrays: Params
    info: ModelInfo
    normalisation: Normalisation


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a training loop needs.

    Attributes:
      program: The static half.
      state: As initialised, on its shardings.
      frozen: On its shardings.
      mesh: The devices.
      parameters: Trained parameters of the student, of the methods, and of the teacher (0 without one).
      notes: What happened to weights on the way in, a sentence each.
    """

    program: Program
    state: TrainState
    frozen: Frozen
    mesh: Mesh
    parameters: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, for restoring."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)


_shared: dict[str, DataSet] | None = None  # within `shared_data_sets`: `data` section as JSON -> data set


@contextlib.contextmanager
def shared_data_sets() -> Iterator[None]:
    """Within it, each data set is opened once.

    A run and its teacher's mostly have the same, and are checked before either starts; reading a set into memory may
    take longer than that. Kept no longer than the block, since files may change.
    """
    global _shared
    before, _shared = _shared, {}
    try:
        yield
    finally:
        _shared = before


def data_set(config: Mapping[str, Any]) -> DataSet:
    """The data set of a config's `data` section."""
    key = config_lib.to_json(config)
    if _shared is not None and key in _shared:
        return _shared[key]
    arguments = {name: value for name, value in config.items() if name != "name"}
    opened = registry.get("data", config["name"])(**arguments)
    if _shared is not None:
        _shared[key] = opened
    return opened


def model(config: Mapping[str, Any], num_classes: int, dtype: str, seed: int) -> nnx.Module:
    """A freshly initialised network of a config's `student` section."""
    arguments = {key: value for key, value in config.items() if key != "name"}
    factory = registry.get("models", config["name"])
    return factory(num_classes, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed), **arguments)


def network(
    config: Mapping[str, Any], num_classes: int, dtype: str, arrays: Params, normalisation: Normalisation
) -> Network:
    """A trained network: the structure of `config`, the arrays of a checkpoint.

    Raises:
      ValueError: If the arrays are not those of this architecture; lists the first differences.
    """
    module = nnx.eval_shape(lambda: model(config, num_classes, dtype, 0))
    structure, params, variables, _ = functional.split(module)
    wanted = {name: leaf.shape for name, leaf in {**params, **variables}.items()}
    found = {name: leaf.shape for name, leaf in arrays.items()}
    if wanted != found:
        wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        first = "; ".join(f"{name}: {found.get(name)} instead of {wanted.get(name)}" for name in wrong[:3])
        raise ValueError(f"the arrays are not those of {config['name']} with {num_classes} classes: {first}")
    return Network(structure, arrays, module.info, normalisation)


def pretrained(config: Mapping[str, Any], data: DataSet) -> tuple[Network, list[str]]:
    """The network of `teacher.weights`, and sentences about what happened to its weights on the way in.

    Raises:
      ValueError: If the weights are not of the network that the config or the file names; lists what does not fit.
      OSError: If the file is not there, or cannot be downloaded.
    """
    section, classes = config["teacher"], len(task(config, data).class_names)
    file = weights.open_file(section["weights"])
    described = section["model"] or (file.model and config_lib.model_section(file.model, file.source))
    if not described:
        raise ValueError(
            f"teacher.model is not set, and {file.source} does not say which network it is of. Valid names: "
            + ", ".join(registry.entries("models"))
        )
    arrays, notes = file.arrays(nnx.eval_shape(lambda: model(described, classes, config["dtype"], 0)))
    normalisation = file.normalisation
    if section["normalisation"]:
        normalisation = Normalisation(**section["normalisation"])
    elif normalisation is None:
        normalisation = Normalisation(data.mean, data.std)
        notes.append("fed like the data set: neither the file nor teacher.normalisation says how its images were")
    return network(described, classes, config["dtype"], arrays, normalisation), notes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run of which nothing was computed: what `Run` holds, arrays as shapes with shardings.

    Attributes:
      program: The static half.
      state: Abstract.
      frozen: Abstract.
      mesh: The devices.
      data: The data set.
      teacher: What the teacher publishes; None in a run without one.
      parameters: See `Run`.
      notes: See `Run`.
      needs_similarity: Whether a method asked for the class similarity, and it has to be computed.
    """

    program: Program
    state: TrainState
    frozen: Frozen
    mesh: Mesh
    data: DataSet
    teacher: ModelInfo | None
    parameters: dict[str, int]
    notes: tuple[str, ...]
    needs_similarity: bool


def plan(
    config: Mapping[str, Any],
    *,
    data: DataSet | None = None,
    teacher: Network | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Plan:
    """Refuses what cannot work in a config, its teacher's included, before anything is trained or compiled.

    Everything is built, but abstractly: no parameter is computed. Files of weights are read, since a wrong one is to be
    known before hours are spent on a teacher.

    Args:
      config: Resolved.
      data: Defaults to the config's.
      teacher: Of a config whose `teacher.run` is an earlier run, or in place of its `teacher.weights`.
      devices: Defaults to all devices of all processes.

    Raises:
      ValueError: As `run`.
      OSError: If a file of weights is not there, or cannot be downloaded.
    """
    data, notes = data_set(config["data"]) if data is None else data, []
    if config["teacher"] and config["teacher"]["train"]:
        teacher = _future(config["teacher"]["train"], config["dtype"])
    elif config["teacher"] and config["teacher"]["weights"] and not teacher:
        teacher, notes = pretrained(config, data)
    mesh = sharding.make_mesh(config["mesh"], devices)
    _check_batch(config, data, mesh)
    asked, names = [], task(config, data).class_names
    interrelation.structure.check_groups(config["interrelation"]["groups"], names)

    def similarity() -> np.ndarray:
        if file := config["interrelation"]["file"]:
            found = interrelation.load_file(pathlib.Path(file), names)
            return interrelation.rescaled(found, config["interrelation"]["mean_distance"])
        asked.append(True)
        return 0.5 + 0.5 * np.eye(len(names), dtype=np.float32)  # in place of the one to be computed

    learner = nnx.eval_shape(lambda: _learner(config, data, teacher.info if teacher else None, similarity))
    notes += _initial(config, data, learner.student)[1]
    program, *arrays = _assemble(config, data, teacher, learner)
    arrays = tuple(arrays)
    loaded = abstract_batch(config["global_batch_size"] // config["accumulation"], data)
    jax.eval_shape(program.task.augment, loaded, jax.random.key(0))  # refuses groups that do not divide the batch
    shardings = sharding.place(arrays, mesh, config["sharding"], _preferred(learner))
    state, frozen = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arrays, shardings
    )
    info = teacher.info if teacher else None
    counted = _count(state.params, teacher)
    return Plan(program, state, frozen, mesh, data, info, counted, tuple(notes), bool(asked))


def abstract_batch(size: int | tuple[int, ...], data: DataSet, sharding: Any = None) -> Batch:
    """The shape of a batch as loaded: `size` examples, or several such along leading axes."""
    lead = (size,) if isinstance(size, int) else size
    return jax.tree.map(
        lambda one: jax.ShapeDtypeStruct((*lead, *one.shape), one.dtype, sharding=sharding), data.example
    )


def check(config: Mapping[str, Any]) -> None:
    """Refuses what cannot work, as `plan` does; a teacher that is an earlier run is met by `run`."""
    if not (config["teacher"] and config["teacher"]["run"]):
        plan(config)


def _future(config: Mapping[str, Any], dtype: str) -> Network:
    """The student of a run that is still to be made, checked like any other; its arrays are shapes."""
    made = plan(config)
    module = nnx.eval_shape(lambda: model(config["student"], len(made.program.task.class_names), dtype, 0))
    structure, params, variables, _ = functional.split(module)
    return Network(structure, {**params, **variables}, module.info, made.program.student_input)


def task(config: Mapping[str, Any], data: DataSet) -> Task:
    """The task of a config.

    Raises:
      ValueError: If the data set is for another one, or a setting is out of range.
    """
    if config["task"]["name"] != data.task:
        raise ValueError(
            f"task.name={config['task']['name']!r}: the data set {data.name} is for {data.task}; set task.name="
            f"{data.task!r}, or choose another data.name"
        )
    return registry.get("tasks", config["task"]["name"])(config["task"], data)


def run(
    config: Mapping[str, Any],
    data: DataSet,
    teacher: Network | None,
    similarity: Callable[[], np.ndarray],
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Builds the run of a resolved config.

    Args:
      config: Resolved.
      data: The data set.
      teacher: None for a run without one.
      similarity: See `Setup.similarity`.
      devices: Defaults to all devices of all processes.

    Raises:
      ValueError: For anything in the config that does not fit, before any compilation.
    """
    mesh = sharding.make_mesh(config["mesh"], devices)
    _check_batch(config, data, mesh)
    learner = _learner(config, data, teacher.info if teacher else None, similarity)
    initial, notes = _initial(config, data, learner.student)
    functional.update(learner.student, initial)
    program, *arrays = _assemble(config, data, teacher, learner)
    placed = sharding.place(tuple(arrays), mesh, config["sharding"], _preferred(learner))
    state, frozen = jax.tree.map(sharding.put, tuple(arrays), placed)
    return Run(program, state, frozen, mesh, _count(state.params, teacher), tuple(notes))


def train_step(made: Run | Plan) -> Any:
    """The jitted train step (state, frozen, batch) -> (state, metrics) of a run or a plan: how the loop runs it.

    The state is donated and keeps its places; metrics are on every device.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, made.state)
    replicated = NamedSharding(made.mesh, PartitionSpec())
    return jax.jit(
        sharding.on(made.mesh, made.program.train_step), donate_argnums=0, out_shardings=(shardings, replicated)
    )


def _check_batch(config: Mapping[str, Any], data: DataSet, mesh: Mesh) -> None:
    """Refuses a batch that the devices, or the microbatches of a step, cannot share."""
    sharding.check_batch(config["global_batch_size"], config["accumulation"], mesh)
    if config["accumulation"] > 1 and len(data.canvases) > 1:
        raise ValueError(
            f"accumulation={config['accumulation']}: the microbatches of a step must have images of one shape, and "
            f"those of {data.name} have one of {len(data.canvases)} canvases: give data.canvases one, or set "
            "accumulation=1"
        )


def _assemble(
    config: Mapping[str, Any], data: DataSet, teacher: Network | None, learner: Learner
) -> tuple[Program, TrainState, Frozen]:
    """A run's program and arrays; shapes, where those of the learner and the teacher are."""
    clock = _clock(config, data)
    structure, params, variables, constants = functional.split(learner)
    schedule = optimizer.learning_rate(config["optimizer"], clock)
    update = optimizer.build(config["optimizer"], schedule, params)
    program = Program(
        learner=structure,
        teacher=teacher.structure if teacher else None,
        student_input=Normalisation(data.mean, data.std),
        teacher_input=teacher.normalisation if teacher else None,
        task=task(config, data),
        optimizer=update,
        learning_rate=schedule,
        clock=clock,
        ema=config["ema"],
        accumulation=config["accumulation"],
    )

    def start(params: Params, variables: Params) -> TrainState:
        averaged = {name: leaf for name, leaf in {**params, **variables}.items() if name.startswith("student/")}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            variables=variables,
            opt_state=update.init(params),
            ema={name: leaf.copy() for name, leaf in averaged.items()} if config["ema"] else {},
        )

    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params.values())
    state = jax.eval_shape(start, params, variables) if abstract else start(params, variables)
    return program, state, Frozen(constants, teacher.arrays if teacher else {}, np.asarray(config["seed"], np.int32))


def _preferred(learner: Learner) -> list[sharding.Rule]:
    """Where the methods would have their large variables."""
    return [
        (f"^methods/{name}/.*(?:{pattern})", spec)
        for name, method in learner.methods.items()
        for pattern, spec in getattr(method, "SHARDING", ())
    ]


def _count(params: Params, teacher: Network | None) -> dict[str, int]:
    """Trained parameters of each part."""
    return {
        "student": _size(functional.under(params, "student")),
        "methods": _size(functional.under(params, "methods")),
        "teacher": _size(_trained(teacher)) if teacher else 0,
    }


def _clock(config: Mapping[str, Any], data: DataSet) -> Clock:
    if config["steps"]:
        return Clock.of_steps(data.num_examples, config["global_batch_size"], config["steps"])
    return Clock(data.num_examples, config["global_batch_size"], config["epochs"])


def _initial(config: Mapping[str, Any], data: DataSet, student: nnx.Module) -> tuple[Params, list[str]]:
    """The arrays that the student starts with instead of random ones, and sentences about where they come from."""
    if not config["init"]["weights"]:
        return {}, []
    file = weights.open_file(config["init"]["weights"])
    arrays, notes = file.arrays(student, reset_head=config["init"]["reset_head"], whole=False)
    if file.normalisation not in (None, Normalisation(data.mean, data.std)):
        notes.append(f"fed like the data set, and its weights were made with {file.normalisation}")
    return arrays, notes


def _learner(
    config: Mapping[str, Any], data: DataSet, teacher: ModelInfo | None, similarity: Callable[[], np.ndarray]
) -> Learner:
    """Student and methods, freshly initialised. What is drawn for one does not depend on the others."""
    num_classes = len(task(config, data).class_names)
    student = model(config["student"], num_classes, config["dtype"], config["seed"])
    student.remat = config["remat"]
    if teacher and teacher.num_classes != num_classes:
        raise ValueError(
            f"the teacher {teacher.name} has {teacher.num_classes} classes, the data set {data.name} has "
            f"{num_classes}: choose a teacher trained on this data set"
        )
    for side, info in (("student", student.info), ("teacher", teacher)):
        if info and info.task != config["task"]["name"]:
            raise ValueError(
                f"the {side} {info.name} is a network for {info.task}, and task.name={config['task']['name']!r}: set "
                f"task.name={info.task!r} and data to match, or choose another {side}"
            )
        if info and info.image_size not in (None, data.image_size):
            raise ValueError(
                f"the {side} {info.name} takes images of {info.image_size} alone and the data set {data.name} gives "
                f"{data.image_size}: set its image_size, or the data set's"
            )
    for name in config["methods"]:
        wanted = getattr(registry.get("methods", name), "TASK", student.info.task)
        if wanted != student.info.task:
            raise ValueError(
                f"methods.{name}: is for {wanted}, and the student {student.info.name} is a network for "
                f"{student.info.task}; choose another method"
            )
    setup = Setup(
        student=student.info,
        teacher=teacher,
        image_size=data.image_size,
        global_batch_size=config["global_batch_size"] // config["accumulation"],
        epochs=_clock(config, data).epochs,
        labels=lambda: data.labels,
        similarity=functools.cache(similarity),
    )
    key = jax.random.key(config["seed"])
    methods = {
        name: registry.get("methods", name)(settings, setup, rngs=nnx.Rngs(named_key(key, f"methods/{name}")))
        for name, settings in config["methods"].items()
    }
    return Learner(student, methods)


def _trained(teacher: Network) -> Params:
    module = nnx.eval_shape(lambda: teacher.structure.merge(teacher.arrays))
    return functional.split(module)[1]


def _size(params: Params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in params.values())
