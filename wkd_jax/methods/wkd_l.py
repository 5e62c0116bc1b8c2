"""WKD-L: optimal transport between the class distributions of teacher and student (Lv et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.functional import Constant
from wkd_jax.types import Array, Context, Setup, Term, Terms


class WKDLogit(nnx.Module):
    """target_weight * target term + weight * transport between the non-target distributions.

    The ground cost comes from the teacher's class similarity, 1 - exp(-sharpness (1 - similarity)). Defaults are
    those of the released code for ImageNet, ResNet-34 -> ResNet-18.

    Without `separate_target`, weight * transport between the distributions over all classes. The counterparts with KL
    in the transport's place are the non-target terms of NKD and DKD with separation, and KD without.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 30.0,  # of the transport cost; follows `schedule`
        "separate_target": True,  # False: transport over all classes, and no target term
        "target_weight": 1.0,  # of the target term; constant
        "temperature": 2.0,  # of both sides of the transport
        "sharpness": 1.0,  # 0: the cost is 1 - similarity
        "epsilon": 0.05,  # entropic regularisation
        "num_iters": 10,  # Sinkhorn updates; a hyper-parameter, not a tolerance
        "gradient": "unrolled",  # or implicit, envelope: for converged solves
        "stabilizer": 1e-8,  # added to the updates' denominators
        "exact_marginal": "student",  # student as in the code, teacher as in the paper: whom the last update meets
        "schedule": {**schedule.DEFAULTS, "name": "cosine"},
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del rngs
        checks.not_negative("wkd_l", config, "sharpness", "target_weight")
        checks.positive("wkd_l", config, "temperature")
        schedule.check("wkd_l", config["weight"], config["schedule"], setup.epochs)
        keys = ("temperature", "epsilon", "num_iters", "gradient", "stabilizer", "exact_marginal")
        self.solver = {key: config[key] for key in keys}
        self.config = config
        classes = setup.student.num_classes
        self._check_solver(classes)
        similarity = setup.similarity()
        if similarity.shape != (classes, classes):
            raise ValueError(
                f"methods.wkd_l: the class similarity is {similarity.shape}, the models have {classes} classes: "
                "remove interrelation.file, or point it at one made for this data set"
            )
        if classes > 1 and np.min(similarity) > 1 - 1e-6:
            raise ValueError(
                "methods.wkd_l: all classes are alike, so moving probability costs nothing: use more samples a class "
                "(two always look alike to CKA) or another interrelation.kind"
            )
        self.ground_cost = Constant(losses.ground_cost(jnp.asarray(similarity), sharpness=config["sharpness"]))

    def _check_solver(self, classes: int) -> None:
        """Lets the loss itself refuse settings, now rather than in the first step."""
        logits, labels = jax.ShapeDtypeStruct((1, classes), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        cost = jax.ShapeDtypeStruct((classes, classes), jnp.float32)
        try:
            jax.eval_shape(self._distances, logits, logits, labels, cost)
        except ValueError as error:
            raise ValueError(f"methods.wkd_l: {error}") from error

    def _distances(self, student: Array, teacher: Array, labels: Array, cost: Array) -> tuple[Array, ...]:
        """Target term (where the target is separated), transport cost, marginal error."""
        if self.config["separate_target"]:
            return losses.wkd_logit(student, teacher, labels, cost, return_error=True, **self.solver)
        return losses.wkd_logit_unseparated(student, teacher, cost, return_error=True, **self.solver)

    def terms(self, context: Context) -> Terms:
        """Terms `target` (unless not separated) and `wasserstein`, and the solver's `marginal_error`, only logged."""
        config, where = self.config, context.student.valid
        *target, wasserstein, error = self._distances(
            context.student.logits, context.teacher.logits, context.labels, self.ground_cost.get_value()
        )
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        terms = {"wasserstein": Term(wasserstein, weight, where), "marginal_error": Term(error, None, where)}
        if target:
            terms["target"] = Term(target[0], config["target_weight"], where)
        return terms


REGISTER = {"wkd_l": WKDLogit}
