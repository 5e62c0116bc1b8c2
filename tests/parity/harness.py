"""One of our networks against the same one in PyTorch: outputs, taps, gradients and running statistics.

The weights are random, normalisation statistics too, and go through the keys and layouts that `wkd_jax.weights` uses,
there and back.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchvision_cpu  # noqa: F401  (makes torchvision importable beside a CPU build of torch)
from flax import nnx

from wkd_jax import registry
from wkd_jax.models import functional
from wkd_jax.weights import keys
from wkd_jax.weights.state import BUFFERS


def randomise(net, seed=0):
    """Gives every parameter and running statistic of a torch network a random value that is not a special one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if not value.is_floating_point() or key.endswith(BUFFERS):
                continue
            noise = torch.rand(value.shape, generator=generator) - 0.5
            if key.endswith("running_var"):
                value.copy_(1 + 0.8 * noise)
            elif value.ndim > 1 and min(value.shape[:2]) > 1 or value.ndim == 4:
                fan_in = value[0].numel()
                value.copy_(noise * (12 / fan_in) ** 0.5)  # variance 1 / fan_in: residual sums stay moderate
            else:
                value.copy_((0.7 if key.endswith("weight") else 0.0) + 0.4 * noise)
    return net


def settle(net, seed=0):
    """Puts the running statistics near those of the activations, and gives a few early channels a large scale.

    With any statistics the features of a deep network come to depend on its biases alone: the same for every image, so
    that a wrong early layer is hardly seen in them. Without large scales nothing reaches the 6 of a ReLU6. All others
    are small, since rounding grows with the features and the tolerance is absolute.
    """
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return net
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in norms:
            norm.weight *= 0.4
            norm.momentum = 1.0
        for norm in norms[:4]:
            norm.weight[::8] *= 12
        net.train()(torch.randn(8, 3, 64, 48, generator=generator))
        for norm in norms:
            norm.momentum = 0.1
            norm.num_batches_tracked.zero_()
            # Few positions are left in the last stages, so that some channels hardly varied.
            norm.running_var.clamp_(min=0.3 * norm.running_var.mean().item())
            spread = norm.running_var.sqrt()
            norm.running_mean += 0.1 * spread * torch.randn(spread.shape, generator=generator)
            norm.running_var *= 0.8 + 0.4 * torch.rand(spread.shape, generator=generator)
    return net


def ours(name, net, *, style=None, num_classes=7, **settings):
    """(structure, params, variables) of our network `name` with the arrays of a torch network."""
    model = nnx.eval_shape(lambda: registry.get("models", name)(num_classes, rngs=nnx.Rngs(0), **settings))
    structure, params, variables, _ = functional.split(model)
    shapes = {key: value.shape for key, value in {**params, **variables}.items()}
    entries = keys.layout(shapes, _style(model, style))
    state = {key: value.detach().numpy() for key, value in net.state_dict().items() if not key.endswith(BUFFERS)}
    assert {entry.key: entry.shape for entry in entries.values()} == {key: v.shape for key, v in state.items()}
    arrays = {key: jnp.asarray(keys.from_torch(key, state[entries[key].key], shapes[key])) for key in shapes}
    return structure, {key: arrays[key] for key in params}, {key: arrays[key] for key in variables}


def theirs(structure, arrays, net, *, style=None):
    """Our arrays as a state dict for `net`, by way of `wkd_jax.weights.keys`."""
    model = nnx.eval_shape(lambda: structure.merge(arrays))
    entries = keys.layout({key: value.shape for key, value in arrays.items()}, _style(model, style))
    return {
        entries[key].key: torch.tensor(keys.to_torch(key, np.asarray(value), entries[key].shape))
        for key, value in arrays.items()
    }


