"""The config files of the paper's settings against the published numbers, their models, and one step of each.

Every table here is copied from the settings' descriptions (the authors' released configs and code, the paper, OFA-KD's
config files), not from the config files.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from configs import common
from wkd_jax import config as config_lib
from wkd_jax import main
from wkd_jax.data.base import OneSize
from wkd_jax.data.digits import digits
from wkd_jax.methods import feature_distribution
from wkd_jax.models import cifar_resnet, convnext, functional, resnet, vit, wide_resnet
from wkd_jax.training import build, sharding
from wkd_jax.types import Batch, Normalisation
from wkd_jax.weights.public import PUBLIC

ROOT = pathlib.Path(__file__).parents[1]

WKD = ("wkd_l", "wkd_f", "wkd_l+wkd_f")
CROSS = ("swin_t_r18", "vit_s_r18", "swin_t_mv2", "vit_s_mv2", "convnext_t_deit_t", "convnext_t_swin_p")
RIVALS = ("dkd", "nkd", "ctkd", "ttm", "wttm", "dist", "fitnet", "cc", "rkd", "crd", "crd+kd", "reviewkd", "cat_kd")
RIVALS += ("fcfd", "ickd_c", "dpk")
ACROSS = ("dkd", "dist", "ofa", "fitnet", "cc", "rkd", "crd")
MEANINGFUL = {  # class similarities that are not the paper's
    "prototypes_centred": {"kind": "cosine", "centred": True},
    "classifier_centred": {"kind": "classifier", "centred": True},
    **{kind: {"kind": kind} for kind in ("gaussian", "confusion", "logit_correlation", "uniform")},
}
ARGUMENTS = {
    "imagenet_wkd": {"pair": ("r34_r18", "r50_mv1"), "method": WKD, "recipe": ("code", "paper")},
    "imagenet_baselines": {
        "pair": ("r34_r18", "r50_mv1"),
        "method": ("none", "kd", "dkd", "nkd", "ctkd", "ctkd_kd", "wttm", "dist", "fitnet", "crd", "crd+kd", "reviewkd")
        + ("cat_kd", "dpk", "fcfd", "emd_ipot", "dkd+reviewkd"),
        "recipe": ("own", "wkd"),
    },
    "imagenet_selfkd": {
        "generations": (1, 2, 3),
        "method": ("wkd_l", "kd", "ban", "tf_kd_self"),
        "s0": ("own", "torchvision"),
        "recipe": ("code", "paper"),
    },
    "cifar100_wkd": {
        "pair": ("r32x4_r8x4", "wrn40_2_snv1"),
        "method": ("none", "kd", *RIVALS, *WKD),
        "recipe": ("code", "paper"),
        "teacher": ("own", "published"),
    },
    "cifar100_cross": {"pair": CROSS, "method": ("none", "kd", *ACROSS, *WKD), "recipe": ("wkd", "ofa")},
    "imagenet_ablation": {  # and "features", in place of the two
        "interrelation": ("cka_linear", "cka_polynomial", "cka_rbf", "prototypes", "classifier"),
        "separation": ("yes", "no"),
    },
}


def load(file: str, *overrides: str, **arguments):
    """A resolved config of `configs/`."""
    words = ",".join(f"{key}={value}" for key, value in arguments.items())
    return main.load_config(f"{ROOT / 'configs' / file}.py:{words}", overrides)


def combinations(file: str) -> list[dict]:
    table = ARGUMENTS[file]
    return [dict(zip(table, values, strict=True)) for values in itertools.product(*table.values())]


def at(config, path: str):
    for part in path.split("."):
        config = config[part]
    return config


def check(config, expected: dict) -> None:
    """Each dotted path has its value."""
    assert {path: at(config, path) for path in expected} == expected


def with_teachers(config) -> list:
    """The config, and those of the runs that its teacher comes from."""
    teacher = config["teacher"]
    return [config, *(with_teachers(teacher["train"]) if teacher and teacher["train"] else [])]


# What can be asked for


@pytest.mark.parametrize("file", ARGUMENTS)
def test_every_row_resolves_and_has_a_name_of_its_own(file):
    names = {}
    for arguments in combinations(file):
        config = load(file, **arguments)
        key = (config.name, config.teacher.weights if config.teacher else None, bool(config.teacher))
        # RepDistiller's labels-alone and KD rows do not depend on the recipe, nor the former on the teacher.
        same = {k: v for k, v in arguments.items() if not (file == "cifar100_wkd" and k in ("recipe", "teacher"))}
        same |= {k: arguments[k] for k in ("recipe",) if k in arguments and arguments["method"].startswith("wkd")}
        same |= {k: arguments[k] for k in ("teacher",) if k in arguments and arguments["method"] != "none"}
        assert names.setdefault(key, same) == same
        for run in with_teachers(config):
            assert config_lib.differences(config_lib.resolve(run), run) == []


@pytest.mark.parametrize("file", ARGUMENTS)
def test_a_directory_reaches_every_run(file):
    config = load(file, data_dir="/data/somewhere")
    assert [run["data"]["data_dir"] for run in with_teachers(config)] == ["/data/somewhere"] * len(
        with_teachers(config)
    )
    default = load(file)
    assert all(run["data"]["data_dir"] is None for run in with_teachers(default))
    assert config_lib.digest(config) == config_lib.digest(default)  # where the data are is not what is computed


@pytest.mark.parametrize("file", [file for file in ARGUMENTS if file.startswith("imagenet")])
def test_imagenet_from_folders(file):
    config = load(file, source="folder", data_dir="/data/in1k")
    for run in with_teachers(config):
        check(run, {"data.name": "image_folder", "data.train_split": "train", "data.test_split": "val"})


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        ("imagenet_wkd", {"pair": "r34_r50"}, r"pair=r34_r50: did you mean 'r34_r18'"),
        ("imagenet_wkd", {"method": "kd"}, r"method=kd: .*Valid: wkd_l, wkd_f, wkd_l\+wkd_f"),
        ("imagenet_wkd", {"recipe": "codes"}, r"recipe=codes: did you mean 'code'"),
        ("imagenet_wkd", {"source": "folder"}, r"source=folder: needs data_dir=DIRECTORY"),
        ("imagenet_wkd", {"source": "tdfs"}, r"source=tdfs: did you mean 'tfds'"),
        (
            "imagenet_baselines",
            {"recipe": "timm"},
            r"recipe=timm: .*Valid: own, mdistiller, crd, nkd, dist, ctkd, fcfd, ickd, wkd",
        ),
        ("imagenet_selfkd", {"generations": 0}, r"generations=0: must be 1 or more"),
        ("imagenet_selfkd", {"s0": "mine"}, r"s0=mine: .*Valid: own, torchvision"),
        ("imagenet_ablation", {"interrelation": "cka"}, r"interrelation=cka: did you mean 'cka_rbf'"),
        ("imagenet_ablation", {"separation": "none"}, r"separation=none: did you mean 'no'"),
        ("imagenet_ablation", {"features": "gaussian"}, r"features=gaussian: did you mean 'gaussian_"),
        ("imagenet_ablation", {"features": "fitnet", "separation": "no"}, r"features=fitnet: .* leave them out"),
        ("cifar100_wkd", {"teacher": "publish"}, r"teacher=publish: did you mean 'published'"),
        ("cifar100_cross", {"pair": "swin_t_deit_t"}, r"pair=swin_t_deit_t: did you mean"),
        ("cifar100_cross", {"method": "kd+nkd"}, r"method=nkd: did you mean"),
        ("cifar100_cross", {"lambda": "much"}, r"'lambda=much': needs lambda=<float>"),
    ],
)
def test_what_is_wrong_is_named(file, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(file, **arguments)


# The released configs: weight, temperature and sharpness of WKD-L; weight, ratio, grid and projector of WKD-F; the last
# epoch with full weights; seed.
RELEASED = {
    ("imagenet_wkd", "r34_r18", "wkd_l"): ((30, 2, 1), None, 0, 0),
    ("imagenet_wkd", "r34_r18", "wkd_f"): (None, (0.02, 2, 4, "bottleneck"), 0, 0),
    ("imagenet_wkd", "r34_r18", "wkd_l+wkd_f"): ((10, 2, 1), (1.0, 2, 4, "bottleneck"), 0, 0),
    ("imagenet_wkd", "r50_mv1", "wkd_l"): ((25, 2, 2), None, 0, 0),
    ("imagenet_wkd", "r50_mv1", "wkd_f"): (None, (0.005, 2, 4, "bottleneck"), 30, 0),
    ("imagenet_wkd", "r50_mv1", "wkd_l+wkd_f"): ((25, 2, 2), (0.005, 2, 4, "bottleneck"), 0, 0),
    ("cifar100_wkd", "r32x4_r8x4", "wkd_l"): ((600, 8, 1), None, 150, 42),
    ("cifar100_wkd", "r32x4_r8x4", "wkd_f"): (None, (0.08, 4, 1, "conv1x1"), 150, 10),
    ("cifar100_wkd", "r32x4_r8x4", "wkd_l+wkd_f"): ((200, 8, 1), (0.08, 8, 1, "conv1x1"), 150, 10),
    ("cifar100_wkd", "wrn40_2_snv1", "wkd_l"): ((200, 6, 1), None, 150, 42),
    ("cifar100_wkd", "wrn40_2_snv1", "wkd_f"): (None, (0.3, 3, 4, "conv1x1"), 150, 10),
    ("cifar100_wkd", "wrn40_2_snv1", "wkd_l+wkd_f"): ((60, 4, 1), (0.5, 3, 4, "conv1x1"), 150, 10),
}


@pytest.mark.parametrize(("file", "pair", "method"), RELEASED)
def test_released_settings_of_wkd(file, pair, method):
    logit, feature, start, seed = RELEASED[file, pair, method]
    config = load(file, pair=pair, method=method)
    assert config.seed == seed and config.dtype == "bfloat16" and config.optimizer.nesterov
    assert set(config.methods) == set(method.split("+"))
    if logit:
        settings = config.methods.wkd_l
        assert (settings.weight, settings.temperature, settings.sharpness) == logit
        assert (settings.epsilon, settings.num_iters, settings.stabilizer) == (0.05, 10, 1e-8)
        assert (settings.target_weight, settings.exact_marginal) == (1.0, "student")
    if feature:
        settings = config.methods.wkd_f
        assert (settings.weight, settings.mean_cov_ratio, settings.grid, settings.projector) == feature
        assert (settings.ddof, settings.eps) == (1, 1e-5)
        assert settings.student_tap == settings.teacher_tap == "last"
    for settings in config.methods.values():
        assert (settings.schedule.name, settings.schedule.start) == ("cosine", start)
    features = "logits" if file == "imagenet_wkd" else "stage3"
    check(config.interrelation, {"kind": "cka", "kernel": "linear", "features": features, "samples_per_class": 0})
    assert config.task.label_weight == 1.0 and config.task.label_smoothing == 0.0
    assert not config.teacher.perturb_statistics


# What the paper's text changes: a row of the comparison, as the override that makes it.
LOGIT = [
    "interrelation.features=pooled",
    "methods.wkd_l.num_iters=9",
    "methods.wkd_l.stabilizer=0.0",
    "methods.wkd_l.exact_marginal=teacher",
    "methods.wkd_l.schedule.name=constant",
    "methods.wkd_l.schedule.start=0",
]
FEATURE = ["methods.wkd_f.ddof=0", "methods.wkd_f.schedule.name=constant", "methods.wkd_f.schedule.start=0"]
BOTH = ["optimizer.nesterov=False", "dtype=float32"]
GRID = "methods.wkd_f.grid=1"
PAPER = {
    ("imagenet_wkd", "r34_r18", "wkd_l"): LOGIT,
    ("imagenet_wkd", "r34_r18", "wkd_f"): [*FEATURE, GRID, LOGIT[0]],
    ("imagenet_wkd", "r34_r18", "wkd_l+wkd_f"): [
        *LOGIT,
        *FEATURE,
        GRID,
        "methods.wkd_l.weight=30.0",
        "methods.wkd_f.weight=0.02",
    ],
    ("imagenet_wkd", "r50_mv1", "wkd_l"): [*LOGIT, "methods.wkd_l.sharpness=1.0"],
    ("imagenet_wkd", "r50_mv1", "wkd_f"): [*FEATURE, GRID, LOGIT[0], "methods.wkd_f.weight=0.001"],
    ("imagenet_wkd", "r50_mv1", "wkd_l+wkd_f"): [
        *LOGIT,
        *FEATURE,
        GRID,
        "methods.wkd_l.sharpness=1.0",
        "methods.wkd_f.weight=0.001",
    ],
    ("cifar100_wkd", "r32x4_r8x4", "wkd_l"): LOGIT,
    ("cifar100_wkd", "r32x4_r8x4", "wkd_f"): [*FEATURE, LOGIT[0]],
    ("cifar100_wkd", "r32x4_r8x4", "wkd_l+wkd_f"): [*LOGIT, *FEATURE],
    ("cifar100_wkd", "wrn40_2_snv1", "wkd_l"): [*LOGIT, "methods.wkd_l.temperature=4.0"],
    ("cifar100_wkd", "wrn40_2_snv1", "wkd_f"): [*FEATURE, LOGIT[0]],
    ("cifar100_wkd", "wrn40_2_snv1", "wkd_l+wkd_f"): [*LOGIT, *FEATURE, "methods.wkd_l.weight=50.0"],
}


@pytest.mark.parametrize(("file", "pair", "method"), PAPER)
def test_the_papers_recipe_is_the_code_with_every_row_changed(file, pair, method):
    """And nothing else differs; each row is also in the file's head, with its override."""
    paper = load(file, pair=pair, method=method, recipe="paper")
    overrides = [*PAPER[file, pair, method], *BOTH, f"name={paper.name}"]
    assert config_lib.differences(load(file, *overrides, pair=pair, method=method), paper) == []
    head = (ROOT / "configs" / f"{file}.py").read_text().split('"""')[1]
    written = [item for item in overrides if "schedule" not in item and not item.startswith("name")]
    assert [item for item in [*written, LOGIT[4], "teacher.perturb_statistics=True"] if item not in head] == []


