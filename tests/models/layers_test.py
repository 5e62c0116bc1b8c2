import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wkd_jax.models import functional
from wkd_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    LayerNorm,
    Linear,
    avg_pool,
    conv_norm,
    dropout,
    he_fan_out,
    max_pool,
    mean_over_positions,
)

EPS = 1e-5


def oracle(x, group_size=None, scale=1.0, bias=0.0):
    """BatchNorm in float64: (output, running mean, running variance) after one step from 0 and 1."""
    x = np.asarray(x, np.float64)
    groups = x.reshape(-1, group_size or len(x), *x.shape[1:])
    axes = tuple(range(1, groups.ndim - 1))
    mean, var = groups.mean(axes, keepdims=True), groups.var(axes, keepdims=True)
    y = ((groups - mean) / np.sqrt(var + EPS)).reshape(x.shape) * scale + bias
    unbiased = groups.var(axes, ddof=1).mean(0)
    return y, 0.1 * mean.reshape(len(groups), -1).mean(0), 0.9 + 0.1 * unbiased


def apply(norm, x, *, train=True):
    """The norm under jit: (output, carried state)."""
    structure, params, variables, _ = functional.split(norm)

    def run(params, variables, x):
        module = structure.merge(params, variables)
        return module(x, train=train), functional.variables(module)

    return jax.jit(run)(params, variables, x)


@pytest.mark.parametrize("shape", [(8, 5, 4, 3), (8, 7, 3), (8, 3)])
@pytest.mark.parametrize("group_size", [None, 2, 8])
def test_training_matches_float64(shape, group_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * [1.0, 3.0, 0.1] + [0.0, -4.0, 2.0]
    scale, bias = np.array([0.5, 1.0, -2.0]), np.array([1.0, 0.0, 3.0])
    norm = BatchNorm(3, group_size=group_size)
    norm.scale.set_value(jnp.asarray(scale, jnp.float32))
    norm.bias.set_value(jnp.asarray(bias, jnp.float32))
    y, state = apply(norm, jnp.asarray(x, jnp.float32))
    want, mean, var = oracle(np.float32(x), group_size, scale, bias)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["var"], var, rtol=1e-6)


# The spread of each channel is a small part of its mean: a mean of squares less a squared mean, both in float32, would
# keep no digit of the variance in the last three cases. Rounding of x itself is in the oracle's input too.
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (-300.0, 0.03), (1e4, 1.0), (1e6, 10.0)])
def test_large_means_keep_the_variance(offset, spread):
    x = np.float32(np.random.default_rng(1).normal(offset, spread, size=(16, 9, 9, 4)))
    y, state = apply(BatchNorm(4), jnp.asarray(x))
    want, mean, var = oracle(x)
    np.testing.assert_allclose(y, want, atol=1e-4)
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["var"], var, rtol=1e-5)


def test_shift_far_from_the_mean_is_bounded():
    # The worst case of the shift: the middle position of every map is an outlier. A few times P = 81 roundings.
    x = np.random.default_rng(2).normal(size=(16, 9, 9, 4))
    x[:, 4, 4] += 1e4
    y, state = apply(BatchNorm(4), jnp.asarray(x, jnp.float32))
    want, _, var = oracle(np.float32(x))
    np.testing.assert_allclose(y, want, rtol=3 * 81 * 1.2e-7, atol=3 * 81 * 1.2e-7)
    np.testing.assert_allclose(state["var"], var, rtol=3 * 81 * 1.2e-7)


