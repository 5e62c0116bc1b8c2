"""What every registered method owes: one step on one and on eight devices, gradients where they belong, one compile."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax import config as config_lib
from wkd_jax import registry
from wkd_jax.data.memory import MemoryDataSet, Split
from wkd_jax.models import functional, swin, vit
from wkd_jax.training import build, sharding
from wkd_jax.types import Batch, Normalisation

CLASSES, BATCH = 5, 16
# Made for detectors, and refused here: tests/methods/detection_rows_test.py has their contract.
DETECTORS = [name for name, method in registry.entries("methods").items() if hasattr(method, "TASK")]
METHODS = [*(name for name in registry.entries("methods") if name not in DETECTORS), "wkd_l+wkd_f"]
# What a method's defaults, made for ImageNet, cannot be on five classes and maps of 4 x 4.
SMALL = {
    "wkd_f": {"projector": "conv1x1", "grid": 1},
    "feature_distribution": {"projector": "conv1x1"},
    "crd": {"num_negatives": 64},
    "dpk": {"width": 32, "heads": 4},
}
# Teacher and student of each kind of pair.
PAIRS = {
    "cnn_cnn": ({"name": "resnet8x4"}, {"name": "resnet8"}),
    "vit_cnn": ({"name": "vit_tiny_patch16_224", "image_size": (32, 32)}, {"name": "resnet8"}),
    "cnn_vit": ({"name": "resnet8x4"}, {"name": "vit_tiny_patch16_224", "image_size": (32, 32), "dropout_rate": 0.1}),
    "swin_cnn": ({"name": "swin_pico_patch4_window7_224"}, {"name": "resnet8"}),
    "cnn_swin": ({"name": "resnet8x4"}, {"name": "swin_pico_patch4_window7_224", "drop_path_rate": 0.3}),
}
# Settings that a method needs for a kind of pair, and the reason that it gives where it serves none.
FITTED: dict[tuple[str, str], dict] = {
    (method, pair): settings
    for method, settings in (
        ("wkd_f", {"projector": "linear", "grid": 1}),
        ("feature_distribution", {"projector": "linear"}),
    )
    for pair in PAIRS
    if pair != "cnn_cnn"
}
FITTED |= {
    ("reviewkd", pair): {f"{side}_taps": ("stage2", "stage3", "stage4"), "preactivation": "none"}
    for pair, side in (("vit_cnn", "teacher"), ("cnn_vit", "student"), ("swin_cnn", "teacher"), ("cnn_swin", "student"))
}
FITTED["fitnet", "cnn_swin"] = {"student_taps": ("stage1",), "teacher_taps": ("stage3",)}
REFUSED: dict[tuple[str, str], str] = {
    ("fitnet", "cnn_vit"): "methods.fitnet",  # 2 x 2 tokens of 32 pixels; at 224 pixels stage3 fits stage3
    ("cat_kd", "vit_cnn"): "classifier",
    ("cat_kd", "cnn_vit"): "classifier",
    ("frskd", "cnn_vit"): "needs maps",
    ("zipf", "cnn_vit"): "needs a student whose classifier",
    **{("dpk", pair): "methods.dpk" for pair in PAIRS if pair != "cnn_cnn"},
    **{("fcfd", pair): "methods.fcfd" for pair in PAIRS if pair != "cnn_cnn"},
}
# Methods whose numbers are computed in every run of the tests, on one and on eight devices; of the others every run
# traces the step, and their numbers are slow tests, since each is compiled several times.
QUICK = ("none", "wkd_l+wkd_f")
# Steps, and the share of its largest entry within which an update agrees on one and eight devices. One rounding in the
# parameters moves FRSKD's first update by 2 %: its pyramid normalises maps of few positions (seen: 1.3 % between CNNs,
# 4.1 % with Swin).
STEADINESS = {"frskd": (1, 6e-2)}
# Its step is less than a rounding of the parameter, which is 1.
STILL = {("ctkd", "cnn_vit", "methods/ctkd/parameter")}


def drawn_data(side: int) -> MemoryDataSet:
    """32 images, each a class-coloured noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.int32) % CLASSES
    images = rng.integers(0, 128, (32, side, side, 3)) + 25 * labels[:, None, None, None]
    split = Split(images.astype(np.uint8), labels)
    return MemoryDataSet("drawn", tuple("abcde"), split, split, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


DATA = {pair: drawn_data(64 if "swin" in pair else 32 if "vit" in pair else 16) for pair in PAIRS}


@pytest.fixture(autouse=True)
def small_transformers(monkeypatch):
    monkeypatch.setattr(vit, "DEPTH", 4)
    monkeypatch.setattr(vit, "PARTS", {f"stage{i + 1}": (i, i + 1) for i in range(4)})
    monkeypatch.setitem(vit.SPECS, "vit_tiny_patch16_224", vit.Spec(24, 3))
    monkeypatch.setitem(swin.SPECS, "swin_pico_patch4_window7_224", swin.Spec(24, (2, 1, 1, 1), (2, 4, 8, 16)))


def similarity() -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.uniform(0.1, 0.9, (CLASSES, CLASSES)).astype(np.float32)
    return np.where(np.eye(CLASSES, dtype=bool), 1.0, (x + x.T) / 2).astype(np.float32)


def configured(method: str, devices: int = 1, *, pair: str = "cnn_cnn", **changes):
    """The resolved config of a method's default settings, as far as they fit."""
    names = [] if method == "" else method.split("+")
    return config_lib.resolve(
        {
            "data": {"name": "digits"},
            "student": PAIRS[pair][1],
            "teacher": {"run": "unused"},
            "methods": {name: SMALL.get(name, {}) | FITTED.get((name, pair), {}) for name in names},
            "global_batch_size": BATCH,
            "epochs": 10,
            "optimizer": {"learning_rate": 0.01},
            "mesh": {"data": devices},
            **changes,
        }
    )


def teacher(pair: str, dtype: str, *, abstract: bool = False) -> build.Network:
    network, normalisation = PAIRS[pair][0], Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def arrays():
        _, params, variables, _ = functional.split(build.model(network, CLASSES, dtype, seed=7))
        return {**params, **variables}

    made = jax.eval_shape(arrays) if abstract else jax.jit(arrays)()
    return build.network(network, CLASSES, dtype, made, normalisation)


def make(method: str, devices: int = 1, *, pair: str = "cnn_cnn", **changes) -> build.Run:
    """A run of a pair, with its arrays."""
    config = configured(method, devices, pair=pair, **changes)
    of = teacher(pair, config["dtype"])
    return build.run(config, DATA[pair], of, similarity, devices=jax.devices()[:devices])


def batch(built: build.Run, step: int = 0, *, pair: str = "cnn_cnn") -> Batch:
    rows = (np.arange(step, step + BATCH) % 32).astype(np.int32)
    train = DATA[pair].train
    local = Batch(train.images[rows], train.labels[rows], rows, np.ones(BATCH, bool))
    return sharding.global_batch(local, built.mesh)


def steps(built: build.Run, count: int, *, pair: str = "cnn_cnn", same_batch: bool = False):
    """Runs the train step a few times; gives the state, the metrics of each step, and the number of compilations."""
    step = build.train_step(built)
    state, metrics = built.state, []
    for number in range(count):
        state, values = step(state, built.frozen, batch(built, 0 if same_batch else number, pair=pair))
        metrics.append(jax.device_get(values))
    return state, metrics, step._cache_size()


def served(pairs):
    """Every method on every kind of pair that it serves."""
    return [
        pytest.param(method, pair, marks=[] if method in QUICK and pair == "cnn_cnn" else [pytest.mark.slow])
        for pair in pairs
        for method in METHODS
        if (method, pair) not in REFUSED
    ]


@pytest.mark.parametrize(("method", "pair"), served(PAIRS))
def test_eight_devices_equal_one(method, pair):
    count, share = STEADINESS.get(method, (2, 5e-3))
    one, one_metrics, _ = steps(make(method, 1, pair=pair), count, pair=pair)
    eight, eight_metrics, compilations = steps(make(method, 8, pair=pair), count, pair=pair)
    assert compilations == 1
    for left, right in zip(one_metrics, eight_metrics, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            # The second step already sees the first one's rounding, amplified by BatchNorm over 16 images.
            np.testing.assert_allclose(left[name], right[name], rtol=2e-3, atol=1e-6, err_msg=name)
    for name, start in make(method, 1, pair=pair).state.params.items():
        # The updates, not the parameters: those hardly move in two steps.
        moved = [np.asarray(state.params[name]) - np.asarray(start) for state in (one, eight)]
        scale = np.abs(moved[0]).max()
        assert scale > 0 or no_influence(name) or (method, pair, name) in STILL, name
        # What moves a bias before a BatchNorm is rounding alone, and a parameter near 1 is known to 6e-8.
        np.testing.assert_allclose(*moved, atol=share * scale + 1e-7, err_msg=name)
    for name, value in one.variables.items():
        np.testing.assert_allclose(value, eight.variables[name], rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("pair", ["cnn_vit", pytest.param("cnn_swin", marks=pytest.mark.slow)])
def test_students_that_draw_at_random(pair):
    """Dropout and stochastic depth come from the step's key: the same on any number of devices, new in every step."""
    runs = [make("kd", devices, pair=pair, optimizer={"learning_rate": 1e-12}) for devices in (1, 8)]
    (one, _), (eight, compilations) = (steps(built, 2, pair=pair, same_batch=True)[1:] for built in runs)
    assert compilations == 1
    for left, right in zip(one, eight, strict=True):
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=2e-3, atol=1e-6, err_msg=name)
    # Nothing is learned at that rate and the batch is the same, so only the draws differ.
    assert abs(one[0]["total"] - one[1]["total"]) > 1e-4


def no_influence(name: str) -> bool:
    """A bias before a BatchNorm has none, and in one step so have FCFD's bridges of paths that are not drawn."""
    return bool(re.search(r"bias$|fcfd/to_student", name))


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in METHODS])
def test_gradients_go_where_they_belong_and_lower_the_loss(method):
    """One program: gradients with labels reach every parameter and no teacher's; without, the method's terms fall."""
    built = make(method)
    images, state, key = batch(built), built.state, jax.random.key(0)
    progress = built.program.clock.progress(jnp.zeros((), jnp.int32))

    def total(params, frozen, label_weight):
        value, (metrics, _) = built.program.loss(params, state.variables, frozen, images, progress, key)
        return value + (label_weight - 1) * metrics["label/cross_entropy"], metrics

    gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True, allow_int=True))
    (value, metrics), (params, frozen) = gradients(state.params, built.frozen, 1.0)
    assert all(map(np.isfinite, metrics.values()))
    for name, gradient in params.items():
        assert np.all(np.isfinite(gradient)), name
    silent = [name for name, gradient in params.items() if not np.any(np.abs(gradient) > 0)]
    assert [name for name in silent if not no_influence(name)] == []
    for name, gradient in frozen.teacher.items():
        assert not np.any(gradient), name
    if method == "none":
        return
    values, params = [], state.params
    for _ in range(10):
        (value, _), (gradient, _) = gradients(params, built.frozen, 0.0)
        values.append(float(value))
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in gradient.values()))
        params = {name: param - 0.02 / norm * gradient[name] for name, param in params.items()}
    assert values[-1] < values[0]