@pytest.mark.parametrize("pair", ["r34_r18", "r50_mv1"])
def test_the_perturbed_teacher_is_an_override(pair):
    config = load("imagenet_wkd", "teacher.perturb_statistics=True", pair=pair, method="wkd_f")
    assert config_lib.differences(load("imagenet_wkd", pair=pair, method="wkd_f"), config) == [
        "teacher.perturb_statistics: False -> True"
    ]


# Ablations

FEATURES = {  # row -> weight
    "fitnet": 100.0,
    "gaussian_w2": 0.02,
    "gaussian_w2_full": 0.02,
    "gaussian_kl": 0.08,
    "gaussian_kl_symmetric": 0.04,
    "gaussian_kl_full": 8e-4,
    "laplace_kl": 0.08,
    "exponential_kl": 0.08,
    "sinkhorn": 40.0,
    "histogram_w1": 0.04,
    "sorted_w2": 0.04,
}


@pytest.mark.parametrize("separation", ["yes", "no"])
@pytest.mark.parametrize("interrelation", [*ARGUMENTS["imagenet_ablation"]["interrelation"], *MEANINGFUL])
def test_ablation_of_wkd_l_changes_one_thing(interrelation, separation):
    config = load("imagenet_ablation", interrelation=interrelation, separation=separation)
    if interrelation in MEANINGFUL:
        changes = MEANINGFUL[interrelation]
    else:
        kind, _, kernel = interrelation.partition("_")
        changes = {"kind": {"cka": "cka", "prototypes": "cosine", "classifier": "classifier"}[kind]}
        changes |= {"kernel": kernel} if kernel else {}
    overrides = [f"name={config.name}", *(f"interrelation.{key}={value}" for key, value in changes.items())]
    overrides += [f"methods.wkd_l.separate_target={separation == 'yes'}"]
    main_row = load("imagenet_wkd", *overrides, pair="r34_r18", method="wkd_l")
    assert config_lib.differences(main_row, config) == []