@pytest.mark.parametrize("group_size", [None, 2])
def test_gradient_matches_float64(group_size):
    rng = np.random.default_rng(3)
    x, cotangent = rng.normal(1.0, 2.0, size=(6, 4, 3, 2)), rng.normal(size=(6, 4, 3, 2))
    scale = np.array([0.5, -2.0])
    norm = BatchNorm(2, group_size=group_size)
    norm.scale.set_value(jnp.asarray(scale, jnp.float32))
    structure, params, variables, _ = functional.split(norm)

    @jax.jit
    @jax.grad
    def gradient(inputs):
        return jnp.sum(structure.merge(inputs["params"], variables)(inputs["x"], train=True) * cotangent)

    got = gradient({"params": params, "x": jnp.asarray(x, jnp.float32)})
    # dx = scale / std * (g - mean(g) - x_hat * mean(g * x_hat)), means within a group.
    groups = x.reshape(-1, group_size or 6, 4, 3, 2)
    g = cotangent.reshape(groups.shape)
    std = np.sqrt(groups.var((1, 2, 3), keepdims=True) + EPS)
    x_hat = (groups - groups.mean((1, 2, 3), keepdims=True)) / std
    slope = np.mean(g * x_hat, (1, 2, 3), keepdims=True)
    dx = scale / std * (g - g.mean((1, 2, 3), keepdims=True) - x_hat * slope)
    np.testing.assert_allclose(got["x"], dx.reshape(x.shape), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["params"]["scale"], (g * x_hat).sum((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(got["params"]["bias"], cotangent.sum((0, 1, 2)), rtol=1e-5)


def test_bfloat16_activations_have_float32_statistics():
    # At mean 8 and spread 0.5 a bfloat16 sum of 1296 terms would stop growing long before its end.
    x = jnp.asarray(np.random.default_rng(4).normal(8.0, 0.5, size=(16, 9, 9, 2)), jnp.bfloat16)
    y, state = apply(BatchNorm(2), x)
    want, mean, var = oracle(x)
    assert y.dtype == jnp.bfloat16
    assert state["mean"].dtype == state["var"].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)  # one rounding, of the output
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(state["var"], var, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("group_size", [None, 2])
def test_fused_relu_equals_one_that_follows(dtype, group_size):
    rng = np.random.default_rng(7)
    x, cotangent = jnp.asarray(rng.normal(0.3, 2.0, (6, 4, 3, 2)), dtype), rng.normal(size=(6, 4, 3, 2))
    structure, params, variables, _ = functional.split(BatchNorm(2, group_size=group_size))
    params = {"scale": jnp.array([0.5, -2.0]), "bias": jnp.array([0.1, -0.2])}

    def gradients(relu):
        def value(params, x):
            module = structure.merge(params, variables)
            y = module(x, train=True, relu=True) if relu else nnx.relu(module(x, train=True))
            return jnp.sum(y * cotangent), y

        return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(params, x)

    # A bfloat16 output that rounds to 0 has no derivative in the one and has it in the other.
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
    fused, apart = gradients(True), gradients(False)
    assert float(jnp.min(fused[0][1])) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), fused, apart)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_evaluation_folds_the_normalisation_into_the_convolution(bias, groups):
    rng = np.random.default_rng(8)
    conv = Conv(4, 6, 3, stride=2, padding=1, groups=groups, use_bias=bias, rngs=nnx.Rngs(0))
    norm = BatchNorm(6)
    for variable, low, high in ((norm.scale, -2, 2), (norm.bias, -1, 1), (norm.mean, -1, 1), (norm.var, 0.1, 2)):
        variable.set_value(jnp.asarray(rng.uniform(low, high, 6), jnp.float32))
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 4)), jnp.float32)
    apart = norm(conv(x), train=False)
    np.testing.assert_allclose(conv_norm(x, conv, norm, train=False), apart, rtol=1e-5, atol=1e-5)
    folded = conv_norm(x, conv, norm, train=False, relu=True)
    np.testing.assert_allclose(folded, nnx.relu(apart), rtol=1e-5, atol=1e-5)
    conv.dtype = jnp.bfloat16
    folded = conv_norm(x.astype(jnp.bfloat16), conv, norm, train=False)
    assert folded.dtype == jnp.bfloat16
    np.testing.assert_allclose(folded.astype(jnp.float32), apart, atol=2**-6 * float(jnp.abs(apart).max()))


def test_evaluation_uses_and_keeps_the_running_statistics():
    norm = BatchNorm(2, group_size=3)  # no divisor of the batch: grouping is for training alone
    norm.mean.set_value(jnp.array([1.0, -2.0]))
    norm.var.set_value(jnp.array([4.0, 0.25]))
    x = np.random.default_rng(5).normal(size=(4, 3, 3, 2))
    y, state = apply(norm, jnp.asarray(x, jnp.float32), train=False)
    np.testing.assert_allclose(y, (x - [1, -2]) / np.sqrt(np.array([4, 0.25]) + EPS), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state["mean"], [1, -2])
    np.testing.assert_array_equal(state["var"], [4, 0.25])


def test_constant_channel_is_finite():
    x = jnp.full((4, 3, 3, 1), 0.1)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(BatchNorm(1)(x, train=True) ** 2))(x)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-3)
    _, state = apply(BatchNorm(1), x)
    np.testing.assert_allclose(state["var"], 0.9, rtol=1e-6)


def test_errors_name_the_sizes():
    with pytest.raises(ValueError, match="groups of 3 examples do not divide a batch of 8; choose a norm_group_size"):
        BatchNorm(2, group_size=3)(jnp.zeros((8, 2, 2, 2)), train=True)
    with pytest.raises(ValueError, match=re.escape("input (4, 1, 1, 2) has no variance")):
        BatchNorm(2, group_size=1)(jnp.zeros((4, 1, 1, 2)), train=True)
    with pytest.raises(ValueError, match="group size 0: must be 1 or more"):
        BatchNorm(2, group_size=0)


