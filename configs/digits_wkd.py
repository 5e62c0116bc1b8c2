"""A resnet8x4 teacher, a resnet8 student, WKD-L + WKD-F, on 1,797 handwritten digits. Minutes on a laptop.

    python -m wkd_jax.main --config configs/digits_wkd.py
    python -m wkd_jax.main --config configs/digits_wkd.py:method=kd,train_images=300

Arguments:
  method        none, kd, wkd_l, wkd_f, or a sum such as wkd_l+wkd_f (the default)
  train_images  training images of the student, balanced over the classes; 0 (the default): all 1,297. The teacher
                always sees all of them. The number of steps stays about the same.
  seed          of the student's run; the teacher's is 0

Not a setting of the paper: a small one that runs everything the paper's settings run. Expected numbers: README.
"""

from ml_collections import ConfigDict

from configs import common

METHODS = {
    "none": {},
    "kd": dict(weight=1.0, temperature=4.0),
    "wkd_l": dict(weight=10.0, temperature=4.0, schedule=dict(name="cosine", start=0)),
    "wkd_f": dict(weight=0.1, mean_cov_ratio=4.0, projector="conv1x1", grid=1, schedule=dict(name="cosine", start=0)),
}


def get_config(argument: str = "") -> ConfigDict:
    """The config; see the file's head for the arguments."""
    args = common.parse(argument, method="wkd_l+wkd_f", train_images=0, seed=0)
    if args.train_images < 0:
        raise ValueError(f"config argument train_images={args.train_images}: must be 0 or more")
    config = _base(epochs=round(20 * 1297 / (args.train_images or 1297)))
    config.name = f"digits_{args.method.replace('+', '_')}" + (f"_{args.train_images}" if args.train_images else "")
    config.seed = args.seed
    config.data.train_images = args.train_images
    config.student = ConfigDict(dict(name="resnet8"))
    config.methods = ConfigDict({name: common.choose("method", name, METHODS) for name in args.method.split("+")})
    if args.method != "none":
        config.teacher = ConfigDict(dict(train=_teacher()))
    return config


def _teacher() -> ConfigDict:
    config = _base(epochs=10)
    config.name = "digits_teacher"
    config.student = ConfigDict(dict(name="resnet8x4"))
    return config


def _base(epochs: int) -> ConfigDict:
    return ConfigDict(
        dict(
            epochs=epochs,
            global_batch_size=64,
            data=dict(name="digits", image_size=16),
            task=dict(pad=2),
            optimizer=dict(learning_rate=0.05, weight_decay=5e-4, schedule="cosine", warmup_epochs=1),
            log_every=10,
            eval_every=max(1, epochs // 10),
        )
    )
