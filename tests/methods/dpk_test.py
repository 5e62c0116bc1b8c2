"""DPK-style distillation: which tokens come from the teacher, where patches go, and the wiring of its terms."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax.methods.dpk import DPK
from wkd_jax.methods.taps import nearest
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B = 6
rng = np.random.default_rng(0)
FEATURE = rng.normal(size=(B, 2)).astype(np.float32)  # what both networks see, so that CKA is well above 0


def feature(*shape):
    mixed = FEATURE @ rng.normal(size=(2, int(np.prod(shape)))) + 2 * rng.normal(size=(B, int(np.prod(shape))))
    return mixed.reshape(B, *shape).astype(np.float32)


STUDENT = {"stage1": feature(2, 2, 3), "stage2": feature(2, 2, 5)}
TEACHER = {"stage1": feature(4, 4, 2), "stage2": feature(2, 2, 4)}
VALID = np.arange(B) != 1


def info(name, *taps):
    taps = {f"stage{number + 1}": tap for number, tap in enumerate(taps)}
    return ModelInfo(name, 4, {"stem": Tap(2, 1), **taps}, 7, "fc/kernel")


SMALL, LARGE = info("small", Tap(3, 4), Tap(5, 4)), info("large", Tap(2, 2), Tap(4, 4))


def method(student=SMALL, teacher=LARGE, image_size=(8, 8), batch_size=B, **changes):
    setup = Setup(student, teacher, image_size, batch_size, 10, None, None)
    changes = {"width": 8, "heads": 2, "blocks": 1, **changes}
    return DPK(config_lib._merge(DPK.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


@nnx.jit
def run(key):
    """(the method, its terms, each stage's reconstruction)."""
    progress = Progress(jnp.int32(0), jnp.int32(2), jnp.int32(10))
    wiring = method(weight=3.0, schedule={"warmup": 4})
    outputs = {"student": Outputs(None, STUDENT), "teacher": Outputs(None, TEACHER)}
    batch = types.SimpleNamespace(valid=VALID)
    terms = wiring.terms(types.SimpleNamespace(**outputs, batch=batch, key=key, progress=progress))
    decoded = []
    for number, (name, part) in enumerate(zip(TEACHER, wiring.reconstructions, strict=True)):
        student, share = nearest(STUDENT[name], TEACHER[name].shape[1:3]), terms[f"share_{name}"].value
        decoded.append(part(student, TEACHER[name], share, jax.random.fold_in(key, number)))
    return wiring, terms, decoded


def cka(x, y):
    """From the definition of HSIC_1."""
    n = len(x)
    k, l = (z.reshape(n, -1) @ z.reshape(n, -1).T * (1 - np.eye(n)) for z in (x, y))  # noqa: E741

    def hsic(k, l):  # noqa: E741
        return np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_terms():
    _, terms, decoded = run(jax.random.key(0))
    expected = 0.0
    for name, rebuilt in zip(TEACHER, decoded, strict=True):
        share = terms[f"share_{name}"]
        similarity = cka(STUDENT[name][VALID].astype(np.float64), TEACHER[name][VALID].astype(np.float64))
        assert 0.1 < similarity < 0.9
        np.testing.assert_allclose(share.value, 1 - similarity, rtol=1e-4)
        assert share.weight is None
        expected += np.square(rebuilt - TEACHER[name]).mean((1, 2, 3))
    np.testing.assert_allclose(terms["reconstruction"].value, expected, rtol=1e-5)
    assert float(terms["reconstruction"].weight) == 1.5


def test_draws_depend_on_the_key():
    first, again, other = (run(jax.random.key(seed))[-1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert np.any(first[0] != other[0])


@functools.cache
def rebuilder():
    """The first stage without its transformer, so that a token of the result depends on that token alone."""
    part = run(jax.random.key(0))[0].reconstructions[0]
    for layer in (part.blocks[0].attn.proj, part.blocks[0].mlp.fc2):
        layer.kernel.set_value(jnp.zeros_like(layer.kernel[...]))
    graph, state = nnx.split(part)
    return part, jax.jit(lambda share, key: nnx.merge(graph, state)(S, T, share, key))


def patches(x):
    """[B, 4, 2 * 2 * D], row by row, of maps [B, 4, 4, D]."""
    return np.asarray(x).reshape(B, 2, 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, -1)


S, T = nearest(STUDENT["stage1"], (4, 4)), TEACHER["stage1"]


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.3, 1), (0.6, 2), (1.0, 4)])
def test_tokens(share, kept):
    part, rebuild = rebuilder()
    tokens = []
    for x, embed in ((S, part.student_embed), (T, part.teacher_embed)):
        token = patches(x) @ np.asarray(embed.kernel[...]).reshape(-1, 8) + np.asarray(embed.bias[...])
        tokens.append((token + np.asarray(part.pos_embed[...])) @ np.asarray(part.head.kernel[...]))
    result = patches(rebuild(share, jax.random.key(3)))
    student, teacher = (np.isclose(result, token, rtol=1e-4, atol=1e-6).all(-1) for token in tokens)
    np.testing.assert_array_equal(student, ~teacher)
    np.testing.assert_array_equal(teacher.sum(1), kept)
    if kept in (1, 2):
        assert len({tuple(row) for row in teacher}) > 1  # drawn for each example


def test_grids():
    """Every stage has the tokens of the teacher's last: 7 x 7 on ImageNet, 8 x 8 on CIFAR."""
    stages = [Tap(4, 4 << i) for i in range(4)]
    wiring = nnx.eval_shape(lambda: method(info("a", *stages), info("b", *stages), (224, 224)))
    assert [(part.grid, part.patch) for part in wiring.reconstructions] == [((7, 7), patch) for patch in (8, 4, 2, 1)]
    stages = [Tap(4, 1 << i) for i in range(3)]
    wiring = nnx.eval_shape(lambda: method(info("a", *stages), info("b", *stages), (32, 32)))
    assert [(part.grid, part.patch) for part in wiring.reconstructions] == [((8, 8), patch) for patch in (4, 2, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "methods.dpk.weight=-1.0"),
        ({"blocks": 0}, "methods.dpk.blocks=0: must be above 0"),
        ({"heads": 3}, "methods.dpk.heads=3: must divide width=8"),
        ({"batch_size": 3}, "CKA needs at least 4 examples, and a .micro.batch has 3"),
        ({"student": info("short", Tap(3, 4))}, "short has the stages stage1, and large stage1, stage2"),
        ({"image_size": (10, 10)}, r"stage1 of large has \(5, 5\) positions .* in the \(3, 3\) of its last tap"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: method(**changes))
