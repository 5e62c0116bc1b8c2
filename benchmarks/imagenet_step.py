"""The ImageNet training step that benchmarks time, compile and count: the real program, noise for data and weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from wkd_jax import config as config_lib
from wkd_jax.models import functional
from wkd_jax.training import build, sharding
from wkd_jax.training.build import Network, Plan, Run
from wkd_jax.types import Batch, Normalisation

EXAMPLES = 1_281_167
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PAIRS = {"r34_r18": ("resnet34", "resnet18"), "r50_mv1": ("resnet50", "mobilenetv1")}


class ImageNet:
    """Stands for the data set: what a run asks of it before the first batch."""

    name = "imagenet"
    mean, std = NORMALISATION.mean, NORMALISATION.std
    num_examples = EXAMPLES
    fingerprint = "none"

    def __init__(self, image_size: int = 224, classes: int = 1000) -> None:
        self.image_size = (image_size, image_size)
        self.class_names = tuple(map(str, range(classes)))
        self.labels = np.arange(EXAMPLES, dtype=np.int32) % classes


def config(
    teacher: str, student: dict[str, Any], methods: dict[str, Any], *, batch: int, dtype: str
) -> config_lib.ml_collections.ConfigDict:
    """The resolved config of the paper's ImageNet recipe, less data and weights."""
    return config_lib.resolve(
        {
            "epochs": 100,
            "global_batch_size": batch,
            "dtype": dtype,
            "data": {"name": "digits"},  # resolved and then not used: `ImageNet` takes its place
            "student": student,
            "teacher": {"weights": "none", "model": {"name": teacher}},
            "methods": methods,
            "optimizer": {
                "learning_rate": 0.1,
                "nesterov": True,
                "weight_decay": 1e-4,
                "schedule": "step",
                "milestones": (30, 60, 90),
            },
        }
    )


def teacher(settings: config_lib.ml_collections.ConfigDict, data: ImageNet, *, abstract: bool) -> Network:
    """The untrained teacher of a config; shapes alone where `abstract`."""
    model, classes, dtype = settings["teacher"]["model"], len(data.class_names), settings["dtype"]

    def arrays() -> Any:
        _, params, variables, _ = functional.split(build.model(model, classes, dtype, 0))
        return {**params, **variables}

    made = jax.eval_shape(arrays) if abstract else jax.jit(arrays)()
    return build.network(model, classes, dtype, made, NORMALISATION)


def planned(settings: config_lib.ml_collections.ConfigDict, data: ImageNet) -> Plan:
    """The run of which nothing is computed, on one device."""
    devices = jax.devices()[:1]
    return build.plan(settings, data=data, teacher=teacher(settings, data, abstract=True), devices=devices)


def built(settings: config_lib.ml_collections.ConfigDict, data: ImageNet) -> Run:
    """The run with its arrays, on one device."""
    similarity = 0.5 + 0.5 * np.eye(len(data.class_names), dtype=np.float32)
    network = teacher(settings, data, abstract=False)
    return build.run(settings, data, network, lambda: similarity, devices=jax.devices()[:1])


def batch_of(size: int, data: ImageNet) -> Batch:
    """Noise with labels, as loaded."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, *data.image_size, 3), np.uint8)
    label = rng.integers(0, len(data.class_names), size).astype(np.int32)
    return Batch(image, label, np.arange(size, dtype=np.int32), np.ones(size, bool))


@dataclasses.dataclass
class Step:
    """One compiled training step with the state that it carries.

    Attributes:
      compiled: The executable.
      state: Donated to each step and replaced by its result.
      frozen: As in training.
      batch: On the device.
      compile_s: Seconds that tracing and compiling took.
      parameters: Trained ones: student, methods, teacher.
      memory_mb: What the compiler says one device needs: arguments, temporaries.
    """

    compiled: Any
    state: Any
    frozen: Any
    batch: Batch
    compile_s: float
    parameters: dict[str, int]
    memory_mb: dict[str, float]

    def run(self) -> None:
        """One step, until it is done."""
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))


def variant(
    pair: str,
    methods: Sequence[str],
    *,
    batch: int,
    image_size: int = 224,
    classes: int = 1000,
    dtype: str = "bfloat16",
) -> Step:
    """Builds and compiles the step of a pair with methods at their default settings."""
    data = ImageNet(image_size, classes)
    settings = config(
        PAIRS[pair][0], {"name": PAIRS[pair][1]}, {name: {} for name in methods}, batch=batch, dtype=dtype
    )
    made = built(settings, data)
    images = sharding.global_batch(batch_of(batch, data), made.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, made.state)
    replicated = NamedSharding(made.mesh, PartitionSpec())
    step = jax.jit(made.program.train_step, donate_argnums=0, out_shardings=(shardings, replicated))
    start = time.perf_counter()
    compiled = step.lower(made.state, made.frozen, images).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    memory_mb = {
        "arguments": memory.argument_size_in_bytes / 1e6,
        "temporaries": memory.temp_size_in_bytes / 1e6,
    }
    return Step(compiled, made.state, made.frozen, images, seconds, made.parameters, memory_mb)