def test_superclasses_of_cifar100():
    """Five classes each, by the numbers that other lists of them give: apple 0, chair 20, tank 85, worm 99."""
    groups = common.CIFAR100_GROUPS
    assert len(groups) == 100 and {groups.count(name) for name in groups} == {5} and len({*groups}) == 20
    known = {0: "fruit_and_vegetables", 1: "fish", 2: "people", 20: "household_furniture", 85: "vehicles_2"}
    known |= {81: "vehicles_2", 90: "vehicles_1", 47: "trees", 99: "non-insect_invertebrates", 66: "medium_mammals"}
    assert {label: groups[label] for label in known} == known
    for file in ("cifar100_wkd", "cifar100_cross"):
        config = load(file, method="wkd_l")
        assert config.interrelation.groups == groups
        plain = load(file, "interrelation.groups=()", method="wkd_l")
        assert config_lib.digest(config) == config_lib.digest(plain)  # it is for people


@pytest.mark.parametrize("features", FEATURES)
def test_ablation_of_wkd_f_changes_the_distance_alone(features):
    config, main_row = load("imagenet_ablation", features=features), load("imagenet_wkd", method="wkd_f")
    ((name, settings),) = config.methods.items()
    changed = ("name: ", f"methods.{name}: ", "methods.wkd_f", "interrelation.")
    assert [x for x in config_lib.differences(main_row, config) if not x.startswith(changed)] == []
    assert config.name == f"imagenet_ablation_{features}" and settings.weight == FEATURES[features]
    if name == "fitnet":
        check(settings, {"student_taps": ("stage2",), "teacher_taps": ("stage2",), "schedule.name": "constant"})
        return
    shared = ("student_tap", "teacher_tap", "projector", "schedule")
    assert {key: settings[key] for key in shared} == {key: main_row.methods.wkd_f[key] for key in shared}
    assert name == "wkd_f" or settings.form == features
    if name == "wkd_f":
        assert settings.grid == 1


