"""Mixup, cutmix and random erasing against loops in NumPy float64, their distributions, and eight devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from wkd_jax.data import mix
from wkd_jax.types import Batch

BATCH, SIZE, CLASSES = 16, (12, 9), 5
BOTH = {"num_classes": CLASSES, "mixup": 0.8, "cutmix": 1.0}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def _batch(batch=BATCH):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *SIZE, 3), dtype=np.uint8)
    labels, index = rng.integers(0, CLASSES, batch), rng.permutation(100)[:batch]
    return Batch(images, labels.astype(np.int32), index.astype(np.int32), np.ones(batch, bool))


def _mixed(images, labels, valid, share, box):
    """The definition, an image at a time."""
    size = len(images) // len(share)
    out, soft = images.copy(), np.eye(CLASSES)[labels]
    for i in range(len(images)):
        group = i // size
        j = group * size + size - 1 - i % size
        if not (valid[i] and valid[j]):
            continue
        lam, (top, left, bottom, right) = float(share[group]), box[group]
        out[i] = np.rint(lam * images[i].astype(float) + (1 - lam) * images[j])
        out[i, top:bottom, left:right] = images[j, top:bottom, left:right]
        lam *= 1 - (bottom - top) * (right - left) / math.prod(SIZE)
        soft[i] = lam * np.eye(CLASSES)[labels[i]] + (1 - lam) * np.eye(CLASSES)[labels[j]]
    return out, soft


@pytest.fixture(scope="module")
def draws():
    """4096 groups of each setting, by (mixup, cutmix, probability)."""
    draw = jax.jit(
        lambda key, **settings: mix.draw_mix(jnp.arange(4096), key, SIZE, **settings),
        static_argnames=("mixup", "cutmix"),
    )

    def of(mixup, cutmix, probability, cutmix_share=0.5, seed=0):
        settings = {"probability": probability, "cutmix_share": cutmix_share}
        return map(np.asarray, draw(jax.random.key(seed), mixup=mixup, cutmix=cutmix, **settings))

    return of


def _area(box):
    return (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])


@pytest.mark.parametrize("group_size", [0, 4])
def test_mixes_as_defined(group_size):
    batch = _batch()
    batch.valid[[1, 4]] = False  # of groups of 4: partners 2 and 7
    batch.image[[1, 4]] = 0
    size, key = group_size or BATCH, jax.random.key(1)
    settings = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "cutmix_share": 0.5}
    drawn = jax.jit(lambda index: mix.draw_mix(index, key, SIZE, **settings))(batch.index[::size])
    mixed = jax.jit(functools.partial(mix.mix, group_size=group_size, **BOTH))(batch, key)
    assert mixed.image.dtype == jnp.uint8 and mixed.label.dtype == jnp.float32
    expected, soft = _mixed(batch.image, batch.label, batch.valid, *map(np.asarray, drawn))
    np.testing.assert_array_equal(mixed.image, expected)
    np.testing.assert_allclose(mixed.label, soft, atol=1e-7)  # a rounding or two of numbers up to 1
    np.testing.assert_allclose(mixed.label.sum(axis=-1), 1, rtol=1e-6)
    partner = [i // size * size + size - 1 - i % size for i in range(BATCH)]
    alone = ~(batch.valid & batch.valid[partner])
    assert alone.sum() == 4
    changed = (np.asarray(mixed.image) != batch.image).any(axis=(1, 2, 3))
    assert not changed[alone].any() and changed[~alone].sum() >= 8
    np.testing.assert_array_equal(mixed.label[alone], np.eye(CLASSES)[batch.label[alone]])


def test_microbatches_are_mixed_as_the_whole_batch_is():
    batch, key = _batch(), jax.random.key(1)
    run = jax.jit(functools.partial(mix.mix, group_size=4, **BOTH))
    whole = run(batch, key)
    assert len(np.unique(np.asarray(whole.label))) >= 6  # groups differ
    for part in (slice(0, 8), slice(8, 16)):
        piece = run(jax.tree.map(lambda leaf, part=part: leaf[part], batch), key)
        jax.tree.map(lambda a, b, part=part: np.testing.assert_array_equal(a, b[part]), piece, whole)


def test_mixup_is_exact_for_every_pair_of_values():
    """So it cannot depend on how a compiler fuses and rounds."""
    left, right = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    images = np.stack([left, right])[..., None]
    apply = jax.jit(functools.partial(mix.apply_mix, num_classes=2))
    for part in (0, 1, 21845, 32768, 65535, 65536):
        share, box = np.float32([part / 65536]), np.zeros((1, 4), np.int32)
        mixed, _ = apply(images, np.arange(2), np.ones(2, bool), share, box)
        whole, rest = np.divmod(images.astype(int) * part + images[::-1].astype(int) * (65536 - part), 65536)
        up = (rest > 32768) | ((rest == 32768) & (whole % 2 == 1))
        np.testing.assert_array_equal(mixed, whole + up)


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0, 4.0])
def test_lam_is_beta_distributed(alpha):
    count = 20_000
    radius, angle = jax.random.uniform(jax.random.key(3), (2, count))
    lam = np.asarray(jax.jit(mix.symmetric_beta)(radius, angle, jnp.full(count, alpha)))
    assert lam.min() >= 0 and lam.max() <= 1
    edges = np.linspace(0, 1, 11)  # of wide bins: with alpha 0.1 a tenth of the mass rounds to 1
    observed = np.histogram(lam, edges)[0]
    expected = {a: count * np.diff(scipy.stats.beta(a, a).cdf(edges)) for a in (alpha, 1.2 * alpha)}
    assert scipy.stats.chisquare(observed, expected[alpha]).pvalue > 0.01
    assert scipy.stats.chisquare(observed, expected[1.2 * alpha]).pvalue < 1e-4


def test_symmetric_beta_at_its_ends():
    radius, angle = jnp.array([0.0, 0.0, 0.0, 1 - 2.0**-24, 1e-30]), jnp.array([0.0, 0.25, 0.5, 0.1, 0.25])
    beta = jax.jit(mix.symmetric_beta)
    for alpha in (0.01, 1.0, 1000.0):
        lam = np.asarray(beta(radius, angle, jnp.full(5, alpha)))
        assert np.all((lam >= 0) & (lam <= 1)), (alpha, lam)


def test_draws_of_one_kind(draws):
    share, box = draws(0.8, 0.0, 1.0)
    assert not _area(box).any()
    assert scipy.stats.kstest(share, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    share, box = draws(0.0, 1.0, 1.0)
    np.testing.assert_array_equal(share, 1)
    assert (_area(box) > 0).mean() > 0.9


@pytest.mark.parametrize(("probability", "cutmix_share"), [(1.0, 0.5), (0.4, 0.25), (0.0, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_draws_of_both_kinds(draws, probability, cutmix_share):
    share, box = draws(0.8, 1.0, probability, cutmix_share)
    cut, up = _area(box) > 0, share < 1
    assert not (cut & up).any()
    # A box of one try in 100 or so is empty: its sides are less than a pixel.
    empty = 1 / min(SIZE) ** 2
    for found, expected in (
        (cut.mean(), probability * cutmix_share * (1 - empty)),
        (up.mean(), probability * (1 - cutmix_share)),
    ):
        assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / 4096) + 0.01 * (expected > 0)
    if not probability:
        assert not cut.any() and not up.any()


def test_groups_and_steps_draw_anew(draws):
    share, box = draws(0.8, 0.0, 1.0)
    assert len(np.unique(share)) > 3500  # of 65,537 values
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 0.08  # 5 / sqrt(4096)
    other, _ = draws(0.8, 0.0, 1.0, seed=1)
    assert abs(np.corrcoef(share, other)[0, 1]) < 0.08
    _, box = draws(0.0, 1.0, 1.0)
    assert len(np.unique(box, axis=0)) > 100


@pytest.mark.parametrize("size", [(224, 224), (12, 9), (1, 7)])
def test_cut_box_equals_float64(size):
    rng = np.random.default_rng(2)
    lam = np.concatenate([[0.0, 0.75, 1.0], rng.integers(0, 65537, 500) / 65536])
    row, column = (rng.integers(0, side, len(lam)) for side in size)
    expected = []
    for share, *centre in zip(lam, row, column, strict=True):
        cut = [int(side * math.sqrt(1 - share)) for side in size]
        low = [max(c - n // 2, 0) for c, n in zip(centre, cut, strict=True)]
        expected.append(low + [min(c - n // 2 + n, side) for c, n, side in zip(centre, cut, size, strict=True)])
    box = jax.jit(mix.cut_box, static_argnums=3)(lam.astype(np.float32), row, column, size)
    assert box.dtype == jnp.int32
    np.testing.assert_array_equal(box, expected)


def _rows():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.NamedSharding(mesh, jax.P("data"))


@pytest.mark.parametrize("group_size", [4, 8, 0])
def test_mixing_on_eight_devices_equals_one(group_size):
    """Groups within devices stay there; images of wider ones go to their partner's device alone."""
    batch, key, rows = _batch(32), jax.random.key(1), _rows()
    run = functools.partial(mix.mix, group_size=group_size, **BOTH)
    alone = jax.jit(run)(batch, key)
    placed = jax.device_put(batch, rows)
    compiled = jax.jit(run, out_shardings=rows).lower(placed, key).compile()
    many = compiled(placed, key)
    np.testing.assert_array_equal(many.image, alone.image)
    np.testing.assert_allclose(many.label, alone.label, rtol=1e-6)  # the two programs may round lambda otherwise
    moved = re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({'|'.join(COLLECTIVES)})", compiled.as_text())
    images = {(dtype, op) for dtype, shape, op in moved if shape.endswith("12,9,3")}
    if group_size == 4:
        assert not moved
    else:
        assert images == {("u8", "collective-permute")}
        assert not {op for _, _, op in moved} & {"all-gather", "all-to-all"}


