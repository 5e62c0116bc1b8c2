"""DIST: correlation with the teacher within examples and within classes (Huang et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class DIST(nnx.Module):
    """weight * T^2 * (beta * inter + gamma * intra), with T^2 as in the released code. The paper's label weight is 1.

    Defaults are those of the released code for ImageNet, but for `group_size`: there the intra-class correlations are
    over the 32 examples of each device, here over the whole batch, which is a different statistic. CIFAR-100:
    temperature 4.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 2.0,  # of both terms; follows `schedule`
        "beta": 1.0,  # of the correlations between the classes of an example
        "gamma": 1.0,  # of the correlations between the examples of a class
        "temperature": 1.0,
        "group_size": 0,  # consecutive examples that `gamma`'s term correlates; 0: the whole batch
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.positive("dist", config, "temperature")
        checks.not_negative("dist", config, "beta", "gamma")
        checks.groups("dist", config, setup.global_batch_size)
        if config["gamma"] and (config["group_size"] or setup.global_batch_size) == 1:
            raise ValueError(
                f"methods.dist.gamma={config['gamma']}: correlates examples, and a batch or group has only one: use "
                "more, or set it to 0"
            )
        schedule.check("dist", config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """Terms `inter`, an example each, and `intra`, of the whole batch."""
        config, where = self.config, context.student.valid
        inter, intra = losses.dist(
            context.student.logits,
            context.teacher.logits,
            temperature=config["temperature"],
            group_size=config["group_size"] or None,
            where=context.batch.valid if where is None else where,
        )
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        return {"inter": Term(inter, weight * config["beta"], where), "intra": Term(intra, weight * config["gamma"])}


REGISTER = {"dist": DIST}
