"""A resnet8x4 teacher, a resnet8 student, WKD-L + WKD-F, on 1,797 handwritten digits. Minutes on a laptop.

    python -m wkd_jax.main --config digits_wkd
    python -m wkd_jax.main --config digits_wkd:method=kd,train_images=300
    python -m wkd_jax.compare --config digits_wkd --methods none kd wkd_l wkd_f wkd_l+wkd_f --seeds 5

Arguments:
  method        any of wkd_jax's methods (`METHODS` below), or a sum; default wkd_l+wkd_f
  train_images  training images of the student, balanced over the classes; 0 (the default): all 1,297. The teacher
                always sees all of them. The number of steps stays about the same.
  seed          of the student's run; the teacher's is 0
  pair          r8x4_r8 (the default): resnet8x4 to resnet8; r8_half: resnet8 to one of half its width, for many runs
  split         test (the default); validation: nothing sees the test images, the last 297 training images are evaluated

Not a setting of the paper: a small one that runs everything the paper's settings run. The rivals have weights of the
order of those published for CIFAR-100 or ImageNet, less where ten classes instead of a hundred are in the formula
(Tf-KD), or where a term would start at more than some ten times the cross-entropy (FitNet, CAT-KD, the KL of features).
Nothing is tuned. Expected numbers: README.

Sums of methods: a label weight of its own (BAN's, Tf-KD's) belongs to the method alone, in a sum it is 1.
"""

from ml_collections import ConfigDict

from configs import common

METHODS = {
    "none": {},
    "kd": dict(weight=1.0, temperature=4.0),
    "dkd": dict(alpha=1.0, beta=2.0, temperature=4.0, schedule=dict(warmup=2)),
    "nkd": dict(gamma=1.5, temperature=1.0),
    "ctkd": dict(weight=1.0, curriculum_epochs=5),
    "ttm": dict(weight=7.0, power=0.3),
    "wttm": dict(weight=1.5, power=0.3),
    "dist": dict(weight=2.0, temperature=1.0),
    "ofa": dict(weight=1.0, exit_weight=0.1),
    "distiller": dict(weight=2.0, transformations=("softmax", "standardize"), distance="l2"),
    "emd_ipot": dict(weight=1.0),
    "fitnet": dict(weight=30.0),
    "cc": dict(weight=0.02),
    "rkd": dict(distance_weight=25.0, angle_weight=50.0),
    "crd": dict(weight=0.8, num_negatives=512),
    "reviewkd": dict(weight=1.0, preactivation="teacher", schedule=dict(warmup=2)),
    "cat_kd": dict(weight=0.5, size=2),
    "dpk": dict(weight=1.0, width=64, heads=4),
    "fcfd": dict(feature_weight=0.02, temperature=4.0, schedule=dict(warmup=2)),
    "ickd_c": dict(weight=2.5, form="cifar"),
    "tf_kd_self": dict(weight=4.75, temperature=6.0),
    "tf_kd_reg": dict(weight=1.0, temperature=20.0),
    "frskd": dict(weight=2.0, attention_weight=100.0),
    "zipf": dict(weight=0.1),
    "uskd": dict(target_weight=0.1, nontarget_weight=0.1, weak_weight=0.1),
    "ban": dict(weight=1.0),
    "feature_distribution": dict(weight=0.005, form="gaussian_kl", eps=1e-2, projector="conv1x1"),
    "wkd_l": dict(weight=10.0, temperature=4.0, schedule=dict(name="cosine", start=0)),
    "wkd_f": dict(weight=0.1, mean_cov_ratio=4.0, projector="conv1x1", grid=1, schedule=dict(name="cosine", start=0)),
}
# Weight of the cross-entropy, where a method has its own.
LABEL_WEIGHTS = {"tf_kd_self": 0.05, "tf_kd_reg": 0.9, "ban": 0.0}
PAIRS = {"r8x4_r8": ("resnet8x4", "resnet8"), "r8_half": ("resnet8", "resnet8_half")}  # teacher, student
SPLITS = {"test": {}, "validation": dict(validation=True)}
ALONE = ("none", "tf_kd_reg", "frskd", "zipf", "uskd")  # methods without a teacher


def get_config(argument: str = "") -> ConfigDict:
    """The config; see the file's head for the arguments."""
    args = common.parse(argument, method="wkd_l+wkd_f", train_images=0, seed=0, pair="r8x4_r8", split="test")
    teacher, student = common.choose("pair", args.pair, PAIRS)
    data = common.choose("split", args.split, SPLITS)
    images = 1000 if data else 1297
    methods = common.summed(args.method, METHODS)
    common.check_subset(args.train_images)
    config = _base(round(20 * 1297 / (args.train_images or images)), data)
    config.name = common.file_name("digits", args.method, str(args.train_images or ""), args.split.removeprefix("test"))
    config.seed = args.seed
    config.data.train_images = args.train_images
    config.student = ConfigDict(dict(name=student))
    config.task.label_weight = LABEL_WEIGHTS.get(args.method, 1.0)
    config.methods = ConfigDict(methods)
    if not {*methods} <= {*ALONE}:
        config.teacher = ConfigDict(dict(train=_teacher(teacher, data)))
    return config


def _teacher(name: str, data: dict[str, bool]) -> ConfigDict:
    config = _base(10, data)
    config.name = "digits_teacher"
    config.student = ConfigDict(dict(name=name))
    return config


def _base(epochs: int, data: dict[str, bool]) -> ConfigDict:
    return ConfigDict(
        dict(
            epochs=epochs,
            global_batch_size=64,
            data=dict(name="digits", image_size=16, **data),
            task=dict(pad=2),
            optimizer=dict(learning_rate=0.05, weight_decay=5e-4, schedule="cosine", warmup=1),
            log_every=10,
            eval_every=max(1, epochs // 10),
        )
    )
