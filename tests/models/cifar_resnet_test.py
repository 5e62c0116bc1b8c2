import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wkd_jax.models import functional
from wkd_jax.models.cifar_resnet import REGISTER, SPECS, CifarResNet
from wkd_jax.models.layers import BatchNorm


def build(name, num_classes=10, **settings):
    return lambda: REGISTER[name](num_classes, rngs=nnx.Rngs(0), **settings)


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_parameter_counts():
    def count(name):
        _, params, _, _ = functional.split(nnx.eval_shape(build(name, 100)))
        return sum(value.size for value in params.values())

    assert count("resnet8x4") == 1_233_540
    assert count("resnet32x4") == 7_433_860
    # 278 324 of resnet20 and its two more blocks a stage for each 12 layers more: 18 w^2 + 4 w at width w.
    assert count("resnet20") == 278_324
    assert count("resnet32") - count("resnet20") == sum(2 * (18 * w * w + 4 * w) for w in (16, 32, 64))


def test_depth_is_in_the_name():
    for name, spec in SPECS.items():
        assert int(re.match(r"resnet(\d+)", name)[1]) == 6 * spec.blocks + 2
    _, params, _, _ = functional.split(nnx.eval_shape(build("resnet20")))
    assert len([path for path in params if path.endswith("kernel") and "downsample" not in path]) == 20


