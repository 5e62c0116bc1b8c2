"""ReviewKD's wiring against PyTorch's operations, and the levels of the published pairs."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax import losses, registry
from wkd_jax.methods.reviewkd import ReviewKD
from wkd_jax.methods.taps import nearest
from wkd_jax.models.connectors import spatial_size
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

B = 3
rng = np.random.default_rng(0)
# The student's deeper level is larger than the teacher's by no whole number; pooled features are the third level.
STUDENT = [rng.normal(size=shape).astype(np.float32) for shape in ((B, 9, 9, 5), (B, 5, 5, 6), (B, 7))]
TEACHER = [rng.normal(size=shape).astype(np.float32) for shape in ((B, 9, 9, 4), (B, 3, 3, 8), (B, 10))]


def info(name, *taps, pooled, stem=True):
    taps = {f"stage{number + 1}": tap for number, tap in enumerate(taps)}
    return ModelInfo(name, 4, {**({"stem": Tap(2, 1)} if stem else {}), **taps}, pooled, "fc/kernel")


FAKES = (
    info("small", Tap(5, 2, preactivation=True), Tap(6, 4, preactivation=True), pooled=7),
    info("large", Tap(4, 2, preactivation=True), Tap(8, 8, signed=True), pooled=10, stem=False),
)

VGG = info("vgg", Tap(5, 2), Tap(6, 4), pooled=7)


def method(student=FAKES[0], teacher=FAKES[1], image_size=(18, 18), **changes):
    setup = Setup(student, teacher, image_size, B, 10, None, None)
    return ReviewKD(config_lib._merge(ReviewKD.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


def context(student=STUDENT, epoch=1):
    """What is not to be read is full of NaN."""
    outputs = []
    for side, (low, high, pooled) in enumerate((student, TEACHER)):
        taps = {"stage1": low * np.nan, "stage2": high if side else high * np.nan}
        preactivations = {"stage1": low, "stage2": high * np.nan if side else high}
        outputs.append(Outputs(np.zeros((B, 4)), taps, pooled, preactivations=preactivations))
    progress = Progress(jnp.int32(0), jnp.int32(epoch), jnp.int32(10))
    return types.SimpleNamespace(student=outputs[0], teacher=outputs[1], progress=progress)


@nnx.jit
def run():
    """(the method, its terms, gradients of its parameters and of the student's features), in one compilation."""

    def loss(wiring, features):
        terms = wiring.terms(context(features, epoch=2))
        return terms["hcl"].value.sum(), terms

    wiring = method(weight=3.0, schedule={"warmup": 4})
    gradients, terms = nnx.grad(loss, argnums=(0, 1), has_aux=True)(wiring, [jnp.asarray(x) for x in STUDENT])
    return wiring, terms, gradients


def reference(wiring, *sides):
    """The loss of each example by PyTorch's operations, from the maps of both sides [B, H, W, D]."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    state = {"/".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(nnx.state(wiring, nnx.Param))}

    def conv(x, path, padding=0):
        bias = state.get(f"{path}/bias")
        kernel = torch.tensor(state[f"{path}/kernel"].transpose(3, 2, 0, 1))
        return functional.conv2d(x, kernel, None if bias is None else torch.tensor(bias), padding=padding)

    def norm(x):
        return functional.batch_norm(x, None, None, training=True)

    expected, above = 0.0, None
    for level in reversed(range(len(sides[0]))):
        student, teacher = (torch.tensor(side[level]).permute(0, 3, 1, 2) for side in sides)
        x = norm(conv(student, f"fusions/{level}/conv1"))
        if above is not None:
            above = functional.interpolate(above, x.shape[2:], mode="nearest")
            gates = torch.sigmoid(conv(torch.cat([x, above], 1), f"fusions/{level}/attention"))
            x = x * gates[:, :1] + above * gates[:, 1:]
        x = above = functional.interpolate(x, teacher.shape[2:], mode="nearest")
        mapped = norm(conv(x, f"fusions/{level}/conv2", padding=1)).permute(0, 2, 3, 1)
        expected = expected + jax.jit(losses.hcl)(mapped.numpy(), sides[1][level])
    return expected


def test_terms():
    wiring, terms, gradients = run()
    (term,) = terms.values()
    assert float(term.weight) == 1.5
    for gradient in jax.tree.leaves(gradients):  # reach all levels and parameters
        assert np.isfinite(gradient).all() and np.any(gradient)
    for fusion in wiring.fusions:
        assert np.any(np.asarray(fusion.bn2.mean[...]))
    maps = [[x.reshape(B, 1, 1, -1) if x.ndim == 2 else x for x in side] for side in (STUDENT, TEACHER)]
    np.testing.assert_allclose(term.value, reference(wiring, *maps), rtol=1e-4)


PYRAMID = {f"p{i}": Tap(6, 2**i, signed=True) for i in range(2, 7)} | {"roi": Tap(6, 1, signed=True, size=(7, 7))}


def test_levels_of_a_pyramid():
    """Without a pooled level; the sides of the upper levels are no multiples of each other, as 13 x 21 and 25 x 42."""
    sizes = [(20, 8), (10, 4), (5, 2), (3, 1), (2, 1)]
    sides = [[rng.normal(size=(B, *size, 6)).astype(np.float32) for size in sizes] for _ in "st"]
    detector = ModelInfo("detector", 4, PYRAMID, 9, "fc/kernel", task="detection")
    pooled = np.full((B, 5, 9), np.nan, np.float32)
    given = context()
    given.student, given.teacher = (Outputs(None, dict(zip(PYRAMID, side, strict=False)), pooled) for side in sides)

    @nnx.jit
    def run():
        wiring = method(detector, detector, (80, 32), pooled_level=False)
        return wiring, wiring.terms(given)["hcl"].value

    wiring, value = run()
    assert [fusion.attention is None for fusion in wiring.fusions] == [False] * 4 + [True]
    np.testing.assert_allclose(value, reference(wiring, *sides), rtol=1e-4)
    with pytest.raises(ValueError, match=r"pooled_level=True: the pooled feature \(3, 5, 9\) is one of each region"):
        nnx.eval_shape(lambda: method(detector, detector, (80, 32)).terms(given)["hcl"].value)


def test_detectors_have_five_fusions_of_256_channels():
    make = registry.get("models", "faster_rcnn_r18")
    info = nnx.eval_shape(lambda: make(81, roi_tap=18, rngs=nnx.Rngs(0))).info
    wiring = nnx.eval_shape(lambda: method(info, info, (800, 1344), pooled_level=False))
    assert list(wiring.student) == list(wiring.teacher) == ["p2", "p3", "p4", "p5", "p6"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(wiring, nnx.Param)))
    assert count == 5 * (256 * 256 + 9 * 256 * 256 + 4 * 256) + 4 * (512 * 2 + 2)


@pytest.mark.parametrize("sizes", [((4, 6), (8, 12)), ((8, 8), (4, 4)), ((7, 5), (4, 9)), ((3, 3), (3, 3))])
def test_nearest_is_that_of_torch(sizes):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(2, *sizes[0], 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), sizes[1], mode="nearest")
    np.testing.assert_array_equal(nearest(x, sizes[1]), expected.permute(0, 2, 3, 1))


def published(student, teacher, image_size, **changes):
    """(parameters, channels and sizes of the levels of both sides, from the shallowest on)."""
    factories = [registry.get("models", name) for name in (student, teacher)]
    infos = [nnx.eval_shape(lambda make=make: make(100, rngs=nnx.Rngs(0))).info for make in factories]
    wiring = nnx.eval_shape(lambda: method(*infos, image_size=(image_size, image_size), **changes))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(wiring, nnx.Param)))
    levels = [
        [*((tap.channels, spatial_size(tap, (image_size,) * 2)[0]) for _, tap in side.values()), (info.pooled, 1)]
        for side, info in zip((wiring.student, wiring.teacher), infos, strict=True)
    ]
    return count, *levels


def test_resnet34_to_resnet18():
    """The paper's table of latencies has 7.2 M further parameters, counted in units of 2**20."""
    count, *sides = published("resnet18", "resnet34", 224)
    assert sides == [[(64, 56), (128, 28), (256, 14), (512, 7), (512, 1)]] * 2
    assert count == 7_552_904
    assert round(count / 2**20, 1) == 7.2


@pytest.mark.parametrize(
    ("student", "teacher", "preactivation", "channels", "sizes"),
    [
        (
            "cifar_mobilenetv2",
            "vgg13",
            "none",
            ([12, 16, 48, 160, 1280], [128, 256, 512, 512, 512]),
            ([16, 8, 4, 2, 1], [16, 8, 4, 4, 1]),
        ),
        (
            "shufflenetv1",
            "wrn_40_2",
            "teacher",
            ([240, 480, 960, 960], [32, 64, 128, 128]),
            ([16, 8, 4, 1], [32, 16, 8, 1]),
        ),
    ],
)
def test_levels_of_published_pairs(student, teacher, preactivation, channels, sizes):
    _, *sides = published(student, teacher, 32, preactivation=preactivation)
    assert tuple([c for c, _ in side] for side in sides) == channels
    assert tuple([s for _, s in side] for side in sides) == sizes


def test_tokens_are_maps_of_one_size():
    tokens = Tap(8, 6, "tokens", signed=True, prefix_tokens=1)
    vit = info("vit", tokens, tokens, pooled=8)
    given = context()
    given.teacher = Outputs(np.zeros((B, 4)), dict.fromkeys(("stage1", "stage2"), np.ones((B, 10, 8))), np.ones((B, 8)))
    assert nnx.eval_shape(lambda: method(teacher=vit).terms(given)["hcl"].value).shape == (B,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "methods.reviewkd.weight=-1.0"),
        ({"mid_channels": -1}, "methods.reviewkd.mid_channels=-1: must be 0 or more"),
        ({"preactivation": "student"}, "methods.reviewkd.preactivation: unknown value 'student'"),
        ({"student_taps": ("stage1", "stage9")}, "methods.reviewkd.student_taps: unknown tap of small 'stage9'"),
        ({"teacher_taps": ("stage2", "last")}, r"teacher_taps=\('stage2', 'last'\): names a tap twice"),
        ({"student_taps": ("stage2",)}, "small has the levels stage2, and large stage1, stage2; name as many of each"),
        ({"student": VGG}, "vgg does not give stage1 before its last ReLU; choose 'teacher' or 'none'"),
        ({"teacher": VGG}, "vgg does not give stage1 before its last ReLU; choose 'none'"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: method(**changes))
