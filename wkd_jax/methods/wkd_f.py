"""WKD-F: 2-Wasserstein distance between Gaussians fitted to feature maps (Lv et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.projected import ProjectedPair
from wkd_jax.types import Context, Setup, Terms


class WKDFeature(ProjectedPair):
    """weight * (mean_cov_ratio * mean term + covariance term) between one tap of each side.

    The student's map passes through a learned projector first. Defaults are those of the released code for ImageNet,
    ResNet-34 -> ResNet-18 (the paper names a 1 x 1 grid; the code runs 4 x 4).
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.02,  # of the whole distance; follows `schedule`
        "mean_cov_ratio": 2.0,  # of the means, relative to the covariances
        **ProjectedPair.PROJECTED,
        "grid": 4,  # cells along each side, each with its own Gaussian
        "ddof": 1,  # 1: the code's unbiased variance; 0: the paper's
        "eps": 1e-5,  # added to the variance; at 0 a dead channel would have no gradient
        "schedule": {**schedule.DEFAULTS, "name": "cosine"},
    }

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.not_negative("wkd_f", config, "mean_cov_ratio", "ddof")
        checks.positive("wkd_f", config, "eps")
        super().__init__("wkd_f", config, setup, rngs=rngs)
        self.gaussian = {key: config[key] for key in ("grid", "ddof", "eps")}
        smallest = min(min(size) for size in self.sizes)
        if not 1 <= config["grid"] <= smallest:
            raise ValueError(
                f"methods.wkd_f.grid={config['grid']}: must be from 1 to {smallest}, the positions along a side of "
                f"{self.student_tap} ({self.sizes[0]}) and {self.teacher_tap} ({self.sizes[1]}) at images of "
                f"{setup.image_size}"
            )
        positions = min(math.prod(-(-side // config["grid"]) for side in size) for size in self.sizes)
        if positions <= config["ddof"]:
            raise ValueError(
                f"methods.wkd_f.grid={config['grid']}: leaves {positions} position(s) a cell, which have no variance "
                f"(ddof={config['ddof']}); choose a coarser grid or an earlier tap"
            )

    def terms(self, context: Context) -> Terms:
        """Terms `mean` and `covariance`."""
        mean, covariance = losses.wkd_feature(*self.features(context), **self.gaussian)
        weight = self.weight(context)
        return {
            "mean": self.term(context, mean, weight * self.config["mean_cov_ratio"]),
            "covariance": self.term(context, covariance, weight),
        }


REGISTER = {"wkd_f": WKDFeature}
