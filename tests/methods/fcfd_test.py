"""FCFD: bridges against PyTorch's operations, terms and drawn paths against the formula with small fake networks."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.methods.fcfd import FCFD, Bridge
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B, C, T = 4, 5, 2.0
STAGES = ("stage1", "stage2", "stage3")
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


class Network:
    """Maps of one size; a stage is ReLU(x W), the head a linear layer of the mean. It insists on training mode."""

    def __init__(self, width):
        self.stages = {name: normal(width, width) for name in STAGES[1:]}
        self.head = normal(width, C)
        self.images = []

    def forward_from(self, tap, x, *, train, rngs):
        assert train and rngs is not None
        taps = {}
        for name in STAGES[STAGES.index(tap) + 1 :]:
            x = taps[name] = jnp.maximum(x @ self.stages[name], 0)
        return Outputs(x.mean((1, 2)) @ self.head, taps)

    def __call__(self, image, *, train, rngs):
        self.images.append(image)
        x = image[..., : len(self.head)]
        rest = self.forward_from("stage1", x, train=train, rngs=rngs)
        return Outputs(rest.logits, {"stage1": x, **rest.taps})


STUDENT, TEACHER = Network(2), Network(3)
OUTPUTS = [Outputs(normal(B, C), {name: abs(normal(B, 4, 4, width)) for name in STAGES}) for width in (2, 3)]


def info(name, *taps):
    taps = {f"stage{number + 1}": tap for number, tap in enumerate(taps)}
    return ModelInfo(name, C, {"stem": Tap(2, 1), **taps}, 7, "fc/kernel")


SMALL, LARGE = info("small", *[Tap(2, 2)] * 3), info("large", *[Tap(3, 2)] * 3)


def method(student=SMALL, teacher=LARGE, image_size=(8, 8), **changes):
    setup = Setup(student, teacher, image_size, B, 10, None, None)
    return FCFD(config_lib._merge(FCFD.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def context(key, **changes):
    values = {
        "student": OUTPUTS[0],
        "teacher": OUTPUTS[1],
        "student_model": lambda: STUDENT,
        "teacher_model": lambda: TEACHER,
        "progress": Progress(jnp.int32(0), jnp.int32(2), jnp.int32(10)),
    }
    return types.SimpleNamespace(key=key, **{**values, **changes})


@nnx.jit
def run(key):
    """(terms, the student's maps in the teacher's space, the teacher's in the student's), by a drawn method."""
    wiring = method(feature_weight=0.5, kd_weight=0.7, mixed_weight=0.3, temperature=T, schedule={"warmup": 4})
    bridged = [
        [bridge(outputs.taps[name], train=True) for name, bridge in zip(STAGES, bridges, strict=False)]
        for outputs, bridges in zip(OUTPUTS, (wiring.to_teacher, wiring.to_student), strict=True)
    ]
    return wiring.terms(context(key)), *bridged


def kd(logits):
    p = softmax(np.float64(OUTPUTS[1].logits) / T, -1)
    return T**2 * (p * (np.log(p) - log_softmax(np.float64(logits) / T, -1))).sum(-1)


def appearance(maps):
    targets = OUTPUTS[1].taps
    value = sum(np.square(np.asarray(x) - targets[name]).mean((1, 2, 3)) for name, x in maps.items())
    pooled = [np.maximum(x["stage3"], 0).mean((1, 2)) for x in (maps, targets)]
    return value + np.square(pooled[0] - pooled[1]).mean(-1)


def test_terms_and_draws():
    keys = [jax.random.key(seed) for seed in range(8)]
    _, in_teacher, in_student = run(keys[0])
    paths = []
    for network, maps in ((TEACHER, in_teacher), (STUDENT, in_student)):
        for tap, x in zip(STAGES[:2], maps, strict=False):
            rest = network.forward_from(tap, np.asarray(x), train=True, rngs=())
            paths.append((kd(rest.logits), appearance(rest.taps) if network is TEACHER else np.zeros(B)))
    pure = appearance(dict(zip(STAGES, in_teacher, strict=True)))
    seen = set()
    for key in keys:
        terms, *_ = run(key)
        weights = {name: float(term.weight) for name, term in terms.items()}
        assert weights == pytest.approx({"feature": 0.25, "kd": 0.7, "mixed": 0.3})
        np.testing.assert_allclose(terms["kd"].value, kd(OUTPUTS[0].logits), rtol=1e-4)
        fitting = [
            pair
            for pair in itertools.combinations_with_replacement(range(4), 2)
            if np.allclose(terms["mixed"].value, sum(paths[i][0] for i in pair), rtol=1e-4)
            and np.allclose(terms["feature"].value, pure + sum(paths[i][1] for i in pair), rtol=1e-4)
        ]
        assert len(fitting) == 1  # exactly one pair of paths explains both
        seen.add(fitting[0])
    assert all(first != second for first, second in seen)  # without replacement
    assert {path for pair in seen for path in pair} == {0, 1, 2, 3}


def test_golden_of_the_appearance(monkeypatch):
    """Two stages with one bridged map each; what follows the bridge is the teacher's own map, so adds nothing."""
    monkeypatch.setattr(Bridge, "__call__", lambda self, x, train: x)
    maps = []
    for wave in (lambda k: np.sin(0.37 * k), lambda k: np.cos(0.23 * k)):
        shapes = {"stage1": (1, 2, 4, 4), "stage2": (1, 2, 2, 2)}
        maps.append({name: np.moveaxis(wave(np.arange(np.prod(s)).reshape(s)), 1, -1) for name, s in shapes.items()})
    outputs = [Outputs(np.zeros((1, C), np.float32), x) for x in maps]
    rest = Outputs(outputs[1].logits, {"stage2": maps[1]["stage2"]})
    lens = types.SimpleNamespace(forward_from=lambda *_, **__: rest)
    taps = Tap(2, 2), Tap(2, 4)
    given = {"student": outputs[0], "teacher": outputs[1], "student_model": lambda: lens, "teacher_model": lambda: lens}
    wiring = method(info("a", *taps), info("b", *taps))
    value = jax.jit(lambda: wiring.terms(context(jax.random.key(0), **given))["feature"].value)()
    np.testing.assert_allclose(value, [1.314528], atol=1e-6)


