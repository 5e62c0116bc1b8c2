"""No product of the losses is left to a device's default precision, which is TF32 on GPUs and bfloat16 on TPUs."""

import re

import jax
import jax.numpy as jnp
import pytest

from wkd_jax import losses

C = 6
VECTORS, MAPS = jnp.ones((8, C)), jnp.ones((2, 6, 6, C))


def transport(gradient):
    def run(student, teacher, labels, cost):
        target, wasserstein, error = losses.wkd_logit(
            student, teacher, labels, cost, gradient=gradient, return_error=True
        )
        return (target + wasserstein).sum(), error

    derivative = jax.value_and_grad(run, argnums=(0, 3), has_aux=True)
    return derivative, (jnp.ones((4, C)), jnp.ones((4, C)), jnp.zeros(4, jnp.int32), jnp.ones((C, C)))


CASES = {
    **{f"wkd_logit {gradient}": transport(gradient) for gradient in ("unrolled", "implicit", "envelope")},
    "gaussian_w2": (
        jax.value_and_grad(lambda mean, cov: sum(losses.gaussian_w2(mean, cov, mean + 1, 2 * cov))),
        (jnp.ones(C), jnp.eye(C)),
    ),
    "instance_attention": (
        jax.value_and_grad(
            lambda q, k, v: losses.instance_attention(
                q, k, v, valid=jnp.ones((2, 5), bool), real=jnp.ones((2, 4), bool)
            )[0].sum(),
            argnums=(0, 1, 2),
        ),
        (jnp.ones((2, 4, 2, C)), *jnp.ones((2, 2, 5, 2, C))),
    ),
    **{
        f"cka {kernel}": (lambda x, kernel=kernel: losses.cka(x, kernel=kernel), (jnp.ones((3, 5, C)),))
        for kernel in ("linear", "polynomial", "rbf")
    },
    **{
        name: (jax.value_and_grad(lambda x, y, loss=loss: jnp.sum(sum(jax.tree.leaves(loss(x, y))))), arguments)
        for name, loss, arguments in (
            ("cc_kernel", losses.cc_kernel, (VECTORS, VECTORS)),
            ("rkd_angle", losses.rkd_angle, (VECTORS, VECTORS)),
            ("emd_ipot", losses.emd_ipot, (VECTORS, VECTORS)),
            ("ickd", losses.ickd, (MAPS, MAPS)),
            ("minibatch_cka", losses.minibatch_cka, (VECTORS, VECTORS)),
            ("hcl", losses.hcl, (MAPS, MAPS)),
            ("feature_gaussian_kl_full", losses.feature_gaussian_kl_full, (MAPS, MAPS)),
            ("feature_gaussian_w2_full", losses.feature_gaussian_w2_full, (MAPS, MAPS)),
            ("feature_sinkhorn", losses.feature_sinkhorn, (MAPS, MAPS)),
        )
    },
}


# Without its plug-in, CUDA has no eigenvalues even to trace.
PAIRS = [
    (name, platform) for name in CASES for platform in ("cuda", "tpu") if (name, platform) != ("gaussian_w2", "cuda")
]


@pytest.mark.parametrize(("name", "platform"), PAIRS)
def test_products_are_in_full_float32(name, platform):
    function, arguments = CASES[name]
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot" in line]
    assert products
    for line in products:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", line), line
