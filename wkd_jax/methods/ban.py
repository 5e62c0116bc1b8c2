"""BAN: each generation of a network learns from the one before (Furlanello et al., ICML 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class BAN(nnx.Module):
    """One generation: a new network of the teacher's shape, all at temperature 1. A chain of runs makes generations.

    Forms: "soft", the cross-entropy with the teacher's distribution; "cwtm", the cross-entropy with the labels,
    weighted by the teacher's largest probability; "dkpp", soft with the teacher's other probabilities permuted. The
    paper's BAN, CWTM and DKPP have no other term: `task.label_weight` 0. Its BAN+L is "soft" with label weight 1.

    A teacher in a run's config may be the config of a run with a teacher of its own (`teacher.train.teacher.train`);
    configs/imagenet_selfkd.py builds such a chain. Give each generation its own `seed`.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,
        "form": "soft",  # soft, cwtm or dkpp
        "group_size": 0,  # cwtm: consecutive examples that share the weights; 0: the whole (micro)batch
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.one_of("ban", config, "form", ("soft", "cwtm", "dkpp"))
        checks.groups("ban", config, setup.global_batch_size)
        schedule.check("ban", config["weight"], config["schedule"], setup.epochs)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """One term, named as the form."""
        config, batch = self.config, context.batch
        logits = context.student.logits, context.teacher.logits
        if config["form"] == "soft":
            value = losses.ban(*logits)
        elif config["form"] == "dkpp":
            value = losses.dkpp(*logits, context.key)
        else:
            value = losses.cwtm(*logits, batch.label, group_size=config["group_size"] or None, where=batch.valid)
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        return {config["form"]: Term(value, weight, where=context.student.valid)}


REGISTER = {"ban": BAN}
