"""ImageNet: the rivals of WKD on ResNet-34 -> ResNet-18 and ResNet-50 -> MobileNetV1, each by its own published recipe.

    python -m wkd_jax.main --config imagenet_baselines
    python -m wkd_jax.main --config imagenet_baselines:pair=r50_mv1,method=reviewkd,recipe=wkd
    python -m wkd_jax.compare --table imagenet_r34_r18

Arguments:
  pair      r34_r18 (the default) or r50_mv1
  method    a row of the table below; kd is the default, none is labels alone
  recipe    own (the default): the method's, see the table; or one for all: mdistiller, crd, nkd, dist, ctkd, fcfd, ickd
            or wkd; see below
  source    tfds (the default): imagenet2012 of TensorFlow Datasets; folder: train/<class>/*.JPEG, val/<class>/*.JPEG
  data_dir  where that is; default: TensorFlow Datasets' own. A folder needs it.
  seed      default 0

Expected top-1 / top-5, %: the paper's tables [P] unless marked; "recipe" is what method=...,recipe=own trains with.
                r34_r18          r50_mv1          recipe      settings
  none          69.75 / 89.07    68.87 / 88.76    mdistiller
  kd            71.03 / 90.05    70.50 / 89.80    mdistiller  0.5 cross-entropy + 0.5 KL, temperature 1 [C]
  dkd           71.70 / 90.41    72.05 / 91.05    mdistiller  temperature 1, alpha 1 (in the DKD paper 0.5), beta 0.5; 2
                                                              [C]
  nkd           71.96            72.58            nkd         temperature 1, gamma 1.5 [C]
  ctkd          71.51 / 90.47    -                ctkd        its loss is DKD with alpha 1, beta 1, curriculum 5 epochs
                                                              [C]; r50_mv1 has no source: the same [D]
  ctkd_kd       71.32 [R]        -                ctkd        its loss is KD, weight 1 beside the cross-entropy [C]
  wttm          72.19            73.09            crd         power 0.8, weight 1.6; 0.7 and 3.5 [P, WTTM's]
  dist          72.07 [R]        73.24 [R]        dist        temperature 1, weight 2 of either correlation, one of them
                                                              over 32 images [C]
  fitnet        70.53 / 89.87    70.26 / 90.14    crd         weight 100, res3 onto res3, r50_mv1: 14 x 14 onto 28 x 28
                                                              (the code's index 2 of both lists [C])
  crd           71.17 / 90.13    71.37 / 90.41    crd         weight 0.8, 16,384 negatives [C]
  reviewkd      71.61 / 90.51    72.56 / 91.00    crd         weight 1; 8 with 256 channels inside [C]
  cat_kd        71.26 / 90.45    72.24 / 91.13    mdistiller  weight 0.5, 4 x 4 cells; 10, 2 x 2 cells of norm 1 [C]
  crd+kd        71.38 / 90.49    -                crd         weight 0.8, and KD of weight 1 at temperature 4 [D]
  dpk           72.51 / 90.77    73.26 / 91.17    crd         no code exists: ours is in its manner, untuned [D]
  fcfd          72.25 / 90.71    73.26 / 91.24    fcfd        feature weight 0.02 and 5, temperature 1 [C]
  ickd_c        72.19            -                ickd        weight 500, 0.5 cross-entropy + 0.5 KL at temperature 1,
                                                              starts from a trained ResNet-18 [C]
  emd_ipot      70.46            -                crd         no code exists: cost and weights are ours [D]
  dkd+reviewkd  -                -                crd         both as above; the sum is a row of the paper's COCO table
KD-Zero (72.17 and 73.02) has no row: the formulas that its search found are not public.
Hardware: unknown. Time: the paper's 215 milliseconds a step of 256 (KD, r34_r18, one GPU that is not named [P]) times
500,456 steps are 30 hours [D]; otherwise unknown. No number here was measured with this package.
[C] the authors' public code, [R] a README, [P] a paper, [D] derived by us. docs/methods.md says what is exact.

Recipes: 100 epochs of SGD with momentum 0.9, decay 1e-4 of everything, the rate a tenth after 30, 60, 90:
              batch  rate  Nesterov  otherwise
  mdistiller  512    0.2   no        of its KD, DKD and CAT-KD [C]
  crd         256    0.1   no        mdistiller's and the paper's protocol for CRD and the other feature methods [C][P]
  nkd         256    0.1   no        BatchNorm over 32 images, as on 8 GPUs [D]; gradient norm at most 5 for
                                     MobileNetV1 [C]. Its teachers, 73.62 and 76.55: --config.teacher.weights=FILE, see
                                     docs/weights.md
  dist        256    0.1   yes       BatchNorm over 32 images [D], no decay of biases and norms [C]
  ctkd        256    0.1   no        120 epochs [C]
  fcfd        256    0.1   yes       [C]
  ickd        256                    AdamW, rate 2e-4, decay 5e-4, from torchvision's ResNet-18 (r34_r18 alone) [C];
                                     from random values a third party got 68.34 [R]
  wkd         256    0.1   yes       the trainer of the WKD rows [C], to compare under one protocol
mdistiller's 512 images were spread over an unknown number of GPUs, so its BatchNorm groups are unknown: here all 512.
Its runs are float32; wkd's are fp16, here bfloat16 (slow on most CPUs). What else differs: see imagenet_wkd.py, last
paragraph.
"""

