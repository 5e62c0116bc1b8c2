"""ImageNet ResNets: what parity with torchvision does not show, and what all families inherit from `base.Staged`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.models.base import Staged
from wkd_jax.models.connectors import spatial_size
from wkd_jax.models.layers import BatchNorm
from wkd_jax.models.resnet import REGISTER, SPECS, ResNet
from wkd_jax.types import ModelInfo, Tap


def build(name, num_classes=10, **settings):
    return lambda: REGISTER[name](num_classes, rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (1, 5)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_info_tells_the_shapes(name, size):
    def run(image):
        return build(name, 7, dtype=jnp.bfloat16)()(image, train=False)

    info = nnx.eval_shape(build(name, 7)).info
    outputs = jax.eval_shape(run, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
    assert list(info.taps) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    for tap, published in info.taps.items():
        assert outputs.taps[tap].shape == (2, *spatial_size(published, size), published.channels)
        assert outputs.taps[tap].dtype == jnp.bfloat16
    assert (outputs.pooled.shape, outputs.pooled.dtype) == ((2, info.pooled), jnp.float32)
    assert (outputs.logits.shape, outputs.logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize("train", [False, True])
def test_forward_from_continues(filled, train):
    structure, params, variables, _ = functional.split(filled(build("resnet18")))

    @jax.jit
    def run(params, variables, x):
        whole = structure.merge(params, variables)(x, train=train)
        parts = {
            tap: structure.merge(params, variables).forward_from(tap, value, train=train)
            for tap, value in whole.taps.items()
        }
        return whole, parts

    whole, parts = run(
        params, variables, jnp.asarray(np.random.default_rng(0).normal(size=(4, 40, 33, 3)), jnp.float32)
    )
    order = ["stem", "stage1", "stage2", "stage3", "stage4"]
    for tap, part in parts.items():
        assert {*part.taps} == {*order[order.index(tap) + 1 :]}
        scale = float(jnp.abs(whole.logits).max())
        np.testing.assert_allclose(part.logits, whole.logits, rtol=1e-4, atol=1e-4 * scale, err_msg=tap)


def test_zero_init_residual():
    """timm's start: the last normalisation of every block, and nothing else, at 0."""

    @jax.jit  # which leaves out what is drawn for the others
    def scales():
        params = functional.split(build("resnet18", zero_init_residual=True)())[1]
        return {name: value for name, value in params.items() if name.endswith("scale")}

    zero = {name for name, value in scales().items() if not value.any()}
    assert zero == {f"layer{i}/{j}/bn2/scale" for i in (1, 2, 3, 4) for j in (0, 1)}
    assert nnx.eval_shape(build("resnet50")).layer1[0].last_norm.scale.shape == (256,)


def test_norm_group_size_reaches_every_norm():
    model = nnx.eval_shape(build("resnet50", norm_group_size=4))
    assert {module.group_size for _, module in nnx.iter_graph(model) if isinstance(module, BatchNorm)} == {4}


def test_signatures_serve_configs():
    for name in SPECS:
        parameters = inspect.signature(REGISTER[name]).parameters
        assert list(parameters) == ["num_classes", "dtype", "norm_group_size", "zero_init_residual", "rngs"]
        assert "torchvision" in REGISTER[name].__doc__
    with pytest.raises(TypeError, match="group_size"):
        REGISTER["resnet18"](10, group_size=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown ResNet 'resnet19'"):
        ResNet("resnet19", 10, rngs=nnx.Rngs(0))


CLASSIFIERS = {
    name: factory for name, factory in sorted(registry.entries("models").items()) if issubclass(factory.family, Staged)
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_network_publishes_what_it_is(name):
    """What configs, connectors, weights and the listing rely on."""
    factory = registry.get("models", name)
    parameters = inspect.signature(factory).parameters
    assert {"num_classes", "dtype", "rngs"} <= {*parameters}
    model = nnx.eval_shape(lambda: factory(3, rngs=nnx.Rngs(0)))
    info, params = model.info, functional.split(model)[1]
    assert (info.name, info.num_classes) == (name, 3)
    assert params[info.classifier].shape == (info.pooled, 3)
    assert params[info.classifier.replace("kernel", "bias")].shape == (3,)
    strides = [tap.stride for tap in info.taps.values()]
    assert strides == sorted(strides) and info.last_tap in ("stage3", "stage4")
    assert type(model).KEY_STYLES


FAMILIES = sorted({factory.family: name for name, factory in CLASSIFIERS.items()}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_and_preactivations(name):
    """What they are published as, and what they are: pooled is the mean over positions, a tap is ReLU of the other."""
    factory = registry.get("models", name)
    model = nnx.eval_shape(lambda: factory(3, rngs=nnx.Rngs(0)))
    info, size = model.info, model.info.image_size or type(model).IMAGE_SIZE
    run = lambda x: factory(3, rngs=nnx.Rngs(0))(x, train=False)  # noqa: E731
    outputs = jax.eval_shape(run, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
    assert info.mean_pooled == (outputs.positions is not None)
    assert {tap for tap, published in info.taps.items() if published.preactivation} == {*outputs.preactivations}
    for tap, value in outputs.preactivations.items():
        assert value.shape == outputs.taps[tap].shape
    if info.mean_pooled:
        assert (outputs.positions.ndim, outputs.positions.shape[-1]) == (4, info.pooled)


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv1", "wrn_16_2"])
def test_values_of_positions_and_preactivations(name, filled):
    model = filled(lambda: registry.get("models", name)(3, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 33, 3)), jnp.float32)
    outputs = model(x, train=False)
    kernel = functional.value(model, model.info.classifier)
    bias = functional.value(model, model.info.classifier.replace("kernel", "bias"))
    logits = (outputs.positions @ kernel).mean((1, 2)) + bias
    np.testing.assert_allclose(logits, outputs.logits, rtol=1e-4, atol=1e-5 * float(jnp.abs(logits).max()))
    for tap, value in outputs.preactivations.items():
        assert bool((value < 0).any())
        np.testing.assert_array_equal(nnx.relu(value), outputs.taps[tap])
    with pytest.raises(ValueError, match="no array 'fc/kernle'"):
        functional.value(model, "fc/kernle")


class Tiny(Staged):
    """Halves the map twice, without padding."""

    def __init__(self):
        super().__init__("tiny", 2, jnp.float32)

    @property
    def info(self):
        taps = {name: Tap(3, stride, rounding="down") for name, stride in (("stage1", 2), ("stage2", 4))}
        return ModelInfo("tiny", 2, taps, 3, "fc/kernel")

    def _part(self, name, x, *, train, rngs):
        return nnx.max_pool(x, (2, 2), strides=(2, 2))

    def _head(self, x, *, train, rngs):
        pooled = x.mean((1, 2))
        return None, pooled, pooled[:, :2]


def test_too_small_an_image():
    assert spatial_size(Tiny().info.taps["stage2"], (7, 9)) == (1, 2)
    assert Tiny()(jnp.zeros((1, 7, 9, 3)), train=False).taps["stage2"].shape == (1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"tiny: an input of \(1, 3, 9, 3\) is too small, stage2 would have shape"):
        Tiny()(jnp.zeros((1, 3, 9, 3)), train=False)


def test_image_of_another_size_than_a_network_is_built_for():
    model = nnx.eval_shape(
        lambda: registry.get("models", "vit_tiny_patch16_224")(3, image_size=(32, 48), rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match=r"was built for images of \(32, 48\) and was given \(48, 32\): build it with"):
        model(jnp.zeros((1, 48, 32, 3)), train=False)
