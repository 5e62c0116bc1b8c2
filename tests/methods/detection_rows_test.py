"""Methods on a detector's rows: goldens through their terms, rows that do not count, gradients on real box heads."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from wkd_jax import config as config_lib
from wkd_jax import losses, registry
from wkd_jax.models import functional
from wkd_jax.models.detection.faster_rcnn import LEVELS, FasterRCNN
from wkd_jax.training.step import weigh
from wkd_jax.types import ModelInfo, Outputs, Progress, Setup, Tap

PROGRESS = Progress(jnp.int32(0), jnp.int32(1), jnp.int32(10))
CONSTANT = {"schedule": {"name": "constant"}}


def waves(*shape):
    """sin(0.37 k) and cos(0.23 k), as in the goldens of the classification losses."""
    k = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    return np.sin(0.37 * k), np.cos(0.23 * k)


def method(name, student, teacher=None, *, similarity=None, **changes):
    factory = registry.get("methods", name)
    setup = Setup(student, teacher or student, (64, 96), 2, 10, None, lambda: similarity)
    return factory(config_lib._merge(factory.DEFAULTS, changes, ""), setup, rngs=nnx.Rngs(0))


# Four regions, two of each of two images; five classes, the last is the background.
STUDENT, TEACHER = (3 * x for x in waves(4, 5))
LABELS = np.array([0, 2, 4, 4])
FOREGROUND = np.array([[True, True], [False, False]])
ROWS = np.ones((2, 2), bool)
ROI = Tap(2, 1, signed=True, size=(7, 7))
INFO = ModelInfo("detector", 5, {"roi": ROI}, 6, "box_head/cls_score/kernel", task="detection")


def cosines():
    x = waves(5, 3)[0] + 0.2
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (x @ x.T).astype(np.float32)


def means(name, valid, **changes):
    """Each term as the step averages it."""
    maps = [np.moveaxis(x, 1, -1).reshape(2, 2, 7, 7, 2) for x in waves(4, 2, 7, 7)]
    outputs = [
        Outputs(np.float32(logits.reshape(2, 2, 5)), {"roi": np.float32(x)}, valid=jnp.asarray(valid))
        for logits, x in zip((STUDENT, TEACHER), maps, strict=True)
    ]
    context = types.SimpleNamespace(
        student=outputs[0], teacher=outputs[1], labels=LABELS.reshape(2, 2), batch=None, progress=PROGRESS
    )
    wiring = method(name, INFO, similarity=cosines(), **changes)
    return jax.jit(lambda: weigh({"": wiring.terms(context)}, jnp.ones(2, bool))[1])()


@pytest.mark.parametrize(
    ("name", "changes", "valid", "goldens"),
    [
        ("kd", {"temperature": 1.0}, ROWS, {"kl": 0.281271}),
        ("dkd", {"temperature": 1.0}, ROWS, {"target": 0.146730, "nontarget": 0.196985}),
        ("dkd", {"temperature": 1.0}, FOREGROUND, {"target": 0.259864, "nontarget": 0.293173}),
        ("wkd_l", {"temperature": 1.0, **CONSTANT}, ROWS, {"target": 0.457174, "wasserstein": 0.091020}),
        ("wkd_l", {"temperature": 2.0, **CONSTANT}, ROWS, {"target": 0.457174, "wasserstein": 0.013758}),
        ("wkd_f", {"projector": "none", **CONSTANT}, ROWS, {"mean": 0.298683, "covariance": 0.198998}),
    ],
)
def test_goldens(name, changes, valid, goldens):
    found = means(name, valid, **changes)
    for term, golden in goldens.items():
        np.testing.assert_allclose(found[f"/{term}"], golden, atol=2e-6)


def test_cost_of_the_goldens():
    cost = losses.ground_cost(jnp.asarray(cosines()), sharpness=1.0)
    np.testing.assert_allclose(cost[0], [0, 0.092485, 0.267992, 0.861375, 0.846589], atol=2e-6)


def test_squared_error_of_deltas():
    """FCFD's, over all classes."""
    student, teacher = (x.reshape(1, 4, 4, 4) for x in waves(4, 16))
    np.testing.assert_allclose(jax.vmap(losses.mse)(student, teacher).mean(), 0.776322, atol=1e-6)