from ml_collections import ConfigDict

from configs import common

PAIRS = {
    "r34_r18": dict(teacher="resnet34.tv_in1k", student="resnet18"),
    "r50_mv1": dict(teacher="resnet50.tv_in1k", student="mobilenetv1"),
}

# What a recipe changes in 100 epochs of SGD, batch 256, rate 0.1, no Nesterov.
RECIPES = {
    "mdistiller": dict(global_batch_size=512, optimizer=dict(learning_rate=0.2)),
    "crd": {},
    "nkd": dict(student=dict(norm_group_size=32)),
    "dist": dict(
        student=dict(norm_group_size=32),
        optimizer=dict(nesterov=True, decay_rules=((r"(^|/)(bias|scale)$", 0.0),)),
    ),
    "ctkd": dict(epochs=120),
    "fcfd": dict(optimizer=dict(nesterov=True)),
    "ickd": dict(
        init=dict(weights="resnet18.tv_in1k"), optimizer=dict(name="adamw", learning_rate=2e-4, weight_decay=5e-4)
    ),
    "wkd": dict(dtype="bfloat16", optimizer=dict(nesterov=True)),
}

_CONSTANT = dict(name="constant", start=0, warmup=0)
_HALF_KD = dict(weight=0.5, temperature=1.0, schedule=_CONSTANT)
_CRD = dict(weight=0.8, embedding=128, num_negatives=16384, temperature=0.07, momentum=0.5, schedule=_CONSTANT)

