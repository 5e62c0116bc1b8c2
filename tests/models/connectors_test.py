import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.models import connectors, functional
from wkd_jax.types import Tap


def build(name, student, teacher, student_size=(8, 8), teacher_size=(8, 8)):
    """A maker of projectors; taps given by their channels."""
    taps = [Tap(tap, 4) if isinstance(tap, int) else tap for tap in (student, teacher)]
    return lambda: connectors.build(name, *taps, student_size=student_size, teacher_size=teacher_size, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("bottleneck", 512, 512), 854_016),  # ResNet-34 -> ResNet-18
        (("bottleneck", 1024, 2048), 1_382_912),  # ResNet-50 -> MobileNetV1
        (("conv1x1", 256, 256), 66_304),  # resnet32x4 -> resnet8x4
        (("conv1x1", 960, 128, (4, 4), (8, 8)), 1_966_464),  # WRN-40-2 -> ShuffleNetV1
        (("conv3x3", 256, 256), 9 * 256 * 256 + 2 * 256),  # regions of two pyramids
        (("linear", 192, 384), 192 * 384 + 384),
        (("none", 64, 64), 0),
    ],
)
def test_parameter_counts(arguments, count):
    _, params, _, _ = functional.split(nnx.eval_shape(build(*arguments)))
    assert sum(value.size for value in params.values()) == count


@pytest.mark.parametrize(
    ("student_size", "teacher_size", "kernel"),
    [
        ((8, 8), (8, 8), (1, 1)),
        ((14, 28), (7, 14), (3, 3)),
        ((7, 4), (14, 8), (4, 4)),
        ((8, 8), (7, 5), (2, 4)),
        ((9, 9), (4, 4), (6, 6)),
        ((2, 2), (1, 1), (3, 3)),
    ],
)
def test_conv1x1_reaches_the_teachers_size(student_size, teacher_size, kernel):
    make = build("conv1x1", 3, 5, student_size, teacher_size)
    _, params, variables, _ = functional.split(nnx.eval_shape(make))
    assert params["convs/0/kernel"].shape == (*kernel, 3, 5)
    assert {*variables} == {"bn/mean", "bn/var"}
    y = jax.eval_shape(lambda x: make()(x, train=False), jnp.zeros((2, *student_size, 3), jnp.bfloat16))
    assert (y.shape, y.dtype) == ((2, *teacher_size, 5), jnp.bfloat16)  # that of the feature


def norm(projector, x):
    bn = projector.bn
    mean, var, scale, bias = (
        np.asarray(variable[...], np.float64) for variable in (bn.mean, bn.var, bn.scale, bn.bias)
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def test_bottleneck_matches_float64(filled, numpy_conv):
    projector = filled(build("bottleneck", 6, 4))
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 6))
    want = x
    for conv, padding in zip(projector.convs, (0, 1, 0), strict=True):
        want = numpy_conv(want, conv.kernel[...], padding=padding, bias=conv.bias[...])
    got = projector(jnp.asarray(x, jnp.float32), train=False)
    np.testing.assert_allclose(got, np.maximum(norm(projector, want), 0), rtol=1e-4, atol=1e-5)


def test_conv3x3_has_either_sign(filled, numpy_conv):
    projector = filled(build("conv3x3", 6, 4))
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 6))
    (conv,) = projector.convs
    want = norm(projector, numpy_conv(x, conv.kernel[...], padding=1))
    assert conv.bias is None and want.min() < 0
    np.testing.assert_allclose(projector(jnp.asarray(x, jnp.float32), train=False), want, rtol=1e-4, atol=1e-5)


def test_conv1x1_upwards_matches_float64(filled, numpy_conv_transpose):
    projector = filled(build("conv1x1", 3, 4, (4, 3), (8, 6)))
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 3))
    (conv,) = projector.convs
    weight = np.asarray(conv.kernel[...])[::-1, ::-1]
    want = numpy_conv_transpose(x, weight, stride=2, padding=1, bias=conv.bias[...])
    got = projector(jnp.asarray(x, jnp.float32), train=False)
    np.testing.assert_allclose(got, np.maximum(norm(projector, want), 0), rtol=1e-4, atol=1e-5)