@pytest.mark.parametrize("valid", [ROWS, np.array([[True, False], [True, True]])])
def test_nkd_and_dist(valid):
    """Against the formulas, of the rows that count."""
    keep = valid.reshape(-1)
    p, q = softmax(TEACHER[keep], -1), softmax(STUDENT[keep], -1)
    target, nontarget = [], []
    for row, label in zip(np.flatnonzero(keep), LABELS[keep], strict=True):
        others = np.delete(np.arange(5), label)
        target.append(-softmax(TEACHER[row])[label] * log_softmax(STUDENT[row])[label])
        nontarget.append(-(softmax(TEACHER[row, others]) * log_softmax(STUDENT[row, others])).sum())
    found = means("nkd", valid)
    np.testing.assert_allclose([found["/target"], found["/nontarget"]], np.mean([target, nontarget], 1), rtol=1e-5)
    inter = 1 - np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(p, q, strict=True)])
    intra = 1 - np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(p.T, q.T, strict=True)])
    found = means("dist", valid)
    np.testing.assert_allclose([found["/inter"], found["/intra"]], [inter, intra], rtol=1e-5)


def test_grid_of_large_regions():
    """The paper's 4 x 4 cells of 18 positions a side."""
    cells = [slice(0, 5), slice(4, 9), slice(9, 14), slice(13, 18)]
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 18, 18, 3))
    mean, covariance = np.zeros(2), np.zeros(2)
    for rows in cells:
        for columns in cells:
            parts = [x[:, rows, columns].reshape(2, -1, 3) for x in (student, teacher)]
            std = [np.sqrt(x.var(1, ddof=1) + 1e-5) for x in parts]
            mean += np.square(parts[0].mean(1) - parts[1].mean(1)).sum(-1) / 16
            covariance += np.square(std[0] - std[1]).sum(-1) / 16
    found = jax.jit(lambda *x: losses.wkd_feature(*x, grid=4))(*(x.astype(np.float32) for x in (student, teacher)))
    np.testing.assert_allclose(found, [mean, covariance], rtol=1e-5)


# Two detectors, of which what follows the pyramid runs: their trunks are shapes without arrays.
B, R, C, SIDE = 2, 6, 4, 6
SIZES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
VALID = np.array([[True, True, False, True, False, True], [True, False, True, True, True, False]])
PYRAMID = {"student_taps": LEVELS, "teacher_taps": LEVELS}
METHODS = {
    "kd": {"temperature": 1.0},
    "dkd": {"temperature": 1.0, "beta": 0.25},
    "nkd": {},
    "dist": {},
    "wkd_l": {"weight": 1.0, "temperature": 1.0, "sharpness": 2.0, **CONSTANT},
    "wkd_f": {"weight": 5e-3, "projector": "conv3x3", **CONSTANT},
    "feature_distribution": {"form": "gaussian_w2_full", "projector": "conv3x3", **CONSTANT},
    "fitnet": {**PYRAMID, "projector": "linear", "weight": 1.0},
    "reviewkd": {"pooled_level": False},
    "fcfd_detection": {},
}
ON_LOGITS = ("kd", "dkd", "nkd", "dist", "wkd_l")
NOT_OF_REGIONS = {"dist/intra", "fitnet/hint", "reviewkd/hcl", "fcfd_detection/feature"}