def test_the_teachers_own_maps_with_batch_statistics():
    batch = types.SimpleNamespace(image=jnp.ones((B, 4, 4, 3)))
    TEACHER.images.clear()
    wiring = lambda: method(teacher_batch_statistics=True)  # noqa: E731
    given = {"teacher": None, "teacher_batch": batch}  # what evaluation gave is not looked at
    terms = nnx.eval_shape(lambda: wiring().terms(context(jax.random.key(0), **given)))
    assert [image is batch.image for image in TEACHER.images] == [True]
    assert {name: term.value.shape for name, term in terms.items()} == dict.fromkeys(("feature", "kd", "mixed"), (B,))


@pytest.mark.parametrize(
    ("sizes", "signed", "parameters"),
    [
        (((6, 4), (6, 4)), False, 9 * 6 + 2 * 3),
        (((6, 4), (3, 2)), True, 9 * 6 + 3 * 3),
        (((3, 2), (6, 4)), False, 16 * 6 + 3 * 3),
    ],
)
def test_bridge(sizes, signed, parameters):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = normal(B, *sizes[0], 2)

    @nnx.jit
    def across():
        bridge = Bridge(Tap(2, 1), Tap(3, 1, signed=signed), sizes, rngs=nnx.Rngs(0))
        return bridge(x, train=True), nnx.state(bridge, nnx.Param)

    y, state = across()
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == parameters
    state, x = nnx.to_pure_dict(state), torch.tensor(x).permute(0, 3, 1, 2)
    kernel = torch.tensor(np.asarray(state["conv"]["kernel"]))
    if sizes[0] < sizes[1]:
        z = functional.conv_transpose2d(x, kernel.flip(0, 1).permute(2, 3, 0, 1), stride=2, padding=1)
    else:
        z = functional.conv2d(x, kernel.permute(3, 2, 0, 1), stride=sizes[0][0] // sizes[1][0], padding=1)
    z = functional.batch_norm(z, None, None, training=True)
    z = z if signed else functional.leaky_relu(z, 0.1)
    np.testing.assert_allclose(y, z.permute(0, 2, 3, 1), atol=1e-4)  # a bias before a BatchNorm has no effect


def test_resnet34_to_resnet18():
    """The paper's 5.98 M further parameters, in units of 2**20, count a bridge that nothing uses."""
    factories = [registry.get("models", name) for name in ("resnet18", "resnet34")]
    infos = [nnx.eval_shape(lambda make=make: make(1000, rngs=nnx.Rngs(0))).info for make in factories]
    wiring = nnx.eval_shape(lambda: method(*infos, image_size=(224, 224)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(wiring, nnx.Param)))
    unused = 9 * 512 * 512 + 2 * 512  # to the student's last stage
    assert (count, count + unused) == (3_910_400, 6_270_720)
    assert round((count + unused) / 2**20, 2) == 5.98


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_weight": -1.0}, "methods.fcfd.feature_weight=-1.0: must be 0 or more"),
        ({"mixed_weight": -0.1}, "methods.fcfd.mixed_weight=-0.1"),
        ({"temperature": 0.0}, "methods.fcfd.temperature=0.0: must be above 0"),
        ({"schedule": {"warmup": -1}}, "methods.fcfd.schedule.warmup=-1"),
        ({"student": info("short", *[Tap(2, 2)] * 2)}, "short has the stages stage1, stage2, and large stage1"),
        ({"student": info("one", Tap(2, 2)), "teacher": info("one", Tap(2, 2))}, "as many stages, at least two"),
        (
            {"student": info("tiny", *[Tap(2, 8)] * 3)},
            r"tiny and large at images of \(8, 8\) have maps of \(1, 1\) and",
        ),
        ({"teacher": info("vit", *[Tap(2, 2, "tokens")] * 3)}, "stage1 of vit is tokens, .* needs the class token"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: method(**changes))
