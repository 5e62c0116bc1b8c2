"""Decoding, resizing and cropping on the host, against Pillow."""

import io
import threading

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from wkd_jax.data import image as module
from wkd_jax.data.image import (
    decode,
    evaluation_image,
    random_box,
    random_resized_crop,
    resize,
    training_image,
)
from wkd_jax.data.randomness import Random

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((250, 187))


def encode(image, image_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def by_pillow(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def with_alpha(mode):
    image = PHOTO.convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(250, dtype=np.uint8), (187, 1))))
    return image.convert(mode)


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


GREY16 = np.arange(187 * 250, dtype=np.uint16).reshape(187, 250)

SAME = {
    "4:4:4": encode(PHOTO, quality=92, subsampling=0),
    "4:2:2": encode(PHOTO, quality=92, subsampling=1),
    "4:2:0, odd sides": encode(PHOTO.resize((251, 185)), quality=75),
    "progressive": encode(PHOTO, quality=92, progressive=True),
    "restart markers": encode(PHOTO, restart_marker_blocks=3),
    "grey": encode(PHOTO.convert("L")),
    "EXIF says turn": encode(PHOTO, exif=rotated_by_exif()),
    "PNG": encode(PHOTO, "PNG"),
    "PNG grey": encode(PHOTO.convert("L"), "PNG"),
    "PNG two colours": encode(PHOTO.convert("1"), "PNG"),
    "PNG palette": encode(PHOTO.quantize(13), "PNG"),
    "PNG palette with a transparent colour": encode(PHOTO.quantize(13), "PNG", transparency=1),
    "PNG with a transparent colour": encode(PHOTO, "PNG", transparency=(0, 0, 0)),
    "PNG alpha": encode(with_alpha("RGBA"), "PNG"),
    "PNG grey alpha": encode(with_alpha("LA"), "PNG"),
    "PNG 16 bit colour": cv2.imencode(".png", np.stack([GREY16, GREY16 // 2, 65535 - GREY16], -1))[1].tobytes(),
    "one pixel": encode(PHOTO.crop((9, 9, 10, 10))),
}


@pytest.mark.parametrize("kind", SAME)
def test_pixels_are_pillows(kind):
    pixels = decode(SAME[kind])
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, by_pillow(SAME[kind]))


def test_cmyk_differs_by_one_grey_level_at_most():
    encoded = encode(PHOTO.convert("CMYK"), quality=92)
    np.testing.assert_allclose(decode(encoded).astype(int), by_pillow(encoded).astype(int), atol=1)


def test_of_16_bit_grey_the_high_byte_is_taken():
    """Pillow's convert("RGB") makes all of it 255 from 256 on."""
    pixels = decode(encode(Image.fromarray(GREY16), "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat((GREY16 >> 8)[..., None], 3, -1))


JPEG, PROGRESSIVE, PNG = SAME["4:2:0, odd sides"], SAME["progressive"], SAME["PNG palette"]
START_OF_SCAN = JPEG.index(b"\xff\xda")


@pytest.mark.parametrize("whole", [JPEG, PROGRESSIVE, SAME["restart markers"], PNG], ids=["jpeg", "prog", "rst", "png"])
@pytest.mark.parametrize("padding", [b"", bytes(1000)], ids=["", "padded"])
def test_every_cut_is_an_error(whole, padding):
    """Padding: what a file that was allocated before its transfer has. OpenCV returns a half-grey image for it."""
    cuts = {1, 2, 3, 5, 13, 100, len(whole) // 2, len(whole) - START_OF_SCAN - 40, len(whole) - 20, len(whole) - 2}
    for cut in cuts:
        with pytest.raises(ValueError, match="truncated"):
            decode(whole[:-cut] + padding)


@pytest.mark.parametrize("junk", [b"", b"\x89PNG", b"hello", bytes(100), b"\xff\xd8", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_an_error(junk):
    with pytest.raises(ValueError, match=f"{len(junk)} bytes"):
        decode(junk)


@pytest.mark.parametrize("extra", [b"\0", b"\xff", b"trailing text", bytes(1000), b"\xff\xd8\xff\xe0 half another"])
@pytest.mark.parametrize("whole", [JPEG, PROGRESSIVE, PNG], ids=["jpeg", "prog", "png"])
def test_bytes_after_the_end_are_ignored(whole, extra):
    np.testing.assert_array_equal(decode(whole + extra), by_pillow(whole))


def test_end_within_a_segment_is_not_the_end():
    """A thumbnail in EXIF has its own end of image."""
    segment = b"Exif\0\0" + encode(PHOTO.resize((16, 12)))
    encoded = JPEG[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + JPEG[2:]
    np.testing.assert_array_equal(decode(encoded + b"\0"), by_pillow(JPEG))
    with pytest.raises(ValueError, match="truncated"):
        decode(encoded[:-2] + bytes(100))
    with pytest.raises(ValueError, match="no image that OpenCV can decode"):
        decode(encoded[: 6 + len(segment)])  # ends as a whole file does


def horizontally_first(pixels, size, interpolation):
    """Pillow's result, in the order of passes that versions before 13 have at all sizes."""
    image = Image.fromarray(pixels).resize((size[1], pixels.shape[0]), PILLOW[interpolation])
    return np.asarray(image.resize((size[1], size[0]), PILLOW[interpolation])).astype(int)


@pytest.mark.parametrize("interpolation", PILLOW)
def test_resize_is_pillows_up_to_rounding(interpolation):
    """Coefficients of 16 bits: one level in two passes, seldom another from amplification by the second."""
    photo = np.asarray(PHOTO)
    sizes = [(187, 250), (120, 250), (187, 100), (60, 80), (224, 224), (31, 240), (1, 250), (187, 1), (1, 1), (32, 32)]
    different, values = 0, 0
    for height, width in sizes:
        for target in ((224, 224), (96, 100), (1, 7), (height, 50)):
            part = photo[187 - height :, :width]
            ours = resize(part, target, interpolation).astype(int)
            error = np.abs(ours - horizontally_first(part, target, interpolation))
            assert error.max() <= 1, (height, width, target)
            different, values = different + (error > 0).sum(), values + error.size
    assert different < 0.01 * values


@pytest.mark.parametrize("interpolation", PILLOW)
def test_resize_at_the_extremes(interpolation):
    """Noise of 0 and 255, where bicubic overshoots most, and constants, which no rounding may change."""
    noise = (np.random.default_rng(0).integers(0, 2, (300, 400, 3)) * 255).astype(np.uint8)
    for size in ((224, 224), (37, 350), (350, 37)):
        error = np.abs(resize(noise, size, interpolation) - horizontally_first(noise, size, interpolation))
        assert error.max() <= 2
        assert (error > 0).mean() < 0.05  # the more is summed into a value, the more coefficients are rounded
    for value in (0, 1, 128, 254, 255):
        constant = np.full((123, 211, 3), value, np.uint8)
        assert set(resize(constant, (224, 64), interpolation).ravel()) == {value}


def test_resize_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(np.asarray(PHOTO), (187, 250), "bicubic"), np.asarray(PHOTO))


def test_threads_do_not_disturb_each_other():
    photo = np.asarray(PHOTO)
    expected = [resize(photo[i:], (64, 64), "bilinear") for i in range(8)]
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = resize(photo[i:], (64, 64), "bilinear")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results, expected)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (1, 1), (1, 300), (300, 1), (2, 3), (10, 200)])
def test_boxes_are_within_the_image(height, width):
    for index in range(300):
        top, left, box_height, box_width = random_box(height, width, Random(0, 0, index))
        assert box_height > 0
        assert box_width > 0
        assert 0 <= top <= height - box_height
        assert 0 <= left <= width - box_width


def test_corners_reach_all_borders():
    """Uniform over all positions, both ends included."""
    boxes = np.array([random_box(8, 8, Random(0, 0, index), scale=(0.25, 0.25)) for index in range(1000)])
    square = boxes[(boxes[:, 2] == 4) & (boxes[:, 3] == 4)]
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (square[:, 0], square[:, 1]), 1)
    assert counts.min() > 0
    assert abs(counts[[0, -1]].sum() / counts.sum() - 2 / 5) < 4 * (0.24 / counts.sum()) ** 0.5


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (1, 300, (0, 149, 1, 1))],
)
def test_central_box_where_none_fits(height, width, box):
    assert random_box(height, width, Random(0, 0, 0), scale=(1.0, 1.0)) == box


def test_whole_image_where_none_fits_and_proportions_are_allowed():
    """Of the whole area only boxes of just these proportions fit, which ten tries miss for nearly every example."""
    boxes = [random_box(375, 500, Random(0, 0, index), scale=(1.0, 1.0)) for index in range(20)]
    assert boxes.count((0, 0, 375, 500)) > 15


def test_crop_is_the_resized_box():
    photo = np.asarray(PHOTO)
    for interpolation in PILLOW:
        top, left, height, width = random_box(187, 250, Random(1, 2, 3), scale=(0.3, 0.6))
        crop = random_resized_crop(photo, 64, Random(1, 2, 3), scale=(0.3, 0.6), interpolation=interpolation)
        part = photo[top : top + height, left : left + width]
        np.testing.assert_array_equal(crop, resize(part, (64, 64), interpolation))
        assert np.abs(crop - horizontally_first(part, (64, 64), interpolation)).max() <= 1


def test_random_interpolation_takes_both():
    photo = np.asarray(PHOTO)[:40, :40]
    taken = []
    for index in range(40):
        crop = random_resized_crop(photo, 64, Random(0, 0, index), interpolation="random")
        same = [
            np.array_equal(crop, random_resized_crop(photo, 64, Random(0, 0, index), interpolation=interpolation))
            for interpolation in PILLOW
        ]
        assert sum(same) == 1
        taken.append(same[0])
    assert 8 <= sum(taken) <= 32


def test_training_image_is_a_function_of_its_place_only():
    encoded = SAME["4:4:4"]
    settings = {"image_size": 48, "interpolation": "random", "rand_augment": 9.0}
    images = {place: training_image(encoded, Random(*place), **settings) for place in ((0, 0, 0), (0, 1, 0), (1, 0, 0))}
    assert all(image.shape == (48, 48, 3) and image.dtype == np.uint8 for image in images.values())
    for place, image in images.items():
        np.testing.assert_array_equal(image, training_image(decode(encoded), Random(*place), **settings))
    assert len({image.tobytes() for image in images.values()}) == 3


def test_half_are_flipped_after_the_crop():
    flipped = 0
    for index in range(200):
        plain = training_image(np.asarray(PHOTO), Random(0, 0, index), image_size=16, flip=False)
        image = training_image(np.asarray(PHOTO), Random(0, 0, index), image_size=16)
        if not np.array_equal(image, plain):
            np.testing.assert_array_equal(image, plain[:, ::-1])
            flipped += 1
    assert 70 <= flipped <= 130


def test_rand_augment_comes_last_with_its_settings(monkeypatch):
    calls = []

    def rand_augment(image, random, **settings):
        calls.append((image, settings))
        return image

    monkeypatch.setattr(module.randaugment, "rand_augment", rand_augment)
    settings = {"image_size": 16, "interpolation": "bicubic"}
    plain = training_image(np.asarray(PHOTO), Random(0, 0, 0), **settings)
    assert not calls
    training_image(np.asarray(PHOTO), Random(0, 0, 0), **settings, rand_augment=7.0, fill=(1, 2, 3))
    ((image, given),) = calls
    np.testing.assert_array_equal(image, plain)
    assert given == {"magnitude": 7.0, "interpolation": "bicubic", "fill": (1, 2, 3)}


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (32, 32), (20, 61), (1, 5), (300, 300)])
def test_evaluation_image_has_the_size(shape):
    image = evaluation_image(np.zeros((*shape, 3), np.uint8), image_size=48, resize=55)
    assert image.shape == (48, 48, 3)
    assert image.dtype == np.uint8


