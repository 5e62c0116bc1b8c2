"""RandAugment: what is drawn, and each operation against its definition. tests/parity compares with timm."""

import collections

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from wkd_jax.data import randaugment
from wkd_jax.data.randaugment import OPERATIONS, apply, argument, rand_augment
from wkd_jax.data.randomness import Random

PHOTO = np.asarray(Image.fromarray(load_sample_image("flower.jpg")).resize((40, 32)))
FILL = (124, 116, 104)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def at_nine(name, sign=1, image=PHOTO, resampling=BILINEAR):
    value = argument(name, 9.0, sign)
    return np.asarray(apply(name, Image.fromarray(image), value, resampling=resampling, fill=FILL)).astype(int)


@pytest.fixture
def drawn(monkeypatch):
    """Calls of `argument` and `apply` of every image that a test augments: lists of (name, level, sign, resampling)."""
    calls = []

    def noted_argument(name, level, sign):
        calls.append([name, level, sign])
        return argument(name, level, sign)

    def noted_apply(name, image, value, *, resampling, fill):
        assert name == calls[-1][0]
        assert fill == FILL
        calls[-1].append(resampling)
        return image

    monkeypatch.setattr(randaugment, "argument", noted_argument)
    monkeypatch.setattr(randaugment, "apply", noted_apply)
    return calls


def test_draws(drawn):
    images = 3000
    counts = collections.Counter()
    for index in range(images):
        before = len(drawn)
        rand_augment(PHOTO, Random(0, 0, index), magnitude=9.0, interpolation="random", fill=FILL)
        counts[len(drawn) - before] += 1
    # Each of two is applied with probability 0.5.
    for applied, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(counts[applied] / images - share) < 0.04
    names, levels, signs, resampling = zip(*drawn, strict=True)
    share = np.array([names.count(name) for name in OPERATIONS]) / len(names)
    np.testing.assert_allclose(share, 1 / 15, atol=0.02)
    assert min(levels) < 9.0
    assert max(levels) == 10.0  # clipped: two standard deviations up
    assert abs(levels.count(10.0) / len(levels) - 0.0228) < 0.012
    assert abs(np.mean(np.array(levels) < 8.5) - 0.1587) < 0.03
    assert abs(signs.count(1) / len(signs) - 0.5) < 0.04
    assert set(resampling) == {BILINEAR, BICUBIC}
    assert abs(resampling.count(BICUBIC) / len(resampling) - 0.5) < 0.04


def test_operations_are_drawn_with_replacement(drawn):
    twice = 0
    for index in range(1500):
        before = len(drawn)
        rand_augment(PHOTO, Random(1, 0, index), fill=FILL)
        twice += len(drawn) - before == 2 and drawn[-1][0] == drawn[-2][0]
    assert 8 <= twice <= 50  # 1500 / 4 / 15 = 25


@pytest.mark.parametrize(("interpolation", "resampling"), [("bilinear", BILINEAR), ("bicubic", BICUBIC)])
def test_a_named_interpolation_is_kept(drawn, interpolation, resampling):
    for index in range(30):
        rand_augment(PHOTO, Random(0, 0, index), interpolation=interpolation, fill=FILL)
    assert {call[3] for call in drawn} == {resampling}


def test_arguments_at_nine():
    both = {name: (argument(name, 9.0, 1), argument(name, 9.0, -1)) for name in OPERATIONS}
    assert both == {
        "AutoContrast": (None, None),
        "Equalize": (None, None),
        "Invert": (None, None),
        "Rotate": (27.0, -27.0),
        "Posterize": (1, 1),
        "Solarize": (26, 26),
        "SolarizeAdd": (99, 99),
        "Color": pytest.approx((1.81, 0.19)),
        "Contrast": pytest.approx((1.81, 0.19)),
        "Brightness": pytest.approx((1.81, 0.19)),
        "Sharpness": pytest.approx((1.81, 0.19)),
        "ShearX": pytest.approx((0.27, -0.27)),
        "ShearY": pytest.approx((0.27, -0.27)),
        "TranslateX": pytest.approx((0.405, -0.405)),
        "TranslateY": pytest.approx((0.405, -0.405)),
    }


def test_arguments_at_the_ends():
    assert argument("Posterize", 10.0, 1) == 0
    assert not apply("Posterize", Image.fromarray(PHOTO), 0, resampling=BILINEAR, fill=FILL).getbbox()  # black
    assert argument("Color", 10.0, -1) == 0.1
    assert argument("Solarize", 0.0, 1) == 256  # no pixel reaches it


