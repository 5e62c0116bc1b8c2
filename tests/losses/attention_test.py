"""`attention_transfer` against its golden, torch, and maps of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wkd_jax import losses

F = (np.arange(1, 9) / 4).reshape(1, 2, 2, 2).transpose(0, 2, 3, 1)
R = np.array([[[1, 0.5], [0, 2]], [[0.5, 1], [1.5, 0]], [[0, 0], [1, 1]]])[None].transpose(0, 2, 3, 1)


def on_host(loss, *static):
    """Compiled, with NumPy results."""
    compiled = jax.jit(loss, static_argnames=static)
    return lambda *args, **settings: jax.device_get(compiled(*args, **settings))


attention_transfer = on_host(losses.attention_transfer)
both = on_host(jax.value_and_grad(lambda f, r: losses.attention_transfer(f, r).sum(), argnums=(0, 1)))


def test_golden():
    with jax.enable_x64(True):
        value, (gradient, nothing) = both(jnp.asarray(F), jnp.asarray(R))
    np.testing.assert_array_equal(nothing, np.zeros_like(R))
    np.testing.assert_allclose(value, 0.00842029, atol=1e-8)
    expected = [0.0011663, 0.0114783, -0.0003096, -0.0126953]
    np.testing.assert_allclose(gradient[0, :, :, 0].ravel(), expected, atol=1e-7)


def test_against_torch():
    rng = np.random.default_rng(0)
    student = torch.tensor(rng.normal(size=(3, 4, 5, 6)), requires_grad=True)
    target = torch.tensor(rng.normal(size=(3, 4, 5, 2)))
    v, w = (torch.nn.functional.normalize(x.square().mean(-1).flatten(1), eps=1e-12) for x in (student, target))
    expected = (v - w).square().mean(1)
    expected.sum().backward()
    maps = student.detach().numpy(), target.numpy()
    with jax.enable_x64(True):
        value, (gradient, _) = both(*map(jnp.asarray, maps))
    np.testing.assert_allclose(value, expected.sum().item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, student.grad, atol=1e-12)
    each = attention_transfer(*maps)
    np.testing.assert_allclose(each, expected.detach(), rtol=1e-5)
    # The published loss is the mean over all entries, that is the mean over examples.
    np.testing.assert_allclose(each.mean(), torch.nn.functional.mse_loss(v, w).item(), rtol=1e-5)
    moved = attention_transfer(*(x[::-1] for x in maps))
    np.testing.assert_allclose(moved, each[::-1], rtol=1e-6)


def test_scale_does_not_matter():
    np.testing.assert_array_equal(attention_transfer(F, F), [0])
    np.testing.assert_allclose(attention_transfer(7 * F, R), attention_transfer(F, 0.1 * R), rtol=1e-5)


def test_zeros_are_finite():
    """A map without energy has attention 0, and no gradient."""
    zeros = np.zeros_like(F, np.float32)
    value, (gradient, _) = both(zeros, R.astype(np.float32))
    np.testing.assert_allclose(value, 1 / 4, rtol=1e-6)
    np.testing.assert_array_equal(gradient, zeros)
    value, (gradient, _) = both(F.astype(np.float32), zeros)
    np.testing.assert_allclose(value, 1 / 4, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_bfloat16_is_computed_in_float32():
    f, r = jnp.asarray(F, jnp.bfloat16), jnp.asarray(R, jnp.bfloat16)
    low, high = attention_transfer(f, r), attention_transfer(f.astype(jnp.float32), r.astype(jnp.float32))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=1e-6)


@pytest.mark.parametrize("target", [R[0], R[:, :1], np.concatenate([R, R])])
def test_errors(target):
    with pytest.raises(ValueError, match="two maps"):
        attention_transfer(F, target)