def _erased(numbers, size, probability):
    """The definition, an image at a time."""
    chance, areas, aspects, place = np.split(np.asarray(numbers, float), [1, 11, 21])
    if chance[0] >= probability:
        return [0] * 4
    for area, aspect in zip(areas, aspects, strict=True):
        area = (0.02 + area * (1 / 3 - 0.02)) * math.prod(size)
        ratio = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
        sides = [round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))]
        if sides[0] < size[0] and sides[1] < size[1]:
            corner = [int(u * (whole - side + 1)) for u, whole, side in zip(place, size, sides, strict=True)]
            return corner + [c + side for c, side in zip(corner, sides, strict=True)]
    return [0] * 4


@pytest.mark.parametrize(("size", "probability"), [((32, 32), 1.0), ((6, 60), 0.5), ((2, 2), 1.0)])
def test_erased_box_equals_float64(size, probability):
    numbers = np.random.default_rng(4).random((300, mix.ERASE_NUMBERS)).astype(np.float32)
    boxes = jax.jit(jax.vmap(lambda one: mix.erase_box(one, size, probability=probability)))(numbers)
    assert boxes.dtype == jnp.int32
    np.testing.assert_array_equal(boxes, [_erased(one, size, probability) for one in numbers])
    if size == (6, 60):  # even of ten tries none may fit into a narrow image
        nothing = (np.asarray(_area(boxes)) == 0) & (numbers[:, 0] < probability)
        assert 0 < nothing.sum() < 100


