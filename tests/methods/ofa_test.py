"""OFA's exits: their sizes against the authors' networks, their arithmetic against float64; its terms and refusals."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, ndtr, softmax

from wkd_jax import config as config_lib
from wkd_jax.methods.ofa import OFA, ConvExit, TokenExit
from wkd_jax.models import functional
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B, C = 3, 5
LABELS = np.array([0, 3, 1], np.int32)
rng = np.random.default_rng(0)
TEACHER = 3 * rng.normal(size=(B, C))


def network(name, widths, strides=(4, 8, 16, 32), *, pooled=0, classes=C, stem=False, **tap):
    names = [*(["stem"] if stem else []), *(f"stage{i + 1}" for i in range(len(strides)))]
    taps = {n: Tap(w, s, **tap) for n, w, s in zip(names, widths, strides[:1] * stem + strides, strict=True)}
    return ModelInfo(name, classes, taps, pooled or widths[-1], "fc/kernel")


def make(student, *, teacher=768, image_size=(224, 224), **changes):
    infos = {"student": student, "teacher": network("t", [teacher], [4])}
    setup = Setup(**infos, image_size=image_size, global_batch_size=B, epochs=10, labels=None, similarity=None)
    return OFA(config_lib._merge(OFA.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def initialised(build):
    """(structure, params, variables), by one program."""
    return functional.split(nnx.eval_shape(build))[0], *jax.jit(lambda: functional.split(build())[1:3])()


TOKENS = {"strides": (16,) * 4, "layout": "tokens", "signed": True}


@pytest.mark.parametrize(
    ("student", "counts"),
    [
        (network("resnet18", (64, 64, 128, 256, 512), stem=True, classes=100), (411748, 397924, 345700, 470884)),
        (
            network("deit_tiny_patch16_224", (192,) * 4, **TOKENS, prefix_tokens=1, classes=100),
            (1501156, 1056868, 612580, 612580),
        ),
        (
            network("swin_pico_patch4_window7_224", (48, 96, 192, 384), classes=100),
            (6618340, 4326244, 2108260, 1811812),
        ),
        (network("resmlp_s12", (384,) * 4, **TOKENS, classes=100), (5951332, 4178020, 2404708, 2404708)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_parameter_counts(student, counts):
    """The teacher is 768 wide. Those of the authors' code."""
    exits = nnx.eval_shape(lambda: make(student)).exits
    assert list(exits) == ["stage1", "stage2", "stage3", "stage4"]
    got = [sum(x.size for x in functional.split(module)[1].values()) for module in exits.values()]
    assert got == list(counts)


@pytest.mark.parametrize(
    ("info", "image_size", "shapes"),
    [
        # CIFAR ResNets: three stages, the last of which has the last exit.
        (network("resnet20", (16, 16, 32, 64), (1, 2, 4), stem=True), (16, 16), [(16, 16), (8, 8), (4, 4)]),
        (
            network("swin_pico_patch4_window7_224", (8, 16, 32, 64)),
            (56, 80),
            [(14, 20), (7, 10), (4, 5), (2, 3)],
        ),
        (network("vit", (16,) * 4, **TOKENS, prefix_tokens=1), (64, 80), [(1 + 4 * 5,)] * 4),
    ],
    ids=["resnet20", "swin", "vit"],
)
def test_what_students_are_served(info, image_size, shapes):
    names = [name for name in info.taps if name != "stem"]

    def run():
        exits = make(info, teacher=24, image_size=image_size).exits
        return {
            name: exits[name](jnp.zeros((B, *shape, info.taps[name].channels), jnp.bfloat16), train=True)
            for name, shape in zip(names, shapes, strict=True)
        }

    logits = {name: (x.shape, x.dtype) for name, x in nnx.eval_shape(run).items()}
    assert logits == dict.fromkeys(names, ((B, C), jnp.float32))


def test_maps_of_other_networks_than_swin_have_convolutional_exits():
    exits = nnx.eval_shape(lambda: make(network("convnext_tiny", (8, 16, 32, 64), signed=True))).exits
    assert all(isinstance(leave, ConvExit) for leave in exits.values())