@pytest.mark.parametrize("features", [name for name in FEATURES if name not in ("fitnet", "gaussian_w2")])
def test_derived_weights_of_the_ablation(features):
    """A difference d of the means of a channel costs 0.04 d^2, at variance, scale and mean 1; see the file's head."""
    settings = load("imagenet_ablation", features=features).methods.feature_distribution
    teacher = np.array([[[0.0, 5.0], [2.0, 5.0]]], np.float32)  # the second channel is a direction without spread
    shift = np.array([0, 0.05] if features == "gaussian_kl_full" else [0.05, 0], np.float32)
    shift *= 20 if features == "histogram_w1" else 1
    distance = lambda s, t: feature_distribution.FORMS[features](s, t, settings)  # noqa: E731
    cost = jax.jit(distance)(teacher + shift, teacher)
    if features == "gaussian_w2_full":
        cost = settings.mean_cov_ratio * cost[0] + cost[1]
    if features == "sinkhorn":
        cost *= np.square(shift[0] + 2) / 1000
    np.testing.assert_allclose(settings.weight * cost, 0.04 * np.square(shift).sum(), rtol=0.1)


# Schedules and images

IMAGENET = {
    "epochs": 100,
    "global_batch_size": 256,
    "ema": 0.0,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_rules": (),
    "optimizer.clip_norm": 0.0,
    "optimizer.schedule": "step",
    "optimizer.milestones": (30, 60, 90),
    "optimizer.factor": 0.1,
    "optimizer.warmup": 0.0,
    "data.name": "tfds_stream",
    "data.dataset": "imagenet2012",
    "data.train_split": "train",
    "data.test_split": "validation",
    "data.num_classes": 1000,
    "data.image_size": 224,
    "data.crop_scale": (0.08, 1.0),
    "data.train_interpolation": "bilinear",
    "data.flip": True,
    "data.rand_augment": 0.0,
    "data.resize": 256,
    "data.interpolation": "bilinear",
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "task.pad": 0,
    "task.flip": False,
    "task.mixup": 0.0,
    "task.cutmix": 0.0,
    "task.erase": 0.0,
}


@pytest.mark.parametrize("recipe", ["code", "paper"])
@pytest.mark.parametrize(("pair", "teacher"), [("r34_r18", "resnet34.tv_in1k"), ("r50_mv1", "resnet50.tv_in1k")])
def test_imagenet_schedule(pair, teacher, recipe):
    config = load("imagenet_wkd", pair=pair, recipe=recipe)
    check(config, IMAGENET | {"teacher.weights": teacher, "optimizer.nesterov": recipe == "code"})
    assert config.student.norm_group_size is None  # 256 images on one GPU


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("mdistiller", {"global_batch_size": 512, "optimizer.learning_rate": 0.2}),
        ("crd", {}),
        ("nkd", {"student.norm_group_size": 32}),
        ("wkd", {"optimizer.nesterov": True, "dtype": "bfloat16"}),
    ],
)
def test_baselines(recipe, expected):
    expected = IMAGENET | {"optimizer.nesterov": False, "dtype": "float32"} | expected
    for pair, teacher in (("r34_r18", "resnet34.tv_in1k"), ("r50_mv1", "resnet50.tv_in1k")):
        clip = {"optimizer.clip_norm": 5.0 if (recipe, pair) == ("nkd", "r50_mv1") else 0.0}
        kd = {"task.label_weight": 0.5, "methods.kd.weight": 0.5, "methods.kd.temperature": 1.0}
        kd |= {"methods.kd.schedule.name": "constant", "teacher.weights": teacher}
        check(load("imagenet_baselines", recipe=recipe, pair=pair), expected | clip | kd)
        alone = load("imagenet_baselines", recipe=recipe, pair=pair, method="none")
        check(alone, expected | clip | {"task.label_weight": 1.0, "teacher": None})


# Published settings of rivals, copied from the descriptions of their code: (config's argument, path) -> value.
PUBLISHED = {
    ("r34_r18", "dkd"): {"dkd.alpha": 1.0, "dkd.beta": 0.5, "dkd.temperature": 1.0},
    ("r50_mv1", "dkd"): {"dkd.alpha": 1.0, "dkd.beta": 2.0, "dkd.temperature": 1.0},
    ("r34_r18", "nkd"): {"nkd.gamma": 1.5, "nkd.temperature": 1.0},
    ("r34_r18", "wttm"): {"wttm.power": 0.8, "wttm.weight": 1.6},
    ("r50_mv1", "wttm"): {"wttm.power": 0.7, "wttm.weight": 3.5},
    ("r34_r18", "dist"): {"dist.weight": 2.0, "dist.temperature": 1.0, "dist.group_size": 32},
    ("r34_r18", "ctkd"): {"ctkd.loss": "dkd", "ctkd.alpha": 1.0, "ctkd.beta": 1.0, "ctkd.curriculum_epochs": 5},
    ("r50_mv1", "fitnet"): {
        "fitnet.weight": 100.0,
        "fitnet.student_taps": ("stage3",),
        "fitnet.teacher_taps": ("stage2",),
        "fitnet.projector": "conv1x1",
    },
    ("r34_r18", "crd+kd"): {"crd.weight": 0.8, "crd.num_negatives": 16384, "kd.temperature": 4.0, "kd.weight": 1.0},
    ("r34_r18", "reviewkd"): {"reviewkd.weight": 1.0, "reviewkd.mid_channels": 512},
    ("r50_mv1", "reviewkd"): {"reviewkd.weight": 8.0, "reviewkd.mid_channels": 256},
    ("r34_r18", "cat_kd"): {"cat_kd.weight": 0.5, "cat_kd.size": 4, "cat_kd.normalise": False},
    ("r50_mv1", "cat_kd"): {"cat_kd.weight": 10.0, "cat_kd.size": 2, "cat_kd.normalise": True},
    ("r34_r18", "fcfd"): {"fcfd.feature_weight": 0.02, "fcfd.temperature": 1.0, "fcfd.schedule.warmup": 5},
    ("r50_mv1", "fcfd"): {"fcfd.feature_weight": 5.0, "fcfd.temperature": 1.0},
    ("r34_r18", "ickd_c"): {"ickd_c.weight": 500.0, "ickd_c.form": "imagenet", "kd.weight": 0.5},
    ("r32x4_r8x4", "dkd"): {"dkd.alpha": 1.0, "dkd.beta": 8.0, "dkd.temperature": 4.0, "dkd.schedule.warmup": 20},
    ("r32x4_r8x4", "ttm"): {"ttm.power": 0.1, "ttm.weight": 100.0},
    ("wrn40_2_snv1", "ttm"): {"ttm.power": 0.3, "ttm.weight": 8.0},
    ("r32x4_r8x4", "wttm"): {"wttm.power": 0.1, "wttm.weight": 3.0},
    ("r32x4_r8x4", "dist"): {"dist.weight": 2.0, "dist.temperature": 4.0},
    ("r32x4_r8x4", "rkd"): {"rkd.distance_weight": 25.0, "rkd.angle_weight": 50.0},
    ("wrn40_2_snv1", "reviewkd"): {"reviewkd.weight": 5.0, "reviewkd.schedule.warmup": 20},
    ("r32x4_r8x4", "cat_kd"): {"cat_kd.weight": 15.0, "cat_kd.size": 2, "cat_kd.normalise": False},
    ("wrn40_2_snv1", "cat_kd"): {"cat_kd.weight": 80.0, "cat_kd.size": 4, "cat_kd.normalise": True},
    ("r32x4_r8x4", "fcfd"): {"fcfd.feature_weight": 5.0, "fcfd.temperature": 4.0, "fcfd.schedule.warmup": 20},
    ("r32x4_r8x4", "ickd_c"): {"ickd_c.weight": 2.5, "ickd_c.form": "cifar"},
}