def test_evaluation_image_takes_encoded_ones():
    np.testing.assert_array_equal(evaluation_image(JPEG), evaluation_image(decode(JPEG)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: resize(image[..., :1], (2, 2), "bilinear"), "need .H, W, 3. uint8"),
        (lambda image: resize(image.astype(np.float32), (2, 2), "bilinear"), "float32"),
        (lambda image: resize(image[:0], (2, 2), "bilinear"), "at least one pixel"),
        (lambda image: resize(image, (0, 2), "bilinear"), r"size=\(0, 2\)"),
        (lambda image: resize(image, (2, 2), "linear"), "did you mean 'bilinear'"),
        (lambda image: training_image(image, Random(0, 0, 0), scale=(0.0, 1.0)), "scale="),
        (lambda image: training_image(image, Random(0, 0, 0), scale=(0.5, 0.4)), "scale="),
        (lambda image: training_image(image, Random(0, 0, 0), scale=(0.5, 1.1)), "scale="),
        (lambda image: training_image(image, Random(0, 0, 0), interpolation="area"), "unknown interpolation 'area'"),
        (lambda image: training_image(image, Random(0, 0, 0), rand_augment=-1.0), "magnitude=-1.0"),
        (lambda image: evaluation_image(image, interpolation="random"), "unknown interpolation 'random'"),
        (lambda image: evaluation_image(image, image_size=224, resize=223), "image_size=224, resize=223"),
        (lambda image: evaluation_image(image, image_size=0), "image_size=0"),
        (lambda image: evaluation_image(image[0]), "need .H, W, 3. uint8"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((8, 8, 3), np.uint8))