def normalised(x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def test_token_exit_matches_float64():
    """One merging, past which the class token goes, one block of four heads, the class token's logits."""
    width, grid = 8, 14
    tap = Tap(width, 16, "tokens", signed=True, prefix_tokens=1)
    size = (16 * grid, 16 * grid)
    leave = nnx.eval_shape(lambda: TokenExit(tap, 0, width, C, image_size=size, rngs=nnx.Rngs(0)))
    structure, params, *_ = functional.split(leave)
    params = {name: rng.normal(size=value.shape, scale=0.3) for name, value in params.items()}
    x = rng.normal(size=(2, 1 + grid * grid, width))
    got = jax.jit(lambda p, x: structure.merge(p)(x, train=True))(
        {n: p.astype(np.float32) for n, p in params.items()}, x
    )

    def layer(x, name):
        return x @ params[f"{name}/kernel"] + params.get(f"{name}/bias", 0)

    def norm(x, name):
        return normalised(x) * params[f"{name}/scale"] + params[f"{name}/bias"]

    def gelu(x):
        return x * ndtr(x)

    maps = x[:, 1:].reshape(2, grid, grid, width)
    order = [maps[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    merged = gelu(layer(norm(np.concatenate(order, -1), "merge/0/norm"), "merge/0/reduction"))
    tokens = np.concatenate([x[:, :1], merged.reshape(2, -1, width)], 1)
    qkv = layer(norm(tokens, "blocks/0/norm1"), "blocks/0/attn/qkv").reshape(2, -1, 3, 4, 2)
    scores = np.einsum("bnhd,bmhd->bhnm", qkv[:, :, 0], qkv[:, :, 1]) / np.sqrt(2)
    attended = np.einsum("bhnm,bmhd->bnhd", softmax(scores, -1), qkv[:, :, 2]).reshape(tokens.shape)
    tokens = tokens + layer(attended, "blocks/0/attn/proj")
    hidden = gelu(layer(norm(tokens, "blocks/0/norm2"), "blocks/0/mlp/fc1"))
    tokens = tokens + layer(hidden, "blocks/0/mlp/fc2")
    np.testing.assert_allclose(got, layer(tokens[:, 0], "fc"), rtol=2e-3, atol=2e-4)


def test_merging_activates_all_but_the_last():
    exits = nnx.eval_shape(lambda: make(network("swin_pico_patch4_window7_224", (48, 96, 192, 384)))).exits
    activations = {name: [merge.activate for merge in leave.merge] for name, leave in exits.items()}
    assert activations == {"stage1": [True, True, False], "stage2": [True, False], "stage3": [True], "stage4": []}


def depthwise(x, kernel, stride):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, 0] for i in range(3) for j in range(3)
    )


def test_conv_exit_matches_float64():
    """Two blocks: 4 channels on 7 x 8 positions, 8 on 4 x 4, 24 on 2 x 2."""
    structure, params, variables = initialised(lambda: ConvExit(4, 2, 24, C, rngs=nnx.Rngs(0)))
    std = {name: np.std(params[name]) for name in ("blocks/1/pointwise2/kernel", "fc/kernel")}
    assert std["blocks/1/pointwise2/kernel"] == pytest.approx(np.sqrt(2 / 24), rel=0.2)  # He, fan-out
    assert std["fc/kernel"] == pytest.approx(0.02, rel=0.3)
    params = {name: rng.normal(size=value.shape) for name, value in params.items()}
    x = want = rng.normal(size=(2, 7, 8, 4))
    run = jax.jit(lambda params, x: structure.merge(params, variables)(x, train=True))
    got = run({name: value.astype(np.float32) for name, value in params.items()}, x.astype(np.float32))
    for block in ("blocks/0", "blocks/1"):
        for number, stride in ((1, 2), (2, 1)):
            want = depthwise(want, params[f"{block}/depthwise{number}/kernel"], stride)
            want = want @ params[f"{block}/pointwise{number}/kernel"][0, 0]
            want = (want - want.mean((0, 1, 2))) / np.sqrt(want.var((0, 1, 2)) + 1e-5)
            want = np.maximum(want * params[f"{block}/bn{number}/scale"] + params[f"{block}/bn{number}/bias"], 0)
    np.testing.assert_allclose(got, want.mean((1, 2)) @ params["fc/kernel"] + params["fc/bias"], rtol=2e-3, atol=1e-3)


def context(student, **outputs):
    return types.SimpleNamespace(
        student=Outputs(student, **outputs),
        teacher=Outputs(jnp.asarray(TEACHER, jnp.float32)),
        labels=LABELS,
        progress=Progress(jnp.int32(0), jnp.int32(2), jnp.int32(10)),
    )


def test_terms_and_what_they_train():
    info = network("resnet8", (4, 4, 8, 16), (1, 2, 4), stem=True)
    powers, stages = (1.1, 1.2, 1.4), ("stage3", "stage2")  # an exit each, then the final logits
    settings = {"weight": 0.5, "exit_weight": 0.1, "temperature": 2.0, "schedule": {"warmup": 5}}
    settings = {"power": powers, "stages": stages, **settings}
    structure, params, variables = initialised(lambda: make(info, image_size=(8, 8), teacher=6, **settings))
    taps = {"stage2": rng.normal(size=(B, 4, 4, 8)), "stage3": rng.normal(size=(B, 2, 2, 16))}
    taps = {name: x.astype(np.float32) for name, x in taps.items()}
    student, valid = (3 * rng.normal(size=(B, C))).astype(np.float32), jnp.array([True, False, True])

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, taps):
        module = structure.merge(params, variables)
        logits = {name: leave(taps[name], train=True) for name, leave in module.exits.items()}
        terms = module.terms(context(student, taps=taps, valid=valid))
        return sum(term.value.sum() for term in terms.values()), (terms, logits, functional.variables(module))

    gradients, (terms, logits, after) = jax.jit(run)(params, taps)
    one_hot, p = np.eye(C)[LABELS], softmax(TEACHER / 2, -1)
    for name, power in zip((*stages, "logits"), powers, strict=True):
        log_q = log_softmax(np.asarray(logits.get(name, student), np.float64) / 2, -1)
        np.testing.assert_allclose(terms[name].value, -(((p + one_hot) ** power - one_hot) * log_q).sum(-1), rtol=1e-5)
        assert float(terms[name].weight) == pytest.approx(2 / 5 * (0.5 if name == "logits" else 0.1))
        np.testing.assert_array_equal(terms[name].where, valid)
    assert {*terms} == {*stages, "logits"}
    for name, gradient in {**gradients[0], **gradients[1]}.items():
        assert np.any(gradient), name
    for name, value in after.items():
        assert np.any(value != variables[name]), name  # running statistics