@pytest.mark.parametrize(("pair", "method"), PUBLISHED)
def test_published_settings_of_rivals(pair, method):
    file = "imagenet_baselines" if pair in ("r34_r18", "r50_mv1") else "cifar100_wkd"
    config = load(file, pair=pair, method=method)
    check(config["methods"], PUBLISHED[pair, method])
    assert config.task.label_weight == (0.5 if (pair, method) == ("r34_r18", "ickd_c") else 1.0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("dkd", {"global_batch_size": 512, "optimizer.learning_rate": 0.2}),
        ("ctkd", {"epochs": 120}),
        ("fcfd", {"optimizer.nesterov": True}),
        ("dist", {"optimizer.nesterov": True, "student.norm_group_size": 32}),
        ("ickd_c", {"optimizer.name": "adamw", "optimizer.learning_rate": 2e-4, "init.weights": "resnet18.tv_in1k"}),
    ],
)
def test_own_recipes(method, expected):
    check(load("imagenet_baselines", method=method), expected)


@pytest.mark.parametrize("method", ["wkd_l", "kd"])
def test_born_again_generations(method):
    runs = with_teachers(load("imagenet_selfkd", generations=3, method=method, seed=5))
    assert [run["seed"] for run in runs] == [8, 7, 6, 5]
    assert len({run["name"] for run in runs}) == 4
    assert [list(run["methods"]) for run in runs] == [[method]] * 3 + [[]]
    assert runs[-1]["teacher"] is None
    for run in runs:
        check(run, IMAGENET | {"student.name": "resnet18", "optimizer.nesterov": True, "init.weights": ""})
    if method == "wkd_l":
        expected = load("imagenet_wkd", pair="r34_r18", method="wkd_l")
        for run in runs[:3]:
            assert config_lib.differences(expected["methods"], run["methods"]) == []
            assert config_lib.differences(expected["interrelation"], run["interrelation"]) == []
    else:
        check(runs[0], {"methods.kd.weight": 1.0, "methods.kd.temperature": 1.0, "task.label_weight": 1.0})


def test_born_again_runs_are_shared():
    """S0 and earlier generations are the same runs whatever comes after them."""
    one, two = load("imagenet_selfkd"), load("imagenet_selfkd", generations=2)
    assert config_lib.differences(one, two.teacher.train) == []
    assert config_lib.differences(one.teacher.train, load("imagenet_selfkd", method="kd").teacher.train) == []
    published = load("imagenet_selfkd", generations=2, s0="torchvision")
    first = published.teacher.train
    assert first.teacher.weights == "resnet18.tv_in1k" and first.seed == 1 and published.seed == 2


CIFAR = {
    "epochs": 240,
    "global_batch_size": 64,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.decay_rules": (),
    "optimizer.schedule": "step",
    "optimizer.milestones": (150, 180, 210),
    "optimizer.factor": 0.1,
    "optimizer.warmup": 0.0,
    "data.name": "tfds",
    "data.dataset": "cifar100",
    "task.pad": 4,
    "task.flip": True,
}
RATES = {"r32x4_r8x4": 0.05, "wrn40_2_snv1": 0.01}
TEACHERS = {"r32x4_r8x4": "resnet32x4", "wrn40_2_snv1": "wrn_40_2"}


@pytest.mark.parametrize("method", ["none", "kd", *WKD])
@pytest.mark.parametrize("pair", RATES)
def test_cifar_schedule(pair, method):
    config = load("cifar100_wkd", pair=pair, method=method)
    check(config, CIFAR | {"optimizer.learning_rate": RATES[pair], "optimizer.nesterov": method in WKD})
    if method == "none":
        assert config.teacher is None and config.task.label_weight == 1.0
        return
    check(config.teacher.train, CIFAR | {"optimizer.learning_rate": 0.05, "optimizer.nesterov": False})
    check(config.teacher, {"which": "latest", "train.student.name": TEACHERS[pair], "train.dtype": "float32"})
    published = load("cifar100_wkd", pair=pair, method=method, teacher="published")
    assert published.teacher.weights == f"{TEACHERS[pair]}.cifar100"
    if method == "kd":
        kd = {"task.label_weight": 0.1, "methods.kd.weight": 0.9, "methods.kd.temperature": 4.0}
        check(config, kd | {"methods.kd.schedule.name": "constant", "dtype": "float32"})


@pytest.mark.parametrize("pair", RATES)
def test_cifar_teachers_are_shared(pair):
    first, *rest = [load("cifar100_wkd", pair=pair, method=m).teacher.train for m in ("kd", *WKD)]
    assert all(config_lib.differences(first, other) == [] for other in rest)