@jax.jit
def _draw(index, key, probability):
    return mix.draw_erase(index, key, (224, 224), probability=probability)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erased_images_and_places(probability):
    count = 4096
    box = np.asarray(_draw(jnp.arange(count), jax.random.key(0), probability)[0])
    some = box[_area(box) > 0]
    assert abs(len(some) / count - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)
    if not probability:
        return
    assert (some >= 0).all() and (some <= 224).all()
    rng = np.random.default_rng(5)
    expected = np.array([_erased(rng.random(mix.ERASE_NUMBERS), (224, 224), 1.0) for _ in range(count)])
    for quantity in (
        _area,
        lambda box: (box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]),
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert scipy.stats.ks_2samp(quantity(some), quantity(expected)).pvalue > 0.01


def test_an_erased_box_depends_on_key_and_position_alone():
    index, key = np.arange(50, 50 + BATCH), jax.random.key(5)
    box, keys = _draw(index, key, 1.0)
    order = np.random.default_rng(1).permutation(BATCH)
    shuffled_box, shuffled_keys = _draw(index[order], key, 1.0)
    np.testing.assert_array_equal(shuffled_box, np.asarray(box)[order])
    np.testing.assert_array_equal(jax.random.key_data(shuffled_keys), jax.random.key_data(keys)[order])
    assert (np.asarray(_draw(index, jax.random.key(6), 1.0)[0]) != np.asarray(box)).any(axis=1).all()
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == BATCH


def test_erased_pixels_are_normal_noise_and_the_rest_is_untouched():
    images = np.random.default_rng(6).normal(5, 1, (4, 40, 30, 3)).astype(np.float32)
    box = jnp.array([[0, 0, 39, 29], [3, 4, 5, 30], [0, 0, 0, 0], [10, 10, 40, 11]])
    keys = jax.random.split(jax.random.key(2), 4)
    erase = jax.jit(mix.erase)
    out = np.asarray(erase(images, box, keys))
    inside = np.zeros(images.shape, bool)
    for i, (top, left, bottom, right) in enumerate(box):
        inside[i, top:bottom, left:right] = True
    np.testing.assert_array_equal(out[~inside], images[~inside])
    noise = out[inside]
    assert scipy.stats.kstest(noise, "norm").pvalue > 0.01
    assert len(np.unique(noise)) > 0.999 * len(noise)  # anew for each pixel, channel and image
    again = np.asarray(erase(images * 2 + 1, box, keys))
    np.testing.assert_array_equal(again[inside], noise)


@pytest.mark.parametrize(
    ("batch", "group_size", "message"),
    [
        (16, 6, "mix_group_size=6: must be even and divide the batch of 16 images"),
        (15, 5, "mix_group_size=5: must be even and divide the batch of 15"),
        (16, 32, "mix_group_size=32: must be even and divide the batch of 16"),
        (7, 0, "mix_group_size=0, the whole batch: must be even and divide the batch of 7"),
    ],
)
def test_batches_that_are_no_even_groups(batch, group_size, message):
    with pytest.raises(ValueError, match=message):
        mix.mix(_batch(batch), jax.random.key(0), group_size=group_size, **BOTH)


def test_refusals():
    batch, key = _batch(), jax.random.key(0)
    with pytest.raises(ValueError, match="need uint8 as loaded, got float32"):
        mix.mix(dataclasses.replace(batch, image=batch.image.astype(np.float32)), key, **BOTH)
    with pytest.raises(ValueError, match="mixup=0, cutmix=0: one must be above 0"):
        mix.mix(batch, key, num_classes=CLASSES, mixup=0, cutmix=0)
    with pytest.raises(ValueError, match="need normalised floats, got uint8"):
        mix.erase(batch.image, jnp.zeros((BATCH, 4), jnp.int32), jax.random.split(key, BATCH))