def test_mobilenetv1_is_read_before_its_relu():
    structure, *arrays = initialised(lambda: make(network("mobilenetv1", (8,), (4,)), teacher=8))
    outputs = {"taps": {}, "preactivations": {"stage1": -jnp.ones((B, 2, 2, 8))}}
    terms = jax.jit(lambda arrays: structure.merge(*arrays).terms(context(jnp.zeros((B, C)), **outputs)))(arrays)
    assert np.all(np.isfinite(terms["stage1"].value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "methods.ofa.weight=-1.0: must be 0 or more"),
        ({"exit_weight": -1.0}, "methods.ofa.exit_weight=-1.0: must be 0 or more"),
        ({"temperature": 0.0}, "methods.ofa.temperature=0.0: must be above 0"),
        ({"form": "papr"}, "methods.ofa.form: .*'papr'.*paper"),
        ({"power": (1.0, 1.2)}, r"methods.ofa.power=\(1.0, 1.2\): needs one number, or 5"),
        ({"power": (0.5,)}, r"methods.ofa.power=\(0.5,\): must be 1 or more"),
        ({"power": ("1",)}, "methods.ofa.power"),
        ({"stages": ("stage5",)}, "methods.ofa.stages: unknown tap of resnet18 'stage5'"),
        ({"stages": ("stage4", "last")}, "methods.ofa.stages=.*: stage4 is there twice"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: make(network("resnet18", (8, 16, 32, 64)), **changes))


def test_tokens_that_do_not_fit_are_refused():
    for info in (network("vit", (10,) * 4, **TOKENS), network("vit", (8,) * 4, **TOKENS, prefix_tokens=1, pooled=16)):
        with pytest.raises(ValueError, match="methods.ofa.stages: an exit for tokens needs"):
            nnx.eval_shape(lambda info=info: make(info))
