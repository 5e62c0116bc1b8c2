"""MobileNets, ShuffleNets, wide ResNets and VGGs: what holds without another implementation to compare with."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.connectors import spatial_size
from wkd_jax.models.layers import BatchNorm, Conv, Linear, he_fan_out
from wkd_jax.models.mobilenetv2 import ConvNorm
from wkd_jax.models.shufflenetv1 import channel_shuffle
from wkd_jax.models.vgg import VGG
from wkd_jax.models.wide_resnet import Block, WideResNet

# One of each family, the smallest.
FAMILIES = ["mobilenetv1", "mobilenetv2", "cifar_mobilenetv2", "wrn_16_1", "shufflenetv1", "shufflenetv2", "vgg8"]
PARAMETERS = {  # for 100 classes
    "mobilenetv1": 3_309_476,
    "mobilenetv2": 2_351_972,
    "cifar_mobilenetv2": 812_836,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_28_10": 36_536_884,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
}


def build(name, num_classes=7, **settings):
    return lambda: registry.get("models", name)(num_classes, rngs=nnx.Rngs(0), **settings)


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def compiled(function, *arguments):
    return jax.jit(function)(*arguments)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = nnx.eval_shape(build(name, 100))
    _, params, _, constants = functional.split(model)
    assert sum(value.size for value in params.values()) == PARAMETERS[name]
    assert params[model.info.classifier].shape == (model.info.pooled, 100)
    assert not constants


@pytest.mark.parametrize(("name", "count"), [("mobilenetv1", 4_231_976), ("mobilenetv2", 3_504_872)])
def test_parameter_counts_for_imagenet(name, count):
    _, params, _, _ = functional.split(nnx.eval_shape(build(name, 1000)))
    assert sum(value.size for value in params.values()) == count


@pytest.mark.parametrize("size", [(37, 21), (8, 65)])  # rounding shows in every tap; the last is one position high
@pytest.mark.parametrize("name", FAMILIES)
def test_info_tells_the_shapes(name, size):
    infos = []

    def run(image):
        model = build(name, dtype=jnp.bfloat16)()
        infos.append(model.info)
        return model(image, train=False)

    outputs, (info,) = jax.eval_shape(run, images(2, *size, 3)), infos
    assert (info.name, info.num_classes) == (name, 7)
    assert {*outputs.taps} == {*info.taps}
    for tap, told in info.taps.items():
        shape = (2, *spatial_size(told, size), told.channels)
        assert (outputs.taps[tap].shape, outputs.taps[tap].dtype) == (shape, jnp.bfloat16), tap
    assert (outputs.pooled.shape, outputs.pooled.dtype) == ((2, info.pooled), jnp.float32)
    assert (outputs.logits.shape, outputs.logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_from_and_bfloat16(filled, name):
    """From every tap, the rest of the network; and rounding to bfloat16 does not change what the network says."""
    structure, params, variables, _ = functional.split(filled(build(name)))
    half = functional.split(nnx.eval_shape(build(name, dtype=jnp.bfloat16)))[0]
    model = nnx.eval_shape(build(name))

    def run(params, variables, x):
        model = structure.merge(params, variables)
        whole = model(x, train=False)
        parts = {tap: model.forward_from(tap, value, train=False) for tap, value in whole.taps.items()}
        return whole, parts

    image = images(2, 40, 24, 3)
    whole, parts = compiled(run, params, variables, image)
    rounded = compiled(lambda p, v, x: half.merge(p, v)(x, train=False), params, variables, image)
    order = list(model.info.taps)
    assert {*parts} == {*order}
    for tap, part in parts.items():
        assert {*part.taps} == {*order[order.index(tap) + 1 :]}
        np.testing.assert_allclose(part.logits, whole.logits, rtol=1e-5, atol=1e-6, err_msg=tap)
        np.testing.assert_allclose(part.pooled, whole.pooled, rtol=1e-5, atol=1e-6, err_msg=tap)
        # The published sign is what comes out.
        assert np.any(np.asarray(whole.taps[tap]) < 0) == model.info.taps[tap].signed, tap
        scale = np.abs(whole.taps[tap]).max()
        np.testing.assert_allclose(rounded.taps[tap].astype(jnp.float32), whole.taps[tap], atol=0.1 * scale)
    np.testing.assert_allclose(rounded.logits, whole.logits, atol=0.05 * np.abs(whole.logits).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_norm_group_size_reaches_every_norm(name):
    model = nnx.eval_shape(build(name, norm_group_size=4))
    norms = [module for _, module in nnx.iter_graph(model) if isinstance(module, BatchNorm)]
    assert {norm.group_size for norm in norms} == {4}
    assert 2 * len(norms) == len(functional.split(model)[2])


def test_smallest_images():
    def run(name, *size):
        return jax.eval_shape(lambda x: build(name)()(x, train=False), images(1, *size, 3))

    with pytest.raises(ValueError, match=r"vgg8: an input of \(1, 7, 32, 3\) is too small, stage3 would have shape"):
        run("vgg8", 7, 32)
    assert run("vgg8", 8, 8).taps["stage4"].shape == (1, 1, 1, 512)
    for name in FAMILIES[:-1]:
        assert run(name, 1, 1).logits.shape == (1, 7)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown VGG 'vgg12': .*Valid: vgg8, vgg11"):
        VGG("vgg12", 10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown Wide ResNet 'wrn_40_4': .*Valid: wrn_16_1"):
        WideResNet("wrn_40_4", 10, rngs=nnx.Rngs(0))


def test_settings():
    settings = {name: [*inspect.signature(registry.get("models", name)).parameters][3:-1] for name in FAMILIES}
    assert settings.pop("mobilenetv2") == ["dropout_rate", "timm_init"]
    assert settings.pop("wrn_16_1") == ["dropout_rate"]
    assert not any(settings.values())


@pytest.mark.parametrize("name", ["mobilenetv2", "wrn_16_1"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, "0.1"])
def test_wrong_rates(name, rate):
    with pytest.raises(ValueError, match=rf"dropout_rate={rate!r}: must be a number from 0"):
        build(name, dropout_rate=rate)()


def test_channel_shuffle():
    x = np.arange(2 * 3 * 12).reshape(2, 3, 12)
    want = np.empty_like(x)
    for group in range(3):
        for position in range(4):
            want[..., position * 3 + group] = x[..., group * 4 + position]
    np.testing.assert_array_equal(channel_shuffle(jnp.asarray(x), 3), want)
    np.testing.assert_array_equal(channel_shuffle(jnp.asarray(x), 1), x)


def test_relu6_clips():
    conv = Conv(1, 1, 1, use_bias=False, kernel_init=jax.nn.initializers.ones, rngs=nnx.Rngs(0))
    layer = ConvNorm([conv, BatchNorm(1, eps=0.0)])
    x = jnp.array([-9.0, -1.0, 2.0, 5.0, 7.0]).reshape(1, 5, 1, 1)
    np.testing.assert_allclose(layer(x, train=False).ravel(), [0, 0, 2, 5, 6])


def test_dropout_before_the_classifier():
    def logits(rate, *, train=True, rngs=None):
        """Of ones through a classifier of ones: the entries that are kept are counted."""
        structure, params, variables, _ = functional.split(nnx.eval_shape(build("mobilenetv2", dropout_rate=rate)))
        ones = {key: np.ones(value.shape, np.float32) for key, value in {**params, **variables}.items()}
        outputs = structure.merge(ones).forward_from("stage4", jnp.ones((64, 1, 1, 1280)), train=train, rngs=rngs)
        np.testing.assert_array_equal(outputs.pooled, np.ones((64, 1280)))  # taken before dropout
        return np.asarray(outputs.logits[:, 0]) - 1

    np.testing.assert_allclose(logits(0.2, train=False), 1280)
    np.testing.assert_allclose(logits(0.0), 1280)
    kept = logits(0.2, rngs=nnx.Rngs(0)) * 0.8
    np.testing.assert_allclose(kept.mean(), 0.8 * 1280, rtol=0.01)
    assert 10 < kept.std() < 19  # 14.3 for independent entries
    with pytest.raises(ValueError, match="dropout of rate 0.2 in training needs randomness"):
        logits(0.2)


def test_dropout_between_the_convolutions_of_a_block(filled):
    def branch(rate, kernel, *, train=True, key=None):
        """What the block adds to its input, with this kernel in conv2."""

        def make():
            settings = {"use_bias": False, "rngs": nnx.Rngs(0)}
            return Block(8, 8, stride=1, dropout_rate=rate, norm_group_size=None, settings=settings)

        def run(kernel, key):
            block = filled(make)
            block.conv2.kernel.set_value(kernel)
            return block(x, train=train, rngs=None if key is None else nnx.Rngs(key)) - x

        x = images(2, 6, 5, 8)
        return np.asarray(compiled(run, kernel, key))

    key, identity = jax.random.key(0), jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    plain, dropped = branch(0.0, identity), branch(0.5, identity, key=key)
    # After the ReLU: entries are twice what they were, or 0.
    kept = np.abs(dropped) > 1e-5
    np.testing.assert_allclose(dropped[kept], 2 * plain[kept], rtol=1e-4, atol=1e-5)
    assert 0.3 < kept.sum() / np.sum(np.abs(plain) > 1e-5) < 0.7
    # Before the second convolution, which mixes kept and dropped entries.
    mixed = branch(0.5, jnp.ones((3, 3, 8, 8)), key=key)
    assert np.mean(np.abs(mixed) < 1e-5) < 0.01
    np.testing.assert_array_equal(branch(0.5, identity, train=False), branch(0.0, identity, train=False))
    with pytest.raises(ValueError, match="dropout of rate 0.5 in training needs randomness"):
        branch(0.5, identity)


# name -> (initializer of convolutions, deviations of the classifier's kernel and bias); None for torch's default.
INITIAL = {
    "mobilenetv1": (None, None, None),
    "mobilenetv2": (he_fan_out, 0.01, 0.0),
    "cifar_mobilenetv2": (he_fan_out, 0.01, 0.0),
    "wrn_16_1": (he_fan_out, None, 0.0),
    "shufflenetv1": (None, None, None),
    "shufflenetv2": (None, None, None),
    "vgg8": (he_fan_out, 0.01, 0.0),
}


@pytest.fixture
def layers_built(monkeypatch):
    """What each convolution and linear layer is built with, by class."""
    built = {Conv: [], Linear: []}
    for kind, calls in built.items():

        def spy(self, *args, init=kind.__init__, calls=calls, **kwargs):
            calls.append(kwargs)
            init(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", spy)
    return built


def deviation(initializer, shape):
    return None if initializer is None else float(np.std(initializer(jax.random.key(0), shape)))


@pytest.mark.parametrize("name", INITIAL)
def test_initial_values(layers_built, name):
    """By what layers are built with: sampling every one would take long, and the initializers have tests of theirs."""
    nnx.eval_shape(build(name, 100))
    kernel, classifier, bias = INITIAL[name]
    assert {call.get("kernel_init") for call in layers_built[Conv]} == {kernel}
    # Only VGG's convolutions have biases.
    biases = {deviation(call.get("bias_init"), (64,)) for call in layers_built[Conv] if call.get("use_bias", True)}
    assert biases == ({0.0} if name == "vgg8" else set())
    (linear,) = layers_built[Linear]
    assert deviation(linear.get("kernel_init"), (512, 100)) == (classifier and pytest.approx(classifier, rel=0.02))
    assert deviation(linear.get("bias_init"), (100,)) == bias


def test_initial_values_of_timm(layers_built):
    nnx.eval_shape(build("mobilenetv2", 100, timm_init=True))
    depthwise = [call["kernel_init"] for call in layers_built[Conv] if call["groups"] > 1]
    others = {call["kernel_init"] for call in layers_built[Conv] if call["groups"] == 1}
    assert (len(depthwise), others) == (17, {he_fan_out})
    assert deviation(depthwise[0], (3, 3, 1, 5000)) == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    (linear,) = layers_built[Linear]
    values = linear["kernel_init"](jax.random.key(0), (1280, 100))
    assert np.abs(values).max() == pytest.approx(0.1, rel=1e-3)  # 1 / sqrt(100 classes)
    assert np.std(values) == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert deviation(linear["bias_init"], (100,)) == 0
