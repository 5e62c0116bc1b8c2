"""The ImageNet training step that benchmarks time, compile and count: the real program, noise for data and weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.data.base import OneSize
from wkd_jax.models import cost, functional
from wkd_jax.training import build, sharding
from wkd_jax.training.build import Network, Plan, Run
from wkd_jax.types import Batch, Normalisation

EXAMPLES = 1_281_167
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PAIRS = {
    "r34_r18": ("resnet34", "resnet18"),
    "r50_mv1": ("resnet50", "mobilenetv1"),
    "vits_r18": ("vit_small_patch16_224", "resnet18"),
}


class ImageNet(OneSize):
    """Stands for the data set: what a run asks of it before the first batch."""

    name = "imagenet"
    mean, std = NORMALISATION.mean, NORMALISATION.std
    num_examples = EXAMPLES
    fingerprint = "none"

    def __init__(self, image_size: int = 224, classes: int = 1000) -> None:
        self.side = image_size
        self.class_names = tuple(map(str, range(classes)))
        self.labels = np.arange(EXAMPLES, dtype=np.int32) % classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width), pixels."""
        return self.side, self.side


def config(
    pair: str,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    batch: int,
    dtype: str = "bfloat16",
    student: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """The resolved config of the paper's ImageNet recipe, less data and weights.

    Args:
      pair: Key of `PAIRS`.
      methods: Method -> settings other than its defaults, which are the released code's for r34_r18.
      batch: Images a step.
      dtype: Of the networks.
      student: Arguments of the student's network other than its defaults.
    """
    teacher, name = PAIRS[pair]
    needs_teacher = any(registry.get("methods", method).NEEDS_TEACHER for method in methods)
    optimizer = {"learning_rate": 0.1, "nesterov": True, "weight_decay": 1e-4}
    return config_lib.resolve(
        {
            "epochs": 100,
            "global_batch_size": batch,
            "dtype": dtype,
            "data": {"name": "digits"},  # resolved and then not used: `ImageNet` takes its place
            "student": {"name": name, **(student or {})},
            "teacher": {"weights": "none", "model": {"name": teacher}} if needs_teacher else None,
            "methods": methods,
            "optimizer": optimizer | {"schedule": "step", "milestones": (30, 60, 90)},
        }
    )


def planned(
    settings: Mapping[str, Any], data: ImageNet, devices: Sequence[jax.Device] | None = None, **changes: Any
) -> Plan:
    """The run of which nothing is computed.

    Args:
      settings: Of `config`.
      data: The stand-in.
      devices: Defaults to the first one.
      **changes: Keys of the config to replace, such as `mesh`.
    """
    settings = {**settings, "mesh": {"data": -1, "model": 1}, **changes}
    devices = jax.devices()[:1] if devices is None else devices
    return build.plan(settings, data=data, teacher=_teacher(settings, data, abstract=True), devices=devices)


def built(settings: Mapping[str, Any], data: ImageNet) -> Run:
    """The run with its arrays, on one device."""
    similarity = 0.5 + 0.5 * np.eye(len(data.class_names), dtype=np.float32)
    network = _teacher(settings, data, abstract=False)
    return build.run(settings, data, network, lambda: similarity, devices=jax.devices()[:1])


def _teacher(settings: Mapping[str, Any], data: ImageNet, *, abstract: bool) -> Network | None:
    """The untrained teacher of a config; shapes alone where `abstract`."""
    if not settings["teacher"]:
        return None
    model, classes, dtype = settings["teacher"]["model"], len(data.class_names), settings["dtype"]

    def arrays() -> Any:
        _, params, variables, _ = functional.split(build.model(model, classes, dtype, 0))
        return {**params, **variables}

    made = jax.eval_shape(arrays) if abstract else jax.jit(arrays)()
    return build.network(model, classes, dtype, made, NORMALISATION)


def batch_of(size: int, data: ImageNet) -> Batch:
    """Noise with labels, as loaded."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, *data.image_size, 3), np.uint8)
    label = rng.integers(0, len(data.class_names), size).astype(np.int32)
    return Batch(image, label, np.arange(size, dtype=np.int32), np.ones(size, bool))


def forward_macs(pair: str, image_size: int, classes: int) -> dict[str, int]:
    """Multiply-adds of one forward pass of each network of a pair, for one image."""

    def count(name: str) -> int:
        factory = registry.get("models", name)
        return cost.macs(nnx.eval_shape(lambda: factory(classes, rngs=nnx.Rngs(0))), (image_size, image_size))

    return dict(zip(("teacher", "student"), map(count, PAIRS[pair]), strict=True))


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
      memory_mb: What the compiler says that the device needs for it.
    """

    compiled: Any
    state: Any
    frozen: Any
    batch: Batch
    compile_s: float
    parameters: dict[str, int]
    memory_mb: float

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
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Step:
    """Builds and compiles the step of a pair with some methods, whose `settings` may differ from the defaults."""
    data = ImageNet(image_size, classes)
    chosen = {name: (settings or {}).get(name, {}) for name in methods}
    made = built(config(pair, chosen, batch=batch, dtype=dtype), data)
    images = sharding.global_batch(batch_of(batch, data), made.mesh)
    start = time.perf_counter()
    compiled = build.train_step(made).lower(made.state, made.frozen, images).compile()
    seconds = time.perf_counter() - start
    return Step(compiled, made.state, made.frozen, images, seconds, made.parameters, needed_mb(compiled))


def needed_mb(compiled: Any) -> float:
    """Memory of one device that a compiled program needs: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (size - memory.alias_size_in_bytes) / 1e6