@pytest.fixture(name="found", scope="module")
def _found():
    """Method -> (gradients, (all losses, the terms' masks)), the rows that do not count as they are and spoilt."""
    rng = np.random.default_rng(0)
    widths = (8, 12)
    structures, abstract, infos, heads, maps = [], [], [], [], []
    for name, width in zip(("faster_rcnn_r18", "faster_rcnn_r50"), widths, strict=True):
        settings = {"features": width, "hidden": 3 * width, "roi_tap": SIDE}
        network = nnx.eval_shape(lambda: FasterRCNN(name, C, **settings, rngs=nnx.Rngs(0)))  # noqa: B023
        structure, params, variables, _ = functional.split(network)
        structures.append(structure)
        abstract.append({**params, **variables})
        infos.append(network.info)
        shapes = {name: x.shape for name, x in params.items() if name.startswith("box_head/")}
        heads.append({name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()})
        sizes = zip(LEVELS, SIZES, strict=True)
        maps.append({level: rng.normal(size=(B, *size, width)).astype(np.float32) for level, size in sizes})
    similarity = np.where(np.eye(C, dtype=bool), 1.0, 0.4).astype(np.float32)
    made = nnx.Dict({name: method(name, *infos, similarity=similarity, **given) for name, given in METHODS.items()})
    wiring, params, variables, constants = functional.split(made)
    corners = rng.uniform(0, 30, (B, R, 2)).astype(np.float32)
    sides = np.float32([40, 600, 300, 150, 40, 300])[:, None]  # pixels; pooled from every level
    regions = np.concatenate([corners, corners + sides], axis=-1)
    labels = jnp.asarray(rng.integers(0, C, (B, R)))

    def spoilt(x, scale):
        noise = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
        return jnp.where(VALID.reshape(B, R, *[1] * (x.ndim - 2)), x, x + scale * noise)

    def loss(trained, weights, scale):
        def network(side):
            arrays = trained["heads"][side]
            return structures[side].merge(abstract[side] | (jax.lax.stop_gradient(arrays) if side else arrays))

        outputs = []
        for side in (0, 1):
            given = {"train": True, "regions": regions, "region_valid": jnp.asarray(VALID)}
            full = network(side).forward_from("pyramid", trained["maps"][side], **given)
            rows = {"roi": full.taps["roi"], "logits": full.logits, **full.extra}
            rows = {name: spoilt(x, scale) for name, x in rows.items()}
            taps = full.taps | {"roi": rows.pop("roi")}
            outputs.append(dataclasses.replace(full, logits=rows.pop("logits"), taps=taps, extra=rows))
        context = types.SimpleNamespace(
            batch=None,
            labels=labels,
            student=outputs[0],
            teacher=jax.lax.stop_gradient(outputs[1]),
            student_model=lambda: network(0),
            teacher_model=lambda: network(1),
            progress=PROGRESS,
        )
        methods = wiring.merge(trained["methods"], variables, constants)
        terms = {name: methods[name].terms(context) for name in METHODS}
        losses = jnp.stack([weigh({name: of}, jnp.ones(B, bool))[0] for name, of in terms.items()])
        masks = {f"{name}/{key}": term.where for name, of in terms.items() for key, term in of.items()}
        return losses @ weights, (losses, masks)

    run = jax.jit(jax.grad(loss, has_aux=True))
    trained = {"heads": heads, "maps": maps, "methods": params}
    weights = np.eye(len(METHODS), dtype=np.float32)
    return {
        name: [jax.device_get(run(trained, weights[i], scale)) for scale in (0.0, 5.0)]
        for i, name in enumerate(METHODS)
    }


@pytest.mark.parametrize("name", METHODS)
def test_gradients(name, found):
    """They reach the student, from logits through the box head, and what the method trains; never the teacher."""
    gradients, (values, _) = found[name][0]
    assert 0 < values[list(METHODS).index(name)] < np.inf
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
    for part in ("heads", "maps"):
        assert not any(np.any(x) for x in jax.tree.leaves(gradients[part][1]))
    reached = {level for level, x in gradients["maps"][0].items() if np.any(x)}
    assert reached == {*(LEVELS if name in ("fitnet", "reviewkd", "fcfd_detection") else LEVELS[:4])}
    in_head = {path for path, x in gradients["heads"][0].items() if np.any(x)}
    if name in ON_LOGITS:
        assert in_head == {path for path in gradients["heads"][0] if "bbox_pred" not in path}
    else:
        assert in_head == ({*gradients["heads"][0]} if name == "fcfd_detection" else set())
    own = {path for path in gradients["methods"] if path.startswith(f"{name}/")}
    assert {path for path, x in gradients["methods"].items() if np.any(x)} == own


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_do_not_count_have_no_influence(name, found):
    (gradients, (values, masks)), (others, (again, _)) = found[name]
    own = list(METHODS).index(name)
    np.testing.assert_allclose(again[own], values[own], rtol=1e-6)
    for left, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6 * np.abs(left).max())
    for key, mask in masks.items():
        if key.startswith(f"{name}/"):
            assert mask is None if key in NOT_OF_REGIONS else np.array_equal(mask, VALID), key