# method -> its own recipe, the weight of the cross-entropy, and the settings for both pairs
ROWS = {
    "none": dict(recipe="mdistiller", methods=dict(none={})),
    "kd": dict(recipe="mdistiller", label_weight=0.5, methods=dict(kd=_HALF_KD)),
    "dkd": dict(recipe="mdistiller", methods=dict(dkd=dict(alpha=1.0, beta=0.5, temperature=1.0, schedule=_CONSTANT))),
    "nkd": dict(recipe="nkd", methods=dict(nkd=dict(gamma=1.5, temperature=1.0, schedule=_CONSTANT))),
    "ctkd": dict(
        recipe="ctkd",
        methods=dict(
            ctkd=dict(
                form="global", loss="dkd", alpha=1.0, beta=1.0, curriculum_epochs=5, weight=1.0, schedule=_CONSTANT
            )
        ),
    ),
    "ctkd_kd": dict(
        recipe="ctkd",
        methods=dict(ctkd=dict(form="global", loss="kd", curriculum_epochs=5, weight=1.0, schedule=_CONSTANT)),
    ),
    "wttm": dict(recipe="crd", methods=dict(wttm=dict(weight=1.6, power=0.8, schedule=_CONSTANT))),
    "dist": dict(
        recipe="dist",
        methods=dict(dist=dict(weight=2.0, beta=1.0, gamma=1.0, temperature=1.0, group_size=32, schedule=_CONSTANT)),
    ),
    "fitnet": dict(
        recipe="crd",
        methods=dict(fitnet=dict(weight=100.0, student_taps=("stage2",), teacher_taps=("stage2",), schedule=_CONSTANT)),
    ),
    "crd": dict(recipe="crd", methods=dict(crd=_CRD)),
    "crd+kd": dict(recipe="crd", methods=dict(crd=_CRD, kd=dict(weight=1.0, temperature=4.0, schedule=_CONSTANT))),
    "reviewkd": dict(
        recipe="crd",
        methods=dict(reviewkd=dict(weight=1.0, mid_channels=512, preactivation="both", schedule=_CONSTANT)),
    ),
    "cat_kd": dict(
        recipe="mdistiller", methods=dict(cat_kd=dict(weight=0.5, size=4, normalise=False, schedule=_CONSTANT))
    ),
    "dpk": dict(recipe="crd", methods=dict(dpk=dict(weight=1.0, schedule=_CONSTANT))),
    "fcfd": dict(
        recipe="fcfd",
        methods=dict(
            fcfd=dict(
                feature_weight=0.02,
                kd_weight=1.0,
                mixed_weight=1.0,
                temperature=1.0,
                schedule=dict(_CONSTANT, warmup=5),
            )
        ),
    ),
    "ickd_c": dict(
        recipe="ickd",
        label_weight=0.5,
        methods=dict(kd=_HALF_KD, ickd_c=dict(weight=500.0, form="imagenet", schedule=_CONSTANT)),
    ),
    "emd_ipot": dict(
        recipe="crd", methods=dict(emd_ipot=dict(weight=1.0, cost="cosine", beta=1.0, num_iters=50, schedule=_CONSTANT))
    ),
}
ROWS["dkd+reviewkd"] = dict(recipe="crd", methods=ROWS["dkd"]["methods"] | ROWS["reviewkd"]["methods"])

# (pair, method's part) -> what differs from the settings above
OWN = {
    ("r50_mv1", "dkd"): dict(beta=2.0),
    ("r50_mv1", "wttm"): dict(weight=3.5, power=0.7),
    ("r50_mv1", "fitnet"): dict(student_taps=("stage3",)),
    ("r50_mv1", "reviewkd"): dict(weight=8.0, mid_channels=256),
    ("r50_mv1", "cat_kd"): dict(weight=10.0, size=2, normalise=True),
    ("r50_mv1", "fcfd"): dict(feature_weight=5.0),
}


def get_config(argument: str = "") -> ConfigDict:
    """The config; see the file's head for the arguments."""
    args = common.parse(argument, pair="r34_r18", method="kd", recipe="own", source="tfds", data_dir="", seed=0)
    pair, row = common.choose("pair", args.pair, PAIRS), common.choose("method", args.method, ROWS)
    name = row["recipe"] if args.recipe == "own" else args.recipe
    recipe = common.choose("recipe", name, dict(own={}, **RECIPES))
    if name == "ickd" and args.pair != "r34_r18":
        raise ValueError(f"config argument recipe=ickd: published for pair=r34_r18 alone, not for {args.pair}")
    config = ConfigDict(common.imagenet_schedule(nesterov=False))
    config.name = common.file_name("imagenet", args.pair, args.method, name)
    config.seed = args.seed
    config.dtype = "float32"
    config.data = ConfigDict(common.imagenet(args.source, args.data_dir))
    config.task = ConfigDict(dict(label_weight=row.get("label_weight", 1.0)))
    config.student = ConfigDict(dict(name=pair["student"]))
    config.update(ConfigDict(recipe))
    if (args.pair, name) == ("r50_mv1", "nkd"):
        config.optimizer.clip_norm = 5.0
    config.methods = ConfigDict(
        {method: settings | OWN.get((args.pair, method), {}) for method, settings in row["methods"].items()}
    )
    if args.method != "none":
        config.teacher = ConfigDict(dict(weights=pair["teacher"]))
    return config