def planned(method: str, pair: str, **changes) -> tuple[build.Plan, Batch]:
    """A run of which nothing is computed, and its batch, as shapes."""
    config = configured(method, pair=pair, **changes)
    of = teacher(pair, config["dtype"], abstract=True)
    plan = build.plan(config, data=DATA[pair], teacher=of, devices=jax.devices()[:1])
    return plan, build.abstract_batch(BATCH, DATA[pair])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_where_they_belong(method):
    """Read in the trace: the teacher's gradients are constants, and those of what is trained are not."""
    plan, images = planned(method, "cnn_cnn")
    progress, key = plan.program.clock.progress(jnp.zeros((), jnp.int32)), jax.random.key(0)

    def total(params, teacher, variables, frozen, images):
        frozen = dataclasses.replace(frozen, teacher=teacher)
        return plan.program.loss(params, variables, frozen, images, progress, key)[0]

    arguments = (plan.state.params, plan.frozen.teacher, plan.state.variables, plan.frozen, images)
    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*arguments).jaxpr
    known = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(var, "val") and var in known for var in equation.invars):  # a literal has a value
            known.update(equation.outvars)
    names = [*sorted(arguments[0]), *sorted(arguments[1])]
    assert [name for name, var in zip(names, jaxpr.outvars, strict=True) if var in known] == sorted(arguments[0])


