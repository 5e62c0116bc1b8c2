"""What every registered method owes: one step on one and on eight devices, gradients where they belong, one compile."""

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
METHODS = [*registry.entries("methods"), "wkd_l+wkd_f"]


def drawn_data() -> MemoryDataSet:
    """32 images, each a class-coloured noise, 16 x 16."""
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.int32) % CLASSES
    images = rng.integers(0, 128, (32, 16, 16, 3)) + 25 * labels[:, None, None, None]
    split = Split(images.astype(np.uint8), labels)
    return MemoryDataSet("drawn", tuple("abcde"), split, split, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


DATA = drawn_data()


def similarity() -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.uniform(0.1, 0.9, (CLASSES, CLASSES)).astype(np.float32)
    return np.where(np.eye(CLASSES, dtype=bool), 1.0, (x + x.T) / 2).astype(np.float32)


def make(method: str, devices: int, **changes) -> build.Run:
    """A run of resnet8x4 -> resnet8 with a method's default settings."""
    names = [] if method == "" else method.split("+")
    config = config_lib.resolve(
        {
            "data": {"name": "digits"},
            "student": {"name": "resnet8"},
            "teacher": {"run": "unused"},
            "methods": {name: {"projector": "conv1x1", "grid": 1} if name == "wkd_f" else {} for name in names},
            "global_batch_size": BATCH,
            "epochs": 10,
            "optimizer": {"learning_rate": 0.01},
            "mesh": {"data": devices},
            **changes,
        }
    )
    module = build.model({"name": "resnet8x4"}, CLASSES, "float32", seed=7)
    _, params, variables, _ = functional.split(module)
    normalisation = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    teacher = build.network({"name": "resnet8x4"}, CLASSES, "float32", {**params, **variables}, normalisation)
    return build.run(config, DATA, teacher, similarity, devices=jax.devices()[:devices])


def batch(built: build.Run, step: int = 0) -> Batch:
    rows = (np.arange(step, step + BATCH) % 32).astype(np.int32)
    local = Batch(DATA.train.images[rows], DATA.train.labels[rows], rows, np.ones(BATCH, bool))
    return sharding.global_batch(local, built.mesh)


def steps(built: build.Run, count: int, *, same_batch: bool = False):
    """Runs the train step a few times; gives the state, the metrics of each step, and the number of compilations."""
    step = build.train_step(built)
    state, metrics = built.state, []
    for number in range(count):
        state, values = step(state, built.frozen, batch(built, 0 if same_batch else number))
        metrics.append(jax.device_get(values))
    return state, metrics, step._cache_size()


# The sum holds both of its parts, which are slow to compile twice more.
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("wkd_l", "wkd_f") else []) for name in METHODS],
)
def test_eight_devices_equal_one(method):
    one, one_metrics, _ = steps(make(method, 1), 2)
    eight, eight_metrics, compilations = steps(make(method, 8), 2)
    assert compilations == 1
    for left, right in zip(one_metrics, eight_metrics, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            # The second step already sees the first one's rounding, amplified by BatchNorm over 16 images.
            np.testing.assert_allclose(left[name], right[name], rtol=2e-3, atol=1e-6, err_msg=name)
    for name, start in make(method, 1).state.params.items():
        # The updates, not the parameters: those hardly move in two steps.
        moved = [np.asarray(state.params[name]) - np.asarray(start) for state in (one, eight)]
        scale = np.abs(moved[0]).max()
        assert scale > 0 or name.endswith("bias"), name
        np.testing.assert_allclose(*moved, atol=5e-3 * scale + 1e-9, err_msg=name)


@pytest.mark.parametrize(
    "student",
    [
        {"name": "vit_tiny_patch16_224", "image_size": (16, 16), "dropout_rate": 0.1},
        pytest.param({"name": "swin_pico_patch4_window7_224", "drop_path_rate": 0.3}, marks=pytest.mark.slow),
    ],
    ids=lambda student: student["name"],
)
def test_students_that_draw_at_random(student, monkeypatch):
    """Dropout and stochastic depth come from the step's key: the same on any number of devices, new in every step."""
    monkeypatch.setattr(vit, "DEPTH", 2)
    monkeypatch.setitem(swin.SPECS, "swin_pico_patch4_window7_224", swin.Spec(24, (2, 1, 1, 1), (2, 4, 8, 16)))
    changes = {"student": student, "optimizer": {"learning_rate": 1e-12}, "task": {"flip": False, "pad": 0}}
    runs = [make("kd", devices, **changes) for devices in (1, 8)]
    (one, _), (eight, compilations) = (steps(built, 2, same_batch=True)[1:] for built in runs)
    assert compilations == 1
    for left, right in zip(one, eight, strict=True):
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=2e-3, atol=1e-6, err_msg=name)
    # Nothing is learned at that rate and the batch is the same, so only the draws differ.
    assert abs(one[0]["total"] - one[1]["total"]) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_to_the_student_and_the_connectors_only(method):
    built = make(method, 1)
    fixed = batch(built)
    progress, key = built.program.clock.progress(jnp.zeros((), jnp.int32)), jax.random.key(0)

    def total(params, frozen):
        return built.program.loss(params, built.state.variables, frozen, fixed, progress, key)[0]

    value, (params, frozen) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(built.state.params, built.frozen)
    assert np.isfinite(value)
    for name, gradient in params.items():
        assert np.all(np.isfinite(gradient)), name
    # A bias before a BatchNorm is the one kind of parameter that has no influence.
    silent = [n for n, g in params.items() if not np.any(np.abs(g) > 0) and not n.endswith("bias")]
    assert silent == []
    for name, gradient in frozen.teacher.items():
        assert not np.any(gradient), name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_distillation_lowers_its_own_terms(method):
    """Ten steps on one batch, without labels: what the method calls a loss must fall."""
    optimizer = {"learning_rate": 0.003, "momentum": 0.0, "nesterov": False}
    built = make(method, 1, task={"label_weight": 0.0}, optimizer=optimizer)
    step, state, totals, fixed = jax.jit(built.program.train_step), built.state, [], batch(built)
    for _ in range(10):
        state, metrics = step(state, built.frozen, fixed)
        totals.append(float(metrics["total"]))
    assert totals[-1] < totals[0]


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