# OFA-KD's config files (cnn.yaml, vit_mlp.yaml) and what the paper prints of its own runs.
CROSS_SHARED = {
    "epochs": 300,
    "ema": 0.0,
    "dtype": "float32",
    "data.name": "tfds_stream",
    "data.dataset": "cifar100",
    "data.train_split": "train",
    "data.test_split": "test",
    "data.num_classes": 100,
    "data.image_size": 224,
    "data.crop_scale": (0.08, 1.0),
    "data.train_interpolation": "random",
    "data.flip": True,
    "data.mean": (0.5071, 0.4865, 0.4409),
    "data.std": (0.2673, 0.2564, 0.2762),
    "task.label_smoothing": 0.1,
    "task.label_weight": 1.0,
    "task.pad": 0,
    "optimizer.schedule": "cosine",
}
CNN = {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 2e-3,
    "optimizer.clip_norm": 0.0,
    "optimizer.end_learning_rate": 1e-3,
    "optimizer.warmup": 3.0,
    "optimizer.warmup_learning_rate": 1e-4,
    "data.rand_augment": 0.0,
    "task.mixup": 0.0,
    "task.cutmix": 0.0,
    "task.erase": 0.0,
    "student.norm_group_size": 128,
}
TRANSFORMER = {
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": 5.0,
    "optimizer.end_learning_rate": 1e-5,
    "optimizer.warmup": 20.0,
    "optimizer.warmup_learning_rate": 5e-7,
    "data.rand_augment": 9.0,
    "task.mixup": 0.8,
    "task.cutmix": 1.0,
    "task.mix_probability": 1.0,
    "task.cutmix_share": 0.5,
    "task.mix_group_size": 128,
    "task.erase": 0.25,
}
RECIPES = {
    ("wkd", "cnn"): {"global_batch_size": 512, "optimizer.learning_rate": 2.5e-2, "optimizer.weight_decay": 2e-3},
    ("ofa", "cnn"): {"global_batch_size": 1024, "optimizer.learning_rate": 0.05, "optimizer.weight_decay": 2e-3},
    ("wkd", "vit"): {"global_batch_size": 512, "optimizer.learning_rate": 2.5e-4, "optimizer.weight_decay": 2e-3},
    ("ofa", "vit"): {"global_batch_size": 1024, "optimizer.learning_rate": 5e-4, "optimizer.weight_decay": 0.05},
}
# Network, kind, evaluation.
STUDENTS = {
    "r18": ("resnet18", "cnn", 256, "bilinear"),
    "mv2": ("mobilenetv2", "cnn", 256, "bicubic"),
    "deit_t": ("deit_tiny_patch16_224", "vit", 248, "bicubic"),
    "swin_p": ("swin_pico_patch4_window7_224", "vit", 248, "bicubic"),
}
IMAGENET_TEACHERS = {
    "swin_t": ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.ms_in1k", 248),
    "vit_s": ("vit_small_patch16_224", "vit_small_patch16_224.augreg_in21k_ft_in1k", 248),
    "convnext_t": ("convnext_tiny", "convnext_tiny.fb_in1k", 256),
}


def sides(pair: str) -> tuple[str, str]:
    student = next(name for name in STUDENTS if pair.endswith(f"_{name}"))
    return pair.removesuffix(f"_{student}"), student


@pytest.mark.parametrize("recipe", ["wkd", "ofa"])
@pytest.mark.parametrize("pair", CROSS)
def test_cross_architecture_recipe(pair, recipe):
    teacher, student = sides(pair)
    name, kind, resize, interpolation = STUDENTS[student]
    config = load("cifar100_cross", pair=pair, recipe=recipe, method="wkd_l+wkd_f")
    image = {"student.name": name, "data.resize": resize, "data.interpolation": interpolation, "seed": 42}
    check(config, CROSS_SHARED | (CNN if kind == "cnn" else TRANSFORMER) | RECIPES[recipe, kind] | image)
    check(config.methods.wkd_l, {"weight": 100.0, "temperature": 2.0, "sharpness": 1.0, "schedule.name": "constant"})
    check(config.methods.wkd_f, {"weight": 0.02, "mean_cov_ratio": 2.0, "grid": 1, "projector": "linear"})
    assert config.methods.wkd_f.schedule.name == "constant" and config.interrelation.features == "pooled"

    name, source, resize = IMAGENET_TEACHERS[teacher]
    image = {"student.name": name, "data.resize": resize, "data.interpolation": "bicubic"}
    start = {"init.weights": source, "init.reset_head": True, "global_batch_size": 1024}
    rates = {"optimizer.learning_rate": 5e-5, "optimizer.end_learning_rate": 1e-6}
    rates |= {"optimizer.warmup_learning_rate": 5e-8, "optimizer.weight_decay": 0.05}
    check(config.teacher.train, CROSS_SHARED | TRANSFORMER | image | start | rates)


def test_cross_architecture_networks_are_timms():
    student = {pair: load("cifar100_cross", pair=pair).student for pair in CROSS}
    assert student["swin_t_r18"].zero_init_residual
    assert (student["vit_s_mv2"].dropout_rate, student["vit_s_mv2"].timm_init) == (0.0, True)
    assert student["convnext_t_swin_p"].drop_path_rate == 0.1
    assert student["convnext_t_deit_t"].drop_path_rate == student["convnext_t_deit_t"].dropout_rate == 0.0


def test_cross_architecture_arguments():
    config = load("cifar100_cross", method="wkd_l+wkd_f", w_f=0.08, seed=3, **{"lambda": 150})
    check(config, {"methods.wkd_l.weight": 150.0, "methods.wkd_f.weight": 0.08, "seed": 3})
    kd = load("cifar100_cross", method="kd", pair="convnext_t_deit_t")
    check(kd, {"methods.kd.weight": 1.0, "methods.kd.temperature": 1.0, "methods.kd.schedule.name": "constant"})
    file = load("cifar100_cross", pair="vit_s_r18", weights="vit_s.pth")
    check(file.teacher, {"weights": "vit_s.pth", "train": None, "model.name": "vit_small_patch16_224"})
    assert file.teacher.normalisation.mean == (0.5071, 0.4865, 0.4409)


