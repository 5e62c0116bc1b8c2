"""Distillation losses as pure functions on arrays, for this package and for any other training loop in JAX.

    from wkd_jax import losses

    target_term, wasserstein_term = losses.wkd_logit(student_logits, teacher_logits, labels, ground_cost)
    loss = (target_term + 30.0 * wasserstein_term).mean()

Every loss takes arrays of any float dtype, computes in float32, returns one value an example (or says otherwise), never
averages over the batch, treats the teacher as a constant, and has keyword-only hyper-parameters. Importing this package
loads jax and numpy only; the first transport solved loads ott, and with it Flax where Flax is installed.
"""

from wkd_jax.losses.classification import cross_entropy
from wkd_jax.losses.feature import adaptive_average_pool, mse
from wkd_jax.losses.gaussian import gaussian_w2
from wkd_jax.losses.kl import kd, kl
from wkd_jax.losses.similarity import cka, cosine_similarity, ground_cost
from wkd_jax.losses.sinkhorn import SinkhornOutput, sinkhorn
from wkd_jax.losses.wkd import wkd_feature, wkd_logit, wkd_logit_unseparated

__all__ = [
    "SinkhornOutput",
    "adaptive_average_pool",
    "cka",
    "cosine_similarity",
    "cross_entropy",
    "gaussian_w2",
    "ground_cost",
    "kd",
    "kl",
    "mse",
    "sinkhorn",
    "wkd_feature",
    "wkd_logit",
    "wkd_logit_unseparated",
]
