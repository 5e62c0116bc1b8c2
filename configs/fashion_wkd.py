"""A resnet8 teacher, a student of half its width, on Fashion-MNIST: 70,000 images of ten kinds of clothes.

    python -m wkd_jax.data prepare fashion_mnist --from DIRECTORY-OF-THE-IDX-FILES
    python -m wkd_jax.main --config fashion_wkd
    python -m wkd_jax.main --config fashion_wkd:method=kd,train_images=500

Debian's package dataset-fashion-mnist has the files, in /usr/share/datasets/fashion-mnist.

Arguments:
  method        any of wkd_jax's methods (`METHODS` in digits_wkd.py), or a sum; default wkd_l+wkd_f
  train_images  training images of the student, balanced over the classes; 0 (the default): all. The teacher always sees
                all of them.
  seed          of the student's run; the teacher's is 0
  split         test (the default); validation: nothing sees the test images, 6,000 of the training images are evaluated
  image_size    side of the images, pixels; default 14, half of what the files have
  data_dir      where TensorFlow Datasets keeps fashion_mnist; default: its own

Not a setting of the paper: real images, and networks so small that hundreds of runs take hours on a CPU. Batches of 64.
All images: one epoch, without schedules of loss weights, which count epochs; fewer: 600 steps; teacher: eight epochs.
What each method reaches, with as many trials: docs/evidence.md.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, digits_wkd
from wkd_jax import registry

SPLITS = {
    "test": dict(train_split="train", test_split="test"),
    "validation": dict(train_split="train[:54000]", test_split="train[54000:]"),
}
# Kinds of clothes that people would call alike, one for each class; see interrelation.groups.
GROUPS = ("top", "trouser", "top", "top", "top", "footwear", "top", "footwear", "bag", "footwear")


def get_config(argument: str = "") -> ConfigDict:
    """The config; see the file's head for the arguments."""
    args = common.parse(
        argument, method="wkd_l+wkd_f", train_images=0, seed=0, split="test", image_size=14, data_dir=""
    )
    methods = common.summed(args.method, digits_wkd.METHODS)
    common.check_subset(args.train_images)
    data = dict(
        name="tfds",
        dataset="fashion_mnist",
        image_size=args.image_size,
        **common.choose("split", args.split, SPLITS),
        **common.directory(args.data_dir),
    )
    length = dict(steps=600) if args.train_images else dict(epochs=1)
    config = _base("resnet8_half", dict(data, train_images=args.train_images), length)
    config.name = common.file_name(
        "fashion", args.method, str(args.train_images or ""), args.split.removeprefix("test")
    )
    config.seed = args.seed
    config.task.label_weight = digits_wkd.LABEL_WEIGHTS.get(args.method, 1.0)
    if not args.train_images:
        for name, settings in methods.items():
            if "schedule" in registry.get("methods", name).DEFAULTS:
                settings["schedule"] = dict(name="constant")
    config.methods = ConfigDict(methods)
    config.interrelation = ConfigDict(dict(groups=GROUPS))
    if not {*methods} <= {*digits_wkd.ALONE}:
        teacher = _base("resnet8", data, dict(epochs=8))
        teacher.name = "fashion_teacher"
        config.teacher = ConfigDict(dict(train=teacher))
    return config


def _base(model: str, data: dict[str, Any], length: dict[str, int]) -> ConfigDict:
    return ConfigDict(
        dict(
            **length,
            global_batch_size=64,
            data=data,
            student=dict(name=model),
            task=dict(pad=1, flip=True),
            optimizer=dict(learning_rate=0.05, weight_decay=5e-4, schedule="cosine", unit="steps", warmup=50),
            log_every=50,
            eval_every=1000 if "steps" in length else length["epochs"],
            checkpoint_every=1000,
        )
    )
