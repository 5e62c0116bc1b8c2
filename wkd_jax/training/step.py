"""The one train step and the one evaluation step. No method and no task has a branch here."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wkd_jax.models import functional
from wkd_jax.models.functional import Structure
from wkd_jax.training.clock import Clock
from wkd_jax.types import Array, Batch, Context, Normalisation, Outputs, Params, Progress, Task, Terms, TrainState

Metrics = dict[str, Array]


class Learner(nnx.Module):
    """All that is trained together: the student and what the methods bring. Paths: student/..., methods/<name>/..."""

    def __init__(self, student: nnx.Module, methods: dict[str, Any]) -> None:
        self.student = student
        self.methods = nnx.Dict(methods)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Arrays that a run never changes. Passed to the steps, neither donated nor checkpointed.

    Attributes:
      constants: The methods' constants.
      teacher: The teacher's parameters and statistics; empty in a run without a teacher.
      seed: int32 scalar, of augmentation, dropout and whatever the methods draw. An array, so that runs which differ in
        nothing else are one compiled program.
    """

    constants: Params
    teacher: Params
    seed: Array


jax.tree_util.register_dataclass(Frozen, ["constants", "teacher", "seed"], [])


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a run: structures and rules, no arrays."""

    learner: Structure
    teacher: Structure | None
    student_input: Normalisation
    teacher_input: Normalisation | None
    task: Task
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Array], Array]
    clock: Clock
    ema: float
    accumulation: int

    def loss(
        self, params: Params, variables: Params, frozen: Frozen, batch: Batch, progress: Progress, key: Array
    ) -> tuple[Array, tuple[Metrics, Params]]:
        """Total loss of one augmented batch.

        Returns:
          (total, (metrics, variables)): a float32 scalar; every term and weight by name; the carried state after the
          student's forward pass and the methods.
        """
        learner = self.learner.merge(params, variables, frozen.constants)
        images, batch = batch, self.task.normalise(batch, self.student_input)
        inputs = self.task.student_inputs(batch, train=True)
        student = learner.student(batch.image, train=True, rngs=nnx.Rngs(named_key(key, "student")), **inputs)
        if student.valid is not None:  # no row of an image that could not be read counts
            student = dataclasses.replace(student, valid=student.valid & batch.valid[:, None])
        teacher_batch, teacher = self.run_teacher(frozen, images, student)
        context = Context(
            batch=batch,
            teacher_batch=teacher_batch,
            labels=self.task.labels(batch, student),
            student=student,
            teacher=teacher,
            student_model=lambda: self.learner.merge(params, variables, frozen.constants).student,
            teacher_model=self.teacher and (lambda: self.teacher.merge(jax.lax.stop_gradient(frozen.teacher))),
            progress=progress,
            key=named_key(key, "label"),
        )
        terms = {"label": self.task.terms(context)}
        context = self.task.distilled(context)
        for name, method in learner.methods.items():
            terms[name] = method.terms(dataclasses.replace(context, key=named_key(key, f"methods/{name}")))
        total, metrics = weigh(terms, batch.valid)
        return total, (metrics, functional.variables(learner))

    def run_teacher(self, frozen: Frozen, images: Batch, student: Outputs) -> tuple[Batch | None, Outputs | None]:
        """The teacher's input, normalised its own way, and its outputs: evaluation mode, gradients stopped."""
        if self.teacher is None:
            return None, None
        batch = self.task.normalise(images, self.teacher_input)
        inputs = self.task.teacher_inputs(batch, jax.lax.stop_gradient(student))
        outputs = self.teacher.merge(frozen.teacher)(batch.image, train=False, **inputs)
        return batch, jax.lax.stop_gradient(outputs)

    def gradients(
        self, state: TrainState, variables: Params, frozen: Frozen, batch: Batch, key: Array, number: Array | int
    ) -> tuple[Params, Metrics, Params]:
        """Augments one (micro)batch as loaded, and differentiates its loss.

        Args:
          state: Its step and parameters.
          variables: The carried state before this microbatch.
          frozen: As everywhere.
          batch: As loaded.
          key: Of the step. Augmentation takes it as it is, since it depends on the example.
          number: Of the microbatch in its step; what the networks and methods draw depends on it.

        Returns:
          (gradients, metrics, the carried state after it).
        """
        batch = self.task.augment(batch, named_key(key, "augment"))
        progress = self.clock.progress(state.step)
        (total, (metrics, variables)), gradients = jax.value_and_grad(self.loss, has_aux=True)(
            state.params, variables, frozen, batch, progress, jax.random.fold_in(key, number)
        )
        return gradients, metrics | {"total": total}, variables

    def accumulate(
        self, state: TrainState, frozen: Frozen, batches: Batch, key: Array
    ) -> tuple[Params, Metrics, Params]:
        """`gradients` of microbatches, [accumulation, B / accumulation, ...], one after the other, averaged.

        The carried state passes from one to the next, so BatchNorm's running statistics move once a microbatch.
        """

        def one(carried: tuple[Params, Params], numbered: tuple[Array, Batch]) -> tuple[tuple[Params, Params], Metrics]:
            variables, total = carried
            gradients, metrics, variables = self.gradients(state, variables, frozen, numbered[1], key, numbered[0])
            return (variables, jax.tree.map(jnp.add, total, gradients)), metrics

        start = state.variables, jax.tree.map(jnp.zeros_like, state.params)
        (variables, total), metrics = jax.lax.scan(one, start, (jnp.arange(self.accumulation), batches))
        mean = jax.tree.map(lambda x: x / self.accumulation, total)
        return mean, jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics), variables

    def train_step(self, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update. Randomness is a function of (seed, step), so a resumed run repeats it.

        `batch` is a global batch, or where `accumulation` is above 1 its microbatches along a first axis.
        """
        key = jax.random.fold_in(jax.random.key(frozen.seed), state.step)
        if self.accumulation == 1:
            gradients, metrics, variables = self.gradients(state, state.variables, frozen, batch, key, 0)
        else:
            gradients, metrics, variables = self.accumulate(state, frozen, batch, key)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = {name: self.ema * old + (1 - self.ema) * {**params, **variables}[name] for name, old in state.ema.items()}
        metrics |= {"learning_rate": self.learning_rate(state.step), "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, variables, opt_state, ema), metrics

    def eval_step(self, state: TrainState, frozen: Frozen, batch: Batch) -> Metrics:
        """What one padded batch contributes. Uses the moving average of the student where there is one."""
        learner = self.learner.merge({**state.params, **state.variables, **state.ema}, frozen.constants)
        image = self.task.normalise(batch, self.student_input).image
        student = learner.student(image, train=False, **self.task.student_inputs(batch, train=False))
        return self.task.evaluate(batch, student, self.run_teacher(frozen, batch, student)[1])


def named_key(key: Array, name: str) -> Array:
    """A key for one use. By name, so that a method's randomness does not depend on what runs beside it."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def weigh(terms: dict[str, Terms], valid: Array) -> tuple[Array, Metrics]:
    """Reduces and adds up all terms. The only place in the package where a loss is averaged.

    Args:
      terms: By source ("label" or a method's name), then by term.
      valid: [B] bool, the examples that count where a term has no mask of its own.

    Returns:
      (total, metrics): the weighted sum; "source/term" and, for what is trained on, "source/term/weight". float32.
    """
    total, metrics = jnp.zeros((), jnp.float32), {}
    for source, named in terms.items():
        for name, term in named.items():
            value = term.value.astype(jnp.float32)
            if value.ndim:
                where = valid.reshape(valid.shape + (1,) * (value.ndim - 1)) if term.where is None else term.where
                where = jnp.broadcast_to(where, value.shape)
                value = jnp.sum(jnp.where(where, value, 0)) / jnp.maximum(jnp.sum(where), 1)
            metrics[f"{source}/{name}"] = value
            if term.weight is not None:
                metrics[f"{source}/{name}/weight"] = jnp.asarray(term.weight, jnp.float32)
                total += term.weight * value
    return total, metrics
