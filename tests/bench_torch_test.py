"""benchmarks/bench_torch.py: what PyTorch is timed on computes the same as ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import losses, registry
from wkd_jax.models import cost

torch = pytest.importorskip("torch")

from benchmarks import bench_torch, imagenet_step  # noqa: E402

B, C = 4, 12


def gradient(loss, student, *rest):
    """(value, gradient in the first argument) in PyTorch, float64."""
    student = torch.tensor(student, requires_grad=True)
    value = loss(student, *map(torch.as_tensor, rest))
    value.backward()
    return value.item(), student.grad.numpy()


def agree(ours, theirs):
    """Both value and gradient, to float32."""
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-4 * np.abs(theirs[1]).max())


def logits():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(C, 3))
    similarity = np.exp(-0.1 * np.square(points[:, None] - points).sum(-1))
    return 2 * rng.normal(size=(B, C)), 2 * rng.normal(size=(B, C)), rng.integers(0, C, B), 1 - np.exp(similarity - 1)


def test_kd():
    student, teacher, _, _ = logits()
    ours = jax.value_and_grad(lambda s: losses.kd(s, jnp.asarray(teacher)).mean())(jnp.asarray(student))
    agree(ours, gradient(bench_torch.kd, student, teacher))


@pytest.mark.parametrize("transport", [bench_torch.transport_direct, bench_torch.transport_batched])
def test_both_forms_of_wkd_l(transport):
    student, teacher, labels, ground = logits()

    def ours(s):
        target, wasserstein = losses.wkd_logit(s, jnp.asarray(teacher), jnp.asarray(labels), jnp.asarray(ground))
        return (target + 30 * wasserstein).mean()

    def theirs(s, t, y, cost):
        return bench_torch.target_term(s, t, y) + 30 * transport(s, t, y, cost)

    agree(jax.jit(jax.value_and_grad(ours))(jnp.asarray(student)), gradient(theirs, student, teacher, labels, ground))


def test_wkd_f():
    rng = np.random.default_rng(1)
    student, teacher = (rng.normal(size=(B, 7, 7, 3)) for _ in range(2))

    def ours(s):
        mean_term, cov_term = losses.wkd_feature(s, jnp.asarray(teacher), grid=4)
        return (2 * mean_term + cov_term).mean()

    def theirs(s, t):
        mean_term, cov_term = bench_torch.wkd_feature(s.permute(0, 3, 1, 2), t.permute(0, 3, 1, 2))
        return 2 * mean_term + cov_term

    agree(jax.value_and_grad(ours)(jnp.asarray(student)), gradient(theirs, student, teacher))


def test_networks_have_the_same_parameters():
    assert {pair: imagenet_step.PAIRS[pair] for pair in bench_torch.PAIRS} == bench_torch.PAIRS
    for name in {name for pair in bench_torch.PAIRS.values() for name in pair}:
        ours = nnx.eval_shape(lambda name=name: registry.get("models", name)(1000, rngs=nnx.Rngs(0)))
        with torch.device("meta"):
            theirs = bench_torch.network(name, 1000)
        assert sum(parameter.numel() for parameter in theirs.parameters()) == cost.parameters(ours), name