def test_paths_follow_the_torch_names():
    _, params, variables, constants = functional.split(nnx.eval_shape(build("resnet14")))
    assert {"conv1/kernel", "bn1/scale", "layer1/0/conv1/kernel", "layer2/1/bn2/bias", "fc/kernel", "fc/bias"} < {
        *params
    }
    assert {"layer3/0/downsample/0/kernel", "layer3/0/downsample/1/scale"} < {*params}
    assert not [path for path in params if path.startswith("layer1/0/downsample")]  # 16 -> 16 channels, stride 1
    assert {"bn1/mean", "layer3/0/downsample/1/var"} < {*variables}
    assert not constants
    _, params, _, _ = functional.split(nnx.eval_shape(build("resnet8x4")))
    assert params["layer1/0/downsample/0/kernel"].shape == (1, 1, 32, 64)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (9, 13), (5, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_info_tells_the_shapes(size, dtype):
    def run(image):
        model = build("resnet8x4", 7, dtype=dtype)()
        return model(image, train=False)

    info = nnx.eval_shape(build("resnet8x4", 7)).info
    outputs = jax.eval_shape(run, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
    assert (info.name, info.num_classes, info.last_tap) == ("resnet8x4", 7, "stage3")
    assert list(info.taps) == ["stem", "stage1", "stage2", "stage3"]  # in network order; jax sorts a result's keys
    assert {*outputs.taps} == {*info.taps}
    for name, tap in info.taps.items():
        positions = [-(-side // tap.stride) for side in size]
        assert (outputs.taps[name].shape, outputs.taps[name].dtype) == ((2, *positions, tap.channels), dtype)
    assert (outputs.pooled.shape, outputs.pooled.dtype) == ((2, info.pooled), jnp.float32)
    assert (outputs.logits.shape, outputs.logits.dtype) == ((2, 7), jnp.float32)


def test_factory_signature_serves_configs():
    signature = inspect.signature(REGISTER["resnet20"])
    assert list(signature.parameters) == ["num_classes", "dtype", "norm_group_size", "rngs"]
    assert signature.parameters["norm_group_size"].default is None
    with pytest.raises(TypeError, match="group_size"):
        REGISTER["resnet20"](10, group_size=2, rngs=nnx.Rngs(0))


def test_unknown_network():
    with pytest.raises(ValueError, match="unknown CIFAR ResNet 'resnet21': .*Valid: resnet8, resnet14"):
        CifarResNet("resnet21", 10, rngs=nnx.Rngs(0))


def test_structure_is_hashable_and_equal_for_equal_models():
    one, two = (functional.split(nnx.eval_shape(build("resnet8")))[0] for _ in range(2))
    assert one.graphdef == two.graphdef
    assert hash(one.graphdef) == hash(two.graphdef)


def test_forward_matches_float64(filled, numpy_conv):
    """resnet8x4 written out in NumPy, on an odd size."""
    model = filled(build("resnet8x4", 5))
    image = images(2, 7, 6, 3)
    got = jax.jit(lambda x: model(x, train=False))(image)
    _, params, variables, _ = functional.split(model)
    tree = {name: np.asarray(value, np.float64) for name, value in {**params, **variables}.items()}

    def norm(name, x):
        scale = tree[f"{name}/scale"] / np.sqrt(tree[f"{name}/var"] + 1e-5)
        return (x - tree[f"{name}/mean"]) * scale + tree[f"{name}/bias"]

    def conv(name, x, stride=1):
        kernel = tree[f"{name}/kernel"]
        return numpy_conv(x, kernel, stride=stride, padding=kernel.shape[0] // 2)

    x = np.maximum(norm("bn1", conv("conv1", image)), 0)
    want = {"stem": x}
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{stage}/0"
        y = np.maximum(norm(f"{block}/bn1", conv(f"{block}/conv1", x, stride)), 0)
        y = norm(f"{block}/bn2", conv(f"{block}/conv2", y))
        x = np.maximum(y + norm(f"{block}/downsample/1", conv(f"{block}/downsample/0", x, stride)), 0)
        want[f"stage{stage}"] = x
    for name, tap in want.items():
        np.testing.assert_allclose(got.taps[name], tap, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.pooled, x.mean((1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.logits, x.mean((1, 2)) @ tree["fc/kernel"] + tree["fc/bias"], rtol=1e-4, atol=1e-4)
    assert model.info.classifier in params


@pytest.mark.parametrize(("train", "dtype", "rtol"), [(True, jnp.float32, 1e-4), (False, jnp.bfloat16, 0.02)])
def test_forward_from_continues(filled, train, dtype, rtol):
    structure, params, variables, _ = functional.split(filled(build("resnet8", dtype=dtype)))

    @jax.jit
    def run(params, variables, x):
        whole = structure.merge(params, variables)(x, train=train)
        # A fresh copy for each: a training pass changes running statistics, though not what it returns.
        parts = {
            tap: structure.merge(params, variables).forward_from(tap, value, train=train)
            for tap, value in whole.taps.items()
        }
        return whole, parts

    whole, parts = run(params, variables, images(3, 9, 8, 3))
    order = ["stem", "stage1", "stage2", "stage3"]
    for tap, part in parts.items():
        assert {*part.taps} == {*order[order.index(tap) + 1 :]}
        # The same arithmetic; XLA may fuse, and so round, elsewhere.
        np.testing.assert_allclose(part.logits, whole.logits, rtol=rtol, atol=rtol, err_msg=tap)
        np.testing.assert_allclose(part.pooled, whole.pooled, rtol=rtol, atol=rtol, err_msg=tap)


def test_norm_group_size_reaches_every_norm():
    model = nnx.eval_shape(build("resnet14", norm_group_size=4))
    sizes = {module.group_size for _, module in nnx.iter_graph(model) if isinstance(module, BatchNorm)}
    assert sizes == {4}


def test_unknown_tap():
    model = nnx.eval_shape(build("resnet8"))
    with pytest.raises(ValueError, match="unknown tap of resnet8 'layer3': .*Valid: stem, stage1, stage2, stage3"):
        model.forward_from("layer3", images(1, 4, 4, 64), train=False)
    with pytest.raises(ValueError, match="did you mean 'stage3'"):
        model.forward_from("stage4", images(1, 4, 4, 64), train=False)


def test_training_on_eight_devices_equals_one(filled):
    structure, params, variables, _ = functional.split(filled(build("resnet8")))
    image = images(16, 8, 8, 3)
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    @jax.jit
    def run(params, variables, image):
        def loss(params):
            model = structure.merge(params, variables)
            return jnp.mean(model(image, train=True).logits ** 2), functional.variables(model)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, state), gradient = run(params, variables, image)
    many = run(params, variables, jax.device_put(image, NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_allclose(many[0][0], value, rtol=1e-5)
    for got, want in ((many[0][1], state), (many[1], gradient)):
        assert {*got} == {*want}
        for name in want:
            # float32 sums over the batch in another order, through seven normalised layers.
            np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert all(np.any(np.abs(np.asarray(state[name]) - variables[name]) > 1e-3) for name in state)
