"""What the config files share: their arguments, ImageNet, and the two forms of WKD."""

import difflib
from types import SimpleNamespace
from typing import Any


def parse(argument: str, **defaults: Any) -> SimpleNamespace:
    """Arguments after the colon of --config: "key=value,key=value", each in the type of its default.

    Raises:
      ValueError: For an unknown key, one given twice, or a value of another type.

    Example:
      >>> parse("seed=3", method="kd", seed=0)
      namespace(method='kd', seed=3)
    """
    values: dict[str, Any] = {}
    for item in filter(None, argument.split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r}: {_hint(key, defaults)}")
        if key in values:
            raise ValueError(f"config argument {item!r}: {key} is given twice, {values[key]!r} before; give it once")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"config argument {item!r}: needs {key}=<{type(defaults[key]).__name__}>")
    return SimpleNamespace(**defaults | values)


def choose(key: str, name: str, table: dict[str, Any]) -> Any:
    """The entry of a config's table that an argument names.

    Raises:
      ValueError: If there is none; names the nearest and all of them.
    """
    if name not in table:
        raise ValueError(f"config argument {key}={name}: {_hint(name, table)}")
    return table[name]


def summed(method: str, table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `methods` section of a sum of methods, "wkd_l+wkd_f", out of a config's table of settings.

    Raises:
      ValueError: If it names a method that is not in the table, or one twice.
    """
    names = method.split("+")
    if len({*names}) < len(names):
        raise ValueError(f"config argument method={method}: names a method twice")
    return {name: dict(choose("method", name, table)) for name in names}


def check_subset(train_images: int) -> None:
    """Refuses a negative number of training images.

    Raises:
      ValueError: Names the argument.
    """
    if train_images < 0:
        raise ValueError(f"config argument train_images={train_images}: must be 0 or more")


def imagenet(source: str, data_dir: str) -> dict[str, Any]:
    """The `data` section of ImageNet-1k at 224 pixels: the crops, flips and evaluation of torchvision's ResNets.

    Args:
      source: "tfds" (prepared by TensorFlow Datasets) or "folder" (train/<class>/*.JPEG, val/<class>/*.JPEG).
      data_dir: Where it is; "" for the default directory of TensorFlow Datasets.

    Raises:
      ValueError: If there is no such source, or a folder is wanted and not given.
    """
    sources = {"tfds": dict(name="tfds_stream", dataset="imagenet2012"), "folder": dict(name="image_folder")}
    chosen = choose("source", source, sources)
    if source == "folder" and not data_dir:
        raise ValueError("config argument source=folder: needs data_dir=DIRECTORY, the one that holds train and val")
    return dict(
        chosen,
        num_classes=1000,
        image_size=224,
        crop_scale=(0.08, 1.0),
        train_interpolation="bilinear",
        flip=True,
        resize=256,
        interpolation="bilinear",
        **directory(data_dir),
    )


def directory(data_dir: str) -> dict[str, str]:
    """The key `data_dir` where the argument is given; else the data set has its own default."""
    return dict(data_dir=data_dir) if data_dir else {}


def imagenet_schedule(*, global_batch_size: int = 256, learning_rate: float = 0.1, nesterov: bool) -> dict[str, Any]:
    """100 epochs of SGD, the rate a tenth after 30, 60 and 90 of them; everything decays, no warm-up."""
    return dict(
        epochs=100,
        global_batch_size=global_batch_size,
        optimizer=dict(
            name="sgd",
            learning_rate=learning_rate,
            momentum=0.9,
            nesterov=nesterov,
            weight_decay=1e-4,
            schedule="step",
            milestones=(30, 60, 90),
            factor=0.1,
        ),
        log_every=50,
        checkpoint_every=1000,
    )


# What the released code and the paper's text do differently in the losses, whatever the setting. See imagenet_wkd.py.
_FORMS = {
    "wkd_l": {
        "code": dict(num_iters=10, stabilizer=1e-8, exact_marginal="student"),
        "paper": dict(num_iters=9, stabilizer=0.0, exact_marginal="teacher"),
    },
    "wkd_f": {"code": dict(ddof=1), "paper": dict(ddof=0)},
}
_SHARED = {
    "wkd_l": dict(target_weight=1.0, epsilon=0.05, gradient="unrolled"),
    "wkd_f": dict(student_tap="last", teacher_tap="last", eps=1e-5),
}


def wkd(recipe: str, methods: dict[str, dict[str, Any]], *, start: int | None = 0) -> dict[str, Any]:
    """The `methods` section for WKD-L, WKD-F or both, in the form of the released code or of the paper.

    Args:
      recipe: "code" or "paper".
      methods: Method -> the settings that are the row's own.
      start: code: the last epoch with the full weight, before it falls along a cosine to 0; None: it never falls. The
        paper has no decay.
    """
    constant = dict(name="constant")
    schedules = {"code": constant if start is None else dict(name="cosine", start=start), "paper": constant}
    schedule = choose("recipe", recipe, schedules)
    return {
        name: dict(_SHARED[name], **_FORMS[name][recipe], schedule=schedule, **settings)
        for name, settings in methods.items()
    }


def interrelation(features: str, groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `interrelation` section: linear CKA, as many images of each class as the smallest has.

    Args:
      features: Of the classes.
      groups: A name for each class; the report says whether similar classes share it.
    """
    return dict(kind="cka", kernel="linear", features=features, samples_per_class=0, groups=groups)


# The superclasses of CIFAR-100 and the classes in them (Krizhevsky, 2009), by the names in its files.
_CIFAR100 = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
# The superclass of each of its classes, which are numbered in alphabetical order.
CIFAR100_GROUPS = tuple(
    group for _, group in sorted((n, group) for group, own in _CIFAR100.items() for n in own.split())
)


def file_name(*parts: str) -> str:
    """A run's name: what is not empty, joined by underscores.

    Example:
      >>> file_name("imagenet", "wkd_l+wkd_f", "")
      'imagenet_wkd_l_wkd_f'
    """
    return "_".join(filter(None, parts)).replace("+", "_")


def _hint(name: str, valid: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]!r}? " if near else "unknown. ") + f"Valid: {', '.join(valid)}"
