"""Host-side augmentation against torchvision and timm on Pillow images."""

import math

import numpy as np
import pytest
import torch
import torchvision_cpu  # noqa: F401  (before torchvision and timm)
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from timm.data import auto_augment, create_transform
from torchvision import transforms
from torchvision.transforms import functional

from wkd_jax.data import randaugment
from wkd_jax.data.image import evaluation_image, random_box, random_resized_crop
from wkd_jax.data.randomness import Random

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((250, 187))
MODES = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FILL = (124, 116, 104)


@pytest.mark.parametrize(
    ("size", "scale"), [((375, 500), (0.08, 1.0)), ((32, 32), (0.08, 1.0)), ((300, 100), (0.3, 1.0))]
)
def test_boxes_are_drawn_as_torchvision_does(size, scale):
    """Kolmogorov and Smirnov's test of area, proportions and corners; the third needs the central box half the time."""
    torch.manual_seed(0)
    image = torch.zeros((1, *size))
    theirs = [transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)]
    ours = [random_box(*size, Random(0, 0, index), scale=scale) for index in range(2000)]
    for quantity in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: math.log(width / height),
        lambda top, left, height, width: top / max(size[0] - height, 1),
        lambda top, left, height, width: left / max(size[1] - width, 1),
        lambda top, left, height, width: top + height / 2,
    ):
        samples = [[quantity(*box) for box in boxes] for boxes in (ours, theirs)]
        assert stats.ks_2samp(*samples).pvalue > 1e-3


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("source", [PHOTO, PHOTO.resize((32, 32))], ids=["photo", "32x32"])
def test_crops_have_torchvisions_pixels(interpolation, source):
    """Resized horizontally, then vertically, as Pillow before 13 does; see `image.resize` on what else differs."""
    different, values = 0, 0
    for index in range(12):
        top, left, height, width = random_box(source.height, source.width, Random(0, 0, index))
        ours = random_resized_crop(np.asarray(source), 224, Random(0, 0, index), interpolation=interpolation)
        crop = functional.crop(source, top, left, height, width)
        crop = functional.resize(crop, [height, 224], MODES[interpolation])
        theirs = np.asarray(functional.resize(crop, [224, 224], MODES[interpolation]))
        error = np.abs(ours.astype(int) - theirs)
        assert error.max() <= (1 if interpolation == "bilinear" else 2)
        different, values = different + (error > 0).sum(), values + error.size
    assert different < 0.01 * values


def test_crops_in_one_call_differ_by_rounding_between():
    """Whatever the order of this Pillow: for bilinear the intermediate rounding is all there is."""
    for index in range(12):
        box = random_box(187, 250, Random(0, 0, index))
        ours = random_resized_crop(np.asarray(PHOTO), 224, Random(0, 0, index))
        theirs = functional.resized_crop(PHOTO, *box, [224, 224], MODES["bilinear"])
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [(250, 187), (187, 250), (333, 251), (64, 64), (32, 32), (100, 31), (57, 64), (7, 1)])
def test_evaluation_is_torchvisions(interpolation, size):
    image = PHOTO.resize(size)
    for resize, crop in ((64, 56), (62, 56), (57, 56), (56, 56)):
        reference = transforms.Compose([transforms.Resize(resize, MODES[interpolation]), transforms.CenterCrop(crop)])
        ours = evaluation_image(np.asarray(image), image_size=crop, resize=resize, interpolation=interpolation)
        np.testing.assert_array_equal(ours, np.asarray(reference(image)))


@pytest.mark.parametrize(
    ("share", "resize", "interpolation"), [(0.875, 256, "bilinear"), (0.9, 248, "bicubic"), (0.95, 235, "bicubic")]
)
def test_evaluation_is_timms(share, resize, interpolation):
    steps = create_transform(224, is_training=False, interpolation=interpolation, crop_pct=share).transforms
    reference = transforms.Compose(steps[:2])
    ours = evaluation_image(np.asarray(PHOTO), image_size=224, resize=resize, interpolation=interpolation)
    np.testing.assert_array_equal(ours, np.asarray(reference(PHOTO)))


# Our names are those without how the severity goes.
THEIR_NAMES = dict(zip(randaugment.OPERATIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))


def test_rand_augment_is_what_timm_makes_of_its_name():
    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    assert [op.name for op in transform.ops] == list(THEIR_NAMES.values())
    assert all(theirs.startswith(ours) for ours, theirs in THEIR_NAMES.items())
    assert transform.num_layers == randaugment._APPLIED
    assert transform.choice_weights is None  # so with replacement
    for op in transform.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, randaugment._STD)
        assert op.magnitude_max is None  # the limit is 10
        assert op.kwargs["fillcolor"] == FILL
        assert set(op.kwargs["resample"]) == set(RESAMPLING.values())


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations_are_timms(name, monkeypatch):
    """Argument and pixels at magnitudes over the range, both signs, both interpolations."""
    image = PHOTO.resize((80, 60))
    level_to_argument = auto_augment.LEVEL_TO_ARG[THEIR_NAMES[name]]
    for level in (0.0, 0.3, 4.99, 7.5, 8.61, 9.0, 9.999, 10.0):
        for sign, drawn in ((1, 0.2), (-1, 0.8)):
            monkeypatch.setattr(auto_augment.random, "random", lambda drawn=drawn: drawn)
            value = randaugment.argument(name, level, sign)
            theirs = level_to_argument(level, {}) if level_to_argument else ()
            assert theirs == (() if value is None else (pytest.approx(value, abs=1e-12),))
            for resampling in RESAMPLING.values():
                ours = randaugment.apply(name, image, value, resampling=resampling, fill=FILL)
                if (name, value) == ("Posterize", 0):  # Pillow 13 refuses it
                    assert not ours.getbbox()
                    continue
                operation = auto_augment.NAME_TO_OP[THEIR_NAMES[name]]
                reference = operation(image, *theirs, resample=resampling, fillcolor=FILL)
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(reference))
