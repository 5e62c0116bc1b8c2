"""Distillation losses as pure functions on arrays, for this package and for any other training loop in JAX.

    from wkd_jax import losses

    target_term, wasserstein_term = losses.wkd_logit(student_logits, teacher_logits, labels, ground_cost)
    loss = (target_term + 30.0 * wasserstein_term).mean()

Every loss takes arrays of any float dtype, computes in float32, returns one value an example (or says otherwise), never
averages over the batch, treats the teacher as a constant, and has keyword-only hyper-parameters. Importing this package
loads jax and numpy only; the first transport solved loads ott, and with it Flax where Flax is installed.
"""

from wkd_jax.losses.attention import attention_transfer
from wkd_jax.losses.ban import ban, cwtm, dkpp
from wkd_jax.losses.cat_kd import cat_kd
from wkd_jax.losses.classification import cross_entropy
from wkd_jax.losses.crd import crd, crd_constant, crd_scores, crd_update
from wkd_jax.losses.ctkd import ctkd_instance, ctkd_temperature
from wkd_jax.losses.decoupled import dkd, nkd
from wkd_jax.losses.dist import dist
from wkd_jax.losses.distiller import distiller
from wkd_jax.losses.distribution import (
    feature_exponential_kl,
    feature_gaussian_kl,
    feature_gaussian_kl_full,
    feature_gaussian_w2_full,
    feature_histogram_w1,
    feature_laplace_kl,
    feature_sinkhorn,
    feature_sorted_w2,
)
from wkd_jax.losses.dpk import minibatch_cka, minibatch_hsic
from wkd_jax.losses.feature import adaptive_average_pool, mse
from wkd_jax.losses.fgfi import fgfi
from wkd_jax.losses.gaussian import gaussian_w2
from wkd_jax.losses.icd import icd, icd_auxiliary, instance_attention
from wkd_jax.losses.ickd import ickd
from wkd_jax.losses.ipot import emd_ipot, ipot
from wkd_jax.losses.kl import kd, kl
from wkd_jax.losses.ofa import ofa
from wkd_jax.losses.relational import cc_kernel, cc_neighbours, rkd_angle, rkd_distance, unit_norm
from wkd_jax.losses.reviewkd import hcl
from wkd_jax.losses.similarity import (
    cka,
    confusion_similarity,
    cosine_similarity,
    gaussian_similarity,
    ground_cost,
    logit_correlation,
)
from wkd_jax.losses.sinkhorn import SinkhornOutput, sinkhorn
from wkd_jax.losses.tf_kd import tf_kd_reg, tf_kd_self
from wkd_jax.losses.ttm import ttm, wttm
from wkd_jax.losses.uskd import uskd
from wkd_jax.losses.wkd import wkd_feature, wkd_logit, wkd_logit_unseparated
from wkd_jax.losses.zipf import zipf, zipf_ranks, zipf_targets, zipf_votes

__all__ = [
    "SinkhornOutput",
    "adaptive_average_pool",
    "attention_transfer",
    "ban",
    "cat_kd",
    "cc_kernel",
    "cc_neighbours",
    "cka",
    "confusion_similarity",
    "cosine_similarity",
    "crd",
    "crd_constant",
    "crd_scores",
    "crd_update",
    "cross_entropy",
    "ctkd_instance",
    "ctkd_temperature",
    "cwtm",
    "dist",
    "distiller",
    "dkd",
    "dkpp",
    "emd_ipot",
    "feature_exponential_kl",
    "feature_gaussian_kl",
    "feature_gaussian_kl_full",
    "feature_gaussian_w2_full",
    "feature_histogram_w1",
    "feature_laplace_kl",
    "feature_sinkhorn",
    "feature_sorted_w2",
    "fgfi",
    "gaussian_similarity",
    "gaussian_w2",
    "ground_cost",
    "hcl",
    "icd",
    "icd_auxiliary",
    "ickd",
    "instance_attention",
    "ipot",
    "kd",
    "kl",
    "logit_correlation",
    "minibatch_cka",
    "minibatch_hsic",
    "mse",
    "nkd",
    "ofa",
    "rkd_angle",
    "rkd_distance",
    "sinkhorn",
    "tf_kd_reg",
    "tf_kd_self",
    "ttm",
    "unit_norm",
    "uskd",
    "wkd_feature",
    "wkd_logit",
    "wkd_logit_unseparated",
    "wttm",
    "zipf",
    "zipf_ranks",
    "zipf_targets",
    "zipf_votes",
]
