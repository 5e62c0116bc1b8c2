"""ImageNet: ResNet-18 as its own teacher, born-again networks (BAN) with WKD-L, the paper's self-distillation table.

    python -m wkd_jax.main --config configs/imagenet_selfkd.py
    python -m wkd_jax.main --config configs/imagenet_selfkd.py:generations=2,s0=torchvision

Generation 0 (S0) learns from labels alone. Every later one is a new network of the same shape, from scratch and with a
seed of its own, whose frozen teacher is the one before. The command trains all that are not there yet, one after the
other.

Arguments:
  generations  after S0; default 1, as in the paper
  method       wkd_l (the default), or kd: the KL-based BAN, cross-entropy + KL at temperature 1
  s0           own (the default): trained here on the same schedule; torchvision: its published ResNet-18
  recipe       code (the default) or paper; as in imagenet_wkd.py, which lists what differs, row by row
  source       tfds (the default): imagenet2012 of TensorFlow Datasets; folder: train/<class>/*.JPEG, val/<class>/*.JPEG
  data_dir     where that is; default: TensorFlow Datasets' own. A folder needs it.
  seed         of S0; generation g has seed + g. Default 0

Expected top-1, % [P], after one generation: S0 69.75, kd 70.50 (the BAN row), wkd_l 71.35. Hardware and time: unknown;
a step is cheaper than one of imagenet_wkd.py, whose teacher is larger. No number here was measured with this package.
[P] the paper, [D] derived by us.

No config of this setting is public. The paper says that schedule and WKD-L's settings are those of ResNet-34 ->
ResNet-18 (lambda 30, temperature 2, kappa 1), one generation [P]. Not said, and chosen here [D]: S0 is a run of its own
(torchvision's file scores 69.76, which fits the table as well); the teacher is the last checkpoint (teacher.which=best
for the best); class similarities are rebuilt from each teacher. The KL-based BAN has its soft term alone in one of its
forms: --config.task.label_weight=0.0. What else differs: see imagenet_wkd.py, last paragraph.
"""

from ml_collections import ConfigDict

from configs import common

TORCHVISION = "resnet18.tv_in1k"


def get_config(argument: str = "") -> ConfigDict:
    """The config; see the file's head for the arguments."""
    args = common.parse(
        argument, generations=1, method="wkd_l", s0="own", recipe="code", source="tfds", data_dir="", seed=0
    )
    if args.generations < 1:
        raise ValueError(f"config argument generations={args.generations}: must be 1 or more")
    code = common.choose("recipe", args.recipe, dict(code=True, paper=False))
    methods = common.choose(
        "method",
        args.method,
        dict(
            wkd_l=common.wkd(args.recipe, dict(wkd_l=dict(weight=30.0, temperature=2.0, sharpness=1.0))),
            kd=dict(kd=dict(weight=1.0, temperature=1.0, schedule=dict(name="constant"))),
        ),
    )

    def run(generation: int) -> ConfigDict:
        config = ConfigDict(common.imagenet_schedule(nesterov=code))
        method = args.method if generation else ""
        config.name = common.file_name(
            "imagenet_r18", f"s{generation}", method, args.s0 if method else "", "" if code else args.recipe
        )
        config.seed = args.seed + generation
        config.dtype = "bfloat16" if code else "float32"
        config.data = ConfigDict(common.imagenet(args.source, args.data_dir))
        config.student = ConfigDict(dict(name="resnet18"))
        if generation:
            config.methods = ConfigDict(methods)
            config.interrelation = ConfigDict(common.interrelation("logits" if code else "pooled"))
            config.teacher = ConfigDict(first if generation == 1 else dict(train=run(generation - 1)))
        return config

    sources = dict(own=dict(train=run(0)), torchvision=dict(weights=TORCHVISION))
    first = common.choose("s0", args.s0, sources)
    return run(args.generations)