def test_training_normalises_the_batch_and_carries_statistics(filled):
    structure, params, variables, _ = functional.split(filled(build("conv1x1", 6, 4)))
    # relu(z) + relu(-z) = |z|: two signs of scale show that what enters the ReLU has mean 0 and variance 1.
    params = {**params, "bn/scale": jnp.ones(4), "bn/bias": jnp.zeros(4)}

    @jax.jit
    def run(params, x):
        projector = structure.merge(params, variables)
        return projector(x, train=True), functional.variables(projector)

    x = jnp.asarray(np.random.default_rng(1).normal(3.0, 1.0, size=(4, 8, 8, 6)), jnp.float32)
    positive, state = run(params, x)
    negative, _ = run({**params, "bn/scale": -jnp.ones(4)}, x)
    np.testing.assert_allclose(jnp.mean(positive - negative, (0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(positive**2 + negative**2, (0, 1, 2)), 1, rtol=1e-4)
    assert float(jnp.min(positive)) == 0
    assert not np.allclose(state["bn/mean"], variables["bn/mean"])


def test_linear_serves_tokens_and_maps(filled):
    projector = filled(build("linear", Tap(6, 16, "tokens", prefix_tokens=1), 4, (7, 7), (8, 8)))
    kernel, bias = (np.asarray(v[...], np.float64) for v in (projector.linear.kernel, projector.linear.bias))
    for shape in ((2, 50, 6), (2, 7, 7, 6)):
        x = np.random.default_rng(2).normal(size=shape)
        got = projector(jnp.asarray(x, jnp.float32), train=True)
        np.testing.assert_allclose(got, x @ kernel + bias, rtol=1e-4, atol=1e-5)
        assert got.shape[:-1] == shape[:-1]  # every position stays, prefix tokens too
        assert float(jnp.min(got)) < 0  # no ReLU


@pytest.mark.parametrize("name", ["conv1x1", "bottleneck", "conv3x3", "linear"])
def test_a_bfloat16_feature_is_projected_in_bfloat16(filled, name):
    projector = filled(build(name, 6, 4))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8, 8, 6)), jnp.bfloat16)
    y = projector(x, train=True)
    wide = projector(x.astype(jnp.float32), train=True)
    assert (y.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, atol=2**-6 * float(jnp.abs(wide).max()))
    if name != "linear":
        assert projector.bn.mean[...].dtype == jnp.float32


def test_none_is_the_identity():
    projector = build("none", 4, 4, (8, 8), (4, 4))()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)), jnp.bfloat16)
    assert projector(x, train=True) is x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv1", 4, 4), "unknown projector 'conv1': did you mean 'conv1x1'"),
        (("conv1x1", 4, 4, (4, 4), (7, 7)), "student's tap is 4 x 4 and the teacher's 7 x 7.*'linear'"),
        (("conv1x1", 4, 4, (8, 4), (4, 8)), "student's tap is 8 x 4 and the teacher's 4 x 8"),
        (("bottleneck", 4, 4, (4, 4), (8, 8)), "student's tap is 4 x 4, the teacher's 8 x 8.*'conv1x1', which resizes"),
        (("conv3x3", 4, 4, (4, 4), (8, 8)), "projector 'conv3x3' keeps the size, .* 4 x 4.*'conv1x1', which resizes"),
        (("conv3x3", 4, Tap(4, 16, "tokens")), "the teacher's tap has layout 'tokens': choose 'linear'"),
        (("bottleneck", Tap(4, 16, "tokens"), 4), "the student's tap has layout 'tokens': choose 'linear'"),
        (("conv1x1", 4, Tap(4, 16, "tokens")), "the teacher's tap has layout 'tokens': choose 'linear'"),
        (("none", 4, 8), "student's tap has 4 channels, the teacher's 8: choose 'linear' or 'conv1x1'"),
    ],
)
def test_errors_name_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)()


@pytest.mark.parametrize(
    ("image", "stride", "size"), [((32, 32), 4, (8, 8)), ((9, 13), 4, (3, 4)), ((3, 8), 4, (1, 2))]
)
def test_spatial_size(image, stride, size):
    assert connectors.spatial_size(Tap(1, stride), image) == size


def test_a_tap_of_fixed_size_keeps_it():
    assert connectors.spatial_size(Tap(8, 16, size=(7, 7)), (800, 1333)) == (7, 7)
