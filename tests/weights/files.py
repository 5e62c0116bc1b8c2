"""State dicts of small networks for tests, in PyTorch's keys and layouts, made without PyTorch."""

import numpy as np
from flax import nnx

from wkd_jax import registry
from wkd_jax.weights import keys, match


def abstract(name, num_classes=10, **settings):
    """A registered network without values."""
    return nnx.eval_shape(lambda: registry.get("models", name)(num_classes, rngs=nnx.Rngs(0), **settings))


def random_arrays(model, seed=0):
    """Our arrays of a network, all different."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in match.shapes_of(model).items()}


def state_dict(model, arrays, style=None):
    """The arrays as PyTorch would save them."""
    styles = type(model).KEY_STYLES
    entries = keys.layout(match.shapes_of(model), styles[style or next(iter(styles))])
    return {entry.key: keys.to_torch(name, arrays[name], entry.shape, entry.steps) for name, entry in entries.items()}