def test_pointwise_operations():
    photo = PHOTO.astype(int)
    np.testing.assert_array_equal(at_nine("Invert"), 255 - photo)
    np.testing.assert_array_equal(at_nine("Posterize"), photo & 0b10000000)
    np.testing.assert_array_equal(at_nine("Solarize"), np.where(photo >= 26, 255 - photo, photo))
    np.testing.assert_array_equal(at_nine("SolarizeAdd"), np.where(photo < 128, np.minimum(photo + 99, 255), photo))


def blend(background, factor):
    return np.clip(background + (PHOTO - background) * factor, 0, 255)


@pytest.mark.parametrize("sign", [1, -1])
def test_enhancements_blend_with_their_background(sign):
    """Grey, its mean, black, and smoothed: to the rounding of Pillow, which cuts."""
    factor = 1 + sign * 0.81
    grey = PHOTO @ np.array([299, 587, 114]) / 1000
    assert np.abs(at_nine("Color", sign) - blend(np.round(grey)[..., None], factor)).max() <= 2
    assert np.abs(at_nine("Contrast", sign) - blend(np.round(grey.mean()), factor)).max() <= 2
    assert np.abs(at_nine("Brightness", sign) - blend(0, factor)).max() <= 1
    smooth = PHOTO.astype(float)
    weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    windows = np.lib.stride_tricks.sliding_window_view(PHOTO, (3, 3), axis=(0, 1))
    smooth[1:-1, 1:-1] = np.round((windows * weights).sum((-2, -1)))
    assert np.abs(at_nine("Sharpness", sign) - blend(smooth, factor)).max() <= 2


def test_auto_contrast_stretches_each_channel():
    image = (PHOTO // 2 + np.array([10, 20, 60])).astype(np.uint8)
    result = at_nine("AutoContrast", image=image)
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    assert np.abs(result - (image - low) * 255 / (high - low)).max() <= 1
    assert (result.min((0, 1)) == 0).all()
    assert (result.max((0, 1)) == 255).all()


def test_equalize_flattens_each_channel():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 8, 3))
    dark = (ramp.astype(int) ** 2 // 255).astype(np.uint8)
    result = at_nine("Equalize", image=np.ascontiguousarray(dark))
    assert np.abs(result.mean((0, 1)) - 127.5).max() < 4
    assert dark.mean() < 86


def test_moves_take_pixels_from_where_the_matrix_says_and_fill():
    shifted = at_nine("TranslateX", image=np.ascontiguousarray(PHOTO[:, :20]))  # by 0.405 * 20 = 8.1 pixels
    assert (shifted[:, 12:] == FILL).all()
    expected = 0.9 * PHOTO[:, 8:19].astype(float) + 0.1 * PHOTO[:, 9:20]
    assert np.abs(shifted[:, :11] - expected).max() <= 1.01  # cut, not rounded
    shifted = at_nine("TranslateY", sign=-1, image=np.ascontiguousarray(PHOTO[:20]))
    assert (shifted[:8] == FILL).all()
    sheared = at_nine("ShearX", image=PHOTO)
    assert (sheared[-1, -8:] == FILL).all()  # the lowest row comes from 0.27 * 31.5 pixels to the right
    assert (at_nine("ShearY", image=PHOTO)[-10:, -1] == FILL).all()
    turned = at_nine("Rotate", image=PHOTO)
    assert all((turned[y, x] == FILL).all() for y in (0, -1) for x in (0, -1))
    np.testing.assert_allclose(turned[15:17, 19:21].mean((0, 1)), PHOTO[15:17, 19:21].mean((0, 1)), atol=8)


def test_signs_are_opposite_moves():
    """Shearing the mirrored image the other way is the mirror image."""
    for name in ("ShearX", "TranslateX", "Rotate"):
        mirrored = at_nine(name, -1, np.ascontiguousarray(PHOTO[:, ::-1]))[:, ::-1]
        assert np.abs(at_nine(name, 1) - mirrored).max() <= 1, name


def test_pixels_depend_on_place_only():
    for index in range(20):
        once = rand_augment(PHOTO, Random(3, 1, index))
        assert once.shape == PHOTO.shape
        assert once.dtype == np.uint8
        np.testing.assert_array_equal(once, rand_augment(PHOTO.copy(), Random(3, 1, index)))


@pytest.mark.parametrize("magnitude", [0.0, -1.0, 10.5])
def test_magnitude_out_of_range(magnitude):
    with pytest.raises(ValueError, match=f"magnitude={magnitude}"):
        rand_augment(PHOTO, Random(0, 0, 0), magnitude=magnitude)


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'bilinear'"):
        rand_augment(PHOTO, Random(0, 0, 0), interpolation="linear")
    with pytest.raises(ValueError, match="did you mean 'Shear"):
        argument("ShearZ", 1.0, 1)
    with pytest.raises(ValueError, match="did you mean 'Rotate'"):
        apply("rotate", Image.fromarray(PHOTO), 1.0, resampling=BILINEAR, fill=FILL)
