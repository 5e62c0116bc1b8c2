"""CRD: each example is told from others across the two networks (Tian, Krishnan, Isola, ICLR 2020)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.functional import Constant, Memory
from wkd_jax.models.layers import Linear
from wkd_jax.types import Array, Context, Setup, Term, Terms


class CRD(nnx.Module):
    """weight * (contrast of the student's embedding with the teacher's memory + of the teacher's with the student's).

    Embeddings are linear maps of the pooled features, at unit norm, both trained. A memory has a row for every training
    image, addressed by `Batch.index`. Negatives are drawn with replacement from all images of other classes, by the
    data set's labels; the published code draws without replacement where there are enough, which is the same in
    expectation, and 16384 draws of 50000 repeat some. The constants are estimated on the first (micro)batch that the
    run sees and kept, stored at 0 until then. Rows are updated with this step's embeddings, after the loss and without
    a gradient; of several examples of one index in a batch the last decides (`losses.crd_update`); examples that are
    not valid change nothing.

    Each network's memory is cut along its features over the data axis where the devices divide them: a row is then read
    and written in place, and scores are sums over devices. Defaults are those of the paper's code. The label weight is
    1; CRD+KD is this and `kd` together.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.8,  # of both directions
        "embedding": 128,  # features of the embeddings and the memories
        "num_negatives": 16384,  # for each example
        "temperature": 0.07,
        "momentum": 0.5,  # share of a memory's old row
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True
    SHARDING: ClassVar = ((r"_bank$", (None, "data")),)

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("crd", config["weight"], config["schedule"], setup.epochs)
        checks.positive("crd", config, "embedding", "num_negatives", "temperature")
        if not 0 <= config["momentum"] < 1:
            raise ValueError(f"methods.crd.momentum={config['momentum']}: must be from 0 to below 1")
        labels = setup.labels()
        counts = np.bincount(labels, minlength=setup.student.num_classes)
        if counts.max() == len(labels):
            raise ValueError("methods.crd: all training images are of one class, so that there are no negatives")
        self.config = config
        self.num_examples = len(labels)
        self.student_embedding = Linear(setup.student.pooled, config["embedding"], rngs=rngs)
        self.teacher_embedding = Linear(setup.teacher.pooled, config["embedding"], rngs=rngs)
        shape, bound = (len(labels), config["embedding"]), math.sqrt(3 / config["embedding"])
        self.student_bank = Memory(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.teacher_bank = Memory(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.student_constant = Memory(jnp.zeros(()))
        self.teacher_constant = Memory(jnp.zeros(()))
        self.labels = Constant(jnp.asarray(labels, jnp.int32))
        self.by_class = Constant(jnp.asarray(np.argsort(labels, kind="stable"), jnp.int32))
        self.starts = Constant(jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32))

    def terms(self, context: Context) -> Terms:
        """Terms `student` and `teacher`: whose embedding is contrasted, with the memory of the other."""
        config, batch = self.config, context.batch
        student = losses.unit_norm(self.student_embedding(context.student.pooled))
        teacher = losses.unit_norm(self.teacher_embedding(context.teacher.pooled))
        index = jnp.concatenate([batch.index[:, None], self.negatives(context.key, batch.index)], axis=1)
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        terms = {}
        for name, embedding, bank, constant in (
            ("student", student, self.teacher_bank, self.student_constant),
            ("teacher", teacher, self.student_bank, self.teacher_constant),
        ):
            scores = losses.crd_scores(bank[...], index, embedding, temperature=config["temperature"])
            estimate = losses.crd_constant(scores, num_examples=self.num_examples, where=batch.valid)
            constant.set_value(jnp.where(constant[...] > 0, constant[...], estimate))
            known = jnp.where(constant[...] > 0, constant[...], 1)  # it is not while no valid example was seen
            terms[name] = Term(losses.crd(scores, known, num_examples=self.num_examples), weight)
        for embedding, bank in ((student, self.student_bank), (teacher, self.teacher_bank)):
            settings = {"momentum": config["momentum"], "where": batch.valid}
            bank.set_value(losses.crd_update(bank[...], batch.index, embedding, **settings))
        return terms

    def negatives(self, key: Array, index: Array) -> Array:
        """[B, num_negatives] int32, drawn uniformly from the examples whose class is not that of `index` [B].

        In the order of classes those are what is before and behind the class's own stretch.
        """
        label = self.labels[...][index]
        start, stop = (self.starts[...][at][:, None] for at in (label, label + 1))
        shape = len(index), self.config["num_negatives"]
        place = jax.random.randint(key, shape, 0, self.num_examples - (stop - start))
        return self.by_class[...][jnp.where(place < start, place, place + stop - start)]


REGISTER = {"crd": CRD}
