"""The CIFAR ResNets against the same networks in PyTorch, weights copied from one to the other and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax.models import functional
from wkd_jax.models.cifar_resnet import REGISTER

torch = pytest.importorskip("torch")
F = torch.nn.functional

WIDTHS = {"resnet8x4": (32, 64, 128, 256), "resnet20": (16, 16, 32, 64)}
BLOCKS = {"resnet8x4": 1, "resnet20": 3}


class Block(torch.nn.Module):
    def __init__(self, wide_in, wide_out, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(wide_out)
        self.conv2 = torch.nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(wide_out)
        self.downsample = torch.nn.Sequential()
        if stride != 1 or wide_in != wide_out:
            self.downsample.append(torch.nn.Conv2d(wide_in, wide_out, 1, stride, bias=False))
            self.downsample.append(torch.nn.BatchNorm2d(wide_out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class Net(torch.nn.Module):
    def __init__(self, name, num_classes):
        super().__init__()
        stem, *widths = WIDTHS[name]
        self.conv1 = torch.nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(stem)
        for index, (wide_in, wide_out) in enumerate(zip([stem, *widths], widths, strict=False)):
            first = Block(wide_in, wide_out, 2 if index else 1)
            rest = [Block(wide_out, wide_out, 1) for _ in range(BLOCKS[name] - 1)]
            setattr(self, f"layer{index + 1}", torch.nn.Sequential(first, *rest))
        self.fc = torch.nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        taps = {"stem": F.relu(self.bn1(self.conv1(x)))}
        for index in (1, 2, 3):
            taps[f"stage{index}"] = getattr(self, f"layer{index}")([*taps.values()][-1])
        pooled = taps["stage3"].mean((2, 3))
        return self.fc(pooled), pooled, taps


def our_name(key, value):
    """ "layer1.0.bn1.weight" -> "layer1/0/bn1/scale"."""
    *path, leaf = key.split(".")
    weight = "kernel" if value.ndim > 1 else "scale"
    return "/".join([*path, {"weight": weight, "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)])


def to_ours(named):
    """Torch tensors by key -> arrays by our names and layouts."""
    ours = {}
    for key, value in named.items():
        if not key.endswith("num_batches_tracked"):
            array = value.detach().numpy()
            axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
            ours[our_name(key, value)] = array.transpose(axes)
    return ours


def to_torch(ours, net):
    """Arrays by our names -> a state dict for `net`."""
    state = {}
    for key, value in net.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            array = np.asarray(ours[our_name(key, value)])
            axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
            state[key] = torch.tensor(array.transpose(axes))
    return state


def assert_trees_close(got, want, rtol):
    """`rtol` is of each array's largest value: single entries of a gradient may be sums that cancel."""
    assert {*got} == {*want}
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=rtol * np.abs(want[name]).max(), err_msg=name)


def nhwc(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def pair(name, direction):
    """(torch network, our structure, params, variables) with the same weights, none at a special value."""
    torch.manual_seed(0)
    net = Net(name, 10)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if "bn" in key or "downsample.1" in key:
                # Around 1 for scales and variances, around 0 for biases and means.
                centre = 1.0 if key.endswith(("weight", "running_var")) else 0.0
                if value.is_floating_point():
                    value.copy_(centre + 0.4 * (torch.rand(value.shape) - 0.5))
    structure, params, variables, _ = functional.split(nnx.eval_shape(lambda: REGISTER[name](10, rngs=nnx.Rngs(0))))
    ours = to_ours(net.state_dict())
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in {**params, **variables}.items()
    }
    if direction == "to torch":
        rng = np.random.default_rng(1)
        ours = {key: value * rng.uniform(0.9, 1.1, value.shape).astype(np.float32) for key, value in ours.items()}
        missing, unexpected = net.load_state_dict(to_torch(ours, net), strict=False)
        assert not unexpected
        assert all(key.endswith("num_batches_tracked") for key in missing)
    params = {key: jnp.asarray(ours[key]) for key in params}
    variables = {key: jnp.asarray(ours[key]) for key in variables}
    return net, structure, params, variables


@pytest.mark.parametrize(
    ("name", "size", "direction"),
    [
        ("resnet8x4", (32, 32), "to ours"),
        ("resnet8x4", (15, 9), "to torch"),
        ("resnet20", (16, 16), "to ours"),
        ("resnet20", (15, 9), "to torch"),
    ],
)
def test_same_as_torch(name, size, direction):
    net, structure, params, variables = pair(name, direction)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(4, *size, 3)).astype(np.float32)
    labels = rng.integers(10, size=4)
    tensor = torch.tensor(image.transpose(0, 3, 1, 2))

    logits, pooled, taps = net.eval()(tensor)
    got = jax.jit(lambda p, v, x: structure.merge(p, v)(x, train=False))(params, variables, image)
    assert {*got.taps} == {*taps}
    for tap, want in taps.items():
        np.testing.assert_allclose(got.taps[tap], nhwc(want), rtol=1e-5, atol=1e-5, err_msg=tap)
    np.testing.assert_allclose(got.pooled, pooled.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.logits, logits.detach().numpy(), rtol=1e-5, atol=1e-5)

    @jax.jit
    def step(params, variables, x):
        def loss(params):
            model = structure.merge(params, variables)
            log_p = jax.nn.log_softmax(model(x, train=True).logits)
            return -jnp.mean(log_p[jnp.arange(4), labels]), functional.variables(model)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, state), gradient = step(params, variables, image)
    want = F.cross_entropy(net.train()(tensor)[0], torch.tensor(labels))
    want.backward()
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    assert_trees_close(state, to_ours(dict(net.named_buffers())), 1e-5)
    # float32 through up to 20 normalised layers and back, with sums in different orders.
    assert_trees_close(gradient, to_ours({key: p.grad for key, p in net.named_parameters()}), 1e-4)