@pytest.mark.parametrize("group_size", [None, 2, 4])
def test_eight_devices_equal_one(group_size):
    structure, params, variables, _ = functional.split(BatchNorm(3, group_size=group_size))
    x = jnp.asarray(np.random.default_rng(6).normal(2.0, 1.0, size=(16, 4, 4, 3)), jnp.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def run(x):
        def value(x):
            norm = structure.merge(params, variables)
            return jnp.sum(jnp.sin(norm(x, train=True))), functional.variables(norm)

        return jax.value_and_grad(value, has_aux=True)(x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(sharded), run(x))
    forward = jax.jit(lambda x: structure.merge(params, variables)(x, train=True))
    program = forward.lower(sharded).compile().as_text()
    # Groups of one device's 2 examples are normalised where they are; no case moves activations.
    assert ("all-reduce" in program) == (group_size != 2)
    assert not re.search("all-gather|all-to-all|collective-permute", program)


def test_shard_map_sums_the_derivatives_of_shared_parameters():
    structure, params, variables, _ = functional.split(BatchNorm(3))
    x = jnp.asarray(np.random.default_rng(9).normal(size=(16, 4, 4, 3)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def value(params, x):
        return jnp.sum(jnp.sin(structure.merge(params, variables)(x, train=True)))

    def on_one(params, x):
        return jax.lax.psum(value(params, x), "data")

    cut = jax.shard_map(on_one, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec())
    got = jax.jit(jax.grad(cut))(params, x)
    apart = [jax.grad(value)(params, part) for part in jnp.split(x, 8)]
    want = jax.tree.map(lambda *leaves: sum(leaves), *apart)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def uniform(array, bound):
    """Whether values look drawn from U(-bound, bound): none outside, and the right standard deviation."""
    array = np.asarray(array)
    return np.abs(array).max() <= bound and abs(array.std() / (bound / np.sqrt(3)) - 1) < 0.2


def test_initial_values():
    # Equal shapes throughout, since drawing random numbers of a new shape compiles for a second.
    conv = Conv(8, 64, 3, groups=2, rngs=nnx.Rngs(0))
    assert conv.kernel.shape == (3, 3, 4, 64)
    assert uniform(conv.kernel[...], (4 * 9) ** -0.5)
    assert uniform(conv.bias[...], (4 * 9) ** -0.5)
    transposed = ConvTranspose(4, 64, 3, stride=2, padding=1, rngs=nnx.Rngs(0))  # torch reads the output side
    assert uniform(transposed.kernel[...], (64 * 9) ** -0.5)
    assert uniform(transposed.bias[...], (64 * 9) ** -0.5)
    linear = Linear(25, 64, rngs=nnx.Rngs(0))
    assert uniform(linear.kernel[...], 0.2)
    assert uniform(linear.bias[...], 0.2)
    he = np.asarray(Conv(4, 64, 3, kernel_init=he_fan_out, use_bias=False, rngs=nnx.Rngs(0)).kernel[...])
    np.testing.assert_allclose(he.std(), np.sqrt(2 / (9 * 64)), rtol=0.05)
    assert np.abs(he).max() > 3 * he.std()  # a plain normal, not a truncated one


@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"), [((7, 8), 2, 1, 1), ((8, 8), 2, 1, 4), ((5, 6), 1, 0, 1)]
)
def test_conv_geometry(filled, numpy_conv, size, stride, padding, groups):
    conv = filled(lambda: Conv(4, 8, 3, stride=stride, padding=padding, groups=groups, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(7).normal(size=(2, *size, 4))
    want = numpy_conv(x, conv.kernel[...], stride=stride, padding=padding, groups=groups, bias=conv.bias[...])
    np.testing.assert_allclose(conv(jnp.asarray(x, jnp.float32)), want, rtol=1e-4, atol=1e-5)


def test_transposed_conv_geometry(filled, numpy_conv_transpose):
    conv = filled(lambda: ConvTranspose(3, 5, 4, stride=2, padding=1, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(8).normal(size=(2, 4, 3, 3))
    y = conv(jnp.asarray(x, jnp.float32))
    assert y.shape == (2, 8, 6, 5)
    weight = np.asarray(conv.kernel[...])[::-1, ::-1]
    want = numpy_conv_transpose(x, weight, stride=2, padding=1, bias=conv.bias[...])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_compute_dtype_leaves_parameters_float32(filled):
    for layer in (Conv, Linear):
        layer = filled(lambda layer=layer: layer(3, 4, *[1] * (layer is Conv), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
        assert layer(jnp.zeros((1, 2, 2, 3))).dtype == jnp.bfloat16


def test_layer_norm(filled):
    """Float64 oracle, on values far from 0 where a one-pass variance would lose its digits."""
    norm = filled(lambda: LayerNorm(6, eps=1e-5))
    x = np.random.default_rng(0).normal(3000.0, 1.0, (2, 5, 6)).astype(np.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    want = want * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, atol=2e-3)  # float32 has 2e-4 between numbers near 3000
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_layer_norm_in_bfloat16(filled):
    """Only the result is rounded: not the statistics, not the parameters."""
    norm = filled(lambda: LayerNorm(64, eps=1e-6, dtype=jnp.bfloat16))
    exact = filled(lambda: LayerNorm(64, eps=1e-6))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), exact(x).astype(jnp.bfloat16))


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 0)])
def test_pools(size, stride, padding):
    """From the definition: the border never wins a maximum, and counts as zeros in a mean."""
    x = np.random.default_rng(0).normal(-5.0, 1.0, (2, 7, 6, 3)).astype(np.float32)

    def windows(fill):
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
        return np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]

    settings = {"stride": stride, "padding": padding}
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), size, **settings), windows(-np.inf).max((-2, -1)))
    np.testing.assert_allclose(avg_pool(jnp.asarray(x), size, **settings), windows(0).mean((-2, -1)), rtol=1e-5)


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool_gradient_goes_to_the_first_of_the_largest(size, stride, padding, dtype):
    """Against loops over windows, on values with many ties, and on sizes whose last rows no window covers."""
    rng = np.random.default_rng(1)
    x = rng.integers(-2, 3, (2, 8, 7, 3)).astype(np.float32)
    sides = [(side + 2 * padding - size) // stride + 1 for side in x.shape[1:3]]
    cotangent = rng.integers(-8, 9, (2, *sides, 3)).astype(np.float32)
    want = np.zeros_like(x)
    for b, i, j, d in np.ndindex(cotangent.shape):
        top, left = (max(k * stride - padding, 0) for k in (i, j))
        bottom, right = (k * stride - padding + size for k in (i, j))
        window = x[b, top:bottom, left:right, d]
        row, column = np.unravel_index(np.argmax(window), window.shape)
        want[b, top + row, left + column, d] += cotangent[b, i, j, d]

    def value(x):
        return jnp.sum(max_pool(x, size, stride=stride, padding=padding) * cotangent)

    gradient = jax.jit(jax.grad(value))(jnp.asarray(x, dtype))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, want)