def test_cross_architecture_teachers_are_shared():
    made = {}
    for arguments in combinations("cifar100_cross"):
        if arguments["method"] != "none":
            train = load("cifar100_cross", **arguments).teacher.train
            made.setdefault(sides(arguments["pair"])[0], set()).add(config_lib.digest(train))
    assert {name: len(digests) for name, digests in made.items()} == {"swin_t": 1, "vit_s": 1, "convnext_t": 1}


# Networks: parameters with 1000 and 100 classes.

PARAMETERS = {
    "resnet18": {1000: 11_689_512, 100: 11_227_812},
    "resnet34": {1000: 21_797_672},
    "resnet50": {1000: 25_557_032},
    "mobilenetv1": {1000: 4_231_976},
    "mobilenetv2": {100: 2_351_972},
    "vit_small_patch16_224": {100: 21_704_164},
    "deit_tiny_patch16_224": {100: 5_543_716},
    "swin_tiny_patch4_window7_224": {100: 27_596_254},
    "swin_pico_patch4_window7_224": {100: 5_160_496},
    "convnext_tiny": {100: 27_897_028},
    "resnet8x4": {100: 1_233_540},
    "resnet32x4": {100: 7_433_860},
    "wrn_40_2": {100: 2_255_156},
    "shufflenetv1": {100: 949_258},
}


def networks(config) -> list:
    """Sections of all networks of a config."""
    found = [run["student"] for run in with_teachers(config)]
    last = with_teachers(config)[-1]["teacher"]
    if last:
        found.append(last["model"] or config_lib.model_section({"name": PUBLIC[last["weights"]].model}, "teacher"))
    return found


def abstract(section, classes: int) -> nnx.Module:
    return _abstract(json.dumps(config_lib._plain(section), sort_keys=True), classes)


@functools.cache
def _abstract(section: str, classes: int) -> nnx.Module:
    return nnx.eval_shape(lambda: build.model(json.loads(section), classes, "float32", 0))


@pytest.mark.parametrize("file", ARGUMENTS)
def test_networks_have_the_published_sizes(file):
    classes = 1000 if file.startswith("imagenet") else 100
    sections = {}
    for arguments in combinations(file):
        for section in networks(load(file, **arguments)):
            sections[section["name"]] = section
    for name, section in sections.items():
        model = abstract(section, classes)
        params = functional.split(model)[1]
        assert model.info.num_classes == classes
        assert sum(math.prod(leaf.shape) for leaf in params.values()) == PARAMETERS[name][classes], name


def test_vectors_do_not_decay():
    """timm's rule: neither biases nor anything of one axis; position embeddings, class tokens and tables do."""
    for pair in CROSS:
        config = load("cifar100_cross", pair=pair, method="wkd_f")
        for run in with_teachers(config):
            (rule,) = run["optimizer"]["decay_rules"]
            assert rule[1] == 0.0
            groups = build.optimizer._decay_groups(run["optimizer"], list(names := _params(run)))
            kept = groups[run["optimizer"]["weight_decay"]]
            assert kept == {name for name, ndim in names.items() if ndim > 1}


def _params(run) -> dict[str, int]:
    return {f"student/{k}": v.ndim for k, v in functional.split(abstract(run["student"], 100))[1].items()}


# The whole run, abstractly: methods, projectors, tasks, optimizers.


@dataclasses.dataclass(frozen=True)
class Described(OneSize):
    """A data set of which only sizes are known."""

    name: str
    class_names: tuple[str, ...]
    num_examples: int
    side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    fingerprint: str = "described"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.num_examples, dtype=np.int32) % len(self.class_names)


def described(section) -> Described:
    if section["name"] == "tfds":
        return Described("cifar100", tuple(map(str, range(100))), 50_000, 32)
    examples = {1000: 1_281_167, 100: 50_000}[section["num_classes"]]
    return Described(section["name"], tuple(map(str, range(section["num_classes"]))), examples, section["image_size"])


def case(file: str, *, slow: bool = False, **arguments):
    name = "-".join([file, *map(str, arguments.values())])
    return pytest.param(file, arguments, id=name, marks=[pytest.mark.slow] if slow else [])


WHOLE = [
    case("imagenet_wkd", pair="r34_r18"),
    case("imagenet_wkd", pair="r50_mv1"),
    case("imagenet_baselines", pair="r50_mv1", recipe="nkd"),
    case("imagenet_selfkd", generations=2),
    case("imagenet_ablation", separation="no"),
    *(case("imagenet_ablation", features=features) for features in ("gaussian_kl", "exponential_kl")),
    *(
        case("cifar100_wkd", slow=recipe == "paper", pair=pair, recipe=recipe)
        for pair in RATES
        for recipe in ("code", "paper")
    ),
    *(case("cifar100_cross", slow=pair != "convnext_t_deit_t", pair=pair, method="wkd_l+wkd_f") for pair in CROSS),
]


@pytest.fixture(name="fits")
def _fits(monkeypatch):
    """Plans a run on data and with teachers of which only the shapes are known."""

    def pretrained(config, data):
        model = abstract(networks(config)[-1], len(data.class_names))
        structure, params, variables, _ = functional.split(model)
        return build.Network(structure, {**params, **variables}, model.info, Normalisation(data.mean, data.std)), []

    monkeypatch.setattr(build, "data_set", described)
    monkeypatch.setattr(build, "pretrained", pretrained)

    def fits(file, **arguments):
        config = load(file, **arguments)
        if config.teacher and config.teacher.train and config.teacher.train.init.weights:  # nothing is downloaded here
            overrides = ["teacher.train.init.weights=''", "teacher.train.init.reset_head=False"]
            config = load(file, *overrides, **arguments)
        build.check(config)

    return fits


