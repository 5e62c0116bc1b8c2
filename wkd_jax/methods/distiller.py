"""A distiller put together from parts: a chain of transformations of the logits, and a distance."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.losses.distiller import check
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class Distiller(nnx.Module):
    """weight * T^2 * distance(chain(student / T), chain(teacher / T)), of parts that `losses.distiller` lists.

    Not a published method, and not KD-Zero: of that, only the idea of searching such combinations is public. The
    defaults are KD at temperature 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,
        "transformations": ("log_softmax",),  # in order; () is the logits themselves
        "distance": "kl",
        "temperature": 1.0,
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("distiller", config, "temperature")
        try:
            check(config["transformations"], config["distance"])
        except ValueError as error:
            raise ValueError(f"methods.distiller: {error}") from error
        schedule.check("distiller", config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """The term `distance`."""
        config, where = self.config, context.student.valid
        value = losses.distiller(
            context.student.logits,
            context.teacher.logits,
            context.labels,
            transformations=config["transformations"],
            distance=config["distance"],
            temperature=config["temperature"],
            where=context.batch.valid if where is None else where,
        )
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        return {"distance": Term(value, weight, where)}


REGISTER = {"distiller": Distiller}
