"""CC: correlations between the examples of a batch are congruent (Peng et al., ICCV 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.layers import Linear
from wkd_jax.types import Context, Setup, Term, Terms


class CC(nnx.Module):
    """weight * correlation congruence of linear embeddings of both sides' pooled features.

    `form` "neighbours" is the loss behind the published tables (`losses.cc_neighbours`; it depends on the order of the
    batch), "kernel" the paper's (`losses.cc_kernel`, on embeddings of unit norm). Both embeddings are trained, the
    teacher's too: either loss can be made 0 by letting both shrink or collapse, and the tables were made so. Defaults
    are those of the CRD benchmark; torchdistill gives the root of its kernel form a weight of 0.003. The label weight
    is 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.02,
        "form": "neighbours",  # neighbours or kernel
        "embedding": 128,  # features of the embeddings
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("cc", config["weight"], config["schedule"], setup.epochs)
        checks.one_of("cc", config, "form", ("neighbours", "kernel"))
        checks.positive("cc", config, "embedding")
        self.config = config
        self.student_embedding = Linear(setup.student.pooled, config["embedding"], rngs=rngs)
        self.teacher_embedding = Linear(setup.teacher.pooled, config["embedding"], rngs=rngs)

    def terms(self, context: Context) -> Terms:
        """The term `congruence`, of the whole batch."""
        student = self.student_embedding(context.student.pooled)
        teacher = self.teacher_embedding(context.teacher.pooled)
        if self.config["form"] == "kernel":
            value = losses.cc_kernel(losses.unit_norm(student), losses.unit_norm(teacher), where=context.batch.valid)
        else:
            value = losses.cc_neighbours(student, teacher, where=context.batch.valid)
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"congruence": Term(value, weight)}


REGISTER = {"cc": CC}
