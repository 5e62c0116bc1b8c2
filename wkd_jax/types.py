"""The contracts that hold the package together: what flows between its parts, and nothing else.

A `Batch` goes into a `Task`, which runs student and teacher; their `Outputs` go to the task's and the methods'
`terms`; the train step alone weighs, averages and differentiates those `Term`s. Imports jax and numpy only, so that
any part of the package may import this file. Shapes: B batch, C classes, D channels, H, W positions, N tokens,
R regions of interest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

Array = jax.Array
Params = dict[str, Array]  # flat: "student/layer1/0/conv1/kernel" -> array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One global batch.

    Attributes:
      image: [B, H, W, 3], uint8 as loaded and augmented; float32, normalised, once made a network's input.
      label: [B] int32, or [B, C] float32 once labels were mixed; of detection [B, M] int32, one a box, -1 for padding.
      index: [B] int32, position of each example in its data set (memory banks address by it).
      valid: [B] bool, False for padding, which training batches never have, and for images that could not be read.
      extra: What one task adds, such as the padded boxes of a detection batch.
    """

    image: Array
    label: Array
    index: Array
    valid: Array
    extra: dict[str, Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model returns.

    Attributes:
      logits: [B, C], or [B, R, C] where each image has several rows.
      taps: Named intermediate features, NHWC or [B, N, D], as the model's `ModelInfo` says.
      pooled: [B, D], the classifier's input.
      positions: [B, H, W, D], the map that `pooled` is the mean of over its positions: behind the last norm and ReLU.
        None where it is not such a mean (`ModelInfo.mean_pooled`).
      preactivations: Some taps before their last ReLU, by the tap's name, as `Tap.preactivation` says.
      valid: [B, R] bool, rows of `logits` that count; None where all do.
      extra: What one model family adds, such as proposals or class maps.
    """

    logits: Array
    taps: dict[str, Array] = dataclasses.field(default_factory=dict)
    pooled: Array | None = None
    positions: Array | None = None
    preactivations: dict[str, Array] = dataclasses.field(default_factory=dict)
    valid: Array | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tap:
    """A named feature of a model, known before the model is run.

    Attributes:
      channels: D.
      stride: Input pixels per position, along each side.
      layout: "NHWC" maps [B, H, W, D], or "tokens" [B, N, D].
      signed: Whether values may be negative (taken before a ReLU).
      prefix_tokens: Leading tokens that are not patches (a class token).
      size: (height, width) in positions where it does not follow from the image's (pooled regions); else None.
      rounding: Where the stride does not divide the image's side: "up", as padded convolutions do, or "down", as
        unpadded ones.
      preactivation: Whether `Outputs.preactivations` has it before its last ReLU.
    """

    channels: int
    stride: int
    layout: Literal["NHWC", "tokens"] = "NHWC"
    signed: bool = False
    prefix_tokens: int = 0
    size: tuple[int, int] | None = None
    rounding: Literal["up", "down"] = "up"
    preactivation: bool = False


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a model publishes about itself.

    Attributes:
      name: The registered name.
      num_classes: C.
      taps: In network order, name -> `Tap`.
      pooled: Channels of `Outputs.pooled`.
      classifier: Path of the classifier's kernel [D, C] inside the model, such as "fc/kernel".
      image_size: (height, width) where the network takes images of one size only (position embeddings); else None.
      mean_pooled: Whether `Outputs.positions` exists, so that the classifier can be applied at each position.
      task: Registered name of the task that the network is made for.
    """

    name: str
    num_classes: int
    taps: Mapping[str, Tap]
    pooled: int
    classifier: str
    image_size: tuple[int, int] | None = None
    mean_pooled: bool = False
    task: str = "classification"

    @property
    def last_tap(self) -> str:
        """Name of the last tap, the one most feature methods distil."""
        return list(self.taps)[-1]


class Model(Protocol):
    """A network: stem -> stages -> head. Implemented by Flax NNX modules; a Linen model needs a small adapter."""

    @property
    def info(self) -> ModelInfo:
        """The model's taps and sizes, without running it."""

    def __call__(self, image: Array, *, train: bool, rngs: Any = None, **inputs: Any) -> Outputs:
        """Runs the whole network on [B, H, W, 3] float images. `train` selects batch statistics and dropout.

        `inputs` are the extra inputs that the task names (a detector's boxes); classifiers take none.
        """

    def forward_from(self, tap: str, x: Any, *, train: bool, rngs: Any = None, **inputs: Any) -> Outputs:
        """Continues from the feature named `tap`: what follows it in the network, on `x` of that tap's shape.

        A network that joins several features (a pyramid) takes a dict of them, and the task's extra inputs if it needs
        any.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One named quantity of a step. The step alone reduces it: sum over `where` / count, in float32, global batch.

    Attributes:
      value: [B], [B, R] or [B, N]: one value an example (and row). A scalar where the quantity is of the whole batch.
      weight: Factor in the total loss, a number or a traced scalar. None: logged, not trained on.
      where: Bool mask of `value`'s shape. None: the examples that `Batch.valid` marks.
    """

    value: Array
    weight: Array | float | None = 1.0
    where: Array | None = None


Terms = dict[str, Term]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, as traced scalars, for schedules of loss weights.

    Attributes:
      step: int32, 0-based.
      epoch: int32, 1-based: the epoch that this step's first example belongs to.
      epochs: int32, epochs of the whole run.
    """

    step: Array
    epoch: Array
    epochs: Array


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """How a network wants its images: (image / 255 - mean) / std, per channel.

    Attributes:
      mean: Three floats; 1 is the full range.
      std: Likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Context:
    """All that a task or a method may look at in one training step.

    Attributes:
      batch: After augmentation, as the student is fed.
      teacher_batch: The same examples as the teacher is fed; None in a run without one.
      labels: int32, of the leading shape of `student.logits` (per image, or per region).
      student: The student's outputs; gradients flow.
      teacher: The teacher's outputs, stopped; None in a run without a teacher.
      student_model: Call it for a lens on the student, a fresh copy each time: parameters are differentiated; what a
        pass does to the copy's running statistics is thrown away, so extra passes through parts of it are safe.
      teacher_model: Call it for a lens on the teacher: parameters are constants, activations are differentiated.
        None in a run without a teacher.
      progress: For schedules.
      key: PRNG key of this step and this method.
    """

    batch: Batch
    teacher_batch: Batch | None
    labels: Array
    student: Outputs
    teacher: Outputs | None
    student_model: Callable[[], Model]
    teacher_model: Callable[[], Model] | None
    progress: Progress
    key: Array


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a method may know when it is built, before anything runs.

    Attributes:
      student: What the student publishes.
      teacher: What the teacher publishes; None in a run without a teacher.
      image_size: (height, width) of the training images, pixels.
      global_batch_size: Examples that a method sees at once, over all devices: those of a step, or of a microbatch.
      epochs: Of the whole run.
      labels: Call it to get the training labels in data-set order, [num_examples] int32 NumPy, for class-aware memory
        banks. The first call may take a pass over the data set.
      similarity: Call it to get the teacher's class similarity [C, C], float32 NumPy, as the run's `interrelation`
        config says. It is computed once, on the first call, and kept on disk.
    """

    student: ModelInfo
    teacher: ModelInfo | None
    image_size: tuple[int, int]
    global_batch_size: int
    epochs: int
    labels: Callable[[], np.ndarray]
    similarity: Callable[[], np.ndarray]


class Method(Protocol):
    """A way to distil: wiring between models and losses. One file in `methods/`, an `nnx.Module`.

    What it holds decides how it is treated: `nnx.Param` is trained with the student (connectors, learned
    temperatures), `nnx.BatchStat` and `Memory` are carried from step to step and checkpointed (running statistics,
    memory banks, constants fixed on the first batch), `Constant` is passed along and not checkpointed (a ground cost).
    None of it reaches the exported student.

    Attributes:
      DEFAULTS: Every key of the method's config with its default; a key that is not there is refused.
      NEEDS_TEACHER: False where the method distils a network into itself.
      TASK: Registered name of the one task that it is for, optional; others are refused.
      SHARDING: ((regex of its variables' paths, partition spec), ...), optional: where its large variables go, if no
        rule of the config places them and the mesh divides them.
    """

    DEFAULTS: Mapping[str, Any]
    NEEDS_TEACHER: bool

    def __init__(self, config: Any, setup: Setup, *, rngs: Any) -> None:
        """Builds connectors and memories from `setup`.

        Raises:
          ValueError: If the models cannot serve the method; the message names the reason and the remedy.
        """

    def terms(self, context: Context) -> Terms:
        """The method's loss terms in one step. May assign to its own variables (not to parameters)."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a training split has of each class, for class similarities.

    Attributes:
      label: [N] int32, the class of each sample.
      example: [N] int64, the training example that it is in.
      row: [N] int64, its row in what `Task.sample_outputs` gives for the example; None: an example is one sample.
    """

    label: np.ndarray
    example: np.ndarray
    row: np.ndarray | None = None


class Task(Protocol):
    """What differs between classification and detection, and only that. Built from (its config, the data set).

    Attributes:
      DEFAULTS: Every key of the task's config with its default.
      METRIC: The metric, higher is better, by which the best checkpoint is chosen.
    """

    DEFAULTS: Mapping[str, Any]
    METRIC: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """One a column of the logits."""

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Augments a loaded training batch on the device. What evaluation sees is not augmented."""

    def normalise(self, batch: Batch, normalisation: Normalisation) -> Batch:
        """Turns a batch into the input of a network."""

    def student_inputs(self, batch: Batch, *, train: bool) -> dict[str, Any]:
        """Extra keyword inputs of the student's call (a detector's image sizes; in training its ground truth)."""

    def teacher_inputs(self, batch: Batch, student: Outputs) -> dict[str, Any]:
        """Extra keyword inputs of the teacher's call (the student's sampled regions, so that rows line up)."""

    def labels(self, batch: Batch, student: Outputs) -> Array:
        """Integer labels of the rows of `student.logits`; the largest entry where labels are mixed."""

    def terms(self, context: Context) -> Terms:
        """The hard-label losses."""

    def distilled(self, context: Context) -> Context:
        """What the methods are shown of a step: all of it, or fewer rows (`Outputs.valid`)."""

    def samples(self) -> Samples:
        """Samples of each class in the training split. May take a pass over the data set."""

    def sample_outputs(self, model: Model, batch: Batch) -> Outputs:
        """What a network gives, in evaluation mode, for the samples of a normalised batch."""

    def evaluate(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> dict[str, Array]:
        """What one padded batch contributes to the metrics: sums, or padded detections. Padding contributes nothing."""

    def summarise(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Metrics of a whole data set from what its batches contributed: numbers, and whatever `files` needs."""

    def files(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """What a run's directory keeps of its last evaluation besides the numbers: file name -> content for JSON."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step. All of it is donated to the step and checkpointed.

    Attributes:
      step: int32 scalar, steps done.
      params: Trained arrays of student and methods, float32.
      variables: Running statistics and memories of student and methods.
      opt_state: Of the optimizer.
      ema: Moving averages of the student's params and variables; empty where EMA is off.
    """

    step: Array
    params: Params
    variables: Params
    opt_state: Any
    ema: Params