@pytest.mark.parametrize(("file", "arguments"), WHOLE)
def test_the_whole_run_fits_together(file, arguments, fits):
    fits(file, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "pair"), [(file, pair) for file, table in ARGUMENTS.items() for pair in table.get("pair", [None])]
)
def test_every_row_fits_together(file, pair, fits):
    rows = [row for row in combinations(file) if row.get("pair") == pair and row.get("teacher", "own") == "own"]
    assert rows
    for row in rows:
        fits(file, **row)


# One step on real images, small

TERMS = {"wkd_l": ("target", "wasserstein"), "wkd_f": ("mean", "covariance"), "kd": ("kl",)}
# One block a stage.
SHALLOW = {
    resnet: {name: dataclasses.replace(resnet.SPECS[name], depths=(1, 1, 1, 1)) for name in resnet.SPECS},
    cifar_resnet: {"resnet32x4": dataclasses.replace(cifar_resnet.SPECS["resnet32x4"], blocks=1)},
    wide_resnet: {"wrn_40_2": dataclasses.replace(wide_resnet.SPECS["wrn_40_2"], blocks=1)},
    convnext: {"convnext_tiny": dataclasses.replace(convnext.SPECS["convnext_tiny"], depths=(1, 1, 1, 1))},
}
NARROW = ["student.norm_group_size=2"]  # four images a step do not fill the recipes' groups


@pytest.mark.parametrize(
    ("file", "arguments", "overrides", "size"),
    [
        ("imagenet_wkd", {"pair": "r34_r18"}, ["methods.wkd_f.grid=1"], 64),
        ("imagenet_baselines", {"pair": "r34_r18", "recipe": "nkd"}, NARROW, 32),
        ("imagenet_selfkd", {"s0": "torchvision"}, [], 32),
        ("cifar100_wkd", {"pair": "r32x4_r8x4"}, [], 32),
        ("cifar100_cross", {"pair": "convnext_t_deit_t"}, ["student.image_size=(32, 32)", "task.mix_group_size=2"], 32),
    ],
)
def test_one_step_at_reduced_size(file, arguments, overrides, size, monkeypatch):
    one_step(monkeypatch, file, arguments, overrides, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "arguments", "overrides", "size"),
    [
        ("imagenet_wkd", {"pair": "r50_mv1"}, ["methods.wkd_f.grid=1"], 64),
        ("imagenet_baselines", {"pair": "r50_mv1", "method": "none", "recipe": "nkd"}, NARROW, 32),
        ("imagenet_selfkd", {"s0": "torchvision", "method": "kd"}, [], 32),
        ("cifar100_wkd", {"pair": "wrn40_2_snv1"}, [], 32),
        ("cifar100_cross", {"pair": "swin_t_mv2", "method": "wkd_f"}, NARROW, 64),
        ("cifar100_cross", {"pair": "vit_s_r18", "method": "wkd_l+wkd_f"}, NARROW, 64),
        ("cifar100_cross", {"pair": "convnext_t_swin_p", "method": "wkd_f"}, ["task.mix_group_size=2"], 64),
    ],
)
def test_one_step_of_the_other_pairs(file, arguments, overrides, size, monkeypatch):
    one_step(monkeypatch, file, arguments, overrides, size)


def drawn(section, classes: int, dtype: str, seed: int) -> nnx.Module:
    """A network like `build.model`'s with values of NumPy's, which need no compilation."""
    module = nnx.eval_shape(lambda: BUILD_MODEL(section, classes, dtype, seed))
    rng = np.random.default_rng(seed)
    _, params, variables, _ = functional.split(module)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) > 1:
            return rng.normal(0, math.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)
        return np.full(shape, name.rsplit("/")[-1] in ("scale", "var", "gamma"), np.float32)

    functional.update(module, {name: value(name, leaf.shape) for name, leaf in {**params, **variables}.items()})
    return module


BUILD_MODEL = build.model


def one_step(monkeypatch, file: str, arguments: dict, overrides: list[str], size: int) -> None:
    """Trains a shallow, narrow network on four digits; the teacher is a random one of the config's kind."""
    for family, specs in SHALLOW.items():
        monkeypatch.setattr(family, "SPECS", {**family.SPECS, **specs})
    monkeypatch.setattr(resnet, "WIDTHS", (16, 32, 64, 128))
    monkeypatch.setattr(vit, "DEPTH", 2)
    monkeypatch.setattr(build, "model", drawn)
    with jax.default_prng_impl("rbg"):  # compiles in half the time
        check_step(file, arguments, overrides, size)


def check_step(file: str, arguments: dict, overrides: list[str], size: int) -> None:
    config = load(file, "global_batch_size=4", "mesh.data=1", *overrides, **arguments)
    data, classes, teacher = digits(image_size=size, train_images=20), 10, None
    if config.teacher:
        section = dict(networks(config)[1])
        if "image_size" in section:
            section["image_size"] = (size, size)
        _, params, variables, _ = functional.split(drawn(section, classes, config.dtype, 7))
        normalisation = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        teacher = build.network(section, classes, config.dtype, {**params, **variables}, normalisation)
    similarity = np.where(np.eye(classes), 1.0, 0.3).astype(np.float32)
    built = build.run(config, data, teacher, lambda: similarity, devices=jax.devices()[:1])
    rows = np.arange(4, dtype=np.int32)
    images = Batch(data.train.images[rows], data.train.labels[rows], rows, np.ones(4, bool))
    batch = sharding.global_batch(images, built.mesh)
    step = jax.jit(built.program.train_step).lower(built.state, built.frozen, batch).compile()
    state, metrics = step(built.state, built.frozen, batch)

    assert int(state.step) == 1
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    terms = {f"{name}/{term}" for name in config.methods if name != "none" for term in TERMS[name]}
    assert {"label/cross_entropy", *terms} <= metrics.keys()
    assert all(metrics[f"{name}/weight"] > 0 for name in terms)
    weighed = sum(metrics[f"{name}/weight"] * metrics[name] for name in ("label/cross_entropy", *terms))
    np.testing.assert_allclose(metrics["total"], weighed, rtol=1e-5)
    moved = [name for name, start in built.state.params.items() if not np.array_equal(start, state.params[name])]
    assert len(moved) > 0.9 * len(state.params)
    assert any(name.startswith("methods/wkd_f/") for name in moved) == ("wkd_f" in config.methods)