def test_max_pool_passes_nan_on():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    assert np.isnan(max_pool(x, 2, stride=2)).ravel().tolist() == [True, False, False, False]


def test_mean_over_positions_is_taken_in_float32():
    x = jnp.full((1, 64, 64, 1), 1.01, jnp.bfloat16)
    got = mean_over_positions(x)
    assert (got.shape, got.dtype) == ((1, 1), jnp.float32)
    np.testing.assert_allclose(got, float(x[0, 0, 0, 0]), rtol=1e-6)


@pytest.mark.parametrize("whole_examples", [False, True])
def test_dropout(whole_examples):
    x = jnp.ones((2000, 3, 2), jnp.bfloat16)
    y = np.asarray(dropout(x, 0.25, train=True, rngs=nnx.Rngs(0), whole_examples=whole_examples).astype(jnp.float32))
    assert {*np.unique(y)} == {0.0, np.float32(jnp.bfloat16(4 / 3))}
    one_fate = (y == y[:, :1, :1]).all()
    assert one_fate == whole_examples
    assert abs((y > 0).mean() - 0.75) < 0.04  # four deviations of 2000 draws
    for same in (dropout(x, 0.25, train=False, rngs=None), dropout(x, 0.0, train=True, rngs=None)):
        assert same is x
    with pytest.raises(ValueError, match="dropout of rate 0.25 in training needs randomness"):
        dropout(x, 0.25, train=True, rngs=None)


@pytest.mark.parametrize("layer", [Linear, Conv])
def test_given_initial_values(layer):
    shape = (3, 4, *[1] * (layer is Conv))
    ones, twos = jax.nn.initializers.ones, jax.nn.initializers.constant(2.0)
    made = layer(*shape, kernel_init=ones, bias_init=twos, rngs=nnx.Rngs(0))
    assert (made.kernel[...] == 1).all() and (made.bias[...] == 2).all()


def test_linear_without_a_dtype_widens():
    head = Linear(3, 4, rngs=nnx.Rngs(0))
    assert head(jnp.zeros((1, 3), jnp.bfloat16)).dtype == jnp.float32
