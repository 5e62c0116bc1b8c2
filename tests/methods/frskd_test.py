"""FRSKD: the pyramid against torch, its size, terms from raw outputs, where gradients go, refusals."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax.methods.frskd import FRSKD, SelfTeacher, _halve
from wkd_jax.models import functional
from wkd_jax.types import Batch, ModelInfo, Outputs, Progress, Tap

CHANNELS, CLASSES, BATCH = (2, 3, 4), 5, 3
rng = np.random.default_rng(0)
MAPS = [np.maximum(rng.normal(size=(BATCH, 8 >> i, 8 >> i, c)), 0) for i, c in enumerate(CHANNELS)]
LOGITS = 2 * rng.normal(size=(BATCH, CLASSES))
LABELS = np.array([0, 3, 1], np.int32)


def drawn(module):
    """All parameters at random, some weights of sums below 0."""
    structure, params, variables, _ = functional.split(module)
    draw = np.random.default_rng(1)
    params = {name: draw.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
    return structure, params, variables


def torch_pyramid(params, maps):
    """The formulas, level by level, in torch."""
    tensors = {name: torch.tensor(x) for name, x in params.items()}

    def conv(name, x, **settings):
        return F.conv2d(x, tensors[name + "/kernel"].permute(3, 2, 0, 1), **settings)

    def norm(name, x):
        return F.batch_norm(x, None, None, tensors[name + "/scale"], tensors[name + "/bias"], training=True)

    def cbr(name, x):
        return F.relu(norm(name + "/1", conv(name + "/0", x)))

    def separable(name, x):
        x = conv(name + "/depthwise", x, padding=1, groups=x.shape[1])
        return norm(name + "/bn", conv(name + "/pointwise", x))

    def fuse(name, inputs):
        weights = F.relu(tensors[name + "/weights"])
        weights = weights / (weights.sum() + 1e-6)
        x = sum(w * x for w, x in zip(weights, inputs, strict=True))
        return separable(name + "/convs/1", F.relu(separable(name + "/convs/0", x)))

    def up(x):
        return F.interpolate(F.relu(x), scale_factor=2, mode="nearest")

    def pool(x):
        return F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1)), 3, stride=2)

    p = [cbr(f"lateral/{i}", x) for i, x in enumerate(maps)]
    again = [None, *(cbr(f"lateral_again/{i}", x) for i, x in enumerate(maps[1:]))]
    u3 = p[2]
    u2 = fuse("down/1", [F.relu(p[1]), cbr("down/1/adapt", up(u3))])
    u1 = fuse("down/0", [F.relu(p[0]), cbr("down/0/adapt", up(u2))])
    r2 = fuse("up/0", [F.relu(again[1]), F.relu(u2), cbr("up/0/adapt", pool(u1))])
    r3 = fuse("up/1", [F.relu(again[2]), cbr("up/1/adapt", pool(r2))])
    refined = [F.relu(x) for x in (u1, r2, r3)]
    return refined, refined[-1].mean((2, 3)) @ tensors["head/kernel"] + tensors["head/bias"]


def test_pyramid_against_torch():
    structure, params, variables = drawn(SelfTeacher(CHANNELS, CLASSES, rngs=nnx.Rngs(0)))
    maps = [x.astype(np.float32) for x in MAPS]
    refined, logits = jax.jit(lambda params, maps: structure.merge(params, variables)(maps))(params, maps)
    expected, expected_logits = torch_pyramid(params, [torch.tensor(x).permute(0, 3, 1, 2) for x in maps])
    assert min(float(x) for name in params if name.endswith("weights") for x in params[name]) < 0
    for x, y in zip(refined, expected, strict=True):
        np.testing.assert_allclose(x, y.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-3, atol=1e-4)


def test_parameters_of_the_published_size():
    teacher = nnx.eval_shape(lambda: SelfTeacher([64, 128, 256, 512], 100, rngs=nnx.Rngs(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(teacher, nnx.Param))) == 6375794


def test_odd_sizes():
    def run():
        maps = [jnp.zeros((BATCH, n, n + 1, c)) for n, c in zip((7, 4, 2), CHANNELS, strict=True)]
        maps[1], maps[2] = maps[1][:, :, :4], maps[2][:, :, :2]
        return SelfTeacher(CHANNELS, CLASSES, rngs=nnx.Rngs(0))(maps)

    refined, _ = nnx.eval_shape(run)
    assert [x.shape[1:3] for x in refined] == [(7, 8), (4, 4), (2, 2)]
    x = rng.random((1, 5, 4, 1))
    padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))[0, :, :, 0]
    expected = [[padded[i : i + 3, j : j + 3].max() for j in (0, 2)] for i in (0, 2, 4)]
    np.testing.assert_allclose(_halve(jnp.asarray(x))[0, :, :, 0], expected, rtol=1e-6)


def method(taps=None, **changes):
    names = {"stem": Tap(2, 1), "stage1": Tap(3, 2), "stage2": Tap(3, 2), "stage3": Tap(4, 4)}
    setup = types.SimpleNamespace(
        student=ModelInfo("s", CLASSES, taps or names, 4, "fc/kernel"), epochs=10, image_size=(8, 8)
    )
    return FRSKD({**FRSKD.DEFAULTS, **changes}, setup, rngs=nnx.Rngs(0))


def context(logits, maps):
    return types.SimpleNamespace(
        batch=Batch(None, jnp.asarray(LABELS), None, None),
        student=Outputs(logits, dict(zip(("stage2", "stage3"), maps, strict=True))),
        progress=Progress(0, 1, 10),
    )


def test_terms_and_gradients():
    wiring = method(weight=3.0, attention_weight=50.0, temperature=2.0)
    assert wiring.taps == ("stage2", "stage3")  # the last of each size, without the stem
    structure, params, variables = drawn(wiring)
    params = {name: abs(x) if name.endswith("/weights") else x for name, x in params.items()}  # none is cut off
    maps = [x.astype(np.float32) for x in MAPS[1:]]

    @jax.jit
    def run(params, logits, maps):
        def sums(params, logits, maps):
            merged = structure.merge(params, variables)
            terms = merged.terms(context(logits, maps))
            values = {name: term.value for name, term in terms.items()}
            weights = {name: term.weight for name, term in terms.items()}
            moved = functional.variables(merged)
            order = "teacher_cross_entropy", "kl", "attention"
            return jnp.stack([values[name].sum() for name in order]), (values, weights, moved)

        teacher = structure.merge(params, variables).teacher(maps)
        return jax.jacrev(sums, argnums=(0, 1, 2), has_aux=True)(params, logits, maps), teacher

    gradients, (refined, t) = jax.device_get(run(params, LOGITS.astype(np.float32), maps))
    (by_params, by_logits, by_maps), (values, weights, moved) = gradients
    assert weights == {"teacher_cross_entropy": 1.0, "kl": 3.0, "attention": 50.0}
    log_p, log_q = log_softmax(t / 2, -1), log_softmax(LOGITS / 2, -1)
    np.testing.assert_allclose(values["teacher_cross_entropy"], -log_softmax(t, -1)[np.arange(3), LABELS], rtol=1e-3)
    np.testing.assert_allclose(values["kl"], 4 * (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-3)
    v, w = ([np.square(x).mean(-1).reshape(BATCH, -1) for x in side] for side in (maps, refined))
    v, w = ([x / np.linalg.norm(x, axis=1, keepdims=True) for x in side] for side in (v, w))
    expected = sum(np.square(a - b).mean(1) for a, b in zip(v, w, strict=True))
    np.testing.assert_allclose(values["attention"], expected, rtol=1e-3)

    # Only its cross-entropy trains the self-teacher; it trains the maps too, as the attention term does.
    for name, gradient in by_params.items():
        assert not np.any(gradient[1:]), name
        assert np.any(gradient[0]), name
    assert [bool(np.any(x)) for x in by_logits] == [False, True, False]
    np.testing.assert_allclose(by_logits[1], 2 * (softmax(LOGITS / 2, -1) - softmax(t / 2, -1)), atol=1e-3)
    for gradient in by_maps:
        assert [bool(np.any(x)) for x in gradient] == [True, False, True]
    for name, x in moved.items():
        assert np.any(x != np.asarray(variables[name])), name  # running statistics of the self-teacher


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": {"a": Tap(4, 4, "tokens"), "b": Tap(4, 4, "tokens")}}, "needs maps, and a of s is tokens"),
        ({"taps": {"a": Tap(4, 2), "b": Tap(4, 8)}}, r"methods.frskd.taps=\('a', 'b'\): .*\[\(4, 4\), \(1, 1\)\]"),
        ({"taps": {"stem": Tap(4, 2), "b": Tap(4, 4)}}, "needs two maps or more"),
        ({"temperature": 0.0}, "methods.frskd.temperature=0.0"),
        ({"attention_weight": -1.0}, "methods.frskd.attention_weight=-1.0"),
        ({"weight": -1.0}, "methods.frskd.weight=-1.0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        method(**changes)
