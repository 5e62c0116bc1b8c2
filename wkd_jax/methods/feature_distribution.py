"""Other distances between the distributions of two feature maps: the ablation of WKD-F (Lv et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.projected import ProjectedPair
from wkd_jax.types import Array, Context, Setup, Terms

# Called with the features and the settings.
FORMS: dict[str, Callable[[Array, Array, Any], Any]] = {
    "gaussian_w2_full": lambda s, t, _: losses.feature_gaussian_w2_full(s, t),
    "gaussian_kl": lambda s, t, c: losses.feature_gaussian_kl(s, t, eps=c["eps"]),
    "gaussian_kl_symmetric": lambda s, t, c: losses.feature_gaussian_kl(s, t, eps=c["eps"], symmetric=True),
    "gaussian_kl_full": lambda s, t, c: losses.feature_gaussian_kl_full(s, t, ridge=c["ridge"]),
    "laplace_kl": lambda s, t, c: losses.feature_laplace_kl(s, t, eps=c["eps"]),
    "exponential_kl": lambda s, t, c: losses.feature_exponential_kl(s, t, eps=c["eps"]),
    "sinkhorn": lambda s, t, c: losses.feature_sinkhorn(s, t, epsilon=c["epsilon"], num_iters=c["num_iters"]),
    "histogram_w1": lambda s, t, c: losses.feature_histogram_w1(s, t, bins=c["bins"]),
    "sorted_w2": lambda s, t, _: losses.feature_sorted_w2(s, t),
}


class FeatureDistribution(ProjectedPair):
    """weight * a distance `form` between one tap of each side, one distribution a map: `wkd_f` with another distance.

    | form | distribution of a map | distance |
    | --- | --- | --- |
    | gaussian_w2_full | Gaussian, full covariance | Wasserstein, squared, its means weighed as in `wkd_f` |
    | gaussian_kl, gaussian_kl_symmetric | Gaussian, diagonal | KL(teacher, student); plus KL(student, teacher) |
    | gaussian_kl_full | Gaussian, full covariance | KL(teacher, student) |
    | laplace_kl, exponential_kl | Laplace, exponential, separable | KL(teacher, student) |
    | sinkhorn | probability mass function, an atom a position | entropic optimal transport |
    | histogram_w1 | probability mass function of each channel, in bins | Wasserstein, first order |
    | sorted_w2 | probability mass function of each channel, all values | Wasserstein, squared |

    The Gaussian with diagonal covariance and Wasserstein distance is `wkd_f`, and no distribution at all is `fitnet`.
    The paper reports seven of these (`configs/imagenet_ablation.py`) and publishes neither code nor settings, and does
    not say which probability mass function is its own. So the defaults are derived, and the weight of each form is to
    be tuned: this one is such that at unit variances a small difference of the means costs what it does in `wkd_f`.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "form": "gaussian_kl",
        "weight": 0.08,  # of the distance; follows `schedule`
        **ProjectedPair.PROJECTED,
        "mean_cov_ratio": 2.0,  # gaussian_w2_full: of the means, relative to the covariances
        "eps": 1e-2,  # other KL than gaussian_kl_full: added to variances, scales or means
        "ridge": 1e-2,  # gaussian_kl_full: added to the eigenvalues of the covariances
        "epsilon": 0.05,  # sinkhorn: entropic regularisation, in units of a map's largest cost
        "num_iters": 50,  # sinkhorn: updates
        "bins": 16,  # histogram_w1: from the smallest to the largest value of a channel
        "schedule": {**schedule.DEFAULTS, "name": "cosine"},
    }

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.one_of("feature_distribution", config, "form", FORMS)
        checks.not_negative("feature_distribution", config, "mean_cov_ratio")
        super().__init__("feature_distribution", config, setup, rngs=rngs)
        positions = [math.prod(size) for size in self.sizes]
        if min(positions) < 2:
            raise ValueError(
                f"methods.feature_distribution: {self.student_tap} and {self.teacher_tap} have {positions} positions, "
                "and one alone has no distribution: choose earlier taps or larger images"
            )
        student, teacher = self.taps
        rectified = config["projector"] in ("conv1x1", "bottleneck") or (
            config["projector"] == "none" and not student.signed
        )
        if config["form"] == "exponential_kl" and (teacher.signed or not rectified):
            raise ValueError(
                f"methods.feature_distribution.form=exponential_kl: features must not be negative, and those of the "
                f"{'teacher' if teacher.signed else 'student'} may be: choose a tap that follows a ReLU and a "
                "projector that ends in one (conv1x1 or bottleneck), or another form"
            )
        shapes = [jax.ShapeDtypeStruct((1, m, teacher.channels), jnp.float32) for m in positions]
        try:  # lets the loss itself refuse settings, now rather than in the first step
            jax.eval_shape(lambda s, t: FORMS[config["form"]](s, t, config), *shapes)
        except ValueError as error:
            raise ValueError(f"methods.feature_distribution: form {config['form']}: {error}") from error

    def terms(self, context: Context) -> Terms:
        """The term `distance`; of form "gaussian_w2_full", terms `mean` and `covariance`."""
        config, weight = self.config, self.weight(context)
        value = FORMS[config["form"]](*self.features(context), config)
        if config["form"] == "gaussian_w2_full":
            mean, covariance = value
            return {
                "mean": self.term(context, mean, weight * config["mean_cov_ratio"]),
                "covariance": self.term(context, covariance, weight),
            }
        return {"distance": self.term(context, value, weight)}


REGISTER = {"feature_distribution": FeatureDistribution}
