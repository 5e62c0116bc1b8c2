"""RKD: distances and angles between the examples of a batch (Park, Kim, Lu, Cho, CVPR 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.types import Context, Setup, Term, Terms


class RKD(nnx.Module):
    """distance_weight * `losses.rkd_distance` + angle_weight * `losses.rkd_angle`, of both sides' pooled features.

    Nothing is learned, and the widths may differ. Defaults are the paper's. The label weight is 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "distance_weight": 25.0,
        "angle_weight": 50.0,
        "group_size": 0,  # consecutive examples among which relations are taken; 0: the whole (micro)batch
        "schedule": schedule.DEFAULTS,  # of both weights
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.not_negative("rkd", config, "distance_weight", "angle_weight")
        schedule.check("rkd", config["angle_weight"], config["schedule"], setup.epochs)
        checks.groups("rkd", config, setup.global_batch_size)
        self.config = config

    def terms(self, context: Context) -> Terms:
        """Terms `distance` and `angle`, of the whole batch."""
        config, features = self.config, (context.student.pooled, context.teacher.pooled)
        settings = {"group_size": config["group_size"] or None, "where": context.batch.valid}
        weights = {
            name: schedule.weight(config[f"{name}_weight"], config["schedule"], context.progress)
            for name in ("distance", "angle")
        }
        return {
            "distance": Term(losses.rkd_distance(*features, **settings), weights["distance"]),
            "angle": Term(losses.rkd_angle(*features, **settings), weights["angle"]),
        }


REGISTER = {"rkd": RKD}