def traced(method: str, pair: str, **changes):
    """Shapes of the metrics of one step: what can be wrong without a number."""
    plan, images = planned(method, pair, **changes)
    state, metrics = jax.eval_shape(plan.program.train_step, plan.state, plan.frozen, images)
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, plan.state)]
    assert kinds[0] == kinds[1]
    return metrics


@pytest.mark.parametrize(
    "pair", ["vit_cnn", *(pytest.param(pair, marks=pytest.mark.slow) for pair in ("cnn_vit", "swin_cnn", "cnn_swin"))]
)
@pytest.mark.parametrize("method", METHODS)
def test_serves_or_refuses_each_kind_of_pair(method, pair):
    if reason := REFUSED.get((method, pair)):
        with pytest.raises(ValueError, match=reason):
            traced(method, pair)
        return
    assert {leaf.dtype for leaf in traced(method, pair).values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("method", DETECTORS)
def test_methods_for_detectors_refuse_classifiers(method):
    with pytest.raises(ValueError, match=f"methods.{method}: is for detection, and the student resnet8"):
        traced(method, "cnn_cnn")


@pytest.mark.parametrize("method", METHODS)
def test_takes_bfloat16(method):
    traced(method, "cnn_cnn", dtype="bfloat16")


@pytest.mark.parametrize("name", sorted(registry.entries("methods")))
def test_declares_what_the_contract_asks(name):
    method = registry.get("methods", name)
    assert isinstance(method.NEEDS_TEACHER, bool)
    assert isinstance(method.DEFAULTS, dict)
    assert method.__doc__


def test_bfloat16_trains():
    _, metrics, _ = steps(make("wkd_l+wkd_f", 1, dtype="bfloat16"), 1)
    reference, full, _ = steps(make("wkd_l+wkd_f", 1), 1)
    assert all(np.isfinite(value) for value in metrics[0].values())
    np.testing.assert_allclose(metrics[0]["total"], full[0]["total"], rtol=0.05)
    assert {leaf.dtype for leaf in reference.params.values()} == {jnp.dtype("float32")}


def test_moving_average_follows_the_student():
    built = make("none", 1, ema=0.9)
    start = {name: np.asarray(value) for name, value in built.state.ema.items()}
    state, _, _ = steps(built, 1)
    assert set(start) == {n for n in {**state.params, **state.variables} if n.startswith("student/")}
    for name, value in start.items():
        now = {**state.params, **state.variables}[name]
        np.testing.assert_allclose(state.ema[name], 0.9 * value + 0.1 * now, rtol=1e-5, atol=1e-7)
