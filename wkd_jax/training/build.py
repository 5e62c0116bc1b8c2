"""Builds a run from its config: data set, teacher, student, methods, optimizer, and where every array lives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from wkd_jax import registry
from wkd_jax.data.base import DataSet
from wkd_jax.models import functional
from wkd_jax.models.functional import Structure
from wkd_jax.training import optimizer, sharding
from wkd_jax.training.clock import Clock
from wkd_jax.training.step import Frozen, Learner, Program
from wkd_jax.types import ModelInfo, Params, Setup, TrainState


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that is only run: structure, arrays and what it publishes."""

    structure: Structure
    arrays: Params
    info: ModelInfo


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a training loop needs.

    Attributes:
      program: The static half.
      state: As initialised, on its shardings.
      frozen: On its shardings.
      mesh: The devices.
      num_classes: C.
      parameters: Trained parameters of the student, of the methods, and of the teacher (0 without one).
    """

    program: Program
    state: TrainState
    frozen: Frozen
    mesh: Mesh
    num_classes: int
    parameters: dict[str, int]

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, for restoring."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)


def data_set(config: Mapping[str, Any]) -> DataSet:
    """The data set of a config's `data` section."""
    return registry.get("data", config["name"])(**{key: value for key, value in config.items() if key != "name"})


def model(config: Mapping[str, Any], num_classes: int, dtype: str, seed: int) -> nnx.Module:
    """A freshly initialised network of a config's `student` section."""
    arguments = {key: value for key, value in config.items() if key != "name"}
    factory = registry.get("models", config["name"])
    return factory(num_classes, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed), **arguments)


def network(config: Mapping[str, Any], num_classes: int, dtype: str, arrays: Params) -> Network:
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
    return Network(structure, arrays, module.info)


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
    sharding.check_batch(config["global_batch_size"], mesh)
    clock = Clock(len(data.labels), config["global_batch_size"], config["epochs"])
    num_classes = len(data.class_names)
    student = model(config["student"], num_classes, config["dtype"], config["seed"])
    if teacher and teacher.info.num_classes != num_classes:
        raise ValueError(
            f"the teacher {teacher.info.name} has {teacher.info.num_classes} classes, the data set {data.name} has "
            f"{num_classes}: choose a teacher trained on this data set"
        )
    setup = Setup(
        student=student.info,
        teacher=teacher.info if teacher else None,
        image_size=data.image_size,
        global_batch_size=config["global_batch_size"],
        labels=data.labels,
        similarity=functools.cache(similarity),
    )
    methods = {
        name: registry.get("methods", name)(
            settings, setup, rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(config["seed"]), 1 + number))
        )
        for number, (name, settings) in enumerate(config["methods"].items())
    }
    structure, params, variables, constants = functional.split(Learner(student, methods))
    task = registry.get("tasks", config["task"]["name"])(config["task"], data.mean, data.std)
    schedule = optimizer.learning_rate(config["optimizer"], clock)
    update = optimizer.build(config["optimizer"], schedule, params)
    program = Program(
        learner=structure,
        teacher=teacher.structure if teacher else None,
        task=task,
        optimizer=update,
        learning_rate=schedule,
        clock=clock,
        seed=config["seed"],
        ema=config["ema"],
    )
    averaged = {name: leaf for name, leaf in {**params, **variables}.items() if name.startswith("student/")}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        opt_state=update.init(params),
        ema={name: leaf.copy() for name, leaf in averaged.items()} if config["ema"] else {},
    )
    state, frozen = jax.tree.map(
        jax.device_put,
        (state, Frozen(constants, teacher.arrays if teacher else {})),
        sharding.place((state, Frozen(constants, teacher.arrays if teacher else {})), mesh, config["sharding"]),
    )
    parameters = {
        "student": _size(functional.under(params, "student")),
        "methods": _size(functional.under(params, "methods")),
        "teacher": _size(_trained(teacher)) if teacher else 0,
    }
    return Run(program, state, frozen, mesh, num_classes, parameters)


def _trained(teacher: Network) -> Params:
    module = nnx.eval_shape(lambda: teacher.structure.merge(teacher.arrays))
    return functional.split(module)[1]


def _size(params: Params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in params.values())
