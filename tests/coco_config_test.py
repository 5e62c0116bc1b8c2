"""configs/coco_wkd.py: every row at reduced size, a step traced for all pairs, real steps on one and eight devices."""

import re

import drawn_coco
import jax
import numpy as np
import pytest

from configs import coco_wkd
from wkd_jax import config as config_lib
from wkd_jax.data.coco import coco
from wkd_jax.models import functional
from wkd_jax.training import build, sharding
from wkd_jax.types import Normalisation
from wkd_jax.weights import public

CLASSES, BATCH = 4, 8
NET = {
    "features": 16, "hidden": 32, "anchor_sizes": (16, 32, 64, 128, 256), "pre_nms": (60, 60), "post_nms": (40, 40),
    "anchor_samples": 32, "region_samples": 16, "detections": 10,
}  # fmt: skip
DATA = {
    "canvases": ((64, 64),), "train_short": (48, 64), "test_short": 64, "max_side": 64, "max_boxes": 4, "workers": 0,
}  # fmt: skip
ROWS = list(coco_wkd.rows("r101_r18"))
# Rows of the other pairs, which differ in numbers alone.
TRACED = [*((row, "r101_r18") for row in ROWS), ("wkd_lf_box", "r50_mv2"), ("dkd+reviewkd", "r101_r50")]


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco_config")
    return drawn_coco.write_set(root, train=BATCH, test=2, sizes=((64, 64),), sides=(16, 40))


@pytest.fixture(scope="module", name="data")
def _data(root):
    return coco(data_dir=str(root), **DATA)


def reduced(root, row, pair="r101_r18", quirk="fixed"):
    """The config of a row, resolved, with everything that makes it large taken away, and how its teacher is fed."""
    config = coco_wkd.get_config(f"pair={pair},method={row},norm_quirk={quirk},data_dir={root}")
    full = config_lib.resolve(config)
    assert (full.steps, full.optimizer.milestones, full.student.features) == (180_000, (120_000, 160_000), 256)
    config.data.update(DATA)
    config.student.update(NET)
    config.init.weights = ""
    config.steps, config.optimizer.milestones, config.optimizer.warmup = 4, (2, 3), 1.0
    if row != "none":
        config.teacher.model.update({**NET, "name": "faster_rcnn_r18"})
    return config_lib.resolve(config)


def teacher(config, *, abstract=False):
    """A network with random weights in the place of the published one."""
    if not config["teacher"]:
        return None
    section = config["teacher"]["model"]

    def arrays():
        _, params, variables, _ = functional.split(build.model(section, CLASSES, "float32", seed=7))
        return {**params, **variables}

    made = jax.eval_shape(arrays) if abstract else jax.jit(arrays)()
    return build.network(section, CLASSES, "float32", made, Normalisation(**config["teacher"]["normalisation"]))


def similarity():
    x = np.random.default_rng(1).uniform(0.1, 0.9, (CLASSES, CLASSES)).astype(np.float32)
    return np.where(np.eye(CLASSES, dtype=bool), 1.0, (x + x.T) / 2).astype(np.float32)


@pytest.mark.parametrize(("row", "pair"), TRACED)
def test_every_row_is_a_step(root, data, row, pair):
    config = reduced(root, row, pair)
    plan = build.plan(config, data=data, teacher=teacher(config, abstract=True), devices=jax.devices()[:1])
    batch = build.abstract_batch(BATCH, data)
    state, metrics = jax.eval_shape(plan.program.train_step, plan.state, plan.frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), plan.state)
    decayed = [name for name in plan.state.params if not re.search(coco_wkd.NORMALISATION, name)]
    assert not any(name.endswith("scale") for name in decayed)
    weights = [name for name in metrics if name.endswith("/weight")]
    assert {name.split("/")[0] for name in weights} == {"label", *config["methods"]}


def steps(root, data, row, devices):
    config = reduced(root, row)
    made = build.run(config, data, teacher(config), similarity, devices=jax.devices()[:devices])
    local = next(data.training(global_batch_size=BATCH, seed=0))
    step, state, metrics = build.train_step(made), made.state, []
    start = jax.device_get(state.params)  # the step may use the state's memory
    for _ in range(2):
        state, values = step(state, made.frozen, sharding.global_batch(local, made.mesh))
        metrics.append(jax.device_get(values))
    assert step._cache_size() == 1
    return start, jax.device_get(state.params), metrics


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_eight_devices_equal_one(root, data, row):
    (start, one, left), (_, eight, right) = (steps(root, data, row, devices) for devices in (1, 8))
    for number, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=1e-5, err_msg=f"{number}: {name}")
    for name, value in start.items():
        moved = [params[name] - value for params in (one, eight)]
        # By norm: in the second step rounding turns a ReLU here and there.
        assert np.linalg.norm(moved[0] - moved[1]) <= 1e-2 * np.linalg.norm(moved[0]) + 1e-7, name


def test_how_networks_are_fed(root):
    """norm_quirk: as the networks were trained, or as the published numbers were made. Levels 0 to 255, RGB."""

    def levels(normalisation):
        return [[round(255 * x, 3) for x in normalisation[key]] for key in ("mean", "std")]

    caffe, swapped = [123.675, 116.28, 103.53], [103.53, 116.28, 123.675]
    imagenet = [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]
    for pair, quirk, student, fed in (
        ("r101_r18", "fixed", imagenet, [caffe, [1.0] * 3]),
        ("r101_r18", "reference", [swapped, [57.375, 57.12, 58.395]], [swapped, [1.0] * 3]),
        ("r50_mv2", "fixed", imagenet, [caffe, [1.0] * 3]),
        ("r50_mv2", "reference", [caffe, [1.0] * 3], [caffe, [1.0] * 3]),
        ("r101_r50", "fixed", [caffe, [1.0] * 3], [caffe, [1.0] * 3]),
    ):
        config = reduced(root, "kd", pair, quirk)
        assert (levels(config["data"]), levels(config["teacher"]["normalisation"])) == (student, fed)


@pytest.mark.parametrize("pair", coco_wkd.PAIRS.values(), ids=coco_wkd.PAIRS)
def test_weights_are_published(pair):
    assert {pair["teacher"], pair["init"]} <= {*public.PUBLIC}


def test_another_batch_scales_the_schedule():
    config = config_lib.resolve(coco_wkd.get_config("method=icd,batch=256"))
    assert (config.global_batch_size, config.steps, config.methods.icd.delay) == (256, 5625, 31)
    optimizer = config.optimizer
    assert (optimizer.milestones, optimizer.warmup, optimizer.learning_rate) == ((3750, 5000), 31.0, 0.32)
    np.testing.assert_allclose(optimizer.warmup_learning_rate, 0.32e-3)


def test_arguments():
    for argument, words in (
        ("source=tfds", "needs test_json=FILE"),
        ("data_dir=x,method=wkd_fl", "did you mean 'wkd_"),
        ("data_dir=x,pair=r101_r19", "did you mean 'r101_r18'"),
        ("data_dir=x,norm_quirk=fix", "did you mean 'fixed'"),
    ):
        with pytest.raises(ValueError, match=words):
            coco_wkd.get_config(argument)
    assert coco_wkd.get_config("source=tfds,test_json=val.json").data.test_json == "val.json"