def check_outputs(
    name,
    net,
    taps,
    *,
    sizes,
    style=None,
    channels_last=False,
    atol=1e-4,
    batch=2,
    dtype="float32",
    settled=True,
    **settings,
):
    """Evaluation mode: logits and every tap at each image size, and the weights back in torch.

    Args:
      name: Our registered name.
      net: The torch network; its values are replaced.
      taps: Our tap -> name of the torch module whose output it is, or a function of {module name: output} for what is
        not a module's output. Maps are NCHW unless `channels_last`.
      sizes: (height, width) of images.
      style: Key style of `net`; None: our first.
      channels_last: Whether torch's maps are NHWC.
      atol: Of every value.
      batch: Images.
      dtype: float32, or float64 for a network so deep that rounding hides what `settle` brings out.
      settled: Whether to `settle` the network.
      settings: For our factory (`num_classes` among them).
    """
    net = randomise(net)
    net = (settle(net) if settled else net).eval()
    structure, params, variables = ours(name, net, style=style, **settings, dtype=jnp.dtype(dtype))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for size in sizes:
        image = np.random.default_rng(0).normal(size=(batch, *size, 3)).astype(dtype)
        with jax.enable_x64(dtype == "float64"):
            wide = [{key: jnp.asarray(array, dtype) for key, array in tree.items()} for tree in (params, variables)]
            got = jax.device_get(_compiled(lambda p, v, x: structure.merge(p, v)(x, train=False), *wide, image))
        want, logits = _run_torch(net.to(getattr(torch, dtype)), image, taps, channels_last)
        assert {*got.taps} == {*taps} == {*structure_info(structure, params, variables).taps}
        for tap in taps:
            np.testing.assert_allclose(got.taps[tap], want[tap], rtol=0, atol=atol, err_msg=f"{tap} at {size}")
        np.testing.assert_allclose(got.logits, logits, rtol=0, atol=atol, err_msg=f"logits at {size}")
    randomise(net.float(), seed=1)
    net.load_state_dict({**net.state_dict(), **theirs(structure, {**params, **variables}, net, style=style)})
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key  # bit-identical after both conversions


def check_training(name, net, *, size, style=None, batch=4, dtype="float64", rtol=1e-6, forward=None, **settings):
    """Training mode: the loss, every parameter's gradient of a cross-entropy, and the running statistics afterwards.

    In float64 by default: a ReLU turned the other way by rounding changes gradients by a finite amount: PyTorch's own
    float32 gradients of a randomly initialised ResNet-50 are up to 25 % off its float64 ones. `rtol` is of each array's
    largest value, since single entries of a gradient may be sums that cancel. Deterministic networks only: build both
    sides without dropout and stochastic depth. `forward`: net -> logits where calling it does not return them.
    """
    randomise(net).train()
    structure, params, variables = ours(name, net, style=style, **settings, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, *size, 3)).astype(dtype)
    net = net.to(getattr(torch, dtype))
    tensor = torch.tensor(image.transpose(0, 3, 1, 2))
    logits = forward(net, tensor) if forward else net(tensor)
    labels = rng.integers(logits.shape[1], size=batch)
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    want.backward()

    def step(params, variables, x):
        def loss(params):
            model = structure.merge(params, variables)
            log_p = jax.nn.log_softmax(model(x, train=True).logits)
            return -jnp.mean(log_p[jnp.arange(batch), labels]), functional.variables(model)

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.enable_x64(dtype == "float64"):
        wide = [{key: jnp.asarray(array, dtype) for key, array in tree.items()} for tree in (params, variables)]
        (value, state), gradient = jax.device_get(_compiled(step, *wide, image))
    np.testing.assert_allclose(value, want.item(), rtol=rtol)

    model = nnx.eval_shape(lambda: structure.merge(params, variables))
    shapes = {key: array.shape for key, array in {**params, **variables}.items()}
    entries = keys.layout(shapes, _style(model, style))
    tensors = {**{k: p.grad for k, p in net.named_parameters()}, **dict(net.named_buffers())}
    largest = max(np.abs(array).max() for array in gradient.values())
    for key, array in {**gradient, **state}.items():
        expected = keys.from_torch(key, tensors[entries[key].key].detach().numpy(), shapes[key])
        # A bias before a BatchNorm has no influence, and rounding for a gradient.
        scale = max(np.abs(expected).max(), 1e-6 * largest)
        np.testing.assert_allclose(array, expected, rtol=rtol, atol=rtol * scale, err_msg=key)


def structure_info(structure, params, variables):
    """What the network publishes."""
    return nnx.eval_shape(lambda: structure.merge(params, variables)).info


def _style(model, style):
    styles = type(model).KEY_STYLES
    return styles[style or next(iter(styles))]


def _compiled(function, *arguments):
    return jax.jit(function)(*arguments)


def _run_torch(net, image, taps, channels_last):
    outputs, handles = {}, []

    def keep(module_name):
        def hook(module, inputs, output):
            outputs[module_name] = output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    for module_name, module in net.named_modules():
        handles.append(module.register_forward_hook(keep(module_name)))
    with torch.no_grad():
        logits = net(torch.tensor(image.transpose(0, 3, 1, 2)))
    for handle in handles:
        handle.remove()
    found = {}
    for tap, source in taps.items():
        value = (source(outputs) if callable(source) else outputs[source]).numpy()
        found[tap] = value.transpose(0, 2, 3, 1) if value.ndim == 4 and not channels_last else value
    return found, logits.numpy()
