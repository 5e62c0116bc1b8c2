"""WKD-F: 2-Wasserstein distance between Gaussians fitted to feature maps (Lv et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import schedule
from wkd_jax.methods.taps import find_tap
from wkd_jax.models import connectors
from wkd_jax.types import Context, Setup, Term, Terms


class WKDFeature(nnx.Module):
    """weight * (mean_cov_ratio * mean term + covariance term) between one tap of each side.

    The student's map passes through a learned projector first. Defaults are those of the released code for ImageNet,
    ResNet-34 -> ResNet-18 (the paper names a 1 x 1 grid; the code runs 4 x 4).
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.02,  # of the whole distance; follows `schedule`
        "mean_cov_ratio": 2.0,  # of the means, relative to the covariances
        "student_tap": "last",
        "teacher_tap": "last",
        "projector": "bottleneck",  # conv1x1, bottleneck, linear or none
        "grid": 4,  # cells along each side, each with its own Gaussian
        "ddof": 1,  # 1: the code's unbiased variance; 0: the paper's
        "eps": 1e-5,  # added to the variance
        "schedule": {**schedule.DEFAULTS, "name": "cosine"},
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("wkd_f", config["weight"], config["schedule"], setup.epochs)
        for key in ("mean_cov_ratio", "ddof"):
            if config[key] < 0:
                raise ValueError(f"methods.wkd_f.{key}={config[key]}: must be 0 or more")
        if config["eps"] <= 0:
            raise ValueError(f"methods.wkd_f.eps={config['eps']}: must be above 0, or a dead channel has no gradient")
        self.config = config
        self.student_tap, student = find_tap(setup.student, config["student_tap"], "methods.wkd_f.student_tap")
        self.teacher_tap, teacher = find_tap(setup.teacher, config["teacher_tap"], "methods.wkd_f.teacher_tap")
        self.prefix = student.prefix_tokens, teacher.prefix_tokens
        self.gaussian = {key: config[key] for key in ("grid", "ddof", "eps")}
        sizes = [connectors.spatial_size(tap, setup.image_size) for tap in (student, teacher)]
        try:
            self.projector = connectors.build(
                config["projector"], student, teacher, student_size=sizes[0], teacher_size=sizes[1], rngs=rngs
            )
        except ValueError as error:
            raise ValueError(f"methods.wkd_f.projector: {error}") from error
        if config["projector"] in ("conv1x1", "bottleneck"):
            sizes[0] = sizes[1]  # their output has the teacher's size
        smallest = min(min(size) for size in sizes)
        if not 1 <= config["grid"] <= smallest:
            raise ValueError(
                f"methods.wkd_f.grid={config['grid']}: must be from 1 to {smallest}, the positions along a side of "
                f"{self.student_tap} ({sizes[0]}) and {self.teacher_tap} ({sizes[1]}) at images of {setup.image_size}"
            )
        positions = min(math.prod(-(-side // config["grid"]) for side in size) for size in sizes)
        if positions <= config["ddof"]:
            raise ValueError(
                f"methods.wkd_f.grid={config['grid']}: leaves {positions} position(s) a cell, which have no variance "
                f"(ddof={config['ddof']}); choose a coarser grid or an earlier tap"
            )

    def terms(self, context: Context) -> Terms:
        """Terms `mean` and `covariance`."""
        config = self.config
        student, teacher = context.student.taps[self.student_tap], context.teacher.taps[self.teacher_tap]
        if student.ndim == 3:
            student = student[:, self.prefix[0] :]
        if teacher.ndim == 3:
            teacher = teacher[:, self.prefix[1] :]
        lead = student.shape[:-3] if student.ndim > 3 else student.shape[:1]  # [B], or [B, R] of pooled regions
        student, teacher = (x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in (student, teacher))
        mean, covariance = losses.wkd_feature(self.projector(student, train=True), teacher, **self.gaussian)
        mean, covariance = mean.reshape(lead), covariance.reshape(lead)
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        where = context.student.valid if len(lead) == 2 else None
        ratio = config["mean_cov_ratio"]
        return {"mean": Term(mean, weight * ratio, where), "covariance": Term(covariance, weight, where)}


REGISTER = {"wkd_f": WKDFeature}
